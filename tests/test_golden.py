"""The losses of the first steps, against a file: what no other test asks, it is the same training as before.

A change that is meant to change them writes the file anew: ``python tests/test_golden.py``.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config

FILE = Path(__file__).parent / "golden" / "digits_losses.json"
OPTIONS = [
    "digits",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--backend",
    "torch",
    "--loader",
    "torch",
    "--batch-size",
    "32",
]
OPTIONS += ["--steps", "50", "--warmup", "10", "--refresh-every", "20", "--log-every", "1", "--precision", "fp32"]


def losses() -> list[dict[str, float | None]]:
    """Every loss term of each of 50 steps."""
    config = parse_config(OPTIONS, "train")
    # Small rates: rounding, which differs between machines, is not to grow into another course of training.
    rates = replace(config.optimizer, learning_rate=0.005, backbone_learning_rate=0.005)
    trainer = build_trainer(*resolve(replace(config, optimizer=rates)))
    no_losses = ("domain_accuracy", "learning_rate", "adversarial_ramp", "images_per_second", "data_wait")
    evaluation = ("accuracy", "mean_per_class", "mutual_information")
    reports = list(trainer.run(lambda: None))
    trainer.loader.close()
    return [
        {
            name: report.values[name]
            for name in report.values
            if name not in no_losses + evaluation and not name.startswith("score_")
        }
        for report in reports
    ]


def test_losses_are_those_of_the_file_and_the_same_again() -> None:
    found = losses()
    expected = json.loads(FILE.read_text())
    assert len(found) == len(expected) == 50
    for step, (line, same) in enumerate(zip(found, expected)):
        assert line == pytest.approx(same, rel=1e-4), f"step {step + 1}"
    # Bit for bit on one machine.
    assert losses() == found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text("[\n" + ",\n".join(json.dumps(line) for line in losses()) + "\n]\n")

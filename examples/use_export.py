"""An export used elsewhere: with PyTorch alone (`model.pt2`), and with safetensors into layers of one's own.

Run: python examples/use_export.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import gsda_fast


def make_export(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train on made-up embeddings and export into `folder`; return rows, and the probabilities that they should get."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    rows = (4 * np.eye(3, 8)[labels] + generator.standard_normal((120, 8))).astype(np.float32)
    adapted = gsda_fast.adapt((rows, labels), rows + np.float32(0.5), steps=60, warmup=20, progress=False)
    adapted.export(folder)
    return rows[:5], adapted.predict_proba(rows[:5])


def by_program(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Run the exported program: it holds the network, so PyTorch is all that is needed."""
    stored = {"facts.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=stored)
    facts = json.loads(stored["facts.json"])
    print(f"model.pt2: {facts['method']}, {facts['step']} steps, classes {facts['classes']}")
    _, logits = program.module()(torch.from_numpy(rows))
    return logits.softmax(1).detach().numpy()


def by_parameters(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Put the parameters into layers of one's own, which the facts beside them describe."""
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    print(f"model.safetensors: {', '.join(sorted(weights))}")
    values = torch.from_numpy(rows)
    if facts["feature_norm"] == "rms":
        values = torch.nn.functional.rms_norm(values, values.shape[-1:])
    features = torch.nn.functional.linear(values, weights["bottleneck.0.weight"], weights["bottleneck.0.bias"])
    if facts["bottleneck_activation"] == "relu":
        features = features.relu()
    logits = torch.nn.functional.linear(features, weights["classifier.weight"], weights["classifier.bias"])
    return logits.softmax(1).numpy()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, expected = make_export(folder)
        for way in (by_program, by_parameters):
            difference = np.abs(way(folder, rows) - expected).max()
            print(f"{way.__name__}: probabilities differ from the run's by at most {difference:.1e}")
            assert difference < 1e-5


if __name__ == "__main__":
    main()

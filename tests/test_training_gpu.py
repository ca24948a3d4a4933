"""Training on a GPU: no step waits for it, and compiled and replayed steps compute what eager ones do."""

import pytest
import torch

pytest.importorskip("tyro")  # a machine that is there for the kernels alone may lack what the commands need

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RUN = ("--steps", "24", "--warmup", "4", "--refresh-every", "10", "--batch-size", "16", "--log-every", "4")


def trainer(*options: str) -> Trainer:
    config = parse_config(["digits", "--synthetic", "--device", "cuda", *RUN, *options], "train")
    return build_trainer(*resolve(config))


@pytest.mark.parametrize("update", ["alternating", "reversal"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(precision: str, update: str) -> None:
    built = trainer("--precision", precision, "--update", update, "--no-compile")
    built.method.train()
    first, *batches = built.loader.train(built.plan, range(4, 9))
    # Kernels are compiled and algorithms chosen in the first step.
    built._train_step(4, first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches, start=5):
            built._train_step(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    built.updater.require_finite()


@pytest.mark.parametrize("options", [("--compile",), ("--compile", "--cuda-graphs")], ids=["compiled", "replayed"])
def test_compiled_and_replayed_steps_are_the_eager_ones(options: tuple[str, ...]) -> None:
    values = []
    for each in (("--no-compile",), options):
        reports = list(trainer("--precision", "fp32", *each).run(lambda: None))
        values.append([report.values for report in reports])
    eager, other = values
    assert len(eager) == len(other)
    for expected, found in zip(eager, other):
        assert set(found) == set(expected)
        # In warm-up there is only the first of them.
        for name in ("classification", "entropy", "adversarial_domain", "gradient_norm_class", "synchronization"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=0.02, abs=1e-4), name

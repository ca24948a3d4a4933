from itertools import islice

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config

DROPOUT = ("--backbone", "mobilenet_v3_small", "--weights", "none")


def warm_up_losses(method: str, *arguments: str) -> list[float | None]:
    """Of the first two steps, all of them warm-up."""
    steps = ("--steps", "9", "--warmup", "3", "--log-every", "1", "--batch-size", "4")
    options = ["office31", "--synthetic", "--device", "cpu", *DROPOUT, *steps, "--method", method, *arguments]
    if method != "source-only":
        options += ["--hidden-dim", "8"]
    trainer = build_trainer(*resolve(parse_config(options, "train")))
    reports = islice(trainer.run(lambda: None), 2)
    losses = [report.values["classification"] for report in reports]
    trainer.loader.close()
    return losses


def test_methods_drop_the_same_units_during_warm_up() -> None:
    """Whatever the number of discriminators that are drawn before the first step: none, one, and one for each class."""
    alone, domain, all_levels = (warm_up_losses(method) for method in ("source-only", "dann", "gsda"))
    assert alone == domain == all_levels
    assert warm_up_losses("source-only", "--seed", "1") != alone

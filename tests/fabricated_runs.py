"""Folders of runs that were never trained: written by the run folder's own writers, with the test's figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.run_folder import RunFolder

STEPS, WARMUP = 40, 20
LEVELLED = ("group", "gsda")
"""The methods whose runs measured all three levels."""


def fabricated_run(
    suite: Path,
    method: str,
    *,
    task: str = "digits",
    pair: tuple[str, str] = ("mnist", "fonts"),
    seed: int = 0,
    accuracy: float | None = 70.0,
    mean_per_class: float | None = None,
    per_class: Sequence[float | None] | None = None,
    finished: bool = True,
    mismatch: float = 0.3,
    features: bool = False,
) -> RunFolder:
    """A run in the folder of a suite, as training leaves it.

    Args:
        suite, method, task, pair, seed: which run.
        accuracy: after the last step; the label-free choice is 1 below it, the best 2 above it.
        mean_per_class: likewise, `accuracy` - 5 if None.
        per_class: of the last step.
        finished: otherwise its records end at step 30, and there is no result.
        mismatch: relative mismatch after warm-up, of the methods with three levels.
        features: also write features and predictions, from which reports are drawn.
    """
    source, target = pair
    classes = BENCHMARKS[task].classes or ("cat", "dog")
    run = RunFolder(suite / RunFolder.default_name(task, source, target, method, seed))
    run.prepare()
    settings = {"method": method, "seed": seed, "steps": STEPS, "warmup": WARMUP}
    run.write_config({"task": task, "run": settings, "data": {"source": source, "target": target}})
    for step in range(10, STEPS + 10 if finished else STEPS, 10):
        values: dict[str, float] = {"classification": 1 / step}
        if accuracy is not None:
            values |= {"accuracy": accuracy - (STEPS - step), "mean_per_class": accuracy - 5 - (STEPS - step)}
        if step > WARMUP and method in LEVELLED:
            # S_dom + S_grp + S_cls = 3, so that the mismatch is L_syn itself.
            norms = {f"gradient_norm_{level}": 1.0 for level in ("domain", "group", "class")}
            values |= {**norms, "synchronization": mismatch, "adversarial_domain": 0.6}
        run.append_metrics(step, values)
    if features:
        generator = np.random.default_rng(seed)
        labels = np.arange(40) % len(classes)
        at = {"source_labels": labels, "target_labels": labels}
        # The domains lie apart before adaptation and on each other after it.
        for moment, shift in (("warmup", 20.0), ("final", 0.0)):
            drawn = [generator.normal(size=(40, 4)) + offset for offset in (0.0, shift)]
            run.write_features("warmup" if moment == "warmup" else "final", *drawn, **at)
        run.write_predictions(labels, np.eye(len(classes))[labels])
    if finished:
        run.write_result(
            RunResult(
                task=task, source=source, target=target, method=method, seed=seed, steps=STEPS,
                accuracy=_selection(accuracy),
                mean_per_class=_selection(
                    accuracy - 5 if mean_per_class is None and accuracy is not None else mean_per_class
                ),
                per_class=tuple(per_class if per_class is not None else [accuracy] * len(classes)),
                classes=classes, images_per_second=100.0, seconds=1.0,
            )
        )  # fmt: skip
    return run


def _selection(value: float | None) -> Selection:
    return Selection() if value is None else Selection(value, best=value + 2, label_free=value - 1)

"""How far the domains are aligned and the levels synchronized: metrics that need no target label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from gsda_fast.results.records import NORM

MISMATCH_FORMULA = "3 L_syn / (S_dom + ΣS_grp + ΣS_cls)"


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, (n,) int64, and values, (n,) float64, of one metric where it was measured; NaN where not finite."""
    measured = [(record["step"], record[name]) for record in records if name in record]
    steps = np.array([step for step, _ in measured], dtype=np.int64)
    return steps, np.array([value for _, value in measured], dtype=np.float64)


def relative_mismatch(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and 3 L_syn / (S_dom + sum S_grp + sum S_cls): how far the three levels are from synchronized.

    Below stands the sum and not S_dom alone, since the global discriminator's gradient can vanish. 0 / 0 is NaN.

    Args:
        records: lines of `metrics.jsonl`; those without all three levels are left out.

    Returns:
        (n,) int64 and (n,) float64, NaN where a metric was not finite.
    """
    names = ("synchronization", *(f"{NORM}{level}" for level in ("domain", "group", "class")))
    # A value that was not finite is stored as null, which is a measured NaN here.
    measured = [record for record in records if all(name in record for name in names)]
    steps = np.array([record["step"] for record in measured], dtype=np.int64)
    values = np.array([[record[name] for name in names] for record in measured], dtype=np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore", divide="ignore"):
        return steps, 3 * values[:, 0] / values[:, 1:].sum(axis=1)


def late_mismatch(records: Sequence[Mapping[str, Any]], warmup: int, steps: int) -> float | None:
    """Return the mean of `relative_mismatch` over the last half of the steps after warm-up: one metric for a run.

    Args:
        records: lines of `metrics.jsonl`. warmup, steps: of the run.

    Returns:
        None where nothing finite was measured there, as by methods without all three levels.
    """
    measured_at, values = relative_mismatch(records)
    late = values[(measured_at > (warmup + steps) / 2) & np.isfinite(values)]
    return float(late.mean()) if len(late) else None


def proxy_a_distance(source: np.ndarray, target: np.ndarray, samples: int = 500) -> float | None:
    """Proxy A-distance 2 (1 - 2 e): 2 where a linear classifier tells the domains apart, 0 where it cannot.

    e is the error of a logistic regression on standardized features, cross-validated over five folds with equally many
    samples of both domains (Ben-David et al., 2007, with the error on held-out samples). Chance can make it negative.

    Args:
        source, target: (n_s, D) and (n_t, D).
        samples: of each domain, at most, evenly spread over the rows.

    Returns:
        None for fewer than five samples of a domain, or features that are not finite.
    """
    count = min(samples, len(source), len(target))
    folds = 5
    if count < folds:
        return None
    chosen = [domain[np.linspace(0, len(domain) - 1, count).astype(int)] for domain in (source, target)]
    features = np.concatenate(chosen)
    if not np.isfinite(features).all():
        return None
    domain = np.repeat([1, 0], count)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    # Rows are sorted by class, so folds must be drawn.
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    # Threads would wait for each other longer than such small products take, many times as long on a busy machine.
    with threadpool_limits(1):
        error = 1 - cross_val_score(classifier, features, domain, cv=split).mean()
    return float(2 * (1 - 2 * error))

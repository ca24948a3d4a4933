"""One's own embeddings: two arrays in, an adapted classifier out; then settings chosen without a label of the target.

The rows here are made up: three clouds, which in the target are turned and stretched. Put features of CLIP, DINO or
anything else in their place. Run: python examples/own_embeddings.py
"""

import numpy as np
from sklearn.model_selection import GridSearchCV

import gsda_fast
from gsda_fast.sklearn import AdaptedClassifier, label_free

CLASSES = np.array(["cat", "dog", "fox"])
SIZE = 16


def rows_of(domain: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (count, 16) float32 and labels (count,), texts."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(CLASSES), count)
    rows = 3 * np.eye(len(CLASSES), SIZE)[labels] + 0.6 * generator.standard_normal((count, SIZE))
    if domain == "target":
        rows = 0.35 * rows + 1.2 * np.roll(rows, 5, axis=1)
    return rows.astype(np.float32), CLASSES[labels]


def main() -> None:
    source, (target, target_labels) = rows_of("source", 300, seed=0), rows_of("target", 200, seed=1)

    for method in ("source-only", "gsda"):
        adapted = gsda_fast.adapt(source, target, method, steps=200, warmup=60, progress=False)
        right = (adapted.predict(target) == target_labels).mean()
        print(f"{method}: {right:.1%} of the target are right; its classes are {', '.join(adapted.classes)}")

    # The same as an estimator. The score looks at the target's predictions and at no label of theirs.
    estimator = AdaptedClassifier("gsda", steps=200, warmup=60)
    search = GridSearchCV(estimator, {"learning_rate": [0.0001, 0.02]}, scoring=label_free(), cv=2)
    search.fit(*source, X_target=target)
    print(f"chosen without labels: {search.best_params_}, mutual information {search.score(target):.2f}")


if __name__ == "__main__":
    main()

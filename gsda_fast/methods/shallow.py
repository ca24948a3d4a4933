"""Maps fitted on the features of both domains, without training: TCA and GFK, in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsda_fast.errors import UsageError

Array = NDArray[np.float64]

# Rows transformed at a time: a block of kernel values stays below 100 MB.
BLOCK = 2048


@dataclass(frozen=True)
class TCA:
    """A fitted transfer component analysis.

    Attributes:
        landmarks: (q, D), the rows that the components are spanned by.
        weights: (q, m), of the landmarks in each component, the component with the largest eigenvalue first.
        eigenvalues: (m,), scatter of each component over its squared domain gap and mu times its squared weights.
        bandwidth: of the kernel exp(-d^2 / bandwidth); None for the linear kernel.
    """

    landmarks: Array
    weights: Array
    eigenvalues: Array
    bandwidth: float | None

    def transform(self, rows: ArrayLike) -> Array:
        """Embed rows: ``k(rows, landmarks) weights``.

        Args:
            rows: (N, D).

        Returns:
            (N, m) float64.

        Raises:
            ValueError: rows of another width.
        """
        checked = _matrix("rows", rows, self.landmarks.shape[1])
        embedded = [_kernel(block, self.landmarks, self.bandwidth) @ self.weights for block in _blocks(checked)]
        return np.concatenate(embedded)


def tca(
    source: ArrayLike,
    target: ArrayLike,
    dim: int,
    mu: float = 1.0,
    bandwidth: float | None = None,
    *,
    kernel: Literal["rbf", "linear"] = "rbf",
    max_landmarks: int = 4000,
    seed: int = 0,
) -> TCA:
    """Fit transfer components (Pan et al., IEEE TNN 2011).

    ``min over W: tr(W' K L K W) + mu tr(W' W) subject to W' K H K W = I``, with K the kernel of all rows, L the domain
    gap's matrix and H the centring. K L K is of rank one, v v' with v the gap of the domains' mean kernel rows, so that
    W holds the leading eigenvectors of the symmetric pencil (K H K, v v' + mu I). A symmetric solver on
    (v v' + mu I)^-1 K H K, which is not symmetric, would be wrong.

    Above `max_landmarks` rows a drawn subset of them spans the components, and all rows still count in K H K and v.

    Args:
        source, target: (n_s, D) and (n_t, D) features.
        dim: components, at most one fewer than rows. Components without scatter are zeros.
        mu: weight of the complexity against the domain gap, above 0; the larger, the less adaptation.
        bandwidth: of exp(-d^2 / bandwidth); None: the median squared distance of different landmarks.
        kernel: ``rbf`` or ``linear`` (no bandwidth).
        max_landmarks: rows that components are spanned by: time grows with their cube, memory with rows times them.
        seed: of the drawing of landmarks.

    Returns:
        The fitted map.

    Raises:
        ValueError: shapes, numbers that are not finite, or settings out of bounds.
    """
    source, target = _both(source, target)
    rows = np.concatenate([source, target])
    n = len(rows)
    if not 1 <= dim < min(n, max_landmarks + 1):
        raise UsageError("dim", found=str(dim), expected=f"1 to {min(n - 1, max_landmarks)}, fewer than rows")
    if not mu > 0:
        raise UsageError("mu", found=str(mu), expected="a number above 0")
    landmarks = rows
    if n > max_landmarks:
        landmarks = rows[np.sort(np.random.default_rng(seed).choice(n, max_landmarks, replace=False))]
    if kernel == "linear":
        bandwidth = None
    elif bandwidth is None:
        distances = _squared_distances(landmarks, landmarks)[np.triu_indices(len(landmarks), 1)]
        bandwidth = float(np.median(distances)) or 1.0  # most rows alike: any bandwidth says the same of them
    elif not bandwidth > 0:
        raise UsageError("bandwidth", found=str(bandwidth), expected="a number above 0")

    # Block by block, since all rows by all landmarks may not fit in memory; shifted, so that no digits are lost.
    shift = _kernel(landmarks, landmarks, bandwidth).mean(0)
    scatter, means = np.zeros((len(landmarks), len(landmarks))), []
    for domain in (source, target):
        total = np.zeros(len(landmarks))
        for block in _blocks(domain):
            values = _kernel(block, landmarks, bandwidth) - shift
            scatter += values.T @ values
            total += values.sum(0)
        means.append(total / len(domain))
    gap = means[0] - means[1]
    mean = (len(source) * means[0] + len(target) * means[1]) / n
    scatter -= n * np.outer(mean, mean)
    penalty = np.outer(gap, gap) + mu * np.eye(len(gap))
    last = len(gap) - 1
    from scipy.linalg import eigh

    eigenvalues, vectors = eigh(scatter, penalty, subset_by_index=(last - dim + 1, last))
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    # eigh makes w' penalty w = 1; divided by the root of the eigenvalue, w' scatter w = 1.
    scattered = eigenvalues > eigenvalues[0] * len(gap) * np.finfo(np.float64).eps
    weights = np.where(scattered, vectors / np.sqrt(np.where(scattered, eigenvalues, 1)), 0)
    return TCA(landmarks, weights, np.where(scattered, eigenvalues, 0), bandwidth)


@dataclass(frozen=True)
class GFK:
    """A fitted geodesic flow kernel.

    Attributes:
        factor: (D, 2 dim); the kernel is ``factor factor'``.
        angles: (dim,) principal angles between the domains' subspaces, in radians, ascending.
    """

    factor: Array
    angles: Array

    @property
    def kernel(self) -> Array:
        """(D, D), symmetric and positive semi-definite, of trace dim."""
        return self.factor @ self.factor.T

    def transform(self, rows: ArrayLike) -> Array:
        """Embed rows so that inner products are those of the kernel: ``rows factor``.

        Args:
            rows: (N, D).

        Returns:
            (N, 2 dim) float64.

        Raises:
            ValueError: rows of another width.
        """
        return _matrix("rows", rows, len(self.factor)) @ self.factor


def gfk(source: ArrayLike, target: ArrayLike, dim: int) -> GFK:
    """Fit the geodesic flow kernel between the domains' principal subspaces (Gong et al., CVPR 2012).

    Args:
        source, target: (n_s, D) and (n_t, D) features.
        dim: of each subspace, at most D / 2 and at most the rows of a domain.

    Returns:
        The fitted map.

    Raises:
        ValueError: shapes, numbers that are not finite, or a dimension out of bounds.
    """
    source, target = _both(source, target)
    bound = min(source.shape[1] // 2, len(source), len(target))
    if not 1 <= dim <= bound:
        raise UsageError(
            "dim", found=str(dim), expected=f"1 to {bound}, half of the features' width and no more than rows"
        )
    return geodesic_flow(_principal(source)[:, :dim], _principal(target)[:, :dim])


def subspace_disagreement(source: ArrayLike, target: ArrayLike) -> int:
    """Choose the dimension of both subspaces by how far they disagree with that of all rows (Gong et al., CVPR 2012).

    ``D(d) = (sin a_d + sin b_d) / 2``, with a and b the largest principal angles between the d leading directions of
    the source, or of the target, and those of all rows. The first d at which it is largest, at best 1: beyond it a
    direction of one domain is orthogonal to the other's subspace.

    Args:
        source, target: (n_s, D) and (n_t, D) features.

    Returns:
        The dimension, from 1 to the bound of `gfk`.

    Raises:
        ValueError: shapes, numbers that are not finite, or no dimension that `gfk` takes.
    """
    source, target = _both(source, target)
    bound = min(source.shape[1] // 2, len(source), len(target))
    if bound < 1:
        raise UsageError(
            "features", found=f"{source.shape[1]} columns", expected="two or more, and a row of each domain"
        )
    both, *domains = (_principal(rows) for rows in (np.concatenate([source, target]), source, target))

    def disagreement(dim: int) -> float:
        cosines = [np.linalg.svd(each[:, :dim].T @ both[:, :dim], compute_uv=False)[-1] for each in domains]
        return float(np.mean([np.sqrt(max(0.0, 1 - cosine**2)) for cosine in cosines]))

    # Rounded: angles of 90 degrees must not be told apart by their last digits.
    return 1 + int(np.argmax([round(disagreement(dim), 6) for dim in range(1, bound + 1)]))


def _principal(rows: Array) -> Array:
    """Return the principal directions of the rows, (D, min(n, D)), the leading one first."""
    directions: Array = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2].T
    return directions


def geodesic_flow(source_basis: Array, target_basis: Array) -> GFK:
    """Integrate the projections along the geodesic from one subspace to another, in factored form.

    One singular value decomposition of ``Ps' Pt`` gives the principal vectors a, their directions b along the geodesic,
    and angles t. On each pair (a, b) the kernel is ``[[(1 + rho) / 2, s], [s, (1 - rho) / 2]]`` with
    ``rho = sin(2 t) / (2 t)`` and ``s = sin(t)^2 / (2 t)``; its symmetric square root makes the factor.

    Args:
        source_basis, target_basis: (D, d) with orthonormal columns, 2 d <= D.

    Returns:
        The kernel, of no dependence on the bases' signs and rotations.
    """
    left, _, right = np.linalg.svd(source_basis.T @ target_basis)
    first = source_basis @ left
    # The arc cosine would lose half the digits of a small angle: sines are lengths of what is left of the target.
    projected = target_basis @ right.T
    cosines = (first * projected).sum(0)
    rest = projected - first * cosines
    rest -= first @ (first.T @ rest)
    sines = np.linalg.norm(rest, axis=0)
    angles = np.arctan2(sines, cosines)
    second = rest / np.where(sines > 0, sines, 1)

    safe = np.where(angles > 0, angles, 1)
    rho = np.where(angles > 0, np.sin(2 * safe) / (2 * safe), 1)
    off = np.where(angles > 0, np.sin(safe) ** 2 / (2 * safe), 0)
    upper, lower = (1 + rho) / 2, (1 - rho) / 2
    # The root of a positive semi-definite M of order two: (M + det^(1/2) I) / (trace + 2 det^(1/2))^(1/2), trace 1.
    determinant_root = np.sqrt(np.maximum(upper * lower - off**2, 0))
    scale = np.sqrt(1 + 2 * determinant_root)
    along = first * ((upper + determinant_root) / scale) + second * (off / scale)
    across = first * (off / scale) + second * ((lower + determinant_root) / scale)
    factor = np.concatenate([along, across], axis=1)
    return GFK(factor, angles)


def _blocks(rows: Array) -> list[Array]:
    return np.split(rows, range(BLOCK, len(rows), BLOCK))


def _squared_distances(rows: Array, others: Array) -> Array:
    """Return (N, M) squared distances, without the digits that a common offset takes."""
    centre = others.mean(0)
    rows, others = rows - centre, others - centre
    squared = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T
    return np.maximum(squared, 0)


def _kernel(rows: Array, landmarks: Array, bandwidth: float | None) -> Array:
    if bandwidth is None:
        return rows @ landmarks.T
    return np.exp(-_squared_distances(rows, landmarks) / bandwidth)


def _matrix(name: str, value: ArrayLike, width: int | None = None) -> Array:
    array: Any = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or (width is not None and array.shape[1] != width):
        expected = f"(rows, {'columns' if width is None else width})"
        raise UsageError(name, found=f"shape {array.shape}", expected=expected)
    if not np.isfinite(array).all():
        raise UsageError(name, found="numbers that are not finite", expected="finite numbers")
    return array


def _both(source: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    checked = _matrix("source", source)
    return checked, _matrix("target", target, checked.shape[1])

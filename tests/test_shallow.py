"""TCA and GFK: numbers by hand, the equations that they solve, and the mistakes that codes make."""

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from tiny_inputs import FEATURES

from gsda_fast.methods.shallow import geodesic_flow, gfk, subspace_disagreement, tca

Array = NDArray[np.float64]
F = FEATURES.numpy()


def domains(n: int = 30, m: int = 25, dim: int = 6, seed: int = 0) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(dim, dim))
    return draw.normal(size=(n, dim)) @ mixing, 0.7 + draw.normal(size=(m, dim)) @ mixing * 1.3


# ----------------------------------------------------------------------------------------------------------------- TCA


def matrices(source: Array, target: Array, bandwidth: float | None) -> tuple[Array, Array, Array]:
    """K, L and H of the paper, in full."""
    rows = np.concatenate([source, target])
    d = ((rows[:, None] - rows) ** 2).sum(2)
    kernel = rows @ rows.T if bandwidth is None else np.exp(-d / bandwidth)
    n = len(rows)
    e = np.concatenate([np.full(len(source), 1 / len(source)), np.full(len(target), -1 / len(target))])
    return kernel, np.outer(e, e), np.eye(n) - 1 / n


def test_one_dimension_by_hand() -> None:
    fitted = tca([[0.0], [1.0]], [[2.0], [4.0]], 1, kernel="linear")
    assert fitted.eigenvalues[0] == pytest.approx(1.389414, abs=5e-7)
    assert fitted.eigenvalues[0] == pytest.approx(8.75 * 21 / (6.25 * 21 + 1), rel=1e-12)
    embedded = np.abs(fitted.transform([[0.0], [1.0], [2.0], [4.0]])[:, 0])
    assert_allclose(embedded, [0, 0.338062, 0.676123, 1.352247], atol=5e-7)


def test_published_digits_of_the_gaussian_kernel() -> None:
    fitted = tca(F[:3], F[3:], 2)
    assert fitted.bandwidth == 4.25
    assert_allclose(fitted.eigenvalues, [1.961025, 0.693557], atol=5e-7)
    z = fitted.transform(F)
    distances = np.linalg.norm(z[0] - z, axis=1)
    assert_allclose(distances, [0, 0.226424, 1.006501, 0.055938, 0.983093, 1.094805], atol=5e-7)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("mu", [0.1, 1.0, 10.0])
def test_it_solves_the_papers_problem(kernel: str, mu: float) -> None:
    source, target = domains()
    fitted = tca(source, target, 4, mu, kernel=kernel)  # type: ignore[arg-type]
    k, gap, centring = matrices(source, target, fitted.bandwidth)
    w = fitted.weights
    scatter = k @ centring @ k
    penalty = k @ gap @ k + mu * np.eye(len(k))
    assert_allclose(w.T @ scatter @ w, np.eye(4), atol=1e-7)
    assert_allclose(scatter @ w, penalty @ w * fitted.eigenvalues, atol=1e-6 * np.abs(scatter @ w).max())
    # 1 / eigenvalue is a component's squared domain gap plus mu times its squared weights.
    z = fitted.transform(np.concatenate([source, target]))
    gaps = (z[:30].mean(0) - z[30:].mean(0)) ** 2
    assert_allclose(gaps + mu * (w**2).sum(0), 1 / fitted.eigenvalues, rtol=1e-6)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_a_symmetric_solver_is_wrong(mu: float) -> None:
    """(K L K + mu I)^-1 K H K is not symmetric; an eigensolver that reads one triangle finds less than the maximum."""
    source, target = domains(seed=3)
    fitted = tca(source, target, 1, mu)
    k, gap, centring = matrices(source, target, fitted.bandwidth)
    scatter, penalty = k @ centring @ k, k @ gap @ k + mu * np.eye(len(k))

    def criterion(w: Array) -> float:
        return float(w @ scatter @ w / (w @ penalty @ w))

    product = np.linalg.solve(penalty, scatter)
    largest = np.sort(np.linalg.eigvals(product).real)[-1]
    assert criterion(fitted.weights[:, 0]) == pytest.approx(largest, rel=1e-8)
    assert fitted.eigenvalues[0] == pytest.approx(largest, rel=1e-8)
    assert not np.allclose(product, product.T, rtol=1e-3)
    wrong = np.linalg.eigh(product)[1][:, -1]
    assert criterion(wrong) < 0.99 * largest


def test_equal_domains_are_kernel_pca() -> None:
    source, _ = domains()
    fitted = tca(source, source, 3)
    k, _, centring = matrices(source, source, fitted.bandwidth)
    exact = np.linalg.eigh(k @ centring @ k)[0][::-1][:3]
    assert_allclose(fitted.eigenvalues, exact, rtol=1e-9)


def test_a_shift_is_undone() -> None:
    source, _ = domains()
    target = source + np.arange(6)
    fitted = tca(source, target, 5, mu=1e-8, kernel="linear")
    gap = fitted.transform(source).mean(0) - fitted.transform(target).mean(0)
    raw = tca(source, target, 5, mu=1e8, kernel="linear")
    assert np.abs(gap).max() < 1e-6
    assert np.abs(raw.transform(source).mean(0) - raw.transform(target).mean(0)).max() > 1e-2


def test_landmarks() -> None:
    source, target = domains(60, 50)
    exact = tca(source, target, 3, max_landmarks=110)
    assert len(exact.landmarks) == 110
    some = tca(source, target, 3, max_landmarks=40, seed=1)
    assert some.landmarks.shape == (40, 6)
    assert not np.array_equal(some.landmarks, tca(source, target, 3, max_landmarks=40, seed=2).landmarks)
    again = tca(source, target, 3, max_landmarks=40, seed=1)
    assert np.array_equal(some.weights, again.weights)
    # All rows still count: the scatter of their embedding is one.
    z = some.transform(np.concatenate([source, target]))
    assert_allclose((z - z.mean(0)).T @ (z - z.mean(0)), np.eye(3), atol=1e-8)
    assert some.eigenvalues[0] <= exact.eigenvalues[0] * (1 + 1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = domains()
    whole = tca(source, target, 3)
    z = whole.transform(source)
    monkeypatch.setattr("gsda_fast.methods.shallow.BLOCK", 7)
    assert_allclose(np.abs(tca(source, target, 3).weights), np.abs(whole.weights), rtol=1e-6, atol=1e-9)
    assert_allclose(whole.transform(source), z, rtol=1e-12)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.ones((4, 3)), np.ones((3, 3))),
        (np.zeros((1, 2)), np.ones((4, 2))),
        (np.repeat(F[:3], 3, axis=1), np.repeat(F[3:], 3, axis=1)),
    ],
)
def test_edges_are_finite(source: Array, target: Array) -> None:
    fitted = tca(source, target, 3)
    assert np.isfinite(fitted.transform(np.concatenate([source, target]))).all()
    assert np.isfinite(fitted.weights).all()


# ----------------------------------------------------------------------------------------------------------------- GFK


def basis(dim: int, width: int, seed: int) -> Array:
    q: Array = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, dim)))[0]
    return q


def test_forty_five_degrees_by_hand() -> None:
    first, second = np.array([[1.0], [0.0]]), np.array([[1.0], [1.0]]) / np.sqrt(2)
    kernel = geodesic_flow(first, second).kernel
    assert_allclose(kernel, [[0.818310, 0.318310], [0.318310, 0.181690]], atol=5e-7)


@pytest.mark.parametrize(("dim", "width"), [(1, 5), (3, 8), (4, 8)])
def test_it_is_the_integral_along_the_geodesic(dim: int, width: int) -> None:
    source, target = basis(dim, width, 0), basis(dim, width, 1)
    left, cosines, right = np.linalg.svd(source.T @ target)
    angles = np.arccos(cosines)
    start = source @ left
    direction = (target @ right.T - start * cosines) / np.sin(angles)

    def projection(t: float) -> Array:
        point = start * np.cos(t * angles) + direction * np.sin(t * angles)
        return (point @ point.T).ravel()

    exact = scipy.integrate.quad_vec(projection, 0, 1, epsabs=1e-13)[0].reshape(width, width)
    found = geodesic_flow(source, target)
    assert_allclose(found.kernel, exact, atol=1e-9)
    assert_allclose(np.sort(found.angles), np.sort(angles), atol=1e-9)
    assert np.trace(found.kernel) == pytest.approx(dim, rel=1e-12)
    assert found.factor.shape == (width, 2 * dim)


def test_symmetric_in_the_domains_and_free_of_signs_and_rotations() -> None:
    source, target = basis(3, 8, 0), basis(3, 8, 1)
    kernel = geodesic_flow(source, target).kernel
    assert_allclose(geodesic_flow(target, source).kernel, kernel, atol=1e-12)
    turned = geodesic_flow(source @ basis(3, 3, 5), -target @ basis(3, 3, 6)).kernel
    assert_allclose(turned, kernel, atol=1e-12)


def test_equal_subspaces_are_a_projection() -> None:
    source = basis(3, 8, 0)
    assert_allclose(geodesic_flow(source, source).kernel, source @ source.T, atol=1e-12)
    nearly = source + 1e-9 * basis(3, 8, 1)
    assert_allclose(geodesic_flow(source, np.linalg.qr(nearly)[0]).kernel, source @ source.T, atol=1e-8)
    orthogonal = np.eye(4)
    kernel = geodesic_flow(orthogonal[:, :2], orthogonal[:, 2:]).kernel  # angles of 90 degrees, 2 d = D
    assert np.trace(kernel) == pytest.approx(2)
    assert np.isfinite(kernel).all()


def test_transform_has_the_kernels_inner_products() -> None:
    source, target = domains(dim=8)
    fitted = gfk(source, target, 3)
    z = fitted.transform(source)
    assert z.shape == (30, 6)
    assert_allclose(z @ z.T, source @ fitted.kernel @ source.T, atol=1e-9)
    centred = [each - each.mean(0) for each in (source, target)]
    bases = [np.linalg.eigh(each.T @ each)[1][:, ::-1][:, :3] for each in centred]
    assert_allclose(fitted.kernel, geodesic_flow(*bases).kernel, atol=1e-9)
    uncentred = [np.linalg.eigh(each.T @ each)[1][:, ::-1][:, :3] for each in (source, target)]
    assert np.abs(geodesic_flow(*uncentred).kernel - fitted.kernel).max() > 1e-3


def test_dimension_by_the_disagreement_of_subspaces() -> None:
    source, target = domains(dim=8)

    def leading(rows: Array, dim: int) -> Array:
        found: Array = np.linalg.eigh(np.cov(rows.T))[1][:, ::-1][:, :dim]
        return found

    def disagreement(dim: int) -> float:
        whole = leading(np.concatenate([source, target]), dim)
        angles = [scipy.linalg.subspace_angles(leading(rows, dim), whole).max() for rows in (source, target)]
        return float(np.sin(angles).mean())

    literal = [disagreement(dim) for dim in range(1, 5)]
    found = subspace_disagreement(source, target)
    assert found == 1 + int(np.argmax(literal))
    assert found > 1
    turned = basis(8, 8, 0)
    assert subspace_disagreement(source @ turned, target @ turned) == found
    assert subspace_disagreement(target, source) == found
    assert subspace_disagreement(source, source) == 1  # nowhere any disagreement
    with pytest.raises(ValueError, match="features: found 1 columns; expected two or more"):
        subspace_disagreement(source[:, :1], target[:, :1])


def test_rank_deficient_features() -> None:
    source, target = domains(dim=3)
    doubled = [np.concatenate([each, each], axis=1) for each in (source, target)]
    fitted = gfk(doubled[0], doubled[1], 3)
    assert np.isfinite(fitted.factor).all()
    constant = gfk(np.ones((5, 6)), np.ones((5, 6)), 2)
    assert np.isfinite(constant.transform(np.ones((2, 6)))).all()


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_fitted() -> None:
    source, target = domains(dim=6)
    with pytest.raises(ValueError, match="dim: found 4; expected 1 to 3, half of the features' width"):
        gfk(source, target, 4)
    with pytest.raises(ValueError, match="dim: found 3; expected 1 to 2, half"):
        gfk(source[:2], target, 3)
    with pytest.raises(ValueError, match="dim: found 55; expected 1 to 54, fewer than rows"):
        tca(source, target, 55)
    with pytest.raises(ValueError, match="mu: found 0; expected a number above 0"):
        tca(source, target, 2, mu=0)
    with pytest.raises(ValueError, match=r"bandwidth: found -1\.0; expected a number above 0"):
        tca(source, target, 2, bandwidth=-1.0)
    with pytest.raises(ValueError, match=r"target: found shape \(25, 5\); expected \(rows, 6\)"):
        gfk(source, target[:, :5], 2)
    with pytest.raises(ValueError, match="source: found numbers that are not finite"):
        tca(np.full((3, 2), np.nan), target[:, :2], 2)
    with pytest.raises(ValueError, match=r"rows: found shape \(2, 5\); expected \(rows, 6\)"):
        tca(source, target, 2).transform(source[:2, :5])

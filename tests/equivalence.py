"""The harness that every backend's tests share: problems, exact results, and one table of tolerances.

A problem is drawn away from ReLU kinks, where results of different precision would be gradients of different pieces of
the network. Its exact results are the reference's in float64, from the same (already rounded) inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import gsda_kernels as gk

RESULTS = ("loss", "gradient_norm")
INPUTS = ("features", "w1", "b1", "w2", "b2", "w3", "b3")

# Per tensor, in the 2-norm over all of it and in the largest entry: this multiple of the reference's own error in the
# same dtype, and at least this many units in the last place of the exact result. The two norms see different faults:
# one tile out of thousands changes the 2-norm little, and the largest error by as much as an entry is large.
TIMES_PLAIN_ERROR = {torch.float32: 2.0, torch.float16: 3.0, torch.bfloat16: 3.0}
TIMES_EPSILON = {torch.float32: 64.0, torch.float16: 4.0, torch.bfloat16: 4.0}
# float64 answers to this alone.
EXACT_RELATIVE = 1e-10
NORMS = {"2-norm": 2.0, "largest entry": float("inf")}


@dataclass(frozen=True)
class Problem:
    """Inputs of `adversarial_terms` and upstream gradients of its results.

    Attributes:
        features: (N, D). disc: stacked weights. sample_weight: (N, K). domain: (N,).
        grad_loss, grad_gradient_norm: (K,).
    """

    features: Tensor
    disc: gk.DiscriminatorWeights
    sample_weight: Tensor
    domain: Tensor
    grad_loss: Tensor
    grad_gradient_norm: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return dict(zip(INPUTS, (self.features, *self.disc)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with every tensor but the domain labels passed through `change`."""
        return Problem(
            change(self.features),
            gk.DiscriminatorWeights(*map(change, self.disc)),
            change(self.sample_weight),
            self.domain,
            change(self.grad_loss),
            change(self.grad_gradient_norm),
        )

    def to(self, device: torch.device | str) -> Problem:
        moved = self.map(lambda tensor: tensor.to(device))
        return replace(moved, domain=self.domain.to(device))


def make_problem(
    *,
    num_source: int = 5,
    num_target: int = 4,
    num_discriminators: int = 4,
    dim: int = 6,
    hidden: int = 8,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    zero_weights: float = 0.5,
    empty: Sequence[int] = (),
    dead: Sequence[int] = (),
    silent_sample: int | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose ReLUs are all clearly on or clearly off.

    Args:
        zero_weights: share of the pairs of a source sample whose weight is 0; target weights are all above 0.
        empty: discriminators without any pair. dead: discriminators whose second layer is off, so that the
            gradient norm is exactly 0 for every sample.
        silent_sample: a sample that switches off the first layer of every discriminator: its norms are exactly 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rounded(tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.to(kind).double()

    kind = parameter_dtype or dtype
    num_samples, k = num_source + num_target, num_discriminators
    features = rounded(draw(num_samples, dim), dtype)
    # Rounded to both dtypes: weights that the mixed case would round again must not move it across a kink.
    w1 = rounded(rounded(draw(k, hidden, dim, scale=dim**-0.5), kind), dtype)
    before_1 = torch.einsum("nd,khd->knh", features, w1)
    b1 = rounded(rounded(_bias_off_kinks(before_1, generator, silent_sample), kind), dtype)
    h1 = (before_1 + b1.unsqueeze(1)).relu()
    w2 = rounded(rounded(draw(k, hidden, hidden, scale=(2 / hidden) ** 0.5), kind), dtype)
    before_2 = torch.einsum("knh,kgh->kng", h1, w2)
    b2 = _bias_off_kinks(before_2, generator)
    for index in dead:
        b2[index] = -1.0 - before_2[index].abs().amax()
    b2 = rounded(rounded(b2, kind), dtype)
    w3 = draw(k, hidden, scale=(2 / hidden) ** 0.5)
    b3 = draw(k, scale=0.3)

    weight = torch.rand(num_samples, k, generator=generator, dtype=torch.float64) * 0.95 + 0.05
    dropped = torch.rand(num_source, k, generator=generator, dtype=torch.float64) < zero_weights
    weight[:num_source] = weight[:num_source].masked_fill(dropped, 0.0)
    weight[:, list(empty)] = 0.0
    results_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        features.to(dtype),
        gk.DiscriminatorWeights(*(tensor.to(kind) for tensor in (w1, b1, w2, b2, w3, b3))),
        weight.to(kind),
        (torch.arange(num_samples) < num_source).long(),
        draw(k).to(results_dtype),
        draw(k).to(results_dtype),
    ).to(device)


def _bias_off_kinks(before: Tensor, generator: torch.Generator, silent_sample: int | None = None) -> Tensor:
    """A bias (K, H) that puts every unit's zero in the middle of a wide gap between the samples' values (K, N, H)."""
    ordered, _ = before.sort(dim=1)
    ends = ordered[:, :1] - 1.0, ordered[:, -1:] + 1.0
    edges = torch.cat([ends[0], ordered, ends[1]], dim=1)
    lower, width = edges[:, :-1], edges.diff(dim=1)
    # A gap of a tenth of the usual scale is wide enough for half precision; otherwise the widest one.
    wanted = torch.rand(width.shape, generator=generator, dtype=width.dtype) + 1.0
    score = torch.where(width > 0.1, wanted, width)
    if silent_sample is not None:
        score = torch.where(lower >= before[:, silent_sample : silent_sample + 1], score, -1.0)
    chosen = score.argmax(dim=1, keepdim=True)
    return -(lower.gather(1, chosen) + width.gather(1, chosen) / 2).squeeze(1)


def non_contiguous(problem: Problem) -> Problem:
    """The same values with every tensor strided, and each upstream gradient its first value expanded (stride 0)."""

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]

    changed = problem.map(strided)
    return replace(
        changed,
        features=problem.features.t().contiguous().t(),
        grad_loss=problem.grad_loss[:1].expand_as(problem.grad_loss),
        grad_gradient_norm=problem.grad_gradient_norm[:1].expand_as(problem.grad_gradient_norm),
    )


def compute(
    problem: Problem, backend: str, *, frozen: Sequence[str] = (), compiled: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Both results, and the gradient to every input that is not frozen, by name."""
    inputs = {name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in problem.inputs.items()}
    disc = gk.DiscriminatorWeights(*(inputs[name] for name in INPUTS[1:]))
    terms = torch.compile(gk.adversarial_terms, fullgraph=True) if compiled else gk.adversarial_terms
    out = terms(inputs["features"], disc, problem.sample_weight, problem.domain, backend=backend, **options)
    found = {"loss": out.loss.detach(), "gradient_norm": out.gradient_norm.detach()}
    wanted = [name for name in INPUTS if name not in frozen]
    if wanted:
        torch.autograd.backward(out, (problem.grad_loss, problem.grad_gradient_norm))
    for name in INPUTS:
        gradient = inputs[name].grad
        assert (gradient is None) == (name in frozen), f"gradient to {name}: found {gradient}"
        if gradient is not None:
            found[name] = gradient
    return found


def exact(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """The reference's results in float64 on the CPU, from the problem's own rounded inputs."""
    return compute(problem.to("cpu").map(lambda tensor: tensor.double()), "reference", **options)


def assert_equivalent(problem: Problem, backend: str, *, compiled: bool = False, **options: Any) -> None:
    """`backend` is as close to the exact results as the table of tolerances asks, tensor by tensor."""
    assert_close_to_exact(problem, compute(problem, backend, compiled=compiled, **options), **options)


def assert_close_to_exact(
    problem: Problem, found: dict[str, Tensor], *, plain: dict[str, Tensor] | None = None, **options: Any
) -> None:
    """Results as of `compute` are as close to the exact ones as the table asks.

    Args:
        plain: what the plain computation gives; None for the reference in the problem's own dtype.
    """
    true = exact(problem, **options)
    dtype = problem.features.dtype
    if plain is None and dtype != torch.float64:
        plain = compute(problem, "reference", **options)
    assert found.keys() == true.keys()
    errors = []
    for name, value in true.items():
        for which, order in NORMS.items():
            size, error = _norm(value, order), _norm(found[name].cpu().double() - value, order)
            tolerance = EXACT_RELATIVE * size
            if plain is not None:
                plain_error = _norm(plain[name].cpu().double() - value, order)
                floor = TIMES_EPSILON[dtype] * torch.finfo(dtype).eps * size
                tolerance = max(TIMES_PLAIN_ERROR[dtype] * plain_error, floor)
            # Not `error > tolerance`: a NaN has to fail.
            if not error <= tolerance:
                errors.append(f"{name}, {which}: error {error:.3e} of {size:.3e}, tolerance {tolerance:.3e}")
        expected_dtype = problem.grad_loss.dtype if name in RESULTS else problem.inputs[name].dtype
        if found[name].dtype != expected_dtype or found[name].shape != value.shape:
            errors.append(f"{name}: found {found[name].dtype} {tuple(found[name].shape)}; expected {expected_dtype}")
    assert not errors, "\n".join(errors)


class TF32Products(TorchDispatchMode):
    """Products of float32 matrices on any device as a GPU's tensor cores make them: TF32 operands, float32 sums.

    The operands are truncated to their 19 bits and not rounded, as the tensor cores of compute capability 9.0 do with
    the float32 numbers that they are handed: about three times the error of rounded operands.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            args = tree_map_only(Tensor, _truncated, args)
        return func(*args, **(kwargs or {}))


_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm")}


def _truncated(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or tensor.dim() < 2:  # a bias is added to the sums
        return tensor
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def assert_nan_stays_visible(backend: str, device: str = "cpu") -> None:
    """A NaN in one sample's features: ReLUs and masks must not turn it into a number."""
    problem = make_problem(device=device)
    problem.features[0, 0] = torch.nan
    found = compute(problem, backend)
    active = problem.sample_weight[0] != 0
    assert active.any()
    for name in (*RESULTS, *INPUTS[1:]):
        of_discriminator = found[name].reshape(len(active), -1)
        assert of_discriminator[active].isnan().any(1).all(), name
    assert found["features"][0].isnan().all()
    assert found["features"][1:].isfinite().all()


def _norm(tensor: Tensor, order: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(tensor, order))

"""The discriminators' step in one operation, against the backward pass and torch.optim.SGD."""

import doctest
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from equivalence import Problem, make_problem
from torch import Tensor

import gsda_kernels as gk
from gsda_kernels import backends, fused_update, ops, pairs
from gsda_kernels.native import NativeBackend

AVAILABLE = [name for name, why in gk.available_backends("cpu").items() if why is None]
INTERPRETED = "triton" in AVAILABLE
# In the interpreter's process the Triton kernels alone: the others have been tried in the other one.
BACKENDS = ["triton"] if INTERPRETED else AVAILABLE
FUSED = [name for name in BACKENDS if name not in ("reference", "torch")]
elsewhere = pytest.mark.skipif(INTERPRETED, reason="the same without the interpreter")
DTYPE = torch.float32 if INTERPRETED else torch.float64
NAMES = gk.DiscriminatorWeights._fields
SHAPES: dict[str, dict[str, Any]] = {
    "nothing aligned": {"num_source": 4, "num_target": 5, "num_discriminators": 3, "dim": 5, "hidden": 9},
    "whole vectors": {"num_source": 20, "num_target": 20, "num_discriminators": 3, "dim": 16, "hidden": 80},
    "empty discriminators": {"empty": [0, 2], "dead": [1], "silent_sample": 0},
    "no pair at all": {"empty": [0, 1, 2, 3]},
    "one of everything": {"num_source": 1, "num_target": 0, "num_discriminators": 1, "dim": 1, "hidden": 1},
}
RULES: dict[str, dict[str, Any]] = {
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "momentum": {"momentum": 0.5},
    "neither": {"momentum": 0.0},
}


@pytest.fixture(autouse=True)
def _allocations_are_poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def state(problem: Problem) -> tuple[gk.DiscriminatorWeights, gk.DiscriminatorWeights]:
    """Parameters and momentum of their own."""
    disc = gk.DiscriminatorWeights(*(tensor.clone().requires_grad_() for tensor in problem.disc))
    return disc, gk.DiscriminatorWeights(*(torch.zeros_like(tensor) for tensor in disc))


def fused(
    problem: Problem, backend: str, *, steps: int = 1, rate: float | Tensor = 0.1, **options: Any
) -> tuple[dict[str, Tensor], gk.AdversarialUpdate]:
    """Everything after some steps by name, and what the last one told."""
    disc, buffers = state(problem)
    upstream = (problem.grad_loss, problem.grad_gradient_norm)
    options = {"upstream": upstream, **options}
    for _ in range(steps):
        told = gk.adversarial_update_(
            problem.features, disc, buffers, problem.sample_weight, problem.domain, backend=backend, learning_rate=rate,
            **options,
        )  # fmt: skip
    return everything(disc, buffers), told


def everything(disc: gk.DiscriminatorWeights, buffers: gk.DiscriminatorWeights) -> dict[str, Tensor]:
    found = {name: tensor.detach() for name, tensor in disc._asdict().items()}
    return found | {f"momentum of {name}": tensor for name, tensor in buffers._asdict().items()}


def backward_and_sgd(
    problem: Problem, backend: str, *, steps: int = 1, rate: float = 0.1, **rule: Any
) -> dict[str, Tensor]:
    disc, buffers = state(problem)
    optimizer = torch.optim.SGD(list(disc), lr=rate, **rule)
    for _ in range(steps):
        optimizer.zero_grad()
        out = gk.adversarial_terms(
            problem.features, disc, problem.sample_weight, problem.domain, backend=backend, validate=False
        )
        torch.autograd.backward(out, (problem.grad_loss, problem.grad_gradient_norm))
        optimizer.step()
    for parameter, buffer in zip(disc, buffers):
        found = optimizer.state[parameter].get("momentum_buffer")
        buffer.copy_(parameter.grad if found is None else found)
    return everything(disc, buffers)


INSTRUCTION_SETS: dict[str, list[str | None]] = {"native": ["avx2", "avx512", None]}
EVERY_RULE_WITH_EVERY_SHAPE = [(shape, rule) for shape in SHAPES for rule in RULES]
# A program costs a second in the interpreter: every shape once, every rule with one of them.
SOME_RULES_WITH_EVERY_SHAPE = [(shape, "nesterov and decay") for shape in SHAPES]
SOME_RULES_WITH_EVERY_SHAPE += [("nothing aligned", rule) for rule in RULES if rule != "nesterov and decay"]


@pytest.mark.parametrize(("shape", "rule"), SOME_RULES_WITH_EVERY_SHAPE if INTERPRETED else EVERY_RULE_WITH_EVERY_SHAPE)
@pytest.mark.parametrize(
    ("backend", "instruction_set"),
    [(backend, each) for backend in BACKENDS for each in INSTRUCTION_SETS.get(backend, [None])],
)
def test_equals_backward_and_sgd(
    backend: str, instruction_set: str | None, shape: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps: in the second one the momentum is not zero."""
    native = NativeBackend(instruction_set)
    if instruction_set and native.unavailable(torch.device("cpu")):
        pytest.skip(str(native.unavailable(torch.device("cpu"))))
    monkeypatch.setitem(backends._BACKENDS, "native", native)
    assert_equals_backward_and_sgd(backend, SHAPES[shape], RULES[rule])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("shape", "rule"), sorted({*EVERY_RULE_WITH_EVERY_SHAPE} - {*SOME_RULES_WITH_EVERY_SHAPE}))
def test_equals_backward_and_sgd_under_every_rule(shape: str, rule: str) -> None:
    assert_equals_backward_and_sgd("triton", SHAPES[shape], RULES[rule])


def assert_equals_backward_and_sgd(backend: str, shape: dict[str, Any], rule: dict[str, Any]) -> None:
    problem = make_problem(dtype=DTYPE, **shape)
    # The reference's features are kept away from kinks, over which a step may carry them: small steps.
    expected = backward_and_sgd(problem, "reference", steps=2, rate=1e-3, **rule)
    found, told = fused(problem, backend, steps=2, rate=1e-3, **rule)
    tolerance = 2e-5 if INTERPRETED else 1e-12
    for name, value in expected.items():
        if name.startswith("momentum") and not rule["momentum"]:
            continue  # no state
        error = torch.linalg.vector_norm(found[name] - value)
        assert error <= tolerance * torch.linalg.vector_norm(value), name
    assert float(told.found_inf) == 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "triton")])
def test_equals_its_own_backward_and_sgd_bit_for_bit(backend: str, rule: dict[str, Any]) -> None:
    """The order of the sums is the same, and so is every rounding."""
    problem = make_problem(
        num_source=30, num_target=40, num_discriminators=5, dim=64, hidden=128, empty=[2], dtype=torch.float32
    )
    found, _ = fused(problem, backend, steps=3, rate=0.01, **rule)
    for name, value in backward_and_sgd(problem, backend, steps=3, rate=0.01, **rule).items():
        assert torch.equal(found[name], value) or (name.startswith("momentum") and not rule["momentum"]), name


@pytest.mark.parametrize(("dtype", "parameter_dtype"), [(torch.float16, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    problem = make_problem(dim=16, hidden=32, dtype=dtype, parameter_dtype=parameter_dtype)
    expected = backward_and_sgd(problem, backend, rate=0.05, momentum=0.9, weight_decay=1e-2)
    found, _ = fused(problem, backend, rate=0.05, momentum=0.9, weight_decay=1e-2)
    for name, value in expected.items():
        assert found[name].dtype == parameter_dtype
        # Gradients are summed in float32 and may be rounded once less.
        torch.testing.assert_close(found[name], value, rtol=4e-3 if parameter_dtype == dtype else 1e-5, atol=1e-4)


def converted(disc: gk.DiscriminatorWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return disc.w1.detach().to(dtype), disc.w2.detach().to(dtype)


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_copies_of_the_weights_move_along(backend: str, dtype: torch.dtype, skip: float) -> None:
    """And all numbers are those without them, bit for bit."""
    problem = make_problem(
        num_source=40,
        num_target=30,
        num_discriminators=2,
        dim=18,
        hidden=36,
        dtype=dtype,
        parameter_dtype=torch.float32,
    )
    # Numbers that rounding changes: those of a problem are drawn to have none.
    problem.disc.w1.mul_(1.0003)
    problem.disc.w2.mul_(0.9998)
    half = converted(problem.disc, dtype)
    options = {"steps": 2, "skip": torch.tensor(skip), **RULES["nesterov and decay"]}
    expected, plain = fused(problem, backend, **options)
    found, told = fused(problem, backend, half_weights=half, **options)
    for name, value in (expected | plain._asdict()).items():
        assert torch.equal((found | told._asdict())[name], value), name
    for name, copy in zip(("w1", "w2"), half):
        assert torch.equal(copy, found[name].to(dtype)), name
        assert torch.equal(copy, getattr(problem.disc, name).to(dtype)) == bool(skip), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_from_the_terms(backend: str) -> None:
    problem = make_problem(dtype=DTYPE)
    asked: list[gk.AdversarialTerms] = []

    def upstream(terms: gk.AdversarialTerms) -> tuple[Tensor, Tensor]:
        asked.append(terms)
        assert torch.is_grad_enabled()
        return problem.grad_loss, problem.grad_gradient_norm

    found, told = fused(problem, backend, upstream=upstream)
    expected, plain = fused(problem, backend)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (terms,) = asked
    with torch.no_grad():
        before = gk.adversarial_terms(
            problem.features, problem.disc, problem.sample_weight, problem.domain, backend=backend
        )
    for each in (terms, told, plain):
        torch.testing.assert_close(each.loss, before.loss)
        torch.testing.assert_close(each.gradient_norm, before.gradient_norm)
        assert not each.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_on_the_device(backend: str) -> None:
    problem = make_problem(dtype=DTYPE)
    found, _ = fused(problem, backend, rate=torch.tensor(0.03, dtype=torch.float64))
    expected, _ = fused(problem, backend, rate=0.03)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@elsewhere
def test_resumes_bit_for_bit() -> None:
    problem = make_problem(num_source=20, num_target=20, dim=16, hidden=48)
    expected, _ = fused(problem, "auto", steps=2)
    disc, buffers = state(problem)
    for _ in range(2):
        # All that a checkpoint holds.
        disc = gk.DiscriminatorWeights(*(tensor.detach().clone().requires_grad_() for tensor in disc))
        buffers = gk.DiscriminatorWeights(*(tensor.clone() for tensor in buffers))
        gk.adversarial_update_(
            problem.features, disc, buffers, problem.sample_weight, problem.domain,
            (problem.grad_loss, problem.grad_gradient_norm), learning_rate=0.1,
        )  # fmt: skip
    for name, value in everything(disc, buffers).items():
        assert torch.equal(value, expected[name]), name


def _nan_in_features(problem: Problem) -> Problem:
    problem.features[0, 0] = torch.nan
    return problem


def _infinite_parameter(problem: Problem) -> Problem:
    problem.disc.w1[1, 2, 0] = torch.inf
    return problem


def _gradients_overflow(problem: Problem) -> Problem:
    """The terms are finite, and so is the bias's gradient; products of features and gradients are not."""
    largest = torch.finfo(problem.features.dtype).max
    problem.features[:, 0] = largest / 4
    problem.disc.w1[:, :, 0] = 0
    return replace(problem, grad_loss=torch.full_like(problem.grad_loss, 1e6))


def _nan_upstream(problem: Problem) -> Problem:
    return replace(problem, grad_loss=torch.full_like(problem.grad_loss, torch.nan))


def _unchanged(problem: Problem) -> Problem:
    return problem


BAD: dict[str, tuple[Callable[[Problem], Problem], dict[str, Any]]] = {
    "NaN in the features": (_nan_in_features, {}),
    "an infinite parameter": (_infinite_parameter, {}),
    "gradients that overflow": (_gradients_overflow, {}),
    "NaN from upstream": (_nan_upstream, {}),
    "more pairs than the bound": (_unchanged, {"max_pairs": 5}),
    "skip": (_unchanged, {"skip": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_moves_where_something_is_bad(backend: str, bad: str) -> None:
    change, options = BAD[bad]
    problem = change(make_problem(dtype=DTYPE))
    found, told = fused(problem, backend, validate=False, **options)
    assert float(told.found_inf) == 1
    assert told.found_inf.dtype == torch.float32
    for name in NAMES:
        assert torch.equal(found[name], getattr(problem.disc, name)), name
        assert not found[f"momentum of {name}"].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_skipped(backend: str) -> None:
    """What test_nothing_moves rests on."""
    problem = make_problem(dtype=DTYPE)
    found, told = fused(problem, backend, skip=torch.tensor(0.0), max_pairs=36)
    assert float(told.found_inf) == 0
    assert all(not torch.equal(found[name], getattr(problem.disc, name)) for name in NAMES)


@pytest.mark.parametrize("backend", FUSED)
def test_only_w3_may_stay_behind(backend: str) -> None:
    """The row sums of W2 times its gradient overflow where W2 itself is huge, in units that no pair switches on."""
    problem = make_problem(dtype=torch.float32)
    problem.disc.w2.mul_(1e30)
    problem.disc.b2.mul_(1e30)
    problem.disc.w3.mul_(1e-30)
    problem = replace(problem, grad_loss=torch.full_like(problem.grad_loss, 1e12))
    found, told = fused(problem, backend)
    assert float(told.found_inf) == 1
    assert torch.equal(found["w3"], problem.disc.w3) or torch.equal(found["w2"], problem.disc.w2)


def test_the_gradients_of_the_large_matrices_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(num_source=9, num_target=8, num_discriminators=3, dim=96, hidden=224)
    for backend in FUSED:
        monkeypatch.setattr(
            type(backends.get(backend)), "backward", lambda *arguments: pytest.fail("a backward pass of its own")
        )
        fused(problem, backend)


def _shared(tensors: gk.DiscriminatorWeights) -> dict[str, Any]:
    return {"momentum_buffers": tensors._replace(w1=tensors.w1, b2=tensors.b1)}


def good() -> dict[str, Any]:
    problem = make_problem(dtype=torch.float32)
    disc, buffers = state(problem)
    return {
        "features": problem.features,
        "disc": disc,
        "momentum_buffers": buffers,
        "sample_weight": problem.sample_weight,
        "domain": problem.domain,
        "upstream": (problem.grad_loss, problem.grad_gradient_norm),
        "learning_rate": 0.1,
    }


def _with(part: str, **changed: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        tensors = arguments[part]
        return {part: tensors._replace(**{name: to(getattr(tensors, name)) for name, to in changed.items()})}

    return change


BAD_INPUTS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (_with("disc", w2=Tensor.detach), r"disc.w2: found requires_grad=False; expected True"),
    (
        _with("disc", w1=lambda w: w.detach().mT.contiguous().mT.requires_grad_()),
        r"disc.w1: found strides .*; expected a contiguous tensor",
    ),
    (
        _with("momentum_buffers", b1=lambda b: b[:, :3]),
        r"momentum_buffers.b1: found shape \(4, 3\); expected \(4, 8\), as of disc.b1",
    ),
    (
        _with("momentum_buffers", w3=Tensor.double),
        r"momentum_buffers.w3: found dtype torch.float64; expected torch.float32, as of disc.w3",
    ),
    (
        _with("momentum_buffers", b3=lambda b: b.to("meta")),
        r"momentum_buffers.b3: found device meta; expected cpu, as of disc.b3",
    ),
    (
        _with("momentum_buffers", w2=lambda w: w.mT.contiguous().mT),
        r"momentum_buffers.w2: found strides .*; expected a contiguous tensor",
    ),
    (
        lambda a: {"momentum_buffers": a["momentum_buffers"]._replace(w1=a["disc"].w1.detach())},
        r"w1: found memory that it shares with .*w1; expected memory of its own",
    ),
    (
        lambda a: {"momentum_buffers": a["momentum_buffers"]._replace(b2=a["momentum_buffers"].b1)},
        r"momentum_buffers.b2: found memory that it shares with momentum_buffers.b1",
    ),
    (
        lambda a: {"features": a["disc"].w1.detach().view(-1)[: 9 * 6].view(9, 6)},
        r"features: found memory that it shares with disc.w1|disc.w1: found memory that it shares with features",
    ),
    (lambda a: {"momentum": -0.1}, r"momentum: found -0.1; expected a finite number >= 0"),
    (lambda a: {"weight_decay": float("nan")}, r"weight_decay: found nan; expected a finite number >= 0"),
    (lambda a: {"learning_rate": -1.0}, r"learning_rate: found -1.0; expected a finite number >= 0"),
    (lambda a: {"learning_rate": torch.ones(2)}, r"learning_rate: found shape \(2,\); expected a number or a 0-d"),
    (lambda a: {"nesterov": True, "momentum": 0.0}, r"nesterov: found True beside momentum 0; expected a momentum"),
    (lambda a: {"skip": torch.zeros(2)}, r"skip: found shape \(2,\); expected a number or a 0-d tensor"),
    (
        lambda a: {"upstream": (a["upstream"][0][:3], a["upstream"][1])},
        r"upstream: found gL of shape \(3,\) on cpu; expected \(4,\) on cpu",
    ),
    (
        lambda a: {"upstream": lambda terms: (a["upstream"][0], torch.ones(()))},
        r"upstream: found gS of shape \(\) on cpu; expected \(4,\)",
    ),
    (lambda a: {"sample_weight": -a["sample_weight"]}, r"sample_weight: found -"),
    (
        lambda a: {"half_weights": converted(a["disc"], torch.float16)},
        r"half_weights: found two tensors beside features and disc of torch.float32; expected None",
    ),
    (
        lambda a: _half(a) | {"half_weights": converted(a["disc"], torch.bfloat16)},
        r"half_weights: found w1 .*bfloat16.*; expected .*torch.float16.*, contiguous",
    ),
    (
        lambda a: _half(a) | {"half_weights": converted(a["disc"], torch.float16)[::-1]},
        r"half_weights: found w1 .*\(4, 8, 8\).*; expected \(\(4, 8, 6\)",
    ),
    (
        lambda a: _half(a) | {"half_weights": 2 * (a["disc"].w1.detach().half(),)},
        r"half_weights: found w2 .*\(4, 8, 6\).*; expected \(\(4, 8, 8\)",
    ),
    (
        lambda a: _half(a) | {"half_weights": tuple(w.mT.contiguous().mT for w in converted(a["disc"], torch.float16))},
        r"half_weights: found w1 .*strides .*; expected .*contiguous",
    ),
    (
        lambda a: _half(a) | {"half_weights": _overlapping(converted(a["disc"], torch.float16))},
        r"half_weights.w[12]: found memory that it shares with half_weights.w[12]; expected memory of its own",
    ),
]


def _half(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"features": arguments["features"].half()}


def _overlapping(half: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    w1, w2 = half
    return w2.view(-1)[: w1.numel()].view(w1.shape), w2


@elsewhere
@pytest.mark.parametrize(("change", "message"), BAD_INPUTS, ids=[message.split("(")[0] for _, message in BAD_INPUTS])
def test_bad_input_is_refused_by_name_and_nothing_moves(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    arguments = good()
    before = {name: tensor.clone() for name, tensor in everything(arguments["disc"], state_of(arguments)).items()}
    with pytest.raises(ValueError, match=message):
        gk.adversarial_update_(**{**arguments, **change(arguments)})
    for name, value in everything(arguments["disc"], state_of(arguments)).items():
        assert torch.equal(value, before[name]), name
    gk.adversarial_update_(**arguments)


def state_of(arguments: dict[str, Any]) -> gk.DiscriminatorWeights:
    return arguments["momentum_buffers"]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("has_half", [False, True])
def test_opcheck(backend: str, batched: bool, has_half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_BATCHED_BELOW", 1 << 62 if batched else 0)
    problem = make_problem(
        num_source=3, num_target=2, num_discriminators=3, dim=16, hidden=32, zero_weights=0.0,
        dtype=torch.float16 if has_half else torch.float32, parameter_dtype=torch.float32,
    )  # fmt: skip
    half = list(converted(problem.disc, torch.float16)) if has_half else []
    parameters, momentum = list(problem.disc), [torch.zeros_like(tensor) for tensor in problem.disc]
    weight, label = problem.sample_weight, problem.domain.float()
    needs_grad = [False] + [True] * 6
    _, _, saved = ops.adversarial_forward(
        [problem.features, *parameters], half, weight, label, None, weight.numel(), needs_grad, backend
    )
    upstream = (problem.grad_loss, problem.grad_gradient_norm)
    arguments = (problem.features, parameters, half, momentum, weight, label, saved, *upstream)
    tests = ("test_schema", "test_faketensor")
    rule = (torch.tensor(0.1), torch.tensor(0.0), 0.9, 1e-3, True, backend)
    torch.library.opcheck(ops.adversarial_update, (*arguments, *rule), test_utils=tests)


@elsewhere
def test_example() -> None:
    assert doctest.testmod(fused_update).failed == 0
    assert doctest.testmod(fused_update).attempted > 3

"""What users call: every bad input is refused by name, and every good mix of dtypes works."""

import re
from typing import Any

import pytest
import torch
from equivalence import INPUTS, assert_equivalent, make_problem

import gsda_kernels as gk
from gsda_kernels import backends

BACKENDS = [name for name, why in gk.available_backends("cpu").items() if why is None]


def good() -> dict[str, Any]:
    problem = make_problem(num_source=3, num_target=2, num_discriminators=3, dim=4, hidden=6)
    return {
        "features": problem.features,
        **problem.disc._asdict(),
        "sample_weight": problem.sample_weight,
        "domain": problem.domain,
    }


def call(arguments: dict[str, Any]) -> gk.AdversarialTerms:
    arguments = dict(arguments)
    disc = gk.DiscriminatorWeights(*(arguments.pop(name) for name in INPUTS[1:]))
    return gk.adversarial_terms(
        arguments.pop("features"), disc, arguments.pop("sample_weight"), arguments.pop("domain"), **arguments
    )


BAD_INPUTS = [
    # changed argument, its value, and what the message must say: argument, found, expected
    ("features", torch.zeros(5, 4, 1), "features: found shape (5, 4, 1); expected (N, D)"),
    ("features", torch.zeros(0, 4), "features: found shape (0, 4); expected (N, D) with N, D >= 1"),
    ("features", torch.zeros(5, 4, dtype=torch.int64), "features: found dtype torch.int64; expected one of"),
    ("features", torch.zeros(5, 4, dtype=torch.float64), "disc: found dtype torch.float32 beside torch.float64"),
    ("features", torch.zeros(5, 3), "disc.w1: found shape (3, 6, 4); expected (3, 6, 3)"),
    ("features", torch.zeros(5, 4, device="meta"), "disc.w1: found device cpu; expected meta"),
    ("w1", torch.zeros(6, 4), "disc.w1: found shape (6, 4); expected (K, H, D)"),
    ("w1", torch.zeros(3, 0, 4), "disc.w1: found shape (3, 0, 4); expected (K, H, D) with K, H >= 1"),
    ("w1", torch.zeros(3, 6, 5), "disc.w1: found shape (3, 6, 5); expected (3, 6, 4)"),
    ("b1", torch.zeros(3, 5), "disc.b1: found shape (3, 5); expected (3, 6)"),
    ("w2", torch.zeros(3, 6, 5), "disc.w2: found shape (3, 6, 5); expected (3, 6, 6)"),
    ("b2", torch.zeros(6), "disc.b2: found shape (6,); expected (3, 6)"),
    ("b2", torch.zeros(3, 6, dtype=torch.float64), "disc.b2: found dtype torch.float64; expected torch.float32"),
    ("w3", torch.zeros(3, 6, 1), "disc.w3: found shape (3, 6, 1); expected (3, 6)"),
    ("b3", torch.zeros(3, 1), "disc.b3: found shape (3, 1); expected (3,)"),
    ("b3", torch.zeros(3, device="meta"), "disc.b3: found device meta; expected cpu, the device of features"),
    ("sample_weight", torch.zeros(3, 5), "sample_weight: found shape (3, 5); expected (5, 3)"),
    (
        "sample_weight",
        torch.zeros(5, 3, dtype=torch.float64),
        "sample_weight: found dtype torch.float64; expected torch.float32",
    ),
    ("sample_weight", torch.zeros(5, 3, dtype=torch.int64), "sample_weight: found dtype torch.int64; expected"),
    ("sample_weight", torch.full((5, 3), -0.25), "sample_weight: found -0.25; expected weights >= 0"),
    ("sample_weight", torch.full((5, 3), torch.nan), "sample_weight: found nan; expected weights >= 0"),
    ("domain", torch.zeros(4), "domain: found shape (4,); expected (5,)"),
    ("domain", torch.tensor([0, 1, 2, 0, 0]), "domain: found label 2; expected 1 (source) or 0 (target)"),
    ("domain", torch.tensor([0, 1, 0.5, 0, 0]), "domain: found label 0.5; expected 1 (source) or 0 (target)"),
    ("backend", "cuda", "backend: found 'cuda'; expected auto, reference, torch"),
    ("min_weight", -0.1, "min_weight: found -0.1; expected a finite number >= 0"),
    ("min_weight", float("nan"), "min_weight: found nan; expected a finite number >= 0"),
    ("max_pairs", 0, "max_pairs: found 0; expected None or a whole number of pairs >= 1"),
    ("max_pairs", 7.5, "max_pairs: found 7.5; expected None or a whole number of pairs >= 1"),
    ("loss_feature_scale", torch.ones(2), "loss_feature_scale: found shape (2,); expected a number or a 0-d tensor"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD_INPUTS, ids=lambda value: value if type(value) is str else ""
)
def test_bad_input_is_refused_by_name(name: str, value: Any, message: str) -> None:
    call(good())
    with pytest.raises(ValueError, match=re.escape(message)):
        call({**good(), name: value})


def test_a_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("torch"), "unavailable", lambda device: "no such luck", raising=False)
    assert gk.available_backends()["torch"] == "no such luck"
    with pytest.raises(ValueError, match=re.escape("backend: found 'torch', which cannot run here (no such luck)")):
        call({**good(), "backend": "torch"})


def test_available_backends() -> None:
    reasons = gk.available_backends()
    assert list(reasons)[:2] == ["reference", "torch"]
    assert reasons["reference"] is None
    assert reasons["torch"] is None
    assert all(why is None or why for why in reasons.values())
    assert gk.available_backends("cpu").keys() == gk.available_backends(torch.device("meta")).keys() == reasons.keys()


def test_auto_is_the_fastest_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in backends._FASTEST_FIRST:
        assert backends.resolve_backend("auto", torch.device("cpu")) in BACKENDS
        if name != "torch":
            monkeypatch.setattr(backends.get(name), "unavailable", lambda device: "switched off", raising=False)
    assert backends.resolve_backend("auto", torch.device("cpu")) == "torch"


def test_values_are_checked_where_that_is_free() -> None:
    bad = {**good(), "sample_weight": torch.full((5, 3), -1.0)}
    with pytest.raises(ValueError, match="sample_weight"):
        call({**bad, "validate": True})
    call({**bad, "validate": False})
    on_meta = {name: value.to("meta") for name, value in good().items()}
    assert call(on_meta).loss.shape == (3,)
    with pytest.raises(ValueError, match="validate: found True for tensors on meta; expected None or False"):
        call({**on_meta, "validate": True})


def test_negative_zero_weight_is_a_zero_weight() -> None:
    arguments = good()
    expected = call(arguments)
    weight = arguments["sample_weight"]
    found = call({**arguments, "sample_weight": torch.where(weight == 0, -0.0, weight)})
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_domain_labels_of_any_kind(backend: str, kind: torch.dtype) -> None:
    arguments = {**good(), "backend": backend}
    expected, found = call(arguments), call({**arguments, "domain": arguments["domain"].to(kind)})
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.gradient_norm, expected.gradient_norm)


@pytest.mark.parametrize(
    ("features", "parameters", "weights", "results"),
    [
        (torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_dtypes_that_mix(
    backend: str, features: torch.dtype, parameters: torch.dtype, weights: torch.dtype, results: torch.dtype
) -> None:
    arguments = good()
    for name in INPUTS:
        arguments[name] = arguments[name].to(features if name == "features" else parameters).requires_grad_()
    arguments["sample_weight"] = arguments["sample_weight"].to(weights)
    out = call({**arguments, "backend": backend})
    assert {out.loss.dtype, out.gradient_norm.dtype} == {results}
    (out.loss.sum() + out.gradient_norm.sum()).backward()
    for name in INPUTS:
        assert arguments[name].grad.dtype == arguments[name].dtype
        assert arguments[name].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_operation_alone(backend: str) -> None:
    """Autocast must not round float32 inputs inside; nor in the backward, where that is the backend's own."""
    arguments = {**good(), "backend": backend}
    arguments["w1"] = arguments["w1"].clone().requires_grad_()
    expected = call(arguments)
    (gradient,) = torch.autograd.grad(expected.loss.sum() + expected.gradient_norm.sum(), arguments["w1"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(arguments)
        total = found.loss.sum() + found.gradient_norm.sum()
        # PyTorch itself advises against a backward under autocast, and the reference's is autograd's.
        with torch.autocast("cpu", enabled=backend != "reference", dtype=torch.bfloat16):
            (under_autocast,) = torch.autograd.grad(total, arguments["w1"])
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(found.gradient_norm, expected.gradient_norm, rtol=0, atol=0)
    torch.testing.assert_close(under_autocast, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_computed_under_autocast(backend: str) -> None:
    """bfloat16 features beside float32 parameters: what an encoder under autocast hands over."""
    problem = make_problem(
        num_source=9, num_target=8, dim=32, hidden=48, dtype=torch.bfloat16, parameter_dtype=torch.float32
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equivalent(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_into_the_weights(backend: str) -> None:
    arguments = {**good(), "backend": backend}
    arguments["features"] = arguments["features"].clone().requires_grad_()
    arguments["sample_weight"] = arguments["sample_weight"].clone().requires_grad_()
    out = call(arguments)
    (out.loss.sum() + out.gradient_norm.sum()).backward()
    assert arguments["sample_weight"].grad is None
    assert arguments["features"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_where_nothing_needs_one(backend: str) -> None:
    arguments = {**good(), "backend": backend}
    assert not call(arguments).loss.requires_grad
    arguments["w1"] = arguments["w1"].clone().requires_grad_()
    with torch.no_grad():
        assert not call(arguments).gradient_norm.requires_grad

"""Half-precision copies of weights: that nobody can change a weight and have stale copies read."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_discriminators import batch, build
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from gsda_fast.methods import discriminators as module_under_test
from gsda_fast.methods.discriminators import Discriminators
from gsda_fast.methods.half_weights import HalfWeights
from gsda_fast.methods.objective import discriminator_objective
from gsda_fast.methods.step import Descent

HALF = torch.bfloat16


def weights(module: Discriminators) -> tuple[Tensor, Tensor]:
    return module.w1, module.w2


def converted(module: Discriminators) -> list[Tensor]:
    return [weight.detach().to(HALF) for weight in weights(module)]


def _step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Discriminators], None]:
    def change(module: Discriminators) -> None:
        optimizer = make(module.parameters(), lr=0.1, **options)
        sum(each.square().sum() for each in module.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        if options.get("fused"):
            # PyTorch itself does not count these writes. Once it does, this can go, and so can the updater's line.
            increment_version(list(module.parameters()))

    return change


@torch.no_grad()
def _written(module: Discriminators) -> None:
    module.w2[1, 2, 3] += 1


def _written_through_an_alias(module: Discriminators) -> None:
    module.w1.detach().view(-1)[:2].zero_()


def _replaced(module: Discriminators) -> None:
    module.w2 = nn.Parameter(module.w2.detach() * 2)


def _with_other_memory(module: Discriminators) -> None:
    module.w1.data = module.w1.detach() * 2


CHANGES: dict[str, Callable[[Discriminators], Any]] = {
    "SGD": _step(torch.optim.SGD, foreach=False),
    "SGD, foreach": _step(torch.optim.SGD, foreach=True),
    "SGD, fused": _step(torch.optim.SGD, fused=True),
    "Adam, fused": _step(torch.optim.Adam, fused=True),
    "load_state_dict": lambda module: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
    "load_state_dict, assigned": lambda module: module.load_state_dict(build().state_dict(), assign=True),
    "copy_": lambda module: module.w1.detach().copy_(module.w1.detach() + 1),
    "an entry": _written,
    "an alias": _written_through_an_alias,
    "a new parameter": _replaced,
    "new memory": _with_other_memory,
    "another dtype": Discriminators.double,
    "a share": lambda module: module.keep(slice(1, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whoever_changes_a_weight_makes_the_copies_invalid(change: Callable[[Discriminators], Any]) -> None:
    module, half = build(), HalfWeights()
    assert not half.are_valid(weights(module))
    half.renewed(weights(module), HALF)
    assert half.are_valid(weights(module))
    change(module)
    assert not half.are_valid(weights(module))
    for found, expected in zip(half.renewed(weights(module), HALF), converted(module), strict=True):
        assert torch.equal(found, expected)
    assert half.are_valid(weights(module))


def test_who_reads_a_weight_leaves_them_valid() -> None:
    module, half = build(), HalfWeights()
    half.renewed(weights(module), HALF)
    features, probabilities, domain = batch()
    module(features, probabilities, domain).loss.sum().backward()
    module.zero_grad()
    module.state_dict()
    assert half.are_valid(weights(module))


def test_copies_are_renewed_where_they_lie() -> None:
    """A CUDA graph goes on reading there."""
    module, half = build(), HalfWeights()
    before = half.renewed(weights(module), HALF)
    _step(torch.optim.SGD)(module)
    after = half.renewed(weights(module), HALF)
    assert [each.data_ptr() for each in after] == [each.data_ptr() for each in before]
    assert [each.dtype for each in half.renewed(weights(module), torch.float16)] == 2 * [torch.float16]


def descend(
    module: Discriminators, features: Tensor, probabilities: Tensor, domain: Tensor, counted: bool = True
) -> None:
    buffers = {id(each): torch.zeros_like(each) for each in module.parameters()}
    descent = Descent(
        0.1, 0.9, 0.0, True, lambda parameters: [buffers[id(each)] for each in parameters], torch.zeros(()), counted
    )
    module.descend_(
        features,
        probabilities,
        domain,
        None,
        None,
        lambda terms: discriminator_objective(terms, None, beta=0.0),
        descent,
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The copies that each call of the operations is given, on a device that would read them."""
    found: list[Any] = []

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, half_weights: Any = None, **options: Any) -> Any:
            found.append(half_weights if half_weights is None else [each.clone() for each in half_weights])
            return operation(*args, half_weights=half_weights, **options)

        return call

    for name in ("adversarial_terms", "adversarial_update_"):
        monkeypatch.setattr(module_under_test, name, watched(getattr(module_under_test, name)))
    monkeypatch.setattr(Discriminators, "_reads_half", lambda self, features: features.dtype == HALF)
    return found


@pytest.mark.parametrize("change", [None, "SGD, foreach", "load_state_dict", "copy_"])
def test_discriminators_read_copies_only_while_they_hold(seen: list[Any], change: str | None) -> None:
    module = build()
    features, probabilities, domain = batch()
    rows = (features.to(HALF), probabilities, domain)
    module(*rows)
    assert seen.pop() is None
    for _ in range(2):
        before = converted(module)
        descend(module, *rows)
        assert all(map(torch.equal, seen.pop(), before))
        module(*rows, frozen=True)
        assert all(map(torch.equal, seen.pop(), converted(module)))
        # Copies of another dtype than the features', and a call that nobody has looked in front of.
        module(features, probabilities, domain, frozen=True)
        module.forward(*rows)
        assert [seen.pop(), seen.pop()] == [None, None]
        if change is not None:
            CHANGES[change](module)
            module(*rows, frozen=True)
            assert seen.pop() is None


def test_no_copies_are_kept_where_a_write_may_be_missed(seen: list[Any]) -> None:
    module = build()
    features, probabilities, domain = batch()
    descend(module, features.to(HALF), probabilities, domain, counted=False)
    module(features.to(HALF), probabilities, domain)
    assert seen == [None, None]


def test_neither_checkpoints_nor_copies_of_the_module_have_them(seen: list[Any]) -> None:
    module = build()
    features, probabilities, domain = batch()
    rows = (features.to(HALF), probabilities, domain)
    stored, buffers = list(module.state_dict()), list(dict(module.named_buffers()))
    descend(module, *rows)
    assert (list(module.state_dict()), list(dict(module.named_buffers()))) == (stored, buffers)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            other.w1.add_(1.0)
        other(*rows)
        assert seen.pop() is None
    module(*rows)
    assert seen.pop() is not None

"""Reused memory: never handed out twice at a time, never kept beyond need, and like `torch.empty` otherwise."""

import pytest
import torch
from equivalence import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

import gsda_kernels as gk
from gsda_kernels import buffers

LARGE = (400, 400)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> buffers._Pool:
    fresh = buffers._Pool()
    monkeypatch.setattr(buffers, "_POOL", fresh)
    return fresh


def test_memory_comes_back_only_when_nobody_holds_it() -> None:
    like = torch.empty(1)
    first = buffers.empty(LARGE, like)
    place = first.data_ptr()
    part = first[7:9]
    del first
    assert buffers.empty(LARGE, like).data_ptr() != place  # a view still holds it
    alias = part.detach()
    del part
    assert buffers.empty(LARGE, like).data_ptr() != place
    del alias
    held = [buffers.empty(LARGE, like) for _ in range(3)]
    assert place in [tensor.data_ptr() for tensor in held]
    assert len({tensor.data_ptr() for tensor in held}) == 3


def test_sizes_that_changed_do_not_pile_up(pool: buffers._Pool) -> None:
    like = torch.empty(1)
    kept = buffers.empty(LARGE, like)
    for rows in range(400, 420):
        buffers.empty((rows, 500), like)
    assert len(pool._arrays) == 2
    assert kept.shape == LARGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_like_torch_empty(dtype: torch.dtype) -> None:
    like = torch.empty(3, dtype=dtype)
    tensor = buffers.empty(LARGE, like)
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous(), tensor.data_ptr() % 64) == (dtype, LARGE, True, 0)
    assert buffers.empty(LARGE, like, torch.float64).dtype == torch.float64
    assert buffers.empty(LARGE, torch.empty(1, device="meta")).device.type == "meta"
    with FakeTensorMode() as mode:
        assert type(buffers.empty(LARGE, mode.from_tensor(like))) is type(mode.from_tensor(like))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_gradients_of_two_steps_do_not_share_memory(backend: str) -> None:
    """What a user kept from one step must survive the next."""
    problem = make_problem(dim=96, hidden=300)
    parameters = [tensor.requires_grad_() for tensor in problem.disc]

    def gradients() -> tuple[torch.Tensor, ...]:
        terms = gk.adversarial_terms(
            problem.features, problem.disc, problem.sample_weight, problem.domain, backend=backend
        )
        return torch.autograd.grad(terms, parameters, (problem.grad_loss, problem.grad_gradient_norm))

    first = gradients()
    kept = [gradient.clone() for gradient in first]
    problem.features.mul_(2)
    second = gradients()
    assert not torch.equal(first[2], second[2])
    assert all(torch.equal(gradient, copy) for gradient, copy in zip(first, kept))

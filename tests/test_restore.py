import pytest
import torch

from gsda_kernels.restore import restore_where


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_the_flag_decides(flag: float) -> None:
    before = [torch.randn(3, 4), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(())]
    moved = [tensor + 1 for tensor in before]
    tensors, copies = [tensor.clone() for tensor in moved], [tensor.clone() for tensor in before]
    restore_where(torch.tensor(flag), tensors, copies)
    for found, expected in zip(tensors, before if flag else moved):
        assert found.equal(expected)


def test_parameters_that_require_a_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    restore_where(torch.tensor(1.0), [parameter], [torch.zeros(5)])
    assert parameter.equal(torch.zeros(5))
    assert parameter.requires_grad

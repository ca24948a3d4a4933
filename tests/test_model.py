import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from gsda_fast.assemble import preprocessing_of
from gsda_fast.config import configure
from gsda_fast.errors import UsageError, UsageWarning
from gsda_fast.model import AdaptationModel, ModelSettings, build_model, fetch_weights, input_format

LENET = ModelSettings("lenet", weights="none", bottleneck_dim=128, bottleneck_activation="relu")


def test_lenet_maps_grey_digits_to_features_and_logits() -> None:
    model = build_model(LENET, num_classes=10)
    features, logits = model(torch.randn(3, 1, 16, 16))
    assert features.shape == (3, 128)
    assert logits.shape == (3, 10)
    assert model.feature_dim == 128
    assert_close(logits, model.classifier(features))
    # conv 5x5 to 16, conv 5x5 to 32, linear 512 -> 128, linear 128 -> 10, with biases
    expected = (25 * 16 + 16) + (16 * 25 * 32 + 32) + (512 * 128 + 128) + (128 * 10 + 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(("activation", "negative"), [("relu", False), ("none", True)])
def test_what_follows_the_bottleneck(activation: str, negative: bool) -> None:
    torch.manual_seed(0)
    settings = ModelSettings("lenet", "none", bottleneck_dim=32, bottleneck_activation=activation)  # type: ignore[arg-type]
    features, _ = build_model(settings, 4)(torch.randn(5, 1, 16, 16))
    assert bool((features < 0).any()) == negative


@pytest.fixture(scope="module")
def resnet18() -> AdaptationModel:
    return build_model(ModelSettings("resnet18", weights="none", bottleneck_dim=24), num_classes=5)


def test_a_torchvision_backbone_loses_its_classifier(resnet18: AdaptationModel) -> None:
    features, logits = resnet18.eval()(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 24)
    assert logits.shape == (2, 5)
    bottleneck = resnet18.bottleneck[0]
    assert isinstance(bottleneck, nn.Linear)
    assert bottleneck.in_features == 512
    assert not [name for name, module in resnet18.backbone.named_modules() if isinstance(module, nn.Linear)]


def test_convolutions_are_channels_last(resnet18: AdaptationModel) -> None:
    for model in (resnet18, build_model(LENET, 10)):
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_weights_of_a_file(tmp_path: Path, resnet18: AdaptationModel) -> None:
    stored = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18.pth"
    torch.save(stored.state_dict(), path)
    model = build_model(ModelSettings("resnet18", weights=str(path)), num_classes=5)
    expected = {name: value for name, value in stored.state_dict().items() if not name.startswith("fc.")}
    assert_close(dict(model.backbone.state_dict()), expected, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # a random start is another one
        assert_close(dict(resnet18.backbone.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", ["as it is", "script", "parallel", "lightning", "compiled"])
def test_weights_are_found_inside_what_scripts_store(wrapped: str, tmp_path: Path) -> None:
    stored = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / "resnet18.pth"
    forms = {
        "as it is": stored,
        "script": {"state_dict": stored, "epoch": 3},
        "parallel": {f"module.{name}": value for name, value in stored.items()},
        "lightning": {"state_dict": {f"model.{name}": value for name, value in stored.items()}},
        "compiled": {"model": {f"module._orig_mod.{name}": value for name, value in stored.items()}},
    }
    torch.save(forms[wrapped], path)
    model = build_model(ModelSettings("resnet18", weights=str(path)), num_classes=5)
    assert_close(model.backbone.get_parameter("conv1.weight").detach(), stored["conv1.weight"], rtol=0, atol=0)


def test_an_output_layer_of_other_classes_is_left_out_with_a_line(tmp_path: Path) -> None:
    stored = torchvision.models.resnet18(weights=None, num_classes=7).state_dict()
    torch.save(stored, tmp_path / "seven.pth")
    with pytest.warns(UsageWarning, match=r"seven\.pth: fc is left out: it has 7 classes"):
        model = build_model(ModelSettings("resnet18", weights=str(tmp_path / "seven.pth")), num_classes=5)
    assert_close(model.backbone.get_parameter("conv1.weight").detach(), stored["conv1.weight"], rtol=0, atol=0)


def write_bad_weights(kind: str, path: Path) -> None:
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not weights, whatever its name says\n")
        case "truncated":
            torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
            path.write_bytes(path.read_bytes()[:-1000])
        case "list":
            torch.save([torch.zeros(2)], path)
        case "other network":
            torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
        case "other shape":
            path.write_bytes(b"")
            state = torchvision.models.resnet18(weights=None).state_dict()
            torch.save({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, path)


@pytest.mark.parametrize(
    ("kind", "mentioned"),
    [
        ("empty", "begins with b''"),
        ("text", "begins with b'not weights,'"),
        ("truncated", "begins with b'PK"),
        ("list", "list"),
        ("other network", "Missing key(s) in state_dict"),
        ("other shape", "conv1.weight"),
    ],
)
def test_a_file_that_holds_no_fitting_weights(kind: str, mentioned: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write_bad_weights(kind, path)
    with pytest.raises(UsageError, match=r"--weights: found .*; expected a state dict of the backbone") as error:
        build_model(ModelSettings("resnet18", weights=str(path)), 5)
    assert str(path) in error.value.found
    assert mentioned in error.value.found
    assert len(error.value.found) < len(str(path)) + 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "option", "mentioned"),
    [
        (ModelSettings("resnet1", "none"), "--backbone", "resnet50"),
        (ModelSettings("squeezenet1_1", "none"), "--backbone", "linear classifier"),
        (ModelSettings("resnet18", "IMAGENET"), "--weights", "IMAGENET1K_V1"),
        (ModelSettings("resnet18", "missing.pth"), "--weights", "an existing file"),
        (ModelSettings("resnet18", "."), "--weights", "an existing file"),
        (ModelSettings("lenet", "IMAGENET1K_V1"), "--weights", "none"),
    ],
)
def test_names_that_do_not_exist(settings: ModelSettings, option: str, mentioned: str) -> None:
    with pytest.raises(UsageError) as error:
        build_model(settings, 5)
    assert error.value.what == option
    assert mentioned in error.value.expected
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_connection(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    with pytest.raises(
        UsageError, match=r"--weights: found IMAGENET1K_V1, which could not be fetched.*no route"
    ) as error:
        build_model(ModelSettings("resnet18"), 5)
    assert "--weights PATH" in error.value.remedy
    assert "resnet18-f37072fd.pth" in error.value.remedy
    with pytest.raises(UsageError, match=r"--weights: found IMAGENET1K_V1, which could not be fetched.*no route"):
        fetch_weights(ModelSettings("resnet18"))


@pytest.mark.parametrize(
    "settings", [ModelSettings("lenet", "none"), ModelSettings("resnet18", "none"), ModelSettings("resnet18", "a.pth")]
)
def test_nothing_is_fetched_that_is_not_needed(settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched"))
    fetch_weights(settings)


def test_a_backbone_with_auxiliary_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: network)
    assert build_model(ModelSettings("inception_v3", "none"), 5).bottleneck[0].in_features == 4
    network.aux_logits = True  # type: ignore[assignment]
    with pytest.raises(UsageError, match="--backbone: found inception_v3; expected a model with one output"):
        build_model(ModelSettings("inception_v3", "none"), 5)


def test_rows_of_features_are_normalised_by_their_root_mean_square() -> None:
    rows = torch.tensor([[3.0, 4.0], [300.0, -400.0], [0.0, 0.0]])
    settings = ModelSettings("features", "none", feature_norm="rms", input_dim=2, bottleneck_dim=3)
    normalised = build_model(settings, 2).backbone(rows)
    assert_close(normalised[:2], rows[:2] / torch.tensor([[12.5**0.5], [12.5**0.5 * 100]]), rtol=1e-5, atol=1e-5)
    assert bool((normalised[2] == 0).all())
    plain = build_model(ModelSettings("features", "none", input_dim=2), 2).backbone(rows)
    assert_close(plain, rows, rtol=0, atol=0)


def test_a_hidden_layer_stands_before_the_bottleneck() -> None:
    model = build_model(ModelSettings("features", "none", input_dim=7, hidden=5, bottleneck_dim=3), 2)
    assert [tuple(weight.shape) for weight in model.bottleneck.parameters()] == [(5, 7), (5,), (3, 5), (3,)]
    assert bool((model.bottleneck[:2](torch.randn(4, 7)) >= 0).all())


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="timm:vit_tiny_patch16_224, and no timm; expected it installed"):
        build_model(ModelSettings("timm:vit_tiny_patch16_224", "none"), 5)


def test_a_backbone_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with timm's names: create_model, is_model, get_pretrained_cfg, num_features."""

    class Network(nn.Flatten):
        num_features = 12

    made: list[tuple[str, bool, int]] = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        made.append((name, pretrained, num_classes))
        return Network()

    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"  # type: ignore[attr-defined]
    timm.create_model = create_model  # type: ignore[attr-defined]
    card = types.SimpleNamespace(
        input_size=(3, 96, 96), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fixed_input_size=True
    )
    timm.get_pretrained_cfg = lambda name: card  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert build_model(ModelSettings("timm:tiny", "pretrained"), 5)(torch.zeros(1, 3, 2, 2)).logits.shape == (1, 5)
    assert made == [("tiny", True, 0)]
    assert input_format("timm:tiny") == (96, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), True)
    config = configure("office31", "source-only", backbone="timm:tiny")
    assert preprocessing_of(config).crop == 96
    with pytest.raises(UsageError, match="--crop: found 64, for timm:tiny; expected 0: it takes inputs of one size"):
        preprocessing_of(replace(config, data=replace(config.data, crop=64)))
    with pytest.raises(UsageError, match=r"--backbone: found timm:huge; expected timm: and a name"):
        input_format("timm:huge")
    with pytest.raises(UsageError, match="IMAGENET1K_V1; expected none, an existing file, or pretrained"):
        build_model(ModelSettings("timm:tiny"), 5)

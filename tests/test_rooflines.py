import pytest
import torch
from torch import nn

from gsda_fast import assemble
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.model import ModelSettings
from gsda_fast.monitor import _report_line
from gsda_fast.training import rooflines
from gsda_fast.training.rooflines import PEAKS, Floors, Peaks, Work, device_floors, floors, training_work
from gsda_fast.training.trainer import Report

DIGITS, OFFICE = BENCHMARKS["digits"].preprocessing, BENCHMARKS["office31"].preprocessing
LENET = ModelSettings("lenet", "none", bottleneck_dim=128, bottleneck_activation="relu")


def test_the_work_of_lenet_is_that_of_its_layers() -> None:
    """Every layer forward, for its weights, and for its input where something learns below it."""
    found = training_work(LENET, DIGITS, num_classes=10, images=6, dtype=torch.float32)
    first, second = 2 * 16 * 25 * 16 * 16, 2 * 32 * 16 * 25 * 8 * 8
    assert found.convolutions == 2 * first + 3 * second
    assert found.products == 3 * 2 * (512 * 128 + 128 * 10)


def test_bytes_are_those_of_operands_and_halve_with_them() -> None:
    """A linear layer: forward and the gradients of weight and input read two operands and write one, each."""
    batch, features, images = 4, 128, 10
    work = {
        dtype: training_work(LENET, DIGITS, num_classes=images, images=batch, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert work[torch.bfloat16].bytes == work[torch.float32].bytes / 2
    wider = training_work(LENET, DIGITS, num_classes=images + 1, images=batch, dtype=torch.float32)
    # One more class: a row of weights and a column of logits in three products, its bias in one.
    assert (wider.bytes - work[torch.float32].bytes) * batch == 4 * (3 * (features + batch) + 1)


def test_resnet_50_is_what_is_published() -> None:
    """4.09 G multiply-adds forward (torchvision's page), times three but for the first layer's input."""
    work = training_work(ModelSettings(weights="none"), OFFICE, num_classes=12, images=72, dtype=torch.bfloat16)
    assert work.convolutions + work.products == pytest.approx(3 * 2 * 4.09e9, rel=0.02)
    alone = training_work(ModelSettings(weights="none"), OFFICE, num_classes=12, images=1, dtype=torch.bfloat16)
    assert alone.convolutions == work.convolutions
    assert alone.bytes > work.bytes  # its share of the parameters is larger


def test_counting_leaves_no_trace() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    training_work(LENET, DIGITS, num_classes=10, images=2, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_floors_divide_by_the_peaks() -> None:
    work, peaks = Work(convolutions=4e12, products=6e12, bytes=3e12), Peaks(1.5, half=10, tf32=2, single=1)
    assert floors(work, peaks, half=True) == Floors(1.0, 2.0)
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    try:
        convolutions.fp32_precision, products.fp32_precision = "ieee", "ieee"
        assert floors(work, peaks, half=False) == Floors(10.0, 2.0)
        convolutions.fp32_precision = "tf32"
        assert floors(work, peaks, half=False) == Floors(8.0, 2.0)
        products.fp32_precision = "tf32"
        assert floors(work, peaks, half=False) == Floors(5.0, 2.0)
    finally:
        convolutions.fp32_precision, products.fp32_precision = before
    assert Floors(0.5, 2.0).shares(3, 12.0) == {"mfu": 0.125, "mbu": 0.5}


def test_nothing_is_told_of_an_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str, precision: str = "bf16") -> Floors | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return device_floors(torch.device("cuda"), precision, LENET, DIGITS, num_classes=10, images=8)

    assert device_floors(torch.device("cpu"), "fp32", LENET, DIGITS, num_classes=10, images=8) is None
    assert of("NVIDIA of the future") is None
    assert of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a seventh of it
    known = {name: of(name) for name in PEAKS}
    assert all(known.values())
    work = training_work(LENET, DIGITS, num_classes=10, images=8, dtype=torch.bfloat16)
    assert known["NVIDIA H200"] == floors(work, PEAKS["NVIDIA H200"], half=True)
    assert of("NVIDIA H200", "fp32") != known["NVIDIA H200"]


@pytest.mark.parametrize(("method", "warmup", "images"), [("gsda", 0, 16), ("gsda", 2, 8), ("source-only", 0, 8)])
def test_shares_are_of_the_images_that_the_network_saw(
    method: str, warmup: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--synthetic", "--steps", "2", "--warmup", str(warmup), "--batch-size", "8", "--log-every", "1")
    monkeypatch.setattr(assemble, "device_floors", lambda *_, **__: Floors(0.25, 0.5))
    trainer = build_trainer(*resolve(parse_config(["digits", "--method", method, *options], "train")))
    reports = list(trainer.run(lambda: None))
    assert len(reports) == 2
    for report in reports:
        seconds = 16 / report.values["images_per_second"]  # type: ignore[operator]
        assert report.values["mfu"] == pytest.approx(images * 0.25 / seconds)
        assert report.values["mbu"] == pytest.approx(images * 0.5 / seconds)


def test_a_report_tells_shares_where_they_are_known() -> None:
    values: dict[str, float | None] = {"data_wait": 0.1, "images_per_second": 7.0}
    assert "peak" not in _report_line(Report(1, values, 2**30))
    shares: dict[str, float | None] = {"mfu": 0.421, "mbu": 0.3}
    line = _report_line(Report(1, values | shares, 2**30))
    assert "matrix 42% of its peak  bandwidth 30% of its peak" in line


def test_peak_memory_is_in_bytes() -> None:
    used = rooflines.peak_memory(torch.device("cpu"))
    assert 2**26 < used < 2**42


def test_the_peak_of_the_run_before_is_forgotten_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    rooflines.forget_peak_memory(torch.device("cpu"))
    assert forgotten == []
    rooflines.forget_peak_memory(torch.device("cuda:1"))
    assert forgotten == [torch.device("cuda:1")]


def test_each_run_of_a_process_starts_with_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[torch.device] = []
    monkeypatch.setattr(assemble, "forget_peak_memory", forgotten.append)
    for runs in (1, 2):
        build_trainer(*resolve(parse_config(["digits", "--synthetic", "--batch-size", "8"], "train"))).loader.close()
        assert forgotten == [torch.device("cpu")] * runs

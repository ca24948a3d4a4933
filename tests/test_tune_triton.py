"""The tuning of the Triton products, as far as it goes without a GPU: candidates, choice, compilation, the table."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gsda_kernels as gk

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

if gk.available_backends("cpu")["triton"] is None:
    pytest.skip("TRITON_INTERPRET is set: such a process cannot compile", allow_module_level=True)

from benchmarks import tune_triton
from benchmarks.cross_compile import ALL_KERNELS, SHARED_MEMORY, fake_device
from benchmarks.shapes import SHAPES
from benchmarks.tune_triton import PRODUCTS, TUNED_AT, Trial, Verdict, candidates, choose, main, render, row
from gsda_kernels.triton.configs import ANY_CHIP, KINDS, SHAPE_CLASSES, Key, Product, configure, look_up, shape_class
from gsda_kernels.triton.table import TABLE

EVERY_ROW = [Key(ANY_CHIP, kind, size) for kind in KINDS for size in SHAPE_CLASSES]
A, B, TALL = Product(64, 64, 32, 4, 3), Product(64, 32, 32, 4, 3), Product(128, 64, 32, 8, 3)


@pytest.mark.parametrize("key", EVERY_ROW, ids=" ".join)
@pytest.mark.parametrize("product", PRODUCTS)
def test_candidates(product: str, key: Key) -> None:
    found = candidates(product, key.kind, key.shape_class, min(SHARED_MEMORY.values()))
    assert getattr(look_up(key), product) in found
    assert len(found) == len(set(found)) > 10
    assert set(found) <= set(candidates(product, key.kind, key.shape_class, SHARED_MEMORY[90]))
    for candidate in found:
        blocks = (candidate.block_rows, candidate.block_columns, candidate.block_inner)
        assert all(block & (block - 1) == 0 for block in blocks)
        assert candidate.block_rows >= 64
        assert min(blocks) >= 16


def test_rows_are_tuned_at_shapes_of_their_class() -> None:
    for size, shapes in TUNED_AT.items():
        assert {shape_class(shape.num_samples, shape.feature_dim, shape.hidden_dim) for shape in shapes} == {size}


def test_the_table_in_force_is_what_the_script_would_write() -> None:
    assert set(EVERY_ROW) <= set(TABLE)
    assert render(TABLE) == tune_triton.TABLE_FILE.read_text()


def test_a_row_of_a_chip_goes_before_the_row_for_any() -> None:
    own = Key("sm_90", "half", "small")
    changed = replace(look_up(own), weight=TALL)
    written: dict[str, Any] = {}
    exec(render({**TABLE, own: row(changed)}), written)
    arguments = (72, 256, 1024, torch.bfloat16, torch.bfloat16, "ieee")
    assert configure(*arguments, "sm_90", written["TABLE"]) == changed
    assert configure(*arguments, "sm_80", written["TABLE"]) == configure(*arguments)
    # Only this row: another class, other operands.
    assert configure(256, *arguments[1:], "sm_90", written["TABLE"]) == configure(256, *arguments[1:])


def test_choice() -> None:
    """The pair of layer and jacobian is the quickest that agrees on the rows, shapes counting alike."""
    times = {
        "layer": {A: [4.0, 400.0], TALL: [1.0, 100.0]},
        "jacobian": {B: [2.0, 200.0], A: [2.0, 190.0], TALL: [9.0, 900.0]},
        # Slower by one in sum, but not in ratios.
        "weight": {A: [1.0, 300.0], TALL: [2.0, 299.0]},
    }
    best = choose(times)
    assert (best.layer, best.jacobian, best.weight) == (A, A, A)


def test_list_tells_what_the_compiler_makes_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Key("sm_90", "half", "small")
    in_force = look_up(key).jacobian
    few = [in_force, replace(in_force, block_columns=256, block_inner=128), replace(in_force, block_rows=32)]
    monkeypatch.setattr(tune_triton, "candidates", lambda *arguments: few)
    options = ["--kinds", "half", "--shape-classes", "small", "--products", "jacobian", "--workers", "1"]
    assert main(["--list", "--chip", "sm_90", *options]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("sm_90 half small jacobian: 64x32x64, 4 warps, 4 stages: ")
    assert first.endswith("bytes of shared memory  (in force)")
    assert second.endswith("bytes of shared memory; the chip has 232448")
    assert third.endswith("no wgmma.mma_async")


def test_tuning_writes_what_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the GPU: half's weights are quicker in wide tiles, mixed ones hardly."""

    def milliseconds(trial: Trial, inputs: object) -> float:
        gain = 0.5 if trial.key.kind == "half" else 0.99
        return gain if trial.product == "weight" and trial.candidate.block_columns == 256 else 1.0

    def compiled(trials: list[Trial], workers: int) -> list[tuple[Trial, Verdict]]:
        """Tiles of 128 x 256 spill."""

        def flaw(each: Product) -> str | None:
            return "spills" if each.block_rows * each.block_columns > 128 * 128 else None

        return [(trial, Verdict(200, 0, flaw(trial.candidate))) for trial in trials]

    checked: list[Key] = []
    monkeypatch.setattr(tune_triton, "_chip", lambda asked, listing: "sm_90")
    monkeypatch.setattr(tune_triton, "inputs_at", lambda shape, kind: None)
    monkeypatch.setattr(tune_triton, "_check_results", lambda key, configuration, inputs: checked.append(key))
    monkeypatch.setattr(tune_triton, "milliseconds", milliseconds)
    monkeypatch.setattr(tune_triton, "inspected", compiled)
    output = tmp_path / "table.py"
    assert main(["--kinds", "half", "mixed", "--shape-classes", "small", "--output", str(output)]) == 0
    written: dict[str, Any] = {}
    exec(output.read_text(), written)
    key = Key("sm_90", "half", "small")
    assert written["TABLE"].keys() - TABLE.keys() == {key}
    weight = look_up(key, written["TABLE"]).weight
    assert (weight.block_rows, weight.block_columns) == (64, 256)
    assert set(checked) == {key, key._replace(kind="mixed")}
    assert "sm_90 mixed small: 1.00 of the time before, left as it is" in capsys.readouterr().out


def test_kernels_are_timed_on_what_the_ones_before_them_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on fresh memory: every kernel of a step runs once before the first is timed."""
    ran: list[str] = []
    key = Key("sm_90", "half", "small")
    with fake_device(90):
        inputs = tune_triton.make_inputs(SHAPES["digits"], dtype=torch.bfloat16)
        inputs = replace(inputs, **{f.name: _on_cuda(getattr(inputs, f.name)) for f in fields(inputs)})
        monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: ran.append(kernel.fn.__name__))
        monkeypatch.setattr(tune_triton, "do_bench", lambda launch, **options: float(len(ran)))
        assert tune_triton.milliseconds(Trial(key, "jacobian", look_up(key).jacobian), inputs) == len(ran)
    assert set(ran) == set(ALL_KERNELS)


def _on_cuda(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_on_cuda, value))
    return torch.empty_like(value, device="cuda") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: found no CUDA device; expected one to time the kernels on; --list --chip sm_90 needs none"),
        (["--list", "--chip", "sm_75"], "error: --chip: found 'sm_75'; expected one of sm_80, sm_86, sm_89, sm_90,"),
        (["--chip", "sm_90"], "error: --chip: found it without --list;"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1

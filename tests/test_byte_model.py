"""The byte model: what it counts, against counts by hand and against the launches that the host code makes."""

from pathlib import Path

import pytest

from benchmarks.byte_model import KINDS, Machine, bytes_per_parameter, count, main, pairs_of, times
from benchmarks.shapes import SHAPES, HeadShape, make_inputs

pytest.importorskip("triton")
cross_compile = pytest.importorskip("benchmarks.cross_compile")
tune_triton = pytest.importorskip("benchmarks.tune_triton")
MACHINE = Machine()


@pytest.mark.parametrize("name", ["visda", "office-home"])
def test_pairs_are_those_of_a_batch(name: str) -> None:
    """As many to a discriminator as the inputs of the benchmarks route."""
    shape = SHAPES[name]
    weight = make_inputs(HeadShape(shape.num_classes, shape.num_groups, 8, 8)).sample_weight
    assert sum(pairs_of(shape)) == shape.num_pairs == int(weight.count_nonzero())
    assert len(pairs_of(shape)) == shape.num_discriminators
    assert pairs_of(shape)[0] == shape.num_samples


def test_a_product_counted_by_hand() -> None:
    """VisDA, 36 + 36: 720 pairs in 18 tiles of 64 rows, 17 matrices of 1024 x 1024 in float32."""
    step = count(SHAPES["visda"], "mixed", MACHINE)
    assert (step.num_pairs, step.num_tiles, step.block_rows) == (720, 18, 64)
    second = next(launch for launch in step.forward if launch.name == "second_layer")
    activations = 720 * 1024 * 2
    assert second.memory == 17 * 1024 * 1024 * 4 + 2 * activations
    assert second.operations == 2 * 18 * 64 * 1024 * 1024
    assert second.programs == 18 * 1024 / 64
    moves = next(launch for launch in step.update if launch.name == "weight_gradient 2, moves W2")
    assert moves.memory == 17 * 1024 * 1024 * (4 * 4 + 2)
    copied = next(launch for launch in step.forward_copies if launch.name == "second_layer")
    assert copied.memory == 17 * 1024 * 1024 * 2 + 2 * activations


@pytest.mark.parametrize("kind", KINDS)
def test_programs_are_those_of_the_launches(kind: str) -> None:
    """The grids hold as many tiles as the bound on pairs allows: at least those that the model counts."""
    shape = SHAPES["visda"]
    dtype, parameter_dtype, _, _ = KINDS[kind]
    sizes = {"num_samples": shape.num_samples, "num_discriminators": shape.num_discriminators}
    sizes |= {"dim": shape.feature_dim, "hidden": shape.hidden_dim, "max_pairs": shape.num_pairs}
    with tune_triton.precision_of(kind):
        forward, backward = cross_compile.head_launches(dtype=dtype, parameter_dtype=parameter_dtype, **sizes)
    step = count(shape, kind, MACHINE)
    most = step.num_pairs // step.block_rows + 1 + shape.num_discriminators
    made = {launch.name.removesuffix("_kernel"): launch.grid for launch in forward + backward}
    for launch in (*step.forward, *step.backward):
        if launch.operations and not launch.name.startswith("weight_gradient"):
            (programs,) = made[launch.name]
            assert launch.programs <= programs <= launch.programs * most / step.num_tiles
    grids = [launch.grid for launch in backward if launch.name == "weight_gradient_kernel"]
    counted = [launch.programs for launch in step.backward if launch.name.startswith("weight_gradient")]
    assert [columns * high * k for columns, high, k in grids] == counted
    with tune_triton.precision_of(kind):
        moves = cross_compile.update_launches(dtype=dtype, parameter_dtype=parameter_dtype, **sizes)
    grids = [launch.grid for launch in moves if launch.name == "weight_gradient_kernel"]
    counted = [launch.programs for launch in step.update if "moves" in launch.name]
    assert [columns * high * k for columns, high, k in grids] == counted


def test_bytes_of_a_parameter() -> None:
    found = bytes_per_parameter(SHAPES["visda"], "mixed")
    assert found["backward, norm, copy, SGD"] == pytest.approx(64)
    assert found["backward, norm, SGD"] == pytest.approx(48)
    assert found["fused update"] == pytest.approx(32.8)
    assert found["fused update, copies in half precision"] == pytest.approx(26.4)
    of_half = bytes_per_parameter(SHAPES["visda"], "half")
    assert of_half["fused update, copies in half precision"] == of_half["fused update"]


def test_the_bytes_a_parameter_are_those_of_the_launches() -> None:
    """With H as large as it takes for activations and biases to vanish beside the matrices."""
    shape = HeadShape(num_classes=4, num_groups=2, feature_dim=1024, hidden_dim=8192, num_source=4, num_target=4)
    step = count(shape, "mixed", MACHINE)
    launches = (*step.forward_copies, *step.forward_copies, *step.update, *step.encoder)
    expected = bytes_per_parameter(shape, "mixed")["fused update, copies in half precision"]
    assert expected < 28
    assert sum(launch.memory for launch in launches) / step.num_parameters == pytest.approx(expected, rel=0.01)


def test_a_faster_memory_makes_a_step_faster_and_nothing_else() -> None:
    step = count(SHAPES["office-home"], "mixed", MACHINE)
    slow, fast = times(step, "mixed", MACHINE), times(step, "mixed", Machine(memory=4.3e12))
    assert fast.sgd == pytest.approx(slow.sgd * 3 / 4.3)
    assert fast.fused < slow.fused < slow.without_copy < slow.with_copy


def test_the_page_says_that_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.md"
    assert main(["--shapes", "visda", "visda-128", "--rows", "128", "--output", str(path)]) == 0
    text = path.read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("# The adversarial part of a step on an H100: model, not measured\n")
    assert "| tiles | 17 of 128 rows | 34 of 128 rows |" in text
    assert "| **both players: fused update, copies in half precision** |" in text

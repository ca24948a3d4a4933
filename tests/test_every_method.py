"""Every method, on digits and on a tree of Office-31's layout: killed, gone on with, evaluated, used."""

import signal
from pathlib import Path

import pytest
import torch
from benchmark_trees import office31
from killed_runs import Order, run
from same_state import differences
from test_kill import outcome

from gsda_fast.data.domains import open_images
from gsda_fast.evaluate import EvaluateSettings, evaluate
from gsda_fast.export import ExportSettings, export
from gsda_fast.methods import METHODS
from gsda_fast.predict import predict
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.trained import load_trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:domain .*"),
]

STEPS = ("--steps", "7", "--warmup", "3", "--refresh-every", "2", "--log-every", "1", "--batch-size", "8")
STEPS = (*STEPS, "--confidence-threshold", "0.03", "--no-verify", "--device", "cpu", "--checkpoint-seconds", "0")
SMALL = ("--backbone", "shufflenet_v2_x0_5", "--weights", "none", "--bottleneck-dim", "16", "--loader", "torch")


@pytest.fixture(scope="module")
def tasks(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], Path]]:
    """By task: the arguments of a run, and a folder of target images."""
    tree = tmp_path_factory.mktemp("office")
    office31(tree)
    of_office = ["office31", "--data-root", str(tree), "--source", "A", "--target", "W", "--workers", "1", *SMALL]
    return {
        "digits": (["digits", "--data-root", str(few_digits), *STEPS], few_digits / "optdigits"),
        "office31": ([*of_office, *STEPS], tree / "webcam" / "images"),
    }


@pytest.mark.parametrize("task", ["digits", "office31"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_from_its_first_step_to_its_use(
    name: str, task: str, tasks: dict[str, tuple[list[str], Path]], tmp_path: Path
) -> None:
    arguments, images = tasks[task]
    arguments = [*arguments, "--method", name, *(("--dim", "8") if name == "gfk" else ())]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "moments"
    assert run(Order(arguments, str(whole), log=str(log))) == 0
    # In the middle between two evaluations; of a method that is fitted in one step, after the fit.
    moments = log.read_text().splitlines()
    last = max(number for number, moment in enumerate(moments) if moment.startswith("step"))
    at = last if METHODS[name].method.fits else moments.index("step 6")
    assert run(Order(arguments, str(parts), kill_at=at + 1)) == -signal.SIGKILL
    assert run(Order(arguments, str(parts))) == 0
    assert differences(outcome(parts), outcome(whole)) == []

    result = RunFolder(parts).read_result()
    assert result is not None
    _, evaluation, _ = evaluate(EvaluateSettings(parts, device="cpu"))
    assert evaluation.accuracy == result.accuracy.last
    trained = load_trained(parts)
    rows = [probabilities for _, probabilities in predict(trained, open_images(images, trained.classes))]
    assert len(rows) == sum(1 for file in images.glob("*/*") if file.is_file())
    assert torch.stack(rows).isfinite().all()
    export(ExportSettings(parts))
    assert {"model.safetensors", "model.pt2"} <= {file.name for file in (parts / "export").iterdir()}

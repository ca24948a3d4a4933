import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricated_runs import fabricated_run
from rich.console import Console
from table_cells import squeezed

from gsda_fast import suite as command
from gsda_fast import suite_runs
from gsda_fast.commands import run_command
from gsda_fast.config import Config, parse_config, preset
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import TrainingError, UsageError
from gsda_fast.methods import METHODS
from gsda_fast.report import suite_layout
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.results.suite_folder import SuiteFolder
from gsda_fast.suite_options import ABLATION, SuiteSettings
from gsda_fast.suite_runs import run_suite, sweep_variants, visible_gpus
from gsda_fast.train import train
from gsda_fast.training.checkpoint import CheckpointFolder

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")


def base(few_digits: Path, *options: str) -> dict[str, Config]:
    """The settings of a short run of each method of these tests."""
    steps = ("--steps", "4", "--warmup", "2", "--batch-size", "8")
    arguments = ["digits", "--data-root", str(few_digits), *steps]
    return {
        method: parse_config([*arguments, "--method", method, *(options if method == "gsda" else ())], "suite")
        for method in ("source-only", "dann", "gsda")
    }


def presets(task: str, methods: Sequence[str]) -> dict[str, Config]:
    return {method: preset(task, method) for method in methods}


def in_this_process(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError]:
    return [train(config, Console(quiet=True)) for config in configs]


TWO_METHODS = SuiteSettings("digits", methods=("source-only", "gsda"), seeds=(3,), tasks=("F->O",), jobs=1)
RUNS = ("digits-fonts-optdigits-source-only-seed3", "digits-fonts-optdigits-gsda-seed3")


def with_output(settings: SuiteSettings, output: Path, **changes: Any) -> SuiteSettings:
    return SuiteSettings(**{**vars(settings), "output": output, **changes})


def test_a_suite_trains_each_run_and_writes_tables_and_goes_on(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, output = io.StringIO(), tmp_path / "suite"
    folder = run_suite(with_output(TWO_METHODS, output), {"": base(few_digits)}, Console(file=told, width=200))
    assert folder == output
    assert {path.name for path in output.iterdir()} == {
        *RUNS,
        *(f"{name}.{suffix}" for name in ("table", "scores") for suffix in ("md", "csv", "json")),
    }
    results = [RunFolder(output / name).read_result() for name in RUNS]
    accuracy = {result.method: result.accuracy.last for result in results if result is not None}
    assert set(accuracy) == {"source-only", "gsda"}
    assert all(result is not None and (result.seed, result.steps) == (3, 4) for result in results)
    # The command that was given, and not the one that started the run's process.
    commands = {RunFolder(output / name).read_environment()["command_line"] for name in RUNS}
    assert commands == {shlex.join(sys.orig_argv)}

    json.loads((output / "table.json").read_text())
    csv_text, markdown = (output / "table.csv").read_text(), (output / "table.md").read_text()
    assert len(list(csv.reader(io.StringIO(csv_text)))) > 2
    for method, value in accuracy.items():
        assert value is not None
        assert any(method in line and f"{value:.1f}" in line for line in markdown.splitlines())
        assert any(method in line and f"{value:.1f}" in line for line in told.getvalue().splitlines())

    # With a third method, what has finished is not trained again.
    finished = {name: (output / name / "result.json").read_bytes() for name in RUNS}
    monkeypatch.setattr(suite_runs, "_run_all", in_this_process)
    wider = with_output(TWO_METHODS, output, methods=("source-only", "dann", "gsda"))
    run_suite(wider, {"": base(few_digits)}, Console(file=io.StringIO()))
    assert {name: (output / name / "result.json").read_bytes() for name in RUNS} == finished
    assert "dann" in (output / "table.md").read_text()


def test_a_mistake_that_a_run_finds_comes_out_of_its_process(few_digits: Path, tmp_path: Path) -> None:
    config = base(few_digits, "--groups", "11")
    only_gsda = with_output(TWO_METHODS, tmp_path / "suite", methods=("gsda",))
    with pytest.raises(UsageError, match="--groups: found 11; expected 1 to 10"):
        run_suite(only_gsda, {"": config}, Console(file=io.StringIO()))
    assert not (tmp_path / "suite").exists()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The runs that a suite would have started."""
    seen: list[Config] = []

    def keep(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError]:
        seen.extend(configs)
        return []

    monkeypatch.setattr(suite_runs, "_run_all", keep)
    monkeypatch.setattr(suite_runs, "_write_tables", lambda *_: None)
    return seen


def test_a_suite_is_every_task_method_and_seed(planned: list[Config]) -> None:
    configs = presets("digits", SuiteSettings("digits").chosen_methods)
    run_suite(SuiteSettings("digits"), {"": configs}, Console(file=io.StringIO()))
    assert len(planned) == 6 * 7 * 3
    assert len({config.run.output for config in planned}) == len(planned)
    first = planned[0]
    assert (first.data.source, first.data.target, first.run.method, first.run.seed) == (
        "mnist",
        "optdigits",
        "source-only",
        0,
    )
    assert first.run.output == Path("runs/suite-digits/digits-mnist-optdigits-source-only-seed0")
    assert {config.run.method: config.method for config in planned} == {m: c.method for m, c in configs.items()}


@pytest.mark.parametrize(
    ("count", "allowed", "expected"),
    [
        (0, None, []),
        (0, "", []),
        (2, None, ["0", "1"]),
        (2, "3,5", ["3", "5"]),
        (1, "GPU-8f3a, 5", ["GPU-8f3a"]),  # as CUDA does, no further than the first that is not there
    ],
)
def test_workers_take_the_gpus_that_the_suite_was_given(
    count: int, allowed: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert visible_gpus() == expected


def test_transfer_tasks_of_ones_own_folders(planned: list[Config]) -> None:
    settings = SuiteSettings("folder", methods=("gsda",), seeds=(0,), tasks=("photos -> sketches",))
    run_suite(settings, {"": presets("folder", settings.chosen_methods)}, Console(file=io.StringIO()))
    assert [(config.data.source, config.data.target) for config in planned] == [("photos", "sketches")]


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["digit"], ["TASK", "'digit'"]),
        (["digits", "--tasks", "F-O"], ["--tasks", "'F-O'", "SOURCE->TARGET"]),
        (["digits", "--tasks", "F->usps"], ["usps", "optdigits"]),
        (["digits", "--tasks", "F->O", "fonts->optdigits"], ["--tasks", "twice"]),
        (["digits", "--methods", "gsda", "gdsa"], ["--method", "'gdsa'"]),
        (["digits", "--methods", "gsda", "gsda"], ["--methods", "twice"]),
        (["digits", "--methods"], ["--methods"]),
        (["digits", "--seeds", "-1"], ["--seed", "found -1"]),
        (["digits", "--seeds"], ["--seeds"]),
        (["digits", "--jobs", "-1"], ["--jobs", "found -1"]),
        (["digits", "--slurm", "gpu", "--gpus", "0"], ["--gpus", "found 0"]),
        (["digits", "--steps", "0"], ["--steps", "found 0"]),
        (["digits", "--stesp", "5"], ["--stesp"]),
        (["digits", "--method", "gsda"], ["--method", "--methods"]),
        (["digits", "--seed=5"], ["--seed", "--seeds"]),
        (["digits", "--target", "mnist"], ["--target", "--tasks"]),
        (["folder"], ["--tasks", "SOURCE->TARGET"]),
        (["digits", "--ablation", "--methods", "gsda"], ["--ablation", "--methods"]),
        (["digits", "--paired", "--methods", "gsda"], ["--paired", "one method"]),
        (["digits", "--sweep", "alpha"], ["--sweep", "'alpha'", "NAME=VALUE"]),
        (["digits", "--sweep", "alpha="], ["--sweep", "'alpha='", "NAME=VALUE"]),
        (["digits", "--sweep", "alpha=1,,2"], ["--sweep", "'alpha=1,,2'"]),
        (["digits", "--sweep", "alpha=1,beta"], ["--alpha", "beta"]),
        (["digits", "--sweep", "alpha=1,1"], ["--sweep", "alpha=1 twice"]),
        (["digits", "--sweep", "alpha=0.1,0.10"], ["--sweep", "alpha=0.10 twice"]),
        (["digits", "--sweep", "alpha=1", "alpha=2"], ["--sweep", "alpha twice"]),
        (["digits", "--sweep", "seed=1,2"], ["--sweep", "seed", "--seeds"]),
        (["digits", "--sweep", "method=gsda,dann"], ["--sweep", "method", "--methods"]),
        (["digits", "--sweep", "output=a,b"], ["--sweep", "output"]),
        (["digits", "--sweep", "alhpa=1,2"], ["--alhpa"]),
        (["digits", "--sweep", "groups=0,-1"], ["--groups", "found -1"]),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    arguments: list[str],
    mentioned: list[str],
    tmp_path: Path,
    planned: list[Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", *arguments, "--output", str(tmp_path / "suite")])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    written = capsys.readouterr()
    assert end.value.code == 2
    assert written.out == ""
    assert "Traceback" not in written.err
    for part in mentioned:
        assert part in written.err
    assert planned == []
    assert list(tmp_path.iterdir()) == []


def test_the_ablation_is_table_1_and_what_it_starts_from() -> None:
    assert SuiteSettings("office31", ablation=True).chosen_methods == ABLATION
    assert ABLATION == ("source-only", "entropy", "glb", "glb-cls", "glb-cls-grp", "gsda")
    assert SuiteSettings("office31", paired=True).chosen_methods == ABLATION
    assert SuiteSettings("office31", sweep=("alpha=1,2",)).chosen_methods == ("gsda",)
    # Pairs of settings, then, and not of methods.
    assert SuiteSettings("office31", sweep=("alpha=1,2",), paired=True).chosen_methods == ("gsda",)
    assert SuiteSettings("office31", sweep=("alpha=1,2",), ablation=True).chosen_methods == ABLATION
    assert SuiteSettings("office31", sweep=("alpha=1,2",), methods=("dann",)).chosen_methods == ("dann",)
    assert len(SuiteSettings("office31").chosen_methods) == 7


# ------------------------------------------------------------------------------------------------------------ sweep


def test_a_sweep_is_every_combination() -> None:
    variants = sweep_variants(("alpha=0.02,0.1", "beta=0,1,10"), ["digits", "--steps", "400"], ("gsda",))
    assert list(variants) == [f"alpha={alpha},beta={beta}" for alpha in ("0.02", "0.1") for beta in ("0", "1", "10")]
    default = preset("digits", "gsda")
    for name, configs in variants.items():
        alpha, beta = (float(part.partition("=")[2]) for part in name.split(","))
        method: Any = replace(default.method, **{"alpha": alpha, "beta": beta})
        assert configs == {"gsda": replace(default, run=replace(default.run, steps=400), method=method)}


def test_an_option_goes_to_the_methods_that_have_it() -> None:
    arguments = ["digits", "--beta", "3", "--no-sync-ramp", "--hidden-dim", "64", "--steps", "400"]
    (configs,) = sweep_variants((), arguments, ("source-only", "dann", "gsda")).values()
    assert configs["source-only"] == replace(preset("digits", "source-only"), run=configs["source-only"].run)
    assert vars(configs["dann"].method)["hidden_dim"] == 64
    assert vars(configs["gsda"].method) | {"beta": 3.0, "sync_ramp": False} == vars(configs["gsda"].method)
    assert {config.run.steps for config in configs.values()} == {400}
    with pytest.raises(SystemExit):
        sweep_variants((), ["digits", "--beta", "3"], ("source-only", "dann"))


def test_all_and_baselines_stand_for_methods() -> None:
    assert SuiteSettings("digits", methods=("all",)).chosen_methods == tuple(METHODS)
    baselines = SuiteSettings("digits", methods=("baselines",)).chosen_methods
    assert {"source-only", "dann", "cdan", "tca"} <= set(baselines)
    assert not {"gsda", "glb", "entropy"} & set(baselines)
    assert SuiteSettings("digits", methods=("group",)).chosen_methods == ("glb-cls-grp",)
    with pytest.raises(UsageError, match="--methods: found all gsda; expected names, or all or baselines alone"):
        SuiteSettings("digits", methods=("all", "gsda"))


def test_the_weight_of_a_term_is_swept_beside_the_other_terms() -> None:
    variants = sweep_variants(("mcc=0,0.5", "alpha=0.1"), ["digits", "--add", "mcc=2", "bsp=1"], ("gsda", "mcc"))
    added = {name: {method: config.adaptation.add for method, config in of.items()} for name, of in variants.items()}
    assert added == {
        "mcc=0,alpha=0.1": {"gsda": {"bsp": 1.0}, "mcc": {"bsp": 1.0}},
        "mcc=0.5,alpha=0.1": {"gsda": {"mcc": 0.5, "bsp": 1.0}, "mcc": {"mcc": 0.5, "bsp": 1.0}},
    }
    with pytest.raises(UsageError, match="found mcc=much; expected a weight"):
        sweep_variants(("mcc=much",), ["digits"], ("gsda",))


def test_a_sweep_can_be_written_as_one_word() -> None:
    assert sweep_variants(("alpha=0.02,0.1,beta=0,1,groups=2",), ["digits"], ("gsda",)) == sweep_variants(
        ("alpha=0.02,0.1", "beta=0,1", "groups=2"), ["digits"], ("gsda",)
    )


def test_no_sweep_is_one_nameless_setting() -> None:
    assert sweep_variants((), ["digits"], ("gsda",)) == {"": {"gsda": preset("digits", "gsda")}}


def test_settings_of_a_sweep_have_folders_of_their_own_whatever_their_values(planned: list[Config]) -> None:
    variants = sweep_variants(("weights=/data/a.pth,/data/b.pth",), ["office31"], ("gsda",))
    assert list(variants) == ["weights=_data_a.pth", "weights=_data_b.pth"]
    assert [configs["gsda"].model.weights for configs in variants.values()] == ["/data/a.pth", "/data/b.pth"]
    settings = SuiteSettings("office31", seeds=(0,), tasks=("A->W",), sweep=("weights",), output=Path("suite"))
    run_suite(settings, variants, Console(file=io.StringIO()))
    assert [config.run.output for config in planned] == [
        Path("suite") / name / "office31-amazon-webcam-gsda-seed0" for name in variants
    ]
    # One option has one folder, with a hyphen or an underscore.
    assert list(sweep_variants(("learning_rate=0.1",), ["digits"], ("gsda",))) == ["learning-rate=0.1"]


def test_a_sweep_trains_each_setting_and_draws_it(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_runs, "_run_all", in_this_process)
    monkeypatch.setattr(sys, "argv", [
        "suite", "digits", "--sweep", "beta=0,10", "--seeds", "0", "--tasks", "F->O", "--output", str(tmp_path),
        "--data-root", str(few_digits), "--steps", "4", "--warmup", "1", "--batch-size", "8", "--paired", "--report",
    ])  # fmt: skip
    command.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "beta=0", "beta=10", "sweep.md", "sweep.csv", "sweep.json", "sweep_gsda.png", "report.html",
        "paired.md", "paired.csv", "paired.json", "scores.md", "scores.csv", "scores.json",
    }  # fmt: skip
    for beta in (0.0, 10.0):
        of_setting = tmp_path / f"beta={beta:.0f}"
        run = RunFolder(of_setting / "digits-fonts-optdigits-gsda-seed0")
        result = run.read_result()
        assert run.setting("beta") == beta
        assert result is not None
        assert f"| beta={beta:.0f} | {result.accuracy.last:.1f} |" in squeezed((tmp_path / "sweep.md").read_text())
        written = {path.name for path in of_setting.iterdir() if path.suffix != ".png"} - {run.path.name}
        # One method has no differences.
        assert written == {
            "table.md",
            "table.csv",
            "table.json",
            "scores.md",
            "scores.csv",
            "scores.json",
            "report.html",
        }


# ----------------------------------------------------------------------------------------------------------- paired


SHARED_WARMUP = ("source-only", "entropy", "dann", "glb", "glb-cls", "glb-cls-grp", "gsda")


def test_methods_share_the_warm_up_bit_by_bit(few_digits: Path, tmp_path: Path) -> None:
    """What paired differences rest on: one transfer task and seed, other methods, the same model when warm-up ends."""
    steps = ("--steps", "8", "--warmup", "4", "--log-every", "1", "--batch-size", "8", "--data-root", str(few_digits))
    losses, features = {}, {}
    for seed in ("0", "1"):
        for method in SHARED_WARMUP if seed == "0" else ("gsda",):
            folder = RunFolder(tmp_path / f"{method}-{seed}")
            arguments = ["digits", *steps, "--method", method, "--seed", seed, "--output", str(folder.path)]
            train(parse_config(arguments, "train"), Console(quiet=True))
            losses[method, seed] = [line["classification"] for line in folder.read_metrics()]
            features[method, seed] = folder.read_features()
    gsda = features["gsda", "0"]
    for method in SHARED_WARMUP:
        assert losses[method, "0"][:4] == losses["gsda", "0"][:4]
        np.testing.assert_array_equal(features[method, "0"].source_warmup, gsda.source_warmup)
        np.testing.assert_array_equal(features[method, "0"].target_warmup, gsda.target_warmup)
    # Adaptation tells them apart, as does another seed.
    assert not np.array_equal(features["entropy", "0"].target_final, gsda.target_final)
    assert losses["gsda", "1"][:4] != losses["gsda", "0"][:4]


def test_paired_differences_are_written_beside_the_tables(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_runs, "_run_all", in_this_process)
    told = io.StringIO()
    settings = with_output(TWO_METHODS, tmp_path / "suite", paired=True)
    run_suite(settings, {"": base(few_digits)}, Console(file=told, width=200))
    first, last = (RunFolder(tmp_path / "suite" / name).read_result() for name in RUNS)
    assert first is not None
    assert last is not None
    difference = (last.accuracy.last or 0) - (first.accuracy.last or 0)
    line = f"| gsda - source-only | {difference:+.1f} (1) | {difference:+.1f} (1) |"
    assert line in squeezed((tmp_path / "suite" / "paired.md").read_text())
    assert {"paired.md", "paired.csv", "paired.json"} <= {path.name for path in (tmp_path / "suite").iterdir()}
    assert "paired differences" in told.getvalue()


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_run_that_fails_leaves_the_others_alone(
    few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gsda, which comes first, diverges at that weight; source-only has no adversarial loss."""
    output = tmp_path / "suite"
    monkeypatch.setattr(sys, "argv", [
        "suite", "digits", "--methods", "gsda", "source-only", "--seeds", "0", "--tasks", "F->O", "--jobs", "1",
        "--output", str(output), "--data-root", str(few_digits), "--steps", "30", "--warmup", "1", "--batch-size", "8",
        "--adversarial-weight", "1e38",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    assert end.value.code == 1
    written = capsys.readouterr()
    (line,) = written.err.splitlines()
    failed = RunFolder(output / "digits-fonts-optdigits-gsda-seed0")
    assert line.startswith(f"error: 1 of 2 runs failed and are in no table; the first: {failed.path}: ")
    assert not failed.finished
    result = RunFolder(output / "digits-fonts-optdigits-source-only-seed0").read_result()
    assert result is not None
    table = squeezed((output / "table.md").read_text())
    assert f"| source-only | {result.accuracy.last:.1f} |" in table
    assert "| gsda | - |" in table


# ------------------------------------------------------------------------------------------------ several machines


def held_run(output: Path) -> RunFolder:
    """The first run of TWO_METHODS, as another process holds it."""
    folder = RunFolder(output / RUNS[0])
    folder.prepare()
    folder.hold()
    return folder


def test_a_run_that_another_process_holds_is_left_to_it(few_digits: Path, tmp_path: Path) -> None:
    told, output = io.StringIO(), tmp_path / "suite"
    folder, settings = held_run(output), with_output(TWO_METHODS, output)
    run_suite(settings, {"": base(few_digits)}, Console(file=told, width=200))
    assert "1 runs are at work in other processes; the last one to end writes the tables" in told.getvalue()
    assert not folder.finished
    assert RunFolder(output / RUNS[1]).finished
    assert not (output / "table.md").exists()
    folder.release()
    run_suite(settings, {"": base(few_digits)}, Console(file=io.StringIO()))
    assert folder.finished
    assert (output / "table.md").is_file()


def test_a_run_that_another_process_gave_up_is_picked_up(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "suite"
    folder, is_elsewhere = held_run(output), suite_runs._is_elsewhere

    def given_up(config: Config) -> bool:
        assert is_elsewhere(config)
        folder.release()
        return is_elsewhere(config)

    monkeypatch.setattr(suite_runs, "_is_elsewhere", given_up)
    run_suite(with_output(TWO_METHODS, output), {"": base(few_digits)}, Console(file=io.StringIO()))
    assert folder.finished
    assert (output / "table.md").is_file()


def test_a_worker_says_a_warning_in_a_line(few_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(few_digits, tmp_path / "data")
    (data / "fonts" / "0" / "photo.heic").write_bytes(b"picture")
    settings = with_output(TWO_METHODS, tmp_path / "suite", methods=("source-only",))
    run_suite(settings, {"": base(data)}, Console(file=io.StringIO()))
    lines = [line for line in capfd.readouterr().err.splitlines() if "heic" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: domain fonts: ")


def test_jobs_share_the_runs_of_a_suite(few_digits: Path, tmp_path: Path) -> None:
    """Two at once, by submitit's local executor: each run is trained by one of them, and the tables are written."""
    pytest.importorskip("submitit")
    from gsda_fast.slurm import submit

    output = tmp_path / "suite"
    arguments = [
        "digits", "--methods", "source-only", "gsda", "--seeds", "3", "4", "--tasks", "F->O", "--jobs", "1",
        "--data-root", str(few_digits), "--steps", "4", "--warmup", "2", "--batch-size", "8",
        "--output", str(output), "--slurm", "a partition", "--gpus", "2", "--hours", "1",
    ]  # fmt: skip
    jobs, logs = submit(*suite_runs.parse_suite(arguments), arguments, cluster="local")
    assert len(jobs) == 2
    for job in jobs:
        job.result()
    written = [job.stdout() for job in jobs]
    assert logs == output / "slurm"
    finished = RunFolder(output / "digits-fonts-optdigits-gsda-seed4")
    assert finished.finished
    assert finished.read_environment()["command_line"] == shlex.join(sys.orig_argv)
    assert (output / "table.md").is_file()
    assert all("4 runs: 1 transfer task x 2 methods x 2 seeds" in text for text in written)


def test_slurm_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from gsda_fast.slurm import submit

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match="--slurm: found no submitit"):
        submit(SuiteSettings("digits", slurm="gpu"), {}, ["digits"])


def test_a_mistake_is_told_before_anything_is_submitted(few_digits: Path, tmp_path: Path) -> None:
    from gsda_fast.slurm import submit

    arguments = ["digits", "--tasks", "F->X", "--data-root", str(few_digits), "--output", str(tmp_path / "suite")]
    with pytest.raises(UsageError, match="found 'X'; expected a domain of digits"):
        submit(*suite_runs.parse_suite([*arguments, "--slurm", "gpu"]), arguments, cluster="local")
    assert not (tmp_path / "suite").exists()


def test_a_suite_without_labels_shows_scores_in_place_of_accuracies(tmp_path: Path) -> None:
    runs = [fabricated_run(tmp_path, method, accuracy=None, features=True) for method in ("dann", "gsda")]
    results = [result for run in runs if (result := run.read_result()) is not None]
    layout = replace(suite_layout(BENCHMARKS["digits"]), methods=("dann", "gsda"), transfer_tasks=(("mnist", "fonts"),))
    told = Console(file=io.StringIO(), width=200, record=True)
    suite_runs._write_tables(SuiteFolder(tmp_path), results, runs, layout, paired=False, console=told)
    text = told.export_text()
    assert "label-free scores after the last step" in text
    assert "overall accuracy" not in text
    assert (tmp_path / "table.md").is_file()


def test_how_long_the_runs_will_take() -> None:
    expected = suite_runs.Expectation(["dann", "gsda", "dann", "gsda", "mcc"], workers=2)
    assert expected.line() == ""
    assert expected.add(0, 600.0)
    assert not expected.add(0, 600.0)
    assert expected.line() == "about 20 min 0 s left for 4 of 5 runs"
    assert not expected.add(1, 1200.0)
    assert expected.add(4, 1200.0)  # of each method one
    assert expected.line() == "about 15 min 0 s left for 2 of 5 runs"
    expected.add(2, 1.0)
    expected.add(3, 1.0)
    assert expected.line() == ""


def end_the_process(config: Config) -> RunResult:
    os._exit(9)


def test_a_killed_process_is_one_line(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_runs, "_run_one", end_the_process)
    with pytest.raises(TrainingError, match=r"the process of a run was killed .* after 0 of 2 runs; the same command"):
        run_suite(with_output(TWO_METHODS, tmp_path / "suite"), {"": base(few_digits)}, Console(file=io.StringIO()))


def test_every_run_of_a_worker_is_compiled(few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    def train_compiled(config: Config, console: Console) -> None:
        layer = torch.nn.Linear(config.run.seed + 1, 1)
        layer.compile(dynamic=False, backend=count)
        layer(torch.zeros(1, config.run.seed + 1))

    monkeypatch.setattr(suite_runs, "train", train_compiled)
    config = base(few_digits)["gsda"]
    runs = torch._dynamo.config.recompile_limit + 2
    for seed in range(runs):
        suite_runs._run_one(replace(config, run=replace(config.run, seed=seed)))
    assert len(compiled) == runs


# ------------------------------------------------------------------------------------------------------ interruption


def figures(folder: Path) -> dict[str, Any]:
    """What the suite's runs found: everything in result.json but times."""
    stored = {name: json.loads((folder / name / "result.json").read_text()) for name in RUNS}
    return {
        name: {key: value for key, value in result.items() if key not in ("seconds", "images_per_second")}
        for name, result in stored.items()
    }


def whole_group_ends(group: int, within: float = 600) -> bool:
    """Whether no process of that group is left."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def uninterrupted(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """The arguments of a suite of two runs, and what it finds when nothing comes between."""
    arguments = [
        "digits", "--methods", "source-only", "gsda", "--seeds", "3", "--tasks", "F->O", "--jobs", "1",
        "--data-root", str(few_digits), "--steps", "200", "--warmup", "50", "--batch-size", "8", "--log-every", "5",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("suites") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_runs, "_run_all", in_this_process)
        patch.setattr(sys, "argv", ["suite", *arguments, "--output", str(folder)])
        command.main()
    return arguments, figures(folder)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_suite_goes_on_as_if_it_had_not_been(
    by: signal.Signals,
    uninterrupted: tuple[list[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, which reaches every process of the terminal, or a signal to the suite alone, in the middle of a run."""
    arguments, expected = uninterrupted
    output = tmp_path / "suite"
    arguments = [*arguments, "--output", str(output)]
    first, second = (RunFolder(output / name) for name in RUNS)
    suite = subprocess.Popen(
        [sys.executable, "-m", "gsda_fast.suite", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # of the few digits
        # In the background of a shell, where these tests may run, Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while not (second.metrics_path.is_file() and second.read_metrics()):
            assert suite.poll() is None, suite.communicate()
            time.sleep(0.02)
        if by == signal.SIGINT:
            os.killpg(suite.pid, by)
        else:
            suite.send_signal(by)
        _, told = suite.communicate(timeout=600)
        # Left alone, a worker would train to its run's end, in a folder that the next start gives to another one.
        assert whole_group_ends(suite.pid)
    finally:
        if not whole_group_ends(suite.pid, within=0.1):
            os.killpg(suite.pid, signal.SIGKILL)
    if by != signal.SIGKILL:
        assert suite.returncode == 130
        assert told == "interrupted: 1 of 2 runs have finished; the same command goes on with the others\n"
        # Asked to stop, the run has kept what it did, long before the first scoring.
        assert CheckpointFolder(second.checkpoints).steps()
    assert first.finished
    assert not second.finished
    kept = first.result_path.read_bytes()

    monkeypatch.setattr(suite_runs, "_run_all", in_this_process)
    monkeypatch.setattr(sys, "argv", ["suite", *arguments])
    command.main()
    assert first.result_path.read_bytes() == kept
    assert figures(output) == expected
    assert (output / "table.md").is_file()

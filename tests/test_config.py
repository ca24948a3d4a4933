import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsda_fast.config import TASKS, Config, config_from_dict, configure, method_options, parse_config, preset
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS
from gsda_fast.results.run_folder import RunFolder

# The option surface is public. A change to this list is a change for users: an option that goes or is renamed breaks
# their commands and their config.toml; a new one belongs into the README as well.
OPTIONS = """
--method NAME
--recipe {common,paper}
--steps INT
--warmup INT
--batch-size INT
--seed INT
--log-every INT
--device {auto,cpu,cuda}
--threads INT
--profile INT
--checkpoint-seconds INT
--output PATH
--resume auto|never|PATH
--weights-alone, --no-weights-alone
--source STR
--target STR
--data-root PATH
--quarantine PATH
--verify, --no-verify
--orientation {exif,stored}
--loader {auto,dali,torch}
--workers INT
--cache-on-device, --no-cache-on-device
--crop INT
--test-crops {1,10}
--synthetic, --no-synthetic
--backbone STR
--weights STR
--feature-norm {none,rms}
--input-dim INT
--hidden INT
--bottleneck-dim INT
--bottleneck-norm {none,batch}
--bottleneck-activation {none,relu}
--bottleneck-dropout FLOAT
--adversarial-weight FLOAT
--update {alternating,reversal}
--hidden-dim INT
--min-weight FLOAT
--backend STR
--alpha FLOAT
--beta FLOAT
--groups INT
--sync-ramp, --no-sync-ramp
--add [NAME=WEIGHT ...]
--class-weights {none,pada}
--batchnorm {auto,joint,apart}
--confidence-threshold FLOAT
--refresh-every INT
--balance-target, --no-balance-target
--optimizer {auto,sgd,adam,apex}
--learning-rate FLOAT
--backbone-learning-rate FLOAT
--decay {inverse,constant,cosine}
--momentum FLOAT
--backbone-momentum, --no-backbone-momentum
--weight-decay FLOAT
--precision {auto,fp32,tf32,bf16,fp16}
--compile {auto,on,off}
--cuda-graphs, --no-cuda-graphs
--scale-learning-rate, --no-scale-learning-rate
--sync-batchnorm, --no-sync-batchnorm
--divide-discriminators {auto,on,off}
--timeout INT
"""

# alpha, beta, groups (0: one for five classes), balance_target. The first four are the paper's.
HYPERPARAMETERS = {
    "visda": (0.2, 10.0, 4, True),
    "office31": (0.02, 1.0, 6, True),
    "office31-partial": (0.2, 10.0, 6, False),
    "office-home": (0.02, 1.0, 13, True),
    "office-home-partial": (0.02, 1.0, 0, False),
    "folder": (0.02, 1.0, 0, True),
    "pictures": (0.1, 1.0, 3, True),
    "pictures-features": (0.1, 1.0, 3, True),
    "features": (0.1, 1.0, 0, True),
    "digits": (0.1, 1.0, 3, True),
    "digits-partial": (0.1, 1.0, 3, False),
}


def parse(*arguments: str) -> Config:
    return parse_config(list(arguments), "train")


@pytest.mark.parametrize("task", TASKS)
def test_the_options_are_frozen(task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # the help is in one column then
    with pytest.raises(SystemExit) as end:
        parse(task, "--help")
    assert end.value.code == 0
    written = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    found = re.findall(r"^. (--[a-z].*?)(?:  .*)?\s*.$", written, flags=re.MULTILINE)
    assert "\n".join(found) == OPTIONS.strip()


# ------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("task", TASKS)
def test_presets_hold_the_papers_settings(task: str) -> None:
    config = parse(task)
    alpha, beta, groups, balanced = HYPERPARAMETERS[task]
    assert config.task == task
    assert config == preset(task)
    assert (config.method.alpha, config.method.beta, config.method.groups) == (alpha, beta, groups)
    assert config.pseudo_labels.balance_target == balanced
    assert config.pseudo_labels.confidence_threshold == 0.8
    assert config.run.method == "gsda"
    assert config.method.update == "alternating"
    assert config.method.sync_ramp
    if task.startswith(("visda", "office", "folder")):
        assert (config.model.backbone, config.model.weights, config.model.bottleneck_dim) == (
            "resnet50",
            "IMAGENET1K_V1",
            256,
        )
        assert config.method.hidden_dim == 1024
        assert (config.optimizer.backbone_learning_rate, config.optimizer.learning_rate) == (1e-3, 1e-2)
        assert config.run.warmup == 0


@pytest.mark.parametrize("task", TASKS)
def test_help_prints_the_preset(task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(task, "--help")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    blocks: list[str] = []
    for line in lines:
        text = line.strip("│ ")
        if re.match(r". --[a-z]", line):
            blocks.append(text)
        elif blocks:
            blocks[-1] += f" {text}"
    settings = {
        name: value
        for table in preset(task).to_dict().values()
        if isinstance(table, dict)
        for name, value in table.items()
    }
    for name, value in settings.items():
        option = name.replace("_", "-")
        (block,) = (block for block in blocks if re.match(rf"--{option}[ ,]", block))
        if value is None:
            assert "default" not in block
        else:
            assert f"(default: {'none' if value == {} else value})" in block


def test_every_benchmark_has_a_preset() -> None:
    assert set(TASKS) == set(BENCHMARKS) == set(HYPERPARAMETERS)


def test_the_digits_are_those_of_the_published_figures() -> None:
    config = preset("digits")
    assert (config.run.steps, config.run.warmup, config.run.batch_size) == (800, 300, 64)
    assert (config.model.backbone, config.model.bottleneck_dim, config.method.hidden_dim) == ("lenet", 128, 32)
    assert (config.optimizer.learning_rate, config.optimizer.backbone_learning_rate) == (0.05, 0.05)
    assert config.pseudo_labels.refresh_every == 50
    partial = preset("digits-partial")
    # Balancing would revive the classes that the target lacks; all else is the same.
    assert replace(partial, task="digits", pseudo_labels=config.pseudo_labels) == config
    assert replace(partial.pseudo_labels, balance_target=True) == config.pseudo_labels


def test_settings_go_back_to_those_of_the_preset() -> None:
    config = parse("digits", "--steps", "500", "--beta", "2", "--target", "mnist")
    back = config.with_defaults(["run.steps", "data.target", "run.warmup"])
    assert back == parse("digits", "--beta", "2")


def test_options_change_their_settings_alone() -> None:
    config = parse("digits", "--steps", "500", "--no-sync-ramp", "--target", "mnist", "--output", "here")
    expected = preset("digits")
    assert config == replace(
        expected,
        run=replace(expected.run, steps=500, output=Path("here")),
        method=replace(expected.method, sync_ramp=False),
        data=replace(expected.data, target="mnist"),
    )


# ------------------------------------------------------------------------------------------------ files and back


def unusual(task: str) -> Config:
    config = preset(task)
    return replace(
        config,
        run=replace(config.run, output=Path("a folder/ünd"), seed=2**63 - 1, resume="never", device="cpu"),
        data=replace(
            config.data, data_root=Path("/data"), source='a "quoted" name', cache_on_device=True, test_crops=10
        ),
        method=replace(config.method, beta=3.0, alpha=1e-30, sync_ramp=False, update="reversal"),
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_stored_configuration_comes_back_equal(task: str, tmp_path: Path) -> None:
    for config in (preset(task), unusual(task)):
        folder = RunFolder(tmp_path)
        folder.write_config(config.to_dict())
        assert config_from_dict(folder.read_config(), "config.toml") == config
        assert parse("--config", str(folder.config_path)) == config


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def test_what_a_file_leaves_out_is_the_presets(tmp_path: Path) -> None:
    file = write(tmp_path, 'task = "visda"\n[method]\nbeta = 2\n')
    default = preset("visda")
    expected = replace(default, method=replace(default.method, beta=2.0))
    found = parse("--config", file)
    assert found == expected
    assert type(found.method.beta) is float  # `beta = 2` is the same run as `beta = 2.0`
    assert parse("--config", file, "--beta", "4").method.beta == 4


def test_a_run_that_is_older_than_orientation_used_pixels_as_stored(tmp_path: Path) -> None:
    for task, expected in {
        "folder": "stored",
        "visda": "stored",
        "digits": "exif",
        "pictures-features": "exif",
    }.items():
        tables = preset(task).to_dict()
        del tables["data"]["orientation"]
        folder = RunFolder(tmp_path)
        folder.write_config(tables)
        assert parse("--config", str(folder.config_path)).data.orientation == expected
        assert preset(task).data.orientation == "exif"
    by_hand = write(tmp_path, 'task = "folder"\n[data]\ndata_root = "here"\n')
    assert parse("--config", by_hand).data.orientation == "exif"


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("", "task = None", "one of digits"),
        ('task = "nope"', "task = 'nope'", "one of digits"),
        ('task = ["digits"]', "task = ['digits']", "one of digits"),
        ('task = "digits"\nsteps = 5', "the entry 'steps'", "task or a table among run"),
        ('task = "digits"\nrun = 5', "the entry 'run'", "task or a table among"),
        ('task = "digits"\n[runs]\nsteps = 5', "the entry 'runs'", "task or a table among"),
        ('task = "digits"\n[run]\nstep = 5', "unknown setting 'step' in [run]", "method, recipe, steps"),
        ('task = "digits"\n[run]\nsteps = "x"', "steps = 'x'", "int"),
        ('task = "digits"\n[run]\nsteps = 5.0', "steps = 5.0", "int"),
        ('task = "digits"\n[run]\nsteps = true', "steps = True", "int"),
        ('task = "digits"\n[run]\ndevice = "tpu"', "device = 'tpu'", "Invalid enum value"),
        ('task = "digits"\n[run]\noutput = 3', "output = 3", "Path"),
        ('task = "digits"\n[run]\nmethod = 3', "method = '3'", "source-only"),
        ('task = "digits"\n[data]\nsource = ["mnist"]', "source = ['mnist']", "str"),
        ('task = "digits"\n[method]\nbeta = "1"', "beta = '1'", "float"),
        ('task = "digits"\n[method]\nsync_ramp = 1', "sync_ramp = 1", "bool"),
        ('task = "digits"\n[run]\nmethod = "dann"\n[method]\nbeta = 1.0', "unknown setting 'beta' in [method]", "adv"),
        ('task = "digits"\n[adversarial]\nbeta = 1.0', "the table [adversarial], of version 0.1", "[method]"),
        ('task = "digits"\n[run]\nrecipe = "nosuch"', "recipe = 'nosuch'", "common or paper"),
        ('task = "digits"\n[method]\nbeta = -1', "beta = -1", "float >= 0"),
        ('task = "digits"\n[adaptation.add]\nmcc = "x"', "add = {'mcc': 'x'}", "float"),
        ('task = "digits"\n[run]\nsteps = ', "Invalid value", "the config.toml of a run"),
    ],
)
def test_files_that_do_not_fit(text: str, found: str, expected: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        parse("--config", file)
    assert found in error.value.found
    assert error.value.expected.startswith(expected)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "missing.toml", None), (tmp_path / "binary.toml", b"\xff\xfe\x00")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=f"--config: found {re.escape(str(path))}"):
            parse("--config", str(path))
    with pytest.raises(UsageError, match="--config: found no file name"):
        parse("--config")


# ------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "TASK: found nothing; expected one of digits, digits-partial, pictures"),
        (("--steps", "5"), "TASK: found the option --steps first; expected one of digits"),
        (("digit",), "TASK: found 'digit'; expected one of digits"),
        (("digits", "--method", "gdsa"), "--method: found 'gdsa'; expected source-only, entropy"),
        (("digits", "--recipe", "nosuch"), "--recipe: found 'nosuch'; expected common or paper"),
        (("digits", "--add", "mcc"), "--add: found 'mcc'; expected NAME=WEIGHT"),
        (("digits", "--add", "mc=1"), "--add: found 'mc'; expected entropy, mcc"),
        (("digits", "--add", "mcc=-1"), "--add: found mcc=-1.0; expected a finite weight >= 0"),
        (("digits", "--method", "tca", "--add", "mcc=1"), "--add: found with --method tca; expected a method that is"),
        (("digits", "--steps", "0"), "--steps: found 0; expected a whole number >= 1"),
        (("digits", "--steps", "300", "--profile", "300"), "--profile: found 300; expected less than --steps, 300"),
        (("digits", "--steps", "-5", "--warmup", "0"), "--steps: found -5; expected a whole number >= 1"),
        (("digits", "--warmup", "-1"), "--warmup: found -1; expected a whole number >= 0"),
        (("digits", "--warmup", "801"), "--warmup: found 801; expected at most --steps, 800"),
        (("digits", "--batch-size", "0"), "--batch-size: found 0; expected a whole number >= 1"),
        (("digits", "--log-every", "0"), "--log-every: found 0; expected a whole number >= 1"),
        (("digits", "--seed", "-1"), "--seed: found -1; expected a whole number from 0"),
        (
            ("digits", "--seed", str(2**63)),
            f"--seed: found {2**63}; expected a whole number from 0 to 9223372036854775807",
        ),
        (("digits", "--threads", "-1"), "--threads: found -1; expected a whole number >= 0"),
        (("digits", "--groups", "-1"), "--groups: found -1; expected a whole number >= 0"),
        (("digits", "--hidden-dim", "0"), "--hidden-dim: found 0; expected a whole number >= 1"),
        (("digits", "--bottleneck-dim", "0"), "--bottleneck-dim: found 0; expected a whole number >= 1"),
        (("digits", "--refresh-every", "-1"), "--refresh-every: found -1; expected a whole number >= 0"),
        (("digits", "--alpha", "nan"), "--alpha: found nan; expected a finite number >= 0"),
        (("digits", "--alpha", "-0.1"), "--alpha: found -0.1; expected a finite number >= 0"),
        (("digits", "--beta", "inf"), "--beta: found inf; expected a finite number >= 0"),
        (("digits", "--adversarial-weight", "nan"), "--adversarial-weight: found nan; expected a finite number >= 0"),
        (("digits", "--min-weight", "-1"), "--min-weight: found -1.0; expected a finite number >= 0"),
        (("digits", "--learning-rate", "nan"), "--learning-rate: found nan; expected a finite number >= 0"),
        (("digits", "--backbone-learning-rate", "-1"), "--backbone-learning-rate: found -1.0; expected a finite"),
        (("digits", "--weight-decay", "inf"), "--weight-decay: found inf; expected a finite number >= 0"),
        (
            ("digits", "--confidence-threshold", "nan"),
            "--confidence-threshold: found nan; expected a finite",
        ),
        (
            ("digits", "--confidence-threshold", "80"),
            "--confidence-threshold: found 80.0; expected a finite",
        ),
        (("digits", "--momentum", "1.5"), "--momentum: found 1.5; expected a finite number from 0 to 1"),
    ],
)
def test_values_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (("--stesp", "5"), "--stesp"),
        (("--method", "dann", "--beta", "3"), "--beta"),
        (("--steps", "many"), "--steps"),
        (("--steps", "1.5"), "--steps"),
        (("--steps",), "--steps"),
        (("--device", "tpu"), "--device"),
        (("--config", "x.toml"), "--config"),
        (("mnist",), "mnist"),
    ],
)
def test_options_that_do_not_exist_or_do_not_parse(
    arguments: tuple[str, ...], mentioned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse("digits", *arguments)
    written = capsys.readouterr()
    assert end.value.code == 2
    assert written.out == ""
    assert "Traceback" not in written.err
    assert mentioned in written.err


def settings_of(config: Config) -> list[str]:
    return [name for table in config.to_dict().values() if isinstance(table, dict) for name in table]


def test_a_setting_has_one_name_whatever_its_table() -> None:
    names: list[Any] = settings_of(preset("digits"))
    assert len(names) == len(set(names))
    assert {"--" + name.replace("_", "-") for name in names} == set(re.findall(r"^--[\w-]+", OPTIONS, re.MULTILINE))


# ----------------------------------------------------------------------------------------------- methods' own settings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", ["common", "paper"])
@pytest.mark.parametrize("task", ["digits", "visda", "office31", "features"])
def test_every_method_has_a_preset_of_every_task_that_comes_back_from_its_file(
    task: str, recipe: str, method: str, tmp_path: Path
) -> None:
    config = preset(task, method, recipe)
    config.validate()
    assert type(config.method) is type(METHODS[method].settings)
    folder = RunFolder(tmp_path)
    folder.write_config(config.to_dict())
    assert config_from_dict(folder.read_config(), "config.toml") == config


def test_a_method_lists_its_own_options_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("digits", "--method", "mcc", "--help")
    written = capsys.readouterr().out
    assert "--beta" not in written
    assert "--hidden-dim" not in written
    assert method_options("gsda") >= {"--beta", "--groups", "--hidden-dim"}


def test_terms_are_a_table_of_weights() -> None:
    config = parse("digits", "--add", "mcc=1", "bsp=1e-4", "--steps", "500")
    assert config.adaptation.add == {"mcc": 1.0, "bsp": 1e-4}
    assert config.run.steps == 500


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ({}, {"bsp": 1e-4}),
        ({"mcc": 1.0}, {"bsp": 1e-4, "mcc": 1.0}),
        ({"bsp": 0.5}, {"bsp": 0.5}),
        ({"mcc": 1.0, "bsp": 0.0}, {"mcc": 1.0}),
    ],
)
def test_what_is_added_stands_beside_a_methods_own_terms(
    added: dict[str, float], expected: dict[str, float], tmp_path: Path
) -> None:
    given = {"add": added} if added else {}
    words = ["--add", *(f"{name}={weight}" for name, weight in added.items())] if added else []
    config = parse("digits", "--method", "bsp-cdan", *words)
    assert config.adaptation.add == configure("digits", "bsp-cdan", **given).adaptation.add == expected
    # A stored run says all of them, and they are not joined with the preset's again.
    folder = RunFolder(tmp_path)
    folder.write_config(config.to_dict())
    assert parse("--config", str(folder.config_path)).adaptation.add == expected


def test_an_earlier_name_is_the_same_method() -> None:
    assert parse("digits", "--method", "group") == parse("digits", "--method", "glb-cls-grp")


def test_another_method_on_a_stored_run_has_its_own_defaults(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(parse("digits", "--beta", "7", "--steps", "500").to_dict())
    config = parse("--config", str(folder.config_path), "--method", "cdan")
    assert config.method == preset("digits", "cdan").method
    assert config.run.steps == 500


@pytest.mark.parametrize(
    ("method", "arguments", "options"),
    [
        ("gsda", ["--steps", "60", "--warmup", "5"], {"steps": np.int64(60), "warmup": 5}),
        ("gsda", ["--no-sync-ramp", "--alpha", "1"], {"sync_ramp": False, "alpha": 1}),
        ("dann", ["--add", "mcc=1.0"], {"add": {"mcc": 1.0}}),
        ("gsda", ["--quarantine", "a/b", "--compile", "off"], {"quarantine": Path("a/b"), "compile": "off"}),
        ("gsda", ["--recipe", "paper"], {"recipe": "paper"}),
    ],
)
def test_python_options_are_the_command_lines(method: str, arguments: list[str], options: dict[str, Any]) -> None:
    assert configure("digits", method, **options) == parse_config(["digits", "--method", method, *arguments], "train")


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("gsda", {"step": 5}, "--step: found no option of the task digits and the method gsda; expected .*--steps"),
        ("dann", {"beta": 1.0}, "--beta: found an option of .*gsda.*; expected one of --method dann: "),
        ("mcc", {"beta": 1.0}, "expected one of --method mcc: none"),
        ("gsda", {"steps": "many"}, "--steps: found 'many'; expected int"),
        ("gsda", {"device": "tpu"}, "--device: found 'tpu'"),
        ("gsda", {"steps": 0}, "--steps: found 0; expected a whole number >= 1"),
        ("gsda", {"warmup": 10_000}, "--warmup: found 10000; expected at most --steps, 800"),
        ("gsda", {"add": {"nothing": 1.0}}, "--add: found 'nothing'"),
    ],
)
def test_python_options_are_checked_alike(method: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        configure("digits", method, **options)


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        (["digits", "--steps", "400"], 300),
        (["digits", "--steps", "60"], 22),
        (["digits", "--steps=1"], 1),
        (["digits", "--steps", "60", "--warmup", "50"], 50),
        (["digits", "--steps", "60", "--warmup=60"], 60),
        (["visda", "--steps", "60"], 0),
    ],
)
def test_a_presets_warmup_fits_few_steps(arguments: list[str], warmup: int) -> None:
    assert parse_config(arguments, "train").run.warmup == warmup


def test_a_presets_warmup_fits_few_steps_in_python() -> None:
    assert configure("digits", steps=60).run.warmup == 22
    with pytest.raises(UsageError, match="--warmup: found 61; expected at most --steps, 60"):
        configure("digits", steps=60, warmup=61)

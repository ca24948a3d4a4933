"""The page on reproducing the paper's tables: its commands parse, and its counts are those of the suites."""

import io
import re
import shlex
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from gsda_fast import suite_runs
from gsda_fast.config import Config, parse_config, preset
from gsda_fast.data.__main__ import PackSettings, VerifySettings
from gsda_fast.errors import TrainingError
from gsda_fast.methods.gsda import GSDASettings
from gsda_fast.report import ReportOptions
from gsda_fast.results.records import RunResult
from gsda_fast.suite_runs import parse_suite, run_suite

PAGE = (Path(__file__).parents[1] / "docs" / "reproducing.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for line in re.sub(r"\\\n\s*", " ", PAGE).splitlines()
    if line.startswith("    python -m gsda_fast")
]
IMAGES_A_SECOND, IMAGES_A_STEP = 500, 72


def suites() -> list[list[str]]:
    return [words[3:] for words in COMMANDS if words[2] == "gsda_fast.suite"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    seen: list[Config] = []

    def keep(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError]:
        seen.extend(configs)
        return []

    monkeypatch.setattr(suite_runs, "_run_all", keep)
    return seen


def test_every_command_parses(planned: list[Config]) -> None:
    assert len(COMMANDS) >= 15
    for python, option, module, *arguments in COMMANDS:
        assert (python, option) == ("python", "-m")
        if module == "gsda_fast.train":
            parse_config(arguments, module)
        elif module == "gsda_fast.report":
            tyro.cli(ReportOptions, args=arguments)
        elif module == "gsda_fast.data":
            tyro.cli({"verify": VerifySettings, "pack": PackSettings}[arguments[0]], args=arguments[1:])
        else:
            assert module == "gsda_fast.suite"
            settings, variants = parse_suite(arguments)
            before = len(planned)
            run_suite(settings, variants, Console(file=io.StringIO()))
            assert len(planned) > before


def test_runs_and_hours_of_each_table_are_counted(planned: list[Config]) -> None:
    rows = re.findall(r"^\| .* \| `suite (.*)` \| (\d+) \| ([\d,]+) \| (\d+) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 8
    for (shown, runs, steps, hours), arguments in zip(rows, suites()):
        planned.clear()
        settings, variants = parse_suite(arguments)
        run_suite(settings, variants, Console(file=io.StringIO()))
        assert set(shlex.split(shown.replace("...", ""))) <= set(arguments)
        assert len(planned) == int(runs), shown
        assert {config.run.steps for config in planned} == {int(steps.replace(",", ""))}
        images = sum(config.run.steps * IMAGES_A_STEP for config in planned)
        scoring = 11 / 6 if "--test-crops" in arguments else 1 / 6
        assert round((1 + scoring) * images / IMAGES_A_SECOND / 3600) == int(hours), shown
    assert {config.run.batch_size * 2 for config in planned} == {IMAGES_A_STEP}


def test_every_table_of_the_paper_has_its_command() -> None:
    tasks = [arguments[0] for arguments in suites()]
    assert {"office31", "office-home", "visda", "office31-partial", "office-home-partial", "digits"} <= set(tasks)
    options = {word for arguments in suites() for word in arguments}
    assert {"--ablation", "--paired", "--sweep", "--test-crops", "--report"} <= options


def test_settings_of_the_page_are_the_presets() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| (\d+) \| (.*?) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 5
    for task, alpha, beta, groups, origin in rows:
        method = preset(task).method
        assert isinstance(method, GSDASettings)
        assert (method.alpha, method.beta) == (float(alpha), float(beta))
        assert (origin == "ours") == (method.groups == 0)
        if method.groups:
            assert method.groups == int(groups)

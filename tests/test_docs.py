"""The documentation: the site builds without a warning, links of README and pages lead somewhere, Python and commands
parse.
"""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tyro

from gsda_fast.commands import parse_command_line
from gsda_fast.config import parse_config
from gsda_fast.data.__main__ import BuildSettings, PackSettings, VerifySettings
from gsda_fast.data.benchmarks import EMBEDDED
from gsda_fast.embed import EmbedSettings
from gsda_fast.errors import UsageError
from gsda_fast.evaluate import EvaluateSettings
from gsda_fast.export import ExportSettings
from gsda_fast.predict import PredictSettings
from gsda_fast.report import ReportOptions
from gsda_fast.suite_runs import parse_suite

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def options(kind: type[Any]) -> Callable[[list[str]], Any]:
    return lambda arguments: parse_command_line(lambda: tyro.cli(kind, args=arguments))


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": lambda arguments: parse_config(on_features(arguments), "train"),
    "suite": lambda arguments: parse_suite(on_features(arguments)),
    "evaluate": options(EvaluateSettings),
    "predict": options(PredictSettings),
    "export": options(ExportSettings),
    "embed": options(EmbedSettings),
    "report": options(ReportOptions),
    "data verify": options(VerifySettings),
    "data pack": options(PackSettings),
    "data build": options(BuildSettings),
}


def on_features(arguments: list[str]) -> list[str]:
    """The command line that `--features` stands for, without computing them."""
    if "--features" not in arguments:
        return arguments
    return [arguments[0] + EMBEDDED, *(argument for argument in arguments[1:] if argument != "--features")]


def commands_in(text: str) -> list[list[str]]:
    """The commands of this project in the blocks of a page, from the command's name on."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    found = []
    for line in lines:
        named = re.match(r"(?:gsda |(?:\w+=\S+ )?(?:srun )?(?:python|torchrun .*?) -m gsda_fast\.)(.*)", line)
        if named is None:
            continue
        # `[RUN ...]` may be left out; `> FILE`, `&` and comments are the shell's.
        words = shlex.split(re.sub(r"\[.*?\]", "", named[1]), comments=True)
        found.append(words[: next((place for place, word in enumerate(words) if word in (">", "&", "|")), None)])
    return found


def parsed(words: list[str]) -> Any:
    length = 2 if words[0] == "data" else 1
    return PARSERS[" ".join(words[:length])](words[length:])


def test_the_site_builds_with_every_link_and_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    losses = (tmp_path / "losses" / "index.html").read_text()
    assert 'id="gsda_fast.losses.minimum_class_confusion"' in losses
    assert 'alt="\\frac{1}{N r} \\sum_i \\sum_c |p^a_{ic} - p^b_{ic}|"' in losses  # drawn
    assert "math:" not in losses
    kernels = (tmp_path / "kernels_api" / "index.html").read_text()
    assert 'id="gsda_kernels.adversarial_terms"' in kernels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_checkout(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_fences_parses(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(code)


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands_in(page.read_text())
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_in_a_block_parses(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    parsed(words)


def test_commands_are_found_and_a_wrong_one_is_refused() -> None:
    page = """
    gsda report RUN [RUN ...]  # a page
    srun torchrun --nproc_per_node=8 -m gsda_fast.train visda --output a &

```
OMP_NUM_THREADS=1 python -m gsda_fast.suite digits \\
    --stesp 3
```
"""
    wrong = ["suite", "digits", "--stesp", "3"]
    assert sorted(commands_in(page)) == [["report", "RUN"], wrong, ["train", "visda", "--output", "a"]]
    assert {words[0] for (words,) in (each.values for each in COMMANDS)} >= {"train", "suite", "predict", "data"}
    with pytest.raises((UsageError, SystemExit)):
        parsed(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_title_and_headings_in_order(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))

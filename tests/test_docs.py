"""The documentation: the site builds without a warning, links of README and pages lead somewhere, commands parse, and
the Python that no other test runs is run here.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import tyro
from clouds import clouds
from equivalence import make_problem
from msgspec import Meta

import gsda_fast
from gsda_fast import ClassGroups, Discriminators, discriminator_objective, encoder_objective
from gsda_fast.commands import parse_command_line
from gsda_fast.config import Config, parse_config
from gsda_fast.data.__main__ import BuildSettings, PackSettings, VerifySettings
from gsda_fast.data.benchmarks import EMBEDDED
from gsda_fast.embed import EmbedSettings
from gsda_fast.errors import UsageError
from gsda_fast.evaluate import EvaluateSettings
from gsda_fast.export import ExportSettings
from gsda_fast.methods import METHODS, Entry, Method, MethodSettings
from gsda_fast.methods.objective import class_probabilities
from gsda_fast.predict import PredictSettings
from gsda_fast.report import ReportOptions
from gsda_fast.suite_runs import parse_suite
from gsda_kernels import DiscriminatorWeights, adversarial_update_

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


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
    """What a command line stands for; those of the pages are looked at more than once."""
    return _parsed(tuple(words))


@cache
def _parsed(words: tuple[str, ...]) -> Any:
    length = 2 if words[0] == "data" else 1
    return PARSERS[" ".join(words[:length])](list(words[length:]))


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


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_heading_every_fifteen_lines(page: Path) -> None:
    """Tables, blocks and empty lines do not count."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    sections = re.split(r"^(?=#+ )", text, flags=re.MULTILINE)
    prose = {each.split("\n")[0]: len(re.findall(r"^(?!\||    |#)\S", each, flags=re.MULTILINE)) for each in sections}
    assert {title: lines for title, lines in prose.items() if lines > 15} == {}


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


def test_suites_that_share_a_folder_have_the_same_settings() -> None:
    """Given one after the other, the second command would be refused if it had others for a run of the first."""
    first: dict[tuple[Path, str, int], Config] = {}
    differing: set[tuple[Path, str, int]] = set()
    for (words,) in (each.values for each in COMMANDS):
        if words[0] != "suite":
            continue
        settings, variants = parsed(words)
        for name, of_methods in variants.items():
            for method, seed in product(settings.chosen_methods, settings.seeds):
                data = replace(of_methods[method].data, data_root=None)  # each page has a place of its own
                run, config = (settings.folder / name, method, seed), replace(of_methods[method], data=data)
                if first.setdefault(run, config) != config:
                    differing.add(run)
    assert len(first) > 200
    assert differing == set()


def test_what_else_is_called_is_there() -> None:
    """Targets of make, benchmarks with their options, extras."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^ {4}(?:git .*&& )?make ([\w-]+)|`make ([\w-]+)`", text, re.M))
    assert {name for each in targets for name in each if name and f"\n{name}:" not in makefile} == set()
    calls = re.findall(r"(?:-m pytest |-m |python )(benchmarks[\w./]+)(.*)", text)
    assert len(calls) > 15
    conftest = (ROOT / "benchmarks" / "conftest.py").read_text()
    for called, rest in calls:
        file = ROOT / (called if called.endswith(".py") else f"{called.replace('.', '/')}.py")
        options = re.findall(r" (--[\w-]+)", re.split(r"#|`", rest)[0])
        known = file.read_text() + conftest
        assert [each for each in options if f'"{each}"' not in known and each != "--benchmark-json"] == [], called
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for found in re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text) for name in found.split(",")}
    assert named <= set(extras)
    assert named >= {"dali", "pictures", "slurm"}


def python_in(page: str, begins: str) -> str:
    """Return the one block of Python of a page, in a fence or indented, that begins so."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    blocks += map(dedent, re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE))
    (block,) = [block for block in blocks if block.startswith(begins)]
    return block


def test_the_readmes_embeddings_are_adapted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gsda_fast, "adapt", partial(gsda_fast.adapt, steps=20, warmup=5))
    source, (target, _) = clouds(60, 0, 0, ["cat", "dog"]), clouds(40, 0.3, 1, ["cat", "dog"])
    named = {"source_features": source[0], "source_labels": source[1], "target_features": target}
    known = named | {"new_features": target[:7]}
    exec(python_in("README.md", "import gsda_fast"), known)
    assert len(known["predictions"]) == 7
    assert set(known["predictions"]) <= {"cat", "dog"}
    assert (tmp_path / "run" / "result.json").is_file()


def test_the_readmes_loop_gives_gradients_to_both_players() -> None:
    torch.manual_seed(0)
    groups = ClassGroups.random(num_classes=4, num_groups=2, seed=0)
    discriminators = Discriminators(feature_dim=6, groups=groups, hidden_dim=5)
    features, logits = (torch.randn(8, size, requires_grad=True) for size in (6, 4))
    labels = torch.tensor([0, 1, 2, 3, 0])
    known = {"discriminators": discriminators, "groups": groups, "features": features, "logits": logits, "n": 5}
    known |= {"labels": labels, "p": class_probabilities(logits, labels), "ramp": 0.5}
    known |= {"domain": torch.tensor([1.0] * 5 + [0.0] * 3)}
    known |= {"discriminator_objective": discriminator_objective, "encoder_objective": encoder_objective}
    exec(python_in("README.md", "terms = discriminators"), known)
    trained = [features, logits, *discriminators.parameters()]
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in trained)


def test_the_update_of_the_kernels_page_moves_parameters() -> None:
    problem = make_problem(num_source=6, num_target=6, dim=5, hidden=4)
    disc = DiscriminatorWeights(*(tensor.clone().requires_grad_() for tensor in problem.disc))
    known = {"torch": torch, "adversarial_update_": adversarial_update_, "disc": disc, "features": problem.features}
    known |= {"momentum_buffers": DiscriminatorWeights(*map(torch.zeros_like, disc)), "domain": problem.domain}
    known |= {"sample_weight": problem.sample_weight, "rate": 0.1, "flag": torch.zeros(())}
    known |= {"objective": lambda loss, gradient_norm: loss.sum() + gradient_norm.sum()}
    for begins in ("def upstream", "step = adversarial_update_"):
        exec(python_in("docs/kernels.md", begins), known)
    assert known["step"].found_inf == 0
    assert not any(torch.equal(new, old) for new, old in zip(disc, problem.disc))


def test_the_method_of_the_architecture_page_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(METHODS, "coral", METHODS["source-only"])
    known: dict[str, Any] = {"__name__": __name__, "dataclass": dataclass, "Annotated": Annotated}
    known |= {"Meta": Meta, "Method": Method, "MethodSettings": MethodSettings, "METHODS": METHODS, "Entry": Entry}
    for begins in ("@dataclass(frozen=True)\nclass Coral", 'METHODS["coral"]'):
        exec(python_in("docs/architecture.md", begins), known)
    labels = ["cat", "dog"]
    adapted = gsda_fast.adapt(
        clouds(60, 0, 0, labels), clouds(40, 0.3, 1, labels)[0], "coral", trade_off=0.5, steps=6, warmup=2,
        log_every=1, output=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert '"coral"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert adapted.result.method == "coral"


def test_the_embeddings_pages_files_are_ones_that_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    features, labels = clouds(60, 0, 0, ["cat", "dog"])
    exec(python_in("docs/embeddings.md", "np.savez"), {"np": np, "features": features, "labels": labels})
    adapted = gsda_fast.adapt("a.npz", "b.npz", "mcc", steps=6, warmup=2, output="run", progress=False)
    assert list(adapted.classes) == ["cat", "dog"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_title_and_headings_in_order(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LONGEST_FIRST = (
    *("test_triton_interpreter", "test_triton_races", "test_equivalence", "test_fused_update"),
    *("test_distributed", "test_train", "test_suite", "test_methods", "test_every_task", "test_every_suite"),
    *("test_features", "test_kill", "test_resume", "test_page", "test_dali_loader", "test_pack"),
    "test_compared_methods",
    *("test_export", "test_evaluate", "test_predict", "test_commands", "test_stopping", "test_closed_form"),
)
"""Files that take longest. Processes that share the files out must not find one of these at the end, alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, all others as they come."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The digits are built once for all tests, and never in the home folder; no data set of the user is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GSDA_DATA", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal() -> None:
    """In the background of a shell, Ctrl-C is ignored, by these tests' processes and by those that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small products on several threads of a busy machine wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 15th of the built-in digits: a `--data-root` for runs that need no accuracy."""
    from gsda_fast.data import digits

    root = tmp_path_factory.mktemp("few") / "digits"
    full = digits.build()
    for domain in digits.DOMAINS:
        for digit in range(10):
            (root / domain / str(digit)).mkdir(parents=True)
            for file in sorted((full / domain / str(digit)).iterdir())[::15]:
                shutil.copy(file, root / domain / str(digit))
    return root

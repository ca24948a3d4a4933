from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The digits are built once for all tests, and never in the home folder; no data set of the user is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GSDA_DATA", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small products on several threads of a busy machine wait for each other."""
    torch.set_num_threads(1)

"""Speed of the kernels, measured with pytest-benchmark: `pytest benchmarks`, then `python -m benchmarks.summary`.

Usable from a bare checkout: where nothing is installed, kernels/ is found under its import name.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


def _link_kernels() -> None:
    """A link called gsda_kernels, on the import path of this process and of those that it starts."""
    repository = Path(__file__).resolve().parents[1]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    Path(folder, "gsda_kernels").symlink_to(repository / "kernels")
    paths = [folder, str(repository)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


if importlib.util.find_spec("gsda_kernels") is None:
    _link_kernels()

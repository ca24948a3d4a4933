"""Speed of the kernels, measured with pytest-benchmark: `pytest benchmarks`, then `python -m benchmarks.summary`.

Usable from a bare checkout: where nothing is installed, both packages are taken from it.
"""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("gsda_kernels") is None:
    _REPOSITORY = Path(__file__).resolve().parents[1]
    _PATHS = [str(_REPOSITORY / "kernels"), str(_REPOSITORY)]
    sys.path[:0] = _PATHS
    # For the processes that a benchmark starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

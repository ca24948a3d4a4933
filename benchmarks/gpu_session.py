"""Everything that only a GPU can tell, in one command: the tests marked `gpu`, then the head's times.

    python benchmarks/gpu_session.py --output results/gpu

Needs PyTorch with CUDA, Triton and pytest, nothing installed from this repository and no network. Writes
`tests.txt` (pytest's own report) and `head.json`: device, versions, revision, and for every shape, dtype, player and
contender the median milliseconds of a forward and backward in eager mode and as a CUDA graph, the peak memory, and for
the Triton backend the time of each kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# Features, parameters, TF32. Autograd's own contenders take one dtype alone.
DTYPES = {
    "bfloat16": ("bfloat16", "bfloat16", False),
    "bfloat16 features, float32 parameters": ("bfloat16", "float32", False),
    "tf32": ("float32", "float32", True),
    "float32": ("float32", "float32", False),
}
SHAPES = ("visda", "office31", "office-home", "visda-128", "office31-128", "office-home-128")
PLAYERS = {"discriminator step": (False, True), "encoder step": (True, False), "both players": (True, True)}
REFERENCE_SHAPES = ("visda",)  # the loop has seconds to a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_session"), help="folder for tests.txt and head.json")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--no-times", action="store_true", help="test only")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _make_importable(Path(folder))
        failed = 0 if options.no_tests else run_tests(options.output / "tests.txt")
        if not options.no_times:
            measure(options.output / "head.json", options.shapes, options.dtypes, tests_passed=failed == 0)
    return failed


def _make_importable(folder: Path) -> None:
    """The package of kernels/ is called gsda_kernels: a link of that name does where nothing is installed."""
    (folder / "gsda_kernels").symlink_to(REPOSITORY / "kernels")
    paths = [str(folder), str(REPOSITORY)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def run_tests(report: Path) -> int:
    """pytest's exit status; its output goes to `report` as well as to the terminal."""
    # Only these: the others' imports may ask for packages that such a machine does not have.
    files = [str(path) for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    command += ["--continue-on-collection-errors"]
    with report.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.wait()


def measure(path: Path, shapes: list[str], dtypes: list[str], tests_passed: bool) -> None:
    """Writes `path` after every row, so that what was measured survives a session that is cut off."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "revision": _revision(),
        "gpu_tests_passed": tests_passed,
        "bytes_per_second": _copied_bytes_per_second(),
        "rows": [],
    }
    for row in _rows(shapes, dtypes):
        results["rows"].append(row)
        path.write_text(json.dumps(results, indent=1))
        print({key: value for key, value in row.items() if key != "kernels"}, flush=True)


def _rows(shapes: list[str], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    import torch

    from benchmarks.contenders import BASELINE, REFERENCE, contenders, step
    from benchmarks.shapes import SHAPES as HEADS
    from benchmarks.shapes import make_inputs

    for dtype in dtypes:
        features, parameters, tf32 = DTYPES[dtype]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        for shape in shapes:
            inputs = make_inputs(HEADS[shape], dtype=getattr(torch, parameters), device="cuda")
            inputs = replace(inputs, features=inputs.features.to(getattr(torch, features)))
            for player, wanted in PLAYERS.items():
                inputs.requires_grad_(*wanted)
                expected = None
                for name, contender in contenders("cuda").items():
                    if name in (BASELINE, REFERENCE) and features != parameters:
                        continue
                    if name == REFERENCE and shape not in REFERENCE_SHAPES:
                        continue
                    row: dict[str, Any] = {"dtype": dtype, "shape": shape, "player": player, "contender": name}
                    run = lambda contender=contender, inputs=inputs: step(contender, inputs)  # noqa: E731
                    try:
                        found = run()
                        expected = found if expected is None else expected
                        row["error"] = max(
                            float(
                                torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())
                            )
                            for a, b in zip(found, expected)
                        )
                        del found
                        row |= _timed(run, graph=name != REFERENCE)
                        if name == "triton":
                            row["kernels"] = _kernel_times(run)
                    except Exception:
                        row["failed"] = traceback.format_exc()
                    yield row
                del expected
                torch.cuda.empty_cache()


def _timed(run: Callable[[], object], graph: bool) -> dict[str, float]:
    """Median milliseconds, from the host's call to the device's end, and the peak of what a step allocates."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    found = {"peak_bytes": float(torch.cuda.max_memory_allocated() - before)}
    found["eager_ms"] = _median_ms(run)
    if graph:
        captured = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            run()
        found["graph_ms"] = _median_ms(captured.replay)
    return found


def _median_ms(run: Callable[[], object]) -> float:
    """Over batches of calls that follow each other as training steps do, after a warm-up."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    calls = 1
    for attempt in range(12):
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end) / calls
        if attempt == 0:
            calls = max(1, min(100, round(20 / elapsed)))
        elif attempt > 1:
            times.append(elapsed)
    return statistics.median(times)


def _kernel_times(run: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """Microseconds on the device in one step, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[event.key] += event.self_device_time_total / calls
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _copied_bytes_per_second() -> float:
    import torch

    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / (_median_ms(lambda: target.copy_(source)) / 1000)


def _revision() -> str:
    """Of the checkout; empty where there is none."""
    found = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

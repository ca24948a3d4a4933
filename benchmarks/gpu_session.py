"""Everything that only a GPU can tell, in one command: the tests marked `gpu`, the head's times, the training step's.

    python benchmarks/gpu_session.py --output results/gpu            # about a quarter of an hour
    python benchmarks/gpu_session.py --output results/gpu --only tune      # as long again: the table of configurations
    python benchmarks/gpu_session.py --output results/gpu --minutes 9      # starts nothing more after nine
    python benchmarks/gpu_session.py --output results/gpu --rehearse       # needs no GPU: does it hold together?

Needs PyTorch with CUDA, Triton and pytest, nothing installed from this repository and no network; the training step
needs what gsda_fast imports (pyproject.toml), too. Writes, each part as soon as it is known:

- `tests.txt`: pytest's own report;
- `head.json`: device, versions, revision, and for every shape, dtype, player and contender the median milliseconds of a
  forward and backward in eager mode and as a CUDA graph, and the peak memory; for the Triton backend also the time of
  each kernel, the time under `torch.compile`, and whether the host ever waits for the device (it must not);
- `step.json`: pytest-benchmark's results of the whole training step, `source-only` beside `gsda` (ResNet-50, bfloat16,
  random images), eager and compiled, with device, versions and revision; `step.txt`: its report;
- `table.py`: the tuned configurations of this chip (`--only tune`), to go into kernels/gsda_kernels/triton/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Features, parameters, TF32. Autograd's own contenders take one dtype alone.
# What training uses comes first: a session may be cut off.
DTYPES = {
    "bfloat16 features, float32 parameters": ("bfloat16", "float32", False),
    "bfloat16": ("bfloat16", "bfloat16", False),
    "tf32": ("float32", "float32", True),
    "float32": ("float32", "float32", False),
}
SHAPES = ("visda", "office31", "office-home", "visda-128", "office31-128", "office-home-128")
PLAYERS = {"discriminator step": (False, True), "encoder step": (True, False), "both players": (True, True)}
FEW_SHAPES = ("visda",)  # for the loop, which takes seconds to a step, and for compilation, which does, too
PARTS = ("tests", "head", "step")
GPU_TESTS = ("-m", "gpu")
TRAINING_NEEDS = (
    "tyro",
    "tomli_w",
    "safetensors",
    "msgspec",
    "pandas",
    "rich",
    "matplotlib",
    "jinja2",
    "sklearn",
)
STEP_OPTIONS = (
    "--device=cuda", "--task=visda", "--batch-size=36", "-k", "test_step and bf16 and (source-only or gsda)"
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_session"), help="folder for all results")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "tune"], default=PARTS, help="default: all but tune")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after these")
    parser.add_argument("--revision", help="of the code, where it was copied here without its history")
    parser.add_argument("--rehearse", action="store_true", help="everything short of the GPU, in a minute or two")
    options = parser.parse_args()
    if not (options.rehearse or torch.cuda.is_available()):
        print(
            "error: found no CUDA device; expected one, since nothing here is about a CPU (--rehearse needs none)",
            file=sys.stderr,
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(REPOSITORY))
    import benchmarks  # noqa: F401  puts the checkout's packages on the import path, for what is started here as well

    missing = missing_packages()
    if missing:
        print(f"missing: {', '.join(missing)}; training's GPU tests and step.json need them, the kernels do not")
    if options.rehearse:
        return rehearse(options.output)
    clock = Clock(options.minutes)
    failed = run_tests(options.output / "tests.txt", GPU_TESTS) if "tests" in options.only else None
    if "head" in options.only:
        passed = None if failed is None else failed == 0
        rows = measure(options.output / "head.json", options.shapes, options.dtypes, passed, clock, options.revision)
        failed = exit_status(rows) or failed
    if "step" in options.only and not clock.is_over("step: go on with --only step"):
        failed = time_training_steps(options.output, STEP_OPTIONS) or failed
    if "tune" in options.only and not clock.is_over("tune: go on with --only tune"):
        from benchmarks import tune_triton

        failed = tune_triton.main(["--output", str(options.output / "table.py")]) or failed
    return failed or 0


class Clock:
    """Says when a session that is paid by the minute should start nothing more."""

    def __init__(self, minutes: float = math.inf) -> None:
        self._end = time.monotonic() + 60 * minutes

    def is_over(self, left: str) -> bool:
        """Return whether the time is over; then what is left undone is printed."""
        over = time.monotonic() >= self._end
        if over:
            print(f"time is over; left: {left}", flush=True)
        return over


def missing_packages() -> list[str]:
    """Return what training imports and this environment lacks."""
    return [name for name in TRAINING_NEEDS if importlib.util.find_spec(name) is None]


def rehearse(output: Path) -> int:
    """Collect the GPU's tests, and measure a small head on the CPU in place of the GPU's: 0 where all of it works."""
    files = map(str, gpu_test_files())
    failed = _pytest([*GPU_TESTS, "-q", "--collect-only", *files], output / "tests.txt")
    rows = list(_rows(["digits"], ["float32"], device="cpu"))
    (output / "head.json").write_text(json.dumps(rows, indent=1))
    broken = [
        f"{row['contender']}, {row['player']}: {row['failed'].splitlines()[-1]}" for row in rows if "failed" in row
    ]
    for line in broken:
        print(f"failed: {line}")
    from benchmarks.tune_triton import candidates

    few = candidates("layer", "mixed", "small", 232448)
    print(f"rehearsed: {len(rows)} rows, {len(few)} candidates for a layer's tiles, tests collected: {failed == 0}")
    return failed or int(bool(broken))


def gpu_test_files() -> list[Path]:
    """Only these: the others' imports may ask for packages that such a machine does not have."""
    return [path for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]


def run_tests(report: Path, selection: Sequence[str]) -> int:
    """Return 0 where every selected test ran and passed; pytest's output goes to `report` as well as to the terminal.

    A test that was skipped, as those of training are on a machine without what training needs, is not a passed one:
    the files' names and reasons stand at the end of the report, and the status is 1.
    """
    files = map(str, gpu_test_files())
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "tests.xml"
        status = _pytest(
            [*selection, "-q", "-rs", "--continue-on-collection-errors", f"--junit-xml={listed}", *files], report
        )
        skipped = [
            f"{case.get('classname') or case.get('name')}: {why.get('message')}"
            for case in ElementTree.parse(listed).iter("testcase")
            for why in case.iter("skipped")
        ]
    if skipped:
        line = f"{len(skipped)} skipped, so that not everything is known to pass: {'; '.join(skipped)}"
        print(line)
        with report.open("a") as file:
            file.write(line + "\n")
    return status or int(bool(skipped))


def time_training_steps(output: Path, options: Sequence[str]) -> int:
    """pytest's exit status for the benchmark of the training step, of which it writes step.json and step.txt."""
    suite = str(REPOSITORY / "benchmarks" / "test_training_step.py")
    return _pytest([suite, "-q", f"--benchmark-json={output / 'step.json'}", *options], output / "step.txt")


def _pytest(arguments: Sequence[str], report: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    with report.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.wait()


def exit_status(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return 1 if this project's own contender failed in a row, which says so in the file alone; others may lack
    memory.
    """
    return int(any("failed" in row and row["contender"] == "triton" for row in rows))


def measure(
    path: Path,
    shapes: Sequence[str],
    dtypes: Sequence[str],
    tests_passed: bool | None,
    clock: Clock,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """Return the rows. Writes `path` after every row, so that what was measured survives a session that is cut off."""
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
        "revision": revision or _revision(),
        "gpu_tests_passed": tests_passed,
        "bytes_per_second": _copied_bytes_per_second(),
        "rows": [],
    }
    for row in _rows(shapes, dtypes):
        results["rows"].append(row)
        path.write_text(json.dumps(results, indent=1))
        print({key: value for key, value in row.items() if key != "kernels"}, flush=True)
        where = f"{row['dtype']}, {row['shape']}, {row['player']}"
        if clock.is_over(f"head: all after {where}; go on with --only head and --shapes, --dtypes"):
            break
    rows: list[dict[str, Any]] = results["rows"]
    return rows


def _rows(shapes: Sequence[str], dtypes: Sequence[str], device: str = "cuda") -> Iterator[dict[str, Any]]:
    from benchmarks.contenders import BASELINE, INDEXING, REFERENCE, contenders, step
    from benchmarks.shapes import SHAPES as HEADS
    from benchmarks.shapes import make_inputs

    for dtype in dtypes:
        features, parameters, tf32 = DTYPES[dtype]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        for shape in shapes:
            inputs = make_inputs(HEADS[shape], dtype=getattr(torch, parameters), device=device)
            inputs = replace(inputs, features=inputs.features.to(getattr(torch, features)))
            for player, wanted in PLAYERS.items():
                inputs.requires_grad_(*wanted)
                expected = None
                for name, contender in contenders(device).items():
                    if name == INDEXING or (name in (BASELINE, REFERENCE) and features != parameters):
                        continue
                    if name == REFERENCE and shape not in FEW_SHAPES:
                        continue
                    row: dict[str, Any] = {"dtype": dtype, "shape": shape, "player": player, "contender": name}
                    run = partial(step, contender, inputs)
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
                        row |= _timed(run, graph=name != REFERENCE) if device == "cuda" else _on_a_cpu(run)
                        if name == "triton" and device == "cuda":
                            row["kernels"] = _kernel_times(run)
                            row["host_waits"] = _host_waits(run)
                            if shape in FEW_SHAPES:
                                torch.compiler.reset()
                                compiled = torch.compile(contender, fullgraph=True)
                                row["compiled_ms"] = _median_ms(partial(step, compiled, inputs))
                    except Exception:
                        row["failed"] = traceback.format_exc()
                    yield row
                del expected
                if device == "cuda":
                    torch.cuda.empty_cache()


def _timed(run: Callable[[], object], graph: bool) -> dict[str, float]:
    """Median milliseconds, from the host's call to the device's end, and the peak of what a step allocates."""
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


def _on_a_cpu(run: Callable[[], object]) -> dict[str, float]:
    start = time.perf_counter()
    run()
    return {"eager_ms": 1000 * (time.perf_counter() - start)}


def _median_ms(run: Callable[[], object]) -> float:
    """Over batches of calls that follow each other as training steps do, after a warm-up."""
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
    """Return microseconds on the device in one step, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[event.key] += event.self_device_time_total / calls
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _host_waits(run: Callable[[], object]) -> str | None:
    """Return where the host waited for the device in one call; None where it never did."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _copied_bytes_per_second() -> float:
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / (_median_ms(lambda: target.copy_(source)) / 1000)


def _revision() -> str:
    """Return the revision of the checkout; empty where there is none."""
    found = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

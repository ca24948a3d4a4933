"""A run's folder: the only place that knows the names and the layout of its files.

Whole files are replaced atomically, `metrics.jsonl` grows line by line; after a kill at any moment every file is either
absent, its old self or its new self, and a torn last line of `metrics.jsonl` is ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import tomli_w
from msgspec import Meta

from gsda_fast.errors import FolderInUse, UsageError
from gsda_fast.files import FolderLock, atomic_file
from gsda_fast.results.records import Features, Predictions, RunResult, loss_terms

FREE_TO_CHANGE = frozenset(
    ["run.output", "run.profile", "run.checkpoint_seconds", "data.verify", "data.workers", "distributed.timeout"]
)
"""Settings that have no influence on the metrics of a run. So has --resume, unless it names where the run begins."""

PLOTS = (
    *("accuracy", "mean_per_class", "mutual_information", "per_class", "confusion"),
    *("tsne_warmup", "tsne_final", "gradient_norms", "relative_mismatch", "domain_accuracy"),
)
"""The plots of a run's report, by name, beside one for each term of the loss."""

EXPORTED = ("model.safetensors", "model.pt2")
"""The files of an export: the parameters, and the network as a program."""

_A_RUNS_ARRAYS = "arrays as a run writes them"
_FEATURES = {
    **{"source_labels": "i1", "target_labels": "i1", "source_warmup": "f2?", "target_warmup": "f2?"},
    **{"source_final": "f2?", "target_final": "f2?"},
}
_Step = Annotated[int, Meta(ge=0, le=2**53)]
_Metric = Annotated[int, Meta(ge=-(2**53), le=2**53)] | float | None


class RunFolder:
    """Reads and writes the files of one run. One process writes; any number may read.

    Args:
        path: the folder; `prepare` makes it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.environment_path = self.path / "environment.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.result_path = self.path / "result.json"
        self.predictions_path = self.path / "predictions.npz"
        self.features_path = self.path / "features.npz"
        self.report_path = self.path / "report.html"
        self.trace_path = self.path / "trace.json"  # of some steps, for Perfetto or chrome://tracing
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.exported = self.path / "export"
        self._last_step: int | None = None
        self._unwritten = b""
        self._lock: FolderLock | None = None

    @staticmethod
    def default_name(task: str, source: str, target: str, method: str, seed: int) -> str:
        """Return `TASK-SOURCE-TARGET-METHOD-seedN`, with `_` for characters that do not belong into a folder's name."""
        return "-".join(map(file_name, (task, source, target, method, f"seed{seed}")))

    @classmethod
    def default_path(cls, task: str, source: str, target: str, method: str, seed: int) -> Path:
        """Return where a run goes by default: `runs` and the default name, from the current folder."""
        return Path("runs") / cls.default_name(task, source, target, method, seed)

    @classmethod
    def existing(cls, path: Path | str) -> RunFolder:
        """Return the folder of a run that has at least begun.

        Raises:
            UsageError: there is no such folder, or it holds none of a run's files.
        """
        run = cls(path)
        if not run.path.is_dir():
            found = "a file" if run.path.exists() else "nothing"
            raise UsageError(str(path), found=found, expected="the folder of a run")
        if not run.begun:
            raise UsageError(
                str(path),
                found=f"neither {run.config_path.name} nor {run.metrics_path.name} nor {run.result_path.name} in it",
                expected="the folder of a run",
                remedy="name the folder that training was given as --output",
            )
        return run

    def prepare(self) -> None:
        """Make the folder and its subfolders.

        Raises:
            UsageError: it cannot be made or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UsageError(
                "--output",
                found=f"{self.path} ({error.strerror})",
                expected="a folder that can be made and written",
            ) from error

    def hold(self) -> None:
        """Keep every other process from holding this folder, which exists, until `release` or this process's end.

        The kernel lets go of it when the process dies, however that happens: the lock file that stays says nothing.

        Raises:
            UsageError: another process holds it, this user's or another's.
        """
        if self._lock is None:
            self._lock = FolderLock(self.path)

    @property
    def in_use(self) -> bool:
        """Whether another process holds this folder, which exists, now."""
        try:
            FolderLock(self.path).release()
        except FolderInUse:
            return True
        return False

    def release(self) -> None:
        """Let other processes hold the folder again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def clear(self) -> None:
        """Remove what an earlier run, its report and its export left here, except for the checkpoints.

        Files are known by their names, and all others stay: the folder may be somebody's own.
        """
        for file in (self.result_path, self.predictions_path, self.features_path, self.trace_path, self.report_path):
            file.unlink(missing_ok=True)
        with contextlib.suppress(UsageError):  # a broken file, which goes below
            for term in loss_terms(self.read_metrics()):
                self.plot_path(f"loss_{term}").unlink(missing_ok=True)
        for file in (*map(self.plot_path, PLOTS), *(self.exported / name for name in EXPORTED)):
            file.unlink(missing_ok=True)
        for file in self.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        for folder in (self.tensorboard, self.exported):
            with contextlib.suppress(OSError):  # there is none, or something else is in it
                folder.rmdir()
        # These last: by them the folder of a run is known, also after a kill amid all this.
        for file in (self.environment_path, self.metrics_path, self.config_path):
            file.unlink(missing_ok=True)
        self._last_step, self._unwritten = None, b""

    def plot_path(self, name: str) -> Path:
        """Return where the plot `name`, one of `PLOTS` or `loss_TERM`, is kept."""
        assert name in PLOTS or name.startswith("loss_"), f"{name}: `clear` would not remove it"
        return self.path / f"{file_name(name)}.png"

    @property
    def begun(self) -> bool:
        """Whether a run has left something here."""
        return any(file.is_file() for file in (self.config_path, self.metrics_path, self.result_path))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: `result.json` is the last file that it writes."""
        return self.result_path.is_file()

    # config.toml

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Store every setting, tables nested as in `config`. TOML has no null: settings that are None are left out."""
        with atomic_file(self.config_path) as file:
            tomli_w.dump(_toml_table(config), file)

    def read_config(self) -> dict[str, Any]:
        """Return the stored settings, {} before there are any.

        Raises:
            UsageError: the file is no TOML.
        """
        if not self.config_path.is_file():
            return {}
        try:
            return tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(str(self.config_path), found=f"no TOML ({error})", expected="a run's settings") from error

    def setting(self, name: str) -> Any:
        """Return the stored value of an option, None if it is not set.

        Options are one flat list on the command line, so that a name occurs once whatever table it is kept in.
        """
        for path, value in flat_settings(self.read_config()).items():
            if path.rpartition(".")[2] == name:
                return value
        return None

    def changed_settings(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return where `config` differs from the stored settings: dotted name -> (stored, asked for), None for not set.

        Args:
            config: nested tables. defaults: by dotted name, what settings stand for that are not stored.
        """
        stored = _as_stored(defaults) | flat_settings(self.read_config())
        asked = _as_stored(config)
        names = list(dict.fromkeys([*stored, *asked]))
        return {name: (stored.get(name), asked.get(name)) for name in names if stored.get(name) != asked.get(name)}

    # environment.json

    def write_environment(self, device: str) -> None:
        """Store the versions in use, the device's name, the git revision of a source checkout and the command line."""
        packages = ("gsda-fast", "torch", "torchvision", "triton", "numpy")
        environment = {
            "versions": {
                "python": platform.python_version(),
                **{package.replace("-", "_"): _version(package) for package in packages},
            },
            "platform": platform.platform(),
            "device": device,
            "git_revision": _git_revision(),
            "command_line": shlex.join(sys.orig_argv),
        }
        self._write_json(self.environment_path, environment)

    def read_environment(self) -> dict[str, Any]:
        """Return the stored environment, {} before there is one."""
        return self._read_json(self.environment_path) or {}

    # metrics.jsonl

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line. A metric that is not finite is stored as null, since JSON has no NaN.

        Args:
            step: optimiser steps done; larger than that of the line before.
            values: name -> number (a Python, NumPy or zero-dimensional torch one).

        Raises:
            ValueError: `step` does not increase.
            OSError: the file cannot be written. It holds whole lines still, and the next call writes this one as well.
        """
        if self._last_step is None:
            self.truncate_metrics()
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step: found {step} after {self._last_step}; expected a larger one")
        self._unwritten += _json_bytes({"step": step, **values}) + b"\n"
        self._last_step = step
        self._write_lines()

    def sync_metrics(self) -> None:
        """Put all lines on the disk: before a checkpoint, since what goes on from it does not write them again.

        Raises:
            OSError: as `append_metrics`.
        """
        self._write_lines()
        if self.metrics_path.exists():
            with self.metrics_path.open("ab") as file:
                os.fsync(file.fileno())

    def _write_lines(self) -> None:
        if not self._unwritten:
            return
        size = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        try:
            with self.metrics_path.open("ab") as file:
                file.write(self._unwritten)
        except OSError:
            # Part of a line may have been written.
            with contextlib.suppress(OSError):
                os.truncate(self.metrics_path, size)
            raise
        self._unwritten = b""

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines, in order; metrics that were not finite are None.

        Raises:
            UsageError: a line other than the last is broken.
        """
        return [record for _, record in self._metric_lines()]

    def truncate_metrics(self, step: int | None = None) -> None:
        """Drop every line after `step` (as a resumed run must, which writes them again) and a torn last line."""
        if not self.metrics_path.exists():
            return
        kept = [(line, record) for line, record in self._metric_lines() if step is None or record["step"] <= step]
        with atomic_file(self.metrics_path) as file:
            file.writelines(line + b"\n" for line, _ in kept)
        self._last_step, self._unwritten = kept[-1][1]["step"] if kept else None, b""

    def _metric_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        if not self.metrics_path.is_file():
            return []
        # What follows the last newline was cut off by a kill; a complete file leaves nothing there.
        *lines, _ = self.metrics_path.read_bytes().split(b"\n")
        records: list[tuple[bytes, dict[str, Any]]] = []
        for number, line in enumerate(lines, start=1):
            try:
                record: dict[str, Any] = msgspec.convert(json.loads(line), dict[str, _Metric])
                msgspec.convert(record.get("step"), _Step)
                if records and record["step"] <= records[-1][1]["step"]:
                    raise ValueError(f"step {record['step']} after {records[-1][1]['step']}")
            except (ValueError, RecursionError, msgspec.ValidationError) as error:
                if number == len(lines):
                    break
                raise UsageError(
                    f"{self.metrics_path}, line {number}",
                    found=line[:40].decode(errors="replace") or "an empty line",
                    expected="a JSON object of numbers, with a larger step than the line before",
                    remedy="remove the line",
                ) from error
            records.append((line, record))
        return records

    # result.json

    def write_result(self, result: RunResult) -> None:
        """Store the outcome, and by that marks the run as finished: to be called last."""
        self._write_json(self.result_path, dataclasses.asdict(result))

    def read_result(self) -> RunResult | None:
        """Return the outcome; None of a run that has not finished.

        Raises:
            UsageError: the file is no result.
        """
        stored = self._read_json(self.result_path)
        if stored is None:
            return None
        try:
            return RunResult.from_json(stored)
        except ValueError as error:
            raise UsageError(
                str(self.result_path), found=f"no complete result ({error})", expected="a run's result"
            ) from error

    # predictions.npz, features.npz

    def write_predictions(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Store the target's labels, (n,), -1 where unknown, and class probabilities, (n, r)."""
        with atomic_file(self.predictions_path) as file:
            np.savez(file, labels=labels.astype(np.int64), probabilities=probabilities.astype(np.float32))

    def read_predictions(self) -> Predictions | None:
        """Return the stored predictions, None before there are any.

        Raises:
            UsageError: the file is damaged, or holds something else.
        """
        arrays = _read_arrays(self.predictions_path, {"labels": "i1", "probabilities": "f2"})
        if arrays is None:
            return None
        labels, probabilities = arrays["labels"], arrays["probabilities"]
        if len(labels) != len(probabilities) or labels.max(initial=-1) >= probabilities.shape[1]:
            found = f"{len(labels)} labels up to {labels.max(initial=-1)}, probabilities of shape {probabilities.shape}"
            raise UsageError(str(self.predictions_path), found=found, expected=_A_RUNS_ARRAYS)
        return Predictions(labels, probabilities)

    def write_features(
        self,
        moment: Literal["warmup", "final"],
        source: np.ndarray,
        target: np.ndarray,
        *,
        source_labels: np.ndarray,
        target_labels: np.ndarray,
    ) -> None:
        """Add the features of one moment to those already stored.

        Args:
            moment: `warmup` at the end of warm-up, `final` after the last step.
            source, target: (n_s, D) and (n_t, D).
            source_labels, target_labels: (n_s,) and (n_t,), -1 where unknown; the same samples at both moments.
        """
        arrays: dict[str, Any] = _read_arrays(self.features_path, _FEATURES) or {}
        arrays[f"source_{moment}"] = source.astype(np.float32)
        arrays[f"target_{moment}"] = target.astype(np.float32)
        arrays["source_labels"] = source_labels.astype(np.int64)
        arrays["target_labels"] = target_labels.astype(np.int64)
        with atomic_file(self.features_path) as file:
            np.savez(file, **arrays)

    def read_features(self) -> Features | None:
        """Return the stored features, None before there are any.

        Raises:
            UsageError: the file is damaged, or holds something else.
        """
        arrays = _read_arrays(self.features_path, _FEATURES)
        if arrays is None:
            return None
        lengths = {name: len(array) for name, array in arrays.items()}
        if any(lengths[f"{name.partition('_')[0]}_labels"] != length for name, length in lengths.items()):
            raise UsageError(str(self.features_path), found=f"rows {lengths}", expected=_A_RUNS_ARRAYS)
        return Features(**arrays)

    def _write_json(self, path: Path, value: Any) -> None:
        with atomic_file(path) as file:
            file.write(_json_bytes(value, indent=2) + b"\n")

    def _read_json(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UsageError(str(path), found=f"no JSON ({error})", expected="a JSON object") from error
        if not isinstance(stored, dict):
            raise UsageError(str(path), found=type(stored).__name__, expected="a JSON object")
        return stored


def _read_arrays(path: Path, kinds: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file by name, None where there is no file.

    Args:
        kinds: by name the kind and the number of dimensions; those for which there is a `?` may be missing.

    Raises:
        UsageError: the file is damaged, or an array is missing, or of another kind.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in kinds if name in stored}
    except Exception as error:  # zlib, zipfile and NumPy have no common ancestor for what damage makes them raise
        found = f"a damaged file ({type(error).__name__}: {error})"
        raise UsageError(str(path), found=found, expected=_A_RUNS_ARRAYS) from error
    for name, kind in kinds.items():
        array = arrays.get(name)
        if array is None and "?" not in kind:
            raise UsageError(str(path), found=f"no array {name}", expected=_A_RUNS_ARRAYS)
        if array is not None and f"{array.dtype.kind}{array.ndim}" != kind[:2]:
            found = f"{name} of type {array.dtype} and shape {array.shape}"
            raise UsageError(str(path), found=found, expected=_A_RUNS_ARRAYS)
    return arrays


def file_name(text: str) -> str:
    """Return the text with `_` for characters that do not belong into a file's or a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", text)


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _as_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Send a value through TOML and back, so that a tuple equals the list and a Path the string that it is stored as.

    Flat.
    """
    return flat_settings(tomllib.loads(tomli_w.dumps(_toml_table(config))))


def _toml_table(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _toml_value(value) for name, value in config.items() if value is not None}


def _toml_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _toml_table(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_toml_value(item) for item in value]
    return value


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(_json_value(value), allow_nan=False, indent=indent, ensure_ascii=False).encode()


def _json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy and torch, arrays and scalars alike
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the checkout's commit, with `-dirty` if files differ from it; None if this file is not under version
    control.
    """
    here = Path(__file__)
    try:
        # An installed package may lie inside somebody else's repository, whose revision would say nothing.
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=40"]):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=30, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

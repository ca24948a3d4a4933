"""`python -m gsda_fast.embed TASK|FOLDER`: features of a frozen backbone for every image, once, in files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from msgspec import Meta
from rich.console import Console

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import FilesDone, plain_console, progress_bars
from gsda_fast.data.benchmarks import BENCHMARKS, EMBEDDED, Orientation, Preprocessing
from gsda_fast.data.domains import ImageDomain, default_root, open_domain, open_folder
from gsda_fast.data.embeddings import digest_of_table, write_table
from gsda_fast.data.sampling import stored_augmentation
from gsda_fast.errors import UsageError
from gsda_fast.files import (
    FolderLock,
    atomic_file,
    file_state,
    naming_what_cannot_be_written,
    new_file,
    write_at,
)
from gsda_fast.options import Device

if TYPE_CHECKING:
    import torch
    from torch import nn

_FOLDER_TASK = "folder"
_VIEW_SEED = 2020
_SAVED_EVERY = 16  # batches: where an interrupted call goes on


@dataclass(frozen=True)
class EmbedSettings:
    """Compute features of a frozen backbone for every image of a task's domains, or of a folder."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK|FOLDER")]
    """A task, or a folder: of class folders, or of images without labels."""
    backbone: str = "efficientnet-lite0"
    """As for training: efficientnet-lite0, timm:NAME, or a classification model of torchvision."""
    weights: str = "IMAGENET1K_V1"
    """Its weights: a name, the path of a file, or none. timm's own are called pretrained."""
    views: Annotated[int, Meta(ge=0)] = 0
    """Augmented views of each image, beside its centre; training then takes one at random."""
    domains: Annotated[tuple[str, ...], UNSAID] = ()
    """Domains of the task; all of them if none is given."""
    output: Annotated[Path | None, UNSAID] = None
    """Folder for the files; for a task one in the cache, where training looks for them, if not given; for a folder,
    `embeddings`."""
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder of the data set; the environment variable GSDA_DATA if not given."""
    orientation: Orientation = "exif"
    """Turn photos as their EXIF orientation says, or use their pixels as they are stored."""
    batch_size: Annotated[int, Meta(ge=0)] = 0
    """Images in a batch; 0: 128 on a GPU, 16 on a CPU, whose memory allocator makes more of them slower."""
    device: Device = "auto"
    """Where to compute; auto: the GPU if there is one."""
    workers: Annotated[int, Meta(ge=0)] = 0
    """Threads that decode images; 0: the usable cores."""
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of PyTorch; 0: PyTorch's choice."""


def embed(settings: EmbedSettings, progress: FilesDone | None = None) -> list[Path]:
    """Compute what is not there yet, and return the files of features, one for each domain.

    Args:
        settings: see there. progress: called after each batch.

    Raises:
        UsageError: data, a backbone or weights that are not there or do not fit, or a folder that cannot be written,
            or that another process writes into.
        TrainingError: the disk is full, or fails, on the way; the same call goes on from there.
    """
    # Here and below, so that --help need not wait for PyTorch.
    import torch

    from gsda_fast.model import FEATURES, LENET, ModelSettings, build_backbone, fetch_weights, input_format

    if settings.backbone in (LENET, FEATURES):
        raise UsageError("--backbone", found=settings.backbone, expected="a network for colour images")
    if min(settings.views, settings.batch_size, settings.workers, settings.threads) < 0:
        raise UsageError("options", found="a negative number", expected="whole numbers >= 0")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", found="cuda", expected="cpu or auto: PyTorch finds no CUDA device here")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    domains, preprocessing = _domains(settings)
    model = ModelSettings(settings.backbone, settings.weights)
    fetch_weights(model)
    wanted = input_format(settings.backbone)
    backbone, dim = build_backbone(model)
    if wanted is not None:
        preprocessing = preprocessing.for_backbone(wanted.side, wanted.mean, wanted.std)
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    network = _Network(backbone, dim, torch.device("cuda" if on_gpu else "cpu"))
    output = settings.output or _default_output(settings)
    paths = {output / f"{domain.name}.npy": domain for domain in domains}
    made_from = {path: _digest(domain, network, preprocessing, settings.views) for path, domain in paths.items()}
    # What is there already can be used by many at once, and be where nobody may write.
    if any(digest_of_table(path) != made_from[path] for path in paths):
        with naming_what_cannot_be_written(output):
            output.mkdir(parents=True, exist_ok=True)
            with FolderLock(output):
                for path, domain in paths.items():
                    if digest_of_table(path) != made_from[path]:
                        _embed_domain(domain, path, made_from[path], network, preprocessing, settings, progress)
    return list(paths)


def _default_output(settings: EmbedSettings) -> Path:
    return default_root(settings.what + EMBEDDED) if settings.what in BENCHMARKS else Path("embeddings")


def _domains(settings: EmbedSettings) -> tuple[Sequence[ImageDomain], Preprocessing]:
    benchmark = BENCHMARKS.get(settings.what)
    if benchmark is None or not benchmark.domains:
        folder = Path(settings.what)
        if not folder.is_dir():
            expected = f"a folder of images, or one of {', '.join(name for name, b in BENCHMARKS.items() if b.domains)}"
            raise UsageError("TASK|FOLDER", found=f"'{settings.what}'", expected=expected)
        return [open_folder(folder.resolve(), settings.orientation)], BENCHMARKS[_FOLDER_TASK].preprocessing
    if benchmark.preprocessing.channels != 3:
        raise UsageError("TASK|FOLDER", found=settings.what, expected="a task whose samples are colour images")
    names = settings.domains or tuple(facts.name for facts in benchmark.domains)
    domains = [
        open_domain(benchmark.name, name, settings.data_root, orientation=settings.orientation) for name in names
    ]
    from gsda_fast.data.verify import require_readable

    for domain in domains:
        require_readable(benchmark.name, domain, workers=settings.workers)
    return domains, benchmark.preprocessing


class _Network:
    """A frozen backbone on its device."""

    def __init__(self, backbone: nn.Module, dim: int, device: torch.device) -> None:
        import torch

        from gsda_fast.training.distributed import digest

        self.digest, self.dim, self.device = digest(backbone.state_dict()), dim, device
        self._backbone = backbone.to(device).to(memory_format=torch.channels_last).eval()

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Return (N, C, H, W) -> (N, dim) float32."""
        import torch

        with torch.inference_mode():
            return self._backbone(images).flatten(1).float().cpu().numpy()


class _Rows:
    """The rows of a domain on their way: an .npy file that the disk has set room aside for.

    It is not mapped: where the disk lacks room, or somebody cuts the file, writing to a mapped one ends the process
    without a word.

    Args:
        path: of the file. shape: (V, n, D). keep: what an earlier call has written.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], keep: bool) -> None:
        header = BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
        self._shape, self._start = shape, header.tell()
        size = self._start + 4 * int(np.prod(shape))
        self.kept = keep and _is_file_of(path, header.getvalue(), size)
        self._file = path.open("r+b") if self.kept else new_file(path)
        write_at(self._file.fileno(), memoryview(header.getvalue()), 0)
        os.posix_fallocate(self._file.fileno(), 0, size)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, view: int, first: int, rows: np.ndarray) -> None:
        """Write (m, D) rows of a view, from the sample `first` on."""
        _, count, dim = self._shape
        place = self._start + 4 * dim * (view * count + first)
        write_at(self._file.fileno(), np.ascontiguousarray(rows, dtype=np.float32).data, place)

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self._file.fileno())


def _is_file_of(path: Path, header: bytes, size: int) -> bool:
    """Return whether a file, and no link to one, begins like that and is that long."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _embed_domain(
    domain: ImageDomain,
    path: Path,
    made_from: str,
    network: _Network,
    preprocessing: Preprocessing,
    settings: EmbedSettings,
    progress: FilesDone | None,
) -> None:
    from gsda_fast.data.torch_loader import TorchLoader

    path.with_suffix(".json").unlink(missing_ok=True)  # from now on these are no finished rows
    partial, journal = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.done")
    count, views = len(domain), 1 + settings.views
    done = _done(journal, made_from, count)
    batch_size = settings.batch_size or (128 if network.device.type == "cuda" else 16)
    loader = TorchLoader(
        domain, domain, preprocessing, batch_size=batch_size, device=network.device, workers=settings.workers
    )
    with closing(loader), _Rows(partial, (views, count, network.dim), keep=done > 0) as rows:
        done = done if rows.kept else 0
        if done < count:
            centres = loader.evaluate("target", np.arange(done, count))
            for number, (images, index) in enumerate(centres, start=1):
                first, last = int(index[0]), int(index[-1]) + 1
                rows.write(0, first, network(images))
                if views > 1:
                    drawn = [
                        stored_augmentation(_VIEW_SEED, range(view * count + first, view * count + last), preprocessing)
                        for view in range(1, views)
                    ]
                    crops = loader.augmented("target", np.arange(first, last), drawn)
                    for view, augmented in enumerate(crops, start=1):
                        rows.write(view, first, network(augmented))
                if progress is not None:
                    progress(domain.name, last, count)
                if number % _SAVED_EVERY == 0:
                    _save(rows, journal, made_from, last)
        _save(rows, journal, made_from, count)
    partial.replace(path)
    write_table(path, made_from, domain.paths, domain.labels, domain.classes)
    journal.unlink(missing_ok=True)


def _digest(domain: ImageDomain, network: _Network, preprocessing: Preprocessing, views: int) -> str:
    """What the rows are a function of: the files, as far as names, sizes and times tell, weights and settings."""
    settings = {"recipe": asdict(preprocessing), "views": views, "classes": domain.classes}
    if domain.orientation != "stored":  # as all was read before there was a choice, so that its digest stays
        settings["orientation"] = domain.orientation
    found = hashlib.sha256(f"{json.dumps(settings)} {network.digest}".encode())
    for sample, (name, label) in enumerate(zip(domain.paths, domain.labels.tolist())):
        state = "" if domain.packed is not None else file_state(domain.file(sample))
        found.update(f"{name}\0{label}\0{state}\0".encode())
    if domain.packed is not None:
        found.update(repr([shard.sha256 for shard in domain.packed.shards]).encode())
    return found.hexdigest()


def _save(rows: _Rows, journal: Path, made_from: str, done: int) -> None:
    rows.sync()
    with atomic_file(journal) as file:
        file.write(json.dumps({"digest": made_from, "done": done}).encode())


def _done(journal: Path, made_from: str, count: int) -> int:
    """Return how many samples of `count` an earlier call is done with, 0 where its notes are none."""
    try:
        written = json.loads(journal.read_text(encoding="utf-8"))
        done = written["done"] if written["digest"] == made_from else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return done if type(done) is int and 0 < done <= count else 0


def with_features(arguments: list[str], console: Console) -> list[str]:
    """Replace `TASK ... --features` by the task of that name on features, once these are computed.

    Args:
        arguments: a command line of training or of a suite, the task first. Its data root is that of the images.
        console: where progress is shown.

    Raises:
        UsageError: a task without one on features, several processes, or what `embed` raises.
    """
    if "--features" not in arguments:
        return arguments
    task, rest = arguments[0], [argument for argument in arguments[1:] if argument != "--features"]
    if task + EMBEDDED not in BENCHMARKS:
        known = [name.removesuffix(EMBEDDED) for name in BENCHMARKS if name.endswith(EMBEDDED)]
        raise UsageError("--features", found=f"the task {task}", expected=" or ".join(known))
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            "--features",
            found=f"{processes} processes",
            expected=f"the task {task}{EMBEDDED}, after `{program('embed')} {task}`",
        )
    data_root = None
    if "--data-root" in rest[:-1]:
        place = rest.index("--data-root")
        data_root, rest = Path(rest[place + 1]), rest[:place] + rest[place + 2 :]
    with progress_bars(console) as progress:
        embed(EmbedSettings(task, data_root=data_root), progress)
    return [task + EMBEDDED, *rest]


def run(arguments: list[str], console: Console) -> None:
    """Compute what the command line asks for and say where it lies."""
    settings = parse_command_line(lambda: tyro.cli(EmbedSettings, args=arguments, prog=program("embed")))
    with progress_bars(console) as progress:
        paths = embed(settings, progress)
    for path in paths:
        console.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", soft_wrap=True)
    if settings.what in BENCHMARKS and settings.output is None:
        console.print(f"train with: {program('train')} {settings.what}{EMBEDDED}", soft_wrap=True)


def main() -> None:
    run(sys.argv[1:], plain_console())


if __name__ == "__main__":
    run_command(main)

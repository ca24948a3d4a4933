"""Reading files out of packages, without installing or unpacking them: .deb, .tgz, and .rcc and .json inside these.

A file is named by its path in the package; one inside a file inside it by both, with ``!`` between:
``usr/share/x/a.rcc!images/b.webp`` in a Qt resource file, ``json/set.json!name`` for an icon of an icon set.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gsda_fast.errors import UsageError

INSIDE = "!"

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_RCC_COMPRESSED, _RCC_FOLDER, _RCC_ZSTANDARD = 1, 2, 4


def read_members(package: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Read files of a package, in the order in which they lie in it, in one pass.

    Args:
        package: a .deb or .tgz file. wanted: names, as this module writes them.

    Yields:
        (name, content). An icon comes as an SVG document.

    Raises:
        UsageError: the package is damaged or lacks one of them.
    """
    left = set(wanted)
    outer = {name.partition(INSIDE)[0] for name in wanted}
    try:
        with package.open("rb") as file, _tar(package, file) as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                content = tar.extractfile(member) if path in outer and member.isfile() else None
                if content is None:
                    continue
                for name, found in _open(path, content.read(), left):
                    left.discard(name)
                    yield name, found
    except (tarfile.TarError, OSError, EOFError, struct.error, zlib.error, ValueError, KeyError) as error:
        raise UsageError(
            str(package), found=f"a damaged file ({type(error).__name__}: {error})", expected="a whole package"
        ) from error
    if left:
        raise UsageError(str(package), found=f"nothing named {sorted(left)[0]} in it", expected="the release listed")


def _open(path: str, content: bytes, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted ones among a file and what is in it."""
    inner = {name: name.partition(INSIDE)[2] for name in wanted if name.partition(INSIDE)[0] == path}
    if path.endswith(".rcc"):
        entries = read_rcc(content, set(inner.values()))
        yield from ((name, entries[inside]) for name, inside in inner.items() if inside in entries)
    elif path.endswith(".json"):
        icons = json.loads(content)
        yield from ((name, icon_svg(icons, inside)) for name, inside in inner.items() if inside in icons["icons"])
    else:
        yield path, content


def _tar(package: Path, file: IO[bytes]) -> tarfile.TarFile:
    """Return the tar archive in a package, at whose start the file is left."""
    if package.suffix != ".deb":
        return tarfile.open(fileobj=file, mode="r|*")
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("no ar archive")
    while header := file.read(_AR_HEADER):
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=file, mode="r|*")
        file.seek(size + size % 2, 1)  # members start at even offsets
    raise ValueError("no data.tar")


def read_rcc(content: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """Return files of a Qt binary resource file.

    The format: a header (``qres``, version, offsets of tree, data and names); a tree of fixed-size nodes, which point
    at names (length, hash, UTF-16) and either at their children or at data (length, bytes).

    Args:
        content: of the .rcc file. wanted: paths in it.

    Returns:
        Content by path, of those that are there.

    Raises:
        ValueError, struct.error: it is no such file, or has a compression that Python 3.11 lacks.
    """
    magic, version, tree, data, names = struct.unpack_from(">4s4I", content)
    if magic != b"qres":
        raise ValueError("no Qt resource file")
    node_size = 14 if version < 2 else 22
    found: dict[str, bytes] = {}
    pending = [(0, "")]
    while pending:
        node, folder = pending.pop()
        start = tree + node * node_size
        name_offset, flags = struct.unpack_from(">IH", content, start)
        path = folder
        if node:  # the root has no name
            (length,) = struct.unpack_from(">H", content, names + name_offset)
            text = names + name_offset + 6
            name = content[text : text + 2 * length].decode("utf-16-be")
            path = f"{folder}/{name}" if folder else name
        if flags & _RCC_FOLDER:
            count, first = struct.unpack_from(">2I", content, start + 6)
            pending += [(child, path) for child in range(first, first + count)]
        elif path in wanted:
            (offset,) = struct.unpack_from(">I", content, start + 10)
            (length,) = struct.unpack_from(">I", content, data + offset)
            raw = content[data + offset + 4 : data + offset + 4 + length]
            if flags & _RCC_ZSTANDARD:
                raise ValueError(f"{path} is compressed with Zstandard")
            found[path] = zlib.decompress(raw[4:]) if flags & _RCC_COMPRESSED else raw
    return found


def icon_svg(icons: Mapping[str, Any], name: str) -> bytes:
    """Return an icon of an Iconify icon set as an SVG document, black where it has no colour of its own.

    Args:
        icons: the set, as its JSON file has it. name: of the icon.

    Returns:
        The document, UTF-8; its longer side is 240.
    """
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    scale = 240 / max(width, height)
    body = icon["body"].replace("currentColor", "#000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'width="{width * scale:.0f}" height="{height * scale:.0f}" viewBox="{left} {top} {width} {height}">'
        f"{body}</svg>"
    ).encode()

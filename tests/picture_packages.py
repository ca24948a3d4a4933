"""Tiny packages of pictures, written as the real ones are: .deb (ar, tar.xz), .rcc inside it, .tgz with icon sets."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from gsda_fast.data.pictures.build import Picture
from gsda_fast.data.pictures.packages import Package


def png(colour: str, size: tuple[int, int] = (40, 30), *, cut_out: bool = True) -> bytes:
    """A disc in the middle half, or the colour all over."""
    image = Image.new("RGBA", size, colour)
    if cut_out:
        image.putalpha(0)
        image.paste(Image.new("RGBA", (size[0] // 2, size[1] // 2), colour), (size[0] // 4, size[1] // 4))
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue()


def tar(files: Mapping[str, bytes], mode: str, prefix: str = "") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return written.getvalue()


def deb(files: Mapping[str, bytes]) -> bytes:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files, "w:xz", "./")}
    written = b"!<arch>\n"
    for name, content in parts.items():
        written += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        written += b"\n" * (len(content) % 2)
    return written


def rcc(files: Mapping[str, bytes], version: int = 3, compressed: tuple[str, ...] = ()) -> bytes:
    """A Qt resource file: nodes of a level lie together, children of one folder one after another."""
    names, data, nodes = b"", b"", []
    tree: dict[str, object] = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})  # type: ignore[assignment]
        place[name] = content
    pending: list[tuple[str, str, object]] = [("", "", tree)]
    while pending:
        path, name, content = pending.pop(0)
        name_offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(content, dict):
            first = len(nodes) + 1 + len(pending)
            nodes.append(struct.pack(">IHII", name_offset, 2, len(content), first))
            pending += [(f"{path}/{key}" if path else key, key, each) for key, each in content.items()]
        else:
            assert isinstance(content, bytes)
            packed = path in compressed
            stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
            nodes.append(struct.pack(">IHHHI", name_offset, int(packed), 0, 0, len(data)))
            data += struct.pack(">I", len(stored)) + stored
    if version >= 2:
        nodes = [node + bytes(8) for node in nodes]
    body = b"".join(nodes)
    return struct.pack(">4s4I", b"qres", version, 20, 20 + len(body), 20 + len(body) + len(data)) + body + data + names


ICONS = {
    "prefix": "set",
    "height": 8,
    "width": 8,
    "icons": {
        "dog": {"body": '<path fill="currentColor" d="M1 1h6v6H1z"/>'},
        "cat": {"body": '<circle cx="4" cy="4" r="3"/>', "width": 16},
    },
}


def write_packages(folder: Path) -> tuple[list[Package], list[Picture]]:
    """Three packages, and the list of six pictures in them: two domains of two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = deb({"usr/stamps/dog.png": png("brown"), "usr/stamps/cat.png": png("grey", cut_out=False), "x/y": b"-"})
    resources = rcc(
        {"images/dogs/rex.png": png("red"), "images/cats/tom.png": png("blue")}, compressed=("images/dogs/rex.png",)
    )
    games = deb({"usr/share/games.rcc": resources})
    icons = tar({"package/json/set.json": json.dumps(ICONS).encode(), "package/readme": b"-"}, "w:gz")
    packages = [
        _write(folder, "stamps", "1-2", "apt-get", "stamps_1-2_all.deb", photos),
        _write(folder, "games", "3:1", "apt-get", "games_3%3a1_all.deb", games),
        _write(folder, "@icons/json", "2.0", "npm", "icons-json-2.0.tgz", icons),
    ]
    pictures = [
        Picture("icon", "cat", "set--cat", "@icons/json", "package/json/set.json!cat", "MIT"),
        Picture("icon", "dog", "set--dog", "@icons/json", "package/json/set.json!dog", "MIT"),
        Picture("photo", "cat", "g--tom", "games", "usr/share/games.rcc!images/cats/tom.png", "CC0-1.0"),
        Picture("photo", "cat", "s--cat", "stamps", "usr/stamps/cat.png", "GPL-2.0-or-later"),
        Picture("photo", "dog", "g--rex", "games", "usr/share/games.rcc!images/dogs/rex.png", "CC0-1.0"),
        Picture("photo", "dog", "s--dog", "stamps", "usr/stamps/dog.png", "GPL-2.0-or-later"),
    ]
    return packages, pictures


def _write(folder: Path, name: str, version: str, client: str, file: str, content: bytes) -> Package:
    (folder / file).write_bytes(content)
    return Package(name, version, client, file, len(content), hashlib.sha256(content).hexdigest())  # type: ignore[arg-type]

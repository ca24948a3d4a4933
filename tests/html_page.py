"""A page as a browser sees it: what it would load, and the words that it would show."""

import base64
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.images: dict[str, bytes] = {}
        self.scripts = 0
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.references += [given[name] for name in ("src", "href", "srcset", "data") if name in given]
        self.scripts += tag == "script"
        if tag == "img":
            self.images[given["alt"]] = base64.b64decode(given["src"].removeprefix("data:image/png;base64,"))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

"""What the pages of a run and of a suite are made of."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from gsda_fast.files import atomic_file
from gsda_fast.results import plots


@dataclass(frozen=True)
class Panel:
    """One plot of a page.

    Attributes:
        source: a data URL, so that the page needs no other file.
        alternative: what it shows, for who cannot see it.
        starts_row: whether it stands at the left, whatever was before it.
    """

    source: str
    alternative: str
    starts_row: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read the plots, and the plots, as many in a row as fit or two."""

    title: str
    text: str
    panels: Sequence[Panel]
    in_pairs: bool = False


def panel(figure: Figure | None, path: Path, alternative: str, starts_row: bool = False) -> Panel | None:
    """The plot for a page, kept as the PNG file `path` as well; None if there is none."""
    if figure is None:
        return None
    image = plots.png(figure)
    with atomic_file(path) as file:
        file.write(image)
    return Panel(f"data:image/png;base64,{base64.b64encode(image).decode()}", alternative, starts_row)


def drawn(panels: Sequence[Panel | None]) -> list[Panel]:
    """Those that there are."""
    return [panel for panel in panels if panel is not None]


def template(name: str) -> jinja2.Template:
    """A template beside this file, with the filters `percent` and `duration`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1f}"
    environment.filters["duration"] = _duration
    return environment.get_template(name)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

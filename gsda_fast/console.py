"""What people see: consoles on which a name is text and nothing else, progress bars, names in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gsda_fast.errors import visible

FilesDone = Callable[[str, int, int], None]
"""Called with (what is worked on, files done, files in all)."""


class VisibleConsole(Console):
    """A console for text in which names of files and classes occur: what a terminal would obey is shown as escapes."""

    def render_str(self, text: str, **more: Any) -> Text:
        """Render a string: every one that is printed, a table's cells among them, comes by here."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **more)

    def on_broken_pipe(self) -> None:
        """Leave it to `run_command`: by itself rich would end the process, with another code."""
        raise BrokenPipeError


def plain_console(stderr: bool = False) -> Console:
    """Return a console that prints names as they are.

    Rich would take the `[raw]` of a path for a style and its `:key:` for an emoji.
    """
    return VisibleConsole(markup=False, emoji=False, stderr=stderr)


def spreadsheet_text(name: str) -> str:
    """Return a name for a table, with control characters as escapes.

    An apostrophe goes before what a spreadsheet would take for a formula.
    """
    shown = visible(name)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def echo(text: str) -> None:
    """Print a line on standard output in which names of files and classes may occur."""
    print(visible(text))


def counted(number: int, name: str) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def duration(seconds: float) -> str:
    """Return a time in words, such as 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def progress_bars(console: Console) -> Iterator[FilesDone]:
    """Show a bar for each thing that is worked on, where there is a terminal to show it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(visible(name), total=total)
            progress.update(bars[name], completed=done)

        yield show

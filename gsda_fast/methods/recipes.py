"""How methods write down what their authors ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMAGE_TASKS = ("visda", "office31", "office31-partial", "office-home", "office-home-partial", "folder")
"""The tasks with photographs and a pretrained backbone, on which the compared methods were published."""


def on_images(**tables: Mapping[str, Any]) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Return the same settings, by table, for every task with photographs; digits keep the common recipe."""
    return {task: dict(tables) for task in IMAGE_TASKS}

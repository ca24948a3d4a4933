"""Files that fail in the middle of a run: each gives its slot to another sample of its class, and the run goes on."""

import threading
import warnings

import numpy as np

from gsda_fast.data.batches import Role
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import IntArray
from gsda_fast.errors import FileWarning, UsageError

MEAN_COLOUR = "an image of the mean colour"
"""What takes the place of a sample in an evaluation, which must score each of them."""

MOST_FAILED = 100
"""Files that may fail in a process of a run before it ends."""


class Substitutes:
    """Which samples failed, and who takes their place. Loaders share the rule, so a place has the same one in all.

    Args:
        domains: source and target. most: files that may fail; 0: the first one ends the run.
    """

    def __init__(self, domains: dict[Role, ImageDomain], most: int = 0) -> None:
        self._domains, self._most = domains, most
        self._failed: dict[tuple[Role, int], str] = {}
        self._lock = threading.Lock()

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(full path, what is wrong) of every file that failed so far, in the order in which they did."""
        with self._lock:
            failed = list(self._failed.items())
        return [(self._domains[role].file(sample), message) for (role, sample), message in failed]

    def has_failed(self, role: Role, sample: int) -> bool:
        """Tell whether a sample has failed before."""
        return (role, sample) in self._failed

    def note(self, role: Role, sample: int, error: UsageError) -> None:
        """Take note of a failure, with a `FileWarning` when it is a sample's first.

        Raises:
            UsageError: `error` itself where none is borne with, or that there are too many.
        """
        with self._lock:
            if (role, sample) in self._failed:
                return
            # A shard that cannot be read is no image among many.
            if not self._most or self._domains[role].packed is not None:
                raise error
            if len(self._failed) == self._most:
                raise UsageError(
                    "data",
                    found=f"more than {self._most} files that failed since the run began, the last of them {error}",
                    expected=f"at most {self._most}",
                    remedy="see whether the disk is well; the same command goes on from the last checkpoint",
                ) from error
            self._failed[role, sample] = error.found
        instead = f"another sample of its class takes its place, in an evaluation {MEAN_COLOUR}"
        message = f"{error.what}: {error.found}; {instead}"
        warnings.warn(message, FileWarning, stacklevel=2)

    def of(self, role: Role, sample: int, labels: IntArray | None) -> int:
        """Return the sample in the place of one that failed: the next of its class that has not.

        Args:
            labels: (n,) of the domain, by which samples are alike: of the target the pseudo-labels, never its own.
                None: all are.

        Raises:
            UsageError: none is left.
        """
        alike = np.arange(len(self._domains[role])) if labels is None else np.flatnonzero(labels == labels[sample])
        turned = np.roll(alike, -int(np.searchsorted(alike, sample, side="right")))
        for candidate in turned.tolist():
            if (role, candidate) not in self._failed:
                return candidate
        raise UsageError(
            str(self._domains[role].root),
            found=f"no readable image of the class of {self._domains[role].file(sample)}",
            expected="at least one of each class",
        )

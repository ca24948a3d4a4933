"""Training on the source alone, to which terms can be added."""

from __future__ import annotations

from collections.abc import Iterator

from gsda_fast.data.batches import Batch
from gsda_fast.methods.base import Method, Step, Update


class SourceOnly(Method):
    """The source's cross-entropy. With terms of both domains, such as the target's entropy, it is a method itself."""

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        if not self.added:
            yield from self.source_updates(batch, step)
            return
        yield self.encoder_update(self.outputs(batch), batch, step)

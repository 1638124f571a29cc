"""SIGTERM and Ctrl-C end a run after the iteration under way, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("arr_fast")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether someone asked the run to stop.

    Attributes:
        asked: True from the first signal on.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context signals ask; a second Ctrl-C raises KeyboardInterrupt at once."""
        try:
            before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        except ValueError:
            # Not the main thread: whoever runs the trainer there handles signals.
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("%s: stopping after this iteration", signal.Signals(number).name)

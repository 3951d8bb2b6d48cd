"""Ctrl-C, kept until it is obeyed."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from fedfuse.core.loop import Callback, Federation


class Interrupt(Callback):
    """Asks once more, at the end of the round, for an interrupt that was lost on the way.

    Python raises KeyboardInterrupt in whatever runs just then, and C code that takes any exception for "there is no
    such attribute" swallows it without a word: two of some 150 interrupts of runs whose rounds took 10 ms.
    Only Python's own handler is preceded: somebody else's may have reasons not to raise.
    """

    def __init__(self) -> None:
        self.asked = self.listens = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.listens:
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.default_int_handler(number, frame)

    def round(self, federation: Federation) -> None:
        """Obey what was asked since.

        Raises
        ------
        KeyboardInterrupt
            If there was an interrupt, and the run goes on all the same.
        """
        if self.asked:
            raise KeyboardInterrupt

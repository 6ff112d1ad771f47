"""SIGTERM, SIGINT and SIGUSR1 as a request to save and stop, which the training loop looks at between steps.

The first signal is only noted. After it the signals have their original effect, so that a second one ends the
process at once, also in the middle of a long operation. Under a launcher (several processes) repeats are passed over:
launchers send one signal several times.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from loram.progress import Progress
from loram.training.processes import process_count

logger = logging.getLogger(__name__)
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopRequest:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Listen while the block runs. Outside the main thread Python cannot listen; then nothing is ever requested."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        if request:
            return
        request.name = signal.Signals(number).name
        if process_count() == 1:
            for each in numbers:
                signal.signal(each, signal.SIG_DFL)
        logger.warning("%s: saving at the next step, then stopping; a second signal quits at once", request.name)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stoppable(Progress):
    """A progress display that is a place to stop at: `interruption` gives the error to raise, or None."""

    def __init__(self, shown: Progress, interruption: Callable[[], Exception | None]) -> None:
        self._shown, self._interruption = shown, interruption

    def begin(self, label: str, total: int) -> None:
        """A piece of work starts."""
        self._shown.begin(label, total)

    def advance(self, amount: int = 1, **figures: float) -> None:
        """`amount` steps are done; raises where somebody has asked to stop."""
        self._shown.advance(amount, **figures)
        error = self._interruption()
        if error is not None:
            raise error

    def end(self) -> None:
        """The piece of work is over."""
        self._shown.end()

    def ask(self, question: str) -> bool | None:
        """A person's yes or no."""
        return self._shown.ask(question)

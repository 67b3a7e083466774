# SPDX-License-Identifier: Apache-2.0
"""Stopping: a signal lets the step in hand finish, so that a run can be saved before it ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal arrived."""
        return self.signal is not None

    def tell(self) -> None:
        """Take note that another process was asked."""
        self.signal = self.signal or signal.SIGTERM

    def __call__(self, number: int, _: object) -> None:
        """Hear a signal: the first asks, a second interrupt ends things at once."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted twice")
        self.signal = self.signal or number


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Hear SIGINT and SIGTERM for the length of a block, and pass one on at its end.

    A signal that was ignored before stays ignored. Outside of the main thread nothing is heard.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if stop.signal is not None:
        signal.raise_signal(stop.signal)

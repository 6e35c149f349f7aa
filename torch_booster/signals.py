"""Signals during a harmful pass: their handlers, which may save a checkpoint, must not see w′."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["handlers_wait"]

# A pass that hangs must still meet its time limit.
TIMERS = {
    getattr(signal, name) for name in ("SIGALRM", "SIGVTALRM", "SIGPROF") if hasattr(signal, name)
}


@contextmanager
def handlers_wait() -> Generator[None]:
    """Context in which handlers of signals wait for its end.

    Lightning's, for one, saves the model when SLURM announces the end of a job. Timers and
    Python's own Ctrl-C do not wait: a pass that hangs can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    arrived: list[int] = []
    ended = False

    def note(number: int, frame: Any) -> None:
        if ended:  # a handler raised while the others were put back, and left this one in place
            waiting[number](number, frame)
        elif number not in arrived:
            arrived.append(number)

    def deliver() -> None:
        if arrived:
            try:
                signal.raise_signal(arrived.pop(0))
            finally:  # what one handler raises does not lose the next signal
                deliver()

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() - TIMERS}
    waiting: dict[int, Any] = {
        number: handler
        for number, handler in handlers.items()
        if callable(handler) and handler is not signal.default_int_handler
    }
    try:
        for number in waiting:
            signal.signal(number, note)
        yield
    finally:
        ended = True
        try:
            for number, handler in waiting.items():
                if signal.getsignal(number) is note:  # nobody has installed another meanwhile
                    signal.signal(number, handler)
        finally:
            deliver()

"""Ctrl-C, SIGTERM and SIGHUP end a study in order, in every phase: what was finished is reported, and within seconds.

    with interrupts.ending(report_so_far):        # what is done before the process ends, once
        ...
    interrupts.fail(StudyError("Ray died"))       # from any thread: the same, with exit code 2

Batch systems and Kubernetes send SIGTERM, a closed terminal or a lost connection SIGHUP. All of them raise
KeyboardInterrupt in the main thread, whatever it does. Where that thread does not come back from a library's code, a
second one does what is left to do and ends the process. A signal that is ignored, as under `nohup`, stays ignored.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from allocators.core.errors import StudyError


class Said(StudyError):
    """An error that was printed when it was found: what is left of this process may not live long enough."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING = (signal.SIGTERM, signal.SIGHUP)  # those that end a process that does not hear them
PATIENCE = 4.0  # seconds that the main thread has to come back from where it was
LONGEST = 9.0  # seconds after which the process ends, whatever is left to do


class _Interruption:
    """What became of this process: nothing, a signal, or an error that another thread found."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.error: StudyError | None = None
        self.deferring = 0  # blocks of `deferred` that the main thread is in
        self.deferred = False  # whether it is to be interrupted when it comes out of them
        self._untold = False  # whether the main thread has not heard of the error yet
        self.abandoned = False  # a library still runs threads, which its own clean-up would trip over
        self.watching = False  # between the beginning and the end of `watched`
        self.signals: tuple[signal.Signals, ...] = SIGNALS
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None

    @property
    def came(self) -> bool:
        return self.signal is not None or self.error is not None

    @property
    def may_leave(self) -> bool:
        """Whether the process may be ended: after an error a program that only called this one goes on."""
        return self.watching and (self.signal is not None or self.signals == SIGNALS)

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended; 2 after an error."""
        return 128 + self.signal if self.signal is not None else 2

    def note(self, *, signum: int | None = None, error: StudyError | None = None) -> bool:
        """False where it is not the first."""
        with self._lock:
            if self.came:
                return False
            self.signal, self.error, self._untold = signum, error, error is not None
        threading.Thread(target=self._guard, daemon=True).start()
        return True

    def tells_error(self) -> bool:
        """True once, where there is an error."""
        with self._lock:
            told, self._untold = self._untold, False
        return told

    def set_end(self, end: Callable[[], None] | None) -> None:
        with self._lock:
            self._end = end

    def end(self) -> None:
        """Does what is to be done before the process ends, once, in whichever thread comes first."""
        with self._lock:
            end, self._end = self._end, None
        if end is not None:
            end()

    def _guard(self) -> None:
        time.sleep(PATIENCE)
        threading.Thread(target=self._end_and_leave, daemon=True).start()
        time.sleep(LONGEST - PATIENCE)
        if self.may_leave:
            _leave(self.exit_code)

    def _end_and_leave(self) -> None:
        with self._lock:
            stuck = self.may_leave and self._end is not None
        if stuck:
            with contextlib.suppress(Exception):
                self.end()
            _leave(self.exit_code)


_now = _Interruption()


def _on_signal(signum: int, _: FrameType | None) -> None:
    if _now.tells_error() or _now.note(signum=signum):
        if not _now.deferring:
            raise KeyboardInterrupt
        _now.deferred = True


@contextlib.contextmanager
def watched(signals: tuple[signal.Signals, ...] = SIGNALS) -> Iterator[None]:
    """Inside the block the first of the signals raises KeyboardInterrupt; later ones do not disturb the end."""
    global _now
    if threading.current_thread() is not threading.main_thread():  # in a notebook's thread, say: they are not ours
        yield
        return
    _now = _Interruption()
    _now.watching, _now.signals = True, signals
    before = {number: signal.getsignal(number) for number in signals}
    install()
    try:
        yield
    finally:
        _now.watching = False
        for number, handler in before.items():
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, handler)


def install() -> None:
    """Again, after a library that took a signal for itself: Ray's own code aborts the process at SIGTERM."""
    if _now.watching and threading.current_thread() is threading.main_thread():
        for number in _now.signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _on_signal)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """An interruption comes at the end of the block, and not in the middle of what must not be left half done.

    A database, say, whose transaction was cut through stays locked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    now = _now
    now.deferring += 1
    try:
        yield
    finally:
        now.deferring -= 1
        if now.deferred and not now.deferring:
            now.deferred = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def ending(end: Callable[[], None]) -> Iterator[None]:
    """Where the block is left before its time, `end` is called once: by this thread or, if that hangs, by another.

    Raises the error that another thread found, in the place of the KeyboardInterrupt that it was told by.
    """
    _now.set_end(end)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what ended the block is the thing to hear of
            _now.end()
        if _now.error is not None:
            raise _now.error from None
        raise
    finally:
        _now.set_end(None)


def end() -> None:
    """Does at once what `ending` would do later: what follows may take its time."""
    with contextlib.suppress(Exception):
        _now.end()


def fail(error: StudyError) -> None:
    """Interrupts the main thread, from another one, to end the study with this error, which is printed now."""
    if _now.watching and _now.note(error=Said(str(error))):
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _thread.interrupt_main()


def abandon() -> None:
    """This process is to end without its libraries' own clean-up."""
    _now.abandoned = True


def came() -> bool:
    """Whether this process is being ended."""
    return _now.came


def ended() -> bool:
    """Whether a signal came that ends the process."""
    return _now.signal is not None


def exit_code() -> int:
    """Of the process that was interrupted."""
    return _now.exit_code if _now.came else 130


def leave(code: int) -> None:
    """Ends the process; after an interruption without the libraries' own clean-up, which may wait for what is dead."""
    if _now.came or _now.abandoned:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)

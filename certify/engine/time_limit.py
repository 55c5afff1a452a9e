"""A limit on the wall time of a call."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Stopped(BaseException):
    """Raised in a thread whose time is up."""


def run_within(seconds: float, work: Callable[[], _T]) -> _T:
    """Run ``work`` in a thread of its own and return its result.

    When the time is up, this returns at once and the thread is told to stop, which it does at the next step of Python
    code. State that belongs to the thread is gone with it, however it was left.

    Args:
        seconds: wall time.
        work: called once.

    Raises:
        TimeoutError: the time is up.
        BaseException: whatever ``work`` raises.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="certify-within", daemon=True)
    thread.start()
    try:
        return result.result(seconds)
    finally:
        if not result.done():
            threading.Thread(target=_stop, args=(thread,), daemon=True).start()


def _stop(thread: threading.Thread) -> None:
    """Raise ``_Stopped`` in a thread until it ends: callbacks of the garbage collector swallow it."""
    report = sys.unraisablehook

    def other(found: Any) -> None:
        if found.exc_type is not _Stopped:
            report(found)

    sys.unraisablehook = other
    while thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
        thread.join(1.0)
    sys.unraisablehook = report

"""Tells exceptions that a signal handler raised, in whatever code ran just then, from failures of that code."""

import signal
from functools import partial
from types import CodeType, TracebackType
from typing import Any


def is_of_signal(exc: BaseException) -> bool:
    """Whether an installed signal handler raised the exception: then the process is to end, and no message has failed."""
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    traceback: TracebackType | None = exc.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def _code(function: Any) -> CodeType | None:
    while isinstance(function, partial):
        function = function.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    function = getattr(function, "__func__", function)  # pyright: ignore[reportUnknownArgumentType]
    if not hasattr(function, "__code__"):
        function = getattr(function, "__call__", None)  # noqa: B004 - of an object that is callable
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None

"""Whether it was a signal that ended a handler, whose handling raises in the midst of whatever code runs just then."""

import signal
from functools import partial
from types import CodeType, TracebackType
from typing import Any


def is_of_signal(exc: BaseException) -> bool:
    """Whether one of the functions that are installed for signals has raised it: the process is to end, and no message is at fault."""
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

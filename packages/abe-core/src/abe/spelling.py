"""Warns of environment variables that are set but not read, because their names are misspelt."""

import difflib
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

_LIBRARY: Final = re.compile(r"abe(_backend_\w+)?(\.|\Z)")
_ELSEWHERE: Final = ("QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND", "ABSTRACT_BACKEND_DEBUG", "MESSAGE_QUEUE_BACKEND_DEBUG")
"""Variables of the library that are not settings of a backend."""

_FOREIGN: Final = re.compile(r"AWS_|.*_(SERVICE_(HOST|PORT(_.*)?)|PORT(_\d+_(TCP|UDP)(_\w+)?)?)\Z")
"""Variables of the AWS SDK, and of container platforms for a service (QUEUE_PORT_5672_TCP for one called "queue")."""

_UNITS: Final = ("_SECONDS", "_BYTES")


def warn(text: str) -> None:
    """Warn, at the line outside of this library that called it."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and _LIBRARY.match(frame.f_globals.get("__name__", "")):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, stacklevel=depth)


def warn_of_misspelt(known: Sequence[str], environ: Mapping[str, str]) -> None:
    """Warn of each variable whose name is similar to a known one that is not set, and of every unknown ``QUEUE_*``.

    Unknown variables with other prefixes, such as ``REDIS_``, may belong to other programs.

    Args:
        known: The variables that are read.
        environ: The variables that are set. No warning contains a value.
    """
    known = [*known, *_ELSEWHERE]
    unset = [name for name in known if not environ.get(name)]
    for name in environ:
        if name in known or not environ[name] or _FOREIGN.match(name):
            continue
        given = name.upper()
        near = [
            meant for meant in unset if given[0] == meant[0] or given[-1] == meant[-1]
        ]  # a cheap test that excludes most
        close = next((meant for meant in near if _is_close(given, meant)), None)
        if close is None and name.startswith("QUEUE_"):
            close = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), "")
        if close is not None:
            hint = f": did you mean {close}?" if close else ""
            warn(f"the variable {name} is set, but is not a setting of the message queue{hint}")


def _is_close(given: str, meant: str) -> bool:
    """Whether two names differ in one place only, and little: few letters, two letters swapped, the unit, or the case."""
    start = _in_common(given, meant)
    end = _in_common(given[start:][::-1], meant[start:][::-1])
    wrong, right = given[start : len(given) - end], meant[start : len(meant) - end]
    most = max(1, len(meant.partition("_")[2]) // 4)
    return max(len(wrong), len(right)) <= most or wrong == right[::-1] or (not wrong and right in _UNITS)


def _in_common(left: str, right: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))

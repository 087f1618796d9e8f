"""Variables that are set and that nothing reads, because their names are misspelt."""

import difflib
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Final

_LIBRARY: Final = re.compile(r"abe(_backend_\w+)?(\.|\Z)")
_ELSEWHERE: Final = ("QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND", "ABSTRACT_BACKEND_DEBUG", "MESSAGE_QUEUE_BACKEND_DEBUG")
"""Our variables that are no backend's settings."""

_FOREIGN: Final = re.compile(r"AWS_|.*_(SERVICE_(HOST|PORT(_.*)?)|PORT(_\d+_(TCP|UDP)(_\w+)?)?)\Z")
"""The AWS SDK's own, and what container platforms add for a service: for one called "queue", QUEUE_PORT_5672_TCP."""

_UNITS: Final = ("_SECONDS", "_BYTES")


def warn(text: str) -> None:
    """Warn the code that called this library, not the library's own line."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and _LIBRARY.match(frame.f_globals.get("__name__", "")):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, stacklevel=depth)


def warn_of_misspelt(known: Sequence[str], environ: Mapping[str, str]) -> None:
    """Warn of each variable that is close to one of the known ones, which itself is not set; and of any other ``QUEUE_*``.

    The other prefixes, such as ``REDIS_``, are not ours alone: what is there may be another program's.

    Args:
        known: The variables that are read.
        environ: Those that are set. Their values appear in no text.
    """
    known = [*known, *_ELSEWHERE]
    unset = [name for name in known if not environ.get(name)]
    for name in environ:
        if name in known or not environ[name] or _FOREIGN.match(name):
            continue
        given = name.upper()
        near = [
            meant for meant in unset if given[0] == meant[0] or given[-1] == meant[-1]
        ]  # most are told apart by this
        close = next((meant for meant in near if _is_close(given, meant)), None)
        if close is None and name.startswith("QUEUE_"):
            close = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), "")
        if close is not None:
            hint = f": did you mean {close}?" if close else ""
            warn(f"the variable {name} is set, and is no setting of the message queue{hint}")


def _is_close(given: str, meant: str) -> bool:
    """Whether the two differ in one place only, and in little: a letter or a few, two letters swapped, the unit, or the case."""
    start = _in_common(given, meant)
    end = _in_common(given[start:][::-1], meant[start:][::-1])
    ours, theirs = given[start : len(given) - end], meant[start : len(meant) - end]
    most = max(1, len(meant.partition("_")[2]) // 4)
    return max(len(ours), len(theirs)) <= most or ours == theirs[::-1] or (not ours and theirs in _UNITS)


def _in_common(left: str, right: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))

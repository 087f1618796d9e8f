"""Checks keys, groups, headers and key patterns against the limits of every backend, before any I/O.

Patterns are AMQP topic patterns: a key is split at its dots; ``*`` matches exactly one word, ``#`` any number of words, including
none. Only a whole word is a wildcard, so a pattern such as ``a*`` is refused: it would match only the key ``a*``. A key has no
wildcards.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from abe.errors import ConfigurationError, InvalidNameError
from abe.settings import key_pattern, plain_name

MAX_KEY_BYTES: Final = 200
"""RabbitMQ allows 255 bytes, and delayed messages need some of them."""

MAX_HEADER_BYTES: Final = 16 * 1024
"""The limit for all headers of a message together. SQS counts them within the message's size."""

DEFAULT_GROUP: Final = "default"
"""The group of ``group=None``, on every backend."""

EVERYTHING: Final = ("#",)


def check_key(key: str) -> str:
    """Return `key`.

    Raises:
        InvalidNameError: It is empty, over 200 bytes of UTF-8, or not text.
    """
    return _check_text(key, "key")


def check_id(id: str) -> str:
    """Return the message id.

    Raises:
        InvalidNameError: It is empty, over 200 bytes of UTF-8, or not text.
    """
    return _check_text(id, "message id")


def check_patterns(keys: Sequence[str]) -> tuple[str, ...]:
    """Return key patterns as a sorted tuple without repetitions.

    Raises:
        InvalidNameError: There is none, or one is malformed, such as ``order*``; the text proposes a correct one.
    """
    if isinstance(keys, str):
        raise InvalidNameError(f"keys must be a list of patterns: write [{keys!r}], not {keys!r}")
    if not keys:
        raise InvalidNameError("keys is empty, so nothing would be delivered: leave it out to get every key")
    return tuple(sorted({_check_pattern(pattern) for pattern in keys}))


def _check_pattern(pattern: str) -> str:
    _check_text(pattern, "key pattern")
    try:
        key_pattern(pattern)
    except ValueError as exc:
        raise InvalidNameError(f"the key pattern {pattern!r} must be {exc}") from None
    return pattern


def check_group(group: str | None) -> str:
    """Return the name of the group, ``default`` for None.

    Raises:
        InvalidNameError: It is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``.
    """
    if group is None:
        return DEFAULT_GROUP
    try:
        plain_name(group)
    except ValueError as exc:
        raise InvalidNameError(f"a group must be {exc}, not {group!r}") from None
    return group


def check_count(name: str, value: object) -> int:
    """Return the value of an argument that is a count.

    Raises:
        ConfigurationError: It is not an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, not {value!r}")
    return value


def check_seconds(name: str, value: object, *, zero: bool = False) -> None:
    """Check an argument that is a time in seconds; None passes.

    Args:
        name: The argument's name, for the error text.
        value: Its value.
        zero: Whether 0 is allowed.

    Raises:
        ConfigurationError: It is not a finite number above 0 (from 0, with `zero`).
    """
    if value is None or (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (0 < value < math.inf or (zero and value == 0))
    ):
        return
    raise ConfigurationError(f"{name} must be a number of seconds {'from' if zero else 'above'} 0, not {value!r}")


def check_headers(headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return a copy of `headers`, or None when there are none.

    Raises:
        InvalidNameError: A name or a value is not text, a name is empty, or together they are over 16 KiB.
    """
    if not headers:
        return None
    if not isinstance(headers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidNameError(f"headers must be a mapping from strings to strings, not {type(headers).__name__}")
    size = 0
    for name, value in headers.items():
        for what, text in (("header name", name), (f"value of header {name!r}", value)):
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidNameError(f"a {what} must be a string, not {type(text).__name__}")
            try:
                size += len(text.encode())
            except UnicodeEncodeError:
                raise InvalidNameError(f"the {what} is not valid Unicode text: it holds half a character") from None
        if not name:
            raise InvalidNameError("a header name must not be empty")
    if size > MAX_HEADER_BYTES:
        raise InvalidNameError(f"the headers take {size} bytes; at most {MAX_HEADER_BYTES} are carried")
    return {str.__str__(name): str.__str__(value) for name, value in headers.items()}


@lru_cache(maxsize=4096)
def matches(pattern: str, key: str) -> bool:
    """Whether `pattern` matches `key`."""
    return _match(pattern.split("."), key.split("."))


def _match(pattern: list[str], key: list[str]) -> bool:
    # Tracks the possible states of the pattern after each word; recursion would be exponential in the number of '#'.
    states = _open(pattern, {0})
    for word in key:
        stay = {state for state in states if state < len(pattern) and pattern[state] == "#"}
        move = {state + 1 for state in states - stay if state < len(pattern) and pattern[state] in ("*", word)}
        states = _open(pattern, stay | move)
    return len(pattern) in states


def _open(pattern: list[str], states: set[int]) -> set[int]:
    for state in range(len(pattern)):
        if state in states and pattern[state] == "#":
            states = states | {state + 1}
    return states


def _check_text(text: str, what: str) -> str:
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidNameError(f"a {what} must be a string, not {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidNameError(f"the {what} {text!r} is not valid Unicode text") from None
    if not 1 <= size <= MAX_KEY_BYTES:
        raise InvalidNameError(f"a {what} must be 1 to {MAX_KEY_BYTES} bytes of UTF-8, not {size}")
    return str.__str__(text)  # itself, or the plain text of a subclass, which no encoder knows

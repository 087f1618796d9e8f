"""Reads the environment into frozen, typed settings: the only reader of ``os.environ``.

A provider's settings are a frozen dataclass whose fields are made by `setting`: each has its variable, a parser and a check.
`from_env` reads them, the constructor checks them, `repr` masks the secret ones, and the docs' tables are generated from them.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Self, cast

from abe.errors import ConfigurationError
from abe.spelling import warn_of_misspelt

_MASKED: Final = "***"
_GROUPS: Final = "groups separated by commas, such as 'billing=order.*|user.created,audit'"
_WILDCARDS: Final = ("*", "#")
_FOREIGN: Final = {">": "#", "**": "#", "+": "*"}
"""Wildcards of other brokers, and the equivalent AMQP topic word."""

_ADDRESS: Final = re.compile("://|@")
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z")


def setting(
    variable: str,
    parse: Callable[[str], Any],
    *,
    help: str,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    check: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """Declare a settings field.

    Args:
        variable: The environment variable that sets it. An empty variable counts as unset.
        parse: Converts text to the value; raises ValueError whose text describes a valid value.
        help: One line for the docs' table.
        default: The value when neither the argument nor the variable is given; without a default, the setting is required.
        default_factory: Makes the default, for a mapping.
        check: Raises ValueError when a value (parsed or given) is out of range. A None that is the default means unset, and is
            not checked.
        secret: Whether the value, or part of it, is a credential: it is never shown.
    """
    metadata = {"variable": variable, "parse": parse, "help": help, "check": check, "secret": secret}
    # A subclass without `repr=False` gets the dataclass's repr, which must not show secrets either.
    hashed = None if default_factory is MISSING else False
    return field(default=default, default_factory=default_factory, repr=not secret, hash=hashed, metadata=metadata)


def env_text(variable: str, *aliases: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the first of the variables that is set and not empty, or None."""
    values = os.environ if environ is None else environ
    return next((values[name] for name in (variable, *aliases) if values.get(name)), None)


def env_flag(variable: str, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether a switch is on. Unset is off.

    Raises:
        ConfigurationError: The text is not a boolean.
    """
    text = env_text(variable, environ=environ)
    try:
        return text is not None and boolean(text)
    except ValueError as exc:
        raise ConfigurationError(f"{variable} must be {exc}, not {shown(text)}") from None


def boolean(text: str) -> bool:
    """Read a boolean."""
    if text.strip().lower() in {"1", "true", "yes", "on"}:
        return True
    if text.strip().lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("true or false")


def integer(minimum: int) -> Callable[[str], int]:
    """Return a reader of integers of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"an integer of at least {minimum}") from None
        return at_least(minimum)(value)  # type: ignore[no-any-return]

    return parse


def seconds(text: str) -> float:
    """Read a duration in seconds, above zero."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number of seconds above 0") from None
    return float(positive(value))


def shown(value: object) -> str:
    """Return a value for an error text. A value that may be an address is masked, as it may contain a password."""
    return "what may be an address" if _ADDRESS.search(str(value)) else repr(value)


def group_patterns(text: str) -> Mapping[str, tuple[str, ...]]:
    """Read groups and their key patterns: ``billing=order.*|user.created,shipping``."""
    groups: dict[str, tuple[str, ...]] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, patterns = map(str.strip, part.partition("="))
        if not name:
            raise ValueError(f"{_GROUPS}; {shown(part)} names no group")
        if name in groups:
            raise ValueError(
                f"{_GROUPS}; {shown(name)} is given twice (a bar separates its patterns: name=order.*|user.created)"
            )
        groups[name] = tuple(map(str.strip, patterns.split("|"))) if equals else ()
        if "" in groups[name]:
            raise ValueError(f"{_GROUPS}; {shown(name)} has an empty pattern (without the '=', it gets every key)")
    return groups


def at_least(minimum: int) -> Callable[[Any], Any]:
    """Return a check that a value is an integer of at least `minimum`."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"an integer of at least {minimum}")
        return value

    return check


def positive(value: Any) -> Any:
    """Check that a value is a finite number of seconds above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("a number of seconds above 0")
    return value


def plain_name(value: Any) -> Any:
    """Check that a value is a name that is valid in every broker."""
    if not isinstance(value, str) or not _NAME.match(value):
        raise ValueError("1 to 64 letters, digits, '.', '_' or '-', with a letter or digit at both ends")
    return value


def key_pattern(value: Any) -> Any:
    """Check that each wildcard of a key pattern is a whole word: anywhere else it would be a literal character."""
    words = value.split(".") if isinstance(value, str) else []
    if not words or value == "":
        raise ValueError("a key pattern such as 'order.*'")
    for index, word in enumerate(words):
        if word in _WILDCARDS or not (word in _FOREIGN or "*" in word or "#" in word):
            continue
        right = [".".join([*words[:index], form, *words[index + 1 :]]) for form in _right_forms(word, alone=index == 0)]
        instead = f"write {' or '.join(map(repr, right))}" if right else "split it into words"
        raise ValueError(
            f"a pattern whose wildcards are whole words, '*' for exactly one and '#' for any number: {instead}"
        )
    return value


def _right_forms(word: str, *, alone: bool) -> list[str]:
    """Return the correct forms of a word that was probably meant as a wildcard."""
    stem = word.strip("*#").rstrip("/:-_")
    if word in _FOREIGN:
        return [_FOREIGN[word]]
    if not stem:
        return ["#"]
    if "*" in stem or "#" in stem or not alone:
        return ["*"]
    return [f"{stem}.*", f"{stem}.#"] if word.startswith(stem) else [f"*.{stem}", f"#.{stem}"]


def named_groups(value: Any) -> Any:
    """Check that a value maps plain names to tuples of key patterns."""
    if not isinstance(value, Mapping):
        raise ValueError("a mapping from each group to its key patterns, () for those that it has")  # noqa: TRY004
    groups = cast("Mapping[object, object]", value)
    for name, patterns in groups.items():
        try:
            plain_name(name)
        except ValueError as exc:
            raise ValueError(f"groups whose names are {exc}; {shown(name)} is none") from None
        if not isinstance(patterns, tuple):
            raise ValueError(f"a mapping from each group to a tuple of key patterns; that of {shown(name)} is none")  # noqa: TRY004
        for pattern in cast("tuple[object, ...]", patterns):
            try:
                key_pattern(pattern)
            except ValueError as exc:
                raise ValueError(
                    f"groups and their key patterns; {shown(pattern)} of {shown(name)} must be {exc}"
                ) from None
    return groups


def check_given(settings: type[Any], args: Sequence[object], kwargs: Iterable[object]) -> None:
    """Check that settings are given by keyword, and that each exists. No error text contains a value.

    Raises:
        ConfigurationError: A setting is positional or unknown; the text proposes a similar one.
    """
    known = [item.name for item in fields(settings)]
    if args:
        raise ConfigurationError(f"{settings.__name__} takes its settings by name: {', '.join(known)}")
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ConfigurationError(f"{settings.__name__} has no setting {name!r}: {hint}")


@dataclass(frozen=True, kw_only=True, repr=False)
class QueueSettings:
    """The settings of every backend built on the engine. A provider's settings extend it.

    Raises:
        ConfigurationError: A value is out of range; the text names the setting, its variable and the valid range. Or a setting is
            unknown; the text proposes a similar one.
    """

    namespace: str = setting(
        "QUEUE_NAMESPACE",
        str,
        default="application_events",
        check=plain_name,
        help="Everything the backend keeps in the broker lives under this name; two namespaces share nothing.",
    )
    groups: Mapping[str, tuple[str, ...]] = setting(
        "QUEUE_GROUPS",
        group_patterns,
        default_factory=dict,
        check=named_groups,
        help="Groups to declare when the backend connects, with key patterns or without: `billing=order.*,audit`. "
        "A bar separates several patterns.",
    )
    prefetch: int = setting(
        "QUEUE_PREFETCH",
        integer(1),
        default=20,
        check=at_least(1),
        help="Messages that a plain `async for` holds at most; `AsyncLoopConsumer` sets its own from its concurrency.",
    )
    lease: float = setting(
        "QUEUE_LEASE_SECONDS",
        seconds,
        default=30.0,
        check=positive,
        help="How long a silent consumer keeps a message, in seconds. A live one renews it every third of that.",
    )
    max_attempts: int = setting(
        "QUEUE_MAX_ATTEMPTS",
        integer(1),
        default=5,
        check=at_least(1),
        help="Deliveries of a message to a group before it goes to the group's dead letters.",
    )
    publish_timeout: float = setting(
        "QUEUE_PUBLISH_TIMEOUT_SECONDS",
        seconds,
        default=10.0,
        check=positive,
        help="How long a publish tries before it raises, in seconds.",
    )
    close_timeout: float = setting(
        "QUEUE_CLOSE_TIMEOUT_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long closing waits for a broker that does not answer, in seconds.",
    )
    max_backlog: int | None = setting(
        "QUEUE_MAX_BACKLOG",
        integer(1),
        default=None,
        check=at_least(1),
        help="Waiting messages of a group above which publish raises BackpressureError. Unset: the broker's limit.",
    )
    max_unconfirmed: int = setting(
        "QUEUE_MAX_UNCONFIRMED",
        integer(1),
        default=5_000,
        check=at_least(1),
        help="Messages on their way to the broker above which publish waits.",
    )
    max_unconfirmed_bytes: int = setting(
        "QUEUE_MAX_UNCONFIRMED_BYTES",
        integer(1),
        default=32 * 1024 * 1024,
        check=at_least(1),
        help="Bytes on their way to the broker above which publish waits.",
    )

    if not TYPE_CHECKING:  # the signature is that of the fields

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            check_given(cls, args, kwargs)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            check, value = item.metadata.get("check"), getattr(self, item.name)
            if check is None or (value is None and item.default is None):
                continue
            try:
                check(value)
            except ValueError as exc:
                raise ConfigurationError(_complaint(item, value, exc)) from None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings from the environment. No I/O.

        Args:
            environ: What to read instead of ``os.environ``.

        Raises:
            ConfigurationError: A required variable is missing, or one is malformed; the text names it.
        """
        known = [item.metadata["variable"] for item in fields(cls) if "variable" in item.metadata]
        warn_of_misspelt(known, os.environ if environ is None else environ)
        values: dict[str, Any] = {}
        for item in fields(cls):
            if "variable" not in item.metadata:
                continue
            text = env_text(item.metadata["variable"], environ=environ)
            if text is None:
                if item.default is MISSING and item.default_factory is MISSING:
                    raise ConfigurationError(f"{item.metadata['variable']} is not set: {item.metadata['help']}")
                continue
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as exc:
                raise ConfigurationError(_complaint(item, text, exc)) from None
        return cls(**values)

    def __repr__(self) -> str:
        shown = (
            f"{item.name}={_MASKED if item.metadata.get('secret') else repr(getattr(self, item.name))}"
            for item in fields(self)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


def _complaint(item: Field[Any], value: Any, exc: ValueError) -> str:
    given = "" if item.metadata["secret"] else f", not {shown(value)}"
    return f"{item.metadata['variable']} (setting {item.name!r}) must be {exc}{given}"

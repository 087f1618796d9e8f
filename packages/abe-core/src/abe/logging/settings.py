"""An application's logging configuration: one frozen value, checked before it is used."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from abe.errors import ConfigurationError
from abe.settings import at_least, check_given

Level: TypeAlias = int | str
"""A level's number, or its name in either case."""

DEFAULT_FILE: Final = "app.log"
DEFAULT_FOLDER: Final = "logs"
DEFAULT_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def level_number(level: Any, where: str) -> int:
    """Return the number of a level that is given by name or number.

    Args:
        level: The name or number.
        where: What the level is for, for the error text.

    Raises:
        ConfigurationError: It is neither the name of a level nor an integer of at least 0; the text says what is expected.
    """
    if isinstance(level, str):
        known = logging.getLevelNamesMapping().get(level.strip().upper())
        if known is not None:
            return known
    elif isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise ConfigurationError(
        f"Invalid log level {level!r} for {where}: it must be DEBUG, INFO, WARNING, ERROR, CRITICAL or an integer of at least 0"
    )


def level_name(number: int) -> Level:
    """Return the name of a level; its number, if it has none."""
    name = logging.getLevelName(number)
    return name if name in logging.getLevelNamesMapping() else number


def _format(value: Any) -> None:
    try:
        # The logging module takes an empty string for its default format.
        formatter = logging.Formatter(value if isinstance(value, str) and value else "{}")
        formatter.format(logging.getLogRecordFactory()("abe", logging.INFO, "", 0, "", (), None))
    except (ValueError, TypeError, KeyError):
        # Without this check, the handlers would print an error to stderr for each record.
        raise ValueError("a %-style format of LogRecord attributes, such as '%(levelname)s %(message)s'") from None


def _optional_text(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError("None or a string that is not empty")


def _encoding(value: Any) -> None:
    try:
        "a".encode(value)
    except (LookupError, TypeError, ValueError):
        raise ValueError("the name of a text encoding, such as 'utf-8'") from None


def _level(value: Any) -> None:
    level_number(value, "the logging setting 'level'")


def _size(value: Any) -> None:
    try:
        at_least(1)(value)
    except ValueError:
        raise ValueError("positive, an integer of at least 1 (backup_count=0 is how a file is never rotated)") from None


def _backups(value: Any) -> None:
    try:
        at_least(0)(value)
    except ValueError:
        raise ValueError("non-negative, an integer of at least 0") from None


def _flag(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError("True or False")  # noqa: TRY004


def _levels(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError("a mapping from logger name to level")  # noqa: TRY004
    for name, level in value.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or name in {"", "root"}:
            raise ValueError("a mapping whose keys name loggers (the root's level is the setting 'level')")
        level_number(level, f"logger {name!r}")


_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "level": _level,
    "format": _format,
    "date_format": _optional_text,
    "log_file": _optional_text,
    "log_dir": _optional_text,
    "max_bytes": _size,
    "backup_count": _backups,
    "encoding": _encoding,
    "enable_console": _flag,
    "enable_file": _flag,
    "use_json_formatter": _flag,
    "logger_levels": _levels,
    "propagate": _flag,
}


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """The destinations, format and levels of an application's log.

    It is immutable (``dataclasses.replace`` returns a changed copy), and has no effect until `setup_logging_from_config` applies it.
    Its values are checked there, or earlier by `validate`.

    Raises:
        ConfigurationError: A field is unknown; the text proposes a similar one.
    """

    level: Level = "INFO"
    """The root logger's level, which holds for every logger without its own."""

    format: str = DEFAULT_FORMAT
    """The format of a line, in %-style. With `use_json_formatter`, its attributes are the fields of the object."""

    date_format: str | None = None
    """The format of ``%(asctime)s``, for ``time.strftime``. None: ISO 8601 with milliseconds."""

    log_file: str | None = None
    """The file's path, relative to `log_dir` if that is given. None: ``app.log``. Used when `enable_file` is true."""

    log_dir: str | None = None
    """The folder that must contain the file; created when missing. None: the folder of `log_file`; without one, ``logs``."""

    max_bytes: int = 10 * 1024 * 1024
    """The size at which the file is rotated."""

    backup_count: int = 5
    """How many rotated files are kept. 0: the file is never rotated."""

    encoding: str = "utf-8"
    """The encoding of the file."""

    enable_console: bool = True
    """Whether the log goes to standard error."""

    enable_file: bool = False
    """Whether the log goes to a file."""

    use_json_formatter: bool = False
    """Whether each line is a JSON object. Needs the extra ``abe-core[json-logs]``."""

    logger_levels: Mapping[str, Level] = field(default_factory=dict[str, Level], hash=False)
    """The levels of single loggers, such as ``{"abe.redis": "DEBUG"}``."""

    propagate: bool = True
    """Whether the loggers in `logger_levels` pass their records to the root logger's handlers. False: they have handlers
    of their own for the same destinations, and handlers added to the root do not get their records."""

    if not TYPE_CHECKING:  # the signature is that of the fields

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            check_given(cls, args, kwargs)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.logger_levels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            object.__setattr__(self, "logger_levels", MappingProxyType(dict(self.logger_levels)))

    def __reduce__(self) -> tuple[Callable[..., "LoggingConfig"], tuple[dict[str, Any]]]:
        # A MappingProxyType cannot be copied or pickled, and worker processes receive their config by pickle.
        return type(self).from_dict, (self.to_dict(),)

    def validate(self) -> None:
        """Check every value. Every function that uses a config calls it first.

        Raises:
            ConfigurationError: A value is wrong; the text names the field and describes a valid value.
        """
        for name, value in self.to_dict().items():
            try:
                _CHECKS[name](value)
            except ConfigurationError:
                raise
            except ValueError as exc:
                raise ConfigurationError(f"logging setting {name} must be {exc}, not {value!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a plain dict that can be encoded as JSON, and that `from_dict` reads."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if isinstance(self.logger_levels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            values["logger_levels"] = dict(self.logger_levels)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from a mapping, such as a section of a settings file. Missing settings have their defaults.

        Raises:
            ConfigurationError: A setting is unknown.
        """
        if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"the logging settings must be a mapping, not a {type(values).__name__}")
        check_given(cls, (), values)
        return cls(**values)

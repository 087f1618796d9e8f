"""What an application can say about its log: one frozen value, checked before it is used."""

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
        level: What was given.
        where: What the level is for, for the text.

    Raises:
        ConfigurationError: It is neither the name of a level nor an integer of at least 0; the text says what would be right.
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
        # Nothing, to logging, is a format too.
        formatter = logging.Formatter(value if isinstance(value, str) and value else "{}")
        formatter.format(logging.getLogRecordFactory()("abe", logging.INFO, "", 0, "", (), None))
    except (ValueError, TypeError, KeyError):
        # Found here, it is one error; found by a handler, it would be one on stderr for each record.
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
    """Where an application's log goes, how it looks, and how much of it there is.

    It cannot be changed (``dataclasses.replace`` makes another), and does nothing by itself: `setup_logging_from_config` puts it into
    effect. Its values are checked there, or earlier by `validate`.

    Raises:
        ConfigurationError: There is no field of a name that was given; the text names the close one.
    """

    level: Level = "INFO"
    """The root logger's level: what no other level is set for follows it."""

    format: str = DEFAULT_FORMAT
    """Of a line, in %-style. With `use_json_formatter`, the attributes in it are the fields of the object."""

    date_format: str | None = None
    """Of ``%(asctime)s``, for ``time.strftime``. None: ISO 8601 with milliseconds."""

    log_file: str | None = None
    """The file's path, below `log_dir` where that is given. None: ``app.log``. Used when `enable_file` is true."""

    log_dir: str | None = None
    """The folder that the file must stay in; made when it is missing. None: where `log_file` says; without one, ``logs``."""

    max_bytes: int = 10 * 1024 * 1024
    """The size at which the file is rotated."""

    backup_count: int = 5
    """How many rotated files are kept. 0: the file is never rotated, and grows."""

    encoding: str = "utf-8"
    """Of the file."""

    enable_console: bool = True
    """Whether the log goes to standard error."""

    enable_file: bool = False
    """Whether the log goes to a file."""

    use_json_formatter: bool = False
    """Whether each line is a JSON object. Needs the extra ``abe-core[json-logs]``."""

    logger_levels: Mapping[str, Level] = field(default_factory=dict[str, Level], hash=False)
    """The levels of single loggers, such as ``{"abe.redis": "DEBUG"}``."""

    propagate: bool = True
    """Whether the loggers in `logger_levels` pass their records on to the root logger's handlers. False: they write
    to the same places themselves, and handlers that others add to the root do not see them."""

    if not TYPE_CHECKING:  # the signature is that of the fields

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            check_given(cls, args, kwargs)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.logger_levels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            object.__setattr__(self, "logger_levels", MappingProxyType(dict(self.logger_levels)))

    def __reduce__(self) -> tuple[Callable[..., "LoggingConfig"], tuple[dict[str, Any]]]:
        # A read-only mapping cannot be copied or pickled as it is, and worker processes are handed their config.
        return type(self).from_dict, (self.to_dict(),)

    def validate(self) -> None:
        """Check every value. Whatever uses a config does it first.

        Raises:
            ConfigurationError: A value is wrong; the text names the field, and says what would be right.
        """
        for name, value in self.to_dict().items():
            try:
                _CHECKS[name](value)
            except ConfigurationError:
                raise
            except ValueError as exc:
                raise ConfigurationError(f"logging setting {name} must be {exc}, not {value!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a plain dict that JSON can hold, and that `from_dict` reads."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if isinstance(self.logger_levels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            values["logger_levels"] = dict(self.logger_levels)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config of a mapping, such as a section of a settings file. What it leaves out has its default.

        Raises:
            ConfigurationError: A name is no setting's.
        """
        if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"the logging settings must be a mapping, not a {type(values).__name__}")
        check_given(cls, (), values)
        return cls(**values)

"""Logging for applications. The library itself only emits records: nothing here runs on import.

Logger names are fixed: the core logs below ``abe`` (``abe.consumer``, ``abe.engine``, ``abe.loader``), a provider below
``abe.<the name it is loaded by>``.
"""

import importlib
import logging
import logging.config
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from abe.errors import ConfigurationError
from abe.logging.settings import DEFAULT_FILE, DEFAULT_FOLDER, Level, LoggingConfig, level_name, level_number
from abe.settings import env_flag

__all__ = [
    "LoggingConfig",
    "apply_debug_switches",
    "create_log_file_path",
    "get_logger",
    "get_logger_level",
    "get_logging_dict_config",
    "set_logger_level",
    "setup_logging_from_config",
]

CORE_LOGGER: Final = "abe"
PROVIDER_LOGGERS: Final = ("abe.memory", "abe.rabbitmq", "abe.redis", "abe.sqs")

_JSON_MODULE: Final = "pythonjsonlogger.json"

_configured: Final[set[str]] = set()
"""The loggers of the config that was applied last."""

_of_loaded: Final[dict[str, None]] = {}
"""The loggers of the providers that were loaded."""


def setup_logging_from_config(config: LoggingConfig | None = None) -> None:
    """Apply a config to the whole process. Call it once, where the application starts.

    A second call replaces what the first one set: handlers, so that the log is not duplicated, and levels. Existing loggers keep
    working. The debug switches are applied again afterwards, as they take precedence.

    Args:
        config: The configuration; None: the defaults.

    Raises:
        ConfigurationError: A value is wrong, the file cannot be written, the JSON formatter is not installed, or a debug switch is
            not a boolean. The logging configuration is then unchanged.
    """
    config = config or LoggingConfig()
    settings = get_logging_dict_config(config)
    if config.enable_file:
        path = _make_folder(_file(config))
        try:
            path.open("a").close()
        except OSError as exc:
            raise ConfigurationError(f"logging setting 'log_file': cannot write {path}: {exc.strerror}") from exc
    levels = _switched_on(None)
    logging.config.dictConfig(settings)
    for name in _configured - set(config.logger_levels):
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        logger.handlers.clear()
    _configured.clear()
    _configured.update(config.logger_levels)
    if "asyncio" not in config.logger_levels:
        logging.getLogger("asyncio").setLevel(logging.WARNING)
    _set_debug(levels)


def get_logging_dict_config(config: LoggingConfig) -> dict[str, Any]:
    """Return a config as a dict for ``logging.config.dictConfig``, to extend. It changes nothing.

    The log file's folder must exist when the result is applied: `create_log_file_path` creates it. Levels are given by name.

    Raises:
        ConfigurationError: A value is wrong, the file would be outside of `log_dir`, or the JSON formatter is not installed.
    """
    config.validate()
    handlers: dict[str, Any] = {}
    if config.enable_console:
        handlers["console"] = {"class": "logging.StreamHandler", "formatter": "default", "stream": "ext://sys.stderr"}
    if config.enable_file:
        handlers["file"] = {
            "class": "logging.handlers.RotatingFileHandler",
            "formatter": "default",
            "filename": str(_file(config)),
            "maxBytes": config.max_bytes,
            "backupCount": config.backup_count,
            "encoding": config.encoding,
        }
    # Without any handler, logging's last resort would print warnings to stderr.
    handlers = handlers or {"nowhere": {"class": "logging.NullHandler"}}
    names = list(handlers)
    root = {"level": _named(config.level), "handlers": names, "propagate": config.propagate}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": _formatter(config)},
        "handlers": handlers,
        "root": root,
        # The same object under the key that other tools read, so that a change of one changes both.
        "loggers": {"": root}
        | {
            name: {
                "level": _named(level),
                "propagate": config.propagate,
                "handlers": [] if config.propagate else names,
            }
            for name, level in config.logger_levels.items()
        },
    }


def get_logger(name: str = CORE_LOGGER) -> logging.Logger:
    """Return ``logging.getLogger(name)``."""
    return logging.getLogger(name)


def set_logger_level(name: str, level: Level) -> None:
    """Set the level of a logger, and so of its children that have no own level.

    Raises:
        ConfigurationError: It is not a level; the text says what is expected.
    """
    logging.getLogger(name).setLevel(level_number(level, f"logger {name!r}"))


def get_logger_level(name: str = CORE_LOGGER) -> str:
    """Return the name of a logger's effective level: its own, or that of its nearest parent.

    A number without a name is returned as logging names it: ``Level 15``.
    """
    return logging.getLevelName(logging.getLogger(name).getEffectiveLevel())


def create_log_file_path(log_dir: str, log_file: str = DEFAULT_FILE) -> str:
    """Return the path of a log file in a folder, and create the folder.

    Args:
        log_dir: The folder.
        log_file: The file in it. It must not be outside of the folder, by ``..``, by an absolute path or by a symbolic link.

    Raises:
        ConfigurationError: The path is outside of `log_dir` or names no file, or its folder cannot be created.
    """
    return str(_make_folder(_path(log_dir, log_file)))


def _make_folder(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"the log folder {path.parent} cannot be created: {exc.strerror}") from exc
    return path


def apply_debug_switches(
    environ: Mapping[str, str] | None = None, *, provider: str | None = None, package: str | None = None
) -> None:
    """Set loggers to DEBUG according to the environment. It adds no handler, and a switch that is off changes nothing.

    ``ABSTRACT_BACKEND_DEBUG`` sets the core's logger ``abe``, and so its children without an own level.
    ``MESSAGE_QUEUE_BACKEND_DEBUG`` sets the loggers of this project's providers, and of the one that is being loaded.

    Args:
        environ: What to read instead of ``os.environ``.
        provider: The name of the loaded provider: its logger is ``abe.<name>``.
        package: The module of the provider's class: the logger of its top-level package is set too.

    Raises:
        ConfigurationError: A switch is not a boolean; the text names it.
    """
    _of_loaded.update(_loggers_of(provider, package))
    _set_debug(_switched_on(environ))


def _switched_on(environ: Mapping[str, str] | None) -> list[str]:
    names = [CORE_LOGGER] if env_flag("ABSTRACT_BACKEND_DEBUG", environ) else []
    if not env_flag("MESSAGE_QUEUE_BACKEND_DEBUG", environ):
        return names
    return [*names, *PROVIDER_LOGGERS, *_of_loaded]


def _loggers_of(provider: str | None, package: str | None) -> dict[str, None]:
    names = [f"{CORE_LOGGER}.{provider}"] if provider else []
    # The memory backend is in `abe` itself, whose logger is the core's.
    top = (package or "").partition(".")[0]
    if top not in {"", "__main__", CORE_LOGGER}:
        names.append(top)
    return dict.fromkeys(names)


def _set_debug(names: list[str]) -> None:
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)


def _formatter(config: LoggingConfig) -> dict[str, Any]:
    if not config.use_json_formatter:
        return {"format": config.format, "datefmt": config.date_format, "style": "%"}
    try:
        importlib.import_module(_JSON_MODULE)
    except ImportError as exc:
        raise ConfigurationError(
            "logging setting 'use_json_formatter' needs python-json-logger: pip install abe-core[json-logs]"
        ) from exc
    return {"()": f"{_JSON_MODULE}.JsonFormatter", "fmt": config.format, "datefmt": config.date_format}


def _named(level: Level) -> Level:
    return level_name(level_number(level, "logging"))


def _file(config: LoggingConfig) -> Path:
    if config.log_file is None:
        return _path(config.log_dir or DEFAULT_FOLDER, DEFAULT_FILE)
    return _path(config.log_dir, config.log_file)


def _path(log_dir: str | None, log_file: str) -> Path:
    path = Path(log_dir or "", os.path.normpath(log_file))
    try:
        outside = log_dir is not None and Path(log_dir).resolve() not in path.resolve().parents
        folder = not log_file or log_file.endswith("/") or path.is_dir()
    except (ValueError, OSError, RuntimeError) as exc:
        # A null character, a loop of links, an unreadable folder.
        raise ConfigurationError(f"the log file {log_file!r} is not a usable path: {exc}") from exc
    if outside:
        raise ConfigurationError(f"the log file must stay inside {log_dir!r}, and {log_file!r} is outside of it")
    if folder:
        raise ConfigurationError(f"the log file must name a file, and {log_file!r} names a folder")
    return path

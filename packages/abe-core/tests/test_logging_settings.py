"""The logging settings: what they may be, and that they come back from wherever they were put."""

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest

from abe.errors import ConfigurationError
from abe.logging import LoggingConfig, get_logging_dict_config, set_logger_level, setup_logging_from_config, utils

pytestmark = pytest.mark.usefixtures("logging_as_before")

DOCS = Path(__file__).parents[3] / "docs" / "LOGGING.md"
PROVIDERS = ("abe.memory", "abe.rabbitmq", "abe.redis", "abe.sqs")


def test_the_defaults_log_lines_to_the_console_at_info() -> None:
    config = LoggingConfig()
    assert (config.level, config.enable_console, config.enable_file) == ("INFO", True, False)
    config.validate()


def test_a_config_cannot_be_changed_and_neither_can_its_levels() -> None:
    levels: dict[str, int | str] = {"abe.redis": "DEBUG"}
    config = LoggingConfig(logger_levels=levels)
    with pytest.raises(FrozenInstanceError):
        config.level = "DEBUG"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.logger_levels["abe"] = "DEBUG"  # type: ignore[index]
    levels["abe.redis"] = "ERROR"
    assert config.logger_levels == {"abe.redis": "DEBUG"}


FULL = LoggingConfig(
    level="WARNING",
    format="%(levelname)s %(message)s",
    date_format="%H:%M:%S",
    log_file="shop.log",
    log_dir="logs",
    max_bytes=1000,
    backup_count=2,
    encoding="utf-16",
    enable_console=False,
    enable_file=True,
    use_json_formatter=True,
    logger_levels={"abe.redis": "DEBUG", "shop": 15},
    propagate=False,
)


def test_the_full_config_sets_every_setting_to_something_else() -> None:
    default = LoggingConfig()
    assert [item.name for item in fields(FULL) if getattr(FULL, item.name) == getattr(default, item.name)] == []


@pytest.mark.parametrize("config", [LoggingConfig(), FULL], ids=["default", "full"])
def test_a_config_comes_back_from_its_dict_from_json_from_pickle_and_from_a_copy(config: LoggingConfig) -> None:
    assert LoggingConfig.from_dict(config.to_dict()) == config
    assert LoggingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert hash(copy.deepcopy(config)) == hash(config)


def test_changing_the_dict_changes_no_config() -> None:
    FULL.to_dict()["logger_levels"]["shop"] = "DEBUG"
    assert FULL.logger_levels["shop"] == 15


def test_what_a_dict_leaves_out_has_its_default() -> None:
    assert LoggingConfig.from_dict({"level": "DEBUG"}) == replace(LoggingConfig(), level="DEBUG")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"levle": "DEBUG"}, "LoggingConfig has no setting 'levle': did you mean 'level'?"),
        ({"xyzzy": 1}, "LoggingConfig has no setting 'xyzzy': there are level, format,"),
        ({1: 1}, "LoggingConfig has no setting 1: there are level, format,"),
        ([("level", "DEBUG")], "the logging settings must be a mapping, not a list"),
        (None, "the logging settings must be a mapping, not a NoneType"),
    ],
)
def test_a_dict_with_something_else_in_it_is_refused(values: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        LoggingConfig.from_dict(values)


def test_a_setting_that_there_is_none_of_and_one_without_its_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="LoggingConfig has no setting 'max_byte': did you mean 'max_bytes'"):
        LoggingConfig(max_byte=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="LoggingConfig takes its settings by name: level, format"):
        LoggingConfig("DEBUG")  # type: ignore[misc]


@pytest.mark.parametrize("level", ["DEBUG", "debug", "Warning", "CRITICAL", 0, 15, logging.ERROR])
def test_a_level_is_a_name_in_either_case_or_a_number(level: int | str) -> None:
    LoggingConfig(level=level, logger_levels={"abe": level}).validate()


def test_an_application_s_own_level_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "getLevelNamesMapping", lambda: {"TRACE": 5})
    assert get_logging_dict_config(LoggingConfig(level="trace"))["root"]["level"] == 5


BAD = [
    ("format", "{message}", "a %-style format of LogRecord attributes"),
    ("format", "%(mesage)s", "a %-style format of LogRecord attributes"),
    ("format", "%(message)d", "a %-style format of LogRecord attributes"),
    ("format", "", "a %-style format of LogRecord attributes"),
    ("format", None, "a %-style format of LogRecord attributes"),
    ("date_format", 5, "None or a string that is not empty"),
    ("date_format", "", "None or a string that is not empty"),
    ("log_file", "", "None or a string that is not empty"),
    ("log_file", 5, "None or a string that is not empty"),
    ("log_dir", "", "None or a string that is not empty"),
    ("max_bytes", 0, "positive, an integer of at least 1 (backup_count=0 is how a file is never rotated)"),
    ("max_bytes", -1, "positive"),
    ("max_bytes", "10 MB", "positive"),
    ("max_bytes", None, "positive"),
    ("max_bytes", True, "positive"),
    ("backup_count", -1, "non-negative, an integer of at least 0"),
    ("backup_count", 1.0, "non-negative"),
    ("encoding", "utf-9", "the name of a text encoding"),
    ("encoding", "base64", "the name of a text encoding"),
    ("encoding", None, "the name of a text encoding"),
    ("encoding", "a\x00", "the name of a text encoding"),
    ("enable_console", "yes", "True or False"),
    ("enable_file", 1, "True or False"),
    ("use_json_formatter", None, "True or False"),
    ("propagate", 0, "True or False"),
    ("logger_levels", None, "a mapping from logger name to level"),
    ("logger_levels", ["abe"], "a mapping from logger name to level"),
    ("logger_levels", {"": "DEBUG"}, "whose keys name loggers (the root's level is the setting 'level')"),
    ("logger_levels", {"root": "DEBUG"}, "whose keys name loggers (the root's level is the setting 'level')"),
    ("logger_levels", {1: "DEBUG"}, "whose keys name loggers"),
]


@pytest.mark.parametrize(("name", "value", "right"), BAD)
def test_a_bad_value_is_refused_with_its_name_and_what_would_be_right(name: str, value: Any, right: str) -> None:
    config = LoggingConfig(**{name: value})
    with pytest.raises(ConfigurationError) as caught:
        config.validate()
    assert str(caught.value).startswith(f"logging setting {name} must be ")
    assert right in str(caught.value)
    assert f"not {value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value", "right"), [*BAD, ("level", "LOUD", "Invalid log level 'LOUD'")])
@pytest.mark.parametrize("use", [setup_logging_from_config, get_logging_dict_config])
def test_a_bad_value_is_found_before_anything_is_changed(
    name: str,
    value: Any,
    right: str,
    use: Callable[[LoggingConfig], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    values = {"enable_file": True, name: value}
    with pytest.raises(ConfigurationError, match=re.escape(right)):
        use(LoggingConfig(**values))
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    assert list(tmp_path.iterdir()) == []
    assert LoggingConfig.from_dict(LoggingConfig(**values).to_dict()).to_dict()[name] == value


def test_every_other_setting_has_a_bad_value_above() -> None:
    assert {name for name, _, _ in BAD} == {item.name for item in fields(LoggingConfig)} - {"level"}


NO_LEVELS = ["LOUD", "", "10", -1, True, None, 1.5]


@pytest.mark.parametrize("level", NO_LEVELS)
def test_a_level_that_is_none_is_an_invalid_log_level_wherever_it_is_given(level: Any) -> None:
    places: dict[str, Callable[[], object]] = {
        "the logging setting 'level'": LoggingConfig(level=level).validate,
        "logger 'abe'": LoggingConfig(logger_levels={"abe": level}).validate,
        "logger 'abe.redis'": lambda: set_logger_level("abe.redis", level),
    }
    for where, give in places.items():
        with pytest.raises(
            ValueError, match=re.escape(f"Invalid log level {level!r} for {where}: it must be DEBUG, INFO")
        ):
            give()


def test_the_dict_config_is_what_logging_takes_and_changes_nothing_by_itself(tmp_path: Path) -> None:
    handlers = logging.getLogger().handlers[:]
    settings = get_logging_dict_config(replace(FULL, use_json_formatter=False, log_dir=str(tmp_path / "logs")))
    assert logging.getLogger().handlers == handlers
    assert list(tmp_path.iterdir()) == []
    assert settings["disable_existing_loggers"] is False
    assert list(settings["formatters"]) == [settings["handlers"]["file"]["formatter"]] == ["default"]
    assert settings["root"] == {"level": "WARNING", "handlers": ["file"], "propagate": False}
    assert settings["loggers"].pop("") is settings["root"]
    assert settings["loggers"] == {
        "abe.redis": {"level": "DEBUG", "propagate": False, "handlers": ["file"]},
        "shop": {"level": 15, "propagate": False, "handlers": ["file"]},
    }
    (tmp_path / "logs").mkdir()
    logging.config.dictConfig(settings)
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, RotatingFileHandler)
    assert (handler.maxBytes, handler.backupCount, handler.encoding) == (1000, 2, "utf-16")
    assert handler.baseFilename == str(tmp_path / "logs/shop.log")


@pytest.mark.skipif(not DOCS.exists(), reason="a source distribution has no docs")
def test_the_page_describes_every_setting_function_and_switch() -> None:
    page = DOCS.read_text("utf-8")
    names = [*(item.name for item in fields(LoggingConfig)), *utils.__all__]
    names += ["ABSTRACT_BACKEND_DEBUG", "MESSAGE_QUEUE_BACKEND_DEBUG", *PROVIDERS, "abe.consumer", "abe.engine"]
    assert [name for name in names if f"`{name}" not in page] == []


@pytest.mark.skipif(not DOCS.exists(), reason="a source distribution has no docs")
@pytest.mark.parametrize("item", fields(LoggingConfig), ids=lambda item: item.name)
def test_the_page_s_table_has_the_real_defaults(item: Any) -> None:
    row = re.search(rf"^\| `{item.name}` \| `(.*?)` \|", DOCS.read_text("utf-8"), re.MULTILINE)
    default = getattr(LoggingConfig(), item.name)
    assert row is not None
    assert eval(row[1]) == default

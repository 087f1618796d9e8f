"""Logging: what an application can set up, what the switches do, and that the library itself does neither."""

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest

import abe.logging
from abe.errors import ConfigurationError
from abe.logging import (
    LoggingConfig,
    apply_debug_switches,
    create_log_file_path,
    get_logger,
    get_logger_level,
    get_logging_dict_config,
    set_logger_level,
    setup_logging_from_config,
    utils,
)

DOCS = Path(__file__).parents[3] / "docs" / "LOGGING.md"
PROVIDERS = ("abe.memory", "abe.rabbitmq", "abe.redis", "abe.sqs")
TOUCHED = ("", "abe", "abe.consumer", "abe.kafka", "abe_kafka", "__main__", "asyncio", "shop", *PROVIDERS)


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging is the whole process's: what a test does to it is undone, and the switches are off."""
    monkeypatch.delenv("ABSTRACT_BACKEND_DEBUG", raising=False)
    monkeypatch.delenv("MESSAGE_QUEUE_BACKEND_DEBUG", raising=False)
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(item, item.handlers[:], item.level, item.propagate) for item in loggers]
    for item in loggers[1:]:
        item.setLevel(logging.NOTSET)
    yield
    for item, handlers, level, propagate in before:
        for handler in item.handlers:
            if handler not in handlers:
                handler.close()
        item.handlers[:], item.propagate = handlers, propagate
        item.setLevel(level)


class Console:
    """What was written to standard error so far."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture
        self.text = ""

    def getvalue(self) -> str:
        self.text += self.capture.readouterr().err
        return self.text


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(capsys)


def python(script: str, *, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_importing_every_module_leaves_logging_alone() -> None:
    done = python(
        "import importlib, logging, pkgutil\n"
        "before = logging.getLoggerClass(), logging.getLogRecordFactory(), logging.raiseExceptions\n"
        "import abe\n"
        "modules = [item.name for item in pkgutil.walk_packages(abe.__path__, 'abe.') if '__main__' not in item.name]\n"
        "for name in modules:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as exc:\n"
        "        assert not (exc.name or '').startswith('abe'), exc  # an extra that is not installed\n"
        "assert 'abe.logging.utils' in modules\n"
        "root = logging.getLogger()\n"
        "assert root.handlers == [] and root.level == logging.WARNING and root.filters == [] and not root.disabled\n"
        "for name, item in logging.root.manager.loggerDict.items():\n"
        "    if name.partition('.')[0] != 'abe' or isinstance(item, logging.PlaceHolder):\n"
        "        continue\n"
        "    assert all(isinstance(handler, logging.NullHandler) for handler in item.handlers), name\n"
        "    assert item.level == 0 and item.propagate and not item.disabled and item.filters == [], name\n"
        "assert before == (logging.getLoggerClass(), logging.getLogRecordFactory(), logging.raiseExceptions)\n"
        "assert logging.root.manager.disable == 0\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_switches_do_nothing_on_import() -> None:
    done = python(
        "import logging, abe.logging; assert logging.getLogger('abe').level == logging.NOTSET",
        ABSTRACT_BACKEND_DEBUG="true",
        MESSAGE_QUEUE_BACKEND_DEBUG="true",
    )
    assert done.returncode == 0, done.stderr


def test_the_standard_library_s_logging_is_still_the_one_that_is_imported() -> None:
    done = python("import abe.logging, logging; assert hasattr(logging, 'getLogger'), logging.__file__")
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("log_dir", [None, "logs", "elsewhere"])
def test_a_file_that_is_not_named_is_app_log_in_its_folder(
    log_dir: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setup_logging_from_config(
        LoggingConfig(format="%(message)s", enable_file=True, log_dir=log_dir, enable_console=False)
    )
    logging.getLogger("shop").info("sold")
    assert (tmp_path / (log_dir or "logs") / "app.log").read_text() == "sold\n"


def test_without_backups_the_file_is_never_rotated(tmp_path: Path) -> None:
    setup_logging_from_config(
        LoggingConfig(
            format="%(message)s",
            log_file=str(tmp_path / "shop.log"),
            enable_file=True,
            enable_console=False,
            max_bytes=1,
            backup_count=0,
        )
    )
    for number in range(3):
        logging.getLogger("shop").info("%s", number)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"shop.log": "0\n1\n2\n"}


def test_the_log_goes_to_standard_error(console: Console) -> None:
    setup_logging_from_config(LoggingConfig(format="%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("shop").info("sold %s", 3)
    logging.getLogger("shop").debug("not shown")
    assert console.getvalue() == "INFO shop: sold 3\n"


@pytest.mark.parametrize(("levels", "level"), [({}, logging.WARNING), ({"asyncio": "DEBUG"}, logging.DEBUG)])
def test_what_asyncio_tells_of_itself_is_left_out_unless_it_is_asked_for(
    levels: dict[str, int | str], level: int
) -> None:
    setup_logging_from_config(LoggingConfig(level="DEBUG", logger_levels=levels))
    assert logging.getLogger("asyncio").level == level


def test_without_a_config_the_defaults_are_set_up(console: Console) -> None:
    setup_logging_from_config()
    logging.getLogger("abe.consumer").info("hello")
    assert console.getvalue().endswith(" INFO abe.consumer: hello\n")


def test_setting_up_twice_doubles_no_line(console: Console) -> None:
    for _ in range(2):
        setup_logging_from_config(LoggingConfig(format="%(message)s"))
    logging.getLogger("shop").info("once")
    assert console.getvalue() == "once\n"


def test_a_logger_made_before_keeps_working(console: Console) -> None:
    logger = logging.getLogger("shop")
    setup_logging_from_config(LoggingConfig(format="%(message)s"))
    assert not logger.disabled
    logger.info("still here")
    assert console.getvalue() == "still here\n"


def test_single_loggers_have_their_own_levels(console: Console) -> None:
    levels: dict[str, int | str] = {"abe.redis": "debug", "shop": logging.ERROR}
    setup_logging_from_config(LoggingConfig(format="%(name)s %(message)s", logger_levels=levels))
    for name in ("abe.redis", "abe.consumer", "shop"):
        logging.getLogger(name).debug("debug")
        logging.getLogger(name).warning("warning")
    assert console.getvalue().splitlines() == ["abe.redis debug", "abe.redis warning", "abe.consumer warning"]


@pytest.mark.parametrize("propagate", [True, False])
def test_a_logger_with_its_own_level_writes_each_record_once_whether_it_propagates_or_not(
    propagate: bool, console: Console
) -> None:
    setup_logging_from_config(
        LoggingConfig(format="%(message)s", logger_levels={"abe.redis": "DEBUG"}, propagate=propagate)
    )
    seen: list[str] = []
    other = logging.NullHandler()
    other.handle = lambda record: seen.append(record.msg) is None  # type: ignore[method-assign]
    logging.getLogger().addHandler(other)
    logging.getLogger("abe.redis").debug("once")
    assert console.getvalue() == "once\n"
    assert seen == (["once"] if propagate else [])


def test_with_neither_console_nor_file_nothing_is_written(console: Console) -> None:
    setup_logging_from_config(LoggingConfig(enable_console=False))
    logging.getLogger("shop").error("nobody reads this")
    assert console.getvalue() == ""


def test_the_log_goes_to_a_file_in_a_folder_that_is_made(tmp_path: Path, console: Console) -> None:
    config = LoggingConfig(
        format="%(message)s",
        log_dir=str(tmp_path / "logs"),
        log_file="shop/today.log",
        enable_file=True,
        enable_console=False,
    )
    setup_logging_from_config(config)
    logging.getLogger("shop").info("sold ü")
    assert (tmp_path / "logs/shop/today.log").read_text("utf-8") == "sold ü\n"
    assert console.getvalue() == ""


def test_a_file_that_is_named_and_not_enabled_is_not_made(tmp_path: Path) -> None:
    setup_logging_from_config(LoggingConfig(log_dir=str(tmp_path), log_file="shop.log", enable_console=False))
    logging.getLogger("shop").info("sold")
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_is_rotated_and_the_oldest_is_dropped(tmp_path: Path) -> None:
    setup_logging_from_config(
        LoggingConfig(
            format="%(message)s",
            log_file=str(tmp_path / "shop.log"),
            enable_file=True,
            enable_console=False,
            max_bytes=10,
            backup_count=2,
        )
    )
    for number in range(5):
        logging.getLogger("shop").info("line %s..", number)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "shop.log": "line 4..\n",
        "shop.log.1": "line 3..\n",
        "shop.log.2": "line 2..\n",
    }


def test_a_file_that_cannot_be_written_is_an_error_that_leaves_logging_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    handlers = logging.getLogger().handlers[:]
    config = LoggingConfig(log_dir=str(tmp_path / "file"), log_file="shop.log", enable_file=True)
    with pytest.raises(ConfigurationError, match="cannot be created") as caught:
        setup_logging_from_config(config)
    assert isinstance(caught.value.__cause__, OSError)
    assert logging.getLogger().handlers == handlers


def test_json_lines_carry_the_fields_of_the_format_and_what_the_record_adds(console: Console) -> None:
    setup_logging_from_config(LoggingConfig(use_json_formatter=True, date_format="%Y"))
    logging.getLogger("shop").info("sold %s", 3, extra={"order_id": "o-1"})
    logging.getLogger("shop").info("two\nlines")
    first, second = (json.loads(line) for line in console.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}", first.pop("asctime"))
    assert first == {"levelname": "INFO", "name": "shop", "message": "sold 3", "order_id": "o-1"}
    assert second["message"] == "two\nlines"


def test_a_json_line_carries_the_exception(console: Console) -> None:
    setup_logging_from_config(LoggingConfig(use_json_formatter=True))
    try:
        raise ValueError("sold out")
    except ValueError:
        logging.getLogger("shop").exception("failed")
    assert "ValueError: sold out" in json.loads(console.getvalue())["exc_info"]


def test_json_without_its_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonjsonlogger.json", None)
    handlers = logging.getLogger().handlers[:]
    config = LoggingConfig(use_json_formatter=True)
    for use in (setup_logging_from_config, get_logging_dict_config):
        with pytest.raises(ConfigurationError, match=re.escape("pip install abe-core[json-logs]")) as caught:
            use(config)
        assert isinstance(caught.value.__cause__, ImportError)
    assert logging.getLogger().handlers == handlers


def test_lines_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonjsonlogger.json", None)
    setup_logging_from_config(LoggingConfig())


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


def test_a_log_file_is_made_a_path_in_its_folder_and_the_folder_is_made(tmp_path: Path) -> None:
    assert create_log_file_path(str(tmp_path / "logs"), "a/shop.log") == str(tmp_path / "logs/a/shop.log")
    assert (tmp_path / "logs/a").is_dir()
    assert not (tmp_path / "logs/a/shop.log").exists()


def test_a_log_file_without_a_name_is_app_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_log_file_path("logs") == "logs/app.log"
    assert (tmp_path / "logs").is_dir()


def test_a_config_s_file_without_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for log_file in ("shop.log", "x/../shop.log", "y/shop.log", str(tmp_path / "z/shop.log")):
        setup_logging_from_config(LoggingConfig(log_file=log_file, enable_file=True, enable_console=False))
        logging.getLogger("shop").info("sold")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.log")) == [
        "shop.log",
        "y/shop.log",
        "z/shop.log",
    ]


def test_a_path_may_wander_as_long_as_it_stays_inside(tmp_path: Path) -> None:
    assert create_log_file_path(str(tmp_path), "a/../shop.log") == str(tmp_path / "shop.log")
    assert create_log_file_path(str(tmp_path), str(tmp_path / "shop.log")) == str(tmp_path / "shop.log")


def test_a_folder_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert create_log_file_path(str(tmp_path / "link"), "a/shop.log") == str(tmp_path / "link/a/shop.log")
    assert (tmp_path / "real/a").is_dir()


@pytest.mark.parametrize(
    "log_file",
    ["../shop.log", "a/../../shop.log", "/etc/shop.log", "..", ".", "a/..", "../logs-2/shop.log", "link/shop.log"],
)
def test_a_path_that_leads_out_of_the_folder_is_refused_and_nothing_is_made(log_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    for use in (create_log_file_path, _config_path):
        with pytest.raises(ConfigurationError, match="the log file must stay inside"):
            use(str(folder), log_file)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def _config_path(log_dir: str, log_file: str) -> None:
    get_logging_dict_config(LoggingConfig(log_file=log_file, log_dir=log_dir, enable_file=True))


@pytest.mark.parametrize("log_file", ["", "a/", "folder", "a\x00b"])
def test_a_path_that_names_no_file_is_refused(log_file: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match="the log file"):
        create_log_file_path(str(tmp_path), log_file)


@pytest.mark.parametrize("where", [("root",), ("loggers", "")])
def test_the_root_logger_is_changed_in_either_of_its_places(where: tuple[str, ...], console: Console) -> None:
    settings = get_logging_dict_config(LoggingConfig(format="%(message)s"))
    place: Any = settings
    for step in where:
        place = place[step]
    place["level"] = "ERROR"
    logging.config.dictConfig(settings)
    logging.getLogger("shop").warning("not shown")
    logging.getLogger("shop").error("shown once")
    assert console.getvalue() == "shown once\n"


def test_a_logger_is_the_standard_one_with_nothing_added() -> None:
    assert get_logger("shop") is logging.getLogger("shop")
    assert get_logger() is logging.getLogger("abe")
    assert get_logger("shop").handlers == []


def test_a_level_that_is_set_is_the_level_that_holds_and_that_those_below_follow() -> None:
    set_logger_level("abe", "error")
    assert get_logger_level("abe") == get_logger_level() == get_logger_level("abe.redis") == "ERROR"
    set_logger_level("abe.redis", 15)
    assert get_logger_level("abe.redis") == "Level 15"
    assert get_logger_level("abe.consumer") == "ERROR"


def levels() -> dict[str, int]:
    """The levels that loggers have of their own."""
    return {name: logging.getLogger(name).level for name in TOUCHED[1:] if logging.getLogger(name).level}


@pytest.mark.parametrize("environ", [{}, {"ABSTRACT_BACKEND_DEBUG": "false", "MESSAGE_QUEUE_BACKEND_DEBUG": "0"}])
def test_switches_that_are_off_change_nothing(environ: dict[str, str]) -> None:
    logging.getLogger("abe").setLevel(logging.ERROR)
    apply_debug_switches(environ, provider="kafka", package="abe_kafka")
    assert levels() == {"abe": logging.ERROR}


def test_the_core_s_switch_puts_the_core_at_debug() -> None:
    apply_debug_switches({"ABSTRACT_BACKEND_DEBUG": "true"})
    assert levels() == {"abe": logging.DEBUG}
    assert logging.getLogger("abe.consumer").isEnabledFor(logging.DEBUG)


def test_the_provider_s_switch_puts_our_providers_at_debug_and_not_the_core() -> None:
    apply_debug_switches({"MESSAGE_QUEUE_BACKEND_DEBUG": "true"})
    assert levels() == dict.fromkeys(PROVIDERS, logging.DEBUG)
    assert not logging.getLogger("abe.consumer").isEnabledFor(logging.DEBUG)


def test_the_provider_s_switch_finds_a_stranger_s_provider_by_its_name_and_by_its_package() -> None:
    apply_debug_switches({"MESSAGE_QUEUE_BACKEND_DEBUG": "true"}, provider="kafka", package="abe_kafka.backend")
    assert levels() == dict.fromkeys([*PROVIDERS, "abe.kafka", "abe_kafka"], logging.DEBUG)


@pytest.mark.parametrize("package", ["abe.backends.message_queue.service.memory", "__main__", ""])
def test_a_provider_in_the_core_or_in_a_script_has_no_package_logger_of_its_own(package: str) -> None:
    apply_debug_switches({"MESSAGE_QUEUE_BACKEND_DEBUG": "true"}, provider="memory", package=package)
    assert levels() == dict.fromkeys(PROVIDERS, logging.DEBUG)


def test_the_switches_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABSTRACT_BACKEND_DEBUG", "yes")
    apply_debug_switches()
    assert levels() == {"abe": logging.DEBUG}


def test_the_switches_add_no_handler() -> None:
    handlers = {name: logging.getLogger(name).handlers[:] for name in TOUCHED}
    apply_debug_switches({"ABSTRACT_BACKEND_DEBUG": "1", "MESSAGE_QUEUE_BACKEND_DEBUG": "1"}, provider="kafka")
    assert {name: logging.getLogger(name).handlers for name in TOUCHED} == handlers


@pytest.mark.parametrize("variable", ["ABSTRACT_BACKEND_DEBUG", "MESSAGE_QUEUE_BACKEND_DEBUG"])
def test_a_switch_that_is_neither_on_nor_off_is_named_and_nothing_is_changed(variable: str) -> None:
    environ = {"ABSTRACT_BACKEND_DEBUG": "1", "MESSAGE_QUEUE_BACKEND_DEBUG": "1", variable: "maybe"}
    with pytest.raises(ConfigurationError, match=f"^{variable} must be true or false, not 'maybe'$"):
        apply_debug_switches(environ)
    assert levels() == {}


def test_a_switch_wins_over_a_config_whichever_comes_first(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND_DEBUG", "true")
    apply_debug_switches()
    setup_logging_from_config(LoggingConfig(format="%(message)s", logger_levels={"abe": "ERROR", "abe.redis": "ERROR"}))
    logging.getLogger("abe.redis").debug("seen")
    logging.getLogger("abe.consumer").warning("not seen")
    assert console.getvalue() == "seen\n"


def test_the_package_exports_what_utils_exports() -> None:
    assert abe.logging.__all__ == utils.__all__ == sorted(utils.__all__)
    assert all(getattr(abe.logging, name) is getattr(utils, name) for name in utils.__all__)


def blocks(language: str) -> list[str]:
    if not DOCS.exists():
        return []
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_example_on_the_page_runs(block: str, tmp_path: Path) -> None:
    done = python(block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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

"""Logging: what an application can set up, what the switches do, and that the library itself does neither."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import abe.logging
from abe.errors import ConfigurationError
from abe.logging import (
    LoggingConfig,
    apply_debug_switches,
    get_logger,
    get_logger_level,
    get_logging_dict_config,
    set_logger_level,
    setup_logging_from_config,
    utils,
)

pytestmark = pytest.mark.usefixtures("logging_as_before")

DOCS = Path(__file__).parents[3] / "docs" / "LOGGING.md"
PROVIDERS = ("abe.memory", "abe.rabbitmq", "abe.redis", "abe.sqs")
TOUCHED = ("", "abe", "abe.consumer", "abe.kafka", "abe_kafka", "__main__", "asyncio", "shop", *PROVIDERS)


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


def test_a_switch_wins_over_a_later_config_for_a_stranger_s_provider_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND_DEBUG", "true")
    apply_debug_switches(provider="kafka", package="abe_kafka.backend")
    setup_logging_from_config(LoggingConfig(logger_levels={"abe": "INFO", "abe_kafka": "INFO"}))
    assert [get_logger_level(name) for name in ("abe", "abe.kafka", "abe_kafka")] == ["INFO", "DEBUG", "DEBUG"]


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

"""Where a log file may be."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from abe.errors import ConfigurationError
from abe.logging import LoggingConfig, create_log_file_path, get_logging_dict_config, setup_logging_from_config

pytestmark = pytest.mark.usefixtures("logging_as_before")


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


def test_a_second_config_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    first = LoggingConfig(
        enable_console=False, enable_file=True, log_dir=str(tmp_path), log_file="one.log", propagate=False
    )
    setup_logging_from_config(replace(first, logger_levels={"shop": "DEBUG"}))
    setup_logging_from_config(replace(first, log_file="two.log"))
    logging.getLogger("shop").debug("too quiet")
    logging.getLogger("shop").warning("sold out")
    assert (tmp_path / "one.log").read_text() == ""
    assert "sold out" in (text := (tmp_path / "two.log").read_text())
    assert "too quiet" not in text

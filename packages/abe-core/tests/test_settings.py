"""Settings: what is read, what is refused and how, and what is never shown."""

import os
import subprocess
import sys
import tokenize
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

import abe
from abe.errors import ConfigurationError
from abe.settings import QueueSettings, env_flag, env_text, plain_name, setting

SECRET = "hunter2-and-more"


def _port(text: str) -> int:
    if not text.isdigit():
        raise ValueError("a port number")
    return int(text)


@dataclass(frozen=True, kw_only=True, repr=False)
class BrokerSettings(QueueSettings):
    url: str = setting("BROKER_URL", str, help="Where the broker is.", secret=True)
    token: int = setting("BROKER_TOKEN", _port, default=1, help="A secret number.", secret=True)


@dataclass(frozen=True, kw_only=True)
class ForgetfulSettings(QueueSettings):
    url: str = setting("BROKER_URL", str, help="Where the broker is.", secret=True)


def variable(name: str) -> str:
    return str(next(item.metadata["variable"] for item in fields(QueueSettings) if item.name == name))


def test_nothing_set_gives_the_defaults() -> None:
    assert QueueSettings.from_env({}) == QueueSettings()


def test_an_empty_variable_counts_as_unset() -> None:
    assert QueueSettings.from_env({item.metadata["variable"]: "" for item in fields(QueueSettings)}) == QueueSettings()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("namespace", "orders.v2", "orders.v2"),
        ("groups", "billing, audit ,", {"billing": (), "audit": ()}),
        ("groups", "billing = order.* | user.created,audit", {"billing": ("order.*", "user.created"), "audit": ()}),
        ("prefetch", "1", 1),
        ("lease", "0.5", 0.5),
        ("max_attempts", "12", 12),
        ("publish_timeout", "3", 3.0),
        ("close_timeout", "3", 3.0),
        ("max_backlog", "1000", 1000),
        ("max_unconfirmed", "7", 7),
        ("max_unconfirmed_bytes", "8", 8),
    ],
)
def test_each_variable_sets_its_setting(name: str, text: str, value: Any) -> None:
    settings = QueueSettings.from_env({variable(name): text})
    assert getattr(settings, name) == value
    assert settings == replace(QueueSettings(), **{name: value})


def test_every_setting_is_tried_above() -> None:
    marks: Any = test_each_variable_sets_its_setting
    assert {case[0] for case in marks.pytestmark[0].args[1]} == {item.name for item in fields(QueueSettings)}


BAD_TEXT = [
    ("namespace", "a b"),
    ("namespace", "-a"),
    ("namespace", "a" * 65),
    ("namespace", "Bücher"),
    ("namespace", "a\n"),
    ("groups", "ok,not ok"),
    ("prefetch", "0"),
    ("prefetch", "many"),
    ("prefetch", "1.5"),
    ("lease", "0"),
    ("lease", "-1"),
    ("lease", "nan"),
    ("lease", "inf"),
    ("lease", "soon"),
    ("max_attempts", "0"),
    ("publish_timeout", "0"),
    ("close_timeout", "0"),
    ("max_backlog", "0"),
    ("max_unconfirmed", "-1"),
    ("max_unconfirmed_bytes", "x"),
]


@pytest.mark.parametrize(("name", "text"), BAD_TEXT)
def test_a_bad_variable_is_named_with_what_it_should_be_and_what_it_is(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        QueueSettings.from_env({variable(name): text})
    assert str(caught.value).startswith(f"{variable(name)} (setting {name!r}) must be ")
    assert ", not " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", None),
        ("namespace", 5),
        ("groups", "billing"),
        ("groups", ["billing"]),
        ("groups", ("not ok",)),
        ("groups", None),
        ("prefetch", None),
        ("prefetch", True),
        ("prefetch", "5"),
        ("prefetch", 0),
        ("lease", None),
        ("lease", True),
        ("lease", "30"),
        ("lease", float("nan")),
        ("lease", float("inf")),
        ("max_attempts", None),
        ("max_backlog", 0),
        ("max_unconfirmed", 1.0),
    ],
)
def test_a_bad_argument_is_refused_like_a_bad_variable(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{variable(name)} \(setting '{name}'\) must be .*, not "):
        QueueSettings(**{name: value})


def test_none_is_a_value_where_it_is_the_default() -> None:
    assert QueueSettings(max_backlog=None).max_backlog is None


def test_a_required_variable_that_is_missing_is_named_with_what_it_is_for() -> None:
    with pytest.raises(ConfigurationError, match=r"^BROKER_URL is not set: Where the broker is\.$"):
        BrokerSettings.from_env({})


def test_the_environment_is_read_when_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_URL", "broker://here")
    assert BrokerSettings.from_env().url == "broker://here"


def test_settings_cannot_be_changed() -> None:
    settings = QueueSettings()
    with pytest.raises(FrozenInstanceError):
        settings.prefetch = 1  # type: ignore[misc]


def test_settings_are_equal_by_value_and_can_be_keys() -> None:
    assert len({QueueSettings(), QueueSettings(), QueueSettings(prefetch=1)}) == 2


def test_settings_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        QueueSettings("orders")  # type: ignore[misc]


def test_repr_shows_every_setting_and_no_secret() -> None:
    shown = repr(BrokerSettings(url=f"broker://user:{SECRET}@host"))
    assert SECRET not in shown
    assert "url=***" in shown
    assert "prefetch=20" in shown


def test_a_subclass_with_the_dataclass_repr_shows_no_secret_either() -> None:
    assert SECRET not in repr(ForgetfulSettings(url=SECRET))


def test_an_error_about_a_secret_does_not_show_it() -> None:
    with pytest.raises(ConfigurationError) as caught:
        BrokerSettings.from_env({"BROKER_URL": "broker://here", "BROKER_TOKEN": SECRET})
    assert str(caught.value) == "BROKER_TOKEN (setting 'token') must be a port number"


def test_an_uncaught_error_about_a_secret_prints_it_nowhere() -> None:
    script = (
        "from dataclasses import dataclass\n"
        "from abe.settings import QueueSettings, integer, setting\n"
        "@dataclass(frozen=True, kw_only=True, repr=False)\n"
        "class Settings(QueueSettings):\n"
        "    pin: int = setting('PIN', integer(1), help='A secret.', secret=True)\n"
        "Settings.from_env()\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PIN": SECRET}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert "PIN (setting 'pin') must be an integer of at least 1" in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "on", " on "])
def test_a_switch_is_on(text: str) -> None:
    assert env_flag("SWITCH", {"SWITCH": text})


@pytest.mark.parametrize("environ", [{}, {"SWITCH": ""}, {"SWITCH": "0"}, {"SWITCH": "False"}, {"SWITCH": "off"}])
def test_a_switch_is_off(environ: dict[str, str]) -> None:
    assert not env_flag("SWITCH", environ)


def test_a_switch_that_is_neither_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^SWITCH must be true or false, not 'maybe'$"):
        env_flag("SWITCH", {"SWITCH": "maybe"})


def test_the_first_variable_that_is_set_wins() -> None:
    environ = {"A": "", "B": "b", "C": "c"}
    assert env_text("A", "B", "C", environ=environ) == "b"
    assert env_text("A", environ=environ) is None


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 64])
def test_a_plain_name_is_one(name: str) -> None:
    assert plain_name(name) == name


def test_the_readme_s_table_is_the_settings_class() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for item in fields(QueueSettings):
        default = "unset" if item.default is None or item.default_factory is dict else f"`{item.default}`"
        row = f"| `{item.metadata['variable']}` | `{item.name}` | {default} | {item.metadata['help']} |"
        assert row in readme.splitlines()


def test_only_one_module_reads_the_environment() -> None:
    package = Path(abe.__path__[0])
    readers = {str(path.relative_to(package)) for path in package.rglob("*.py") if "os.environ" in code(path)}
    assert readers == {"settings.py"}


def code(path: Path) -> str:
    """The source without comments and texts."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return "".join(token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP))

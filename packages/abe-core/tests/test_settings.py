"""Settings: what is read, what is refused and how, and what is never shown."""

import copy
import importlib
import os
import pickle
import re
import subprocess
import sys
import tokenize
import traceback
import warnings
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


@dataclass(frozen=True, kw_only=True, repr=False)
class OptionalSettings(QueueSettings):
    url: str | None = setting("BROKER_URL", str, default=None, help="Where the broker is.", secret=True)
    token: int = setting("BROKER_TOKEN", _port, default=1, help="A secret number.", secret=True)


BROKER = BrokerSettings(url=f"broker://user:{SECRET}@host")


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
    ("groups", "=order.*"),
    ("groups", "billing="),
    ("groups", "billing=order.*|"),
    ("groups", "billing=order.*,billing=user.*"),
    ("groups", "billing=order*"),
    ("groups", "billing=order.>|user.*"),
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
        ("groups", {"not ok": ()}),
        ("groups", {"billing": "order.*"}),
        ("groups", {"billing": ["order.*"]}),
        ("groups", {"billing": ("order.*", "user*")}),
        ("groups", {"billing": ("",)}),
        ("groups", {"billing": (5,)}),
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


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("billing=order*", "'order*' of 'billing' must be a pattern whose wildcards are whole words"),
        ("billing=order*", "write 'order.*' or 'order.#'"),
        ("billing=order.*,billing=user.*", "'billing' is given twice (a bar separates its patterns"),
        ("billing=", "'billing' has an empty pattern (without the '=', it gets every key)"),
        ("=order.*", "'=order.*' names no group"),
        ("billing order.*", "'billing order.*' is none"),
    ],
)
def test_groups_that_cannot_be_read_are_told_what_is_wrong_with_which(text: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(right)):
        QueueSettings.from_env({"QUEUE_GROUPS": text})


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
    with pytest.raises(
        ConfigurationError, match="BrokerSettings takes its settings by name: namespace, groups,"
    ) as caught:
        BrokerSettings(f"broker://user:{SECRET}@host")  # type: ignore[misc]
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prefech", "BrokerSettings has no setting 'prefech': did you mean 'prefetch'?"),
        ("xyzzy", "BrokerSettings has no setting 'xyzzy': there are namespace, groups,"),
    ],
)
def test_a_setting_that_there_is_none_of_is_refused_with_the_close_one(name: str, text: str) -> None:
    for make in (lambda: BrokerSettings(url="here", **{name: SECRET}), lambda: replace(BROKER, **{name: SECRET})):
        with pytest.raises(ConfigurationError, match=re.escape(text)) as caught:
            make()
        assert SECRET not in str(caught.value)


def test_settings_can_be_copied_and_pickled() -> None:
    assert copy.deepcopy(BROKER) == pickle.loads(pickle.dumps(BROKER)) == BROKER


def warned(settings: type[QueueSettings], **environ: str) -> list[str]:
    """Return the warnings that reading these variables gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings.from_env(environ)
    assert all(warning.filename == __file__ for warning in caught), "a warning points at the caller"
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("QUEUE_PREFECH", "QUEUE_PREFETCH"),
        ("QUEUE_PREFETCH_COUNT", "QUEUE_PREFETCH"),
        ("QUEUE_MAX_ATEMPTS", "QUEUE_MAX_ATTEMPTS"),
        ("QUEUE_LEASE", "QUEUE_LEASE_SECONDS"),
        ("QUEUE_BAKCEND", "QUEUE_BACKEND"),
        ("QEUE_BACKEND", "QUEUE_BACKEND"),
        ("queue_namespace", "QUEUE_NAMESPACE"),
        ("MESSAGE_QUEUE_BACKEN", "MESSAGE_QUEUE_BACKEND"),
        ("BROKER_URI", "BROKER_URL"),
        ("BROKER_TOKN", "BROKER_TOKEN"),
        ("broker_url", "BROKER_URL"),
    ],
)
def test_a_misspelt_variable_is_a_warning_that_names_the_close_one_and_not_its_value(name: str, meant: str) -> None:
    assert warned(OptionalSettings, **{name: SECRET}) == [
        f"the variable {name} is set, but is not a setting of the message queue: did you mean {meant}?"
    ]


def test_a_queue_variable_close_to_nothing_is_a_warning_too() -> None:
    assert warned(QueueSettings, QUEUE_XYZZY="1") == [
        "the variable QUEUE_XYZZY is set, but is not a setting of the message queue"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "BROKER_HOST",
        "BROKER_USER",
        "BROKER_CONFIG_FILE",
        "QUEUE_PORT",
        "QUEUE_PORT_5672_TCP",
        "QUEUE_PORT_5672_TCP_ADDR",
        "QUEUE_SERVICE_HOST",
        "QUEUE_SERVICE_PORT_AMQP",
        "AWS_ENDPOINT_URL_S3",
        "PATH",
        "HOME",
        "_",
    ],
)
def test_what_other_software_reads_is_no_misspelling(name: str) -> None:
    assert warned(OptionalSettings, **{name: "1"}) == []


def test_a_variable_close_to_one_that_is_set_is_somebody_elses() -> None:
    assert warned(BrokerSettings, BROKER_URL="here", BROKER_URI="there") == []


def test_known_variables_and_empty_ones_are_no_misspellings() -> None:
    ours = {item.metadata["variable"]: "" for item in fields(BrokerSettings)}
    others = {"QUEUE_BACKEND": "memory", "MESSAGE_QUEUE_BACKEND": "memory", "QUEUE_PREFECH": ""}
    assert warned(OptionalSettings, **ours, **others) == []


@pytest.mark.parametrize("provider", ["rabbitmq", "redis", "sqs"])
def test_the_variables_that_go_with_our_brokers_are_no_misspellings(provider: str) -> None:
    package = importlib.import_module(f"abe_backend_{provider}")
    settings = getattr(package, next(name for name in package.__all__ if name.endswith("Settings")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings.from_env(dict.fromkeys(FOREIGN, "1"))


FOREIGN = [
    *("REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_USER", "REDIS_TLS", "REDIS_TLS_URL", "REDIS_PREFIX"),
    *("REDIS_SERVICE_HOST", "REDIS_PORT_6379_TCP", "REDIS_CLUSTER", "REDIS_SENTINEL_HOSTS", "REDISCLI_AUTH"),
    *("RABBITMQ_HOST", "RABBITMQ_PORT", "RABBITMQ_USER", "RABBITMQ_NODENAME", "RABBITMQ_NODE_PORT", "RABBITMQ_VHOST"),
    *("RABBITMQ_DEFAULT_USER", "RABBITMQ_DEFAULT_PASS", "RABBITMQ_CONFIG_FILE", "RABBITMQ_LOGS", "RABBITMQ_BASE"),
    *("AWS_PAGER", "AWS_EXECUTION_ENV", "AWS_ROLE_ARN", "SQS_QUEUE_URL", "SQS_ENDPOINT", "SQS_REGION"),
]
"""Variables of the brokers' own software, and of other programs that use them."""


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


@pytest.mark.parametrize("name", ["QUEUE_NAMESPACE", "QUEUE_GROUPS", "QUEUE_PREFETCH", "QUEUE_LEASE_SECONDS"])
def test_an_address_in_another_setting_s_place_is_not_shown(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        QueueSettings.from_env({name: f"broker://user:{SECRET}@host"})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


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

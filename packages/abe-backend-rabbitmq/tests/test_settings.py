"""What the settings accept, and how they refuse."""

import re
from typing import Any

import pytest

from abe.errors import ConfigurationError
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings

SECRET = "swordfish-8061"


def test_the_generic_variables_make_an_address() -> None:
    settings = RabbitMQSettings.from_env(
        {
            "MESSAGE_QUEUE_HOST": "rabbit",
            "MESSAGE_QUEUE_PORT": "5673",
            "MESSAGE_QUEUE_USERNAME": "a@b",
            "MESSAGE_QUEUE_PASSWORD": "p/w",
            "MESSAGE_QUEUE_VHOST": "a/b",
            "MESSAGE_QUEUE_EXCHANGE": "shop",
        }
    )
    assert settings.urls == ("amqp://a%40b:p%2Fw@rabbit:5673/a%2Fb",)
    assert settings.exchange == "shop"
    assert "p/w" not in repr(settings)


def test_without_any_it_is_the_broker_s_own_default() -> None:
    assert RabbitMQSettings.from_env({}).urls == ("amqp://guest:guest@localhost:5672/",)


def test_a_host_that_is_a_number_stands_in_brackets() -> None:
    assert RabbitMQSettings(host="::1").urls == ("amqp://guest:guest@[::1]:5672/",)


def test_every_setting_has_its_variable() -> None:
    settings = RabbitMQSettings.from_env(
        {
            "RABBITMQ_URL": "amqps://rabbit",
            "RABBITMQ_CA_FILE": "/ca.pem",
            "RABBITMQ_CERTIFICATE_FILE": "/app.pem",
            "RABBITMQ_KEY_FILE": "/app.key",
            "RABBITMQ_HEARTBEAT_SECONDS": "7",
            "RABBITMQ_CONNECT_TIMEOUT_SECONDS": "2.5",
            "QUEUE_NAMESPACE": "shop",
        }
    )
    assert (settings.ca_file, settings.certificate_file, settings.key_file) == ("/ca.pem", "/app.pem", "/app.key")
    assert (settings.heartbeat, settings.connect_timeout) == (7.0, 2.5)
    assert settings.namespace == "shop"


def test_several_addresses_are_taken_in_turn() -> None:
    settings = RabbitMQSettings.from_env({"RABBITMQ_URL": "amqp://one, amqps://two/shop"})
    assert settings.urls == ("amqp://one", "amqps://two/shop")


@pytest.mark.parametrize(
    ("variable", "same", "other"),
    [
        ("MESSAGE_QUEUE_HOST", "Rabbit", "hare"),
        ("MESSAGE_QUEUE_PORT", "5671", "5672"),
        ("MESSAGE_QUEUE_USERNAME", "app", "guest"),
        ("MESSAGE_QUEUE_PASSWORD", SECRET, f"other-{SECRET}"),
        ("MESSAGE_QUEUE_VHOST", "shop", "/"),
    ],
)
def test_an_address_and_a_variable_that_say_different_things_are_refused(variable: str, same: str, other: str) -> None:
    url = {"RABBITMQ_URL": f"amqps://app:{SECRET}@rabbit/shop"}
    RabbitMQSettings.from_env({**url, variable: same})
    with pytest.raises(ConfigurationError, match=variable) as caught:
        RabbitMQSettings.from_env({**url, variable: other})
    assert "RABBITMQ_URL" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_host_that_only_one_of_several_addresses_has_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="MESSAGE_QUEUE_HOST and RABBITMQ_URL"):
        RabbitMQSettings(url="amqp://one,amqp://two", host="one")


@pytest.mark.parametrize(
    "url",
    ["amqp://h", "amqp://h/", "amqp://[::1]:5672/a%2Fb", "amqps://u:p%40%2F%3F%23@h:1/v", "amqp://a,amqps://b:7/v"],
)
def test_urls_that_rabbitmq_can_be_at(url: str) -> None:
    assert RabbitMQSettings(url=url).url == url


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://h", "its scheme is 'http'"),
        (f"//:{SECRET}@h", "its scheme is ''"),
        (f"amqp://h,redis://:{SECRET}@h", "its scheme is 'redis'"),
        (f"amqp://u:12,{SECRET}:x@h", "its scheme is ''"),
        (f"amqp://u:{SECRET}@", "the host is missing"),
        (f"amqp://u:{SECRET}@h:0", "the port is 0"),
        (f"amqp://u:{SECRET}@h:70000", "a port from 1 to 65535"),
        (f"amqp://u:{SECRET}@h:port", "a port from 1 to 65535"),
        (f"amqp://u:{SECRET}@[::1", "amqp://"),
        (f"amqp://u:{SECRET}@h/a/b", "a slash in the name of a vhost is written %2F"),
        (f"amqp://u:12#{SECRET}@h:5672/", "must be percent-encoded"),
        (f"amqp://u:12?{SECRET}@h:5672/", "must be percent-encoded"),
        (f"amqp://u:12/{SECRET}@h:5672", "must be percent-encoded"),
        (f"amqps://u:{SECRET}@h?cafile=/ca.pem", "instead of cafile: say RABBITMQ_CA_FILE"),
        (f"amqps://u:{SECRET}@h?certfile=/a", "instead of certfile: say RABBITMQ_CERTIFICATE_FILE"),
        (f"amqps://u:{SECRET}@h?keyfile=/a", "instead of keyfile: say RABBITMQ_KEY_FILE"),
        (f"amqps://u:{SECRET}@h?capath=/a", "instead of capath: say RABBITMQ_CA_FILE"),
        (f"amqps://u:{SECRET}@h?cadata=a", "instead of cadata: say RABBITMQ_CA_FILE"),
        (f"amqps://u:{SECRET}@h?no_verify_ssl=1", "certificates are always verified"),
        (f"amqp://u:{SECRET}@h?heartbeat=5", "say RABBITMQ_HEARTBEAT_SECONDS"),
        (f"amqp://u:{SECRET}@h?timeout=5", "say RABBITMQ_CONNECT_TIMEOUT_SECONDS"),
        (f"amqp://u:{SECRET}@h?connection_attempts=5", "instead of connection_attempts: nothing, the provider sets it"),
        (f"amqp://h?{SECRET}=1", "without query parameters"),
    ],
)
def test_a_bad_url_is_named_with_what_is_wrong_and_without_its_password(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)) as caught:
        RabbitMQSettings.from_env({"RABBITMQ_URL": url})
    assert "RABBITMQ_URL" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_url_must_be_text() -> None:
    with pytest.raises(ConfigurationError, match="RABBITMQ_URL"):
        RabbitMQSettings(url=5672)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"key_file": "/k"}, "RABBITMQ_KEY_FILE is set, and RABBITMQ_CERTIFICATE_FILE"),
        ({"url": "amqps://h", "key_file": "/k"}, "RABBITMQ_KEY_FILE is set, and RABBITMQ_CERTIFICATE_FILE"),
        ({"ca_file": "/c"}, "RABBITMQ_CA_FILE is set, and TLS is not asked for: RABBITMQ_URL must begin with amqps://"),
        ({"url": "amqp://h", "certificate_file": "/c"}, "RABBITMQ_CERTIFICATE_FILE is set, and TLS is not asked for"),
        ({"host": "h", "certificate_file": "/c", "key_file": "/k"}, "RABBITMQ_URL must begin with amqps://"),
    ],
)
def test_files_for_tls_that_make_no_sense_are_refused(files: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        RabbitMQSettings(**files)


def test_a_certificate_may_be_in_one_file_with_its_key_and_one_of_the_addresses_may_do_without_tls() -> None:
    assert RabbitMQSettings(url="amqp://a,amqps://b", certificate_file="/both.pem").key_file is None


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_the_time_to_connect_is_a_number_of_seconds(text: str) -> None:
    with pytest.raises(ConfigurationError, match="RABBITMQ_CONNECT_TIMEOUT_SECONDS"):
        RabbitMQSettings.from_env({"RABBITMQ_CONNECT_TIMEOUT_SECONDS": text})


@pytest.mark.parametrize("text", ["0", "0.5", "1.5", "65535", "soon", "inf", "nan"])
def test_the_heartbeat_is_what_the_protocol_can_say(text: str) -> None:
    """In the protocol 0 means none, and so does what does not fit into two bytes in the client."""
    with pytest.raises(ConfigurationError, match="RABBITMQ_HEARTBEAT_SECONDS"):
        RabbitMQSettings.from_env({"RABBITMQ_HEARTBEAT_SECONDS": text})


@pytest.mark.parametrize("name", ["amq.topic", "x" * 128, "bücher", "a'b", "a\n"])
def test_an_exchange_that_cannot_be_ours_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="MESSAGE_QUEUE_EXCHANGE"):
        RabbitMQSettings.from_env({"MESSAGE_QUEUE_EXCHANGE": name})


def test_no_repr_shows_a_credential() -> None:
    for settings in (RabbitMQSettings(url=f"amqp://app:{SECRET}@h"), RabbitMQSettings(password=SECRET)):
        assert SECRET not in repr(settings)
        assert SECRET not in str(settings)
        assert SECRET not in repr(RabbitMQBackend(settings))


def test_the_backend_is_made_from_the_environment_without_input_or_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RABBITMQ_URL", "amqps://127.0.0.1:1")
    monkeypatch.setenv("RABBITMQ_CA_FILE", "/nowhere/ca.pem")
    assert RabbitMQBackend.from_env().settings.urls == ("amqps://127.0.0.1:1",)

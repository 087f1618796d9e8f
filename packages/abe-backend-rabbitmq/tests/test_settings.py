"""What the settings accept, and how they refuse."""

import pytest

from abe.errors import ConfigurationError
from abe_backend_rabbitmq import RabbitMQSettings


def test_the_generic_variables_make_an_address() -> None:
    settings = RabbitMQSettings.from_env(
        {
            "MESSAGE_QUEUE_HOST": "rabbit",
            "MESSAGE_QUEUE_PORT": "5673",
            "MESSAGE_QUEUE_USERNAME": "a@b",
            "MESSAGE_QUEUE_PASSWORD": "p/w",
            "MESSAGE_QUEUE_VHOST": "a/b",
        }
    )
    assert settings.urls == ("amqp://a%40b:p%2Fw@rabbit:5673/a%2Fb",)
    assert "p/w" not in repr(settings)


def test_without_any_it_is_the_broker_s_own_default() -> None:
    assert RabbitMQSettings.from_env({}).urls == ("amqp://guest:guest@localhost:5672/",)


def test_several_addresses_are_taken_in_turn() -> None:
    settings = RabbitMQSettings.from_env({"RABBITMQ_URL": "amqp://one, amqps://two/shop"})
    assert settings.urls == ("amqp://one", "amqps://two/shop")


@pytest.mark.parametrize(
    ("variable", "same", "other"),
    [
        ("MESSAGE_QUEUE_HOST", "rabbit", "hare"),
        ("MESSAGE_QUEUE_PORT", "5671", "5672"),
        ("MESSAGE_QUEUE_USERNAME", "app", "guest"),
        ("MESSAGE_QUEUE_PASSWORD", "swordfish", "guest"),
        ("MESSAGE_QUEUE_VHOST", "shop", "/"),
    ],
)
def test_an_address_and_a_variable_that_say_different_things_are_refused(variable: str, same: str, other: str) -> None:
    url = {"RABBITMQ_URL": "amqps://app:swordfish@rabbit/shop"}
    RabbitMQSettings.from_env({**url, variable: same})
    with pytest.raises(ConfigurationError, match=variable) as caught:
        RabbitMQSettings.from_env({**url, variable: other})
    assert "RABBITMQ_URL" in str(caught.value)
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "amqp://",
        "amqp://host:0",
        "amqp://host:x",
        "amqp://host/a/b",
        "amqp://a:p@w@host/x@y",
        "amqp://h,redis://h",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="RABBITMQ_URL"):
        RabbitMQSettings.from_env({"RABBITMQ_URL": url})


@pytest.mark.parametrize("name", ["amq.topic", "x" * 201])
def test_an_exchange_that_cannot_be_ours_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="MESSAGE_QUEUE_EXCHANGE"):
        RabbitMQSettings.from_env({"MESSAGE_QUEUE_EXCHANGE": name})

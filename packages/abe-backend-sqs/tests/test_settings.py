"""What the provider can be told."""

import pytest

from abe.errors import ConfigurationError
from abe_backend_sqs import SqsBackend, SqsSettings


def test_the_sdk_s_variables_are_read_the_particular_before_the_general() -> None:
    general = {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "http://localhost:1"}
    particular = {"AWS_REGION": "eu-west-2", "AWS_ENDPOINT_URL_SQS": "http://localhost:2"}
    settings = SqsSettings.from_env(general)
    assert (settings.region, settings.endpoint_url) == ("eu-west-1", "http://localhost:1")
    settings = SqsSettings.from_env(general | particular)
    assert (settings.region, settings.endpoint_url) == ("eu-west-2", "http://localhost:2")


def test_nothing_needs_to_be_set() -> None:
    settings = SqsSettings.from_env({})
    assert (settings.region, settings.wait, settings.ensure, settings.pinned) == (None, 8, True, None)


def test_groups_are_pinned_as_json() -> None:
    settings = SqsSettings.from_env({"SQS_GROUPS": '{"b": ["order.#", "a"], "a": ["#"]}'})
    assert settings.pinned == (("b", ("a", "order.#")), ("a", ("#",)))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AWS_ENDPOINT_URL_SQS", "localhost:4566"),
        ("AWS_ENDPOINT_URL_SQS", "http://"),
        ("SQS_WAIT_SECONDS", "0"),
        ("SQS_WAIT_SECONDS", "21"),
        ("SQS_MAX_POLLERS", "0"),
        ("SQS_REGISTRY_TTL_SECONDS", "0"),
        ("SQS_GROUPS", "billing"),
        ("SQS_GROUPS", "{}"),
        ("SQS_GROUPS", '{"billing": "order.#"}'),
        ("SQS_GROUPS", '{"billing": []}'),
        ("SQS_GROUPS", '{"a b": ["#"]}'),
        ("SQS_ENSURE", "perhaps"),
        ("SQS_FANOUT", "topic"),
        ("SQS_FIFO", "perhaps"),
        ("SQS_MESSAGE_GROUP", "a b"),
        ("SQS_MESSAGE_GROUP", "x" * 129),
        ("SQS_MESSAGE_GROUP", "all"),
        ("SQS_TOPIC_AFTER_SECONDS", "0"),
        ("QUEUE_LEASE_SECONDS", "43200"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=variable):
        SqsSettings.from_env({variable: text})


def test_no_secret_is_shown() -> None:
    settings = SqsSettings(
        endpoint_url="http://localhost:1",
        access_key_id="swordfish",
        secret_access_key="swordfish",
        session_token="swordfish",
    )
    assert "swordfish" not in repr(settings) + str(settings) + settings.address
    assert settings.address == "localhost:1"
    with pytest.raises(ConfigurationError, match="without credentials") as caught:
        SqsSettings(endpoint_url="http://user:swordfish@localhost:1")
    assert "swordfish" not in str(caught.value)


def test_the_sdk_s_addresses_are_ignored_where_the_sdk_ignores_them() -> None:
    variables = {"AWS_ENDPOINT_URL": "http://localhost:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}
    assert SqsSettings.from_env(variables).endpoint_url is None


@pytest.mark.parametrize(("lease", "visibility"), [(0.5, 2), (1.0, 2), (1.2, 3), (30.0, 31)])
def test_sqs_is_told_whole_seconds_and_never_less_than_the_lease(lease: float, visibility: int) -> None:
    assert SqsSettings(lease=lease).visibility == visibility


def test_the_capabilities_say_the_lease_of_the_settings() -> None:
    assert SqsBackend(SqsSettings(lease=7)).capabilities.lease == 7


@pytest.mark.parametrize(("other", "text"), [("SQS_FIFO", "true"), ("SQS_GROUPS", '{"billing": ["#"]}')])
def test_what_does_not_go_with_a_topic_is_refused(other: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"SQS_FANOUT.*{other}"):
        SqsSettings.from_env({"SQS_FANOUT": "sns", other: text})

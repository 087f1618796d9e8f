"""RabbitMQ's errors made ours, row by row."""

import asyncio
import socket
import ssl
from typing import Any

import aiormq.exceptions as native
import pytest
from pamqp import commands
from pamqp.exceptions import UnmarshalingException

from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    LeaseLostError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PublishUnknownError,
)
from abe_backend_rabbitmq._errors import (
    _BY_TYPE,
    RabbitMQError,
    Refusal,
    consumer_timeout,
    lost,
    refused,
    translate,
    translated,
)

WHERE = "rabbit:5672"

EXCEPTIONS: list[tuple[BaseException, type[AbeError]]] = [
    (native.AuthenticationError(["AMQPLAIN"], ["PLAIN"]), PermissionDeniedError),
    (native.ProbableAuthenticationError("ACCESS_REFUSED - Login was refused"), PermissionDeniedError),
    (native.ChannelAccessRefused("ACCESS_REFUSED - access to queue 'q' in vhost '/' refused"), PermissionDeniedError),
    (native.ChannelPreconditionFailed("PRECONDITION_FAILED - invalid arg 'x-overflow' for queue"), ConfigurationError),
    (native.ConnectionNotAllowed("NOT_ALLOWED - frame too big"), ConfigurationError),
    (native.ConnectionNotImplemented("NOT_IMPLEMENTED - immediate=true"), ConfigurationError),
    (native.IncompatibleProtocolError("AMQP 1.0"), BackendConnectionError),
    (native.InvalidFrameError("no frame"), BackendConnectionError),
    (native.ChannelNotFoundEntity("NOT_FOUND - no queue 'q' in vhost '/'"), BackendConnectionError),
    (native.ChannelLockedResource("RESOURCE_LOCKED - cannot obtain exclusive access"), BackendConnectionError),
    (native.ChannelClosed(541, "INTERNAL_ERROR"), BackendConnectionError),
    (native.ConnectionClosed(320, "CONNECTION_FORCED - broker forced connection closure"), BackendConnectionError),
    (native.AMQPConnectionError("Server connection reset"), BackendConnectionError),
    (native.MethodNotImplemented("?"), RabbitMQError),
    (ConnectionRefusedError(111, "refused"), BackendConnectionError),
    (TimeoutError(), BackendConnectionError),
    (socket.gaierror(-2, "Name or service not known"), BackendConnectionError),
    (asyncio.IncompleteReadError(b"", 5), BackendConnectionError),
    (UnmarshalingException("?", "?"), BackendConnectionError),
]

CLOSED: list[Exception] = [
    native.ChannelInvalidStateError("<Channel: 1> closed"),
    RuntimeError('<Connection: "amqp://app:******@rabbit/"> closed'),
    Exception(),
]


def test_every_row_of_the_table_is_tested() -> None:
    for theirs, _ in _BY_TYPE:
        assert any(isinstance(exc, theirs) for exc, _ in EXCEPTIONS), theirs


@pytest.mark.parametrize(("exc", "kind"), EXCEPTIONS)
def test_an_exception_becomes_ours_by_its_type(exc: BaseException, kind: type[AbeError]) -> None:
    error = translate(exc, WHERE)
    assert type(error) is kind
    assert WHERE in str(error)
    assert (str(exc) or type(exc).__name__) in str(error)
    assert error.retryable is kind.retryable


@pytest.mark.parametrize("exc", CLOSED)
def test_what_was_closed_meanwhile_says_so_in_our_words(exc: Exception) -> None:
    error = translate(exc, WHERE)
    assert type(error) is BackendConnectionError
    assert str(error) == f"rabbitmq at {WHERE}: the connection was closed meanwhile"


@pytest.mark.parametrize("original", [native.ChannelClosed(541, "x"), *CLOSED])
def test_the_client_s_error_is_the_cause(original: Exception) -> None:
    with pytest.raises(BackendConnectionError) as caught, translated(WHERE):
        raise original
    assert caught.value.__cause__ is original


@pytest.mark.parametrize(
    "passing",
    [
        BackendConnectionError("lost"),
        asyncio.CancelledError(),
        KeyError("bug"),
        NotImplementedError(),
        RecursionError(),
    ],
)
def test_ours_and_strangers_pass_through(passing: BaseException) -> None:
    with pytest.raises(type(passing)) as caught, translated(WHERE):
        raise passing
    assert caught.value is passing


class TestPreconditions:
    @pytest.mark.parametrize(
        ("values", "told"),
        [
            (
                "received none but current is the value '9' of type 'byte'",
                "x-max-length 9, and the settings here make it unset: set QUEUE_MAX_BACKLOG to 10",
            ),
            (
                "received the value '4' of type 'byte' but current is none",
                "x-max-length unset, and the settings here make it 4: leave QUEUE_MAX_BACKLOG unset",
            ),
            (
                "received '4' but current is '100000'",
                "x-max-length 100000, and the settings here make it 4: set QUEUE_MAX_BACKLOG to 100001",
            ),
        ],
    )
    def test_another_limit_of_a_backlog(self, values: str, told: str) -> None:
        text = f"PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'abe:n:queue:g' in vhost '/': {values}"
        error = translate(native.ChannelPreconditionFailed(text), WHERE)
        assert type(error) is ConfigurationError
        assert f"the queue 'abe:n:queue:g' exists with {told}" in str(error)
        assert "delete the queue when it is empty" in str(error)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (
                "'type' for exchange 'shop' in vhost 'a': received 'topic' but current is 'fanout'",
                "the exchange 'shop' exists with type fanout, and the settings here make it topic: something else uses it: choose",
            ),
            (
                "'alternate-exchange' for exchange 'e' in vhost '/': received none but current is the value 'a' of type 'longstr'",
                "the exchange 'e' exists with alternate-exchange a, and the settings here make it unset",
            ),
            (
                "'durable' for queue 'q' in vhost 'it's': received 'true' but current is 'false'",
                "the queue 'q' exists with durable false, and the settings here make it true",
            ),
            (
                "'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of type 'longstr' but current is none",
                "the queue 'q' exists with x-queue-type unset, and the settings here make it quorum",
            ),
        ],
    )
    def test_something_else_has_the_name(self, text: str, told: str) -> None:
        error = translate(native.ChannelPreconditionFailed(f"PRECONDITION_FAILED - inequivalent arg {text}"), WHERE)
        assert type(error) is ConfigurationError
        assert told in str(error)
        assert "QUEUE_NAMESPACE" in str(error)

    @pytest.mark.parametrize("cut", range(60, 160, 7))
    def test_a_text_that_is_cut_short_still_names_the_queue(self, cut: int) -> None:
        name = "abe:" + "n" * 64
        text = (
            f"PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue '{name}' in vhost '/': received '4' but"
        )
        error = translate(native.ChannelPreconditionFailed(text[: max(cut, 75)]), WHERE)
        assert type(error) is ConfigurationError
        assert "the queue 'abe:n" in str(error)
        assert "exists with another x-max-length: give QUEUE_MAX_BACKLOG the value that it had" in str(error)

    @pytest.mark.parametrize(
        "text",
        [
            "PRECONDITION_FAILED - unknown delivery tag 5",
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 5000 ms.",
        ],
    )
    def test_what_merely_happened_is_no_matter_of_configuration(self, text: str) -> None:
        assert type(translate(native.ChannelPreconditionFailed(text), WHERE)) is BackendConnectionError


class TestTls:
    @staticmethod
    def wrapped(cause: ssl.SSLError) -> BaseException:
        """As aiormq does."""
        error = native.AMQPConnectionError(*cause.args)
        error.__cause__ = cause
        return error

    @staticmethod
    def failure(kind: type[ssl.SSLError], **attributes: Any) -> ssl.SSLError:
        error = kind(1, "[SSL] failed")
        for name, value in attributes.items():
            setattr(error, name, value)
        return error

    def test_a_certificate_that_does_not_hold(self) -> None:
        cause = self.failure(ssl.SSLCertVerificationError, verify_message="self-signed certificate")
        error = translate(self.wrapped(cause), WHERE)
        assert type(error) is ConfigurationError
        assert "self-signed certificate" in str(error)
        assert "RABBITMQ_CA_FILE" in str(error)

    @pytest.mark.parametrize(
        "reason",
        ["TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_HANDSHAKE_FAILURE"],
    )  # fmt: skip
    def test_a_client_s_certificate_that_the_broker_does_not_take(self, reason: str) -> None:
        error = translate(self.wrapped(self.failure(ssl.SSLError, reason=reason)), WHERE)
        assert type(error) is ConfigurationError
        assert "RABBITMQ_CERTIFICATE_FILE" in str(error)

    def test_a_port_that_does_not_speak_it(self) -> None:
        error = translate(self.wrapped(self.failure(ssl.SSLError, reason="WRONG_VERSION_NUMBER")), WHERE)
        assert type(error) is ConfigurationError
        assert "5671" in str(error)

    def test_what_may_pass_is_tried_again(self) -> None:
        cause = self.failure(ssl.SSLError, reason="UNEXPECTED_EOF_WHILE_READING")
        assert type(translate(self.wrapped(cause), WHERE)) is BackendConnectionError


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "text", "kind"),
        [
            (403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.", PermissionDeniedError),
            (530, "NOT_ALLOWED - access to vhost '/' refused for user 'app'", PermissionDeniedError),
            (530, "NOT_ALLOWED - vhost nowhere not found", ConfigurationError),
            (530, "NOT_ALLOWED - access to vhost '/' refused for user 'app': connection limit (1) is reached", BackendConnectionError),
            (530, "NOT_ALLOWED - connection refused for user 'app': user connection limit (1) is reached", BackendConnectionError),
            (530, "NOT_ALLOWED - access to vhost 'a' refused for user 'app': vhost 'a' is down", BackendConnectionError),
            (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'", BackendConnectionError),
            (541, "INTERNAL_ERROR", BackendConnectionError),
        ],
    )  # fmt: skip
    def test_a_login_is_refused_for_a_reason(self, code: int, text: str, kind: type[AbeError]) -> None:
        error = refused(commands.Connection.Close(code, text, 0, 0), WHERE)
        assert type(error) is kind
        assert text in str(error)
        assert WHERE in str(error)


def test_rabbitmq_error_says_that_a_retry_does_not_help() -> None:
    assert issubclass(RabbitMQError, AbeError)
    assert not RabbitMQError("x").retryable


def test_a_settlement_whose_channel_is_gone_has_lost_its_lease() -> None:
    assert type(lost()) is LeaseLostError


def test_a_message_without_a_confirm_may_be_in_the_broker() -> None:
    error = Refusal("the connection was lost").outcome("e", "k", 1)
    assert type(error) is PublishUnknownError
    assert str(error) == "the connection was lost, before the confirm came"


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("access to exchange 'e' in vhost '/' refused for user 'app'", [("e", "k"), ("e", "other")]),
        ("write access to exchange 'e' in vhost '/' refused for user 'app'", [("e", "k"), ("e", "other")]),
        ("access to exchange 'e' refu", [("e", "k"), ("e", "other")]),
        ("access to exchange 'amq.default' in vhost '/' refused for user 'app'", [("", "k")]),
        ("access to topic 'k' in exchange 'e' in vhost '/' refused for user 'app'", [("e", "k")]),
        ("something else", [("e", "k"), ("e", "other"), ("", "k")]),
    ],
)
def test_a_refusal_is_that_of_the_messages_it_names_and_the_others_are_unknown(
    text: str, denied: list[tuple[str, str]]
) -> None:
    refusal = Refusal(f"the broker closed the channel: ACCESS_REFUSED - {text}")
    for exchange, key in (("e", "k"), ("e", "other"), ("", "k")):
        error = refusal.outcome(exchange, key, 1)
        assert type(error) is (PermissionDeniedError if (exchange, key) in denied else PublishUnknownError)
        assert error.maybe_accepted
        assert error.retryable is ((exchange, key) not in denied)


def test_the_time_that_a_node_gives_its_consumers_is_read_from_its_refusal() -> None:
    text = (
        "the broker closed the channel: PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. "
        "Timeout value used: 1800000 ms. This timeout value can be configured, see consumers doc guide to learn more"
    )
    assert consumer_timeout(text) == 1800.0
    assert consumer_timeout("the connection was lost") is None


@pytest.mark.parametrize("configured", ["", "configured "])
def test_a_message_that_the_node_finds_too_large_is_told_from_those_beside_it(configured: str) -> None:
    text = f"PRECONDITION_FAILED - message size 2000 is larger than {configured}max size 1000"
    refusal = Refusal(f"the broker closed the channel: {text}")
    assert type(refusal.outcome("e", "k", 1000)) is PublishUnknownError
    error = refusal.outcome("e", "k", 1001)
    assert type(error) is PayloadTooLargeError
    assert (error.retryable, error.maybe_accepted) == (False, False)
    assert "max_message_size is 1000" in str(error)

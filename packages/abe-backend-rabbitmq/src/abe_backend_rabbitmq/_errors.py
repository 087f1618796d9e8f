"""Translates RabbitMQ's errors into ours: the only module that knows the client's exceptions."""

import asyncio
import re
import ssl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Final

import aiormq.exceptions as native
from pamqp import commands
from pamqp.exceptions import PAMQPException

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    LeaseLostError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PublishUnknownError,
)

ChannelNotFound = native.ChannelNotFoundEntity
"""The queue or exchange does not exist; the broker has closed the channel."""

ChannelLocked = native.ChannelLockedResource
"""The queue belongs to another connection; the broker has closed the channel."""

ConnectError = native.AMQPConnectionError
"""What aiormq raises when it cannot connect."""


class BlockedError(BackpressureError):
    """RabbitMQ is short of memory or disk, and does not read from connections that publish."""


class RabbitMQError(AbeError):
    """RabbitMQ answered with an error that has no translation."""


_BY_TYPE: Final[tuple[tuple[type[BaseException], type[AbeError]], ...]] = (
    (native.AuthenticationError, PermissionDeniedError),
    (native.ProbableAuthenticationError, PermissionDeniedError),
    (native.ChannelAccessRefused, PermissionDeniedError),
    (native.ChannelPreconditionFailed, ConfigurationError),
    (native.ConnectionNotAllowed, ConfigurationError),
    (native.ConnectionNotImplemented, ConfigurationError),
    (native.IncompatibleProtocolError, BackendConnectionError),
    (native.InvalidFrameError, BackendConnectionError),
    (native.ChannelNotFoundEntity, BackendConnectionError),
    (native.ChannelLockedResource, BackendConnectionError),
    (native.ChannelClosed, BackendConnectionError),
    (native.AMQPConnectionError, BackendConnectionError),
    (native.AMQPError, RabbitMQError),
    (TimeoutError, BackendConnectionError),
    (OSError, BackendConnectionError),
    (EOFError, BackendConnectionError),
    (PAMQPException, BackendConnectionError),
)

_NATIVE: Final = (native.AMQPError, PAMQPException, OSError, EOFError)

_RIGHTS: Final = "check the user, the password, and the user's rights in the vhost"
_AUTHORITY: Final = (
    "RABBITMQ_CA_FILE must hold the authority that signed it, and the host in RABBITMQ_URL must match its subject"
    " alternative names"
)
_CLIENT: Final = (
    "it asks for a client's certificate that it trusts: check RABBITMQ_CERTIFICATE_FILE and RABBITMQ_KEY_FILE"
)
_NO_TLS: Final = "it does not speak TLS at this port: use its TLS port, 5671 by default, or amqp://"
_VHOST: Final = "create it, or check the vhost in RABBITMQ_URL or MESSAGE_QUEUE_VHOST"
_CLOSED: Final = "the connection was closed meanwhile"

_REFUSED, _NOT_ALLOWED = 403, 530
_PASSING: Final = re.compile(r"limit \(.*\) is reached|is down")
"""Refusals that are temporary."""

_INEQUIVALENT: Final = re.compile(
    r"inequivalent arg '(?P<argument>[^']*)' for (?P<kind>queue|exchange) '(?P<name>[^']*)"
    r"(?:' in vhost '.*': received (?P<given>.*?) but current is (?P<there>.*))?",
    re.DOTALL,
)
"""The text is cut at 255 bytes: with long names the values are missing."""

_VALUE: Final = re.compile(r"(?:the value )?'(?P<value>.*?)'(?: of type '\w+')?\Z", re.DOTALL)
_LIMIT: Final = "x-max-length"
_EXCHANGE: Final = re.compile(r"access to (?:topic '(?P<topic>.*?)' in )?exchange '(?P<exchange>[^']*)'")
_TOO_LARGE: Final = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")
_TIMED_OUT: Final = re.compile(r"acknowledgement on channel \d+ timed out\. Timeout value used: (\d+) ms")
_STALE: Final = re.compile("unknown delivery tag|timed out")
"""Failed preconditions of a delivery, not of the configuration."""


def translate(exc: BaseException, address: str, hint: str = "") -> AbeError:
    """Return our error for one of the client's.

    Args:
        exc: The client's error.
        address: The broker's, without credentials.
        hint: A possible cause, added to the text of a connection error.
    """
    where = f"rabbitmq at {address}"
    for cause in _chain(exc):
        if isinstance(cause, ssl.SSLError) and (problem := _tls(cause)):
            return ConfigurationError(f"{where}: {problem}")  # a connection error would be retried for ever
    text = str(exc) or type(exc).__name__
    if isinstance(exc, native.ChannelPreconditionFailed):
        if _STALE.search(text):
            return BackendConnectionError(f"{where}: {text}")
        return ConfigurationError(f"{where}: {_inequivalent(text) or text}")
    if _was_closed(exc):
        return BackendConnectionError(f"{where}: {_CLOSED}")  # the client's text shows its address
    kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), RabbitMQError)
    hints: dict[type[AbeError], str] = {PermissionDeniedError: f" ({_RIGHTS})", BackendConnectionError: hint}
    return kind(f"{where}: {text}{hints.get(kind, '')}")


def refused(close: commands.Connection.Close, address: str) -> AbeError:
    """Return our error for a broker that closed the connection during the login."""
    text = f"rabbitmq at {address}: {close.reply_text}"
    if close.reply_code not in (_REFUSED, _NOT_ALLOWED) or _PASSING.search(text):
        return BackendConnectionError(text)
    if close.reply_code == _NOT_ALLOWED and text.endswith("not found"):
        return ConfigurationError(f"{text} ({_VHOST})")
    return PermissionDeniedError(f"{text} ({_RIGHTS})")


@contextmanager
def translated(address: str, hint: str = "") -> Generator[None, None, None]:
    """Turn the client's errors into ours; the arguments are those of `translate`.

    Raises:
        AbeError: By the table above.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise
    except Exception as exc:
        if isinstance(exc, _NATIVE) or _was_closed(exc):
            raise translate(exc, address, hint) from exc
        raise


def lost() -> LeaseLostError:
    """Return the outcome of a settlement whose delivery is not in flight any more."""
    return LeaseLostError("the message is not ours any more: its connection was lost, or it was settled before")


class Refusal:
    """The outcomes of messages that were unconfirmed when their channel closed.

    When the user may not publish to an exchange, the broker closes the channel and names the exchange, but not the message. Messages to
    other exchanges are unknown, as after any loss; those to that exchange are refused, but earlier ones may have been stored. When one is
    larger than the node's `max_message_size`, it names that.

    Args:
        reason: Why the channel closed.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._refused = "ACCESS_REFUSED" in reason
        found = _EXCHANGE.search(reason)
        self._exchange = found and found["exchange"].replace("amq.default", "")
        self._topic = found and found["topic"]
        too_large = _TOO_LARGE.search(reason)
        self._most = int(too_large[1]) if too_large else None

    def outcome(self, exchange: str, key: str, size: int) -> AbeError:
        """Return the outcome of one message.

        Args:
            exchange: Where it was published to.
            key: Its routing key.
            size: Bytes of its body.
        """
        if self._most is not None and size > self._most:
            return PayloadTooLargeError(
                f"the payload has {size} bytes, and the node's max_message_size is {self._most}"
            )
        others = self._exchange is not None and self._exchange != exchange
        if not self._refused or others or (self._topic is not None and self._topic != key):
            return PublishUnknownError(f"{self._reason}, before the confirm came")
        denied = PermissionDeniedError(f"{self._reason} ({_RIGHTS})")
        denied.maybe_accepted = True
        return denied


def consumer_timeout(reason: str) -> float | None:
    """Return the node's `consumer_timeout` in seconds if that is why a channel closed, otherwise None."""
    found = _TIMED_OUT.search(reason)
    return int(found[1]) / 1000 if found else None


def _was_closed(exc: BaseException) -> bool:
    """Return whether aiormq says that the connection was closed: by an error of its own, or, after an orderly close, a bare Exception."""
    return isinstance(exc, native.ChannelInvalidStateError) or type(exc) in (RuntimeError, Exception)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        yield exc
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__


def _tls(exc: ssl.SSLError) -> str:
    """Return the text of a TLS error that no retry helps; empty for the others."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate cannot be verified: {exc.verify_message} ({_AUTHORITY})"
    reason = exc.reason or ""
    if "ALERT" in reason and re.search("CERT|UNKNOWN_CA|HANDSHAKE_FAILURE", reason):
        return f"{reason.lower().replace('_', ' ')}: {_CLIENT}"
    return _NO_TLS if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"} else ""


def _inequivalent(text: str) -> str:
    """Return the argument that exists, the one requested, and the remedy; empty if the text is another."""
    found = _INEQUIVALENT.search(text)
    if found is None:
        return ""
    argument, kind, name = found["argument"], found["kind"], found["name"]
    there, given = _value(found["there"]), _value(found["given"])
    if argument == _LIMIT:
        limits = {"unset": "leave QUEUE_MAX_BACKLOG unset", "": "give QUEUE_MAX_BACKLOG the value that it had"}
        setting = limits[there] if there in limits else f"set QUEUE_MAX_BACKLOG to {int(there) + 1}"
        remedy = f"{setting}, as when the queue was made, or delete the queue when it is empty"
    elif kind == "exchange":
        remedy = "something else uses it: choose another MESSAGE_QUEUE_EXCHANGE or QUEUE_NAMESPACE, or delete it"
    else:
        remedy = (
            "something else, or another version, made it: delete it when it is empty, or choose another QUEUE_NAMESPACE"
        )
    values = f"{argument} {there}, and the settings here make it {given}" if there else f"another {argument}"
    return f"the {kind} {name!r} exists with {values}: {remedy}"


def _value(text: str | None) -> str:
    if text is None:
        return ""
    value = _VALUE.match(text)
    return (value["value"] or "''") if value else "unset" if text == "none" else text

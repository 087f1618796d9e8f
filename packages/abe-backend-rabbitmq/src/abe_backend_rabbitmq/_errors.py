"""RabbitMQ's errors made ours: the only module that knows the client's exceptions."""

import asyncio
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import aiormq.exceptions as native
from pamqp.exceptions import PAMQPException

from abe.errors import AbeError, BackendConnectionError, ConfigurationError, LeaseLostError, PermissionDeniedError

ChannelNotFound = native.ChannelNotFoundEntity
"""What is asked for does not exist; the channel is closed."""

ChannelLocked = native.ChannelLockedResource
"""What is asked for belongs to another connection; the channel is closed."""

ConnectError = native.AMQPConnectionError
"""What aiormq raises when it cannot connect."""


class RabbitMQError(AbeError):
    """RabbitMQ answered with an error that nothing here expects."""


_BY_TYPE: Final[tuple[tuple[type[BaseException], type[AbeError]], ...]] = (
    (native.AuthenticationError, PermissionDeniedError),
    (native.ProbableAuthenticationError, PermissionDeniedError),
    (native.ChannelAccessRefused, PermissionDeniedError),
    (native.ChannelPreconditionFailed, ConfigurationError),
    (native.ConnectionNotAllowed, ConfigurationError),
    (native.ConnectionNotImplemented, ConfigurationError),
    (native.IncompatibleProtocolError, BackendConnectionError),
    (native.ChannelInvalidStateError, BackendConnectionError),
    (native.ChannelNotFoundEntity, BackendConnectionError),
    (native.ChannelLockedResource, BackendConnectionError),
    (native.ChannelClosed, BackendConnectionError),
    (native.AMQPConnectionError, BackendConnectionError),
    (native.AMQPError, RabbitMQError),
    (TimeoutError, BackendConnectionError),
    (OSError, BackendConnectionError),
    (EOFError, BackendConnectionError),
    (RuntimeError, BackendConnectionError),  # aiormq: the connection was closed meanwhile
    (PAMQPException, BackendConnectionError),
)

_NATIVE: Final = (native.AMQPError, PAMQPException, OSError, EOFError, RuntimeError)

_HINTS: Final[dict[type[AbeError], str]] = {
    PermissionDeniedError: "check the user, the password, and the user's rights in the vhost",
}
_CERTIFICATE: Final = "check cafile in RABBITMQ_URL, and that the certificate is for this host"
_ARGUMENTS: Final = (
    "it exists with other arguments: give this application the settings of those that made it, or delete it when it is empty, "
    "or choose another QUEUE_NAMESPACE"
)


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's."""
    kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), RabbitMQError)
    hint = _HINTS.get(kind, "")
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in (exc, exc.__cause__, exc.__context__)):
        kind, hint = ConfigurationError, _CERTIFICATE  # it would be tried for ever
    elif isinstance(exc, native.ChannelPreconditionFailed):
        hint = _ARGUMENTS
    text = str(exc) or type(exc).__name__
    return kind(f"rabbitmq at {address}: {text}{hint and f' ({hint})'}")


@contextmanager
def translated(address: str) -> Generator[None, None, None]:
    """Turn the client's errors into ours.

    Raises:
        AbeError: By the table above.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise
    except _NATIVE as exc:
        if isinstance(exc, AbeError):
            raise
        raise translate(exc, address) from exc


def lost() -> LeaseLostError:
    """Return what a settlement gets whose channel is gone."""
    return LeaseLostError("the message is not ours any more: its connection was lost, or it was settled before")

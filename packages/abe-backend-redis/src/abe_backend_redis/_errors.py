"""Redis's errors made ours: the only module that knows the client's exceptions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis.exceptions as native

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    PermissionDeniedError,
)

ReplyError = native.ResponseError
"""What a reply that is an error becomes; its text begins with Redis's code."""


class RedisError(AbeError):
    """Redis answered with an error that nothing here expects."""


_BY_CODE: Final[dict[str, type[AbeError]]] = {
    "NOAUTH": PermissionDeniedError,
    "WRONGPASS": PermissionDeniedError,
    "NOPERM": PermissionDeniedError,
    "OOM": BackpressureError,
    "MISCONF": BackpressureError,
    "NOREPLICAS": BackpressureError,
    "WRONGTYPE": ConfigurationError,
    "LOADING": BackendConnectionError,
    "READONLY": BackendConnectionError,
    "MASTERDOWN": BackendConnectionError,
    "CLUSTERDOWN": BackendConnectionError,
    "TRYAGAIN": BackendConnectionError,
    "BUSY": BackendConnectionError,
    "UNKILLABLE": BackendConnectionError,
}

_BY_TYPE: Final[tuple[tuple[type[BaseException], type[AbeError]], ...]] = (
    (native.AuthenticationError, PermissionDeniedError),
    (native.AuthorizationError, PermissionDeniedError),
    (native.NoPermissionError, PermissionDeniedError),
    (native.BusyLoadingError, BackendConnectionError),
    (native.ConnectionError, BackendConnectionError),
    (native.TimeoutError, BackendConnectionError),
    (OSError, BackendConnectionError),
    (EOFError, BackendConnectionError),
)

_HINTS: Final[dict[type[AbeError], str]] = {
    PermissionDeniedError: "check the user, the password, and the user's rights",
    BackpressureError: "it takes no writes now",
    ConfigurationError: "the namespace's keys are used by something else: choose another QUEUE_NAMESPACE",
}


def code(error: BaseException) -> str:
    """Return the first word of a reply that is an error."""
    return str(error).partition(" ")[0]


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's."""
    kind = _BY_CODE.get(code(exc)) if isinstance(exc, ReplyError) else None
    if kind is None:
        kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), RedisError)
    hint = f" ({_HINTS[kind]})" if kind in _HINTS else ""
    return kind(f"redis at {address}: {exc}{hint}")


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn the client's errors into ours.

    Raises:
        AbeError: By the tables above.
    """
    try:
        yield
    except (native.RedisError, OSError, EOFError) as exc:
        raise translate(exc, address) from exc

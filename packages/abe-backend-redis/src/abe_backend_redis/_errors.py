"""Redis's errors made ours: the only module that knows the client's exceptions."""

import re
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import redis.exceptions as native

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
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
    "MISSING": GroupMissingError,
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
}
_FOREIGN_KEYS: Final = "the namespace's keys are used by something else: choose another QUEUE_NAMESPACE"
_CERTIFICATE: Final = "check ssl_ca_certs in REDIS_URL, and that the certificate is for this host"

_IN_SCRIPT: Final = re.compile(r"(?:ERR Error running script .*?)?(?:@user_script: ?\d+: )+-?([A-Z]+) ")
"""How Redis before 7.0 wraps the error of a command within a script, whether the script caught it or not."""

_NO_RIGHT: Final = re.compile(r"^ERR .*(ACL failure in script|The user executing the script can't)")
"""How a script says that the user lacks a right, before 7.2 in other words than later."""


def code(error: BaseException) -> str:
    """Return the first word of a reply that is an error."""
    text = str(error)
    if _NO_RIGHT.search(text):
        return "NOPERM"
    wrapped = _IN_SCRIPT.match(text)
    return wrapped[1] if wrapped else text.partition(" ")[0]


def is_refused(error: ReplyError) -> bool:
    """Whether the command is one that the user may not use, or that the server does not have."""
    return code(error) == "NOPERM" or str(error).startswith("ERR unknown command")


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's."""
    kind = _BY_CODE.get(code(exc)) if isinstance(exc, ReplyError) else None
    if isinstance(
        exc.__context__, ssl.SSLCertVerificationError
    ):  # redis-py shows it as a lost connection, which would be tried for ever
        kind, hint = ConfigurationError, _CERTIFICATE
    elif kind is ConfigurationError:
        hint = _FOREIGN_KEYS
    else:
        kind = kind or next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), RedisError)
        hint = _HINTS.get(kind, "")
    return kind(f"redis at {address}: {exc}{hint and f' ({hint})'}")


@contextmanager
def translated(address: str) -> Generator[None]:
    """Turn the client's errors into ours.

    Raises:
        AbeError: By the tables above.
    """
    try:
        yield
    except (native.RedisError, OSError, EOFError) as exc:
        raise translate(exc, address) from exc

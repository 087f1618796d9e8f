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
    PermissionDeniedError: "check the user, the password, and the user's rights: REDIS_URL, REDIS_USERNAME, REDIS_PASSWORD",
    BackpressureError: "it takes no writes now",
}
_FOREIGN_KEYS: Final = "the namespace's keys are used by something else: choose another QUEUE_NAMESPACE"
_CERTIFICATE: Final = "check ssl_ca_certs in REDIS_URL, and that the certificate is for this host"
_NO_TLS: Final = "what is there does not answer in TLS: write redis:// in REDIS_URL, or the port that does"
_TLS_FILES: Final = "check the ssl_ parameters of REDIS_URL: files, key and password, versions"
_NO_REDIS: Final = "what is there does not speak Redis's protocol: check host and port in REDIS_URL"
_DATABASE: Final = (
    "check the database in REDIS_URL: a server has those from 0 to 15, unless its setting 'databases' says otherwise"
)
_ADDRESS: Final = "if that is not where it is, correct REDIS_URL"
_QUERY: Final = "a parameter of REDIS_URL is wrong"

_NO_DATABASE: Final = re.compile(
    r"DB index is out of range|invalid (first )?DB index|value is out of range|SELECT is not allowed in cluster mode"
)
"""What SELECT says, of which redis-py's login leaves out the code."""

_NOT_IN_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
)
_BROKEN_TLS: Final = (
    "UNEXPECTED_EOF_WHILE_READING",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
    "APPLICATION_DATA_AFTER_CLOSE_NOTIFY",
)
"""What a connection that breaks says, and a retry may help."""

_IN_SCRIPT: Final = re.compile(r"(?:ERR Error running script .*?)?(?:@user_script: ?\d+: )+-?([A-Z]+) ")
"""How Redis before 7.0 wraps the error of a command within a script, whether the script caught it or not."""

_NO_RIGHT: Final = re.compile(r"^(ERR |@user_script).*(ACL failure in script|The user executing the script can't)")
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
    kind, hint = _permanent(exc) or _by_table(exc)
    return kind(f"redis at {address}: {exc}{hint and f' ({hint})'}")


def _by_table(exc: BaseException) -> tuple[type[AbeError], str]:
    if isinstance(exc, ReplyError) and (kind := _BY_CODE.get(code(exc))):
        return kind, _FOREIGN_KEYS if kind is ConfigurationError else _HINTS.get(kind, "")
    kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), RedisError)
    return kind, _ADDRESS if kind is BackendConnectionError else _HINTS.get(kind, "")


def _permanent(exc: BaseException) -> tuple[type[AbeError], str] | None:
    """What redis-py shows as a lost connection, or as any reply, and would be tried for ever; with what to do about it."""
    why = exc.__cause__ or exc.__context__
    if isinstance(exc, ReplyError) and _NO_DATABASE.match(str(exc)):
        return ConfigurationError, _DATABASE
    if isinstance(exc, native.InvalidResponse):
        return ConfigurationError, _NO_REDIS
    if isinstance(why, ssl.SSLCertVerificationError):
        return ConfigurationError, _CERTIFICATE
    if isinstance(why, ssl.SSLError) and why.reason not in _BROKEN_TLS and not isinstance(why, ssl.SSLEOFError):
        return ConfigurationError, _NO_TLS if why.reason in _NOT_IN_TLS else _TLS_FILES
    if isinstance(exc, native.ConnectionError) and isinstance(why, TypeError | ValueError | LookupError):
        return ConfigurationError, _QUERY
    return None


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

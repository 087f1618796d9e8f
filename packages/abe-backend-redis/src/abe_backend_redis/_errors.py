"""Translates Redis's errors: error replies, and failures to connect."""

import re
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import hiredis
import redis.exceptions

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
    PermissionDeniedError,
)

ReplyError = redis.exceptions.ResponseError
"""The exception for an error reply; its text begins with Redis's error code."""


class RedisError(AbeError):
    """Redis replied with an error that the provider does not know."""


_BY_CODE: Final[dict[str, type[AbeError]]] = {
    "NOAUTH": PermissionDeniedError,
    "WRONGPASS": PermissionDeniedError,
    "NOPERM": PermissionDeniedError,
    "DENIED": PermissionDeniedError,
    "OOM": BackpressureError,
    "MISCONF": BackpressureError,
    "NOREPLICAS": BackpressureError,
    "WRONGTYPE": ConfigurationError,
    "MISSING": GroupMissingError,
    "LOADING": BackendConnectionError,
    "READONLY": BackendConnectionError,
    "UNBLOCKED": BackendConnectionError,
    "MASTERDOWN": BackendConnectionError,
    "CLUSTERDOWN": BackendConnectionError,
    "TRYAGAIN": BackendConnectionError,
    "BUSY": BackendConnectionError,
    "UNKILLABLE": BackendConnectionError,
}

_HINTS: Final[dict[type[AbeError], str]] = {
    PermissionDeniedError: "check the user, the password, and the user's rights: REDIS_URL, REDIS_USERNAME, REDIS_PASSWORD",
    BackpressureError: "it accepts no writes now",
}
_FOREIGN_KEYS: Final = "another program uses the namespace's keys: choose another QUEUE_NAMESPACE"
_CERTIFICATE: Final = "check ssl_ca_certs in REDIS_URL, and that the certificate is for this host"
_NO_TLS: Final = "the server at this port does not use TLS: write redis:// in REDIS_URL, or its TLS port"
TLS_FILES: Final = "check the ssl_ parameters of REDIS_URL: files, key and password, versions"
_NO_REDIS: Final = "the server at this port does not speak Redis's protocol: check host and port in REDIS_URL"
_DATABASE: Final = (
    "check the database in REDIS_URL: by default a server has databases 0 to 15, see its setting 'databases'"
)
_HOST: Final = "the host in REDIS_URL is not a valid host name"
_ADDRESS: Final = "if this address is wrong, correct REDIS_URL"

_ARGUMENTS: Final = ", with args beginning with"
"""What Redis puts before the arguments of a command that it does not know: credentials, or a payload."""

_FULL: Final = re.compile(r"ERR max number of clients")
"""The error of a server that accepts no more connections, before it disconnects."""

_AT_LOGIN: Final[dict[object, tuple[type[AbeError], str]]] = {
    b"AUTH": (PermissionDeniedError, _HINTS[PermissionDeniedError]),
    b"SELECT": (ConfigurationError, _DATABASE),
}
"""The errors for login commands that Redis refuses with the code ERR only."""

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
"""The reasons of a TLS connection that was lost; a retry may help."""

_IN_SCRIPT: Final = re.compile(r"(?:ERR Error running script .*?)?(?:@user_script: ?\d+: )+-?([A-Z]+) ")
"""How Redis before 7.0 wraps the error of a command within a script, whether the script caught it or not."""

_NO_RIGHT: Final = re.compile(r"^(ERR |@user_script).*(ACL failure in script|The user executing the script can't)")
"""How a script reports that the user lacks a right; before 7.2 the text was different."""


def code(error: BaseException) -> str:
    """Return the code of an error reply: its first word."""
    text = str(error)
    if _NO_RIGHT.search(text):
        return "NOPERM"
    wrapped = _IN_SCRIPT.match(text)
    return wrapped[1] if wrapped else text.partition(" ")[0]


def is_refused(error: ReplyError) -> bool:
    """Whether the user may not run the command, or the server does not have it."""
    return code(error) == "NOPERM" or str(error).lower().startswith("err unknown")


def translate(reply: ReplyError, address: str) -> AbeError:
    """Return the error for an error reply. As that is the cause of the error, its text loses what must not be shown."""
    reply.args = (str(reply).partition(_ARGUMENTS)[0],)
    kind = BackendConnectionError if _FULL.match(str(reply)) else _BY_CODE.get(code(reply), RedisError)
    hint = _FOREIGN_KEYS if kind is ConfigurationError else _HINTS.get(kind, "")
    return _error(kind, reply, hint, address)


def login_refused(command: object, reply: ReplyError, address: str) -> AbeError:
    """Return the error for a login command that Redis refused."""
    error = translate(reply, address)
    if type(error) is RedisError and command in _AT_LOGIN:
        return _error(_AT_LOGIN[command][0], reply, _AT_LOGIN[command][1], address)
    return error


def unreachable(exc: Exception, address: str) -> AbeError:
    """Return the error for a connection that could not be opened, or was closed during the login."""
    why = exc.__cause__ or exc
    if isinstance(why, hiredis.ProtocolError):
        return _error(ConfigurationError, why, _NO_REDIS, address)
    if isinstance(why, ssl.SSLCertVerificationError):
        return _error(ConfigurationError, why, _CERTIFICATE, address)
    if isinstance(why, ssl.SSLError) and not isinstance(why, ssl.SSLEOFError) and why.reason not in _BROKEN_TLS:
        return _error(ConfigurationError, why, _NO_TLS if why.reason in _NOT_IN_TLS else TLS_FILES, address)
    if isinstance(why, UnicodeError):
        return _error(ConfigurationError, why, _HOST, address)
    return _error(BackendConnectionError, why, _ADDRESS, address)


def _error(kind: type[AbeError], exc: BaseException, hint: str, address: str) -> AbeError:
    return kind(f"redis at {address}: {str(exc) or type(exc).__name__}{hint and f' ({hint})'}")


@contextmanager
def translated(address: str) -> Generator[None]:
    """Translate error replies in the block.

    Raises:
        AbeError: See the tables above.
    """
    try:
        yield
    except ReplyError as exc:
        raise translate(exc, address) from exc

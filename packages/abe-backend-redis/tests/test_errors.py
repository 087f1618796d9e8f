"""Redis's errors made ours, row by row."""

import asyncio
import socket
import ssl

import hiredis
import pytest

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
    PermissionDeniedError,
)
from abe_backend_redis._errors import (
    _BY_CODE,
    RedisError,
    ReplyError,
    code,
    login_refused,
    translate,
    translated,
    unreachable,
)

REPLIES = {
    "NOAUTH": ("NOAUTH Authentication required.", PermissionDeniedError),
    "WRONGPASS": ("WRONGPASS invalid username-password pair or user is disabled.", PermissionDeniedError),
    "NOPERM": ("NOPERM User app has no permissions to run the 'evalsha' command", PermissionDeniedError),
    "DENIED": ("DENIED Redis is running in protected mode because protected mode is enabled", PermissionDeniedError),
    "OOM": ("OOM command not allowed when used memory > 'maxmemory'.", BackpressureError),
    "MISCONF": (
        "MISCONF Redis is configured to save RDB snapshots, but it is unable to persist to disk.",
        BackpressureError,
    ),
    "NOREPLICAS": ("NOREPLICAS Not enough good replicas to write.", BackpressureError),
    "WRONGTYPE": ("WRONGTYPE Operation against a key holding the wrong kind of value", ConfigurationError),
    "MISSING": ("MISSING there is no group 'g'", GroupMissingError),
    "LOADING": ("LOADING Redis is loading the dataset in memory", BackendConnectionError),
    "READONLY": ("READONLY You can't write against a read only replica.", BackendConnectionError),
    "UNBLOCKED": (
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
        BackendConnectionError,
    ),
    "MASTERDOWN": (
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        BackendConnectionError,
    ),
    "CLUSTERDOWN": ("CLUSTERDOWN The cluster is down", BackendConnectionError),
    "TRYAGAIN": ("TRYAGAIN Multiple keys request during rehashing of slot", BackendConnectionError),
    "BUSY": ("BUSY Redis is busy running a script.", BackendConnectionError),
    "UNKILLABLE": ("UNKILLABLE Sorry the script already executed write commands", BackendConnectionError),
}


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


CONNECTING: list[tuple[Exception, type[AbeError], str]] = [
    (ConnectionRefusedError(111, "refused"), BackendConnectionError, "correct REDIS_URL"),
    (TimeoutError(110, "Connection timed out"), BackendConnectionError, "correct REDIS_URL"),
    (socket.gaierror(-2, "Name or service not known"), BackendConnectionError, "correct REDIS_URL"),
    (BackendConnectionError("the connection was lost"), BackendConnectionError, "correct REDIS_URL"),
    (tls_error("UNEXPECTED_EOF_WHILE_READING"), BackendConnectionError, "correct REDIS_URL"),
    (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), BackendConnectionError, "correct REDIS_URL"),
    (hiredis.ProtocolError("Protocol error, got 'H'"), ConfigurationError, "Redis's protocol"),
    (ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed"), ConfigurationError, "ssl_ca_certs"),
    (tls_error("WRONG_VERSION_NUMBER"), ConfigurationError, "redis://"),
    (tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), ConfigurationError, "ssl_ parameters"),
    (UnicodeError("label empty or too long"), ConfigurationError, "host"),
]
"""What ends an attempt to connect, what it becomes, and what the text says to do."""

LOGIN: list[tuple[bytes, str, type[AbeError]]] = [
    (b"AUTH", "WRONGPASS invalid username-password pair or user is disabled.", PermissionDeniedError),
    (b"AUTH", "ERR AUTH <password> called without any password configured", PermissionDeniedError),
    (b"AUTH", "ERR max number of clients reached", BackendConnectionError),
    (b"SELECT", "ERR DB index is out of range", ConfigurationError),
    (b"SELECT", "NOAUTH Authentication required.", PermissionDeniedError),
    (b"CLIENT", "ERR max number of clients + cluster connections reached", BackendConnectionError),
    (b"CLIENT", "ERR Client names cannot contain spaces", RedisError),
]


def test_every_row_of_the_table_is_tested() -> None:
    assert REPLIES.keys() == _BY_CODE.keys()


@pytest.mark.parametrize(("command", "text", "kind"), LOGIN)
def test_a_refused_login_becomes_ours_by_its_command(command: bytes, text: str, kind: type[AbeError]) -> None:
    error = login_refused(command, ReplyError(text), "h:6379")
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.parametrize(("exc", "kind", "hint"), CONNECTING)
def test_what_ends_an_attempt_to_connect_becomes_ours(exc: Exception, kind: type[AbeError], hint: str) -> None:
    lost = BackendConnectionError("the connection was lost")
    lost.__cause__ = exc
    for raised in (exc, lost):
        error = unreachable(raised, "h:6379")
        assert type(error) is kind
        assert str(exc) in str(error)
        assert hint in str(error)


def test_a_server_that_repeats_the_arguments_of_a_command_shows_none_of_them() -> None:
    reply = ReplyError("ERR unknown command 'AUTH', with args beginning with: 'app' 's3cret' ")
    error = login_refused(b"AUTH", reply, "h:6379")
    assert str(error).startswith("redis at h:6379: ERR unknown command 'AUTH' (check the user")
    assert "s3cret" not in f"{error!r} {reply!r}", "the reply is its cause"


def test_a_reply_that_nothing_expects_is_kept_as_it_is() -> None:
    assert type(translate(ReplyError("ERR unknown command 'XACKDEL'"), "h")) is RedisError


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_is_an_error_becomes_ours_by_its_code(name: str) -> None:
    text, kind = REPLIES[name]
    error = translate(ReplyError(text), "h:6379")
    assert type(error) is kind
    assert text in str(error)
    assert "h:6379" in str(error)
    assert error.retryable is kind.retryable


@pytest.mark.parametrize("name", REPLIES)
def test_the_code_is_found_in_the_text_of_a_script_that_failed(name: str) -> None:
    """Redis 6.2 wraps the error of a command within a script; 7.0 and later append where it happened."""
    text, kind = REPLIES[name]
    for wrapped in (
        f"ERR Error running script (call to f_b70740ae3191fa553398d89d09ebb09155ff1b47): @user_script:13: {text}",
        f"ERR Error running script (call to f_b70740ae3191fa553398d89d09ebb09155ff1b47): @user_script:13: @user_script: 13: -{text}",
        f"{text} script: b70740ae3191fa553398d89d09ebb09155ff1b47, on @user_script:13.",
        f"@user_script: 13: -{text}",
        f"@user_script: 13: {text}",
    ):
        assert code(ReplyError(wrapped)) == name
        assert type(translate(ReplyError(wrapped), "h")) is kind


@pytest.mark.parametrize(
    "text",
    [
        "ERR The user executing the script can't run this command or subcommand script: 3449, on @user_script:40.",
        "ERR The user executing the script can't access at least one of the keys mentioned in the command arguments script: 3449",
        "ERR ACL failure in script: User app has no permissions to run the 'xadd' command script: 3449, on @user_script:40.",
        "ERR Error running script (call to f_3449): @user_script:40: @user_script: 40: The user executing the script can't run this",
        "@user_script: 40: The user executing the script can't run this command or subcommand",
    ],
)
def test_a_right_that_a_script_lacks_is_one_that_the_user_lacks(text: str) -> None:
    assert type(translate(ReplyError(text), "h")) is PermissionDeniedError


def test_what_a_command_raised_is_the_cause() -> None:
    original = ReplyError("NOAUTH Authentication required.")
    with pytest.raises(PermissionDeniedError) as caught, translated("h:6379"):
        raise original
    assert caught.value.__cause__ is original


def test_ours_and_foreign_exceptions_pass_through() -> None:
    for passing in (BackendConnectionError("lost"), asyncio.CancelledError(), KeyError("bug"), OSError("bug")):
        with pytest.raises(type(passing)) as caught, translated("h:6379"):
            raise passing
        assert caught.value is passing


def test_redis_error_says_that_a_retry_does_not_help() -> None:
    assert issubclass(RedisError, AbeError)
    assert not RedisError("x").retryable

"""Redis's errors made ours, row by row."""

import asyncio
import socket
import ssl

import pytest
import redis.exceptions as native

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
    PermissionDeniedError,
)
from abe_backend_redis._errors import _BY_CODE, _BY_TYPE, RedisError, ReplyError, code, translate, translated

REPLIES = {
    "NOAUTH": ("NOAUTH Authentication required.", PermissionDeniedError),
    "WRONGPASS": ("WRONGPASS invalid username-password pair or user is disabled.", PermissionDeniedError),
    "NOPERM": ("NOPERM User app has no permissions to run the 'evalsha' command", PermissionDeniedError),
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
    "MASTERDOWN": (
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        BackendConnectionError,
    ),
    "CLUSTERDOWN": ("CLUSTERDOWN The cluster is down", BackendConnectionError),
    "TRYAGAIN": ("TRYAGAIN Multiple keys request during rehashing of slot", BackendConnectionError),
    "BUSY": ("BUSY Redis is busy running a script.", BackendConnectionError),
    "UNKILLABLE": ("UNKILLABLE Sorry the script already executed write commands", BackendConnectionError),
}

EXCEPTIONS: list[tuple[BaseException, type[AbeError]]] = [
    (native.AuthenticationError("invalid username-password pair"), PermissionDeniedError),
    (native.AuthorizationError("no"), PermissionDeniedError),
    (native.NoPermissionError("this user has no permissions"), PermissionDeniedError),
    (native.BusyLoadingError("Redis is loading"), BackendConnectionError),
    (native.ConnectionError("Error 111 connecting to h:6379."), BackendConnectionError),
    (native.TimeoutError("Timeout connecting to server"), BackendConnectionError),
    (ConnectionRefusedError(111, "refused"), BackendConnectionError),
    (TimeoutError(), BackendConnectionError),
    (socket.gaierror(-2, "Name or service not known"), BackendConnectionError),
    (asyncio.IncompleteReadError(b"", 5), BackendConnectionError),
    (native.InvalidResponse("Protocol Error"), ConfigurationError),
    (ReplyError("ERR unknown command 'XACKDEL'"), RedisError),
]


def test_every_row_of_the_tables_is_tested() -> None:
    assert REPLIES.keys() == _BY_CODE.keys()
    for theirs, _ in _BY_TYPE:
        assert any(isinstance(exc, theirs) for exc, _ in EXCEPTIONS)


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


@pytest.mark.parametrize(("exc", "kind"), EXCEPTIONS)
def test_an_exception_becomes_ours_by_its_type(exc: BaseException, kind: type[AbeError]) -> None:
    assert type(translate(exc, "h:6379")) is kind


def test_a_certificate_that_does_not_hold_is_a_matter_of_configuration() -> None:
    refused = native.ConnectionError("Error 1 connecting to h:6379.")
    refused.__context__ = ssl.SSLCertVerificationError(
        1, "certificate verify failed: unable to get local issuer certificate"
    )
    error = translate(refused, "h:6379")
    assert type(error) is ConfigurationError
    assert "certificate" in str(error)


def test_what_a_command_raised_is_the_cause() -> None:
    original = ReplyError("NOAUTH Authentication required.")
    with pytest.raises(PermissionDeniedError) as caught, translated("h:6379"):
        raise original
    assert caught.value.__cause__ is original


def test_ours_and_strangers_pass_through() -> None:
    for passing in (BackendConnectionError("lost"), asyncio.CancelledError(), KeyError("bug")):
        with pytest.raises(type(passing)) as caught, translated("h:6379"):
            raise passing
        assert caught.value is passing


def test_redis_error_says_that_a_retry_does_not_help() -> None:
    assert issubclass(RedisError, AbeError)
    assert not RedisError("x").retryable

"""Logging in by redis-py, and saying what is wrong where that fails."""

import asyncio
import os
import re
import ssl
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo

from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_redis._errors import translate
from abe_backend_redis._settings import RedisSettings

_DRIVER: Final = DriverInfo(lib_version=redis.__version__)
"""Made here once: made by each connection it would read the installed metadata, and block the event loop."""

_TLS: Final = (
    "ssl_ca_certs",
    "ssl_ca_data",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_keyfile",
    "ssl_min_version",
    "ssl_password",
)
_OPTIONS: Final = ("db", "password", "socket_keepalive", "username")
_OURS: Final = (
    "client_name",
    "decode_responses",
    "encoding",
    "encoding_errors",
    "health_check_interval",
    "max_connections",
    "protocol",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_timeout",
)
"""What the provider decides, whatever a URL that is used for other things too says."""

_HUNG_UP: Final = (ssl.SSLError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, TimeoutError)
"""Errors of a connection that was made; with others there is none."""

_PROBE: Final = 1.0
"""Seconds for a look whether the other scheme would be right."""
_PLAIN: Final = re.compile(rb"\+PONG|-(?:NOAUTH|DENIED|NOPERM|LOADING|ERR|MASTERDOWN)\b")


async def login(settings: RedisSettings, name: str) -> AbstractConnection:
    """Connect and log in, within `connect_timeout`.

    Raises:
        BackendConnectionError: Redis cannot be reached.
        ConfigurationError: `REDIS_URL` is wrong, or what is there is no Redis that we can use so.
        PermissionDeniedError: Redis does not let us in.
    """
    try:
        connection = _prepared(settings, name)
    except (TypeError, ValueError, redis.RedisError) as exc:  # they name the parameter, and do not show its value
        raise ConfigurationError(f"REDIS_URL has a query parameter that is wrong: {exc}") from exc
    try:
        async with asyncio.timeout(settings.connect_timeout) as bound:
            doubting = asyncio.create_task(_doubt(settings, bound))
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
            finally:
                doubting.cancel()
    except (redis.RedisError, OSError, EOFError) as exc:
        await connection.disconnect(nowait=True)
        raise await _explained(exc, settings) from exc
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


async def _doubt(settings: RedisSettings, bound: asyncio.Timeout) -> None:
    """End a login soon that waits for TLS from a server that has none: Redis takes a TLS greeting for a command that is not complete."""
    await asyncio.sleep(_PROBE)
    if settings.url.startswith("rediss:") and await _takes_the_other(settings) and not bound.expired():
        bound.reschedule(asyncio.get_running_loop().time())


def _prepared(settings: RedisSettings, name: str) -> AbstractConnection:
    options: dict[str, Any] = dict(parse_url(settings.url))
    kind: type[AbstractConnection] = options.pop("connection_class", Connection)
    _check({key for key in options if key not in ("host", "port", "path")}, tls=settings.url.startswith("rediss:"))
    options = {key: value for key, value in options.items() if key not in _OURS}
    options |= {key: value for key in ("username", "password") if (value := getattr(settings, key)) is not None}
    options |= {
        "protocol": 2,
        "client_name": name,
        "driver_info": _DRIVER,
        "retry": Retry(NoBackoff(), 0),  # retries are the engine's: a client that repeats a write by itself doubles it
        "socket_timeout": settings.connect_timeout,
        "socket_connect_timeout": settings.connect_timeout,
        "health_check_interval": 0,
    }
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if option in options and not os.path.isfile(options[option]):
            raise ValueError(f"{option} names no file")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("ssl_keyfile needs ssl_certfile, the certificate that the key is for")
    return kind(**options)


def _check(given: set[str], *, tls: bool) -> None:
    known = (*_OPTIONS, *_OURS, *(_TLS if tls else ()))
    for option in sorted(given.difference(known)):
        if option in _TLS:
            raise ValueError(f"{option} is for TLS, which is rediss://")
        close = get_close_matches(option, known, 1)
        right = f"{close[0]!r} is meant, perhaps" if close else f"there are {', '.join((*_OPTIONS, *_TLS))}"
        raise ValueError(f"{option} is none that is known; {right}")


async def _explained(exc: BaseException, settings: RedisSettings) -> AbeError:
    """Return our error for one of redis-py's; where the connection was made and then nobody answered, look why."""
    secure = settings.url.startswith("rediss:")
    if isinstance(exc, TimeoutError):
        text = f"connecting and logging in did not end within {settings.connect_timeout:g} s"
        error: AbeError = BackendConnectionError(f"redis at {settings.address}: {text}")
        if not secure:
            return error  # a server that wants TLS would have hung up
    else:
        error = translate(exc, settings.address)
    hung_up = not isinstance(why := exc.__cause__ or exc.__context__, OSError) or isinstance(why, _HUNG_UP)
    if isinstance(error, BackendConnectionError) and hung_up and await _takes_the_other(settings):
        scheme, what = ("redis", "without") if secure else ("rediss", "with")
        return ConfigurationError(
            f"redis at {settings.address} is there {what} TLS: write {scheme}:// in REDIS_URL, or its other port"
        )
    return error


async def _takes_the_other(settings: RedisSettings) -> bool:
    """Whether the server is there, and wants TLS where REDIS_URL says none, or the other way round."""
    parts = urlsplit(settings.url)
    if parts.scheme == "unix":
        return False
    host, port = parts.hostname or "", parts.port or 6379
    with suppress(OSError, TimeoutError, EOFError, ValueError):
        async with asyncio.timeout(min(_PROBE, settings.connect_timeout)):
            return await (_is_plain if parts.scheme == "rediss" else _is_tls)(host, port)
    return False


async def _is_plain(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"PING\r\n")
        return _PLAIN.match(await reader.read(64)) is not None
    finally:
        writer.transport.abort()


async def _is_tls(host: str, port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: only whether it answers in TLS matters
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    writer.transport.abort()
    return True

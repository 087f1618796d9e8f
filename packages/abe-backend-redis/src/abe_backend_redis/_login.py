"""Connects and logs in, and explains failures."""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Final

import hiredis

from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_redis._errors import ReplyError, is_refused, login_refused, unreachable
from abe_backend_redis._options import Options, read, tls_context
from abe_backend_redis._protocol import Argument, Wire
from abe_backend_redis._settings import RedisSettings

_log: Final = Log("abe.redis")

_LIBRARY: Final = "abe-backend-redis"
_VERSION: Final = version(_LIBRARY)

_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""In seconds, seconds and probes: redis-py's values, where the platform has these options."""

_LOST: Final = (
    ssl.SSLError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, BackendConnectionError,
    hiredis.ProtocolError,
)  # fmt: skip
"""Errors of a connection that was opened; with any other error it never was."""

_PROBE: Final = 1.0
"""Seconds for probing whether the other scheme would work."""
_PLAIN: Final = (b"+PONG", b"-NOAUTH", b"-DENIED", b"-NOPERM", b"-LOADING", b"-ERR", b"-MASTERDOWN")


async def connect(settings: RedisSettings, name: str, timeout: float) -> Wire:
    """Connect, at the address as it resolves now, and log in; both within `connect_timeout`.

    Args:
        settings: The address and the login.
        name: The connection's name in Redis's list of clients.
        timeout: See `Wire`.

    Raises:
        BackendConnectionError: Redis is unreachable.
        ConfigurationError: `REDIS_URL` is wrong, or the server is not a Redis that can be used with it.
        PermissionDeniedError: Redis refuses the login.
    """
    options = read(settings)
    wire = Wire(settings.address, timeout, _commands(options, name))
    probing: asyncio.Task[bool] | None = None
    try:
        async with asyncio.timeout(settings.connect_timeout) as bound:
            if options.tls is not None:
                probing = asyncio.create_task(_shorten_without_tls(settings, options, bound))
            try:
                await _open(wire, settings, options)
                await _log_in(wire, settings)
            except (OSError, UnicodeError, BackendConnectionError) as exc:
                raise await _explained(exc, settings, options) from exc
    except TimeoutError as exc:
        wire.close()
        if probing is not None and probing.done() and probing.result():
            raise _other_scheme(settings, secure=True) from exc
        raise BackendConnectionError(
            f"redis at {settings.address}: connecting and logging in timed out after {settings.connect_timeout:g} s"
        ) from exc
    except BaseException:
        wire.close()
        raise
    finally:
        if probing is not None:
            probing.cancel()
    wire.watch()
    return wire


def _commands(options: Options, name: str) -> Sequence[Sequence[Argument]]:
    """Return the commands of the login, which are sent in one write.

    HELLO is not one of them. A new connection uses RESP2 anyway, and HELLO accepts any password for a user without one, while AUTH with a
    password alone reports that the server has none.
    """
    commands: list[Sequence[Argument]] = []
    if options.username:
        commands.append((b"AUTH", options.username, options.password or b""))
    elif options.password:
        commands.append((b"AUTH", options.password))
    if options.database:
        commands.append((b"SELECT", options.database))
    commands.append((b"CLIENT", b"SETNAME", name))
    commands.append((b"CLIENT", b"SETINFO", b"LIB-NAME", _LIBRARY))
    commands.append((b"CLIENT", b"SETINFO", b"LIB-VER", _VERSION))
    return commands


async def _open(wire: Wire, settings: RedisSettings, options: Options) -> None:
    loop = asyncio.get_running_loop()
    if options.path is not None:
        await loop.create_unix_connection(lambda: wire, options.path)
        return
    context = (
        options.tls if options.tls is None else await asyncio.to_thread(tls_context, options.tls, settings.address)
    )
    transport, _ = await loop.create_connection(lambda: wire, options.host, options.port, ssl=context)
    if options.keepalive:
        _keep_alive(transport.get_extra_info("socket"))


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def _log_in(wire: Wire, settings: RedisSettings) -> None:
    """Wait for the replies. A connection that cannot be named, as the server refuses or lacks the command, is used unnamed."""
    for command, reply in zip(wire.login, wire.greeting, strict=True):
        try:
            await reply
        except ReplyError as exc:
            if command[0] != b"CLIENT" or not is_refused(exc):
                raise login_refused(command[0], exc, settings.address) from exc
            _log.debug("redis at %s does not accept a connection name: %s", settings.address, exc)


async def _shorten_without_tls(settings: RedisSettings, options: Options, bound: asyncio.Timeout) -> bool:
    """Shorten a login that waits for TLS from a server without: Redis takes the TLS greeting for an incomplete command, and waits."""
    await asyncio.sleep(min(_PROBE, settings.connect_timeout / 4))
    plain = await _answers_other_scheme(settings, options)
    if plain and not bound.expired():
        bound.reschedule(asyncio.get_running_loop().time())
    return plain


async def _explained(exc: Exception, settings: RedisSettings, options: Options) -> AbeError:
    """Return the error for a failed connection; if it was opened and then lost, probe for the other scheme."""
    error = unreachable(exc, settings.address)
    lost = isinstance(exc.__cause__ or exc, _LOST)
    if isinstance(error, BackendConnectionError) and lost and await _answers_other_scheme(settings, options):
        return _other_scheme(settings, secure=options.tls is not None)
    return error


def _other_scheme(settings: RedisSettings, *, secure: bool) -> ConfigurationError:
    scheme, what = ("redis", "without") if secure else ("rediss", "with")
    return ConfigurationError(
        f"redis at {settings.address} answers {what} TLS: write {scheme}:// in REDIS_URL, or its other port"
    )


async def _answers_other_scheme(settings: RedisSettings, options: Options) -> bool:
    """Whether the server answers with TLS where REDIS_URL has none, or without where it has."""
    if options.path is not None:
        return False
    with suppress(OSError, EOFError, ValueError):
        async with asyncio.timeout(min(_PROBE, settings.connect_timeout)):
            return await (_is_tls if options.tls is None else _is_plain)(options.host, options.port)
    return False


async def _is_plain(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"PING\r\n")
        return (await reader.read(64)).startswith(_PLAIN)
    finally:
        writer.transport.abort()


async def _is_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: this only probes for TLS
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    writer.transport.abort()
    return True

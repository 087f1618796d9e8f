"""Parses REDIS_URL: the address, the login and the TLS options."""

import os
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from redis.asyncio.connection import parse_url

from abe.errors import ConfigurationError
from abe_backend_redis._errors import TLS_FILES
from abe_backend_redis._settings import RedisSettings

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
_LOGIN: Final = ("db", "password", "socket_keepalive", "username")
_IGNORED: Final = (
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
"""Parameters that the provider decides itself, and ignores in a URL that other programs share."""

_CERT_REQS: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_WRONG: Final = "REDIS_URL has a wrong query parameter"


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """The address and the login. `path` is a Unix socket's, or None; `tls` is None without TLS."""

    host: str
    port: int
    path: str | None
    database: int
    username: str | None
    password: str | None
    keepalive: bool
    tls: Mapping[str, Any] | None


def read(settings: RedisSettings) -> Options:
    """Parse the URL of the settings, with their user and password.

    Raises:
        ConfigurationError: A query parameter is wrong. The text names it, and does not show its value.
    """
    parts = urlsplit(settings.url)
    secure = parts.scheme == "rediss"
    try:
        _check(parse_qs(parts.query), secure)
        given: Mapping[str, Any] = dict(parse_url(settings.url))
    except ValueError as exc:
        raise ConfigurationError(f"{_WRONG}: {exc}") from exc
    return Options(
        host=given.get("host", ""),
        port=given.get("port", 6379),
        path=given.get("path"),
        database=given.get("db", 0),
        username=given.get("username") if settings.username is None else settings.username,
        password=given.get("password") if settings.password is None else settings.password,
        keepalive=bool(given.get("socket_keepalive", True)),
        tls={option: given[option] for option in _TLS if option in given} if secure else None,
    )


def _check(given: Collection[str], secure: bool) -> None:
    known = (*_LOGIN, *_IGNORED, *(_TLS if secure else ()))
    for option in sorted(set(given).difference(known)):
        if option in _TLS:
            raise ValueError(f"{option} needs TLS: write rediss://")
        close = get_close_matches(option, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join((*_LOGIN, *_TLS))}"
        raise ValueError(f"{option} is unknown: {hint}")


def tls_context(options: Mapping[str, Any], address: str) -> ssl.SSLContext:
    """Make a connection's TLS context. It reads files: run it in a thread.

    Raises:
        ConfigurationError: A parameter, or the content of a file, is wrong.
    """
    try:
        return _tls_context(options)
    except ssl.SSLError as exc:
        raise ConfigurationError(f"redis at {address}: {exc} ({TLS_FILES})") from exc
    except OSError as exc:
        raise ConfigurationError(f"redis at {address}: {exc.strerror} ({TLS_FILES})") from exc
    except ValueError as exc:
        raise ConfigurationError(f"{_WRONG}: {exc}") from exc


def _tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if option in options and not os.path.isfile(options[option]):
            raise ValueError(f"{option} does not name a file")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("ssl_keyfile needs ssl_certfile, the certificate that the key is for")
    verify = _CERT_REQS.get(required := options.get("ssl_cert_reqs", "required"))
    if verify is None:
        raise ValueError(f"ssl_cert_reqs is {required!r}, and must be one of {', '.join(_CERT_REQS)}")
    context = ssl.create_default_context()
    context.check_hostname = verify is not ssl.CERT_NONE and bool(options.get("ssl_check_hostname", True))
    context.verify_mode = verify
    if "ssl_certfile" in options:
        # Without a password pass an empty one: OpenSSL would prompt for it at the terminal.
        password = options.get("ssl_password", "")
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), password)
    authorities = [options.get(f"ssl_ca_{kind}") for kind in ("certs", "path", "data")]
    if any(authorities):
        context.load_verify_locations(*authorities)
    if "ssl_min_version" in options:
        context.minimum_version = options["ssl_min_version"]
    if "ssl_ciphers" in options:
        context.set_ciphers(options["ssl_ciphers"])
    return context

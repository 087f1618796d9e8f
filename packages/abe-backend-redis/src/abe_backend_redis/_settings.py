"""The settings of the Redis provider, from ``REDIS_*`` and ``QUEUE_*``."""

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from abe.errors import ConfigurationError
from abe.settings import QueueSettings, positive, seconds, setting

_SCHEMES: Final = ("redis", "rediss", "unix")
_ENCODED: Final = "special characters in the user and the password must be percent-encoded"
_LATER: Final = ("redis+sentinel", "redis+cluster", "rediss+sentinel", "rediss+cluster")


def _url(value: Any) -> str:
    """Check a Redis URL. The error contains nothing of it, as it may contain a password."""
    form = "redis://[user:password@]host[:port][/database] (rediss:// for TLS), or unix:///path/to.sock"
    if not isinstance(value, str):
        raise ValueError(form)  # noqa: TRY004 - settings checks raise ValueError
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(f"{form}, with a port from 1 to 65535; {_ENCODED}") from None
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(f"{form}; {_ENCODED}")
    if parts.scheme in _LATER:
        raise ValueError(f"{form}; {parts.scheme}:// is not supported by this version")
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"{form}; its scheme is {parts.scheme!r}")
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError(f"{form}; the path is missing")
        return value
    if not parts.hostname or port == 0:
        raise ValueError(f"{form}; the host is missing or the port is 0")
    database = parts.path.strip("/")
    if database and not database.isdecimal():
        raise ValueError(f"{form}; the database must be a number")
    return value


@dataclass(frozen=True, kw_only=True, repr=False)
class RedisSettings(QueueSettings):
    """The address of Redis and the login, and the settings of every backend."""

    url: str = setting(
        "REDIS_URL",
        str,
        default="redis://localhost:6379/0",
        check=_url,
        secret=True,
        help="The address of Redis: redis://, rediss:// (TLS; ssl_ca_certs, ssl_certfile, ssl_keyfile as query parameters) or unix://.",
    )
    username: str | None = setting(
        "REDIS_USERNAME", str, default=None, help="The ACL user; instead of the one in the URL."
    )
    password: str | None = setting(
        "REDIS_PASSWORD", str, default=None, secret=True, help="The password; instead of the one in the URL."
    )
    connect_timeout: float = setting(
        "REDIS_CONNECT_TIMEOUT_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long connecting and logging in may take, in seconds.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url)
        for name, given, inside in (
            ("REDIS_USERNAME", self.username, parts.username),
            ("REDIS_PASSWORD", self.password, parts.password),
        ):
            if given is not None and inside and given != unquote(inside):
                raise ConfigurationError(f"{name} and REDIS_URL both have one, and they differ: omit one of them")

    @property
    def address(self) -> str:
        """The address of Redis without credentials, for log and error texts."""
        parts = urlsplit(self.url)
        return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"

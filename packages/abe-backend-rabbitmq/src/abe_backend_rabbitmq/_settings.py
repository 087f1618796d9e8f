"""What the RabbitMQ provider can be told, from ``RABBITMQ_*``, ``MESSAGE_QUEUE_*`` and ``QUEUE_*``."""

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from abe.errors import ConfigurationError
from abe.settings import QueueSettings, boolean, integer, positive, seconds, setting

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_ENCODED: Final = "special characters in the user and the password must be percent-encoded"
_LONGEST_EXCHANGE: Final = 200


def _url(value: Any) -> str:
    """Check RabbitMQ URLs. No text of them is repeated in the complaint: they may hold a password."""
    form = "amqp://[user:password@]host[:port][/vhost] (amqps:// for TLS), several of them separated by commas"
    if not isinstance(value, str):
        raise ValueError(form)  # noqa: TRY004 - settings checks raise ValueError
    for url in value.split(","):
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError:
            raise ValueError(f"{form}, with a port from 1 to 65535; {_ENCODED}") from None
        if parts.scheme not in _PORTS:
            raise ValueError(f"{form}; its scheme is {parts.scheme!r}")
        if not parts.hostname or port == 0:
            raise ValueError(f"{form}; the host is missing or the port is 0")
        if parts.fragment or "@" in parts.path + parts.query:
            raise ValueError(f"{form}; {_ENCODED}")
        if "/" in parts.path[1:]:
            raise ValueError(f"{form}; a slash in the name of a vhost is written %2F")
    return value


def _port(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError("a port from 1 to 65535")
    return value


def _exchange(value: Any) -> Any:
    if not isinstance(value, str) or not 1 <= len(value.encode()) <= _LONGEST_EXCHANGE or value.startswith("amq."):
        raise ValueError(f"the name of an exchange, 1 to {_LONGEST_EXCHANGE} bytes, not beginning with 'amq.'")
    return value


@dataclass(frozen=True, kw_only=True, repr=False)
class RabbitMQSettings(QueueSettings):
    """Where RabbitMQ is, and how to log in."""

    url: str | None = setting(
        "RABBITMQ_URL",
        str,
        default=None,
        check=_url,
        secret=True,
        help="Where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS (cafile, certfile, keyfile as query "
        "parameters); several, separated by commas, are tried in turn.",
    )
    host: str | None = setting(
        "MESSAGE_QUEUE_HOST", str, default=None, help="The host; localhost if nothing says otherwise."
    )
    port: int | None = setting(
        "MESSAGE_QUEUE_PORT", integer(1), default=None, check=_port, help="The port; 5672, or 5671 for TLS."
    )
    username: str | None = setting("MESSAGE_QUEUE_USERNAME", str, default=None, help="The user; guest.")
    password: str | None = setting(
        "MESSAGE_QUEUE_PASSWORD", str, default=None, secret=True, help="The password; guest."
    )
    vhost: str | None = setting("MESSAGE_QUEUE_VHOST", str, default=None, help="The virtual host; /.")
    exchange: str | None = setting(
        "MESSAGE_QUEUE_EXCHANGE",
        str,
        default=None,
        check=_exchange,
        help="The topic exchange that messages are published to; abe:<namespace>. One namespace has it for itself.",
    )
    heartbeat: float = setting(
        "RABBITMQ_HEARTBEAT_SECONDS",
        seconds,
        default=20.0,
        check=positive,
        help="How often both sides give a sign of life, in whole seconds.",
    )
    connect_timeout: float = setting(
        "RABBITMQ_CONNECT_TIMEOUT_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long connecting and logging in may take, in seconds.",
    )
    tap: bool = setting(
        "RABBITMQ_TAP",
        boolean,
        default=True,
        help="Whether messages, confirms and acknowledgements go past aiormq, several times faster; false: by aiormq alone.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url is None:
            return
        for url in self.url.split(","):
            parts = urlsplit(url.strip())
            inside: dict[str, tuple[object, object]] = {
                "MESSAGE_QUEUE_HOST": (self.host, parts.hostname),
                "MESSAGE_QUEUE_PORT": (self.port, parts.port or _PORTS[parts.scheme]),
                "MESSAGE_QUEUE_USERNAME": (self.username, unquote(parts.username or "guest")),
                "MESSAGE_QUEUE_PASSWORD": (self.password, unquote(parts.password or "guest")),
                "MESSAGE_QUEUE_VHOST": (self.vhost, unquote(parts.path[1:]) or "/"),
            }
            for name, (given, found) in inside.items():
                if given is not None and given != found:
                    raise ConfigurationError(
                        f"{name} and RABBITMQ_URL are both set, and they differ: leave it out of one of them"
                    )

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, to be tried in turn."""
        if self.url is not None:
            return tuple(url.strip() for url in self.url.split(","))
        host = self.host or "localhost"
        host = f"[{host}]" if ":" in host else host
        user, password = quote(self.username or "guest", safe=""), quote(self.password or "guest", safe="")
        vhost = "" if self.vhost in (None, "/") else quote(self.vhost or "", safe="")
        return (f"amqp://{user}:{password}@{host}:{self.port or _PORTS['amqp']}/{vhost}",)


def address(url: str) -> str:
    """Return where a URL leads, without credentials, for texts."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or _PORTS[parts.scheme]}"

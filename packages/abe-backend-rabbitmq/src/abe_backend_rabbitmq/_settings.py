"""The RabbitMQ provider's settings, from ``RABBITMQ_*``, ``MESSAGE_QUEUE_*`` and ``QUEUE_*``."""

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from abe.errors import ConfigurationError
from abe.settings import QueueSettings, integer, positive, seconds, setting

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_ENCODED: Final = "special characters in the user and the password must be percent-encoded"
_EXCHANGE: Final = re.compile(r"(?!amq\.)[A-Za-z0-9_.:@#,/+ -]{1,127}\Z")
"""What the client accepts; names that begin with ``amq.`` are the broker's own."""

_LONGEST_HEARTBEAT: Final = 65_534
_PARAMETERS: Final = {
    "cafile": "say RABBITMQ_CA_FILE",
    "certfile": "say RABBITMQ_CERTIFICATE_FILE",
    "keyfile": "say RABBITMQ_KEY_FILE",
    "capath": "say RABBITMQ_CA_FILE, one file with all authorities",
    "cadata": "say RABBITMQ_CA_FILE, a file with the authorities",
    "no_verify_ssl": "certificates are always verified, so say RABBITMQ_CA_FILE, the authority that signed the broker's",
    "heartbeat": "say RABBITMQ_HEARTBEAT_SECONDS",
    "timeout": "say RABBITMQ_CONNECT_TIMEOUT_SECONDS",
    "connection_timeout": "say RABBITMQ_CONNECT_TIMEOUT_SECONDS",
    "socket_timeout": "say RABBITMQ_CONNECT_TIMEOUT_SECONDS",
    "blocked_connection_timeout": "say QUEUE_PUBLISH_TIMEOUT_SECONDS",
    "verify": "certificates are always verified, so say RABBITMQ_CA_FILE, the authority that signed the broker's",
    "cacertfile": "say RABBITMQ_CA_FILE",
    "server_name_indication": "the host in the URL is the name that the certificate must have",
    **dict.fromkeys(
        ("connection_attempts", "retry_delay", "reconnect_interval", "fail_fast", "channel_max", "frame_max", "name"),
        "nothing, the provider sets it",
    ),
}
"""What to use instead of query parameters of other clients."""


def _url(value: Any) -> str:
    """Check RabbitMQ URLs. The error repeats none of their text but the scheme: they may hold a password."""
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
            # Without the slashes it may be what comes after a comma in a password.
            raise ValueError(f"{form}; its scheme is {parts.scheme if '://' in url else ''!r}")
        if not parts.hostname or port == 0:
            raise ValueError(f"{form}; the host is missing or the port is 0")
        if parts.fragment or "@" in parts.path + parts.query:
            raise ValueError(f"{form}; {_ENCODED}")
        if "/" in parts.path[1:]:
            raise ValueError(f"{form}; a slash in the name of a vhost is written %2F")
        if parts.query:
            given = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name in _PARAMETERS]
            instead = [f"instead of {name}: {_PARAMETERS[name]}" for name in given]
            raise ValueError("; ".join([f"{form}, without query parameters", *instead]))
    return value


def _port(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError("a port from 1 to 65535")
    return value


def _heartbeat(value: Any) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value <= _LONGEST_HEARTBEAT
        or value % 1
    ):
        raise ValueError(f"a whole number of seconds from 1 to {_LONGEST_HEARTBEAT}")
    return value


def _exchange(value: Any) -> Any:
    if not isinstance(value, str) or not _EXCHANGE.match(value):
        raise ValueError(
            "the name of an exchange, 1 to 127 letters, digits, spaces and characters of '_.:@#,/+-', not beginning with 'amq.'"
        )
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
        help="Where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS; several, separated by commas, are tried "
        "in turn.",
    )
    host: str | None = setting("MESSAGE_QUEUE_HOST", str, default=None, help="The host; localhost by default.")
    port: int | None = setting("MESSAGE_QUEUE_PORT", integer(1), default=None, check=_port, help="The port; 5672.")
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
    ca_file: str | None = setting(
        "RABBITMQ_CA_FILE",
        str,
        default=None,
        help="For amqps://: the file of the authorities (PEM) that RabbitMQ's certificate is verified by; the system's.",
    )
    certificate_file: str | None = setting(
        "RABBITMQ_CERTIFICATE_FILE",
        str,
        default=None,
        help="For amqps://: the file of the client's certificate (PEM), where RabbitMQ asks for one.",
    )
    key_file: str | None = setting(
        "RABBITMQ_KEY_FILE",
        str,
        default=None,
        help="For amqps://: the file of its private key (PEM, without a password); RABBITMQ_CERTIFICATE_FILE, which may hold both.",
    )
    heartbeat: float = setting(
        "RABBITMQ_HEARTBEAT_SECONDS",
        seconds,
        default=4.0,
        check=_heartbeat,
        help="The heartbeat interval, in whole seconds. A connection that is silent for two of them is aborted.",
    )
    connect_timeout: float = setting(
        "RABBITMQ_CONNECT_TIMEOUT_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long connecting and logging in may take, in seconds.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_file is not None and self.certificate_file is None:
            raise ConfigurationError(
                "RABBITMQ_KEY_FILE is set, and RABBITMQ_CERTIFICATE_FILE, to which it belongs, is not"
            )
        if not any(is_tls(url) for url in self.urls):
            files = ("ca_file", "RABBITMQ_CA_FILE"), ("certificate_file", "RABBITMQ_CERTIFICATE_FILE")
            for name, variable in files:
                if getattr(self, name) is not None:
                    raise ConfigurationError(
                        f"{variable} is set, and TLS is not asked for: RABBITMQ_URL must begin with amqps://"
                    )
        if self.url is None:
            return
        for url in self.urls:
            parts = urlsplit(url)
            inside: dict[str, tuple[object, object]] = {
                "MESSAGE_QUEUE_HOST": (self.host and self.host.lower(), parts.hostname),
                "MESSAGE_QUEUE_PORT": (self.port, parts.port or _PORTS[parts.scheme]),
                "MESSAGE_QUEUE_USERNAME": (self.username, unquote(parts.username or "guest")),
                "MESSAGE_QUEUE_PASSWORD": (self.password, unquote(parts.password or "guest")),
                "MESSAGE_QUEUE_VHOST": (self.vhost, vhost(url)),
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


def vhost(url: str) -> str:
    """Return the virtual host of a URL."""
    return unquote(urlsplit(url).path[1:]) or "/"


def is_tls(url: str) -> bool:
    """Return whether a URL asks for TLS."""
    return urlsplit(url).scheme == "amqps"

"""The SQS provider's settings, from ``AWS_*``, ``SQS_*`` and ``QUEUE_*``.

Those of the account are the AWS SDK's: what is not set here (profiles, roles, container and instance credentials, the region of a profile)
is found by its chain when the backend connects.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias, cast
from urllib.parse import urlsplit

from abe.backends.message_queue.base.names import check_patterns
from abe.errors import ConfigurationError
from abe.settings import QueueSettings, at_least, boolean, integer, plain_name, positive, seconds, setting

_ALIASES: Final = {
    "AWS_REGION": "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_SQS": "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_SNS": "AWS_ENDPOINT_URL",
}
"""Variables of the SDK that mean the same, the more particular one first."""

_GROUPS: Final = 'a JSON object from group to key patterns, such as {"billing": ["order.#"]}'
_LONGEST_POLL: Final = 20
_LONGEST_LEASE: Final = 43_199
"""Seconds: a message is invisible for one second more than its lease, and for 12 hours at most."""
_MESSAGE_GROUP: Final = re.compile("[!-~]{1,128}")

Pinned: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]


def _endpoint(value: Any) -> str:
    """Check the address of an SQS. The error does not repeat it: it may hold a password."""
    form = "an address such as http://localhost:4566, without credentials"
    if not isinstance(value, str):
        raise ValueError(form)  # noqa: TRY004 - settings checks raise ValueError
    try:
        parts = urlsplit(value)
        valid = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
        )
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(form)
    return value


def _fanout(value: Any) -> str:
    """Check who copies a message to the groups."""
    if value not in ("direct", "sns"):
        raise ValueError("direct or sns")
    return str(value)


def _message_group(value: Any) -> str:
    """Check the name of a message group."""
    if not isinstance(value, str) or not _MESSAGE_GROUP.fullmatch(value):
        raise ValueError("1 to 128 letters, digits and punctuation marks of ASCII")
    return value


def _wait(value: Any) -> int:
    """Check the length of a long poll."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LONGEST_POLL:
        raise ValueError(f"a whole number of seconds from 1 to {_LONGEST_POLL}")
    return value


def _pinned(text: str) -> Pinned:
    """Read the groups and their patterns."""
    try:
        groups = json.loads(text)
    except ValueError:
        raise ValueError(_GROUPS) from None
    if not isinstance(groups, dict) or not groups:
        raise ValueError(_GROUPS)
    named = cast("dict[str, list[str]]", groups)
    if not all(isinstance(keys, list) for keys in named.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(_GROUPS)
    return _check_pinned(tuple((group, tuple(keys)) for group, keys in named.items()))


def _check_pinned(value: Any) -> Pinned:
    """Check the groups and their patterns."""
    try:
        return tuple((plain_name(group), check_patterns(patterns)) for group, patterns in value)
    except (TypeError, ValueError) as exc:
        raise ValueError(f"{_GROUPS} ({exc})") from None


@dataclass(frozen=True, kw_only=True, repr=False)
class SqsSettings(QueueSettings):
    """Which account and region, and how queues are made and read."""

    region: str | None = setting(
        "AWS_REGION", str, default=None, help="The region; AWS_DEFAULT_REGION too. Unset: the profile's."
    )
    endpoint_url: str | None = setting(
        "AWS_ENDPOINT_URL_SQS",
        str,
        default=None,
        check=_endpoint,
        secret=True,
        help="The address of SQS, for emulators and private endpoints; AWS_ENDPOINT_URL too. Unset: the region's.",
    )
    topic_endpoint_url: str | None = setting(
        "AWS_ENDPOINT_URL_SNS",
        str,
        default=None,
        check=_endpoint,
        secret=True,
        help="The same for SNS, with SQS_FANOUT=sns.",
    )
    profile: str | None = setting(
        "AWS_PROFILE", str, default=None, help="The profile of the SDK's configuration files to use."
    )
    access_key_id: str | None = setting(
        "AWS_ACCESS_KEY_ID",
        str,
        default=None,
        secret=True,
        help="The access key. Unset: the SDK looks for credentials (profile, role, container, instance).",
    )
    secret_access_key: str | None = setting(
        "AWS_SECRET_ACCESS_KEY", str, default=None, secret=True, help="The secret of the access key."
    )
    session_token: str | None = setting(
        "AWS_SESSION_TOKEN", str, default=None, secret=True, help="The session token of temporary credentials."
    )
    wait: int = setting(
        "SQS_WAIT_SECONDS",
        integer(1),
        default=8,
        check=_wait,
        help="How long a poll waits for messages, in whole seconds up to 20. Longer polls cost less; a connection that went silent is "
        "noticed 4 s after that, and what a poll brings after a consumer has stopped is given back when it ends.",
    )
    pollers: int = setting(
        "SQS_MAX_POLLERS",
        integer(1),
        default=8,
        check=at_least(1),
        help="Polls that a consumer may have in progress at once. An idle one has one.",
    )
    registry_ttl: float = setting(
        "SQS_REGISTRY_TTL_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long publishers may use the list of groups they have read, in seconds. Declaring a new group, or "
        "changing its patterns, takes that long: until every publisher knows.",
    )
    pinned: Pinned | None = setting(  # noqa: RUF009 - a field like the others; the alias hides that it is immutable
        "SQS_GROUPS",
        _pinned,
        default=None,
        check=_check_pinned,
        help="All the groups and their key patterns, as JSON. Set: the list is never read from SQS, and no other group can be declared.",
    )
    ensure: bool = setting(
        "SQS_ENSURE",
        boolean,
        default=True,
        help="Whether to create the queues that are missing. False: the account's administrators create them.",
    )
    fanout: str = setting(
        "SQS_FANOUT",
        str,
        default="direct",
        check=_fanout,
        help="Who copies a message to the groups: direct, the publisher does; sns, an SNS topic does where every group wants the message.",
    )
    topic_after: float = setting(
        "SQS_TOPIC_AFTER_SECONDS",
        seconds,
        default=70.0,
        check=positive,
        help="With SQS_FANOUT=sns: for how long after the last change of a group publishers send directly, in seconds. "
        "SQS may take a minute to apply the topic's right to send, and clocks may differ.",
    )
    fifo: bool = setting(
        "SQS_FIFO",
        boolean,
        default=False,
        help="Whether the queues are FIFO queues: messages of one message group stay in order, and an id published again within "
        "5 minutes is delivered once.",
    )
    message_group: str | None = setting(
        "SQS_MESSAGE_GROUP",
        str,
        default=None,
        check=_message_group,
        help="With SQS_FIFO: one message group for all messages, which keeps all of them in one order and has them handled batch by batch. "
        "Unset: each key is a message group.",
    )
    connect_timeout: float = setting(
        "SQS_CONNECT_TIMEOUT_SECONDS",
        seconds,
        default=5.0,
        check=positive,
        help="How long opening a connection may take, in seconds; at most four tenths of QUEUE_PUBLISH_TIMEOUT_SECONDS.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ConfigurationError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set together, or not at all")
        if self.lease > _LONGEST_LEASE:
            raise ConfigurationError(
                f"QUEUE_LEASE_SECONDS is {self.lease:g}: SQS keeps no message invisible for longer than 12 hours, so set it to "
                f"{_LONGEST_LEASE} at most"
            )
        if self.message_group is not None and not self.fifo:
            raise ConfigurationError("SQS_MESSAGE_GROUP is for FIFO queues: set SQS_FIFO=true, or leave it out")
        if self.fanout == "sns" and self.fifo:
            raise ConfigurationError("SQS_FANOUT=sns is for standard queues: leave it out, or SQS_FIFO")
        if self.fanout == "sns" and self.pinned is not None:
            raise ConfigurationError(
                "SQS_FANOUT=sns reads the topic from the queues' tags, and SQS_GROUPS keeps them from being read: leave one of them out"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings from the environment. No I/O.

        Args:
            environ: What to read instead of ``os.environ``.

        Raises:
            ConfigurationError: A variable is malformed; the text names it.
        """
        values = dict(os.environ if environ is None else environ)
        if values.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
            values = {name: value for name, value in values.items() if not name.startswith("AWS_ENDPOINT_URL")}
        for name, alias in _ALIASES.items():
            values[name] = values.get(name) or values.get(alias, "")
        return super().from_env(values)

    @property
    def address(self) -> str:
        """The address of SQS without credentials, for texts."""
        if self.endpoint_url is None:
            return self.region or "the region of the profile"
        return urlsplit(self.endpoint_url).netloc

    @property
    def visibility(self) -> int:
        """The visibility timeout: one second more than the lease, as SQS counts whole seconds, and may cut the last one short."""
        return -int(-self.lease // 1) + 1

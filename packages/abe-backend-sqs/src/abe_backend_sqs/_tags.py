"""The groups as the tags of their queues describe them. Pure.

A group exists when its queue has these tags, which are set after everything else is ready.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, Self

from abe.backends.message_queue.base.routing import Routes
from abe.errors import ConfigurationError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._topology import mark

_GROUP_TAG: Final = "abe-group"
_PATTERNS_TAG: Final = "abe-patterns-"
_PARTS_TAG: Final = "abe-patterns"
_SINCE_TAG: Final = "abe-since"
_WANTED_TAG: Final = "abe-wanted-since"
_SUBSCRIPTION_TAG: Final = "abe-subscription"
_TAG_ROOM: Final = 256
_MOST_TAGS: Final = 40
"""Of the 50 that a queue may have: the others are the owner's."""


class Group(NamedTuple):
    """A group as the tags of its queue describe it."""

    name: str
    patterns: tuple[str, ...]
    since: float
    """When they were set, in seconds since the epoch, by the clock of the process that set them."""
    subscription: str = ""
    """The ARN of the queue's subscription to the namespace's topic, where it has one."""
    wanted_since: float = 0.0
    """When it got these patterns, by the same clock."""


def tags(group: Group) -> dict[str, str]:
    """Return the tags of a group's queue. A tag may not hold every character, so the patterns are in base64.

    Raises:
        ConfigurationError: There are more patterns than a queue's tags can hold.
    """
    text = base64.urlsafe_b64encode(json.dumps(group.patterns, ensure_ascii=False).encode()).decode()
    parts = [text[start : start + _TAG_ROOM] for start in range(0, len(text), _TAG_ROOM)]
    if len(parts) > _MOST_TAGS:
        raise ConfigurationError(
            f"group {group.name!r}: its {len(group.patterns)} key patterns are more than the tags of a queue can hold"
        )
    named = {f"{_PATTERNS_TAG}{index}": part for index, part in enumerate(parts)}
    if group.subscription:
        named[_SUBSCRIPTION_TAG] = group.subscription
    times = {_SINCE_TAG: group.since, _WANTED_TAG: group.wanted_since}
    named |= {tag: str(round(moment * 1000)) for tag, moment in times.items()}
    return {_GROUP_TAG: group.name, _PARTS_TAG: str(len(parts)), **named}


def from_tags(found: Mapping[str, str]) -> Group | None:
    """Return the group of a queue's tags; None: they describe none, as the queue is being created, or is not ours."""
    try:
        text = "".join(found[f"{_PATTERNS_TAG}{index}"] for index in range(int(found[_PARTS_TAG])))
        patterns = json.loads(base64.urlsafe_b64decode(text))
        since, wanted = (int(found.get(tag, 0)) / 1000 for tag in (_SINCE_TAG, _WANTED_TAG))
        return Group(found[_GROUP_TAG], tuple(patterns), since, found.get(_SUBSCRIPTION_TAG, ""), wanted)
    except (KeyError, TypeError, ValueError):
        return None


class Listing(NamedTuple):
    """The groups' queues and revisions, from one list of the queues' names."""

    queues: Mapping[str, Queue]
    """The groups' queues, by name."""
    revisions: Mapping[str, frozenset[Queue]]
    """The queues that are revisions, by the mark of their group."""

    def of(self, name: str) -> frozenset[Queue]:
        """Return the revisions of the group whose queue has that name."""
        return self.revisions.get(mark(name), frozenset())


class Registry(NamedTuple):
    """The groups as they were read at one time."""

    groups: Mapping[str, tuple[str, ...]]
    since: Mapping[str, float]
    """When their tags were set, in seconds since the epoch."""
    looked_at: float
    """When the reading began, by the monotonic clock."""
    routes: Routes[tuple[str, ...]]
    """The groups that want a key."""
    members: tuple[Group, ...] = ()
    """The groups as their tags describe them."""
    topic: str = ""
    """The ARN of the topic that reaches every group; empty where there is none."""
    listing: "Listing | None" = None
    """The list that was read before the tags."""
    missing: frozenset[str] = frozenset()
    """Those of the groups whose queues were deleted underneath, and may be created again by their consumers."""

    @classmethod
    def of(
        cls, members: Iterable[Group], looked_at: float, topic: str, listing: "Listing", missing: Iterable[str] = ()
    ) -> Self:
        """Return the registry of these groups."""
        found = tuple(sorted(members))
        patterns, since = {each.name: each.patterns for each in found}, {each.name: each.since for each in found}
        return cls(patterns, since, looked_at, Routes(patterns, tuple), found, topic, listing, frozenset(missing))

    def wanted_since(self, group: str) -> float:
        """Return when a group got its patterns, in seconds since the epoch; 0: always."""
        return next((each.wanted_since for each in self.members if each.name == group), 0.0)

    @property
    def present(self) -> Mapping[str, tuple[str, ...]]:
        """The groups whose queues exist."""
        return {name: patterns for name, patterns in self.groups.items() if name not in self.missing}

    @property
    def subscriptions(self) -> Mapping[str, str]:
        """The ARN of the subscription of each group's queue, where it has one."""
        return {each.name: each.subscription for each in self.members if each.subscription}


def topic(subscription: str) -> str:
    """Return the ARN of the topic of a subscription."""
    return subscription.rpartition(":")[0]


def common_topic(groups: Iterable[Group], before: float) -> str:
    """Return the ARN of the topic that reaches every group, or nothing if one is not subscribed, or was not before that time."""
    topics = {topic(group.subscription) if group.since <= before else "" for group in groups}
    return topics.pop() if len(topics) == 1 else ""

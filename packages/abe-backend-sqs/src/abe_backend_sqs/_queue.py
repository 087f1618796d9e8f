"""One SQS queue: what it is asked, and how its answers are read."""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from abe.backends.message_queue.base import Outcomes
from abe.backends.message_queue.base.routing import lease_lost
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import (
    CLIENT_ERRORS,
    EntryRefusedError,
    QueueMissingError,
    translate,
    translate_entry,
    translate_send,
    translated,
)
from abe_backend_sqs._wire import BATCH, Entry, Message

if TYPE_CHECKING:
    from types_aiobotocore_sqs.client import SQSClient

LONGEST_VISIBILITY: Final = 43_200 - 60
"""Seconds, from its receipt, that a message stays invisible at most: SQS's 12 hours, without what requests may take on their way."""

_SYSTEM: Final = ("ApproximateReceiveCount", "SentTimestamp", "MessageGroupId")
"""What SQS itself tells about a message."""
_COUNTS: Final = tuple(f"ApproximateNumberOfMessages{kind}" for kind in ("", "NotVisible", "Delayed"))
_PAGE: Final = 1_000


class Counts(NamedTuple):
    """How many messages a queue has, as SQS counts: approximately."""

    visible: int
    in_flight: int
    delayed: int


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue.

    Each method raises an `AbeError` by the tables of errors, a `QueueMissingError` among them.

    Args:
        name: Its name.
        url: Its address.
        clients: Ask SQS.
    """

    name: str
    url: str
    clients: Clients = field(repr=False, compare=False)

    async def poll(self, count: int, wait: int | None = None) -> Sequence[Message]:
        """Return up to `count` messages, when there is one or the seconds are over, and with the lease, that the settings say."""
        settings = self.clients.settings
        wait = settings.wait if wait is None else wait
        reply = await self._receive(await self.clients.polls(), count, wait, settings.visibility)
        return reply.get("Messages") or ()

    async def look(self, wait: int, visibility: int) -> Mapping[str, Any]:
        """Receive up to ten messages, which stay invisible for that many seconds, over a connection of requests that are quick."""
        return await self._receive(await self.clients.calls(), BATCH, wait, visibility)

    async def _receive(self, client: "SQSClient", count: int, wait: int, visibility: int) -> Mapping[str, Any]:
        with translated(self.clients.settings.address):
            return await client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=count,
                WaitTimeSeconds=wait,
                VisibilityTimeout=visibility,
                MessageSystemAttributeNames=_SYSTEM,
                MessageAttributeNames=("All",),
            )

    async def send(self, entries: Sequence[Entry]) -> Outcomes:
        """Store up to ten messages, and return what became of each."""
        client = await self.clients.calls()
        call = client.send_message_batch(QueueUrl=self.url, Entries=requests(entries))
        return await stored(call, len(entries), self.clients.settings.address)

    async def delete(self, handles: Sequence[str]) -> Outcomes:
        """Delete messages by their receipt handles, and return what became of each."""
        client = await self.clients.calls()
        return await self._settle(client.delete_message_batch, [{"ReceiptHandle": handle} for handle in handles])

    async def change_visibility(self, timeouts: Iterable[tuple[str, int]]) -> Outcomes:
        """Make messages invisible, each by its receipt handle for so many seconds from now, and return what became of each."""
        client = await self.clients.calls()
        entries = [{"ReceiptHandle": handle, "VisibilityTimeout": seconds} for handle, seconds in timeouts]
        return await self._settle(client.change_message_visibility_batch, entries)

    async def _settle(self, call: Callable[..., Awaitable[Any]], entries: Sequence[Mapping[str, Any]]) -> Outcomes:
        address = self.clients.settings.address

        async def batch(some: Sequence[Mapping[str, Any]]) -> Outcomes:
            try:
                reply = await call(
                    QueueUrl=self.url, Entries=[{"Id": str(index), **entry} for index, entry in enumerate(some)]
                )
            except CLIENT_ERRORS as exc:
                error = translate(exc, address)
                error.__cause__ = exc
                return [lease_lost() if isinstance(error, QueueMissingError) else error] * len(some)
            # All that an entry says is the handle: one that SQS does not take, under whatever name, is none any more.
            outcomes = _outcomes(reply, len(some), address, BackendConnectionError)
            return [lease_lost() if isinstance(error, EntryRefusedError) else error for error in outcomes]

        batches = await gather_all(*(batch(entries[start : start + BATCH]) for start in range(0, len(entries), BATCH)))
        return list(itertools.chain.from_iterable(batches))

    async def counts(self) -> Counts:
        """Count its messages."""
        found = await self.attributes(*_COUNTS)
        return Counts(*(int(found.get(kind, 0)) for kind in _COUNTS))

    async def arn(self) -> str:
        """Return its ARN."""
        return (await self.attributes("QueueArn"))["QueueArn"]

    async def attributes(self, *names: str) -> Mapping[str, str]:
        """Return attributes of the queue itself."""
        client = await self.clients.calls()
        with translated(self.clients.settings.address):
            reply: Any = await client.get_queue_attributes(QueueUrl=self.url, AttributeNames=cast("Any", names))
            found: Mapping[str, str] = reply["Attributes"]
        return found

    async def set_attributes(self, attributes: Mapping[str, str]) -> None:
        """Change attributes of the queue itself."""
        client = await self.clients.calls()
        with translated(self.clients.settings.address):
            await client.set_queue_attributes(QueueUrl=self.url, Attributes=cast("Any", attributes))

    async def tags(self) -> Mapping[str, str]:
        """Return its tags."""
        client = await self.clients.calls()
        with translated(self.clients.settings.address):
            return (await client.list_queue_tags(QueueUrl=self.url)).get("Tags", {})

    async def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        client = await self.clients.calls()
        with translated(self.clients.settings.address):
            await client.tag_queue(QueueUrl=self.url, Tags=tags)

    async def remove(self) -> None:
        """Delete the queue; a no-op when there is none."""
        client = await self.clients.calls()
        with suppress(QueueMissingError), translated(self.clients.settings.address):
            await client.delete_queue(QueueUrl=self.url)


async def find(clients: Clients, name: str) -> Queue:
    """Return the queue of that name.

    Raises:
        QueueMissingError: There is none.
    """
    client = await clients.calls()
    with translated(clients.settings.address):
        return Queue(name, (await client.get_queue_url(QueueName=name))["QueueUrl"], clients)


async def create(
    clients: Clients, name: str, attributes: Mapping[str, str], tags: Mapping[str, str] | None = None
) -> Queue:
    """Make a queue, or return the one of that name and those attributes.

    Raises:
        QueueExistsError: There is one with other attributes.
    """
    client = await clients.calls()
    more: dict[str, Any] = {"tags": tags} if tags else {}
    with translated(clients.settings.address):
        reply = await client.create_queue(QueueName=name, Attributes=cast("Any", attributes), **more)
        return Queue(name, reply["QueueUrl"], clients)


async def list_all(clients: Clients, prefix: str) -> Sequence[Queue]:
    """Return all queues whose names begin so."""
    client = await clients.calls()
    urls: list[str] = []
    with translated(clients.settings.address):
        page: Mapping[str, Any] = {"NextToken": None}
        while "NextToken" in page:
            more = {"NextToken": page["NextToken"]} if page["NextToken"] else {}
            page = await client.list_queues(QueueNamePrefix=prefix, MaxResults=_PAGE, **more)
            urls += page.get("QueueUrls", ())
    return [Queue(url.rpartition("/")[2], url, clients) for url in urls]


def requests(entries: Sequence[Entry]) -> list[Any]:
    """Return messages as a request that stores them holds them."""
    found: list[Any] = []
    for position, entry in enumerate(entries):
        request: dict[str, Any] = {"Id": str(position), "MessageBody": entry.body}
        if entry.attributes:
            request["MessageAttributes"] = entry.attributes
        if entry.delay:
            request["DelaySeconds"] = entry.delay
        if entry.group:
            request["MessageGroupId"] = entry.group
            request["MessageDeduplicationId"] = entry.dedup
        found.append(request)
    return found


async def stored(call: Awaitable[Mapping[str, Any]], count: int, address: str) -> Outcomes:
    """Wait for a request that stores messages, of SQS or SNS, and return what became of each.

    Raises:
        AbeError: By the tables of errors: of the request as a whole.
    """
    try:
        reply = await call
    except CLIENT_ERRORS as exc:
        raise translate_send(exc, address) from exc
    return _outcomes(reply, count, address, PublishUnknownError)


def _outcomes(reply: Mapping[str, Any], count: int, address: str, unsaid: type[AbeError]) -> Outcomes:
    """Read what became of each entry of a batch: only of one that the answer names is anything known."""
    done = {each.get("Id") for each in reply.get("Successful") or ()}
    failed = {each.get("Id"): each for each in reply.get("Failed") or ()}
    outcomes: list[AbeError | None] = []
    for id in map(str, range(count)):
        if id in failed:
            outcomes.append(translate_entry(failed[id], address))
        elif id in done:
            outcomes.append(None)
        else:
            outcomes.append(unsaid(f"SQS at {address}: the answer does not say whether it was done"))
    return outcomes

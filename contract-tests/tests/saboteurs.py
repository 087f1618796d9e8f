"""Memory backends that are each broken in one way, and the clause that must catch each.

The module is a pytest plugin too (``-p saboteurs``): it leaves of each saboteur's run only the tests of its clause.
"""

import asyncio
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from abe.backends.message_queue.base import (
    Capabilities,
    Delivery,
    Disposition,
    Envelope,
    GroupStats,
    Message,
    Outcomes,
    Settlement,
    Transport,
)
from abe.backends.message_queue.engine import GroupSubscription
from abe.backends.message_queue.service._harness import MemoryHarness
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import JSONCodec
from abe.errors import AbeError, BackendClosedError, BackpressureError, GroupMissingError, PublishRejectedError


@dataclass(frozen=True)
class Saboteur:
    """What is broken, and where it must be seen."""

    name: str
    clause: str
    backend: type[MemoryBackend]


SABOTEURS: dict[str, Saboteur] = {}


def breaks(clause: str) -> Any:
    """Enter a backend into the zoo. A harness of the same name becomes an attribute of this module."""

    def enter(backend: type[MemoryBackend]) -> type[MemoryBackend]:
        name = backend.__name__
        SABOTEURS[name] = Saboteur(name, clause, backend)
        harness = type(f"{name}Harness", (MemoryHarness,), {"name": name, "backend": backend, "__module__": __name__})
        globals()[harness.__name__] = harness
        return backend

    return enter


class Wrapped:
    """Something, but for the methods that a subclass replaces."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class WithReceiver(MemoryBackend):
    """A backend whose receivers are wrapped."""

    receiver: type[Wrapped]

    def make_transport(self) -> Transport:
        wrapper = self.receiver

        class Subscribing(Wrapped):
            async def subscribe(self, group: str, prefetch: int) -> Any:
                return wrapper(await self.inner.subscribe(group, prefetch))

        return Subscribing(super().make_transport())  # type: ignore[return-value]


class WithTransport(MemoryBackend):
    """A backend whose transport is wrapped."""

    transport: type[Wrapped]

    def make_transport(self) -> Transport:
        return self.transport(super().make_transport())  # type: ignore[return-value]


class WithSubscription(MemoryBackend):
    """A backend with subscriptions of its own kind."""

    subscription: type[GroupSubscription]

    def consume(self, **options: Any) -> GroupSubscription:
        return self.subscription(super().consume(**options)._start)


class Unguarded(JSONCodec):
    """JSON as msgspec alone writes it."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        return msgspec.json.encode(payload)


@breaks("C-PUB-01")
class FireAndForget(MemoryBackend):
    """Publish returns before the broker has anything."""

    async def publish(self, *args: Any, **options: Any) -> None:
        self._later = asyncio.create_task(super().publish(*args, **options))


@breaks("C-PUB-02")
class RejectsWhatItStored(WithTransport):
    """What may be there is reported as certainly absent."""

    class transport(Wrapped):  # noqa: N801
        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            outcomes = await self.inner.send(envelopes)
            for envelope, outcome in zip(envelopes, outcomes, strict=True):
                if isinstance(outcome, BackpressureError):
                    limit, self.inner._max_backlog = self.inner._max_backlog, None
                    await self.inner.send([envelope])
                    self.inner._max_backlog = limit
            return [
                PublishRejectedError("timed out") if isinstance(outcome, BackpressureError) else outcome
                for outcome in outcomes
            ]


@breaks("C-PUB-06")
class SharesThePayload(MemoryBackend):
    """What is delivered is the publisher's own object."""

    class Sharing(JSONCodec):
        payloads: dict[bytes, dict[str, Any]] = {}  # noqa: RUF012

        def encode(self, payload: dict[str, Any]) -> bytes:
            body = super().encode(payload)
            self.payloads[body] = payload
            return body

        def decode(self, body: bytes) -> dict[str, Any]:
            return self.payloads[body]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, codec=self.Sharing(), **options)


@breaks("C-PUB-09")
class Trims(WithTransport):
    """Only the newest thousand messages of a group are kept, as by MAXLEN."""

    class transport(Wrapped):  # noqa: N801
        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            outcomes = await self.inner.send(envelopes)
            for queue in self.inner._namespace.queues.values():
                while len(queue.ready) > 1_000:
                    queue.ready.popleft()
            return outcomes


@breaks("C-DLV-03")
class DoublesOneInAHundred(WithTransport):
    """Every hundredth message is stored twice."""

    class transport(Wrapped):  # noqa: N801
        count = 0

        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            outcomes = await self.inner.send(envelopes)
            for envelope in envelopes:
                self.count += 1
                if self.count % 100 == 0:
                    await self.inner.send([envelope])
            return outcomes


@breaks("C-DLV-04")
class MixesUpKeys(MemoryBackend):
    """``a:b`` becomes ``a.b`` on its way."""

    async def publish(self, key: str, payload: dict[str, Any], **options: Any) -> None:
        await super().publish(key.replace(":", "."), payload, **options)


@breaks("C-ACK-01")
class AcksBeforeYielding(WithReceiver):
    """A message is removed when it is fetched."""

    class receiver(Wrapped):  # noqa: N801
        async def receive(self, limit: int) -> Sequence[Delivery]:
            deliveries = await self.inner.receive(limit)
            await self.inner.ack(deliveries, verify=False)
            return deliveries

        async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
            return ()

        async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
            return ()


@breaks("C-ACK-02")
class AcksOnBreak(WithSubscription):
    """Leaving the loop acknowledges the message that it was left with."""

    class subscription(GroupSubscription):  # noqa: N801
        async def aclose(self) -> None:
            current, self._current = self._current, None
            if current is not None and current._settled is None:
                await current.ack()
            await super().aclose()

        async def __aexit__(self, *args: Any) -> None:
            if isinstance(args[1], Exception):
                return await super().__aexit__(*args)
            return await self.aclose()


@breaks("C-RED-03")
class AcksWhatSomebodyElseHolds(WithReceiver):
    """An acknowledgement goes by the message, not by the delivery: a late one removes the new owner's copy."""

    class receiver(Wrapped):  # noqa: N801
        async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
            await self.inner.ack(deliveries, verify=verify)
            wanted = {delivery.header.id for delivery in deliveries}
            with self.inner._namespace.lock:
                held = self.inner._namespace.queues[self.inner._group].held
                for number in [number for number, entry in held.items() if entry.envelope.id in wanted]:
                    del held[number]
            return ()

        async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
            await self.inner.renew(deliveries)
            return ()


@breaks("C-RED-03")
class NeverRenews(WithReceiver):
    """A lease runs out although its consumer lives."""

    class receiver(Wrapped):  # noqa: N801
        async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
            return ()


@breaks("C-RED-04")
class ForgetsAttempts(WithReceiver):
    """Every delivery is a message's first."""

    class receiver(Wrapped):  # noqa: N801
        async def receive(self, limit: int) -> Sequence[Delivery]:
            deliveries = await self.inner.receive(limit)
            for delivery in deliveries:
                delivery.attempt = 1
            return deliveries


@breaks("C-RED-05")
class KeepsWhatItBuffered(WithReceiver):
    """Closing gives nothing back: others wait for the lease to run out."""

    class receiver(Wrapped):  # noqa: N801
        async def settle(self, settlements: Sequence[Settlement]) -> Any:
            others = [item for item in settlements if item.disposition is not Disposition.RELEASE]
            outcomes = iter(await self.inner.settle(others))
            kept = Disposition.RELEASE
            return [None if item.disposition is kept else next(outcomes, None) for item in settlements]

        async def close(self) -> None:
            pass


@breaks("C-ORD-01")
class SwapsNeighbours(WithReceiver):
    """The first two messages of a batch change places."""

    class receiver(Wrapped):  # noqa: N801
        async def receive(self, limit: int) -> Sequence[Delivery]:
            deliveries = list(await self.inner.receive(limit))
            return deliveries[1::-1] + deliveries[2:]


@breaks("C-GRP-01")
class IgnoresTheGroup(MemoryBackend):
    """Everybody is in one group."""

    def _group(self, group: str | None) -> str:
        return "everybody"


@breaks("C-GRP-03")
class SubscribesLate(WithSubscription):
    """Entering returns at once, and the group comes into being a moment later."""

    class subscription(GroupSubscription):  # noqa: N801
        async def __aenter__(self) -> Any:
            self._soon = asyncio.get_running_loop().call_later(0.05, self._enter)
            return self

        def _enter(self) -> None:
            if not self._closed:
                self._entering = asyncio.ensure_future(self._started())

        async def receive(self) -> Message:
            while self._inbox is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return await super().receive()


@breaks("C-GRP-05")
class PrefetchesEverything(MemoryBackend):
    """A member's limit is not heeded."""

    def consume(self, **options: Any) -> GroupSubscription:
        return super().consume(**(options | {"prefetch": 100_000}))


@breaks("C-CAN-01")
class DropsAtCancellation(WithSubscription):
    """The message that was on its way when its taker was cancelled is gone."""

    class subscription(GroupSubscription):  # noqa: N801
        async def receive(self) -> Message:
            return await self._through_a_gap(await super().receive())

        async def __anext__(self) -> Message:
            return await self._through_a_gap(await super().__anext__())

        async def _through_a_gap(self, message: Message) -> Message:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._current = None
                self.ack_soon(message)
                raise
            return message


@breaks("C-CAN-03")
class SwallowsCancellation(WithSubscription):
    """A cancelled taker is told that there is nothing more."""

    class subscription(GroupSubscription):  # noqa: N801
        async def receive(self) -> Message:
            try:
                return await super().receive()
            except asyncio.CancelledError:
                raise BackendClosedError("cancelled") from None

        async def __anext__(self) -> Message:
            try:
                return await super().__anext__()
            except asyncio.CancelledError:
                raise StopAsyncIteration from None


@breaks("C-CAN-04")
class BareGenerator(WithSubscription):
    """Iteration is an async generator, which one time-out ends for good."""

    class subscription(GroupSubscription):  # noqa: N801
        generator: Any = None

        async def __anext__(self) -> Message:
            if self.generator is None:
                self.generator = self._generate()
            return await anext(self.generator)

        async def _generate(self) -> Any:
            while True:
                yield await super().__anext__()


@breaks("C-CLS-04")
class LeaksATask(MemoryBackend):
    """Each subscription leaves a task behind."""

    leaked: list[Any] = []  # noqa: RUF012

    def consume(self, **options: Any) -> GroupSubscription:
        self.leaked.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))
        return super().consume(**options)


@breaks("C-PSN-01")
class SkipsTheUndecodable(WithReceiver):
    """What cannot be decoded is thrown away."""

    class receiver(Wrapped):  # noqa: N801
        async def settle(self, settlements: Sequence[Settlement]) -> Any:
            skipped = [item.delivery for item in settlements if item.reason == "undecodable"]
            await self.inner.ack(skipped, verify=False)
            others = [item for item in settlements if item.delivery not in skipped]
            outcomes = iter(await self.inner.settle(others))
            return [None if item.delivery in skipped else next(outcomes, None) for item in settlements]


@breaks("C-PSN-02")
class RetriesForEver(MemoryBackend):
    """Nothing ever becomes a dead letter."""

    def consume(self, **options: Any) -> GroupSubscription:
        return super().consume(**(options | {"max_attempts": 1_000_000}))


@breaks("C-PSN-04")
class BuriesTheInnocent(WithReceiver):
    """What was beside a message that killed its process is never tried alone."""

    class receiver(Wrapped):  # noqa: N801
        async def receive(self, limit: int) -> Sequence[Delivery]:
            deliveries: Sequence[Delivery] = await self.inner.receive(limit)
            for delivery in deliveries:
                delivery.attempt += delivery.attempt > 2
            return deliveries


@breaks("C-PUB-11")
class PublishesToAll(WithTransport):
    """The group that is to have the message is ignored."""

    class transport(Wrapped):  # noqa: N801
        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            return await self.inner.send([msgspec.structs.replace(envelope, group=None) for envelope in envelopes])


@breaks("C-PUB-12")
class HasOneTimeForAll(MemoryBackend):
    """The time that a publish was given is ignored."""

    async def publish(self, *args: Any, timeout: float | None = None, **options: Any) -> None:
        await super().publish(*args, **options)


@breaks("C-GRP-08")
class ObeysTheLastConsumer(WithTransport):
    """Whoever consumes with patterns sets them for all."""

    class transport(Wrapped):  # noqa: N801
        async def declare(self, group: str, patterns: Any, *, change: bool) -> tuple[str, ...]:
            return await self.inner.declare(group, patterns, change=True)  # type: ignore[no-any-return]


@breaks("C-GRP-09")
class CountsWhatIsNotThere(WithTransport):
    """A group that does not exist is an empty one."""

    class transport(Wrapped):  # noqa: N801
        async def stats(self, group: str) -> GroupStats:
            try:
                return await self.inner.stats(group)  # type: ignore[no-any-return]
            except GroupMissingError:
                return GroupStats(waiting=0, in_flight=0, delayed=0, dead=0, oldest=None)


@breaks("C-DLY-01")
class ForgetsTheDelay(WithTransport):
    """A delayed message is delivered at once."""

    class transport(Wrapped):  # noqa: N801
        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            return await self.inner.send([msgspec.structs.replace(envelope, delay=0.0) for envelope in envelopes])


@breaks("C-DLY-01")
class DelaysUndeclared(MemoryBackend):
    """Delays are not declared, and work."""

    capabilities: Capabilities = replace(MemoryBackend.capabilities, max_delay=None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        envelope = self._outgoing.envelope
        self._outgoing.envelope = lambda _, *rest: envelope(MemoryBackend.capabilities, *rest)  # type: ignore[method-assign]


@breaks("C-ENC-02")
class CoercesPayloads(MemoryBackend):
    """Tuples become lists, and NaN becomes null."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, codec=Unguarded(), **options)


@breaks("C-HDR-01")
class LosesHeaders(WithTransport):
    """Headers stay behind."""

    class transport(Wrapped):  # noqa: N801
        async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
            return await self.inner.send([msgspec.structs.replace(envelope, headers=None) for envelope in envelopes])


class UnbrokenHarness(MemoryHarness):
    """The control: every test that catches a saboteur passes here."""

    name = "Unbroken"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave of each saboteur's run the tests of its clause, and of the control's run the tests of all of these clauses."""
    caught = {saboteur.clause for saboteur in SABOTEURS.values()}
    items[:] = [item for item in items if _clauses(item) & _wanted(item, caught)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One test is enough to catch a saboteur, and short bounds are: most are caught by something that does not come."""
    os.environ["ABE_CONTRACT_TIME_FACTOR"] = "0.3" if _harness(item) in SABOTEURS else "1"
    if _harness(item) in _caught and _harness(item) in SABOTEURS:
        pytest.skip("caught")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _caught.add(report.nodeid.rpartition("[")[2].partition("-")[0].rstrip("]"))


_caught: set[str] = set()


def _clauses(item: pytest.Item) -> set[str]:
    return {id for mark in item.iter_markers("contract_clause") for id in mark.args}


def _wanted(item: pytest.Item, everything: set[str]) -> set[str]:
    name = _harness(item)
    return {SABOTEURS[name].clause} if name in SABOTEURS else everything


def _harness(item: pytest.Item) -> str:
    name: str = item.callspec.params["contract_harness"]  # type: ignore[attr-defined]
    return name.rpartition(":")[2].removesuffix("Harness")

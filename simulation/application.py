"""One host of the simulated application: its backend, and what it does with it."""

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Protocol, TypeVar

from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import HandleNext, Middleware, Publication, PublishNext
from abe.backends.message_queue.base.routing import matches_any
from abe.errors import AbeError, AlreadySettledError, LeaseLostError
from abe.testing.simulation.world import Host
from simulation.broker import Broker
from simulation.faults import Faults, ProviderFaultError
from simulation.history import Delivery, History
from simulation.history import Message as Recorded
from simulation.scenario import HostPlan, Scenario
from simulation.transport import SimulatedBackend

_T = TypeVar("_T")
_CARRIED_OUT = {
    "ack": {"acked"},
    "nack": {"retried", "buried"},
    "reject": {"buried"},
    "release": {"released"},
}
_LATE = 0.1
"""Seconds by which a bound may be exceeded: what a request that is cancelled needs, and no more."""


class Leaver(Protocol):
    """A consumer that notes what it leaves."""

    def leave(self) -> None:
        """Take note that what is in hand may be given back."""
        ...


class Interrupted(Exception):  # noqa: N818 - it was asked for
    """The call was cancelled, as the load wanted it."""


class Yielding(Middleware):
    """Lets others run before and after a call."""

    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        """Publish, some turns later."""
        await asyncio.sleep(0)
        await forward(publication)
        await asyncio.sleep(0)

    async def handle(self, message: Message, forward: HandleNext) -> None:
        """Handle, some turns later."""
        await asyncio.sleep(0)
        await forward(message)
        await asyncio.sleep(0)


class Application:
    """One host.

    Args:
        broker: The broker.
        host: The host.
        plan: What it does.
        scenario: The world.
    """

    def __init__(self, broker: Broker, host: Host, plan: HostPlan, scenario: Scenario) -> None:
        seed = f"{broker.history.seed}/{host.name}"
        self.host = host
        self.plan = plan
        self.scenario = scenario
        self.broker = broker
        self.history: History = broker.history
        self.random = Random(f"{seed}/load")
        self.faults = Faults(scenario.plan, f"{seed}/faults")
        self.layers = (Yielding(),) if scenario.layered else ()
        """The middleware of publishes and handlers."""
        self.backend = SimulatedBackend(
            scenario.settings,
            broker=broker,
            host=host,
            faults=self.faults,
            batching=plan.batching,
            receiving=plan.receiving,
            settling=plan.settling,
            leased=scenario.leased,
            middleware=self.layers,
        )
        self.calm = False
        """Whether nothing is to go wrong on purpose any more."""
        self.closings = 0
        """How often the backend was closed, to be connected again."""
        self.consumers: list[Leaver] = []
        """Those that hold messages."""
        self.published = False
        """Whether its publishers are done."""
        self.ending = asyncio.Event()
        """Set when the host is to close down."""

    def note(self, kind: str, what: object = "") -> None:
        """Add a line to the trace."""
        self.history.note(self.host.name, kind, what)

    def chance(self, probability: float) -> bool:
        """Draw whether something goes wrong on purpose."""
        return not self.calm and self.random.random() < probability

    def new_message(self, key: str, group: str | None) -> Recorded:
        """Return a message that was never published."""
        number = len(self.history.messages) + 1
        message = self.history.messages[number] = Recorded(number, key, group)
        return message

    def wanting(self, message: Recorded) -> set[str]:
        """Return the groups that want a message now."""
        queues = self.broker.namespace.queues
        if message.group is not None:
            return {message.group} & queues.keys()
        return {group for group, queue in queues.items() if matches_any(queue.patterns, message.key)}

    def taken(self, message: Message) -> Delivery:
        """Take note of a message that the application got."""
        number = message._delivery.native  # pyright: ignore[reportPrivateUsage]
        delivery = self.history.deliveries[number]
        facts = f"m{delivery.message.number} {delivery.group} #{number} attempt={message.attempt}"
        self.note("get", facts)
        if delivery.begun is not None:
            self.history.violated(f"delivery {number} is handed out twice")
        if delivery.told_lost and not self.scenario.cancels:  # a call in a task of its own may have had it before
            self.history.violated(f"delivery {number} is handed out after its consumer was told that it is lost")
        if delivery.ended and not self._explained(delivery):
            self.history.violated(f"delivery {number} is handed out after it {delivery.ended}")
        if (message["n"], message.key) != (delivery.message.number, delivery.message.key):
            self.history.violated(f"delivery {number} is another message: {message!r}")
        if message.attempt - delivery.original.uncertain > self.scenario.settings.max_attempts + 1:
            self.history.violated(
                f"delivery {number} is attempt {message.attempt} of {self.scenario.settings.max_attempts}"
            )
        delivery.begun = self.history.now
        return delivery

    async def settle(self, delivery: Delivery, how: str, settlement: Coroutine[Any, Any, None]) -> None:
        """Settle, and take note of what is told."""
        delivery.done.append(how)
        try:
            await self.interrupted(settlement)
        except Interrupted:
            told = "interrupted"
            delivery.done.append(told)
        except (LeaseLostError, AlreadySettledError) as exc:
            told = type(exc).__name__
        except AbeError as exc:
            told = type(exc).__name__
            if not exc.retryable and not self.faults.plan.rates:
                self.history.violated(f"{how} of delivery {delivery.number} raised {exc!r}")
        else:
            told = "ok"
            if delivery.ended not in _CARRIED_OUT[how]:
                self.history.violated(
                    f"{how} of delivery {delivery.number} was told done, and it is {delivery.ended or 'in flight'}"
                )
        delivery.told.append((how, told))
        self.note(how, f"m{delivery.message.number} {delivery.group} #{delivery.number} {told}")

    async def interrupted(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Make a call; sometimes cancel it after some turns of the event loop, or some time.

        Raises:
            Interrupted: It was cancelled, and ended by that.
        """
        if not self.chance(self.scenario.cancels):
            return await call
        task = asyncio.get_running_loop().create_task(call)
        try:
            chance = self.random.random()
            if chance < 0.2:
                self.host.on_arrival.append(task)
                await asyncio.wait([task], timeout=1)
            elif chance < 0.5:
                await asyncio.wait([task], timeout=self.random.random())
            else:
                for _ in range(int(self.random.random() * 12)):
                    await asyncio.sleep(0)
            if not task.done():
                self.note("cancel")
            task.cancel()
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()
            raise
        if task.cancelled():
            raise Interrupted
        return task.result()

    async def bounded(self, what: str, call: Coroutine[Any, Any, _T], seconds: float) -> _T:
        """Make a call that must end within so many seconds of the host's time, unless the host stands still meanwhile."""
        began, frozen = self.host.time(), self.host.frozen_until
        try:
            return await call
        finally:
            took = self.host.time() - began
            if took > seconds + _LATE and self.host.frozen_until == frozen:
                self.history.violated(f"{self.host.name}: {what} took {took:.3f} s, and its bound is {seconds:g} s")

    async def sleep(self, seconds: float) -> bool:
        """Wait for so many seconds, or until the host closes down; return whether it does."""
        try:
            async with asyncio.timeout(seconds):
                return await self.ending.wait()
        except TimeoutError:
            return False

    async def reopen(self) -> None:
        """Close the backend now and then, and connect it again, until nothing is to go wrong any more."""
        bound = self.scenario.settings.close_timeout
        while not await self.sleep(self.random.random() * 8) and not self.calm:
            self.note("disconnect")
            self.closings += 1
            for consumer in self.consumers:
                consumer.leave()
            try:
                await self.bounded("disconnect", self.interrupted(self.backend.disconnect()), bound)
            except (Interrupted, ProviderFaultError) as exc:
                self.note("fails", repr(exc))
            await self.sleep(self.random.random())
            while not self.ending.is_set():
                try:
                    await self.backend.connect()
                except (AbeError, ProviderFaultError) as exc:
                    self.note("fails", repr(exc))
                    await self.sleep(0.1)
                else:
                    break
            self.note("connected")

    def _explained(self, delivery: Delivery) -> bool:
        """Whether it is recorded why a delivery that has ended is handed out all the same."""
        lease = self.scenario.settings.lease
        if delivery.ended == "deleted" and (not self.scenario.leased or self.history.now - delivery.ended_at < lease):
            return True  # with no room for more, the next renewal tells that the group is gone
        since = delivery.ended_at - 3 * lease
        return self.history.troubled(self.host.name, since, self.history.now)

    async def until(self, ended: Callable[[], bool]) -> None:
        """Wait until something holds, looking once in a while."""
        while not ended():
            await asyncio.sleep(0.05)

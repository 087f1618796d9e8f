"""What a host consumes: by `AsyncLoopConsumer`, by iteration, and with settlements of its own."""

import asyncio
import traceback

from abe import AsyncLoopConsumer, ConstantBackoff, Message, Reject, Retry, RetryPolicy
from abe.backends.message_queue.engine.subscription import GroupSubscription
from abe.errors import AbeError, BackendClosedError, BackendConnectionError, PermissionDeniedError
from abe.testing.simulation.threads import sleep
from simulation.application import Application, Interrupted
from simulation.faults import ProviderFaultError
from simulation.history import Delivery
from simulation.scenario import ConsumerPlan

_STUBBORN = 5.0
"""Seconds for which a consumer waits for handlers that were cancelled."""


class HandlerError(Exception):
    """A handler fails."""


class Consumer:
    """One consumer of a host, begun anew whenever it ends, until the host closes down.

    Args:
        application: The host.
        plan: What it does.
    """

    def __init__(self, application: Application, plan: ConsumerPlan) -> None:
        self.application = application
        self.plan = plan
        self.random = application.random
        application.consumers.append(self)
        self.mine: list[Delivery] = []
        """What it got and has not settled."""
        self._leaving = False
        self._busy: set[str] = set()  # the keys that are being handled, where they are ordered
        # One that looks ahead for other keys, or receives in several tasks, may overtake; so do the answers to several receives at once.
        free = (
            application.scenario.layered
            or plan.threads
            or plan.kind == "explicit"
            or plan.ordered
            or application.plan.receiving.max_concurrent > 1
        )
        self._in_order = not free
        self._last: dict[int, int] = {}  # the last delivery that was handed out, by the receiver

    async def run(self) -> None:
        """Consume until the host closes down."""
        application = self.application
        kinds = {"loop": self._loop, "iterate": self._iterate, "explicit": self._explicit}
        while not application.ending.is_set():
            application.note("consume", f"{self.plan.kind} {self.plan.group}")
            self._leaving = False
            try:
                await kinds[self.plan.kind]()
            except (BackendConnectionError, PermissionDeniedError, ProviderFaultError) as exc:
                application.note("fails", exc)
                await application.sleep(0.2)
            except BackendClosedError:
                if not (application.ending.is_set() or application.closings):
                    raise
                await application.sleep(0.2)
            except (Interrupted, HandlerError) as exc:
                application.note("ended", type(exc).__name__)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it must not happen
                application.history.violated(f"{self.plan.kind} raised {exc!r} at {_place(exc)}")
                await application.sleep(1.0)

    async def _loop(self) -> None:
        """Run an `AsyncLoopConsumer`."""
        plan, application = self.plan, self.application
        consumer = AsyncLoopConsumer(
            application.backend,
            plan.group,
            concurrency=plan.concurrency,
            retry=RetryPolicy(backoff=ConstantBackoff(self.random.choice((0.0, 0.1, 1.0)))),
            timeout=plan.timeout,
            grace=plan.grace,
            ordered_by_key=plan.ordered,
            prefetch=plan.prefetch,
            middleware=application.layers,
        )
        handler = self._handle_in_thread if plan.threads else self._handle
        running = asyncio.get_running_loop().create_task(consumer.run(handler))
        ending = asyncio.get_running_loop().create_task(self._until_ended())
        try:
            await asyncio.wait([running, ending], return_when=asyncio.FIRST_COMPLETED)
            application.note("end", f"loop {plan.group}")
            self.leave()
            bound = plan.grace + _STUBBORN + self._closing
            if self.random.random() < 0.5:
                running.cancel()
                await application.bounded("a cancelled run", _end_of(running), bound)
            else:
                await application.bounded("shutdown", consumer.shutdown(), bound)
                await application.bounded("run after shutdown", _end_of(running), 0.0)
        finally:
            self.leave()
            for task in (running, ending):
                task.cancel()
            await asyncio.gather(running, ending, return_exceptions=True)
        if not running.cancelled() and (error := running.exception()) is not None:
            if not isinstance(error, AbeError | ProviderFaultError):
                application.history.violated(f"run of {plan.group} raised {error!r}")
            raise error

    async def _handle(self, message: Message) -> None:
        """Handle a message of an `AsyncLoopConsumer`."""
        application, plan = self.application, self.plan
        delivery = self._got(message)
        if plan.ordered and message.key in self._busy:
            application.history.violated(f"two messages with the key {message.key} are handled at once")
        self._busy.add(message.key)
        try:
            await self._work()
            if application.chance(plan.failing):
                delivery.done.append("failed")
                await self._fail(message, delivery)
            elif application.chance(0.1):
                await application.settle(delivery, "ack", message.ack())
            delivery.done.append("returned")
        except asyncio.CancelledError:
            delivery.done.append("cancelled")
            raise
        finally:
            self._busy.discard(message.key)
            self._done(delivery)

    def _handle_in_thread(self, message: Message) -> None:
        """Handle a message of an `AsyncLoopConsumer` in a thread. It may go on when its time is over."""
        application, plan = self.application, self.plan
        delivery = self._got(message)
        if plan.timeout is not None:
            delivery.done.append("timed")
        try:
            if plan.work and not application.calm:
                sleep(self.random.random() * plan.work)
            if application.chance(plan.failing):
                delivery.done.append("failed")
                raise StopIteration if self._draw_failure(delivery) < 0.4 else HandlerError
            delivery.done.append("returned")
        finally:
            self._done(delivery)

    def _draw_failure(self, delivery: Delivery) -> float:
        """Reject the message, or retry it, or return what was drawn."""
        chance = self.random.random()
        if chance < 0.2:
            delivery.done.append("reject")
            raise Reject("simulated")
        if chance < 0.3:
            raise Retry(after=self.random.random(), reason="simulated")
        return chance

    async def _fail(self, message: Message, delivery: Delivery) -> None:
        chance = self._draw_failure(delivery)
        if chance < 0.4:
            await self.application.settle(delivery, "nack", message.nack(0.0, reason="simulated"))
        elif chance < 0.5:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        elif chance < 0.6 and self.application.scenario.plan.events:
            self._block()
        raise HandlerError

    async def _iterate(self) -> None:
        """Iterate over a subscription."""
        application, plan = self.application, self.plan
        subscription = application.backend.consume(group=plan.group, prefetch=plan.prefetch)
        began = application.host.time()
        delivery: Delivery | None = None
        message: Message | None = None
        await subscription.__aenter__()
        error: BaseException | None = None
        try:
            while not application.ending.is_set() and not self._tired(began):
                if delivery is not None:
                    delivery.done.append("returned")
                    self._done(delivery)
                    delivery = None
                try:
                    async with asyncio.timeout(0.5):
                        message = await application.interrupted(anext(subscription))
                except (TimeoutError, Interrupted):
                    continue
                except StopAsyncIteration:
                    break
                delivery = self._got(message)
                await self._work()
                if application.chance(plan.failing):
                    delivery.done.append("failed")
                    await self._fail(message, delivery)
        except (HandlerError, Reject, Retry) as exc:
            error = exc
        except BaseException as exc:
            error = exc
            raise
        finally:
            if delivery is not None:
                delivery.done.append("left")
            self.leave()
            application.note("end", f"iterate {plan.group} {type(error).__name__ if error else ''}")
            kind = None if error is None else type(error)
            if error is None and not application.ending.is_set() and self.random.random() < 0.3:
                del subscription, message  # the loop was left, and nobody closes what it went over
            else:
                await application.bounded(
                    "__aexit__", subscription.__aexit__(kind, error, None), self._closing + self._settling(error)
                )

    async def _explicit(self) -> None:
        """Receive by some tasks, and settle."""
        application, plan = self.application, self.plan
        subscription = application.backend.consume(group=plan.group, prefetch=plan.prefetch)
        began = application.host.time()
        tasks: list[asyncio.Task[None]] = []
        try:
            await subscription.__aenter__()
            loop = asyncio.get_running_loop()
            tasks = [loop.create_task(self._receive(subscription)) for _ in range(plan.concurrency)]
            while not application.ending.is_set() and not self._tired(began) and not all(t.done() for t in tasks):
                await application.sleep(0.3)
            application.note("end", f"explicit {plan.group}")
            self.leave()
            if self.random.random() < 0.3:
                await application.bounded("stop", subscription.stop(), self._forever)
        finally:
            self.leave()
            await application.bounded("aclose", subscription.aclose(), self._closing)
            for task in tasks:
                if not task.done():
                    await asyncio.wait([task], timeout=self.plan.work + 1)
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self.mine.clear()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _receive(self, subscription: GroupSubscription) -> None:
        application = self.application
        while True:
            try:
                message = subscription.take()
                if message is None:
                    message = await application.interrupted(subscription.receive())
            except Interrupted:
                continue
            except BackendClosedError:
                return
            delivery = self._got(message)
            await self._work()
            if application.chance(0.1):
                await self._extend(message)
            how = "ack"
            if application.chance(self.plan.failing):
                how = self.random.choice(("nack", "reject", "release", "drop", "nack later", "twice"))
            await self._settle(subscription, message, delivery, how)
            if how != "drop":
                self._done(delivery)
            del message  # or it would not be dropped until the next one comes

    async def _settle(self, subscription: GroupSubscription, message: Message, delivery: Delivery, how: str) -> None:
        settle = self.application.settle
        if how == "ack" and self.random.random() < 0.3:
            delivery.done.append("returned")
            subscription.ack_soon(message)
        elif how in ("ack", "twice"):
            await settle(delivery, "ack", message.ack())
            if how == "twice":
                await settle(delivery, "ack", message.ack())
                await settle(delivery, "reject", message.reject())
        elif how == "reject":
            await settle(delivery, "reject", message.reject("simulated"))
        elif how == "release":
            await settle(delivery, "release", subscription.release(message))
        elif how == "drop":
            delivery.done.append("dropped")
            self.application.note("drop", f"m{delivery.message.number} {delivery.group} #{delivery.number}")
        else:
            delay = None if how == "nack" else self.random.random() * 2
            await settle(delivery, "nack", message.nack(delay, reason="simulated"))

    async def _extend(self, message: Message) -> None:
        try:
            await message.extend(self.application.scenario.settings.lease)
        except (AbeError, ProviderFaultError) as exc:
            self.application.note("extend", type(exc).__name__)

    async def _work(self) -> None:
        if self.plan.work and not self.application.calm:
            await asyncio.sleep(self.random.random() * self.plan.work)

    def _block(self) -> None:
        """Keep the event loop busy, sometimes for longer than a lease."""
        application = self.application
        seconds = self.random.random() * 2 * application.scenario.settings.lease
        application.note("block", f"for {seconds:.3f} s")
        application.history.trouble(application.host.name, seconds)
        application.host.freeze(seconds)

    async def _until_ended(self) -> None:
        began = self.application.host.time()
        while not self.application.ending.is_set() and not self._tired(began):
            await self.application.sleep(0.25)

    def _tired(self, began: float) -> bool:
        abrupt = self.plan.abrupt
        return bool(abrupt) and not self.application.calm and self.application.host.time() - began > abrupt

    def _got(self, message: Message) -> Delivery:
        delivery = self.application.taken(message)
        if self._in_order:
            last = self._last.get(delivery.receiver, 0)
            if delivery.number < last:
                self.application.history.violated(f"delivery {delivery.number} is handed out after {last}")
            self._last[delivery.receiver] = delivery.number
        self.mine.append(delivery)
        if self._leaving:
            delivery.done.append("closing")
        return delivery

    def _done(self, delivery: Delivery) -> None:
        if delivery in self.mine:
            self.mine.remove(delivery)

    def leave(self) -> None:
        """Take note that what is in hand may be given back."""
        self._leaving = True
        for delivery in self.mine:
            delivery.done.append("closing")

    def _settling(self, error: BaseException | None) -> float:
        """Return how long the settlement of a failed message may take, in seconds."""
        return 0.0 if error is None else self._forever

    @property
    def _closing(self) -> float:
        return self.application.scenario.settings.close_timeout

    @property
    def _forever(self) -> float:
        scenario = self.application.scenario
        plan, lease = scenario.plan, scenario.settings.lease if scenario.leased else scenario.settling_timeout
        return lease + 4 * (plan.silence + plan.slow) + 4.0


async def _end_of(task: "asyncio.Task[None]") -> None:
    await asyncio.wait([task])


def _place(exc: BaseException) -> str:
    frames = traceback.extract_tb(exc.__traceback__)[-3:]
    return " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))

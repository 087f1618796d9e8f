"""Runs one world from its seed."""

import asyncio
import gc
import logging
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

from abe.backends.message_queue.service import namespaces
from abe.testing.simulation.seams import seams
from abe.testing.simulation.world import DeadlockError, LivelockError, World
from simulation.application import Application
from simulation.broker import Broker
from simulation.consumers import Consumer
from simulation.faults import ProviderFaultError
from simulation.history import History
from simulation.operators import operate
from simulation.oracle import check
from simulation.publishers import publish
from simulation.reductions import reduced
from simulation.scenario import ConsumerPlan, HostPlan, Scenario, draw_scenario
from simulation.trouble import Trouble

_LOG = logging.getLogger("abe")


def simulate(seed: object, reductions: Sequence[str] = ()) -> History:
    """Run a world, and return what happened in it. The same seed gives the same history.

    Args:
        seed: What everything in it is drawn from.
        reductions: What is left out of it; see `reduced`.

    Raises:
        ValueError: A reduction leaves out nothing.
    """
    name = f"simulation-{seed}"
    scenario = reduced(draw_scenario(seed, name), reductions)
    world = World(seed, shuffled=scenario.shuffled)
    history = History(world, seed, scenario, reductions)
    namespaces.forget(name)
    broker = Broker(world, history, scenario.settings)
    collecting = gc.isenabled()
    gc.disable()  # it would run destructors whenever it likes
    try:
        ours = seams(world, seed, queue=broker.queue_type(), settling_timeout=scenario.settling_timeout)
        with ours, _logged(history):
            run = _Run(world, broker, scenario)
            try:
                world.run(run.control, run.everything())
                check(history, scenario)
            except (DeadlockError, LivelockError) as exc:
                history.violated(f"{type(exc).__name__}: {exc}")
            history.close()
            world.close()
    finally:
        namespaces.forget(name)
        if collecting:
            gc.enable()
    return history


class _Run:
    """The phases of a world: load and faults, then calm until nothing waits any more, then the end of every host."""

    def __init__(self, world: World, broker: Broker, scenario: Scenario) -> None:
        self.world = world
        self.broker = broker
        self.history: History = broker.history
        self.scenario = scenario
        self.control = world.host("control")
        self.applications: list[Application] = []
        self.tasks: dict[Application, asyncio.Task[None]] = {}
        self._random = Random(f"{self.history.seed}/control")
        self._operating: asyncio.Task[None] | None = None
        self._lives = 0
        self._is_calm = False

    async def everything(self) -> None:
        """Be the world."""
        scenario = self.scenario
        operator = self._start(replace(scenario.hosts[0], name="ops", offset=0.0, rate=1.0, publishes=0, consumers=()))
        if not scenario.late:
            await self._elsewhere(operator, self._declare(operator))
        for plan in scenario.hosts:
            self._start(plan)
        if scenario.operators or scenario.deletes:
            self._operating = operator.host.start(operate(operator))
        await Trouble(self).run()
        await self._calm()
        await self._end()

    def restart(self, plan: HostPlan) -> None:
        """Start a host anew, after its death."""
        if not self._is_calm:
            self._start(plan)

    def _start(self, plan: HostPlan) -> Application:
        self._lives += 1
        host = self.world.host(f"{plan.name}{self._lives}", offset=plan.offset, rate=plan.rate)
        application = Application(self.broker, host, plan, self.scenario)
        self.applications.append(application)
        self.history.note(host.name, "start")
        self.tasks[application] = host.start(_work(application))
        return application

    async def _declare(self, application: Application) -> None:
        application.faults.healed = True
        for group, patterns in self.scenario.groups.items():
            await application.backend.declare(group, patterns)
        application.faults.healed = False

    async def _calm(self) -> None:
        """Let everything that is under way come to its end, without faults."""
        self.history.note("control", "calm")
        self._is_calm = True
        self.history.calm = self.world.now
        for application in self._alive():
            application.calm = application.faults.healed = True
            for connection in application.backend.connections:
                connection.down_until = 0.0
        first = self.scenario.hosts[0]
        drains = tuple(_drain(group) for group in self.scenario.groups)
        self._start(replace(first, name="drain", offset=0.0, rate=1.0, publishes=0, consumers=drains)).calm = True
        self.applications[-1].faults.healed = True
        end = self.world.now + self._patience()
        await asyncio.sleep(self.scenario.plan.slow)  # what killed hosts had sent arrives still
        quiet = 0
        while self.world.now < end:
            await asyncio.sleep(0.5)
            quiet = quiet + 1 if self._published() and not self._waiting() else 0
            if quiet == 2:
                return
        for what in self._waiting() or ["a publisher"]:
            self.history.violated(f"waits for ever: {what}")

    async def _end(self) -> None:
        """Close every host, and look what is left of it."""
        alive = self._alive()
        for application in alive:
            self.history.note(application.host.name, "close")
            application.host.loop.call_soon(application.ending.set)
        for application in alive:
            await self._ended(application)
        gc.collect()
        await asyncio.sleep(self._patience())
        gc.collect()
        await asyncio.sleep(1)
        for application in alive:
            self._look(application)

    async def _ended(self, application: Application) -> None:
        """Wait for the end of a host's application."""
        task, end = self.tasks[application], self.world.now + self._patience()
        while not task.done() and self.world.now < end:
            await asyncio.sleep(0.05)
        if not task.done():
            self.history.violated(f"{application.host.name} does not end")
        elif (error := task.exception()) is not None:
            self.history.violated(f"{application.host.name}: {error!r}")

    def _look(self, application: Application) -> None:
        """Look what is left in a host that was closed."""
        host = application.host
        for task in host.loop.tasks:
            self.history.violated(f"{host.name}: a task is left: {getattr(task.get_coro(), '__qualname__', '?')}")
        if (timer := host.loop.next_timer()) is not None:
            self.history.violated(f"{host.name}: a timer is left, for {timer:.3f} s")
        for trouble in host.troubles:
            # What a provider must not raise is reported by asyncio, where nobody waits for it.
            if ProviderFaultError.__name__ not in trouble:
                self.history.violated(f"{host.name}: {trouble}")

    async def _elsewhere(self, application: Application, work: Coroutine[Any, Any, None]) -> None:
        """Run something in a host, and wait for its end."""
        task = application.host.start(work)
        while not task.done():
            await asyncio.sleep(0.05)
        task.result()

    def _alive(self) -> list[Application]:
        return [application for application in self.applications if not application.host.dead]

    def _published(self) -> bool:
        operating = self._operating is not None and not self._operating.done()
        return not operating and all(application.published for application in self._alive())

    def _waiting(self) -> list[str]:
        """Return what the broker still has."""
        waiting = [f"{item.id} parked" for item, _ in self.broker.namespace.unclaimed]
        for name, queue in self.broker.namespace.queues.items():
            waiting += [f"{item.envelope.id} ready in {name}" for item in queue.ready]
            waiting += [f"{item.envelope.id} delayed in {name}" for _, _, item in queue.delayed]
            for number in queue.held:
                delivery = self.history.deliveries[number]
                waiting.append(f"m{delivery.message.number} in flight in {name}, #{number} at {delivery.host}")
        return waiting

    def _patience(self) -> float:
        settings, plan = self.scenario.settings, self.scenario.plan
        return 60.0 + 6 * settings.lease + 4 * settings.publish_timeout + 8 * (plan.silence + plan.slow)


async def _work(application: Application) -> None:
    """Be a host's application, until it is to end."""
    publishing = asyncio.get_running_loop().create_task(publish(application))
    publishing.add_done_callback(lambda _: setattr(application, "published", True))
    async with asyncio.TaskGroup() as tasks:
        for plan in application.plan.consumers:
            tasks.create_task(Consumer(application, plan).run())
        if application.scenario.reopens and application.plan in application.scenario.hosts:
            tasks.create_task(application.reopen())
        await application.ending.wait()
        if application.random.random() < 0.5:
            tasks.create_task(_close(application))
    await _close(application)
    await publishing


async def _close(application: Application) -> None:
    bound = application.scenario.settings.close_timeout
    try:
        await application.bounded("disconnect", application.backend.disconnect(), bound)
    except ProviderFaultError as exc:
        application.note("fails", exc)


def _drain(group: str) -> ConsumerPlan:
    return ConsumerPlan("loop", group, 20, 2, False, None, 1.0, 0.0, 0.0, 0.0)


@contextmanager
def _logged(history: History) -> Iterator[None]:
    """Put what the library logs into the trace; an error that names a bug is a violation."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            history.note("log", record.levelname.lower(), record.getMessage())

    handler = Handler()
    level, propagate = _LOG.level, _LOG.propagate
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.WARNING)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
        _LOG.propagate = propagate

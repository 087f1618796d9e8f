"""Worlds for the tests of an application: processes that are killed and stand still, and publishes whose answers are lost."""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Final, TypeAlias

from abe.backends.message_queue.base.protocol import FullBackend
from abe.backends.message_queue.base.transport import Envelope, Outcomes
from abe.backends.message_queue.service import namespaces
from abe.backends.message_queue.service.memory import MemoryBackend, MemoryTransport
from abe.errors import PublishUnknownError
from abe.settings import QueueSettings
from abe.testing.memory import fresh_namespace
from abe.testing.simulation.seams import seams
from abe.testing.simulation.world import Host, World

Main: TypeAlias = Callable[[FullBackend], Coroutine[Any, Any, object]]
"""What a process runs, on a backend of its own."""

_LOOKS: Final = 0.5
"""Seconds between two looks at what is left."""

_STEPS: Final = 100
"""How many steps a process makes at most until it is killed."""

_RESTART: Final = 3.0
"""Seconds after which a killed process is started again, at most."""

_MOST: Final = 8
"""How often processes of one world are killed or stand still, and publishes lost: too few for a message to use up its attempts by that."""

_LAST: Final = 20
"""How many of the last faults are shown when a world fails."""


def simulate(
    scenario: "Callable[[Simulation], Coroutine[Any, Any, object]]",
    *,
    seeds: Iterable[int] = range(100),
    settings: QueueSettings | None = None,
) -> None:
    """Run a scenario in one world for each seed. Nothing waits in real time, and a seed gives the same world again.

    Call it from a plain function: each process of a world has an event loop of its own. What the application does in them must wait by
    asyncio alone: there are no sockets and no executors, and `time.time` is not the world's (`Simulation.time` is).

    Args:
        scenario: Starts processes, publishes, and asserts what must hold in the end.
        seeds: Which worlds.
        settings: Those of every backend; their namespace is not used.

    Raises:
        BaseException: What the scenario or one of its processes raised, with a note that names the seed and the last faults.
        RuntimeError: Nothing can run any more; or asyncio reported something in a process, as an exception of a task that was not awaited.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError(
            "simulate() runs event loops of its own: call it from a plain function, not from a coroutine"
        )
    for seed in seeds:
        _simulate(scenario, seed, settings or QueueSettings())


def _simulate(
    scenario: "Callable[[Simulation], Coroutine[Any, Any, object]]", seed: int, settings: QueueSettings
) -> None:
    world = World(seed)
    simulation = Simulation(seed, world, replace(settings, namespace=fresh_namespace()))
    collecting = gc.isenabled()
    gc.disable()  # what the collector finds, and when, is not decided by the seed
    try:
        with seams(world, seed):
            world.run(simulation._control, simulation._run(scenario))  # pyright: ignore[reportPrivateUsage]
    except BaseException as exc:
        last = "\n".join(simulation.faults[-_LAST:])
        exc.add_note(
            f"in the world of seed {seed} (seeds=[{seed}] runs it again), {simulation.time():.3f} s old\n{last}"
        )
        raise
    finally:
        world.close()
        namespaces.forget(simulation.namespace)
        if collecting:
            gc.enable()


class Simulation:
    """One world, as `simulate` gives it to a scenario.

    A process of it is killed at any moment, between any two steps of its tasks, and started again; it stands still for up to two leases,
    so that others get its messages, and goes on; and what it publishes is published, or not, without an answer. Each world has some of
    that, a few times. The process of the scenario is spared.

    Attributes:
        seed: The world's.
        namespace: Of all backends in it.
        random: For what the scenario draws.
        backend: The scenario's own.
        faults: What has happened, a line each.
    """

    def __init__(self, seed: int, world: World, settings: QueueSettings) -> None:
        self.seed = seed
        self.random: Random = Random(f"{seed}/scenario")
        self.faults: list[str] = []
        self._world = world
        self.namespace: str = settings.namespace
        self._settings = settings
        self._control = world.host("scenario")
        self.backend: FullBackend = MemoryBackend(settings, clock=self._control.clock)
        self._drawn = Random(f"{seed}/faults")
        self._pause = self._drawn.choice((0.1, 0.5, 2.0, 8.0))
        self._kinds = self._drawn.choice((("killed",), ("frozen",), ("killed", "frozen")))
        self._rate = self._drawn.choice((0.0, 0.05, 0.2))
        self._lost = 0
        self._processes: list[_Process] = []
        self._hosts: list[tuple[_Process, Host]] = []
        self._failed: asyncio.Future[None] = self._control.loop.create_future()

    def time(self) -> float:
        """Return how old the world is, in seconds."""
        return self._world.now

    def process(self, main: Main, *, name: str = "") -> "asyncio.Future[None]":
        """Start a process. When it is killed it begins again, with a new backend; what it kept outside of `main` is still there.

        Args:
            main: What it runs. An exception that it raises ends the world.
            name: Its name, for `faults`.

        Returns:
            A future that is done once `main` has returned.
        """
        process = _Process(name or f"process {len(self._processes) + 1}", main, self._control.loop.create_future())
        self._processes.append(process)
        self._start(process)
        return process.done

    async def settled(self, within: float = 3600.0) -> None:
        """Wait until no message of any group waits, is delayed or is in flight, and every process runs. Dead letters are settled.

        Args:
            within: Seconds of the world.

        Raises:
            TimeoutError: Some still were then; the text says how many.
        """
        end, quiet = self.time() + within, 0
        while quiet < 2:
            left = self._left()
            if self.time() > end:
                raise TimeoutError(f"after {within:g} s: {', '.join(left)}")
            quiet = 0 if left else quiet + 1
            await asyncio.sleep(_LOOKS)

    async def _run(self, scenario: "Callable[[Simulation], Coroutine[Any, Any, object]]") -> None:
        trouble = asyncio.create_task(self._trouble())
        running = asyncio.create_task(scenario(self))
        ends: list[asyncio.Future[Any]] = [running, self._failed]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            trouble.cancel()
        if self._failed.done():
            self._failed.result()
        running.result()
        for process, host in self._hosts:
            if host.troubles:
                raise RuntimeError(f"in {process.name}: {'; '.join(host.troubles)}")

    async def _trouble(self) -> None:
        """Break processes, a few times."""
        for _ in range(self._drawn.randint(1, _MOST)):
            await asyncio.sleep(self._drawn.expovariate(1 / self._pause))
            able = [process for process in self._processes if process.runs(self.time())]
            if able:
                self._break(self._drawn.choice(able), self._drawn.choice(self._kinds))

    def _break(self, process: "_Process", kind: str) -> None:
        host, seconds = process.host, 2 * self._drawn.random() * self._settings.lease
        assert host is not None
        if kind == "killed":
            host.burnt = partial(self._kill, process, host)
            # While it works, or where it is.
            if self._drawn.random() < 0.7:
                host.fuse = self._drawn.randint(1, _STEPS)
            else:
                host.burnt()
        else:
            self._note(process, f"stands still for {seconds:.3f} s")
            host.freeze(seconds)

    def _kill(self, process: "_Process", host: Host) -> None:
        if process.host is host:
            self._note(process, "is killed")
            process.host = None
            self._world.kill(host)
            self._control.loop.call_later(self._drawn.random() * _RESTART, self._start, process)

    def _start(self, process: "_Process") -> None:
        host = process.host = self._world.host(process.name)
        self._hosts.append((process, host))
        backend = _UnreliableBackend(self._settings, host, lambda: self._draw(process))
        task = host.start(_live(process.main, backend))
        task.add_done_callback(lambda _: self._control.loop.call_soon(self._ended, process, host, task))

    def _ended(self, process: "_Process", host: Host, task: "asyncio.Task[None]") -> None:
        if process.host is not host:
            return  # killed in the turn in which it ended: it begins again
        process.host = None
        self._world.kill(host)
        error = RuntimeError("its main was cancelled") if task.cancelled() else task.exception()
        if error is None:
            process.done.set_result(None)
        elif not self._failed.done():
            self._note(process, f"fails with {type(error).__name__}")
            self._failed.set_exception(error)

    def _draw(self, process: "_Process") -> str:
        """Return what becomes of a publish of this process."""
        if self._lost >= _MOST or self._drawn.random() >= self._rate:
            return ""
        self._lost += 1
        kind = self._drawn.choice(("request", "answer", "every request"))
        self._note(process, f"publishes, and {kind if ' ' in kind else f'the {kind}'} is lost")
        return kind

    def _note(self, process: "_Process", what: str) -> None:
        self.faults.append(f"{self.time():10.3f}  {process.name} {what}")

    def _left(self) -> Sequence[str]:
        """Return what messages there still are."""
        namespace = namespaces.namespace(self.namespace)
        left = [f"{len(namespace.unclaimed)} messages wait for a group"] if namespace.unclaimed else []
        left += [f"{each.name} does not run" for each in self._processes if each.is_away(self.time())]
        for name, queue in namespace.queues.items():
            for what, count in (("wait", queue.backlog), ("are in flight", len(queue.held))):
                if count:
                    left.append(f"{count} messages of group {name!r} {what}")
        return left


class _Process:
    def __init__(self, name: str, main: Main, done: "asyncio.Future[None]") -> None:
        self.name = name
        self.main = main
        self.done = done
        self.host: Host | None = None
        """None: it is killed, or has ended."""

    def runs(self, now: float) -> bool:
        """Whether it is there, and does not stand still."""
        return self.host is not None and self.host.frozen_until <= now

    def is_away(self, now: float) -> bool:
        """Whether it is about to start again, or to go on."""
        return not self.done.done() and not self.runs(now)


class _UnreliableBackend(MemoryBackend):
    """The memory backend of one process."""

    def __init__(self, settings: QueueSettings, host: Host, draw: Callable[[], str]) -> None:
        super().__init__(settings, clock=host.clock)
        self._draw = draw

    def make_transport(self) -> MemoryTransport:
        return _UnreliableTransport(self.settings, self._clock, self._draw)


class _UnreliableTransport(MemoryTransport):
    def __init__(self, settings: QueueSettings, clock: Any, draw: Callable[[], str]) -> None:
        super().__init__(settings, clock)
        self._draw = draw
        self._silent: list[Envelope] = []

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        lost = self._draw()
        if lost.startswith("every"):
            self._silent += envelopes
        if lost == "request" or any(envelope in self._silent for envelope in envelopes):
            raise PublishUnknownError("simulated: the request was lost")
        outcomes = await super().send(envelopes)
        if lost == "answer":
            raise PublishUnknownError("simulated: the answer was lost")
        return outcomes


async def _live(main: Main, backend: MemoryBackend) -> None:
    """Be a process: as in `asyncio.run`, what `main` leaves running is cancelled."""
    try:
        async with backend:
            await main(backend)
    finally:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

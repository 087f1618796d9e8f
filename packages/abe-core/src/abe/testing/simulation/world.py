"""A world of hosts in one thread: virtual time, and a schedule that is drawn from a seed.

Each host is a process of its own, with an event loop, a clock and a set of tasks. The world runs one callback of one host at a time. The
callbacks of a host are run in their order, as asyncio promises, unless the world is `shuffled`; those of different hosts in any order.
"""

import asyncio
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, Final, TypeVar

from abe.backends.message_queue.base.clock import Timer
from abe.testing.simulation.loop import HostLoop

_T = TypeVar("_T")
_TICK: Final = 2e-6
"""Seconds that a callback takes: time must pass for a task that only yields, too."""

_TURN: Final = 20
"""Callbacks that a host runs at most before another one may: in half of its turns it runs one."""


class DeadlockError(RuntimeError):
    """No callback is ready and no timer is set, but what is run has not ended."""


class LivelockError(RuntimeError):
    """Callbacks run on and on, more than any scenario needs."""


class HostClock:
    """The clock of a host, for an engine."""

    def __init__(self, host: "Host") -> None:
        self._host = host

    def time(self) -> float:
        """Return the host's time in seconds."""
        return self._host.time()

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` once the time is `when`, in the host's event loop."""
        return self._host.loop.call_at(when, callback)


class Host:
    """One process, from its start to its end.

    Args:
        world: Where it is.
        name: Its name.
        offset: Seconds by which its clock is ahead of the world's at the start.
        rate: Seconds of its clock for each second of the world's.
    """

    def __init__(self, world: "World", name: str, offset: float, rate: float) -> None:
        self.name = name
        self.world = world
        self.loop: HostLoop = HostLoop(name, self.time, self._troubled)
        self.clock: HostClock = HostClock(self)
        self.dead: bool = False
        """Whether it was killed."""
        self.frozen_until: float = 0.0
        """Until when nothing of it runs, by the world's time."""
        self.on_arrival: list[asyncio.Task[Any]] = []
        """Tasks that are cancelled when messages next arrive."""
        self.fuse = 0
        """After how many callbacks `burnt` is called; 0: never."""
        self.burnt: Callable[[], object] | None = None
        self.troubles: list[str] = []
        """What asyncio reported while it was alive."""
        self.offset = offset
        self.rate = rate
        self._rest: object = None

    def time(self) -> float:
        """Return the host's time in seconds."""
        return self.offset + self.rate * self.world.now

    def start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Begin a task in this host."""
        return self.loop.create_task(work)

    def freeze(self, seconds: float) -> None:
        """Run nothing for so many of the world's seconds: the process is stopped, or a callback keeps the event loop busy."""
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def arrived(self) -> None:
        """Cancel, in the turn in which messages arrive, what is to be cancelled then."""
        tasks, self.on_arrival = self.on_arrival, []
        for task in tasks:
            self.loop.call_soon(task.cancel)

    def kill(self) -> None:
        """End it; see `World.kill`."""
        self.dead = True
        self._rest = self.loop.kill()

    def bury(self) -> None:
        """Let go of everything in it, when the world is over."""
        self.loop.bury()
        self._rest = None

    def next_moment(self) -> float | None:
        """When something can run here, by the world's time; None: never, if nothing comes from elsewhere."""
        if self.loop.width():
            return self.frozen_until
        timer = self.loop.next_timer()
        return None if timer is None else max(self.frozen_until, (timer - self.offset) / self.rate)

    def _troubled(self, text: str) -> None:
        if not self.dead:
            self.troubles.append(text)


class World:
    """Hosts, and the order in which they run.

    Args:
        seed: What the schedule is drawn from.
        shuffled: Whether the ready callbacks of a host are run in any order. asyncio promises theirs, so what fails then may be correct.
    """

    def __init__(self, seed: object, *, shuffled: bool = False) -> None:
        self.now: float = 0.0
        """Seconds since the beginning."""
        self.steps: int = 0
        """Callbacks that were run."""
        self.hosts: list[Host] = []
        self._alive: list[Host] = []
        self.running: Host | None = None
        """Whose callback is being run."""
        self._random = Random(f"{seed}/schedule")
        self._shuffled = shuffled

    def host(self, name: str, *, offset: float = 0.0, rate: float = 1.0) -> Host:
        """Start a host; see `Host`."""
        host = Host(self, name, offset, rate)
        self.hosts.append(host)
        self._alive.append(host)
        return host

    def kill(self, host: Host) -> None:
        """End a process as SIGKILL does."""
        self._alive.remove(host)
        host.kill()

    def run(self, host: Host, work: Coroutine[Any, Any, _T], *, most: int = 2_000_000) -> _T:
        """Run the world until a task of that host has ended, and return its result.

        Args:
            host: Where the task is.
            work: What it does.
            most: Callbacks at most.

        Raises:
            DeadlockError: Nothing can run any more, and the task has not ended.
            LivelockError: It has not ended after so many callbacks.
        """
        task = host.start(work)
        while not task.done():
            if self.steps > most:
                raise LivelockError(f"{most} callbacks, and no end, at {self.now:.6f} s")
            self._turn()
        return task.result()

    def close(self) -> None:
        """Let go of all hosts. What they still have to say is not heard."""
        hook, sys.unraisablehook = sys.unraisablehook, _unheard
        disabled = logging.root.manager.disable
        logging.disable()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for host in self.hosts:
                    host.bury()
                self.hosts.clear()
                gc.collect()
        finally:
            sys.unraisablehook = hook
            logging.disable(disabled)

    def _turn(self) -> None:
        """Run some callbacks of one host, or let time pass."""
        now = self.now
        able = [
            host for host in self._alive if host.frozen_until <= now and host.loop.due(host.offset + host.rate * now)
        ]
        if not able:
            self._pass_time()
            return
        random = self._random.random
        host = able[int(random() * len(able))] if len(able) > 1 else able[0]
        loop = host.loop
        loop.mature()
        self.running = host
        with loop.entered():
            for _ in range(1 if random() < 0.5 else 1 + int(random() * _TURN)):
                width = loop.width()
                if not width or host.frozen_until > self.now:
                    break
                self.now += _TICK
                self.steps += 1
                loop.step(int(random() * width) if self._shuffled and width > 1 else 0)
                if host.fuse:
                    host.fuse -= 1
                    if not host.fuse and host.burnt is not None:
                        host.burnt()
        self.running = None

    def _pass_time(self) -> None:
        moments = [moment for host in self._alive if (moment := host.next_moment()) is not None]
        if not moments:
            raise DeadlockError(f"nothing is ready and no timer is set, at {self.now:.6f} s")
        self.now = max(self.now + _TICK, min(moments))


def _unheard(_: object) -> None:
    """Drop what a dead host would say."""

"""What goes wrong with whole hosts, while the load runs."""

import asyncio
import gc
from random import Random
from typing import TYPE_CHECKING

from simulation.application import Application
from simulation.scenario import KEYS

if TYPE_CHECKING:
    from simulation.simulate import _Run


class Trouble:
    """Breaks hosts and connections until the time of faults is over.

    Args:
        run: The world.
    """

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._plan = run.scenario.plan
        self._random = Random(f"{run.history.seed}/trouble")

    async def run(self) -> None:
        """Break things; return when it is over."""
        world, random = self._run.world, self._random
        end = world.now + self._run.scenario.duration
        while world.now < end:
            await asyncio.sleep(min(end - world.now + 0.001, random.expovariate(1 / self._plan.pause)))
            alive = [each for each in self._run.applications if not each.host.dead and each.plan.name in "abc"]
            if self._plan.events and alive:
                self._break(random.choice(alive), random.choice(self._plan.events))

    def _break(self, victim: Application, event: str) -> None:
        history, host = self._run.history, victim.host
        lease = self._run.scenario.settings.lease
        seconds = self._random.random() * 2 * lease
        if event == "collect":
            history.note("control", "collect")
            host.loop.call_soon(gc.collect, 1)
            return
        if event == "strange":
            message = victim.new_message(self._random.choice(KEYS), None)
            history.note("program", "publish", f"m{message.number} {message.key}")
            self._run.broker.strange(message)
            return
        history.trouble(host.name, seconds)
        if event in ("cut", "partition"):
            for connection in victim.backend.connections:
                connection.cut(seconds if event == "partition" else 0.0)
        elif event == "freeze":
            history.note(host.name, "freeze", f"for {seconds:.3f} s")
            host.freeze(seconds)
        elif event == "kill":
            history.note(host.name, "kill")
            self._run.world.kill(host)
            for connection in victim.backend.connections:
                connection.lost()
            self._run.control.loop.call_later(self._random.random() * 3, self._run.restart, victim.plan)
        elif event == "expire":
            self._expire(victim)

    def _expire(self, victim: Application) -> None:
        """Take leases away from a host."""
        broker = self._run.broker
        if not self._run.scenario.leased:
            return
        for queue in broker.namespace.queues.values():
            for number, item in queue.held.items():
                if broker.history.deliveries[number].host == victim.host.name and self._random.random() < 0.5:
                    item.deadline = 0.0
                    queue._next_deadline = 0.0  # pyright: ignore[reportPrivateUsage]
                    broker.history.note(victim.host.name, "expire", f"#{number}")
            queue.wake(everybody=True)

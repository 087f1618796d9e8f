"""Programs that end otherwise than by closing: ``python -m abe_contract_tests.suite.lifetimes case module:Backend``.

Each runs in a process of its own, with its own event loops, and prints that everything went as it should.
"""

import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from abe.errors import AbeError, EventLoopError
from abe_contract_tests import loops
from abe_contract_tests.suite.steps import collect, collect_distinct

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

HANGS: Final = 60.0
"""Seconds after which something hangs. The test that runs this in a process of its own gives up sooner, unless the machine is busy."""


async def _use(backend: "TransportBackend", n: int) -> None:
    """Publish, and be in the middle of consuming."""
    async with asyncio.timeout(HANGS):
        await backend.declare("g")
        subscription = backend.consume(group="g")
        await subscription.__aenter__()
        await backend.publish("order.created", {"n": n})
        await collect(subscription, 1)
        waiting = asyncio.ensure_future(anext(subscription))  # left waiting, as careless programs do
        waiting.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(0)


async def _works(backend: "TransportBackend", n: int) -> None:
    """Assert that the backend is as good as new, and that nothing but `n` is there."""
    async with asyncio.timeout(HANGS):
        await backend.publish("order.created", {"n": n})
        async with backend.consume(group="g") as subscription:
            await collect_distinct(subscription, [n])
        await backend.disconnect()


def loop_closed(make: Callable[[], "TransportBackend"]) -> None:
    """The loop is closed without a close; a new backend in a new loop works."""
    backend = make()
    loops.run(_use(backend, 1))
    del backend
    gc.collect()
    loops.run(_works(make(), 2))


def second_loop(make: Callable[[], "TransportBackend"]) -> None:
    """The same backend in one ``asyncio.run`` after the other: it works, or it says why not."""
    backend = make()
    for n in range(3):
        loops.run(_use(backend, n))
    loops.run(_works(backend, 3))


def another_loop_meanwhile(make: Callable[[], "TransportBackend"]) -> None:
    """Another loop uses the backend while the first one still runs: a clear error there, no harm here."""
    backend = make()
    outcomes: list[str] = []

    async def intrude() -> None:
        async with asyncio.timeout(HANGS):
            for use in (
                lambda: backend.publish("order.created", {"n": 1}),
                lambda: anext(backend.consume(group="g")),
                lambda: backend.stats("g"),
            ):
                try:
                    await use()
                except EventLoopError as exc:
                    outcomes.append("refused" if str(exc) and not exc.retryable else repr(exc))

    async def main() -> None:
        await _use(backend, 0)
        intruder = threading.Thread(target=loops.run, args=(intrude(),))
        intruder.start()
        await asyncio.to_thread(intruder.join)
        assert outcomes == ["refused"] * 3, outcomes
        await _works(backend, 2)

    loops.run(main())


def fork(make: Callable[[], "TransportBackend"]) -> None:
    """A child that inherits a backend gets a clear error or a connection of its own; the parent's is unharmed."""
    backend = make()

    async def child() -> None:
        async with asyncio.timeout(HANGS):
            with suppress(AbeError):
                await backend.publish("order.created", {"n": 100})
            own = make()
            await own.publish("order.created", {"n": 101})
            await own.disconnect()

    async def main() -> None:
        await _use(backend, 0)
        pid = os.fork()
        if pid == 0:
            os._exit(_in_child(child))
        status = await asyncio.to_thread(_wait_for, pid)
        assert status == 0, f"the child ended with status {status}"
        async with asyncio.timeout(HANGS):
            for n in range(1, 20):
                await backend.publish("order.created", {"n": n})
        await backend.disconnect()
        await _works(make(), 20)

    loops.run(main())


def dropped(make: Callable[[], "TransportBackend"]) -> None:
    """Everything is forgotten in the middle of its use, and collected while the loop still runs."""

    async def main() -> None:
        await _use(make(), 0)
        gc.collect()
        await asyncio.sleep(0)
        await _works(make(), 1)

    loops.run(main())


def _in_child(child: Callable[[], Any]) -> int:
    # The parent's loop is, in the child's eyes, still running in this thread.
    asyncio._set_running_loop(None)
    threading.Timer(HANGS + 2, os._exit, (3,)).start()
    try:
        loops.run(child())
    except BaseException as exc:
        print(f"in the child: {exc!r}", file=sys.stderr)
        return 1
    return 0


def _wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CASES: Final = {case.__name__: case for case in (loop_closed, second_loop, another_loop_meanwhile, fork, dropped)}


def main() -> None:
    """Run the case named by the arguments."""
    case, path = sys.argv[1:]
    module, _, name = path.partition(":")
    backend: Any = import_module(module)
    for part in name.split("."):
        backend = getattr(backend, part)
    CASES[case](backend.from_env)
    gc.collect()
    print(json.dumps({"case": case, "ended": "as it should"}))


if __name__ == "__main__":
    main()

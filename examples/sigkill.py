"""Nothing is lost when a consumer is killed: real processes on a real broker, one of them ended by SIGKILL at work.

    python examples/sigkill.py [--backend redis] [--messages 20000]
    python examples/sigkill.py --backend sqs

One process publishes, three consume in each of two groups, and one of those is killed when it has handled some of its
share. What it held comes back, on RabbitMQ at once, on Redis and SQS after its lease, and is handled by the others. At
the end everything that was published has been handled in each group, some of it perhaps twice; the exit code is 1 if not.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from abe import AbeError, AsyncLoopConsumer, Message, Publication, load_backend
from abe.backends.message_queue.base import FullBackend
from demo import broker, say

GROUPS = ("billing", "shipping")
WORKERS = 3
BATCH = 500
MESSAGES = {"sqs": 2_000}
"""How many are published where it is not DEFAULT_MESSAGES: an emulator serves some 100 requests a second."""
DEFAULT_MESSAGES = 20_000
DEADLINE = 600.0
"""Seconds for all of it, which takes a few: only what hangs is ended, however busy the machine is."""
LEASE = 3.0
"""Seconds after which the messages of a dead consumer go to another, where the broker has leases."""


def connection() -> FullBackend:
    """Return a backend of this process's own, the one that QUEUE_BACKEND names."""
    return load_backend()


async def work(group: str, path: Path) -> None:
    """Be a consumer: write down each message that was handled, until SIGTERM."""
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def handle(message: Message) -> None:
        # One write a message, straight to the system: what is in the journal survives a SIGKILL of this process.
        os.write(journal, f"taken {message['number']} {message.attempt}\n".encode())
        await asyncio.sleep(0.002)  # the work
        os.write(journal, f"done {message['number']} {message.attempt}\n".encode())

    async with connection() as backend:
        consumer = AsyncLoopConsumer(backend, group, concurrency=20)
        run = asyncio.create_task(consumer.run(handle))
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        await consumer.started
        print("ready", flush=True)
        await asyncio.wait([run, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
        await consumer.shutdown()
        await run


async def publish(count: int) -> None:
    """Be the publisher: print how many messages the broker has confirmed."""
    confirmed = 0
    async with connection() as backend:
        for start in range(0, count, BATCH):
            batch = [
                Publication("order.created", {"number": n}, id=f"n{n}") for n in range(start, min(start + BATCH, count))
            ]
            while batch:
                try:
                    await backend.publish_many(batch)
                except AbeError as exc:
                    # The ids are ours, so publishing again is publishing the same message.
                    print(f"publishing again: {exc}", file=sys.stderr)
                else:
                    confirmed += len(batch)
                    batch = []
    print(confirmed)


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    """Start this file as another process."""
    return await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments, stdout=asyncio.subprocess.PIPE)


def output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    """Return what a process prints."""
    assert process.stdout is not None
    return process.stdout


async def left(backend: FullBackend, group: str) -> int:
    """Return how many messages a group still has to handle."""
    stats = await backend.stats(group)
    return stats.waiting + stats.in_flight + stats.delayed


def read(journals: Sequence[Path], what: str) -> tuple[Counter[int], Counter[int]]:
    """Return how often each message was taken, or done, and how many at which attempt."""
    numbers, attempts = Counter[int](), Counter[int]()
    for journal in journals:
        for line in journal.read_text().splitlines() if journal.exists() else ():
            verb, number, attempt = line.split()
            if verb == what:
                numbers[int(number)] += 1
                attempts[int(attempt)] += 1
    return numbers, attempts


async def kill_at_work(worker: asyncio.subprocess.Process, journal: Path, after: int) -> int:
    """Kill a consumer process that has done some messages and is in the middle of others; return of how many."""
    while True:
        worker.send_signal(signal.SIGSTOP)  # stand still, to be looked at
        taken, done = read([journal], "taken")[0], read([journal], "done")[0]
        if done.total() >= after and taken != done:
            worker.kill()
            await worker.wait()
            return (taken - done).total()
        worker.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.02)


async def experiment(count: int, directory: Path) -> bool:
    """Run it, and return whether nothing was lost."""
    async with connection() as backend:
        for group in GROUPS:
            await backend.declare(group)
        journals = {group: [directory / f"{group}-{n}" for n in range(WORKERS)] for group in GROUPS}
        workers = {path: await spawn("worker", group, str(path)) for group in GROUPS for path in journals[group]}
        say("main", f"{len(workers)} consumer processes in {len(GROUPS)} groups")
        try:
            for worker in workers.values():
                await output(worker).readline()  # one that starts late would find nothing left to be killed at
            publisher = await spawn("publisher", str(count))
            say("main", f"a process publishes {count} messages")
            victim = journals[GROUPS[0]][0]
            held = await kill_at_work(workers[victim], victim, count // 20)
            say(
                "main",
                f"SIGKILL: consumer process {workers[victim].pid} of {GROUPS[0]} dies at work on {held} messages",
            )
            leased = backend.capabilities.lease is not None
            say(
                "main",
                f"they come back when its lease of {LEASE:g} s has run out" if leased else "they come back at once",
            )

            confirmed = int((await publisher.communicate())[0])
            say("main", f"the publisher is done: {confirmed} confirmed")
            for group in GROUPS:
                while await left(backend, group):  # noqa: ASYNC110 - other processes do it
                    await asyncio.sleep(0.1)
                say("main", f"{group} is drained")
        finally:
            for worker in workers.values():
                if worker.returncode is None:
                    worker.terminate()
            await asyncio.gather(*(worker.wait() for worker in workers.values()))
            dead = {group: (await backend.stats(group)).dead for group in GROUPS}
            for group in GROUPS:
                await backend.delete_group(group)
    return accounts(count, confirmed, journals, dead, held)


def accounts(count: int, confirmed: int, journals: dict[str, list[Path]], dead: dict[str, int], held: int) -> bool:
    """Print what became of every message, and return whether nothing was lost."""
    print(f"\nPublished: {confirmed} of {count} confirmed")
    fine = confirmed == count
    again = 0
    for group, paths in journals.items():
        numbers, attempts = read(paths, "done")
        lost = set(range(count)) - numbers.keys()
        twice = numbers.total() - len(numbers)
        tries = ", ".join(f"{n} at attempt {attempt}" for attempt, n in sorted(attempts.items()))
        counts = f"handled {len(numbers)}, duplicates {twice}, dead letters {dead[group]}, lost {len(lost)}"
        print(f"{group + ':':<10} {counts}  ({tries})")
        again += attempts.total() - attempts[1]
        fine = fine and not lost and not dead[group] and numbers.keys() == set(range(count))
    fine = fine and again >= held
    print("Nothing was lost." if fine else "WRONG: the accounts do not match.")
    return fine


async def within_deadline(count: int) -> bool:
    """Run the experiment, bounded in time."""
    with tempfile.TemporaryDirectory(prefix="abe-sigkill-") as directory:
        async with asyncio.timeout(DEADLINE):
            return await experiment(count, Path(directory))


def main() -> int:
    """Read the command line, and be what it says."""
    parser = argparse.ArgumentParser(description="A consumer is killed, and nothing is lost.")
    parser.add_argument(
        "--backend", default="redis", help="redis (the default), rabbitmq, sqs, or another installed provider"
    )
    parser.add_argument(
        "--messages", type=int, help="how many are published: 20,000, or 2,000 on SQS, for emulators are slow"
    )
    roles = parser.add_subparsers(dest="role")
    worker = roles.add_parser("worker", help="be one of the consumers")
    worker.add_argument("group")
    worker.add_argument("journal", type=Path)
    roles.add_parser("publisher", help="be the publisher").add_argument("count", type=int)
    options = parser.parse_args()
    if options.role == "worker":
        asyncio.run(work(options.group, options.journal))
        return 0
    if options.role == "publisher":
        asyncio.run(publish(options.count))
        return 0
    # The other processes read it there.
    os.environ["QUEUE_BACKEND"] = options.backend
    os.environ["QUEUE_NAMESPACE"] = f"sigkill-{uuid4().hex[:8]}"
    os.environ["QUEUE_LEASE_SECONDS"] = f"{LEASE:g}"
    with broker(options.backend):
        started = time.monotonic()
        fine = asyncio.run(within_deadline(options.messages or MESSAGES.get(options.backend, DEFAULT_MESSAGES)))
        print(f"It took {time.monotonic() - started:.1f} s.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

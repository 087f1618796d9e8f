"""The main job, shown as it happens: orders are published, billed and shipped, in memory or on a real broker.

    python examples/demo.py --backend memory
    python examples/demo.py --backend redis
    python examples/demo.py --backend rabbitmq
    python examples/demo.py --backend sqs

One order fails twice and is retried, one is refused and goes to the dead letters, is shown, and is replayed; at the end
the consumers are shut down while a handler still runs. The accounts are checked: the exit code is 1 when they do not
match.
"""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from abe import AsyncLoopConsumer, ConstantBackoff, Message, Reject, RetryPolicy, load_backend
from abe.backends.message_queue.base import FullBackend

ORDERS = 9
UNLUCKY, REFUSED, SLOW = 3, 5, 9
"""The order that the bank fails twice, the one in an unknown currency, and the one being packed when we shut down."""

ADDRESSES = {"redis": ["REDIS_URL"], "rabbitmq": ["RABBITMQ_URL"], "sqs": ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS"]}
"""The variables that may have the address of each backend's broker; a private one's is put into the first."""

AWS_ACCOUNT = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo"}
"""What a private SQS is told where the environment names no account: it believes everybody."""

RETRY = RetryPolicy(max_attempts=5, backoff=ConstantBackoff(0.4))
_started = time.monotonic()


def say(who: str, text: str) -> None:
    """Print a line of the story."""
    print(f"{time.monotonic() - _started:6.2f} s  {who:<12} {text}", flush=True)


class Story(logging.Handler):
    """Shows what the library logs among the other lines, without the tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        say(record.name, record.getMessage())


@dataclass
class Order:
    """What a payload becomes for a handler that is annotated with it."""

    order_id: int
    currency: str
    cents: int


class Billing:
    """Bills orders; knows only the currencies it has been taught."""

    def __init__(self) -> None:
        self.currencies = {"EUR"}
        self.done: Counter[int] = Counter()
        self.failures = 0
        self.refused = asyncio.Event()

    async def handle_event(self, order: Order) -> None:
        """Bill an order. `Reject` moves it to the dead letters; any other exception is a failure, and retried."""
        if order.currency not in self.currencies:
            say("billing", f"order {order.order_id}: refused, no such currency {order.currency!r}")
            self.refused.set()
            raise Reject(f"no such currency: {order.currency}")
        if order.order_id == UNLUCKY and self.failures < 2:
            self.failures += 1
            say("billing", f"order {order.order_id}: the bank does not answer, attempt {self.failures} fails")
            raise ConnectionError("the bank does not answer")
        self.done[order.order_id] += 1
        say("billing", f"order {order.order_id}: billed {order.cents / 100:.2f} {order.currency}")


class Shipping:
    """Ships orders, several at once; one takes its time."""

    def __init__(self) -> None:
        self.done: Counter[int] = Counter()
        self.packing = asyncio.Event()

    async def handle_event(self, message: Message) -> None:
        """Ship an order."""
        order = message["order_id"]
        if order == SLOW:
            say("shipping", f"order {order}: being packed ...")
            self.packing.set()
            await asyncio.sleep(0.5)
        self.done[order] += 1
        say("shipping", f"order {order}: shipped (key {message.key}, attempt {message.attempt})")


async def until_idle(backend: FullBackend, group: str, *, dead: int) -> None:
    """Return when the group has nothing left to do."""
    while True:
        stats = await backend.stats(group)
        if not (stats.waiting or stats.in_flight or stats.delayed) and stats.dead == dead:
            return
        await asyncio.sleep(0.05)


async def story(backend: FullBackend) -> bool:
    """Tell it, and return whether the accounts match."""
    billing, shipping = Billing(), Shipping()
    await backend.declare("billing", ["order.#"])
    await backend.declare("shipping", ["order.#"])
    say("setup", "the groups billing and shipping each get a copy of every order")

    bill = AsyncLoopConsumer(backend, "billing", concurrency=2, retry=RETRY)
    ship = AsyncLoopConsumer(backend, "shipping", concurrency=3, retry=RETRY)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bill.run(billing))
        tasks.create_task(ship.run(shipping))
        await asyncio.gather(bill.started.wait(), ship.started.wait())
        replayed = await trade(backend, billing, shipping)
        say("operator", "shutting down: nothing new is taken, and who is at work may finish")
        await asyncio.gather(bill.shutdown(), ship.shutdown())
    say("operator", "shut down")
    return await accounts(backend, billing, shipping, replayed)


async def trade(backend: FullBackend, billing: Billing, shipping: Shipping) -> int:
    """Publish orders, and help the one that was refused; return how many dead letters were replayed."""
    for number in range(1, ORDERS):
        currency = "GBP" if number == REFUSED else "EUR"
        await backend.publish("order.created", {"order_id": number, "currency": currency, "cents": number * 1000 + 99})
        say("shop", f"order {number}: published")
        await asyncio.sleep(0.05)

    await billing.refused.wait()
    await until_idle(backend, "billing", dead=1)
    dead_letters = backend.dead_letters("billing")
    for letter in await dead_letters.list():
        say("operator", f"dead letter of billing: {letter.reason}; attempts {letter.attempts}; {letter.body.decode()}")
    billing.currencies.add("GBP")
    replayed = await dead_letters.replay_all()
    say("operator", f"GBP is a currency now: {replayed} dead letter replayed")
    await until_idle(backend, "billing", dead=0)

    await backend.publish("order.created", {"order_id": SLOW, "currency": "EUR", "cents": 9099})
    say("shop", f"order {SLOW}: published")
    await shipping.packing.wait()
    await until_idle(backend, "billing", dead=0)
    return replayed


async def accounts(backend: FullBackend, billing: Billing, shipping: Shipping, replayed: int) -> bool:
    """Print the summary, and return whether it is as it must be."""
    left = {group: await backend.stats(group) for group in ("billing", "shipping")}
    once_each = Counter(dict.fromkeys(range(1, ORDERS + 1), 1))
    checks = {
        f"{ORDERS} orders published, each billed once": billing.done == once_each,
        f"{ORDERS} orders published, each shipped once": shipping.done == once_each,
        "2 failures retried": billing.failures == 2,
        "1 dead letter replayed": replayed == 1,
        "nothing left in the broker": not any(s.waiting + s.in_flight + s.delayed + s.dead for s in left.values()),
    }
    print("\nSummary")
    for text, right in checks.items():
        print(f"  {'ok   ' if right else 'WRONG'}  {text}")
    return all(checks.values())


@contextmanager
def broker(name: str) -> Iterator[None]:
    """Have a broker: what the environment names, or a private server for this run."""
    variables = ADDRESSES.get(name)
    if variables is None or any(map(os.environ.get, variables)):
        yield
        return
    unset = f"{' and '.join(variables)} {'is' if len(variables) == 1 else 'are'} not set"
    try:
        from abe_contract_tests import services
    except ImportError:
        sys.exit(f"{unset}: set {variables[0]}, or install abe-contract-tests, which can start a private {name} server")
    start = {
        "redis": services.redis_service,
        "rabbitmq": services.rabbitmq_service,
        "sqs": lambda: services.sqs_service(
            "ministack"
        ),  # of the emulators, the one that serves many processes at once
    }
    try:
        server = start[name]()
        server.start()
    except services.ServiceUnavailable as exc:
        sys.exit(f"{unset}, and no private {name} server can be started: {exc}")
    try:
        say("setup", f"{unset}: a private {server.version} was started")
        os.environ[variables[0]] = server.url
        if name == "sqs":
            aws_defaults()
        yield
    finally:
        server.stop()


def aws_defaults() -> None:
    """Say what a private SQS needs to be told, where the environment does not say it."""
    if not any(map(os.environ.get, [*AWS_ACCOUNT, "AWS_PROFILE"])):
        os.environ.update(AWS_ACCOUNT)
    if not any(map(os.environ.get, ["AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"])):
        os.environ["AWS_REGION"] = "us-east-1"
    # Making a group takes as long as a publisher may rely on a list of groups without it, and our publishers are few.
    os.environ.setdefault("SQS_REGISTRY_TTL_SECONDS", "0.5")


async def main(name: str) -> bool:
    """Run the story on a backend, and clean up behind it."""
    backend = load_backend(name)
    say("setup", f"the backend is {type(backend).__name__}, chosen by its name {name!r}")
    async with asyncio.timeout(30), backend:
        try:
            return await story(backend)
        finally:
            await backend.delete_group("billing")
            await backend.delete_group("shipping")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Orders published, billed and shipped, as it happens.")
    parser.add_argument(
        "--backend", default="memory", help="memory (the default), redis, rabbitmq, sqs, or another installed provider"
    )
    chosen = parser.parse_args().backend
    logging.getLogger("abe").addHandler(Story(logging.WARNING))
    # Each run keeps to a namespace of its own, so that it finds nothing of another's.
    os.environ["QUEUE_NAMESPACE"] = f"demo-{uuid4().hex[:8]}"
    with broker(chosen):
        sys.exit(0 if asyncio.run(main(chosen)) else 1)

"""What a world is like: drawn from the seed."""

from dataclasses import dataclass
from random import Random

from abe.backends.message_queue.base import Batching
from abe.backends.message_queue.base.transport import Receiving, Settling
from abe.settings import QueueSettings
from simulation.faults import Plan, draw_plan

KEYS = ("k.0", "k.1", "k.2", "other")


@dataclass(frozen=True)
class ConsumerPlan:
    """One consumer of a host.

    Attributes:
        kind: "loop" (`AsyncLoopConsumer`), "iterate" (``async for``) or "explicit" (`receive` and settlements of its own).
        group: What it consumes.
        prefetch: Messages in flight at most.
        concurrency: Messages handled at once.
        ordered: Whether by key.
        timeout: Seconds that a handler may take; None: any.
        grace: Seconds that handlers get in a shutdown.
        work: Seconds that a handler takes, at most.
        failing: How often a handler fails.
        abrupt: How often the consumer is ended and begun anew, in seconds between; 0: never.
        threads: Whether the handler is a plain function, which runs in threads.
    """

    kind: str
    group: str
    prefetch: int
    concurrency: int
    ordered: bool
    timeout: float | None
    grace: float
    work: float
    failing: float
    abrupt: float
    threads: bool = False


@dataclass(frozen=True)
class HostPlan:
    """One host of the application.

    Attributes:
        name: Its name.
        offset: Seconds by which its clock is ahead.
        rate: How fast its clock runs.
        publishes: Messages that it publishes.
        consumers: Its consumers.
        batching: How much its transport sends at a time.
        receiving: How many receives of one consumer there are at once.
        settling: How much its receivers settle at a time.
    """

    name: str
    offset: float
    rate: float
    publishes: int
    consumers: tuple[ConsumerPlan, ...]
    batching: Batching
    receiving: Receiving
    settling: Settling


@dataclass(frozen=True)
class Scenario:
    """One world.

    Attributes:
        settings: Those of all backends.
        plan: The faults.
        hosts: The application's hosts.
        groups: The groups, each with its patterns.
        late: Whether the groups are made by their first consumers only.
        shuffled: See `World`.
        duration: Seconds for which faults happen.
        pace: Seconds between two publishes, at most.
        cancels: How often a call is cancelled on its way.
        operators: Whether dead letters are looked through, replayed and purged meanwhile.
        deletes: Whether groups are deleted underneath.
        reopens: Whether backends are closed and connected again.
        leased: Whether deliveries have leases. If not, a consumer's connection keeps them, and a lost one counts as a delivery.
        settling_timeout: Seconds for which settlements are tried where there are no leases.
        layered: Whether publishes and handlers have middleware.
    """

    settings: QueueSettings
    plan: Plan
    hosts: tuple[HostPlan, ...]
    groups: dict[str, tuple[str, ...]]
    late: bool
    shuffled: bool
    duration: float
    pace: float
    cancels: float
    operators: bool
    deletes: bool
    reopens: bool
    leased: bool
    settling_timeout: float
    layered: bool


def draw_scenario(seed: object, namespace: str) -> Scenario:
    """Draw a world.

    Args:
        seed: What it is drawn from.
        namespace: The broker's namespace.
    """
    random = Random(f"{seed}/scenario")
    plan = draw_plan(Random(f"{seed}/plan"))
    settings = QueueSettings(
        namespace=namespace,
        lease=random.choice((1.0, 3.0, 10.0)),
        max_attempts=random.choice((1, 2, 3, 5)),
        publish_timeout=random.choice((1.0, 4.0, 10.0)),
        close_timeout=random.choice((0.5, 2.0, 5.0)),
        max_unconfirmed=random.choice((1, 3, 5000)),
        max_backlog=random.choice((None, None, None, 10)),
    )
    groups = dict(random.choice(_GROUPS))
    # What a provider's bug leaves with a connection that has no lease comes back only when that ends.
    leased = random.random() < 0.6 or not plan.latency or "bug" in plan.rates
    hosts = tuple(
        _host(random, name, groups, plan, settings.lease, leased=leased)
        for name in "abc"[: random.choice((1, 1, 2, 3))]
    )
    return Scenario(
        settings=settings,
        plan=plan,
        hosts=hosts,
        groups=groups,
        late=random.random() < 0.3,
        shuffled=random.random() < 0.2,
        duration=random.choice((5.0, 20.0, 40.0)),
        pace=random.choice((0.0, 0.05, 1.0)),
        cancels=random.choice((0.0, 0.0, 0.1, 0.4)),
        operators=random.random() < 0.3,
        deletes=random.random() < 0.1,
        reopens=random.random() < 0.2,
        leased=leased,
        settling_timeout=random.choice((3.0, 30.0)),
        layered=random.random() < 0.25,
    )


_GROUPS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"g": ("#",)},
    {"g": ("#",)},
    {"g": ("#",), "h": ("k.*",)},
    {"g": ("k.0", "other"), "h": ("k.#",)},
)


_RECEIVING = (
    Receiving(),
    Receiving(messages=10, max_concurrent=2),
    Receiving(messages=2, max_concurrent=4),
    Receiving(messages=1, max_concurrent=8),
)


def _host(
    random: Random, name: str, groups: dict[str, tuple[str, ...]], plan: Plan, lease: float, *, leased: bool
) -> HostPlan:
    counts = {group: random.choice((0, 1, 1, 2)) for group in groups}
    consumers = tuple(_consumer(random, group, lease) for group, count in counts.items() for _ in range(count))
    local = not plan.latency
    return HostPlan(
        name=name,
        offset=random.choice((0.0, 1000.0, -50.0)),
        rate=random.choice((1.0, 1.0, 0.97, 1.03)),
        publishes=random.choice((0, 10, 40)) if name != "a" else random.choice((5, 20, 60)),
        consumers=consumers,
        batching=Batching(
            messages=random.choice((1, 3, 250)),
            bytes=random.choice((30, 1 << 20)),
            max_concurrent=random.choice((1, 2, 8)),
        ),
        # Without a network a receive has no way back on which another one could overtake it. Brokers without leases push.
        receiving=random.choice(_RECEIVING) if leased and not local else Receiving(),
        settling=Settling(
            messages=random.choice((1, 3, 500)),
            linger=0.0 if local else random.choice((0.0, 0.0, 0.05)),
            at_once=local,
        ),
    )


def _consumer(random: Random, group: str, lease: float) -> ConsumerPlan:
    concurrency = random.choice((1, 1, 2, 4))
    return ConsumerPlan(
        kind=random.choice(("loop", "loop", "iterate", "explicit")),
        group=group,
        prefetch=random.choice((1, 2, 5, 20)),
        concurrency=concurrency,
        ordered=random.random() < 0.4,
        timeout=random.choice((None, None, 0.5, 3.0)),
        grace=random.choice((0.0, 0.5, 25.0)),
        work=random.choice((0.0, 0.0, 0.1, 2.0, 2 * lease)),
        failing=random.choice((0.0, 0.0, 0.2, 0.7)),
        abrupt=random.choice((0.0, 0.0, 1.0, 5.0)),
        threads=random.random() < 0.25,
    )

"""What must hold when a world has ended."""

from collections import Counter

from simulation.history import Delivery, History
from simulation.scenario import Scenario

_LEAVES = {"release", "closing", "left", "cancelled", "interrupted"}
"""What an application does that gives a delivery back."""

_ALLOWS = {
    "acked": {"returned", "ack"},
    "retried": {"failed", "nack", "dropped", "cancelled", "interrupted", "left", "closing", "timed"},
    "buried": {
        "failed",
        "nack",
        "reject",
        "dropped",
        "cancelled",
        "interrupted",
        "left",
        "closing",
        "timed",
        "returned",
    },
}
"""What an application does before a delivery ends in these ways."""


def check(history: History, scenario: Scenario) -> None:
    """Add to the history what does not hold of it.

    Args:
        history: What happened.
        scenario: The world.
    """
    _messages(history)
    if scenario.plan.harmless and not scenario.operators and not scenario.deletes:
        for group in scenario.groups:
            _order(history, scenario, group)
    for delivery in history.deliveries.values():
        if not delivery.ended:
            history.violated(f"delivery {delivery.number} of m{delivery.message.number} is in flight for ever")
        elif delivery.begun is not None and not _has_cause(history, scenario, delivery):
            history.violated(
                f"delivery {delivery.number} of m{delivery.message.number} was {delivery.ended} and nothing was the matter: {delivery.done}"
            )


def _messages(history: History) -> None:
    ends = Counter(
        (delivery.group, delivery.message.number)
        for delivery in history.deliveries.values()
        if delivery.ended in ("acked", "buried")
    )
    for message in history.messages.values():
        if message.rejected and message.stored:
            history.violated(
                f"m{message.number} was told rejected, and the broker has stored it: {dict(message.stored)}"
            )
        for group in sorted(message.wanted_by):
            if not ends[group, message.number] and not history.deleted[group]:
                history.violated(f"m{message.number} was confirmed, and {group} never got it")
        for group, copies in message.stored.items():
            if ends[group, message.number] != copies and not history.deleted[group]:
                history.violated(
                    f"m{message.number}: {copies} copies in {group}, and {ends[group, message.number]} were acknowledged or are dead"
                )


def _order(history: History, scenario: Scenario, group: str) -> None:
    """Where nothing goes wrong, and one consumer handles one message after the other: what is stored first is handled first."""
    consumers = [plan for host in scenario.hosts for plan in host.consumers if plan.group == group]
    if len(consumers) != 1 or consumers[0].concurrency > 1:
        return
    if any(host.receiving.max_concurrent > 1 for host in scenario.hosts):
        return  # the answer to one call may overtake that to another
    order = history.order[group]  # without what was published again, or replayed
    places = {number: place for place, number in enumerate(order) if history.messages[number].stored[group] == 1}
    seen = sorted(
        (delivery.begun, places[delivery.message.number], delivery.message.number)
        for delivery in history.deliveries.values()
        if delivery.group == group
        and delivery.begun is not None
        and delivery.begun < history.calm
        and delivery.attempt == 1
        and delivery.message.number in places
    )
    first: dict[int, int] = {}
    for _, place, number in seen:
        first.setdefault(number, place)
    if list(first.values()) != sorted(first.values()):
        history.violated(f"the order of {group} is {[f'm{number}' for number in first]}")


def _has_cause(history: History, scenario: Scenario, delivery: Delivery) -> bool:
    """Whether it is recorded why a delivery that the application got ended as it did."""
    done, ended = set(delivery.done), delivery.ended
    if ended == "retried" and done and not scenario.leased and _troubled(history, scenario, delivery):
        return True  # its settlement was given up, and no lease would bring it back
    if ended in ("acked", "retried", "buried", "deleted"):
        return ended == "deleted" or bool(done & _ALLOWS[ended])
    # It comes again as the application left it, or as a fault kept its settlement, or its lease, from the broker.
    left = ended in ("released", "closed") and bool(done & _LEAVES)
    return left or ((ended in ("expired", "lost") or bool(done)) and _troubled(history, scenario, delivery))


def _troubled(history: History, scenario: Scenario, delivery: Delivery) -> bool:
    """Whether the host was hit by a fault while it held the delivery, or just before."""
    since = delivery.at - 2 * scenario.settings.lease
    return history.troubled(delivery.host, since, delivery.ended_at)

"""Names in RabbitMQ, and the binary delay ladder."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.backends.message_queue.base.names import matches
from abe_backend_rabbitmq._topology import LEVELS, MAX_DELAY, TICK, Topology, ladder

NAMES = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", fullmatch=True)
README = Path(__file__).parents[1] / "README.md"
LONGEST_NAME = 255
"""Bytes of a name or a routing key in AMQP 0-9-1: a short string."""


def shared(namespace: str) -> list[str]:
    names = Topology(namespace)
    fixed = [names.exchange, names.unwanted, names.nowhere, names.holding, names.held, names.registry, names.lock]
    return [*fixed, names.later, names.delay, names.due, *(names.rung(level) for level in range(LEVELS))]


def own(namespace: str, group: str) -> list[str]:
    names = Topology(namespace)
    return [names.queue(group), names.dead(group), *(names.waiting(group, level) for level in range(LEVELS))]


def test_the_names_are_the_documented_ones() -> None:
    text = README.read_text().partition("## Topology")[2].partition("\n## ")[0]
    documented: set[str] = set()
    for row in re.findall(r"^\| (`abe:.*?) \|", text, re.MULTILINE):
        for name in re.findall(r"`(abe:NAMESPACE[^`]*|:[^`]*)`", row):
            full = name if name.startswith("abe:") else f"abe:NAMESPACE{name}"
            documented.add(full.replace("NAMESPACE", "shop").replace("GROUP", "billing").replace(":N", ":3"))
    actual = set(shared("shop") + own("shop", "billing"))
    first = {name for name in actual if not re.search(r":delay:(?!3\b)\d+", name)}
    assert documented == first


@given(first=st.tuples(NAMES, NAMES), second=st.tuples(NAMES, NAMES))
def test_no_two_names_fall_together(first: tuple[str, str], second: tuple[str, str]) -> None:
    for namespace, group in (first, second):
        every = shared(namespace) + own(namespace, group)
        assert len(set(every)) == len(every)
    if first[0] != second[0]:
        assert not set(shared(first[0]) + own(*first)) & set(shared(second[0]) + own(*second))
    elif first[1] != second[1]:
        assert not set(own(*first)) & set(own(*second))


@given(namespace=NAMES, group=NAMES)
def test_no_name_is_too_long_for_amqp(namespace: str, group: str) -> None:
    assert max(len(name.encode()) for name in shared(namespace) + own(namespace, group)) <= LONGEST_NAME
    assert len(f"{2**63}.{ladder(MAX_DELAY)[1]}.{group}".encode()) <= LONGEST_NAME


def test_an_exchange_of_another_name_is_only_that() -> None:
    assert Topology("shop", "events").exchange == "events"
    assert Topology("shop", "events").unwanted == Topology("shop").unwanted


@given(delay=st.floats(min_value=1e-9, max_value=MAX_DELAY), group=NAMES)
def test_a_message_waits_at_exactly_the_rungs_of_its_delay(delay: float, group: str) -> None:
    names = Topology("shop")
    level, digits = ladder(delay)
    key = f"0.{digits}.{group}"
    begins = [rung for rung in range(LEVELS) if matches(names.leap(rung), key)]
    assert begins == [level]
    waited = 0.0
    for rung in range(level, -1, -1):
        waits, climbs = matches(names.wait(group, rung), key), matches(names.climb(rung), key)
        assert waits is not climbs
        waited += names.waiting_arguments(rung)["x-message-ttl"] / 1000 if waits else 0.0
    assert matches(names.arrive(group), key)
    assert delay - 1e-6 <= waited < delay + TICK + 1e-6


@given(groups=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_a_message_waits_in_the_queues_of_its_own_group(groups: list[str]) -> None:
    names = Topology("shop")
    key = f"0.{ladder(MAX_DELAY)[1]}.{groups[0]}"
    assert matches(names.arrive(groups[0]), key)
    assert not matches(names.arrive(groups[1]), key)
    assert not any(matches(names.wait(groups[1], rung), key) for rung in range(LEVELS))


@pytest.mark.parametrize(("delay", "ticks"), [(0.1, 1), (0.3, 3), (0.31, 4), (1e-9, 1), (MAX_DELAY, 2**LEVELS - 1)])
def test_a_delay_is_rounded_up_to_a_tick(delay: float, ticks: int) -> None:
    assert int(ladder(delay)[1].replace(".", ""), 2) == ticks


def test_the_backlog_is_one_less_for_the_broker_takes_the_one_that_fills_it() -> None:
    assert "x-max-length" not in Topology("shop").queue_arguments("g")
    assert Topology("shop", None, 10).queue_arguments("g")["x-max-length"] == 9


def test_nothing_is_ever_dropped() -> None:
    names = Topology("shop", None, 10)
    for arguments in (names.queue_arguments("g"), names.waiting_arguments(3), names.store_arguments):
        assert arguments["x-queue-type"] == "quorum"
        assert arguments["x-overflow"] == "reject-publish"
        assert arguments.get("x-dead-letter-strategy", "at-least-once") == "at-least-once"
        assert arguments["x-delivery-limit"] >= 1000

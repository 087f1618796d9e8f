"""Names in RabbitMQ, and the levels of a delay."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.backends.message_queue.base.names import matches
from abe_backend_rabbitmq._topology import LEVELS, MAX_DELAY, TICK, Topology, level_of

NAMES = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", fullmatch=True)
README = Path(__file__).parents[1] / "README.md"
LONGEST_NAME = 255
"""Bytes of a name or a routing key in AMQP 0-9-1: a short string."""


def shared(namespace: str) -> list[str]:
    names = Topology(namespace)
    fixed = [names.exchange, names.unwanted, names.nowhere, names.parking, names.parked, names.registry, names.lock]
    return [*fixed, names.parked_lock, names.later, names.delay, names.news]


def own(namespace: str, group: str) -> list[str]:
    names = Topology(namespace)
    return [
        names.queue(group),
        names.dead(group),
        names.look(group),
        names.tried(group, "RECORD"),
        *(names.waiting(group, level) for level in range(LEVELS)),
    ]


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
    assert len(f"{2**63}.{LEVELS}.{group}".encode()) <= LONGEST_NAME


def test_an_exchange_of_another_name_is_only_that() -> None:
    assert Topology("shop", "events").exchange == "events"
    assert Topology("shop", "events").unwanted == Topology("shop").unwanted


@given(delay=st.floats(min_value=1e-9, max_value=MAX_DELAY), group=NAMES)
def test_a_message_waits_at_one_level_and_never_for_longer_than_its_delay(delay: float, group: str) -> None:
    names = Topology("shop")
    level = level_of(delay)
    assert [each for each in range(LEVELS) if matches(names.wait(group, each), f"0.{level}.{group}")] == [level]
    assert level == 0 or TICK * 2**level <= delay + 1e-6
    assert level == LEVELS - 1 or delay < TICK * 2 ** (level + 1)


@given(groups=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_a_message_waits_in_the_queues_of_its_own_group(groups: list[str]) -> None:
    names = Topology("shop")
    key = f"0.{level_of(MAX_DELAY)}.{groups[0]}"
    assert not any(matches(names.wait(groups[1], each), key) for each in range(LEVELS))


@pytest.mark.parametrize(
    ("delay", "level"),
    [(1e-9, 0), (0.1, 0), (0.19, 0), (0.2, 1), (0.8, 3), (1.5, 3), (1.6, 4), (MAX_DELAY, LEVELS - 1)],
)
def test_a_delay_begins_at_the_longest_wait_that_it_has(delay: float, level: int) -> None:
    assert level_of(delay) == level


def test_the_backlog_is_one_less_for_the_broker_takes_the_one_that_fills_it() -> None:
    assert "x-max-length" not in Topology("shop").queue_arguments("g")
    assert Topology("shop", None, 10).queue_arguments("g")["x-max-length"] == 9


def test_nothing_is_ever_dropped() -> None:
    names = Topology("shop", None, 10)
    for arguments in (names.queue_arguments("g"), names.store_arguments, names.level_arguments):
        assert arguments["x-queue-type"] == "quorum"
        assert arguments["x-overflow"] == "reject-publish"
        assert arguments.get("x-dead-letter-strategy", "at-least-once") == "at-least-once"
        assert arguments["x-delivery-limit"] >= 1000

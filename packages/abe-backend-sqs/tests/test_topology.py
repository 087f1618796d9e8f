"""Names of queues, and what their tags say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.errors import ConfigurationError
from abe_backend_sqs._tags import Group, Listing, Registry, from_tags, tags
from abe_backend_sqs._topology import Topology

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", fullmatch=True)


def test_names_are_readable() -> None:
    names = Topology("application_events")
    assert names.queue("billing") == "application_events-group-billing"
    assert names.dead("a.b-c") == "application_events-dead-a-_b--c"
    assert names.parked == "application_events-parked"


@given(NAMES, NAMES, NAMES, NAMES)
def test_no_two_names_fall_together(namespace: str, group: str, other_namespace: str, other_group: str) -> None:
    one, other = Topology(namespace), Topology(other_namespace)
    ours = {one.queue(group), one.dead(group), one.parked}
    theirs = {other.queue(other_group), other.dead(other_group), other.parked}
    assert len(ours) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,75}", name) for name in ours)
    if namespace != other_namespace:
        assert not ours & theirs
        assert not any(name.startswith(one.prefix) for name in theirs)
    elif group != other_group:
        assert ours & theirs == {one.parked}


@pytest.mark.parametrize(("one", "other"), [("a-b", "a.b"), ("a--b", "a-b"), ("a", "a-group-a"), ("a.b", "a-_b")])
def test_alike_names_stay_apart(one: str, other: str) -> None:
    assert Topology(one).queue(other) != Topology(other).queue(one)
    assert not Topology(other).queue("g").startswith(Topology(one).prefix)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50), min_size=1, max_size=20))
def test_patterns_travel_in_tags(patterns: list[str]) -> None:
    group = Group("billing", tuple(patterns), 1.5)
    found = tags(group)
    assert from_tags({**found, "cost-centre": "7"}) == group
    assert all(re.fullmatch(r"[A-Za-z0-9_.:/=+@ -]{0,256}", value) for value in found.values())


def test_what_is_left_of_a_longer_list_means_nothing() -> None:
    long = tags(Group("g", tuple(f"key.number.{n}" for n in range(100)), 1))
    short = tags(Group("g", ("a",), 2))
    assert from_tags({**long, **short}) == Group("g", ("a",), 2)


def test_more_patterns_than_tags_can_hold_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="more than the tags"):
        tags(Group("g", tuple("x" * 200 + str(n) for n in range(100)), 0))


@pytest.mark.parametrize(
    "found", [{}, {"abe-group": "g"}, {"abe-group": "g", "abe-patterns": "2", "abe-patterns-0": "x"}]
)
def test_tags_that_say_nothing_are_no_group(found: dict[str, str]) -> None:
    assert from_tags(found) is None


def test_a_key_goes_to_the_groups_that_want_it() -> None:
    groups = {"a": ("order.#",), "b": ("#",), "c": ("x",)}
    members = [Group(name, patterns, 0.0) for name, patterns in groups.items()]
    registry = Registry.of(members, 0.0, "", Listing({}, {}))
    assert registry.routes["order.created"] == ("a", "b")
    assert registry.routes["y"] == ("b",)

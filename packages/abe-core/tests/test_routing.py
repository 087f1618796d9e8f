"""Routes: which groups a key leads to, and what is said where it leads nowhere."""

from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope
from abe.backends.message_queue.base import routing as routing_module
from abe.backends.message_queue.base.routing import PARKED, Routes, fan_out, group_missing, matches_any, unroutable
from abe.errors import UnroutableError

GROUPS = {"a": ("order.#", "x"), "b": ("#",), "c": ()}


@pytest.mark.parametrize(("key", "groups"), [("order.created", ("a", "b")), ("x", ("a", "b")), ("y", ("b",))])
def test_a_key_leads_to_the_groups_that_want_it_in_their_order(key: str, groups: tuple[str, ...]) -> None:
    assert Routes(GROUPS, tuple)[key] == groups


def test_what_is_made_of_a_route_is_made_once() -> None:
    made: list[tuple[str, ...]] = []

    def make(groups: tuple[str, ...]) -> int:
        made.append(groups)
        return len(groups)

    routes = Routes(GROUPS, make)
    assert [routes["x"], routes["x"], routes["y"]] == [2, 2, 1]
    assert made == [("a", "b"), ("b",)]


def test_routes_keep_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "_MOST_ROUTES", 3)
    routes = Routes(GROUPS, tuple)
    for number in range(10):
        assert routes[str(number)] == ("b",)
        assert len(routes) <= 3
    assert routes["x"] == ("a", "b")


def test_patterns_match_if_one_of_them_does() -> None:
    assert matches_any(("a.*", "b"), "a.c")
    assert not matches_any(("a.*", "b"), "c")
    assert not matches_any((), "c")


def test_an_unroutable_message_is_told_what_is_missing() -> None:
    assert str(unroutable(Envelope("1", "k", b"", 0))) == "no group wants the key 'k'"
    assert str(unroutable(Envelope("1", "k", b"", 0, group="g"))) == str(group_missing("g")) == "there is no group 'g'"
    assert not unroutable(Envelope("1", "k", b"", 0)).retryable


def copies(envelopes: list[Envelope], **options: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the outcomes by their types, and the copies, each as its group and the message's id."""
    outcomes, stored = fan_out(envelopes, GROUPS, **options)
    return [type(outcome).__name__ for outcome in outcomes], [(group, each.id) for group, each in stored]


def test_each_group_that_wants_a_message_gets_a_copy() -> None:
    envelopes = [Envelope("1", "x", b"", 0), Envelope("2", "y", b"", 0)]
    assert copies(envelopes) == (["NoneType", "NoneType"], [("a", "1"), ("b", "1"), ("b", "2")])


def test_a_message_for_one_group_goes_there_alone_whatever_its_patterns() -> None:
    envelopes = [Envelope("1", "x", b"", 0, group="c"), Envelope("2", "x", b"", 0, group="none")]
    assert copies(envelopes) == (["NoneType", "UnroutableError"], [("c", "1")])


def test_a_message_that_no_group_wants_is_unroutable() -> None:
    outcomes, stored = fan_out([Envelope("1", "y", b"", 0)], {"a": ("x",)})
    assert [type(outcome) for outcome in outcomes] == [UnroutableError]
    assert stored == []


def test_a_message_is_parked_where_there_is_no_group() -> None:
    one, other = Envelope("1", "y", b"", 0), Envelope("2", "y", b"", 0, group="g")
    outcomes, stored = fan_out([one, other], {}, {})
    assert [type(outcome).__name__ for outcome in outcomes] == ["NoneType", "UnroutableError"]
    assert stored == [(PARKED, one)]


def test_a_group_that_is_full_refuses_for_all_that_want_the_message() -> None:
    room = {"a": 1, "b": 2, "c": 0}
    envelopes = [Envelope("1", "x", b"", 0), Envelope("2", "x", b"", 0), Envelope("3", "y", b"", 0)]
    outcomes, stored = copies(envelopes, room=room)
    assert outcomes == ["NoneType", "BackpressureError", "NoneType"]
    assert stored == [("a", "1"), ("b", "1"), ("b", "3")]
    assert room == {"a": 1, "b": 2, "c": 0}

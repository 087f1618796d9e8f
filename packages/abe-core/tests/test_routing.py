"""Routes: which groups a key leads to, and what is said where it leads nowhere."""

import pytest

from abe.backends.message_queue.base import Envelope
from abe.backends.message_queue.base import routing as routing_module
from abe.backends.message_queue.base.routing import Routes, group_missing, matches_any, unroutable

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

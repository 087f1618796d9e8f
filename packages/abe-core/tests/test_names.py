"""Keys, groups, headers and patterns: what is carried, what is refused, what matches what."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abe.backends.message_queue.base.names import (
    MAX_HEADER_BYTES,
    check_group,
    check_headers,
    check_key,
    check_patterns,
    matches,
)
from abe.errors import InvalidNameError


def slowly_matches(pattern: list[str], key: list[str]) -> bool:
    """The definition, read aloud: '*' is one word, '#' any number of them, another word is itself."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(slowly_matches(pattern[1:], key[taken:]) for taken in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and slowly_matches(pattern[1:], key[1:])


WORDS = st.sampled_from(["a", "b", "", "*", "#", "a*", "##"])


@given(pattern=st.lists(WORDS, min_size=1, max_size=6), key=st.lists(WORDS, min_size=1, max_size=6))
@example(pattern=["#"], key=[""])
@example(pattern=["#", "#", "a"], key=["a"])
@example(pattern=["a", "#"], key=["a"])
def test_a_pattern_matches_what_its_definition_says(pattern: list[str], key: list[str]) -> None:
    assert matches(".".join(pattern), ".".join(key)) == slowly_matches(pattern, key)


@pytest.mark.parametrize(
    ("pattern", "key", "verdict"),
    [
        ("#", "order.created", True),
        ("order.*", "order.created", True),
        ("order.*", "order", False),
        ("order.*", "order.created.eu", False),
        ("order.#", "order", True),
        ("order.#", "order.created.eu", True),
        ("#.eu", "order.created.eu", True),
        ("order.#.eu", "order.eu", True),
        ("ord*", "order", False),
        ("ord*", "ord*", True),
        ("order.created", "order.*", False),
        ("order", "Order", False),
        ("a.b", "a:b", False),
    ],
)
def test_a_whole_word_is_a_wildcard_and_nothing_else_is(pattern: str, key: str, verdict: bool) -> None:
    assert matches(pattern, key) is verdict


def test_many_hashes_take_no_longer_than_one() -> None:
    # A backtracking matcher would not come back from this one.
    assert not matches(".".join(["#"] * 60 + ["b"]), ".".join(["a"] * 60))


@pytest.mark.parametrize("key", ["a", "order.created", "a" * 200, "ü" * 100, "*", "#", "a b", "..", "\x00"])
def test_a_key_of_up_to_200_bytes_is_carried_as_it_is(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "1 to 200 bytes of UTF-8, not 0"),
        ("a" * 201, "not 201"),
        ("ü" * 101, "not 202"),
        ("\ud800", "not valid Unicode"),
        (None, "must be a string, not NoneType"),
        (b"order", "must be a string, not bytes"),
    ],
)
def test_any_other_key_is_refused(key: Any, text: str) -> None:
    with pytest.raises(InvalidNameError, match=text):
        check_key(key)


def test_patterns_come_back_sorted_and_once_each() -> None:
    assert check_patterns(["b.*", "a.#", "b.*"]) == ("a.#", "b.*")
    assert check_patterns(("a",)) == ("a",)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("order.*", r"write \['order.\*'\]"),
        ([], "leave it out to get every key"),
        ((), "leave it out to get every key"),
        (["a", ""], "a key pattern must be 1 to 200 bytes"),
        (["a", 5], "a key pattern must be a string, not int"),
        (["order*"], r"'order\*' must be .*: write 'order\.\*' or 'order\.#'"),
        (["order.*", "order#"], r"write 'order\.\*' or 'order\.#'"),
        (["order:*"], r"write 'order\.\*' or 'order\.#'"),
        (["order/#"], r"write 'order\.\*' or 'order\.#'"),
        (["order.>"], "write 'order.#'"),
        ([">"], "write '#'"),
        (["order.**"], "write 'order.#'"),
        (["##"], "write '#'"),
        (["+.created"], r"write '\*\.created'"),
        (["order*.created"], r"write 'order\.\*\.created' or 'order\.#\.created'"),
        (["*order"], r"write '\*\.order' or '#\.order'"),
        (["order.crea*"], r"write 'order\.\*'"),
        (["or*er"], r"write '\*'"),
    ],
)
def test_patterns_that_nobody_can_mean_are_refused(keys: Any, text: str) -> None:
    with pytest.raises(InvalidNameError, match=text):
        check_patterns(keys)


@pytest.mark.parametrize("pattern", ["order", "order.*", "#", "*.#.*", "#.eu", "a..b", "a.", "a>b", "a+b", "a b"])
def test_a_pattern_whose_wildcards_are_words_is_taken_as_it_is(pattern: str) -> None:
    assert check_patterns([pattern]) == (pattern,)


def test_no_group_is_the_group_default() -> None:
    assert check_group(None) == "default"


@pytest.mark.parametrize("group", ["a", "billing.v2", "A_b-c", "0", "a" * 64])
def test_a_plain_group_is_carried_as_it_is(group: str) -> None:
    assert check_group(group) == group


@pytest.mark.parametrize("group", ["", " ", "a b", "a:b", "a*", ".a", "a-", "ü", "a" * 65, "a\n", 5, b"a"])
def test_any_other_group_is_refused(group: Any) -> None:
    with pytest.raises(InvalidNameError, match="a group must be 1 to 64 letters, digits"):
        check_group(group)


@pytest.mark.parametrize("headers", [None, {}])
def test_no_headers_are_none(headers: dict[str, str] | None) -> None:
    assert check_headers(headers) is None


def test_headers_are_copied() -> None:
    headers = {"trace": "1", "ü": "", "a b": "\x00"}
    checked = check_headers(headers)
    assert checked == headers
    headers["trace"] = "2"
    assert checked is not None
    assert checked["trace"] == "1"


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({1: "a"}, "a header name must be a string, not int"),
        ({"a": 1}, "value of header 'a' must be a string, not int"),
        ({"a": None}, "value of header 'a' must be a string, not NoneType"),
        ({"": "a"}, "must not be empty"),
        ({"\ud800": "a"}, "is not valid Unicode"),
        ({"a": "\ud800"}, "is not valid Unicode"),
    ],
)
def test_headers_that_are_not_text_to_text_are_refused(headers: Any, text: str) -> None:
    with pytest.raises(InvalidNameError, match=text):
        check_headers(headers)


def test_no_text_about_a_header_shows_its_value() -> None:
    for value in ("hunter2\ud800", 4111111111111111, "4111111111111111" * 2000):
        with pytest.raises(InvalidNameError) as caught:
            check_headers({"card": value})  # type: ignore[dict-item]
        assert "hunter2" not in str(caught.value)
        assert "4111" not in str(caught.value)


def test_headers_over_16_kib_are_refused_and_one_byte_less_is_carried() -> None:
    assert check_headers({"a": "x" * (MAX_HEADER_BYTES - 1)})
    with pytest.raises(InvalidNameError, match=f"take {MAX_HEADER_BYTES + 1} bytes; at most {MAX_HEADER_BYTES}"):
        check_headers({"a": "x" * MAX_HEADER_BYTES})

"""Names in Redis."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from abe_backend_redis._topology import GROUP, RELEASED, Topology

NAMES = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", fullmatch=True)
README = Path(__file__).parents[1] / "README.md"


def all_names(namespace: str, group: str) -> list[bytes]:
    names = Topology(namespace)
    parked = [names.parked, names.parked_delayed, names.parked_passed, names.joining]
    return [names.groups, names.version, *parked, *names.all_of(group)]


def test_the_names_are_the_documented_ones() -> None:
    assert all_names("shop", "billing") == [
        b"{shop}:groups",
        b"{shop}:version",
        b"{shop}:parked",
        b"{shop}:parked:delayed",
        b"{shop}:parked:delayed:passed",
        b"{shop}:joining",
        b"{shop}:queue:billing",
        b"{shop}:delayed:billing",
        b"{shop}:dead:billing",
        b"{shop}:alive:billing",
    ]
    text = README.read_text().partition("## Topology")[2].partition("\n## ")[0]
    patterns = re.findall(r"^\| `(\{namespace\}[^`]*)`", text, re.MULTILINE)
    assert [
        name.replace("{namespace}", "{shop}").replace("GROUP", "billing").encode() for name in patterns
    ] == all_names("shop", "billing")
    assert f"`{GROUP.decode()}`" in text
    assert f"`{RELEASED.decode()}`" in text


@given(first=st.tuples(NAMES, NAMES), second=st.tuples(NAMES, NAMES))
def test_no_two_names_fall_together(first: tuple[str, str], second: tuple[str, str]) -> None:
    one, other = all_names(*first), all_names(*second)
    assert len(set(one)) == len(one)
    if first[0] != second[0]:
        assert not set(one) & set(other)
    elif first[1] != second[1]:
        assert not set(one[6:]) & set(other[6:])


@given(namespace=NAMES, group=NAMES)
def test_all_names_of_a_namespace_are_in_one_slot(namespace: str, group: str) -> None:
    assert {re.match(rb"\{([^}]*)\}", name).group(1) for name in all_names(namespace, group)} == {namespace.encode()}  # type: ignore[union-attr]
    assert all(name.startswith(Topology(namespace).pattern[:-1]) for name in all_names(namespace, group))

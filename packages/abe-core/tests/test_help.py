"""What `help()` says to whoever writes a provider: every field is named where the type is, not in the source alone."""

import inspect
import re
from enum import Enum
from typing import Any

import pytest

from abe.backends.message_queue import base, stored
from abe.backends.message_queue.base import polling
from abe_contract_tests import harness


def fields(kind: type[Any]) -> list[str]:
    """Return the names that an instance has, by the annotations of its class; those of its `__init__` where it has none."""
    own = list(kind) if issubclass(kind, Enum) else kind.__dict__.get("__slots__") or inspect.get_annotations(kind)
    names = (each.name if isinstance(each, Enum) else each for each in own)
    return [name for name in names if not name.startswith("_")]


KINDS = [
    base.Batching,
    base.Capabilities,
    base.DeadLetter,
    base.Delivery,
    base.Disposition,
    base.Durability,
    base.Envelope,
    base.GroupStats,
    base.Metadata,
    base.Receiving,
    base.Settlement,
    base.Settling,
    base.Transport,
    harness.Counts,
    harness.Harness,
    polling.Taken,
    stored.Change,
    stored.Claim,
    stored.Copy,
    stored.Row,
    stored.Span,
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_of_a_type_names_each_of_its_fields(kind: type[Any]) -> None:
    told = inspect.getdoc(kind) or ""
    assert fields(kind)
    assert [name for name in fields(kind) if not re.search(rf"^    {name}: \S", told, re.MULTILINE)] == []


@pytest.mark.parametrize("kind", [base.Receiver, base.Transport])
def test_the_table_of_what_goes_wrong_names_each_method(kind: type[Any]) -> None:
    table = re.findall(r"^    ([a-z_, ]+?)  ", inspect.getdoc(kind) or "", re.MULTILINE)
    told = {name for row in table for name in row.split(", ")} - {"method"}
    methods = {name for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")}
    assert told == methods

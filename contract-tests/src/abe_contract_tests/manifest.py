"""Every test of the suite and the clauses it proves, whether or not a run collected it."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import unwrap
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final

import abe_contract_tests.suite
from abe_contract_tests.clauses import BY_ID
from abe_contract_tests.harness import Harness
from abe_contract_tests.marks import MARK

SUITE: Final = Path(abe_contract_tests.suite.__file__).parent


@dataclass(frozen=True, slots=True)
class SuiteTest:
    """One test function."""

    name: str
    """Its module and its own, ``test_publish::test_a_name``. Part of the suite's interface: results are compared by it."""

    clauses: tuple[str, ...]
    three_methods: bool
    transport: bool

    def applies_to(self, harness: type[Harness]) -> bool:
        """Whether the test applies to that provider."""
        if is_minimal(harness) and not self.three_methods:
            return False
        if self.transport and not hasattr(harness.backend, "make_transport"):
            return False
        return harness.networked or not all(BY_ID[id].networked_only for id in self.clauses)


def is_minimal(harness: type[Harness]) -> bool:
    """Whether the provider has only the protocol's three methods: its class declares no capabilities."""
    return not any(
        "capabilities" in {*vars(base), *vars(base).get("__annotations__", ())} for base in harness.backend.__mro__
    )


@cache
def suite_tests() -> tuple[SuiteTest, ...]:
    """Return the tests of the installed suite."""
    modules = [info.name for info in iter_modules([str(SUITE)]) if info.name.startswith("test_")]
    return tuple(
        test
        for name in sorted(modules)
        for item in vars(import_module(f"{abe_contract_tests.suite.__name__}.{name}")).values()
        if (test := suite_test(item, name)) is not None
    )


def suite_test(function: Any, module: str) -> SuiteTest | None:
    """Return the test that the function's clause marks describe, or None without marks."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == MARK]
    if not marks:
        return None
    return SuiteTest(
        name=f"{module}::{function.__name__}",
        clauses=tuple(dict.fromkeys(id for mark in marks for id in mark.args)),
        three_methods=any(mark.kwargs["three_methods"] for mark in marks),
        transport=any(mark.kwargs["transport"] for mark in marks),
    )


def is_of_the_suite(function: Any) -> bool:
    """Whether the function's code, without its decorators, is in the suite's folder."""
    inner = getattr(function, "hypothesis", None)
    code = getattr(unwrap(inner.inner_test if inner is not None else function), "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(SUITE)

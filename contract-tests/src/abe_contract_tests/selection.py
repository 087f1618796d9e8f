"""Selects the harnesses of a run, from the command line, the ini file and the installed distributions."""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

import pytest

from abe_contract_tests.harness import Harness

ENTRY_POINTS: Final = "abe.contract_harnesses"
"""The entry-point group in which a provider registers its harness under the name that ``--contract`` takes."""


def selected_harnesses(config: pytest.Config) -> list[str]:
    """Return the selected names, unchanged: from ``--contract``, else from the ini option."""
    chosen: list[str] = config.getoption("contract") or config.getini("contract_harnesses")
    return list(dict.fromkeys(chosen))


@cache  # called for each test, and reading the installed entry points takes milliseconds
def load_harness(name: str) -> type[Harness]:
    """Return the harness class of a registered name, or of ``module:Class``.

    Raises:
        pytest.UsageError: It does not exist; the text lists the registered names.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        found = getattr(import_module(module), attribute, None)
    else:
        registered = entry_points(group=ENTRY_POINTS)
        if name not in registered.names:
            raise pytest.UsageError(
                f"no contract harness is registered as {name!r}; there are: {sorted(registered.names)}"
            )
        found = registered[name].load()
    if not (isinstance(found, type) and issubclass(found, Harness)):
        raise pytest.UsageError(f"{name} is not a subclass of abe_contract_tests.harness.Harness: {found!r}")
    return found


def harness_label(name: str) -> str:
    """Return the harness's label in the ids of tests."""
    return load_harness(name).name

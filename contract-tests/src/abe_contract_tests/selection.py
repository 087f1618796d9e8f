"""Which harnesses a run is about, from the command line, the ini file and the installed distributions."""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

import pytest

from abe_contract_tests.harness import Harness

ENTRY_POINTS: Final = "abe.contract_harnesses"
"""The entry-point group in which a provider registers its harness under the name that ``--contract`` takes."""


def selected_harnesses(config: pytest.Config) -> list[str]:
    """Return what to test, as it was written: ``--contract``, else the ini option."""
    chosen: list[str] = config.getoption("contract") or config.getini("contract_harnesses")
    return list(dict.fromkeys(chosen))


@cache  # each test asks, and looking through what is installed takes milliseconds
def load_harness(name: str) -> type[Harness]:
    """Return the harness class of a registered name, or of ``module:Class``.

    Raises:
        pytest.UsageError: There is none; the text says which there are.
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
    """Return what stands for the harness in the ids of tests."""
    return load_harness(name).name

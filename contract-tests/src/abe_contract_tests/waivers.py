"""Waivers: clauses that a provider is known not to keep yet, each with a reason and an expiry date."""

import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from abe_contract_tests.clauses import BY_ID


@dataclass(frozen=True, slots=True)
class Waiver:
    """A clause that may fail until a date. If it passes, the waiver must be removed."""

    clause: str
    reason: str
    expires: date
    harness: str | None = None
    """The provider; None: every provider of the run."""

    @property
    def expired(self) -> bool:
        """Whether its last day has passed."""
        return date.today() > self.expires


def read_waivers(path: str | None) -> tuple[Waiver, ...]:
    """Read the ``[[waiver]]`` tables of a TOML file.

    Raises:
        pytest.UsageError: The file cannot be read, or a waiver is incomplete.
    """
    if path is None:
        return ()
    try:
        tables = tomllib.loads(Path(path).read_text()).get("waiver", [])
        return tuple(_waiver(table) for table in tables)
    except (OSError, ValueError, TypeError) as exc:
        raise pytest.UsageError(f"{path}: {exc}") from exc


def _waiver(table: dict[str, Any]) -> Waiver:
    waiver = Waiver(**table)
    if waiver.clause not in BY_ID:
        raise ValueError(f"{waiver.clause} is not a clause of the contract")
    if type(waiver.expires) is not date:
        raise ValueError(f"{waiver.clause}: expires must be a date, such as 2030-01-31, not {waiver.expires!r}")
    if not waiver.reason.strip():
        raise ValueError(f"{waiver.clause}: a waiver needs its reason")
    return waiver

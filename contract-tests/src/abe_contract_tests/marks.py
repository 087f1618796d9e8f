"""The mark that ties a test to its clauses, and runs a negative probe in its place if a capability is not declared."""

from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, cast

import pytest

from abe.backends.message_queue.base import Capabilities
from abe_contract_tests.clauses import BY_ID
from abe_contract_tests.contract import Contract
from abe_contract_tests.probes import PROBES

MARK: Final = "contract_clause"

_Test = TypeVar("_Test", bound=Callable[..., Coroutine[Any, Any, None]])


def clause(
    *ids: str, capability: str | None = None, three_methods: bool = False, transport: bool = False
) -> Callable[[_Test], _Test]:
    """Mark a test as one that proves clauses.

    Args:
        ids: The clauses.
        capability: A field of `Capabilities`. Where the backend does not declare it, the test is replaced by that capability's
            negative probe: using it must raise `UnsupportedCapabilityError` at the call. A clause that has a capability of its own
            brings it along.
        three_methods: The test uses ``publish``, ``consume`` and ``from_env`` only, so that it also runs against a provider that has
            nothing else.
        transport: The test uses the provider's transport without the engine, so that it runs against a `TransportBackend` only.

    Raises:
        ValueError: A clause or the capability does not exist.
    """
    unknown = [id for id in ids if id not in BY_ID]
    if unknown or not ids:
        raise ValueError(f"not clauses of the contract: {unknown}" if unknown else "a test must name its clauses")
    needed = {item.capability for id in ids if (item := BY_ID[id]).capability} | ({capability} - {None})
    unless = {item.unless for id in ids if (item := BY_ID[id]).unless}
    if not needed <= Capabilities.__dataclass_fields__.keys():
        raise ValueError(f"Capabilities has no field {capability!r}")

    def decorate(test: _Test) -> _Test:
        checked = _conditional(test, sorted(filter(None, needed)), sorted(filter(None, unless)))
        # Marked explicitly, so that they run with any asyncio_mode of the project.
        marked: _Test = pytest.mark.asyncio(
            pytest.mark.contract_clause(*ids, three_methods=three_methods, transport=transport)(checked)
        )
        return marked

    return decorate


def _conditional(test: _Test, needed: Sequence[str], unless: Sequence[str]) -> _Test:
    if not needed and not unless:
        return test
    if not iscoroutinefunction(test):
        raise TypeError(f"{test.__name__}: only a plain coroutine function can be tied to a capability")

    @wraps(test)
    async def run_or_probe(**arguments: Any) -> None:
        contract: Contract = arguments["contract"]
        undeclared = [name for name in needed if not contract.declares(name)]
        excused = [name for name in unless if contract.declares(name)]
        for name in undeclared:
            await probe(contract, name)
        contract.excused.extend(excused)
        if not undeclared and not excused:
            await test(**arguments)

    return cast("_Test", run_or_probe)


async def probe(contract: Contract, capability: str) -> None:
    """Assert that using the undeclared capability is refused."""
    contract.probed.append(capability)
    await PROBES[capability](contract)

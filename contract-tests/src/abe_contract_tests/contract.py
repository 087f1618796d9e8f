"""The fixture of a clause test: the `Contract` of one backend, in a unique namespace."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import patch

from abe.backends.message_queue.base import Capabilities
from abe.backends.message_queue.minimal import MinimalBackend
from abe.settings import QueueSettings
from abe.types import MessageQueuePayload
from abe_contract_tests import timeline
from abe_contract_tests.accounting import Accounting
from abe_contract_tests.blocking import trusted
from abe_contract_tests.bounds import allowance, slowness, within
from abe_contract_tests.clauses import declares
from abe_contract_tests.harness import Harness, Oracle
from abe_contract_tests.oracles import OneByOne
from abe_contract_tests.worker import Worker, WorkerFunction, start_worker

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

DEFAULT_BOUND: Final = 10.0
"""The bound of a wait without an explicit one, in seconds; nothing in the contract takes longer on an idle machine."""

DEFAULT_LEASE: Final = 1.0
"""In seconds: short, so that tests of expired leases are quick; long enough to be renewed in time on a machine that is not too busy."""

LONGEST_LEASE: Final = 5.0
"""The longest lease of a test in seconds, on the busiest machine."""

_PUBLISH_TIMEOUT: Final = QueueSettings().publish_timeout


class Contract:
    """One test's view of the provider under test, in a fresh random namespace. The fixture ``contract`` makes it and cleans up."""

    def __init__(self, harness: Harness) -> None:
        self.harness: Final = harness
        self.lease: Final = _lease()
        """The lease that the backends are configured with, in seconds."""
        self.namespace: Final = f"contract-{token_hex(6)}"
        self.broker: Final = harness.broker_version()
        self.logs: Final[list[logging.LogRecord]] = []
        """The records of the loggers ``abe*`` during the test, at every level."""
        self.probed: Final[list[str]] = []
        """Undeclared capabilities, whose negative probes ran in place of the test."""
        self.excused: Final[list[str]] = []
        """Declared capabilities that excuse from the test."""
        self._backends: list[Any] = []
        self._workers: list[Worker] = []
        self._oracle: Oracle | None = None
        self._serial = itertools.count()

    @property
    def backend_class(self) -> "type[TransportBackend]":
        """The production class."""
        return cast("type[TransportBackend]", self.harness.backend)

    def backend(self, **overrides: str) -> "TransportBackend":
        """Make a backend with ``from_env()``, as an application does. It is closed at the end of the test.

        Args:
            overrides: Environment variables on top of the harness's; empty means unset.
        """
        with self.environ(**overrides):
            backend = self.backend_class.from_env()
        timeline.note(f"backend {id(backend):x} is made {overrides or ''}")
        self._backends.append(backend)
        return backend

    def environment(self, **overrides: str) -> Mapping[str, str]:
        """Return the environment variables of this test's backends."""
        timeouts = {"QUEUE_PUBLISH_TIMEOUT_SECONDS": f"{_PUBLISH_TIMEOUT * allowance():.1f}"}
        with trusted():
            return {**timeouts, **self.harness.environment(self.namespace, lease=self.lease), **overrides}

    def unreachable(self) -> Mapping[str, str]:
        """Return an environment whose broker refuses connections (networked only)."""
        with trusted():
            return self.harness.unreachable(self.namespace)

    def wrong_credentials(self) -> tuple[Mapping[str, str], str] | None:
        """Return an environment with wrong credentials, and the secret in it; None if the broker has no credentials."""
        with trusted():
            return self.harness.wrong_credentials(self.namespace) if self.harness.networked else None

    @contextmanager
    def environ(self, **overrides: str) -> Generator[None]:
        """Set the variables of `environment` in ``os.environ`` for the body."""
        with patch.dict(os.environ, self.environment(**overrides)):
            yield

    @property
    def capabilities(self) -> Capabilities:
        """The declared capabilities of this test's backends; those of every minimal backend where none are declared."""
        with self.environ():
            backend = self.backend_class.from_env()
        declared: Capabilities = getattr(backend, "capabilities", MinimalBackend.capabilities)
        return declared

    def declares(self, capability: str) -> bool:
        """Whether that field of the capabilities is declared."""
        return declares(self.capabilities, capability)

    def undeclared(self) -> list[str]:
        """Return the capabilities that the backend does not declare."""
        return [name for name in Capabilities.__dataclass_fields__ if not self.declares(name)]

    async def oracle(self) -> Oracle:
        """Return the oracle, which observes the broker with its native client."""
        if self._oracle is None:
            with trusted():
                self._oracle = OneByOne(await self.harness.oracle(self.namespace))
        return self._oracle

    def bound(self, *parts: float | str) -> float:
        """Return a bound in seconds, multiplied by `slowness`.

        Args:
            parts: The terms of a sum: seconds, or the name of a declared time, ``"lease"`` or a capability such as
                ``"redelivery_bound"``. Without any: `DEFAULT_BOUND`.
        """
        return self._seconds(*parts) * slowness()

    def within(self, *parts: float | str) -> asyncio.Timeout:
        """Bound a wait: ``async with contract.within(5):``. Every wait of a test goes through it.

        Args:
            parts: As in `bound`; it is extended by `slowness` while it lasts.
        """
        seconds = self._seconds(*parts)
        # A bound this long is the bound of a whole test, not one of the contract.
        return within(seconds * self.harness.pace if seconds >= DEFAULT_BOUND else seconds)

    def _seconds(self, *parts: float | str) -> float:
        return sum(map(self._declared, parts)) if parts else DEFAULT_BOUND

    def _declared(self, part: float | str) -> float:
        if not isinstance(part, str):
            return part
        declared = self.lease if part == "lease" else getattr(self.capabilities, part)
        assert isinstance(declared, int | float), f"{part} is not declared, so nothing can be bounded by it"
        return declared

    def many(self, count: int) -> int:
        """Return `count`, or the harness's capacity if that is smaller."""
        return min(count, self.harness.capacity)

    def apart(self, items: Sequence[tuple[str, MessageQueuePayload]]) -> Sequence[tuple[str, MessageQueuePayload]]:
        """Return items that can be in flight together: if the broker orders the messages of a key, each item gets its own key."""
        if not self.capabilities.ordered_per_key:
            return items
        return [(f"{key}.{next(self._serial)}", payload) for key, payload in items]

    def worker(self, function: WorkerFunction, **arguments: Any) -> AbstractAsyncContextManager[Worker]:
        """Run ``async def function(backend, report, receive, **arguments)`` as another member of the application; see `Worker`.

        Args:
            function: A module-level function. ``report(value)`` sends a JSON value to the test, ``await receive()`` waits for one from it;
                `backend` is made by ``from_env()`` in the worker, and is closed when the function returns.
            arguments: JSON values.
        """
        return self._worker(function, {}, arguments)

    def worker_with(
        self, overrides: Mapping[str, str], function: WorkerFunction, **arguments: Any
    ) -> AbstractAsyncContextManager[Worker]:
        """Like `worker`, with environment variables on top of the harness's."""
        return self._worker(function, overrides, arguments)

    @asynccontextmanager
    async def _worker(
        self, function: WorkerFunction, overrides: Mapping[str, str], arguments: Mapping[str, Any]
    ) -> AsyncGenerator[Worker]:
        worker = await start_worker(self.harness, self.environment(**overrides), function, arguments)
        self._workers.append(worker)
        try:
            yield worker
        finally:
            await worker.kill()

    def accounting(self) -> Accounting:
        """Return an empty `Accounting` for one group."""
        return Accounting()

    @contextmanager
    def capturing(self) -> Generator[None]:
        """Collect the library's log records in `logs`, while the test runs."""
        root, library = logging.getLogger(), logging.getLogger("abe")
        handler, level = _Collector(self.logs), library.level
        root.addHandler(handler)
        library.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            library.setLevel(level)
            root.removeHandler(handler)

    async def aclose(self) -> None:
        """Close the test's backends, the newest first, and remove its data from the broker."""
        problems: list[Exception] = []
        for backend in reversed(self._backends):
            if (close := getattr(backend, "disconnect", None)) is None:
                continue
            try:
                async with self.within():
                    await close()
            except Exception as exc:
                problems.append(exc)
        if self._oracle is not None:
            await self._oracle.aclose()
        with trusted():
            await self.harness.clean(self.namespace)
        if problems:
            raise ExceptionGroup("closing the backends of the test failed", problems)


def _lease() -> float:
    # A lease is renewed while at least half of it is left, and a machine half as fast as usual needs less than that.
    return min(max(DEFAULT_LEASE, DEFAULT_LEASE * round(allowance() / 2)), LONGEST_LEASE)


class _Collector(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.DEBUG)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("abe"):
            self.records.append(record)

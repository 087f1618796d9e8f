"""Makes calls on a transport: in the event loop that owns it, connected, and within a time limit."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.transport import Transport
from abe.backends.message_queue.engine.session import Session
from abe.errors import AbeError, BackendClosedError, BackendConnectionError, EventLoopError
from abe.settings import QueueSettings

_T = TypeVar("_T")
_log: Final = Log("abe.engine")
_BACKOFF: Final = ExponentialBackoff(initial=0.05, maximum=1.0)


class Calls:
    """Opens a session when it is first needed, and makes calls on it.

    Args:
        make_transport: Returns a new transport for the running event loop.
        settings: The backend's settings.
    """

    def __init__(self, make_transport: Callable[[], Transport], settings: QueueSettings) -> None:
        self._make_transport = make_transport
        self._settings = settings
        self.session: Session | None = None
        self.closed: bool = False

    def here(self) -> Session:
        """Return the session of the running event loop; begin one if there is none.

        Raises:
            BackendClosedError: The backend was closed.
            EventLoopError: It belongs to another event loop.
        """
        loop, session = asyncio.get_running_loop(), self.session
        if session is not None and session.loop is loop and (self.closed or not session.ended):
            return session
        if self.closed:
            raise BackendClosedError("the backend was closed; connect() opens it again")
        if session is not None and session.loop is not loop and not session.loop.is_closed():
            raise EventLoopError(
                "the backend belongs to another event loop, or to the process that forked this one: make one backend for each"
            )
        session = self.session = Session(self._make_transport(), self._settings)
        return session

    async def connect(self) -> None:
        """Connect without retries; opens a closed backend again."""
        self.closed = False
        await self.call(_nothing, patient=False)

    async def close(self) -> None:
        """End the session, if there is one."""
        self.closed = True
        session = self.session
        if session is not None and not session.loop.is_closed():
            if session.loop is not asyncio.get_running_loop():
                raise EventLoopError("disconnect() must run in the event loop in which the backend was used")
            await session.close()
        if self.session is session:
            self.session = None

    async def call(
        self, operation: Callable[[Session], Awaitable[_T]], *, patient: bool = True, groups: bool = True
    ) -> _T:
        """Run an operation on the connected transport, within `publish_timeout`.

        Args:
            operation: The operation.
            patient: Whether to retry it after a lost connection.
            groups: Whether the groups of the settings must exist with their patterns; False for operations that can correct that.
        """
        session, tries = self.here(), 0
        error: BackendConnectionError | None = None
        bound = asyncio.timeout(self._settings.publish_timeout)
        session.calls[bound] = None
        try:
            async with bound:
                while True:
                    if session.ended:
                        raise BackendClosedError("the backend was closed")  # and must not reconnect
                    try:
                        await session.opened(groups=groups)
                        return await operation(session)
                    except BackendConnectionError as exc:
                        if not patient:
                            raise
                        error, tries = exc, tries + 1
                    await session.pause(_BACKOFF(tries))
        except TimeoutError as exc:
            if session.ended:
                raise BackendClosedError("the backend was closed") from exc
            why = f": {error}" if error else ""
            text = f"the broker did not answer within {self._settings.publish_timeout:g} s{why}"
            raise BackendConnectionError(text) from error or exc
        finally:
            session.calls.pop(bound, None)

    async def steps(self, start: Callable[[Transport], AsyncGenerator[_T]]) -> AsyncGenerator[_T]:
        """Iterate over an operation's steps, each within `publish_timeout`.

        The first step is retried after a lost connection. A later one is not: the transport has lost its position.
        """
        session = self.here()
        steps, step = await self.call(partial(_first, start))
        try:
            while step:
                yield step[0]
                if self.here() is not session:
                    raise BackendClosedError("the backend was closed in the middle")
                step = await self.call(partial(_next, steps), patient=False)
        finally:
            if session.loop is asyncio.get_running_loop():
                await self._end(session, steps)

    async def _end(self, session: Session, steps: AsyncGenerator[_T]) -> None:
        bound = asyncio.timeout(self._settings.publish_timeout)
        session.calls[bound] = None
        try:
            async with bound:
                await steps.aclose()
        except (AbeError, TimeoutError) as exc:
            _log.debug("an operation in steps could not be closed: %r", exc)
        finally:
            session.calls.pop(bound, None)


async def _nothing(_: Session) -> None:
    """Do nothing: `call` has connected before."""


async def _first(
    start: Callable[[Transport], AsyncGenerator[_T]], session: Session
) -> tuple[AsyncGenerator[_T], list[_T]]:
    steps = start(session.transport)
    return steps, await _next(steps, session)


async def _next(steps: AsyncGenerator[_T], _: Session) -> list[_T]:
    """Return the next step, none at the end."""
    async for step in steps:
        return [step]
    return []

"""The session: who joins, leaves and asks while it is opened and closed."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from engine_doubles import ScriptedReceiver, inbox_on, turns, within

from abe.backends.message_queue.base import Batching, Delivery, Publication
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.session import Session
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendClosedError, ConfigurationError
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend


class JoiningTransport:
    """Lets somebody join once `gate` is set, and notes in which order things are closed."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.gate = asyncio.Event()
        self.closed: list[str] = []
        self.batching = Batching(messages=1, bytes=1, max_concurrent=1)
        self._deliveries = deliveries

    async def subscribe(self, group: str, prefetch: int) -> ScriptedReceiver:
        await self.gate.wait()
        receiver = ScriptedReceiver(*self._deliveries)

        async def close() -> None:
            await turns(3)
            self.closed.append(group)

        receiver.close = close  # type: ignore[method-assign]
        return receiver

    async def close(self) -> None:
        self.closed.append("transport")


class TestSession:
    @pytest.fixture
    def transport(self) -> JoiningTransport:
        return JoiningTransport()

    @pytest.fixture
    async def session(self, transport: JoiningTransport) -> Session:
        fake: Any = transport
        return Session(fake, QueueSettings(close_timeout=0.5))

    @pytest.fixture
    def join(self, session: Session, manual_clock: ManualClock) -> Callable[[str], asyncio.Task[Inbox]]:
        def join(group: str) -> asyncio.Task[Inbox]:
            def inbox(receiver: Any) -> Inbox:
                return inbox_on(receiver, manual_clock, left=lambda left: session.inboxes.pop(left, None))

            return asyncio.create_task(session.join(group, 1, inbox))

        return join

    async def test_who_is_joining_when_it_is_closed_leaves_before_the_connection_ends(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        closing = asyncio.create_task(session.close())
        await turns()
        transport.gate.set()
        await within(closing)
        assert transport.closed == ["g", "transport"]
        with pytest.raises(BackendClosedError):
            await joining

    async def test_nobody_joins_once_it_is_being_closed(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        transport.gate.set()
        await within(session.close())
        with pytest.raises(BackendClosedError):
            await within(join("g"))
        assert transport.closed == ["transport"]

    async def test_who_is_cancelled_while_joining_leaves_again(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        joining.cancel()
        await asyncio.wait([joining])
        transport.gate.set()
        await turns()
        assert transport.closed == ["g"]
        assert not session.inboxes

    async def test_a_broker_that_does_not_answer_keeps_nobody_from_closing(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        await within(session.close())
        assert transport.closed == ["transport"]
        joining.cancel()

    async def test_closing_ends_the_calls_that_a_broken_client_leaves_waiting(
        self, memory_backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await memory_backend.declare("g")

        async def never(*_: Any, **__: Any) -> None:
            await asyncio.Event().wait()

        for name in ("declare", "subscribe"):
            with monkeypatch.context() as patch:
                await memory_backend.connect()
                session = memory_backend._calls.session
                assert session is not None
                patch.setattr(session.transport, name, never)
                waiting = asyncio.create_task(memory_backend.consume(group="g").receive())
                await turns()
                session._close_timeout = 0.1
                await within(memory_backend.disconnect())
                with pytest.raises(BackendClosedError):
                    await within(waiting)

    async def test_what_is_asked_while_it_is_closed_does_not_connect_it_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.connect()
        session = memory_backend._calls.session
        assert session is not None
        closing, gate, opened = asyncio.Event(), asyncio.Event(), list[bool]()

        async def close() -> None:
            closing.set()
            await gate.wait()

        async def reopen() -> None:
            opened.append(True)

        session.transport.close = close  # type: ignore[method-assign]
        session.transport.open = reopen  # type: ignore[method-assign]
        disconnecting = asyncio.create_task(memory_backend.disconnect())
        await within(closing.wait())
        for call in (memory_backend.ping(), memory_backend.groups(), memory_backend.dead_letters().list()):
            with pytest.raises(BackendClosedError):
                await within(call)
        gate.set()
        await within(disconnecting)
        assert not opened

    async def test_groups_of_the_settings_that_have_other_patterns_stop_everything_but_what_mends_that(self) -> None:
        other = fresh_memory_backend()
        settings = QueueSettings(namespace=other.settings.namespace, groups={"billing": ("b",)})
        await other.declare("billing", ["a"])
        backend = MemoryBackend(settings)
        for call in (backend.connect(), backend.publish("b", {}), backend.stats("billing")):
            with pytest.raises(
                ConfigurationError, match=r"'billing' has the key patterns 'a', and QUEUE_GROUPS asks for 'b'"
            ):
                await within(call)
        await within(backend.declare("billing", ["b"]))
        await within(backend.publish("b", {}))
        assert (await within(backend.stats("billing"))).waiting == 1
        await backend.disconnect()
        await other.disconnect()

    async def test_times_of_ones_own_among_many_are_checked_before_anything_is_sent(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("g")
        with pytest.raises(ConfigurationError, match="message #1"):
            await memory_backend.publish_many([Publication("k", {}), Publication("k", {}, timeout=-1)])
        assert (await memory_backend.stats("g")).waiting == 0
        await memory_backend.publish_many([Publication("k", {}), Publication("k", {}, timeout=5)])
        assert (await memory_backend.stats("g")).waiting == 2

    async def test_nobody_goes_on_joining_if_the_transport_fails_to_close(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        async def fails() -> None:
            raise ZeroDivisionError

        transport.close = fails  # type: ignore[method-assign]
        joining = join("g")
        await turns()
        with pytest.raises(ZeroDivisionError):
            await within(session.close())
        await within(asyncio.wait([joining]))
        assert joining.cancelled()

    async def test_one_that_fails_while_it_is_closed_does_not_cut_the_others_off(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        transport.gate.set()
        for group in ("a", "b", "c"):
            await join(group)

        async def fails(_: float | None) -> None:
            raise ZeroDivisionError

        next(iter(session.inboxes)).close = fails  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await within(session.close())
        assert transport.closed[-1] == "transport"
        assert len(transport.closed) == 3

    async def test_a_disconnect_that_was_cancelled_leaves_a_backend_that_can_be_opened_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("g")
        closing = asyncio.create_task(memory_backend.disconnect())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await memory_backend.connect()
        await memory_backend.publish("k", {})
        assert (await memory_backend.stats("g")).waiting == 1

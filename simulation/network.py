"""The connections between hosts and the broker: what is asked takes time, gets lost, or comes twice."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from abe.errors import AbeError, BackendConnectionError, PermissionDeniedError
from abe.testing.simulation.world import Host
from simulation.broker import Broker
from simulation.faults import Faults, ProviderFaultError

_T = TypeVar("_T")


def not_reached(text: str) -> AbeError:
    """Return the error of a request that did not reach the broker."""
    return BackendConnectionError(f"simulated: {text}")


class Connection:
    """What one host's transport asks the broker through. Each request is served by a task in the broker's process.

    Without latency there is no network: a request is a call in the host's own event loop, as the memory transport's are.

    Args:
        broker: The broker.
        host: Whose it is.
        faults: What happens to its requests.
    """

    def __init__(self, broker: Broker, host: Host, faults: Faults) -> None:
        self.broker = broker
        self.host = host
        self.faults = faults
        self.down_until = 0.0
        """Until when it cannot be made again, by the world's time."""
        self.broken: Callable[[], object] | None = None
        """Has the broker see that a consumer's connection is lost."""
        self._unseen = False
        self._open: dict[asyncio.Future[Any], str] = {}

    @property
    def local(self) -> bool:
        """Whether a request is a call in the host's own event loop."""
        return not self.faults.plan.latency

    def cut(self, seconds: float = 0.0) -> None:
        """Break the connection: what is under way has no answer. It can be made again after so many seconds."""
        self.down_until = max(self.down_until, self.broker.world.now + seconds)
        self.trouble("cut", f"for {seconds:.3f} s, {len(self._open)} requests under way", seconds)
        self.lost()
        for answer in self._open:
            _give_up(answer)

    def lost(self) -> None:
        """Have the broker see, soon, that the connection is lost."""
        self._unseen = True
        self.broker.host.loop.call_later(self.faults.random.random(), self.see_loss)

    def see_loss(self) -> None:
        """Have the broker see that the connection was lost, if it was and that was not seen yet."""
        if self._unseen and self.broken is not None:
            self.broken()
        self._unseen = False

    def trouble(self, kind: str, what: str, seconds: float = 0.0) -> None:
        """Take note of a fault."""
        history = self.broker.history
        history.note(self.host.name, kind, what)
        history.trouble(self.host.name, seconds)
        if kind == "bug":
            history.buggy[self.host.name] = True

    async def ask(
        self,
        what: str,
        work: Callable[[], Coroutine[Any, Any, _T]],
        unknown: Callable[[str], AbeError] = not_reached,
        *,
        waits: bool = False,
    ) -> _T:
        """Have the broker do something, and return its answer.

        Args:
            what: A name for it, for the trace.
            work: Does it, in the broker's process.
            unknown: Makes the error of a request that has no answer.
            waits: Whether the broker may wait for long before it answers, so that silence means nothing.

        Raises:
            BackendConnectionError: The request did not reach the broker.
            PermissionDeniedError: The broker refuses it.
            AbeError: As `unknown`.
            ProviderFaultError: What no transport may raise.
        """
        fault = self.faults.draw()
        if fault == "entry":
            fault = ""
        if fault:
            self.trouble(fault, what)
        if self.broker.world.now < self.down_until:
            await self._pass(self.faults.latency(""))
            raise not_reached(f"{what}: no connection")
        if fault == "refused":
            await self._pass(self.faults.latency(fault))
            raise not_reached(f"{what}: refused")
        if fault == "forbidden":
            raise PermissionDeniedError(f"simulated: {what}: forbidden")
        if fault == "bug" and self.faults.random.random() < 0.5:
            raise ProviderFaultError(f"{what}, before")
        answer = await (
            self._call(what, work, unknown, fault) if self.local else self._send(what, work, unknown, fault, waits)
        )
        if fault == "bug":
            raise ProviderFaultError(f"{what}, after")
        return answer

    async def _call(
        self, what: str, work: Callable[[], Coroutine[Any, Any, _T]], unknown: Callable[[str], AbeError], fault: str
    ) -> _T:
        """Do it here."""
        if fault == "request_lost":
            raise unknown(f"simulated: {what}: lost on the way")
        if fault == "slow" and what != "ack":  # which never waits, by what `Settling.at_once` says
            await self._pass(self.faults.latency(fault))
        result = await work()
        if fault == "answer_lost":
            raise unknown(f"simulated: {what}: the answer was lost")
        return result

    async def _send(
        self,
        what: str,
        work: Callable[[], Coroutine[Any, Any, _T]],
        unknown: Callable[[str], AbeError],
        fault: str,
        waits: bool,
    ) -> _T:
        """Send it to the broker, and wait for the answer."""
        answer: asyncio.Future[_T] = self.host.loop.create_future()
        self._open[answer] = what
        timer = None
        if fault != "request_lost":
            self._later(self.broker.host, fault, lambda: self._serve(work, answer, fault))
        if fault in ("request_lost", "answer_lost") or not waits:
            silence = self.faults.plan.silence
            timer = self.host.loop.call_later(silence, _give_up, answer)
        try:
            return await answer
        except _NoAnswerError:
            self.trouble("silence", what)
            raise unknown(f"simulated: {what}: no answer") from None
        finally:
            del self._open[answer]
            if timer is not None:
                timer.cancel()

    def _serve(self, work: Callable[[], Coroutine[Any, Any, _T]], answer: "asyncio.Future[_T]", fault: str) -> None:
        """Do it in the broker's process, and send the answer."""
        task = self.broker.host.start(work())

        def done(_: object) -> None:
            if not task.cancelled():
                task.exception()  # it is the host's
            if fault == "answer_lost" or self.host.dead:
                return
            self._later(self.host, fault, lambda: _settle(answer, task))

        task.add_done_callback(done)

    async def _pass(self, seconds: float) -> None:
        if seconds:
            await asyncio.sleep(seconds)

    def _later(self, host: Host, fault: str, callback: Callable[[], object]) -> None:
        seconds = self.faults.latency(fault)
        if fault == "slow":
            self.broker.history.trouble(self.host.name, seconds)
        if not host.dead:
            host.loop.call_later(seconds, callback)


class _NoAnswerError(Exception):
    """No answer will come."""


def _give_up(answer: "asyncio.Future[Any]") -> None:
    if not answer.done():
        answer.set_exception(_NoAnswerError())


def _settle(answer: "asyncio.Future[_T]", task: "asyncio.Task[_T]") -> None:
    if answer.done():
        return
    if task.cancelled():
        answer.set_exception(_NoAnswerError())
    elif (error := task.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())

"""Handlers whose annotations are text (``from __future__ import annotations``), which are decorated, or which ask for their Message too."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unittest.mock import AsyncMock, Mock

import pytest

from abe import Message as TheMessage
from abe.backends.message_queue.handler import CheckedHandler
from abe.backends.message_queue.threads import Threads
from abe.errors import ConfigurationError

if TYPE_CHECKING:
    from nowhere import Database, Result

    from abe import Message
    from abe.types import JSONDict

T = TypeVar("T")
PAYLOAD = {"n": 17}


@dataclass
class Order:
    n: int


async def run(handler: Any) -> Any:
    checked = CheckedHandler(handler)
    threads = Threads(1, "group") if checked.in_thread else None
    try:
        return await checked.bound(threads, None)(TheMessage(PAYLOAD))
    finally:
        if threads is not None:
            threads.close()


async def function(order: Order) -> Any:
    return order


def in_thread(order: Order) -> Any:
    return order


async def with_more(database: str, order: Order, *, dry: bool = False) -> Any:
    return order


async def returns_what_only_the_type_checker_knows(order: Order) -> Result:
    return order  # type: ignore[no-any-return]


class Methods:
    async def method(self, order: Order) -> Any:
        return order

    def in_thread(self, order: Order) -> Any:
        return order

    @classmethod
    async def of_class(cls, order: Order) -> Any:
        return order

    @staticmethod
    async def static(order: Order) -> Any:
        return order

    async def handle_event(self, order: Order) -> Any:
        return order


class AsyncCallable:
    async def __call__(self, order: Order) -> Any:
        return order


class SyncCallable:
    def __call__(self, order: Order) -> Any:
        return order


class Base(Generic[T]):
    async def handle_event(self, event: T) -> Any:
        return event


class Concrete(Base[Order]):
    """Says what the variable stands for."""


def logged(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return wrapper


def with_database(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, database="database", **kwargs)

    return wrapper


def with_database_first(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(*args: Any) -> Any:
        return await handler("database", *args)

    return wrapper


def with_database_for_an_order(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(order: Order) -> Any:
        return await handler(order, "database")

    return wrapper


def with_database_for_a_message(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(message: Any) -> Any:
        return await handler("database", message)

    return wrapper


@logged
async def decorated(order: Order) -> Any:
    return order


@with_database
async def injected(order: Order, database: str) -> Any:
    return order if database == "database" else None


@with_database
async def injected_by_name(order: Order, *, database: Database) -> Any:
    return order if database == "database" else None


@logged
@with_database
@logged
async def injected_in_the_middle(order: Order, database: str) -> Any:
    return order if database == "database" else None


@with_database_first
async def injected_first(database: str, order: Order) -> Any:
    return order if database == "database" else None


@with_database_for_an_order
async def injected_by_position(order: Order, database: Database) -> Any:
    return order if database == "database" else None


@with_database_for_a_message
async def injected_before(database: str, message: Order) -> Any:
    return message if database == "database" else None


class Decorated:
    @logged
    async def method(self, order: Order) -> Any:
        return order

    @with_database
    async def injected(self, order: Order, database: str) -> Any:
        return order if database == "database" else None


KINDS: dict[str, Any] = {
    "function": function,
    "function in a thread": in_thread,
    "partial": functools.partial(with_more, "database"),
    "partial by keyword": functools.partial(functools.partial(with_more, "database"), dry=True),
    "unknown result": returns_what_only_the_type_checker_knows,
    "method": Methods().method,
    "method in a thread": Methods().in_thread,
    "class method": Methods.of_class,
    "static method": Methods.static,
    "handle_event": Methods(),
    "callable object": AsyncCallable(),
    "callable object in a thread": SyncCallable(),
    "generic": Concrete(),
    "decorated": decorated,
    "decorated method": Decorated().method,
    "injected": injected,
    "injected by name": injected_by_name,
    "injected in the middle": injected_in_the_middle,
    "injected first": injected_first,
    "injected by position": injected_by_position,
    "injected before": injected_before,
    "injected into a method": Decorated().injected,
    "partial of decorated": functools.partial(injected, database="database"),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "partial of decorated"])
async def test_a_handler_of_any_kind_may_have_its_annotations_as_text(kind: str) -> None:
    assert await run(KINDS[kind]) == Order(17)


async def test_types_that_are_local_to_who_makes_the_handler_are_found() -> None:
    @dataclass
    class Local:
        n: int

    async def handler(order: Local) -> Any:
        return order

    class Holder:
        async def method(self, order: Local) -> Any:
            return order

    assert await run(handler) == Local(17)
    assert await run(Holder().method) == Local(17)
    assert await run(functools.partial(handler)) == Local(17)


async def test_types_that_are_local_to_a_factory_are_found_if_the_handler_uses_them() -> None:
    def factory() -> Any:
        @dataclass
        class Local:
            n: int

        async def handler(order: Local) -> Any:
            assert isinstance(order, Local)
            return order.n

        return handler

    assert await run(factory()) == 17


async def plain(payload: JSONDict) -> Any:
    return type(payload)


async def the_message(message: Message) -> Any:
    return type(message)


async def maybe_the_message(message: Message | None) -> Any:
    return type(message)


@pytest.mark.parametrize("handler", [plain, the_message, maybe_the_message], ids=lambda handler: handler.__name__)
async def test_our_own_names_may_be_imported_for_the_type_checker_only(handler: Any) -> None:
    assert await run(handler) is TheMessage


async def both(order: Order, message: Message) -> Any:
    return order, message


async def both_the_other_way_round(message: Message, order: Order) -> Any:
    return order, message


async def both_by_keyword(order: Order, *, received: Message) -> Any:
    return order, received


async def both_by_position(order: Order, received: Message, /) -> Any:
    return order, received


async def both_by_name(order: Order, message) -> Any:  # type: ignore[no-untyped-def]
    return order, message


async def both_with_a_default(order: Order, message: Message | None = None) -> Any:
    return order, message


def both_in_a_thread(order: Order, message: Message) -> Any:
    return order, message


@with_database
async def both_and_more(order: Order, message: Message, database: str) -> Any:
    return order, message if database == "database" else None


class Both:
    async def handle_event(self, order: Order, message: Message) -> Any:
        return order, message


BOTH = [both, both_the_other_way_round, both_by_keyword, both_by_position, both_by_name, both_with_a_default]


@pytest.mark.parametrize("handler", [*BOTH, both_in_a_thread, both_and_more, Both()], ids=range(9))
async def test_a_typed_handler_may_have_its_message_too(handler: Any) -> None:
    order, message = await run(handler)
    assert order == Order(17)
    assert message == PAYLOAD
    assert type(message) is TheMessage


async def test_a_mock_is_a_handler() -> None:
    asynchronous, synchronous = AsyncMock(), Mock(return_value=None)
    await run(asynchronous)
    asynchronous.assert_awaited_once_with(PAYLOAD)
    await run(synchronous)
    synchronous.assert_called_once_with(PAYLOAD)


async def test_so_is_a_mock_of_a_service_and_what_stands_in_for_one() -> None:
    class Proxy:
        def __init__(self, service: Any) -> None:
            self._service = service

        def __getattr__(self, name: str) -> Any:
            return getattr(self._service, name)

    service = Mock(spec=Methods)
    await run(service)
    service.handle_event.assert_awaited_once_with(PAYLOAD)
    service.assert_not_called()
    assert await run(Proxy(Methods())) == Order(17)


async def unknown(order: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def only_for_the_type_checker(order: Database) -> None: ...
async def two(order: Order, other: Order) -> None: ...


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (unknown, "the handler unknown has an annotation that cannot be resolved: name 'Unknown' is not defined"),
        (only_for_the_type_checker, "has an annotation that cannot be resolved: name 'Database' is not defined"),
        (two, "the handler two must accept one positional argument.*or two.*'other'"),
        (functools.partial(with_more, database="x"), "the handler with_more must accept one positional argument"),
    ],
    ids=["unknown", "type checker", "two", "partial"],
)
def test_what_cannot_be_called_or_understood_is_refused(handler: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        CheckedHandler(handler)

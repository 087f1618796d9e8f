"""Handlers of every kind, made into one shape."""

import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import msgspec
import pydantic
import pytest

from abe.backends.message_queue.base import Message
from abe.backends.message_queue.handler import CheckedHandler
from abe.backends.message_queue.retry import Reject
from abe.backends.message_queue.threads import Threads
from abe.errors import ConfigurationError

T = TypeVar("T")
PAYLOAD = {"order_id": 17, "lines": ["tea"]}


@dataclass
class DataOrder:
    order_id: int
    lines: list[str]


class DictOrder(TypedDict):
    order_id: int
    lines: list[str]


class StructOrder(msgspec.Struct):
    order_id: int
    lines: list[str]


class ModelOrder(pydantic.BaseModel):
    order_id: int
    lines: list[str]


async def run(handler: Any, payload: dict[str, Any] | None = None) -> Any:
    """Run a handler as a consumer does, on a message with that payload."""
    checked = CheckedHandler(handler)
    threads = Threads(2, "group") if checked.in_thread else None
    try:
        return await checked.bound(threads, None)(Message(PAYLOAD if payload is None else payload))
    finally:
        if threads is not None:
            threads.close()


async def plain(message):  # type: ignore[no-untyped-def]
    return type(message)


async def annotated_dict(message: dict[str, Any]) -> object:
    return type(message)


async def annotated_message(message: Message) -> object:
    return type(message)


async def annotated_mapping(message: Mapping[str, Any]) -> object:
    return type(message)


async def annotated_any(message: Any) -> object:
    return type(message)


async def annotated_generic(message: T) -> object:
    return type(message)


async def with_a_default(message: dict[str, Any], dry: bool = False) -> object:
    return type(message)


PLAIN = [plain, annotated_dict, annotated_message, annotated_mapping, annotated_any, annotated_generic, with_a_default]


@pytest.mark.parametrize("handler", PLAIN, ids=lambda handler: handler.__name__)
async def test_a_handler_that_asks_for_no_type_gets_the_message_itself(handler: Any) -> None:
    assert await run(handler) is Message


async def data_order(order: DataOrder) -> object:
    return order


async def dict_order(order: DictOrder) -> object:
    return order


async def struct_order(order: StructOrder) -> object:
    return order


async def model_order(order: ModelOrder) -> object:
    return order


async def quoted_order(order: "DataOrder") -> object:
    return order


TYPED = [
    (data_order, DataOrder(17, ["tea"])),
    (dict_order, PAYLOAD),
    (struct_order, StructOrder(17, ["tea"])),
    (model_order, ModelOrder(order_id=17, lines=["tea"])),
    (quoted_order, DataOrder(17, ["tea"])),
]


@pytest.mark.parametrize(("handler", "expected"), TYPED, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_handlers_annotation_decides_what_it_gets(handler: Any, expected: object) -> None:
    assert await run(handler) == expected


@pytest.mark.parametrize("handler", [data_order, dict_order, struct_order, model_order], ids=lambda f: f.__name__)
async def test_a_payload_that_does_not_fit_is_rejected_and_the_reason_says_where(handler: Any) -> None:
    with pytest.raises(Reject) as caught:
        await run(handler, {"order_id": "seventeen", "lines": []})
    assert "does not fit" in caught.value.reason
    assert "order_id" in caught.value.reason
    assert caught.value.__context__ is None, "a validation error shows what it got"
    assert "seventeen" not in caught.value.reason


@pytest.mark.parametrize(
    "payload", [{}, {"order_id": 17}, {"order_id": None, "lines": []}, {"order_id": 1.5, "lines": []}]
)
async def test_what_is_missing_or_of_another_type_does_not_fit(payload: dict[str, Any]) -> None:
    for handler in (data_order, dict_order, struct_order, model_order):
        with pytest.raises(Reject):
            await run(handler, payload)


class Handler:
    """An object with `handle_event`."""

    async def handle_event(self, order: DataOrder) -> object:
        return order.order_id


class SyncHandler:
    def handle_event(self, order: DataOrder) -> object:
        return order.order_id


class AsyncCallable:
    async def __call__(self, order: DataOrder) -> object:
        return order.order_id


class SyncCallable:
    def __call__(self, order: DataOrder) -> object:
        return order.order_id


class WithMethods:
    async def method(self, order: DataOrder) -> object:
        return order.order_id

    @staticmethod
    async def static(order: DataOrder) -> object:
        return order.order_id


async def of_two(database: str, order: DataOrder) -> object:
    return order.order_id


KINDS = {
    "handle_event": Handler(),
    "sync handle_event": SyncHandler(),
    "async callable object": AsyncCallable(),
    "sync callable object": SyncCallable(),
    "bound method": WithMethods().method,
    "static method": WithMethods.static,
    "partial": functools.partial(of_two, "database"),
    "function": lambda message: message["order_id"],
    "function that returns an awaitable": lambda message: data_id(message),
}


async def data_id(message: dict[str, Any]) -> object:
    return message["order_id"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_may_be_of_any_kind(kind: str) -> None:
    assert await run(KINDS[kind]) == 17


async def test_a_synchronous_handler_runs_in_a_thread_with_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("ours")

    def handler(message: dict[str, Any]) -> object:
        return threading.current_thread().name, variable.get()

    thread, value = await run(handler)
    assert thread.startswith("abe-handler")
    assert value == "ours"


async def test_an_exception_in_a_thread_is_the_handlers() -> None:
    def handler(message: dict[str, Any]) -> None:
        raise KeyError("id")

    with pytest.raises(KeyError):
        await run(handler)


async def takes_nothing() -> None: ...
async def takes_two(message: dict[str, Any], other: int) -> None: ...
async def takes_keywords_only(*, message: dict[str, Any]) -> None: ...
async def asks_for_the_unknown(message: "NoSuchType") -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def asks_for_a_function(message: Callable[[], Awaitable[None]]) -> None: ...
async def asks_for_an_iterator(message: AsyncIterator[int]) -> None: ...


def yields(message: Any) -> Any:
    yield message


async def yields_asynchronously(message: Any) -> Any:
    yield message


class Built:
    def __init__(self, message: Any) -> None: ...


class YieldingObject:
    def __call__(self, message: Any) -> Any:
        yield message


async def asks_for_a_number(number: int) -> None: ...


async def asks_for_a_list(numbers: list[int]) -> None: ...


async def asks_for_a_number_or_nothing(number: int | None) -> None: ...


WRONG = [
    (yields, "yields contains a yield, so calling it would run nothing"),
    (yields_asynchronously, "yields_asynchronously contains a yield"),
    (YieldingObject(), "contains a yield"),
    (functools.partial(yields), "contains a yield"),
    (Built, "Built is a class: give an instance"),
    (asks_for_a_number, "asks_for_a_number asks for <class 'int'>.*a payload is always an object"),
    (asks_for_a_list, "asks_for_a_list asks for"),
    (asks_for_a_number_or_nothing, "asks_for_a_number_or_nothing asks for"),
    (takes_nothing, "takes_nothing must accept one positional argument"),
    (takes_two, "takes_two must accept one positional argument.*other"),
    (takes_keywords_only, "takes_keywords_only must accept one positional argument"),
    (asks_for_the_unknown, "asks_for_the_unknown has an annotation that cannot be resolved.*NoSuchType"),
    (asks_for_a_function, "asks_for_a_function asks for"),
    (asks_for_an_iterator, "asks_for_an_iterator asks for"),
    (None, "not NoneType"),
    ("handler", "not str"),
]


@pytest.mark.parametrize(("handler", "text"), WRONG, ids=[getattr(f, "__name__", type(f).__name__) for f, _ in WRONG])
def test_what_cannot_be_a_handler_is_refused_by_name_before_anything_runs(handler: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        CheckedHandler(handler)

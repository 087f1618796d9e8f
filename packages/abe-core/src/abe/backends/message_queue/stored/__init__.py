"""A transport over a store of messages: tables of a database, a file, a directory. A provider writes a `Store`, and no more."""

from abe.backends.message_queue.stored.store import Change, Choose, Claim, Copy, Groups, Row, Span, Store
from abe.backends.message_queue.stored.transport import StoreTransport, store_capabilities

__all__ = [
    "Change",
    "Choose",
    "Claim",
    "Copy",
    "Groups",
    "Row",
    "Span",
    "Store",
    "StoreTransport",
    "store_capabilities",
]

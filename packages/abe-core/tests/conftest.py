"""What tests of core share."""

import logging
from collections.abc import Iterator

import pytest

from abe.logging import utils

PROVIDERS = ("abe.memory", "abe.rabbitmq", "abe.redis", "abe.sqs")
TOUCHED = ("", "abe", "abe.consumer", "abe.kafka", "abe_kafka", "__main__", "asyncio", "shop", *PROVIDERS)


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging is the whole process's: what a test does to it is undone, and the switches are off."""
    monkeypatch.delenv("ABSTRACT_BACKEND_DEBUG", raising=False)
    monkeypatch.delenv("MESSAGE_QUEUE_BACKEND_DEBUG", raising=False)
    monkeypatch.setattr(utils, "_configured", set())
    monkeypatch.setattr(utils, "_of_loaded", {})
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(item, item.handlers[:], item.level, item.propagate) for item in loggers]
    for item in loggers[1:]:
        item.setLevel(logging.NOTSET)
    yield
    for item, handlers, level, propagate in before:
        for handler in item.handlers:
            if handler not in handlers:
                handler.close()
        item.handlers[:], item.propagate = handlers, propagate
        item.setLevel(level)

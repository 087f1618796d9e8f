"""What a host publishes."""

import asyncio
from typing import Any

from abe.backends.message_queue.base.middleware import Publication
from abe.errors import (
    AbeError,
    BackendClosedError,
    PartialPublishError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
)
from simulation.application import Application, Interrupted
from simulation.history import Message
from simulation.scenario import KEYS

_SLACK = 0.1
"""The part of its time by which a publish without a time of its own may be told late."""


async def publish(application: Application) -> None:
    """Publish what the host is to publish, by some tasks at once."""
    writers = application.random.choice((1, 1, 3, 8))
    share = -(-application.plan.publishes // writers)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(writers):
            tasks.create_task(_write(application, share))


async def _write(application: Application, count: int) -> None:
    random = application.random
    while count > 0 and not application.ending.is_set():
        if random.random() < 0.15:
            size = min(count, random.choice((1, 2, 7)))
            await _publish_many(application, size)
        else:
            size = 1
            await _publish_one(application)
        count -= size
        if pace := application.scenario.pace:
            await application.sleep(random.random() * pace)


async def _publish_one(application: Application) -> None:
    """Publish a message, again with the same id where it is not known whether the broker has it."""
    random = application.random
    message, options = _draw(application)
    timeout = options["timeout"] = random.choice((None, None, None, 0.2, 2.0))
    for _ in range(random.choice((1, 2, 4))):
        told = await _told(application, message, options, timeout)
        if told != "unknown":
            return


async def _told(application: Application, message: Message, options: dict[str, Any], timeout: float | None) -> str:
    """Publish once, and return what is told."""
    settings, place = application.scenario.settings, len(message.told)
    message.told.append("")
    wanting = application.wanting(message)
    application.note("publish", f"m{message.number} {message.key} {_shown(options)}")
    call = application.backend.publish(message.key, {"n": message.number}, id=f"m{message.number}", **options)
    bound = settings.publish_timeout * (1 + _SLACK) if timeout is None else timeout
    error: BaseException | None = None
    try:
        await application.bounded("publish", application.interrupted(call), bound)
    except (AbeError, Interrupted) as exc:
        error = exc
    told = message.told[place] = judged(application, message, error, mandatory=bool(options.get("mandatory")))
    if told == "confirmed":
        message.wanted_by |= wanting & application.wanting(message)
    application.note("published", f"m{message.number} {told} {_named(error)}")
    return told


async def _publish_many(application: Application, size: int) -> None:
    messages = [_draw(application) for _ in range(size)]
    publications = [
        Publication(message.key, {"n": message.number}, id=f"m{message.number}", **options)
        for message, options in messages
    ]
    wanting = [application.wanting(message) for message, _ in messages]
    for message, options in messages:
        message.told.append("")
        application.note("publish", f"m{message.number} {message.key} {_shown(options)} of {size}")
    errors: dict[int, BaseException] = {}
    try:
        await application.interrupted(application.backend.publish_many(publications))
    except PartialPublishError as exc:
        errors = dict(exc.failures)
    except (Interrupted, AbeError) as exc:
        errors = dict.fromkeys(range(size), exc)
    for place, (message, options) in enumerate(messages):
        error = errors.get(place)
        told = message.told[-1] = judged(application, message, error, mandatory=bool(options.get("mandatory")))
        if told == "confirmed":
            message.wanted_by |= wanting[place] & application.wanting(message)
        application.note("published", f"m{message.number} {told} {_named(error)}")


def judged(application: Application, message: Message, error: BaseException | None, *, mandatory: bool) -> str:
    """Return what a publisher knows after an outcome."""
    if error is None:
        return "confirmed"
    if isinstance(error, PublishUnknownError | Interrupted):
        return "unknown"
    if not isinstance(error, PublishRejectedError | BackendClosedError | PermissionDeniedError):
        application.history.violated(f"publish of m{message.number} raised {error!r}")
    if isinstance(error, BackendClosedError) and not (application.ending.is_set() or application.closings):
        application.history.violated(
            f"publish of m{message.number} raised {error!r}, and nobody has closed the backend"
        )
    return "rejected"


def _draw(application: Application) -> tuple[Message, dict[str, Any]]:
    random = application.random
    options: dict[str, Any] = {}
    group = None
    if random.random() < 0.1:
        group = options["group"] = random.choice(list(application.scenario.groups))
    if random.random() < 0.2:
        options["delay"] = random.choice((0.01, 0.5, 3.0))
    if random.random() < 0.1:
        options["mandatory"] = True
    return application.new_message(random.choice(KEYS), group), options


def _shown(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def _named(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"

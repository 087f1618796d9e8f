"""Finds installed providers by their entry points, and makes the backend that the deployment asks for."""

import difflib
import logging
import re
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from abe.backends.message_queue.base.protocol import MessageQueueBackend
from abe.errors import BackendNotFoundError
from abe.logging.utils import apply_debug_switches
from abe.settings import env_text

_log: Final = logging.getLogger("abe.loader")

ENTRY_POINT_GROUP: Final = "abe.backends.message_queue"
OLDER_ENTRY_POINT_GROUP: Final = "abe.backends.message_queue.service"
"""Where older providers registered; of two providers with one name the one in `ENTRY_POINT_GROUP` is taken."""

VARIABLES: Final = ("QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND")
_MEMORY: Final = "memory"
_OURS: Final = ("redis", "rabbitmq", "sqs")
_DISTRIBUTION: Final = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?\Z")


def installed_backends() -> dict[str, EntryPoint]:
    """Return the installed providers by name, sorted, without importing them."""
    found = {
        point.name: point
        for group in (OLDER_ENTRY_POINT_GROUP, ENTRY_POINT_GROUP)
        for point in entry_points(group=group)
    }
    return dict(sorted(found.items()))


def load_backend(name: str | None = None) -> MessageQueueBackend:
    """Return a new backend, made by its `from_env`.

    Args:
        name: The provider. None: what ``QUEUE_BACKEND`` (or ``MESSAGE_QUEUE_BACKEND``) names; else the first installed provider that is not
            memory, by name; else memory, with a warning.

    Raises:
        BackendNotFoundError: No provider of the name given is installed, or it cannot be imported. Nothing else is taken in its place.
        Exception: Whatever `from_env` raises, as it is.
    """
    apply_debug_switches()
    installed = installed_backends()
    variable = next((variable for variable in VARIABLES if env_text(variable)), None)
    if name is not None:
        chosen, source = name, "load_backend()"
    elif variable is not None:
        chosen, source = env_text(variable) or "", variable
    else:
        chosen, source = _default(installed), "the installed providers"
    if chosen not in installed:
        raise BackendNotFoundError(_unknown(chosen, source, installed))
    backend = _import(installed[chosen])
    apply_debug_switches(provider=chosen, package=backend.__module__)
    _log.info("backend %r (by %s) is %s.%s", chosen, source, backend.__module__, backend.__qualname__)
    return backend.from_env()


def _default(installed: dict[str, EntryPoint]) -> str:
    others = [name for name in installed if name != _MEMORY]
    if not others:
        warnings.warn(
            "no message-queue provider is installed and QUEUE_BACKEND is not set: messages stay in this process's memory and end with it. "
            "Install one (pip install abe-backend-redis), or set QUEUE_BACKEND=memory to keep memory without this warning",
            stacklevel=3,
        )
        return _MEMORY
    if len(others) > 1:
        warnings.warn(
            f"several message-queue providers are installed ({', '.join(others)}) and QUEUE_BACKEND is not set: taking {others[0]!r}. "
            f"Set QUEUE_BACKEND to the one that is meant",
            stacklevel=3,
        )
    return others[0]


def _import(point: EntryPoint) -> type[MessageQueueBackend]:
    try:
        backend = point.load()
    except Exception as exc:
        raise BackendNotFoundError(
            f"the provider {point.name!r} ({point.value}) is installed, but importing it fails: {type(exc).__name__}: {exc}"
        ) from exc
    missing = [method for method in ("publish", "consume", "from_env") if not callable(getattr(backend, method, None))]
    if missing:
        raise BackendNotFoundError(
            f"the provider {point.name!r} ({point.value}) is no message-queue backend: it has no {', '.join(missing)}"
        )
    return backend  # type: ignore[no-any-return]


def _unknown(name: str, source: str, installed: dict[str, EntryPoint]) -> str:
    close = next(iter(difflib.get_close_matches(name, {*installed, *_OURS}, n=1)), None)
    text = f"there is no message-queue provider {name!r} (asked for by {source}). Installed: {', '.join(installed) or 'none'}."
    if close is not None and close != name:
        text += f" Did you mean {close!r}?"
    wanted = close or name
    if _DISTRIBUTION.match(wanted):
        text += f" To install it: pip install abe-backend-{wanted}  (or: uv add abe-backend-{wanted})"
    return text

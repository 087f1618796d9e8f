"""Finds installed providers by their entry points, and creates the backend that the deployment names."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.middleware import Middleware
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.minimal import full
from abe.codec import Codec
from abe.errors import BackendNotFoundError, ConfigurationError
from abe.logging.utils import apply_debug_switches
from abe.settings import env_text, shown
from abe.spelling import warn

_log: Final = Log("abe.loader")

ENTRY_POINT_GROUP: Final = "abe.backends.message_queue"
OLDER_ENTRY_POINT_GROUP: Final = "abe.backends.message_queue.service"
"""The group of older providers. If one distribution registers a name in both groups, `ENTRY_POINT_GROUP` wins."""

VARIABLES: Final = ("QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND")
_MEMORY: Final = "memory"
_PUBLISHED: Final = ("rabbitmq", "redis", "sqs")
"""Providers that this project publishes as ``abe-backend-<name>``: no error text proposes to install any other package."""


def installed_backends() -> dict[str, EntryPoint]:
    """Return the installed providers by name, sorted, without importing them."""
    return {name: points[-1] for name, points in _found().items()}


def load_backend(
    name: str | None = None,
    *,
    middleware: Sequence[Middleware] = (),
    codec: Codec | None = None,
    environ: Mapping[str, str] | None = None,
) -> FullBackend:
    """Return a new backend, made by its `from_env`. A provider that has only the protocol's three methods is wrapped in a `MinimalBackend`.

    Args:
        name: The provider. None: the one that ``QUEUE_BACKEND`` (or ``MESSAGE_QUEUE_BACKEND``) names; else the first installed provider
            other than memory, by name; else memory, with a warning. Case and surrounding spaces are ignored.
        middleware: Wraps each publish, the first outermost.
        codec: Payload to bytes and back; None: `JSONCodec`.
        environ: What to read instead of ``os.environ``.

    Raises:
        BackendNotFoundError: The named provider is not installed, or cannot be imported. There is no fallback.
        ConfigurationError: The two variables name different providers, several distributions register the name, or the provider's
            `from_env` does not take an argument that was given.
        Exception: Any exception of `from_env`, unchanged.
    """
    apply_debug_switches(environ)
    found = _found()
    wanted, source = _wanted(name, environ, found)
    points = [point for known, named in found.items() if known.casefold() == wanted.casefold() for point in named]
    if not points:
        raise BackendNotFoundError(_unknown(wanted, source, found))
    point = _only(points)
    backend = _import(point)
    apply_debug_switches(environ, provider=point.name, package=backend.__module__)
    arguments = {"middleware": middleware or None, "codec": codec, "environ": environ}
    given = {argument: value for argument, value in arguments.items() if value is not None}
    _check_takes(point.name, backend, given)
    _log.info("backend %r (by %s) is %s.%s", point.name, source, backend.__module__, backend.__qualname__)
    return full(backend.from_env(**given))


def _found() -> dict[str, list[EntryPoint]]:
    """Return the entry points by name, those of the newer group last."""
    found: dict[str, list[EntryPoint]] = {}
    for group in (OLDER_ENTRY_POINT_GROUP, ENTRY_POINT_GROUP):
        for point in entry_points(group=group):
            found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def _wanted(
    name: str | None, environ: Mapping[str, str] | None, found: Mapping[str, list[EntryPoint]]
) -> tuple[str, str]:
    """Return the name of the wanted provider, and what names it."""
    if name is not None:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"load_backend() takes a provider's name, not a {type(name).__name__}")
        return name.strip(), "load_backend()"
    named = {variable: (env_text(variable, environ=environ) or "").strip() for variable in VARIABLES}
    named = {variable: text for variable, text in named.items() if text}
    if len({text.casefold() for text in named.values()}) > 1:
        both = " and ".join(f"{variable}={shown(text)}" for variable, text in named.items())
        raise ConfigurationError(f"{both} are both set, and they differ: unset one of them")
    for variable, text in named.items():
        return text, variable
    return _default(list(found)), "the installed providers"


def _default(installed: Sequence[str]) -> str:
    others = [name for name in installed if name != _MEMORY]
    if not others:
        warn(
            "no message-queue provider is installed and QUEUE_BACKEND is not set: messages are lost when this process ends. "
            "Install a provider (pip install abe-backend-redis), or set QUEUE_BACKEND=memory to use memory without this warning"
        )
        return _MEMORY
    if len(others) > 1:
        warn(
            f"several message-queue providers are installed ({', '.join(others)}) and QUEUE_BACKEND is not set: using {others[0]!r}. "
            f"Set QUEUE_BACKEND to the one to use"
        )
    return others[0]


def _only(points: Sequence[EntryPoint]) -> EntryPoint:
    """Return the one entry point of a name.

    An entry point without a distribution was registered by a test (`abe.testing.registered_backend`), and shadows installed ones.
    """
    for point in reversed(points):
        if point.dist is None:
            return point
    distributions = sorted({point.dist.name for point in points if point.dist is not None})
    if len(distributions) > 1:
        raise ConfigurationError(
            f"the distributions {' and '.join(distributions)} each register a message-queue provider {points[-1].name!r}: "
            f"uninstall all but one of them (pip uninstall, or uv remove)"
        )
    return points[-1]


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
            f"the provider {point.name!r} ({point.value}) is not a message-queue backend: it has no {', '.join(missing)}"
        )
    return backend  # type: ignore[no-any-return]


def _check_takes(name: str, backend: type[MessageQueueBackend], given: Mapping[str, Any]) -> None:
    """Refuse arguments for which a provider's `from_env` has no parameter: the protocol requires none."""
    try:
        parameters = inspect.signature(backend.from_env).parameters.values()
    except ValueError:
        return  # a builtin without a signature
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    taken = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    if extra := [argument for argument in given if argument not in taken]:
        raise ConfigurationError(
            f"the provider {name!r} does not take {' or '.join(extra)}: {backend.__qualname__}.from_env() has no such parameter. "
            f"Omit it, or use a provider built on abe.backends.message_queue.engine.TransportBackend"
        )


def _unknown(name: str, source: str, found: Mapping[str, list[EntryPoint]]) -> str:
    scheme, is_url, _ = name.casefold().partition("://")
    close = next(iter(difflib.get_close_matches(scheme, sorted({*found, *_PUBLISHED}), n=1)), None)
    text = f"there is no message-queue provider {shown(name)} (asked for by {source}). Installed: {', '.join(found) or 'none'}."
    if is_url:
        text += " An address belongs in the provider's own variables, such as REDIS_URL."
    if close is not None and close != name.casefold():
        text += f" Did you mean {close!r}?"
    if close in _PUBLISHED:
        return text + f" To install it: pip install abe-backend-{close}  (or: uv add abe-backend-{close})"
    if close is None:
        text += (
            f" This project publishes {', '.join(_PUBLISHED)}, as abe-backend-<name>; any other provider is a distribution that registers "
            f"a class under its name in the entry-point group {ENTRY_POINT_GROUP!r}"
        )
    return text

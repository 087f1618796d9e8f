"""Test entry points: the loader finds a test's backend as if it were an installed provider."""

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import Distribution, DistributionFinder, EntryPoint, EntryPoints
from os import PathLike
from typing import Any, cast
from uuid import uuid4

from abe.backends.message_queue.base.middleware import Middleware
from abe.backends.message_queue.base.protocol import MessageQueueBackend
from abe.backends.message_queue.loader import ENTRY_POINT_GROUP
from abe.codec import Codec
from abe.errors import ConfigurationError
from abe.testing.recording import RecordingBackend


class _TestEntryPoint(EntryPoint):
    """An entry point that loads a given object, which needs no import path."""

    def load(self) -> Any:
        return vars(self)["loaded"]


class _TestDistribution(Distribution):
    """A distribution with one entry point."""

    def __init__(self, name: str, loaded: type[MessageQueueBackend]) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: abe-testing-{uuid4().hex}\nVersion: 0\n"
        point = _TestEntryPoint(name, f"{loaded.__module__}:{loaded.__qualname__}", ENTRY_POINT_GROUP)
        vars(point)["loaded"] = loaded
        self._points = EntryPoints([point])

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise NotImplementedError("a test's distribution has no files")

    @property
    def entry_points(self) -> EntryPoints:
        return self._points


class _TestFinder(DistributionFinder):
    """Finds the test's distribution, but no modules."""

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution

    def find_spec(self, *_: object) -> None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 - the base class's signature
    ) -> Iterator[Distribution]:
        if context.name in (None, self._distribution.name):
            yield self._distribution


@contextmanager
def registered_backend(name: str, backend: type[MessageQueueBackend] | MessageQueueBackend) -> Generator[None]:
    """Register a backend under `name`, as an installed distribution would, until the block ends.

    `importlib.metadata` finds it, and so does `load_backend`, however the application imported that. It takes precedence over
    an installed provider of the same name.

    Args:
        name: The name for ``QUEUE_BACKEND`` or `load_backend`.
        backend: A class, whose `from_env` the loader calls; or an instance, which the loader returns each time. A `RecordingBackend`
            adopts the codec and middleware that `load_backend` is given; any other instance keeps its own, and refuses them.
    """
    loaded = backend if isinstance(backend, type) else _class_of(backend)
    # The loader takes the last of several distributions that register the name.
    finder = _TestFinder(_TestDistribution(name, loaded))
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _loaded(
    backend: MessageQueueBackend,
    *,
    codec: Codec | None = None,
    middleware: Sequence[Middleware] = (),
    environ: Mapping[str, str] | None = None,
) -> MessageQueueBackend:
    if isinstance(backend, RecordingBackend):
        return backend.loaded(codec=codec, middleware=middleware)
    if codec is not None or middleware:
        raise ConfigurationError(
            f"the test registered an instance of {type(backend).__name__}, which has its codec and middleware already: register the class"
        )
    return backend


def _class_of(backend: MessageQueueBackend) -> type[MessageQueueBackend]:
    base = type(backend)
    members = {
        "from_env": staticmethod(partial(_loaded, backend)),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return cast("type[MessageQueueBackend]", type(base.__name__, (base,), members))

"""A broker in a container, through testcontainers."""

import functools
import os
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, Final

from abe_contract_tests.bounds import Deadline
from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable, free_port
from abe_contract_tests.services._companion import ContainerCompanion
from abe_contract_tests.services._watchdog import Watchdog

_ATTEMPTS: Final = 5
_POLL: Final = 0.05
_ORDERLY: Final = 10
_ENGINE_TIMEOUT: Final = 60
_ENGINE_ADDRESS: Final = "unix:///var/run/docker.sock"


@functools.cache
def image_problem(image: str) -> str | None:
    """Return why no container of that image can run, or None if it can. Pulls a missing image."""
    try:
        docker, errors = import_module("docker"), import_module("docker.errors")
        import_module("testcontainers.core.container")
    except ModuleNotFoundError as exc:
        return (
            f"the Python package {exc.name} is not installed (it comes with the extra abe-contract-tests[containers])"
        )
    if not _engine_listens(os.environ.get("DOCKER_HOST") or _ENGINE_ADDRESS):
        return "no Docker engine answers; install one, or start it"
    try:
        client = docker.from_env(timeout=_ENGINE_TIMEOUT)
        try:
            _provide(client, image, errors.ImageNotFound)
        finally:
            client.close()
    except (errors.DockerException, OSError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


def _engine_listens(address: str) -> bool:
    # The client library leaks its socket if nothing listens, so that case is checked without it.
    if not address.startswith("unix://"):
        return True
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address.removeprefix("unix://"))
        except OSError:
            return False
    return True


def _provide(client: Any, image: str, not_found: type[Exception]) -> None:
    try:
        client.images.get(image)
    except not_found:
        client.images.pull(image)


class ContainerService(Service):
    """A broker in its own container, published on one port of 127.0.0.1."""

    evidence: ClassVar[str] = "container"

    def __init__(self, broker: Broker) -> None:
        """Make the service; `start` makes and starts the container."""
        self._broker = broker
        self._port = 0
        self._version = ""
        self._container: Any = None
        self._watchdog: Watchdog | None = None

    @property
    def url(self) -> str:
        """The broker's address, the same until `stop`."""
        if not self._port:
            raise RuntimeError(f"{self._broker.name} was not started: it has no address yet")
        return self._broker.url(self._port)

    @property
    def version(self) -> str:
        """The broker's name and version, empty before the first start."""
        return self._version

    def start(self) -> None:
        """Create the container, or restart the one that was killed or terminated, and return when the broker serves."""
        self.note("starts")
        try:
            if self._container is None:
                self._container = self._create()
            else:
                self._wrapped().start()
            self._await_ready()
        except BaseException:
            if not self._version:
                self.stop()
            raise

    def stop(self) -> None:
        """Remove the container and its volumes."""
        self.forget()
        container, watchdog = self._container, self._watchdog
        self._container, self._watchdog = None, None
        self._port, self._version = 0, ""
        if container is not None:
            container.stop(force=True, delete_volume=True)
        if watchdog is not None:
            watchdog.dismiss()

    def kill(self) -> None:
        """Send SIGKILL to the container's first process and wait for the end."""
        if self._container is None or self._state() not in ("running", "paused"):
            return
        if self._state() == "paused":
            self._wrapped().unpause()
        self.note("is killed")
        self._wrapped().kill()
        self._wrapped().wait()

    def terminate(self) -> None:
        """Stop the container as ``docker stop`` does; the end is enforced after ten seconds."""
        if self._container is None:
            return
        if self._state() == "paused":
            self._wrapped().unpause()
        self.note("is shut down")
        self._wrapped().stop(timeout=_ORDERLY)

    def pause(self) -> None:
        """Freeze every process of the container."""
        self._wrapped().pause()
        self.note("is frozen")

    def resume(self) -> None:
        """Resume the container."""
        self._wrapped().unpause()
        self.note("goes on")

    def beside(self, command: Sequence[str]) -> ContainerCompanion:
        """Start a program in the container."""
        if (state := self._state()) != "running":
            raise RuntimeError(f"{self._broker.name} is not running: its container is {state}")
        return ContainerCompanion(self._wrapped(), command, timeout=_ENGINE_TIMEOUT)

    def log(self) -> str:
        """Return what the broker wrote."""
        return bytes(self._wrapped().logs(tail=20)).decode(errors="replace")

    def log_size(self) -> int:
        """Return the current time: the engine has the time of each line."""
        return int(time.time())

    def log_since(self, size: int) -> str:
        """Return what it wrote since that time."""
        return "" if self._container is None else bytes(self._wrapped().logs(since=size)).decode(errors="replace")

    def _create(self) -> Any:
        errors = import_module("docker.errors")
        config = import_module("testcontainers.core.config").testcontainers_config
        # Without its image, the container that removes the others cannot start, and then none does.
        if not config.ryuk_disabled and image_problem(config.ryuk_image) is not None:
            config.ryuk_disabled = True
        for attempt in range(1, _ATTEMPTS + 1):
            port = free_port()
            container = import_module("testcontainers.core.container").DockerContainer(self._broker.image)
            if command := self._broker.container_command():
                container.with_command(list(command))
            if entrypoint := self._broker.container_entrypoint():
                container.with_kwargs(entrypoint=list(entrypoint))
            container.with_envs(**self._broker.container_environment())
            # A fixed port, so that the address outlives a restart, and on this machine alone.
            container.ports[f"{self._broker.container_port}/tcp"] = ("127.0.0.1", port)
            try:
                container.start()
            except errors.APIError as exc:
                if container.get_docker_client() and getattr(container, "_container", None) is not None:
                    container.stop(force=True, delete_volume=True)
                if "already" in str(exc) and attempt < _ATTEMPTS:
                    continue
                raise ServiceUnavailable(f"the container of {self._broker.name} cannot be started: {exc}") from exc
            self._port = port
            docker = shutil.which("docker")
            if config.ryuk_disabled and docker is not None:
                identity = container.get_wrapped_container().id
                self._watchdog = Watchdog(f"{shlex.quote(docker)} rm --force --volumes {identity}")
            return container
        raise AssertionError("unreachable: the last attempt raises")

    def _await_ready(self) -> None:
        deadline = Deadline(self._broker.start_timeout)
        reason = ""
        while not deadline.passed:
            try:
                self._version = self._broker.probe(self.url)
            except (NotReadyError, OSError) as exc:
                reason = str(exc)
            else:
                self.note("serves")
                return
            if self._state() not in ("created", "restarting", "running"):
                reason = f"the container is {self._state()}"
                break
            time.sleep(_POLL)
        raise ServiceUnavailable(
            f"{self._broker.name} in its container does not serve ({reason}); the end of its log:\n{self.log()}"
        )

    def _state(self) -> str:
        wrapped = self._wrapped()
        wrapped.reload()
        return str(wrapped.status)

    def _wrapped(self) -> Any:
        if self._container is None:
            raise RuntimeError(f"{self._broker.name} was not started: it has no container")
        return self._container.get_wrapped_container()

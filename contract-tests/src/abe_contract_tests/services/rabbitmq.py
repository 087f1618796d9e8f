"""RabbitMQ for tests: the system's, or a container's."""

import asyncio
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable, free_port
from abe_contract_tests.services._choice import choose
from abe_contract_tests.services._process import ProcessService

IMAGE_VARIABLE: Final = "ABE_TEST_RABBITMQ_IMAGE"
_IMAGE: Final = "rabbitmq:3"
_PROBE_TIMEOUT: Final = 2.0
_SERVER: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's real script: the one on PATH changes to a user of its own."""

_NODE: Final = "abe@localhost"
_GREETING: Final = b"AMQP\x00\x00\x09\x01"

# The command that changes nothing is applied after everything that the queue was sent before it: what is counted then is exact.
_SHELL: Final = """
N = list_to_atom("%s"), true = net_kernel:connect_node(N),
C = fun(M, F, A) -> rpc:call(N, M, F, A) end,
Count = fun(R) ->
  {ok, Q} = C(rabbit_amqqueue, lookup, [R]),
  case C(amqqueue, get_type, [Q]) of
    rabbit_quorum_queue ->
      Pid = C(amqqueue, get_pid, [Q]),
      C(ra, process_command, [Pid, C(rabbit_fifo, make_garbage_collection, [])]),
      {ok, O, _} = C(ra, consistent_query, [Pid, fun rabbit_fifo:overview/1]),
      X = maps:get(num_checked_out, O), {maps:get(num_messages, O) - X, X, maps:get(num_consumers, O)};
    _ -> {0, 0, 0}
  end end,
Names = fun(P) -> [R || {resource, _, _, B} = R <- C(rabbit_amqqueue, list_names, [<<"/">>]), lists:prefix(P, binary_to_list(B))] end,
Loop = fun Loop() -> case io:get_line("") of
  eof -> halt();
  Line -> case string:lexemes(string:trim(Line), " ") of
    ["count", P] -> [try {W, H, S} = Count(R), {resource, _, _, B} = R, io:format("~s ~b ~b ~b~n", [B, W, H, S]) catch _:_ -> ok end
      || R <- Names(P)];
    ["connections"] -> io:format("~b~n", [length(C(rabbit_networking, connections, []))]);
    ["delete", P] ->
      [try {ok, Q} = C(rabbit_amqqueue, lookup, [R]), C(rabbit_amqqueue, delete, [Q, false, false, <<"abe">>])
        catch _:_ -> ok end || R <- Names(P)],
      [C(rabbit_exchange, delete, [R, false, <<"abe">>]) || {resource, _, _, B} = R <- C(rabbit_exchange, list_names, []),
        lists:prefix(P, binary_to_list(B))]
  end, io:format(".~n"), Loop() end end,
Loop().
"""


class RabbitMQ(Broker):
    """A RabbitMQ node of its own, with the user guest."""

    name: ClassVar[str] = "RabbitMQ"
    address_variable: ClassVar[str] = "ABE_TEST_RABBITMQ_URL"
    container_port: ClassVar[int] = 5672
    start_timeout: ClassVar[float] = 90.0

    def __init__(self, *, image: str = _IMAGE, configuration: Sequence[str] = ()) -> None:
        """Describe a node.

        Args:
            image: The container image.
            configuration: More lines of ``rabbitmq.conf``, for a private process.
        """
        self._image = image
        self._configuration = tuple(configuration)
        self._ports: tuple[int, int] | None = None

    @property
    def image(self) -> str:
        """The container image."""
        return self._image

    def url(self, port: int) -> str:
        """Return the address."""
        return f"amqp://guest:guest@127.0.0.1:{port}/"

    def probe(self, url: str) -> str:
        """Say hello, and read the version in the answer."""
        parts = urlsplit(url)
        address = (parts.hostname or "127.0.0.1", parts.port or 5672)
        with socket.create_connection(address, timeout=_PROBE_TIMEOUT) as connection:
            connection.sendall(_GREETING)
            reply = connection.recv(4096)
        found = reply.find(b"\x07versionS")
        if not reply.startswith(b"\x01") or found < 0:
            raise NotReadyError("it does not answer as RabbitMQ does")
        size = int.from_bytes(reply[found + 9 : found + 13], "big")
        return f"RabbitMQ {reply[found + 13 : found + 13 + size].decode(errors='replace')}"

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the server's command line, with its port mapper beside it: started by the server it would outlive it."""
        if not _SERVER.exists() or shutil.which("epmd") is None:
            raise ServiceUnavailable(
                "no RabbitMQ server is installed; install the package rabbitmq-server of the system"
            )
        lines = [f"listeners.tcp.local = 127.0.0.1:{port}", "loopback_users.guest = true", *self._configuration]
        (directory / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        (directory / "enabled_plugins").write_text("[].\n")
        epmd = self._both(port)[1]
        return ["/bin/sh", "-c", f"epmd -port {epmd} -address 127.0.0.1 & exec {_SERVER}"]

    def environment(self, port: int, directory: Path) -> Mapping[str, str]:
        """Return the node's name, ports and directories."""
        distribution, epmd = self._both(port)
        return {
            "HOME": str(directory),
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": _NODE,
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        }

    def started(self, log: str) -> bool:
        """Look for the line that says so."""
        return "Starting broker... completed" in log

    def container_command(self) -> Sequence[str]:
        """Return the command of the image."""
        return ["rabbitmq-server"]

    def _both(self, port: int) -> tuple[int, int]:
        if self._ports is None:
            self._ports = free_port(), free_port()
        return self._ports


class RabbitMQShell:
    """An Erlang shell beside a node, for what AMQP cannot tell: exact counts, consumers, connections. It starts with the first question.

    Args:
        service: The node's.
        broker: Its description.
    """

    def __init__(self, service: Service, broker: RabbitMQ) -> None:
        self._service = service
        self._broker = broker
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    async def ask(self, question: str) -> Sequence[str]:
        """Return the lines of the answer."""
        return await asyncio.to_thread(self._ask, question)

    def stop(self) -> None:
        """End the shell."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def _ask(self, question: str) -> Sequence[str]:
        with self._turn:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            lines: list[str] = []
            while (line := process.stdout.readline()) != ".\n":
                if not line:
                    self._process = None
                    process.communicate()
                    raise RuntimeError(f"the shell beside RabbitMQ ended at {question!r}")
                lines.append(line.rstrip())
            return lines

    def _start(self) -> "subprocess.Popen[str]":
        service = self._service
        if not isinstance(service, ProcessService):
            raise ServiceUnavailable(
                "AMQP does not tell how many messages are held, so the suite asks the node itself: it needs a private process"
            )
        port = urlsplit(service.url).port or 0
        environment = {**os.environ, **self._broker.environment(port, service.directory)}
        return subprocess.Popen(
            ["erl", "-noshell", "-hidden", "-sname", "oracle@localhost", "-eval", _SHELL % _NODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=service.directory,
        )


def rabbitmq_service(
    *, configuration: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> tuple[Service, RabbitMQ]:
    """Return a RabbitMQ, not started yet, and its description: from ``ABE_TEST_RABBITMQ_URL``, in a container, or as a private process.

    Args:
        configuration: As in `RabbitMQ`; with any it is a private process.
        environ: Read instead of the process environment. ``ABE_TEST_RABBITMQ_IMAGE`` names the container image.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    broker = RabbitMQ(image=values.get(IMAGE_VARIABLE) or _IMAGE, configuration=configuration)
    return choose(broker, process_only=bool(configuration), environ=values), broker

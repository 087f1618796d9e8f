"""An Erlang shell beside a RabbitMQ node: what AMQP cannot tell, and what AMQP cannot do."""

import asyncio
import base64
import threading
from typing import Final, NamedTuple

from abe_contract_tests.services._base import Companion, Service

# Expressions come in as lines of base64, and are evaluated in the node. The shell has no name and no port of its own.
_PROGRAM: Final = """
Node = list_to_atom(case os:getenv("RABBITMQ_NODENAME") of
  false -> {ok, Host} = inet:gethostname(), "rabbit@" ++ Host;
  Name -> Name
end),
Evaluate = fun(Text) ->
  {ok, Tokens, _} = erl_scan:string(Text),
  {ok, Expressions} = erl_parse:parse_exprs(Tokens),
  case net_kernel:connect_node(Node) of
    true -> ok;
    _ -> throw({"no connection to", Node})
  end,
  case rpc:call(Node, erl_eval, exprs, [Expressions, []], 20000) of
    {value, Value, _} when is_binary(Value) -> Value;
    {value, Value, _} -> unicode:characters_to_binary(io_lib:format("~0tp", [Value]));
    Failure -> throw(Failure)
  end end,
Say = fun(Word, Text) -> io:format("~s ~s~n", [Word, base64:encode(Text)]) end,
Loop = fun Loop() -> case io:get_line("") of
  eof -> halt();
  Line ->
    try Say("ok", Evaluate(unicode:characters_to_list(base64:decode(string:trim(Line)))))
    catch _:Reason -> Say("error", unicode:characters_to_binary(io_lib:format("~0tp", [Reason]))) end,
    Loop()
  end end,
Loop().
"""

_COMMAND: Final = ("erl", "-noshell", "-hidden", "-sname", "undefined", "-dist_listen", "false", "-eval", _PROGRAM)

# A queue applies a command that changes nothing after all earlier ones: what is counted then is exact. A queue that is being
# made, or has no leader, is asked again.
_COUNTS: Final = """
Count = fun(Q) -> case amqqueue:get_type(Q) of
  rabbit_quorum_queue ->
    Pid = amqqueue:get_pid(Q),
    {ok, _, _} = ra:process_command(Pid, rabbit_fifo:make_garbage_collection()),
    {ok, O, _} = ra:consistent_query(Pid, fun rabbit_fifo:overview/1),
    Held = maps:get(num_checked_out, O),
    [maps:get(num_messages, O) - Held, Held, maps:get(num_consumers, O)];
  _ ->
    [V || {_, V} <- rabbit_amqqueue:info(Q, [messages_ready, messages_unacknowledged, consumers])]
end end,
Row = fun Row({resource, _, _, Name} = R, Attempts) -> case rabbit_amqqueue:lookup(R) of
  {ok, Q} ->
    try io_lib:format("~s ~b ~b ~b~n", [base64:encode(Name) | Count(Q)])
    catch _:_ when Attempts > 0 -> timer:sleep(20), Row(R, Attempts - 1) end;
  {error, not_found} -> []
end end,
iolist_to_binary([Row(R, 200) || {resource, _, _, Name} = R <- rabbit_amqqueue:list_names(<<"/">>),
  binary:longest_common_prefix([Name, %(prefix)s]) =:= byte_size(%(prefix)s)]).
"""

# An exclusive queue may end by itself, with its connection, between the look and the deletion.
_DELETE: Final = """
Ours = fun({resource, _, _, Name}) -> binary:longest_common_prefix([Name, %(prefix)s]) =:= byte_size(%(prefix)s) end,
[case rabbit_amqqueue:lookup(R) of
  {ok, Q} -> try rabbit_amqqueue:delete(Q, false, false, <<"abe">>)
    catch exit:{Gone, _} when Gone =:= normal; Gone =:= noproc -> ok end;
  {error, not_found} -> ok
end || R <- rabbit_amqqueue:list_names(<<"/">>), Ours(R)],
[rabbit_exchange:delete(R, false, <<"abe">>) || R <- rabbit_exchange:list_names(), Ours(R)],
ok.
"""

# Of a connection that is just opening or closing, no properties are known, or the process is gone.
_CLOSE: Final = """
Named = fun(C) -> try
  [{_, Table}] = rabbit_networking:connection_info(C, [client_properties]),
  lists:member({<<"connection_name">>, longstr, %(name)s}, Table)
catch _:_ -> false end end,
Found = [C || C <- rabbit_networking:connections(), %(name)s =:= <<>> orelse Named(C)],
rabbit_networking:close_connections(Found, "closed by a test"),
length(Found).
"""

_ALARM: Final = "{{resource_limit, memory, node()}, []}"


class QueueCounts(NamedTuple):
    """What a queue holds at this moment, exactly."""

    name: str
    ready: int
    unacknowledged: int
    consumers: int


class RabbitMQShell:
    """Queries a RabbitMQ node, and injects faults, by an Erlang shell beside it, which starts with the first query.

    Args:
        service: The node's. At an address, the variable ``ABE_TEST_RABBITMQ_SHELL`` must say how to reach its machine.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._companion: Companion | None = None
        self._turn = threading.Lock()

    async def evaluate(self, expressions: str) -> str:
        """Evaluate Erlang expressions in the node, and return the last one's value: a binary as text, all else as Erlang prints it.

        Args:
            expressions: Separated by commas, ended by a full stop. `rabbitmqctl` itself is such expressions.

        Raises:
            ServiceUnavailable: No shell can be had beside this node; the text says what is needed.
            RuntimeError: They fail, or the node does not answer.
        """
        return await asyncio.to_thread(self._evaluate, expressions)

    async def counts(self, prefix: str) -> list[QueueCounts]:
        """Return the exact counts of the queues whose names begin so."""
        rows = [line.split() for line in (await self.evaluate(_COUNTS % {"prefix": _binary(prefix)})).splitlines()]
        return [QueueCounts(base64.b64decode(row[0]).decode(), int(row[1]), int(row[2]), int(row[3])) for row in rows]

    async def delete(self, prefix: str) -> None:
        """Delete the queues and exchanges whose names begin so."""
        await self.evaluate(_DELETE % {"prefix": _binary(prefix)})

    async def connections(self) -> int:
        """Return how many AMQP connections are open."""
        return int(await self.evaluate("length(rabbit_networking:connections())."))

    async def close_connections(self, name: str = "") -> int:
        """Close connections from the node's side, as an operator would, and return how many.

        Args:
            name: The ``connection_name`` that the client gave; empty closes all.
        """
        return int(await self.evaluate(_CLOSE % {"name": _binary(name)}))

    async def sync(self) -> None:
        """Have the node persist which quorum queues it has.

        By itself it does so some seconds after a queue was made: killed before, it comes back with the queue empty, and
        confirmed messages are gone. A test that kills a node waits for this first.
        """
        await self.evaluate("[ok = dets:sync(Table) || Table <- dets:all()], ok.")

    async def add_user(
        self, name: str, password: str, *, configure: str = ".*", write: str = ".*", read: str = ".*"
    ) -> None:
        """Add a user, or change the rights of the one that is there: regular expressions, of which the empty one allows nothing."""
        user, rights = _binary(name), ", ".join(map(_binary, (configure, write, read)))
        await self.evaluate(
            f"case rabbit_auth_backend_internal:exists({user}) of true -> ok; "
            f'false -> ok = rabbit_auth_backend_internal:add_user({user}, {_binary(password)}, <<"abe">>) end, '
            f'ok = rabbit_auth_backend_internal:set_permissions({user}, <<"/">>, {rights}, <<"abe">>).'
        )

    async def delete_user(self, name: str) -> None:
        """Delete a user; its open connections stay."""
        await self.evaluate(f'rabbit_auth_backend_internal:delete_user({_binary(name)}, <<"abe">>).')

    async def raise_memory_alarm(self) -> None:
        """Set the node's memory alarm: connections that publish are blocked until it is cleared.

        The node stops to read from a connection at the next message's header: a message without a body still gets through.
        """
        await self.evaluate(f"rabbit_alarm:set_alarm({_ALARM}), [_ | _] = rabbit_alarm:get_alarms(), ok.")

    async def clear_memory_alarm(self) -> None:
        """Clear the memory alarm."""
        await self.evaluate(
            "rabbit_alarm:clear_alarm({resource_limit, memory, node()}), [] = rabbit_alarm:get_alarms(), ok."
        )

    def stop(self) -> None:
        """End the shell. The next query would start another."""
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.close()

    def _evaluate(self, expressions: str) -> str:
        with self._turn:
            question = base64.b64encode(expressions.encode()) + b"\n"
            # The shell may have ended since the last query, with the container that it ran in.
            answer = (b"" if self._companion is None else self._ask(question)) or self._ask(question)
            if not answer:
                raise RuntimeError("no Erlang shell starts beside RabbitMQ")
            status, text = answer.split(b" ", 1)
            result = base64.b64decode(text).decode()
            if status != b"ok":
                raise RuntimeError(f"RabbitMQ could not evaluate the expressions: {result}")
            return result

    def _ask(self, question: bytes) -> bytes:
        """Return the line of the answer, empty when the shell has ended."""
        companion = self._companion = self._companion or self._service.beside(_COMMAND)
        answer = b""
        try:
            companion.write(question)
            answer = companion.readline()
        except (BrokenPipeError, ConnectionResetError):
            return b""
        finally:
            if not answer:
                # Its next line would answer this query.
                self.stop()
        return answer


def _binary(text: str) -> str:
    """Return the text as an Erlang binary, whatever is in it."""
    return f"<<{','.join(map(str, text.encode()))}>>"

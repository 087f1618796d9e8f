"""The process of a worker: ``python -m abe_contract_tests.worker_process module:function module:Backend '{"argument": 1}'``."""

import asyncio
import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any

from abe_contract_tests import loops
from abe_contract_tests.worker import serve


def main() -> int:
    """Run the function, and report a failure on the standard output."""
    function, backend, arguments = sys.argv[1:]
    # What the function or a library prints must not end up between the reports.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(message: Any) -> None:
        lines.write(json.dumps(message) + "\n")

    try:
        loops.run(_run(_load(function), _load(backend), write, json.loads(arguments)))
    except Exception:
        write({"error": traceback.format_exc()})
        return 1
    return 0


async def _run(function: Any, backend: Any, write: Any, arguments: dict[str, Any]) -> None:
    reader = asyncio.StreamReader(limit=16 * 1024 * 1024)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )

    async def receive() -> Any:
        return json.loads(await reader.readline())

    try:
        await serve(backend.from_env(), function, lambda value: write({"report": value}), receive, arguments)
    finally:
        transport.close()


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Ends other processes with this one, even when this one is killed."""

import subprocess
from typing import Final

_SCRIPT: Final = 'IFS= read -r _ || eval "$1"'


class Watchdog:
    """Runs a shell command when this process ends without `dismiss`.

    A pipe tells: the kernel closes our end whatever ends us. (A parent-death signal would hang on the thread that
    started the broker, and the worker threads of an event loop end with the loop.)
    """

    def __init__(self, command: str) -> None:
        """Start watching.

        Args:
            command: The shell command, quoted already.
        """
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "watchdog", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Stop watching."""
        self._process.communicate(b"dismissed\n")

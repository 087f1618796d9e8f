"""The Lua scripts: each does in one step what must not be seen half done."""

from hashlib import sha1
from importlib.resources import files
from typing import Final

NAMES: Final = (
    "beat",
    "declare",
    "delete",
    "publish",
    "recover",
    "registry",
    "renew",
    "replay",
    "settle",
    "stats",
    "tick",
)


class Script:
    """A script's text, and the name by which Redis knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (files(__name__) / f"{name}.lua").read_bytes()
        self.sha = sha1(self.text).hexdigest().encode()  # noqa: S324 - Redis's own name for it, no secret


SCRIPTS: Final = {name: Script(name) for name in NAMES}

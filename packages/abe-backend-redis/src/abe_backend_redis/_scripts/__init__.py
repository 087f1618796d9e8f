"""The Lua scripts: each does in one step what must not be seen half done."""

from hashlib import sha1
from importlib.resources import files
from typing import Final

NAMES: Final = (
    "declare",
    "delete",
    "join",
    "leave",
    "page",
    "publish",
    "purge",
    "registry",
    "renew",
    "replay",
    "settle",
    "stats",
    "tick",
)
_MOVING: Final = ("declare", "page", "replay", "settle", "tick")
"""Those that need what `common` has."""


class Script:
    """A script's text, and the name by which Redis knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (_text("common") if name in _MOVING else b"") + _text(name)
        self.sha = sha1(self.text).hexdigest().encode()  # noqa: S324 - Redis's own name for it, no secret


def _text(name: str) -> bytes:
    return (files(__name__) / f"{name}.lua").read_bytes()


SCRIPTS: Final = {name: Script(name) for name in NAMES}

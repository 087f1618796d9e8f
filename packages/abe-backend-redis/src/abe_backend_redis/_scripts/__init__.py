"""The Lua scripts: each is one atomic step."""

from hashlib import sha1
from importlib.resources import files
from typing import Final

NAMES: Final = (
    "declare",
    "delete",
    "join",
    "page",
    "publish",
    "purge",
    "registry",
    "renew",
    "replay",
    "settle",
    "stats",
    "tick",
    "unregister",
)
_MOVING: Final = ("declare", "page", "replay", "settle", "tick")
"""Scripts that use the functions of ``common.lua``."""


class Script:
    """A script's text and its SHA-1, which identifies it in Redis."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (_text("common") if name in _MOVING else b"") + _text(name)
        self.sha = sha1(self.text).hexdigest().encode()  # noqa: S324 - Redis's identifier of it, not a secret


def _text(name: str) -> bytes:
    return (files(__name__) / f"{name}.lua").read_bytes()


SCRIPTS: Final = {name: Script(name) for name in NAMES}

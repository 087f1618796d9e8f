"""A backend on Redis Streams: one stream per group, with fan-out by a Lua script."""

from abe_backend_redis._backend import RedisBackend
from abe_backend_redis._settings import RedisSettings

__all__ = ["RedisBackend", "RedisSettings"]

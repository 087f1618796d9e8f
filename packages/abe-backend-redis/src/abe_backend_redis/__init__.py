"""Redis Streams as a backend: one stream for each group, fanned out by a script."""

from abe_backend_redis._backend import RedisBackend
from abe_backend_redis._settings import RedisSettings

__all__ = ["RedisBackend", "RedisSettings"]

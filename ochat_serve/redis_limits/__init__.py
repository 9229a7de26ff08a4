"""Limits that several processes or machines share, in Redis.  The only importer of ``redis``."""

from ochat_serve.redis_limits.limits import RedisLimits
from ochat_serve.redis_limits.link import check

__all__ = ["RedisLimits", "check"]

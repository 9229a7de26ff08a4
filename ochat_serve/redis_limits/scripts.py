"""What is done inside Redis, each at a stroke: nobody else's command comes between.

The sums are those of ``limits.MemoryLimits``.  Of a key named alice there are

    ochat:{alice}:requests, ochat:{alice}:tokens   buckets: level, at (Unix seconds)
    ochat:{alice}:running                          leases: id of a reservation -> when it expires
    ochat:{alice}:held                             id of a reservation -> its tokens
    ochat:{alice}:2026-02-27, ochat:{alice}:2026-02   tokens used and reserved in a day, a month

All of them expire by themselves; the braces keep a key's on one node of a cluster.  The first
argument of each script is the time, or "" for Redis' own, which is the same for all that ask.
"""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    """Lua, by whose digest Redis knows it once it has run it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
"""

# A bucket that is not there is full.  It expires a minute after it would be.
_BUCKET = """
local function available(key, limit)
  local found = redis.call('HMGET', key, 'level', 'at')
  if not found[1] then return limit end
  return math.min(limit, found[1] + math.max(0, now - found[2]) * limit / 60)
end

local function keep(key, limit, level)
  redis.call('HSET', key, 'level', level, 'at', now)
  redis.call('PEXPIRE', key, math.ceil((limit - level) * 60000 / limit) + 60000)
end
"""

# KEYS: the bucket.  ARGV: now, limit.  Returns whether the request is let in, and the level.
REQUEST = Script(
    _NOW
    + _BUCKET
    + """
local limit = tonumber(ARGV[2])
local level = available(KEYS[1], limit)
if level < 1 then return {0, tostring(level)} end
keep(KEYS[1], limit, level - 1)
return {1, tostring(level - 1)}
"""
)

# KEYS: leases, tokens held, bucket of tokens, counters of the periods that have a quota.
# ARGV: now, id, tokens, seconds of a lease, limits of parallel requests and of tokens per minute
# ("" for none); then of each counter: quota, seconds it is kept, what was used of it at least
# ("" where that is not known).
# Returns {"held", tokens, level}, or what refuses it: {"parallel", limit}, {"quota", which},
# {"tokens", limit, tokens, level}; {"unknown"}: ask again, with what was used.
RESERVE = Script(
    _NOW
    + _BUCKET
    + """
local id, tokens, lease_s = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local parallel, per_minute = tonumber(ARGV[5]), tonumber(ARGV[6])

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], dead)
  redis.call('HDEL', KEYS[2], dead)
end
if parallel and redis.call('ZCARD', KEYS[1]) >= parallel then return {'parallel', parallel} end

local counters, used_up = {}, nil
for i = 4, #KEYS do
  local quota, kept_s, before = ARGV[3 * i - 5], ARGV[3 * i - 4], ARGV[3 * i - 3]
  local used = redis.call('GET', KEYS[i])
  if before ~= '' then
    used = math.max(used or 0, before)
    redis.call('SET', KEYS[i], used, 'EX', kept_s)
  end
  if not used then return {'unknown'} end
  if quota - used <= 0 then used_up = used_up or i - 4 end
  tokens = math.min(tokens, quota - used)
  counters[i] = {used = used, kept_s = kept_s}
end
if used_up then return {'quota', used_up} end

local level = ''
if per_minute then
  tokens = math.min(tokens, per_minute)
  level = available(KEYS[3], per_minute)
  if level < tokens then return {'tokens', per_minute, tokens, tostring(level)} end
  level = level - tokens
  keep(KEYS[3], per_minute, level)
end

redis.call('ZADD', KEYS[1], now + lease_s, id)
redis.call('HSET', KEYS[2], id, tokens)
for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], math.ceil(lease_s * 1000) + 60000) end
for i, counter in pairs(counters) do
  redis.call('SET', KEYS[i], counter.used + tokens, 'EX', counter.kept_s)
end
return {'held', tokens, tostring(level)}
"""
)

# KEYS: as of RESERVE.  ARGV: now, id, tokens used, limit of tokens per minute.
# A lease is settled once; where it is gone, what was held stays used.
SETTLE = Script(
    _NOW
    + _BUCKET
    + """
local id, per_minute = ARGV[2], tonumber(ARGV[4])
local held = redis.call('HGET', KEYS[2], id)
if not held then return 0 end
redis.call('ZREM', KEYS[1], id)
redis.call('HDEL', KEYS[2], id)
local more = ARGV[3] - held
if per_minute then keep(KEYS[3], per_minute, available(KEYS[3], per_minute) - more) end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('INCRBY', KEYS[i], more) end
end
return 1
"""
)

# Whether scripts run and may write.
PROBE = Script("return redis.call('SET', KEYS[1], redis.call('TIME')[1], 'PX', 1000)")
PROBE_KEY = "ochat:probe"

-- One step of one session: whole or not at all.
--
-- KEYS: the session's hash; then those of its principal, all under one hash tag: the open sessions by when they expire;
-- the bytes of each record, and of all under 'total'; the model of each session that has one, and how many are of a
-- model under its word, which is longer than an id; the sessions that were closed, and those that have expired, by when
-- that is forgotten. Times are ms of Redis's clock.
-- ARGV: what to do, session id, version, record, model; and of the principal: most sessions, most bytes, ms without a
-- use until expiry, ms for which an end is remembered, most ends that are.
-- Returns what came of it, two values that go with it, and how many sessions have expired since the last step.

local session, open, sizes, models, closed, expired = unpack(KEYS)
local action, id, version, record, model = unpack(ARGV)
local max_sessions, max_bytes, idle_ms, remember_ms, max_ended = unpack(ARGV, 6)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiries = 0

local function size(of)
  return tonumber(redis.call('HGET', sizes, of) or 0)
end

-- A session is over: it counts no more, and its end is remembered.
local function finish(one, ended, at)
  redis.call('ZREM', open, one)
  redis.call('HINCRBY', sizes, 'total', 0 - size(one))
  redis.call('HDEL', sizes, one)
  local of = redis.call('HGET', models, one)
  if of then
    redis.call('HDEL', models, one)
    if redis.call('HINCRBY', models, of, -1) == 0 then redis.call('HDEL', models, of) end
  end
  redis.call('ZADD', ended, at + remember_ms, one)
  redis.call('ZREMRANGEBYRANK', ended, 0, -max_ended - 1)
end

local function finish_expired(one, at)
  finish(one, expired, at)
  expiries = expiries + 1
end

local function use()
  redis.call('PEXPIREAT', session, now + idle_ms)
  redis.call('ZADD', open, now + idle_ms, id)
end

local function put(new_version, more_bytes)
  redis.call('HSET', session, 'version', new_version, 'record', record)
  redis.call('HSET', sizes, id, #record)
  redis.call('HINCRBY', sizes, 'total', more_bytes)
  use()
end

local function is_remembered(ended)
  return tonumber(redis.call('ZSCORE', ended, id) or 0) > now
end

local function act()
  if action == 'sweep' then return 'swept', 0, '' end
  if action == 'count' then return 'counted', tonumber(redis.call('HGET', models, model) or 0), '' end
  if not redis.call('ZSCORE', open, id) then
    if is_remembered(expired) then return 'expired', 0, '' end
    if is_remembered(closed) then return 'closed', 0, '' end
    if action ~= 'create' then return 'missing', 0, '' end
    local sessions, bytes = redis.call('ZCARD', open) + 1, size('total') + #record
    if sessions > tonumber(max_sessions) or bytes > tonumber(max_bytes) then return 'full', sessions, bytes end
    put(1, #record)
    if model ~= '' then
      redis.call('HSET', models, id, model)
      redis.call('HINCRBY', models, model, 1)
    end
    return 'created', 1, ''
  end
  if action == 'delete' then
    finish(id, closed, now)
    redis.call('DEL', session)
    return 'deleted', 0, ''
  end
  local found = redis.call('HGET', session, 'version')
  if action == 'replace' then
    if found ~= version then return 'stale', found, '' end
    local more_bytes = #record - size(id)
    local bytes = size('total') + more_bytes
    if more_bytes > 0 and bytes > tonumber(max_bytes) then return 'full', 0, bytes end
    put(version + 1, more_bytes)
    return 'replaced', 0, ''
  end
  use()
  return 'found', found, redis.call('HGET', session, 'record')
end

-- The records of these are gone, by Redis's own expiry, or are at once.
local over = redis.call('ZRANGEBYSCORE', open, '-inf', now, 'WITHSCORES')
for i = 1, #over, 2 do
  finish_expired(over[i], over[i + 1])
end
-- A record that Redis was made to evict before its time.
if redis.call('ZSCORE', open, id) and redis.call('EXISTS', session) == 0 then
  finish_expired(id, now)
end

local what, first, second = act()

-- Last, for a Redis that is full refuses the first thing that a script writes, and nothing after it.
redis.call('ZREMRANGEBYSCORE', closed, '-inf', now)
redis.call('ZREMRANGEBYSCORE', expired, '-inf', now)

-- What is known of a principal outlives the last of its sessions for as long as that is remembered. Twice as long, so
-- that few steps have to say so.
local kept_ms = idle_ms + remember_ms
for i = 2, #KEYS do
  if redis.call('PTTL', KEYS[i]) < kept_ms then redis.call('PEXPIRE', KEYS[i], 2 * kept_ms) end
end
return { what, first, second, expiries }

"""The scripts: each moves messages from one safe place to another, as a whole.

A script that fails in the middle keeps what it has done, so each writes a message's new place
before it removes the old one.

A server whose memory is full refuses the first write of a script if it is one that may need
memory. These free what they need, so each begins with a ``ZREM`` of nothing: a full server can be
drained.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A script, and the name under which Redis keeps it."""

    text: str
    sha: str


def _script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
"""

#: Remove claims. Answers how many were there.
_ACKNOWLEDGE = """
local prefix = 'tw:' .. ARGV[1] .. ':'
local acked = 0
local function acknowledge(numbers)
  local fields = {}
  for number in string.gmatch(numbers, '%d+') do
    fields[#fields + 1] = prefix .. number
  end
  if #fields > 0 then
    acked = redis.call('HDEL', KEYS[1], unpack(fields))
    redis.call('ZREM', KEYS[2], unpack(fields))
  end
end
"""

#: Acknowledge, then claim.
#:
#: KEYS: unacked, unacked_index, unacked_leases, then the lists: those of the first priority for
#: each queue, those of the second, ...
#: ARGV: owner, numbers to acknowledge, number of the first claim, most messages, most bytes,
#: seconds of the lease, "1" to share the messages between the queues, "1" to write the claims
#: down, then for each queue what follows the message in its record.
#: Answers: how many were acknowledged, 1 if the lists are empty now, then for each message the
#: position of its list and its text.
CLAIM = _script(
    _NOW
    + _ACKNOWLEDGE
    + """
acknowledge(ARGV[2])
local first, most, room = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local lists, queues = #KEYS - 3, #ARGV - 8
local answer, records, scores, taken = {0, 0}, {}, {}, {}
local expiry = string.format('%.6f', now + tonumber(ARGV[6]))
local count = 0

local function take(list, limit)
  local had = taken[list] or 0
  local got = 0
  while got < limit and room > 0 do
    local text = redis.call('LINDEX', KEYS[3 + list], -1 - had - got)
    if not text then break end
    got = got + 1
    room = room - #text
    local field = prefix .. string.format('%d', first + count)
    count = count + 1
    records[#records + 1] = field
    records[#records + 1] = '[' .. text .. ARGV[9 + (list - 1) % queues]
    scores[#scores + 1] = expiry
    scores[#scores + 1] = field
    answer[#answer + 1] = list
    answer[#answer + 1] = text
  end
  if got > 0 then taken[list] = had + got end
end

if ARGV[7] == '1' and queues > 1 then
  for list = 1, lists do
    local left = queues - (list - 1) % queues
    take(list, math.ceil((most - count) / left))
  end
end
for list = 1, lists do take(list, most - count) end

if count > 0 then
  redis.call('ZREM', KEYS[2], '')
  if ARGV[8] == '1' then
    redis.call('HSET', KEYS[1], unpack(records))
    redis.call('ZADD', KEYS[2], unpack(scores))
    redis.call('ZADD', KEYS[3], expiry, ARGV[1])
  end
  for list, got in pairs(taken) do
    redis.call('LTRIM', KEYS[3 + list], 0, -1 - got)
  end
end
if count < most and room > 0 then
  redis.call('EXISTS', unpack(KEYS, 4))
  answer[2] = 1
end
answer[1] = acked
return answer
"""
)

#: Acknowledge, then move claimed messages to lists.
#:
#: KEYS: unacked, unacked_index, then the list for each message.
#: ARGV: owner, numbers to acknowledge, then for each message its number, RPUSH for the head of
#: the queue or LPUSH for its end, the text, or nothing for the text as it was claimed, and the
#: length of what follows it in the record.
#: Answers: how many were acknowledged, how many were moved.
SETTLE = _script(
    _ACKNOWLEDGE
    + """
acknowledge(ARGV[2])
redis.call('ZREM', KEYS[2], '')
local moved = 0
for list = 3, #KEYS do
  local at = 3 + (list - 3) * 4
  local field = prefix .. ARGV[at]
  local record = redis.call('HGET', KEYS[1], field)
  if record then
    local text = ARGV[at + 2]
    if text == '' then text = string.sub(record, 2, -1 - tonumber(ARGV[at + 3])) end
    redis.call(ARGV[at + 1], KEYS[list], text)
    redis.call('HDEL', KEYS[1], field)
    redis.call('ZREM', KEYS[2], field)
    moved = moved + 1
  end
end
return {acked, moved}
"""
)

#: Stay the owner. KEYS: unacked_index, unacked_leases. ARGV: owner, seconds, claimed numbers.
#: Answers 1 if there was no lease any more.
RENEW = _script(
    _NOW
    + """
redis.call('ZREM', KEYS[1], '')
local expiry = string.format('%.6f', now + tonumber(ARGV[2]))
local missing = redis.call('ZADD', KEYS[2], expiry, ARGV[1])
local prefix = 'tw:' .. ARGV[1] .. ':'
for number in string.gmatch(ARGV[3], '%d+') do
  redis.call('ZADD', KEYS[1], 'XX', expiry, prefix .. number)
end
return missing
"""
)

#: Owners whose lease is over. KEYS: unacked_leases.
DEAD = _script(
    _NOW
    + """
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.6f', now), 'LIMIT', 0, 1000)
"""
)

#: Move a message of a dead owner to its list. KEYS: unacked, unacked_index, unacked_leases, list.
#: ARGV: owner, field, RPUSH or LPUSH, text. Answers 1 if it was moved.
RESCUE = _script(
    _NOW
    + """
local expiry = redis.call('ZSCORE', KEYS[3], ARGV[1])
if expiry and tonumber(expiry) > now then return 0 end
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], '')
redis.call(ARGV[3], KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[1], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
"""
)

#: Forget a dead owner without claims. KEYS: unacked_leases. ARGV: owner.
FORGET = _script(
    _NOW
    + """
local expiry = redis.call('ZSCORE', KEYS[1], ARGV[1])
if expiry and tonumber(expiry) <= now then return redis.call('ZREM', KEYS[1], ARGV[1]) end
return 0
"""
)

ALL = (CLAIM, SETTLE, RENEW, DEAD, RESCUE, FORGET)

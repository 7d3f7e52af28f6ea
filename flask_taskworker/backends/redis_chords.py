"""Chords in Redis, in Celery's keys and with Celery's steps: the header of one chord may run in
its workers and in ours.

Under the key of the group there are ``.s`` (how many tasks have to end), ``.t`` (how many were
added since), ``.d`` (which have ended), ``.j`` (their results, in order) and ``.c``: who sends
the body, or that it is sent.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from .base import ChordPart, Finish, Header

GROUP_PREFIX = "celery-taskset-meta-"
#: How long the claim to send a body holds if its owner dies. Seconds.
CLAIM = 20
#: How long it is remembered that a body was sent. Seconds.
REMEMBERED = 300
#: How often somebody else's claim is looked at. Seconds.
_LOOK = 0.05

#: Count a task once; claim the sending of the body if it was the last.
_ARRIVE = """
local ended, added, size, seen, claim = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
if redis.call('GET', claim) == 'done' then return 'sent' end
if redis.call('SADD', seen, ARGV[1]) == 1 then redis.call('ZADD', ended, ARGV[2], ARGV[3]) end
if tonumber(ARGV[4]) > 0 then
  for _, key in ipairs({ended, added, size, seen}) do redis.call('EXPIRE', key, ARGV[4]) end
  redis.call('EXPIRE', KEYS[6], ARGV[4])
end
local wanted = redis.call('GET', size)
if not wanted then return 'closed' end
if redis.call('ZCARD', ended) < tonumber(wanted) + tonumber(redis.call('GET', added) or 0) then
  return 'waiting'
end
if redis.call('SET', claim, ARGV[5], 'NX', 'EX', ARGV[6]) then return 'claimed' end
return 'taken'
"""
#: Keep the claim, if it is still ours.
_HOLD = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
#: Forget the chord, and remember for a while that its body is sent; if the claim is still ours.
_SENT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('SET', KEYS[1], 'done', 'EX', ARGV[2])
return 1
"""
#: Give the claim up, if it is still ours.
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end"


class RedisChords:
    """Counts the tasks of chords.

    :param client: of redis-py.
    :param dumps: writes a value as results are written; ``loads`` reads it.
    :param expires: seconds after which a chord that gets nowhere is forgotten; 0 is never.
    """

    def __init__(
        self,
        client: Any,
        dumps: Callable[[object], bytes],
        loads: Callable[[bytes], Any],
        expires: float | None,
    ) -> None:
        self._client, self._dumps, self._loads = client, dumps, loads
        self._expires = math.ceil(expires or 0)
        script = client.register_script
        self._arrive, self._hold = script(_ARRIVE), script(_HOLD)
        self._sent, self._release = script(_SENT), script(_RELEASE)

    def save_group(self, group_id: str, shape: Any) -> None:
        value = self._dumps({"result": shape})
        self._client.set(GROUP_PREFIX + group_id, value, ex=self._expires or None)

    def restore_group(self, group_id: str) -> Any:
        value = self._client.get(GROUP_PREFIX + group_id)
        return None if value is None else self._loads(value)["result"]

    def forget_group(self, group_id: str) -> None:
        self._client.delete(GROUP_PREFIX + group_id)

    def open(self, group_id: str, size: int, shape: Any) -> None:
        key = GROUP_PREFIX + group_id
        with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(f"{key}.c")  # a chord that was sent before, with the same id
            pipe.set(f"{key}.s", size, ex=self._expires or None)
            if shape is not None:
                pipe.set(key, self._dumps({"result": shape}), ex=self._expires or None)
            pipe.execute()

    def grow(self, group_id: str) -> None:
        self._client.incr(f"{GROUP_PREFIX}{group_id}.t")

    def arrive(self, group_id: str, part: ChordPart, finish: Finish) -> Header | None:
        """As :meth:`ResultBackend.arrive <.base.ResultBackend.arrive>`."""
        token = uuid.uuid4().hex
        if not self._count(group_id, part, token):
            return None
        claim = f"{GROUP_PREFIX}{group_id}.c"
        try:
            header = self._header(group_id)
            if not self._hold(keys=[claim], args=[token, CLAIM]):
                raise ConnectionError(f"the claim to end chord {group_id} was lost")
            if not finish(header, None):
                return header
        except BaseException:
            self._release(keys=[claim], args=[token])
            raise
        parts = [f"{GROUP_PREFIX}{group_id}.{end}" for end in "jtsd"]
        self._sent(keys=[claim, *parts], args=[token, REMEMBERED])
        return None

    def _count(self, group_id: str, part: ChordPart, token: str) -> bool:
        """Count a task; whether it is for us to send the body."""
        place = "+inf" if part.index is None else part.index
        value = self._dumps([1, part.task_id, part.status, part.result])
        key = GROUP_PREFIX + group_id
        keys = [f"{key}.{end}" for end in "jtsdc"]
        arguments = [f"{part.task_id}:{place}", place, value, self._expires, token, CLAIM]
        while True:
            answer = self._arrive(keys=[*keys, key], args=arguments)
            if answer != b"taken":
                return bool(answer == b"claimed")
            # Somebody is about to send the body. If he dies, it is for us: without us, whose
            # task was the last to come, nobody would.
            time.sleep(_LOOK)

    def _header(self, group_id: str) -> Header:
        key = GROUP_PREFIX + group_id
        with self._client.pipeline(transaction=True) as pipe:
            pipe.zrange(f"{key}.j", 0, -1, withscores=True)
            pipe.get(key)
            ended, saved = pipe.execute()
        parts = []
        for value, place in ended:
            _, task_id, status, result = self._loads(value)
            parts.append(
                ChordPart(task_id, None if math.isinf(place) else int(place), status, result)
            )
        return Header(group_id, parts, None if saved is None else self._loads(saved)["result"])

    def close(self, group_id: str) -> None:
        self._client.delete(f"{GROUP_PREFIX}{group_id}.s")

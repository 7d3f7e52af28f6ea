"""What one channel has claimed and how it is settled."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import clock
from .bell import Bell
from .records import dumps, read_record, suffix
from .scripts import CLAIM, SETTLE
from .wire import Wire

if TYPE_CHECKING:
    from .options import Options

#: A claim takes no more messages, and no more bytes of them, than this.
MOST_MESSAGES = 1000
MOST_BYTES = 32 * 1024 * 1024
#: A script is given no more numbers to acknowledge than this.
MOST_ACKS = 2000


class Keys(NamedTuple):
    """The names of kombu's keys and ours, with their prefix."""

    unacked: str
    scores: str
    leases: str


class Claimed(NamedTuple):
    """A message of ours, not settled yet."""

    queue: str
    #: The list it came from, with prefix and priority.
    list: str


class _Move(NamedTuple):
    number: int
    claimed: Claimed
    list: str
    side: str
    text: bytes | str


class Claims:
    """Claims messages for one owner; belongs to the thread that drains the channel.

    Settling may be asked for in any thread. It is written with the next claim, by
    :meth:`flush`, or after ``ack_delay`` by :meth:`flush_if_due`.

    :param make: a connection of redis-py, not connected yet.
    :param home: the list for a message, given its queue and text.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        keys: Keys,
        options: Options,
        home: Callable[[str, bytes], str],
    ) -> None:
        self.owner = secrets.token_hex(8)
        self.keys = keys
        self.options = options
        #: By number.
        self.claimed: dict[int, Claimed] = {}
        self.refused = 0
        self._home = home
        self._wire = Wire(make, self._prepare)
        self._bell = Bell(make)
        self._next = 1
        self._acks: list[int] = []
        self._sent: list[list[int]] = []
        self._moves: list[_Move] = []
        self._oldest = 0.0
        #: Numbers of a claim whose answer did not come.
        self._doubtful: range | None = None
        self._armed_until = 0.0

    def _prepare(self, wire: Wire) -> None:
        # What was sent and not answered is sent again; a claim that is gone already stays gone.
        self._acks = [number for batch in self._sent for number in batch] + self._acks
        self._sent = []
        self._armed_until = 0.0
        wire.load()
        self._bell.attach(wire)

    # -- claiming -------------------------------------------------------------------------

    def claim(
        self, queues: Sequence[str], lists: Sequence[str], most: int, *, share: bool, keep: bool
    ) -> Iterator[tuple[int, str, bytes]]:
        """Claim messages and give each with its number and queue; settles what is settled.

        :param queues: names without prefix.
        :param lists: the keys to ask: of the first priority for each queue, and so on.
        :param share: give each queue its share instead of emptying the first one first.
        :param keep: whether the messages are settled later. Else they are gone.
        """
        if self._doubtful is not None:
            found = list(self._find_lost())
            if found:
                return iter(found)
        most = min(most, MOST_MESSAGES)
        acks = self._take_acks()
        first = self._next
        self._next += most
        self._wire.connect()
        if keep:
            self._doubtful = range(first, first + most)
        self._sent.append(acks)
        answer = self._wire.run(
            CLAIM,
            (*self.keys, *lists),
            (
                self.owner, " ".join(map(str, acks)), first, most, MOST_BYTES, self.options.lease,
                int(share), int(keep), *map(suffix, queues),
            ),
        )  # fmt: skip
        self._doubtful = None
        self._sent.pop()
        self._count_refused(len(acks), answer[0])
        if answer[1]:
            self._armed_until = clock.monotonic() + self.options.fallback_interval
        return self._taken(answer, first, queues, lists, keep)

    def _taken(
        self, answer: list[Any], first: int, queues: Sequence[str], lists: Sequence[str], keep: bool
    ) -> Iterator[tuple[int, str, bytes]]:
        taken = []
        for number, at in enumerate(range(2, len(answer), 2), first):
            position = answer[at] - 1
            queue = queues[position % len(queues)]
            if keep:  # all of them, before the first one is delivered
                self.claimed[number] = Claimed(queue, lists[position])
            taken.append((number, queue, answer[at + 1]))
        return iter(taken)

    def _find_lost(self) -> Iterator[tuple[int, str, bytes]]:
        """The messages of the claim whose answer was lost with its connection."""
        assert self._doubtful is not None
        fields = [f"tw:{self.owner}:{number}" for number in self._doubtful]
        records = self._wire.command("HMGET", self.keys.unacked, *fields)
        numbers, self._doubtful = self._doubtful, None
        for number, record in zip(numbers, records, strict=True):
            if record is not None:
                text, queue = read_record(record)
                self.claimed[number] = Claimed(queue, self._home(queue, text))
                yield number, queue, text

    def quiet(self) -> bool:
        """Whether the lists are known to be empty.

        :raises ConnectionError: if the connection for wake-ups is gone.
        """
        if self._armed_until <= clock.monotonic() or not self._wire.usable:
            return False
        if not self._bell.works:
            return False
        if self._bell.rung():
            self._armed_until = 0.0
            return False
        return True

    def forget_quiet(self) -> None:
        """Ask again next time: there is another list to be read."""
        self._armed_until = 0.0

    @property
    def rings(self) -> bool:
        """Whether something becomes readable when messages come."""
        return self._bell.works

    def fileno(self) -> int:
        """What becomes readable when messages come."""
        return self._bell.fileno()

    # -- settling -------------------------------------------------------------------------

    def acknowledge(self, number: int) -> None:
        """Be done with a message."""
        if self.claimed.pop(number, None) is not None:
            self._note()
            self._acks.append(number)

    def give_back(self, number: int) -> None:
        """Put a message back to the head of its queue as if it had never been claimed."""
        claimed = self.claimed.pop(number, None)
        if claimed is not None:
            self._note()
            self._moves.append(_Move(number, claimed, claimed.list, "RPUSH", b""))

    def move(self, number: int, list: str, text: str, *, head: bool = False) -> None:
        """Put another text for a message into a list."""
        claimed = self.claimed.pop(number, None)
        if claimed is not None:
            self._note()
            self._moves.append(_Move(number, claimed, list, "RPUSH" if head else "LPUSH", text))

    def move_payload(self, number: int, list: str, payload: Any, *, head: bool = False) -> None:
        """Put a message, changed since it was claimed, into a list."""
        self.move(number, list, dumps(payload), head=head)

    def _note(self) -> None:
        if not self._acks and not self._moves:
            self._oldest = clock.monotonic()

    def flush_if_due(self) -> None:
        """Write settlements that are waiting for long."""
        waiting = self._acks or self._moves
        if waiting and clock.monotonic() - self._oldest >= self.options.ack_delay:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send what is settled.

        :param wait: until the server has said that it is done.
        """
        while self._moves:
            self._flush_moves()
        while self._acks:
            self._wire.connect()
            acks = self._take_acks()
            self._sent.append(acks)
            self._wire.post(
                SETTLE, self.keys[:2], (self.owner, " ".join(map(str, acks))), self._acknowledged
            )
        if wait and self._sent:
            self._wire.collect()

    def _take_acks(self) -> list[int]:
        acks, self._acks = self._acks[:MOST_ACKS], self._acks[MOST_ACKS:]
        return acks

    def _acknowledged(self, answer: list[int]) -> None:
        self._count_refused(len(self._sent.pop(0)), answer[0])

    def _count_refused(self, asked: int, done: int) -> None:
        self.refused += asked - done

    def _flush_moves(self) -> None:
        # The one claimed first has to come to the head last.
        moves = sorted(self._moves, key=lambda move: -move.number)[:100]
        arguments: list[Any] = [self.owner, ""]
        for move in moves:
            known = len(suffix(move.claimed.queue).encode())
            arguments += [move.number, move.side, move.text, known]
        self._wire.run(SETTLE, (*self.keys[:2], *(move.list for move in moves)), arguments)
        done = {move.number for move in moves}
        self._moves = [move for move in self._moves if move.number not in done]
        self._armed_until = 0.0  # the server does not tell us of what we did ourselves

    # -- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what is claimed, sign off. Never waits long.

        :raises ConnectionError: if the server cannot be told; peers find out by the lease.
        """
        try:
            self._wire.hurry()
            if self._wire.usable or self.claimed or self._acks or self._sent or self._moves:
                for number in list(self.claimed):
                    self.give_back(number)
                self.flush(wait=True)
                self._wire.command("ZREM", self.keys.leases, self.owner)
        finally:
            self._wire.close()
            self._bell.close()

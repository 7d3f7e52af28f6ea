"""A wake-up that comes while the sleeper clears the last one is not lost."""

import select
import socket

from flask_taskworker.worker.waker import Waker


def readable(waker: Waker) -> bool:
    return bool(select.select([waker.fileno()], [], [], 0)[0])


def test_waking_makes_it_readable_until_it_is_cleared() -> None:
    waker = Waker()
    assert not readable(waker)
    waker.wake()
    waker.wake()
    assert readable(waker)
    waker.clear()
    assert not readable(waker)
    waker.wake()
    assert readable(waker)
    waker.close()


class InterruptedReader:
    """The reading end, with another thread's wake-up right after the first byte is read."""

    def __init__(self, waker: Waker, reader: socket.socket) -> None:
        self._waker, self._reader = waker, reader

    def recv(self, size: int) -> bytes:
        data = self._reader.recv(size)
        self._waker.wake()
        return data

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        self._reader.close()


def test_a_wake_up_in_the_middle_of_clearing_does_not_silence_the_next() -> None:
    waker = Waker()
    waker.wake()
    waker._reader = InterruptedReader(waker, waker._reader)  # type: ignore[assignment]
    waker.clear()
    waker.wake()
    assert readable(waker)
    waker.close()


def test_waking_a_closed_one_is_harmless() -> None:
    waker = Waker()
    waker.close()
    waker.wake()

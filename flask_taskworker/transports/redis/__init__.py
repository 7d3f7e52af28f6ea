"""Redis without loss: kombu's Redis transport with an atomic claim, on kombu's own keys.

kombu takes a message from its list with one command and writes it down as unacknowledged
with another; a process killed in between takes the message along. Here one script does
both. The lists, their priority suffixes, the JSON in them and the ``unacked`` keys stay
kombu's, so Celery's clients and workers share the queues.

**Where a message is.** At any moment it is in a list, or in the hash ``unacked`` with its
place in ``unacked_index``, or acknowledged. Every step that moves it is one script, which
Redis runs as a whole, and which writes the new place before it removes the old one:

========================  ==============================================================
killed ...                then
========================  ==============================================================
before the claim runs     the message is in its list
after it, before the run  it is in ``unacked``; the lease ends, a peer puts it back
during or after the run   the same: it runs again
after the ack was sent    it is done
========================  ==============================================================

**Claims.** A claim is the field ``tw:<owner>:<number>`` of ``unacked``. Numbers are given by the
owner, so a claim whose answer got lost with the connection is found again. Settling removes
the field; who finds it gone has lost the message to somebody else: that is the fence.

**Leases.** ``unacked_leases`` holds the time until which an owner lives. A thread with a
connection of its own renews it every third of a lease, and sets the scores of the claims in
``unacked_index`` to that time: Celery's workers put back what is older than their
``visibility_timeout``, which a score in the future never is. Owners whose lease is over lose
their claims to the next peer that looks: these go back to the head of their queue, with one
delivery more on their count. What Celery's workers left behind is put back by kombu's own
rule. The clock is the server's.

**Waking up.** A claim that finds nothing has read every list; Redis remembers that for its client
(``CLIENT TRACKING``, Redis 6 and later) and says so when one of them changes, whoever changes
it. Asking and being remembered is one step, so no message is missed between them. Nothing is
taken to be woken, so nothing can get lost on the way. Where a server or a proxy refuses tracking,
lists are looked at up to every 50 ms.

**Delayed messages** wait in the worker, under its lease. Kept in a set of ours they would be
stuck wherever only Celery's workers are left to run them.
"""

from .transport import Transport

__all__ = ["Transport"]

"""RabbitMQ: kombu's transport, with messages that wait in the broker and a quick end.

**Waiting.** A message with a property ``eta_at`` is sent through a row of queues that hold it for
1, 2, 4, ... seconds, as many of them as its time is a sum of. Its routing key says which: a ``1``
or a ``0`` for each, then the name of its queue. A queue hands on what it has held by its
dead-letter exchange, which is that of the next. What is left of a second, and what is too long for
the row, is the worker's business. Where the server can (3.10 and later) these are quorum queues
that keep a message until the next has it, so a crash of the server loses none.

**Task queues** have no arguments, as Celery's; ``queue_arguments`` among the transport options
gives them some, for example ``{"x-max-priority": 10}`` or ``{"x-queue-type": "quorum"}``. Every
program that declares a queue has to give the same.

**Heartbeats** come from a thread of their own: a task that keeps the consuming thread busy does not
end the connection.

**Fewer system calls.** What the server sends is read in large pieces; acknowledgements are
collected until the thread has nothing else to do, or writes anyway. One that a crash takes along
only means that the message comes again.

**Closing.** An AMQP connection is closed by asking the server; one that does not answer is dropped.
"""

from .transport import Transport

__all__ = ["Transport"]

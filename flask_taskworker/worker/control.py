"""Answers remote control, and sends what is told about the worker.

A thread with a connection of its own: it answers while every slot is busy, and whatever goes
wrong here the worker goes on working.
"""

from __future__ import annotations

import logging
import select
import threading
from typing import TYPE_CHECKING, Any

import kombu
from kombu import pidbox

from .. import clock
from ..broker import broker_connection, capabilities_of, recoverable_errors, wait_for_messages
from ..control import KEPT
from ..mailbox import Mailbox
from ..transports.fleet import fleet_of
from .events import HEARTBEAT, PATIENCE
from .questions import COMMANDS
from .waker import Waker

if TYPE_CHECKING:
    from ..broker import Capabilities
    from .state import WorkerState

log = logging.getLogger("flask_taskworker.worker")

#: Pauses between attempts to reach the broker again, in seconds; the last one repeats.
_PAUSES = (0.2, 1.0, 5.0)
#: How long the answers to the greeting of other workers are waited for, in seconds.
_GREETING = 2.0
#: How often a broker that cannot wake this thread is asked for commands, in seconds.
_POLL = 0.1
#: How long the end of the thread is waited for, in seconds.
_LAST_WORDS = 2.0
#: How many commands are carried out before events get their turn.
_AT_ONCE = 20


class RemoteControl:
    """The thread that listens to commands and sends events.

    :param state: the worker's.
    :param answers: whether to listen; without it there are only events.
    """

    def __init__(self, state: WorkerState, answers: bool) -> None:
        self.state = state
        #: Set while commands are heard.
        self.ready = threading.Event()
        self._answers = answers
        self._waker: Waker  # there are sockets in it: they come with the thread
        self._stopping = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something to send."""
        if self._thread is not None:
            self._waker.wake()

    def start(self) -> None:
        """Start the thread."""
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="taskworker-control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end; waits for that, but not long."""
        thread = self._thread
        if thread is None:
            return
        self._stopping = True
        self._waker.wake()
        thread.join(_LAST_WORDS)

    # -- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve_until_stopped()
        finally:
            self._waker.close()

    def _serve_until_stopped(self) -> None:
        failures = 0
        while not self._stopping:
            began = clock.monotonic()
            try:
                connection = broker_connection(self.state.app.config, role="control")
                with connection:
                    if not capabilities_of(connection).fanout:
                        log.debug("this broker cannot broadcast: no remote control, no events")
                        return
                    _Session(self, connection).serve()
            except Exception as exc:
                failures = 0 if clock.monotonic() - began > _PAUSES[-1] else failures
                text = "no remote control now: %s. Trying again"
                log.log(logging.WARNING if failures == 1 else logging.DEBUG, text, exc)
                log.debug("what ended it", exc_info=exc)
                self._pause(_PAUSES[min(failures, len(_PAUSES) - 1)])
                failures += 1
            finally:
                self.ready.clear()
                self.state.events.open = False
                self.state.channel = self.state.fleet = None

    def _pause(self, seconds: float) -> None:
        deadline = clock.monotonic() + seconds
        while not self._stopping and (left := deadline - clock.monotonic()) > 0:
            self._waker.clear()
            select.select([self._waker.fileno()], [], [], left)


class _Session:
    """One connection of the thread, from its first to its last word."""

    def __init__(self, control: RemoteControl, connection: kombu.Connection) -> None:
        self._control = control
        self._state = control.state
        self._waker = control._waker
        self._connection = connection
        self._capabilities: Capabilities = capabilities_of(connection)
        self._channel: Any = connection.default_channel
        self._errors = recoverable_errors(connection)
        self._mailbox = Mailbox(self._state.app.config, self._state.app.clock, connection)
        self._node: Any = None
        self._greeting: kombu.Consumer | None = None
        self._flush_at = 0.0

    def serve(self) -> None:
        """Work until the thread is stopped; raises what the connection raises."""
        state = self._state
        state.channel, state.fleet = self._channel, fleet_of(self._channel)
        self._take_over()
        if self._control._answers:
            self._greet()  # before we listen: who answers to our name is another
            self._listen()
        state.events.open = True
        state.events.send_about_worker(self._channel, "worker-online")
        self._control.ready.set()
        self._loop()
        state.events.send(self._channel)
        state.events.send_about_worker(self._channel, "worker-offline")

    def _take_over(self) -> None:
        """What was said while we did not listen, as far as the broker keeps it."""
        fleet, consumer = self._state.fleet, self._state.worker.consumer
        if fleet is None:
            return
        self._state.revoked.load(fleet.revoked())
        consumer.request(consumer.refuse_again)
        if not fleet.pauses_by_itself:
            paused = fleet.paused()
            for queue in paused:
                consumer.request(lambda name=queue: consumer.subscriptions.rest(name))  # type: ignore[misc]
            for queue in consumer.subscriptions.resting - paused:
                consumer.request(lambda name=queue: consumer.subscriptions.resume(name))  # type: ignore[misc]

    def _loop(self) -> None:
        heartbeat_at = clock.monotonic() + HEARTBEAT
        greeting_ends = clock.monotonic() + _GREETING
        events = self._state.events
        while not self._control._stopping:
            now = clock.monotonic()
            if now >= heartbeat_at:
                heartbeat_at = now + HEARTBEAT
                events.send_about_worker(self._channel, "worker-heartbeat")
                if self._connection.supports_heartbeats:
                    self._connection.heartbeat_check()
            if events.waiting and now >= self._flush_at:
                events.send(self._channel)
                self._flush_at = now + PATIENCE
            if self._greeting is not None and now >= greeting_ends:
                self._greeting.cancel()
                self._greeting = None
            until = min(heartbeat_at, self._flush_at) if events.waiting else heartbeat_at
            self._wait(max(0.0, until - clock.monotonic()))

    def _wait(self, seconds: float) -> None:
        if self._control._answers:
            for _ in range(_AT_ONCE):
                try:
                    self._connection.drain_events(timeout=0)
                except (TimeoutError, BlockingIOError):
                    break
            else:
                return
        if self._control._stopping:
            return
        wait_for_messages(
            self._connection, self._capabilities, seconds, self._waker.fileno(), poll=_POLL
        )
        self._waker.clear()

    # -- commands -------------------------------------------------------------------------

    def _listen(self) -> None:
        handlers = {name: command.handler for name, command in COMMANDS.items()}
        self._node = _Node(
            self._state.hostname,
            state=self._state,
            channel=self._channel,
            handlers=handlers,
            mailbox=self._mailbox,
        )
        self._node.listen(channel=self._channel, callback=self._command)

    def _command(self, body: Any, message: Any) -> None:
        """Carry out one command, whatever it may be."""
        try:
            self._node.handle_message(_checked(body), message)
        except SystemExit:
            pass  # "shutdown" does not answer
        except self._errors:
            raise
        except Exception as exc:
            log.warning("a control message is ignored: %s: %s", type(exc).__name__, exc)

    def _greet(self) -> None:
        """Tell the others that we are here; they answer with what they know to be revoked."""
        self._greeting = kombu.Consumer(
            self._channel,
            [self._mailbox.reply_queue],
            no_ack=True,
            accept=self._mailbox.accept,
            callbacks=[self._greeted],
        )
        self._greeting.consume()
        self._mailbox._publish(
            "hello",
            {"from_node": self._state.hostname, "revoked": self._state.revoked.ids()},
            reply_ticket=self._mailbox.oid,
            channel=self._channel,
            timeout=_GREETING,
        )

    def _greeted(self, body: Any, message: Any) -> None:
        if not isinstance(body, dict):
            return
        self._state.app.clock.adjust(_count(message.headers.get("clock")))
        for node, told in body.items():
            if node == self._state.hostname:
                log.warning(
                    "another worker is named %s as well. Commands to this name reach both, and "
                    "answers cannot be told apart: give each a name of its own with -n.",
                    node,
                )
            elif isinstance(told, dict):
                self._state.app.clock.adjust(_count(told.get("clock")))
                ids = told.get("revoked")  # older Celery workers send a mapping
                known = [one for one in ids or () if isinstance(one, str)]
                self._state.revoked.add(known, clock.wall() + KEPT)


class _Node(pidbox.Node):  # type: ignore[misc]
    """kombu's, but a command that fails is worth a line and no traceback."""

    def dispatch(
        self,
        method: str,
        arguments: dict[str, Any] | None = None,
        reply_to: dict[str, str] | None = None,
        ticket: str | None = None,
        **kwargs: Any,
    ) -> Any:
        try:
            answer = self.handle(method, arguments)
        except Exception as exc:
            log.warning("remote command %s failed: %r", method, exc)
            log.debug("where it failed", exc_info=exc)
            answer = {"error": repr(exc)}
        if reply_to:
            exchange, key = reply_to["exchange"], reply_to["routing_key"]
            self.reply({self.hostname: answer}, exchange, key, ticket)
        return answer


def _checked(body: Any) -> dict[str, Any]:
    """A command that can be dispatched."""
    if not isinstance(body, dict) or not isinstance(body.get("method"), str):
        raise ValueError("it names no method")
    arguments = body.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError("its arguments are no mapping")
    return body


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0

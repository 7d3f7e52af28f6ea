"""Real Celery on the other side: its client with our worker, our client with its worker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_taskworker import BaseTaskWorker, states
from support.app_folder import AppFolder
from support.celery_client import celery_client
from support.processes import PATIENCE, eventually

celery = pytest.importorskip("celery", reason="Celery is not installed")

pytestmark = [
    pytest.mark.services,
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]

#: The tasks of both workers, under the same names.
OURS = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task(name="add")
    def add(a, b=0):
        ledger.write("add", f"{time.time()}")
        return a + b

    @task_worker.define_task(name="echo", bind=True)
    def echo(self, value):
        headers = self.request.headers
        return {"value": value, "id": self.request.id, "headers": headers.get("tenant")}

    @task_worker.define_task(name="fail")
    def fail(text):
        raise LookupError(text, 7)

    @task_worker.define_task(name="again", bind=True, max_retries=3)
    def again(self, succeed_at):
        ledger.write("again", self.request.retries)
        if self.request.retries < succeed_at:
            raise self.retry(exc=ValueError(f"attempt {self.request.retries}"), countdown=0)
        return self.request.retries

    @task_worker.define_task(name="quiet")
    def quiet(value):
        ledger.write("quiet", value)
        return value

    @task_worker.define_task(name="xsum")
    def xsum(numbers):
        return sum(numbers)

    @task_worker.define_task(name="noted")
    def noted(*values):
        ledger.write("noted", values)
        return len(values)

    @task_worker.define_task(name="told")
    def told(task_id):
        ledger.write("noted", (task_id,))

    @task_worker.define_task(name="errback")
    def errback(request, exc, traceback):
        ledger.write("noted", (request.id, type(exc).__name__))
"""
CELERYS = """
    import os, time, warnings
    warnings.simplefilter("ignore")
    from celery import Celery
    from support.ledger import Ledger

    ledger = Ledger(os.path.join(os.path.dirname(os.path.abspath(__file__)), "ledger"))
    app = Celery("theirs", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
    app.conf.update(
        task_default_queue=os.environ["QUEUE"],
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )

    @app.task(name="add")
    def add(a, b=0):
        ledger.write("add", f"{time.time()}")
        return a + b

    @app.task(name="echo", bind=True)
    def echo(self, value):
        headers = self.request.headers or {}
        return {"value": value, "id": self.request.id, "headers": headers.get("tenant")}

    @app.task(name="fail")
    def fail(text):
        raise LookupError(text, 7)

    @app.task(name="again", bind=True, max_retries=3)
    def again(self, succeed_at):
        ledger.write("again", self.request.retries)
        if self.request.retries < succeed_at:
            raise self.retry(exc=ValueError(f"attempt {self.request.retries}"), countdown=0)
        return self.request.retries

    @app.task(name="quiet", ignore_result=True)
    def quiet(value):
        ledger.write("quiet", value)
        return value

    @app.task(name="xsum")
    def xsum(numbers):
        return sum(numbers)

    @app.task(name="noted")
    def noted(*values):
        ledger.write("noted", values)
        return len(values)

    @app.task(name="told")
    def told(task_id):
        ledger.write("noted", (task_id,))

    @app.task(name="errback")
    def errback(request, exc, traceback):
        ledger.write("noted", (request.id, type(exc).__name__))
"""


class CeleryFolder(AppFolder):
    HEAD = ""


class Broker:
    """Where both sides meet, and a worker of each on a queue of its own."""

    def __init__(self, url: str, folder: Path, name: str) -> None:
        self.url = url
        self.backend = url if url.startswith("redis") else "rpc://"
        self.ours, self.theirs = f"{name}-ours", f"{name}-theirs"
        (folder / "ours").mkdir()
        (folder / "theirs").mkdir()
        self.our_folder = AppFolder(folder / "ours", OURS)
        self.their_folder = CeleryFolder(folder / "theirs", CELERYS)

    def start(self) -> None:
        """Start both workers."""
        theirs = self.their_folder.python(
            *("-m", "celery", "-A", "lab", "worker", "-P", "threads", "-c", "2", "-l", "info"),
            *("--without-gossip", "--without-mingle", "-n", f"{self.theirs}@%h"),
            BROKER=self.url,
            BACKEND=self.backend,
            QUEUE=self.theirs,
        )
        self.our_folder.ready_worker(
            FLASK_TASKER_BROKER_URL=self.url, FLASK_TASKER_DEFAULT_QUEUE=self.ours
        )
        theirs.wait_for(r"@\S+ ready\.")

    def close(self) -> None:
        self.our_folder.close()
        self.their_folder.close()


@pytest.fixture(scope="module", params=["redis", "amqp"])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    broker = Broker(
        request.getfixturevalue(f"{request.param}_url"),
        tmp_path_factory.mktemp("interop"),
        f"interop-{uuid.uuid4().hex[:8]}",
    )
    try:
        broker.start()
        yield broker
    finally:
        broker.close()


@pytest.fixture(scope="module", name="celery_client")
def _celery_client(broker: Broker) -> Iterator[Any]:
    """A Celery app that sends to our worker."""
    with celery_client(broker.url, broker.backend, broker.ours) as app:
        yield app


@pytest.fixture
def our_client(broker: Broker, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Tasks of ours that are sent to Celery's worker."""
    app = Flask("client", instance_path=str(tmp_path))
    app.config.update(TASKER_BROKER_URL=broker.url, TASKER_DEFAULT_QUEUE=broker.theirs)
    task_worker = BaseTaskWorker(app)
    define = task_worker.define_task

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("runs elsewhere")

    yield {
        "add": define(name="add")(lambda a, b=0: never()),
        "echo": define(name="echo")(lambda value: never()),
        "fail": define(name="fail")(lambda text: never()),
        "again": define(name="again")(lambda succeed_at: never()),
        "quiet": define(name="quiet")(lambda value: never()),
        "absent": define(name="absent")(lambda: never()),
        "xsum": define(name="xsum")(lambda numbers: never()),
        "noted": define(name="noted")(lambda *values: never()),
        "told": define(name="told")(lambda task_id: never()),
        "errback": define(name="errback")(lambda request, exc, traceback: never()),
    }
    task_worker.task_app().close()


DATA = {"text": "ä\u2028", "list": [1, 2.5, None, True], "big": 2**60}


# -- Celery's client, our worker --------------------------------------------------------------


def test_celery_gets_what_our_task_returns(celery_client: Any) -> None:
    result = celery_client.send_task("add", (1,), {"b": 2})
    assert result.get(timeout=PATIENCE) == 3
    assert result.state == "SUCCESS"


def test_celery_sends_data_and_headers_of_its_own(celery_client: Any) -> None:
    result = celery_client.send_task("echo", (DATA,), headers={"tenant": "acme"})
    got = result.get(timeout=PATIENCE)
    assert got == {"value": DATA, "id": result.id, "headers": "acme"}


def test_celery_gets_our_exception(celery_client: Any) -> None:
    result = celery_client.send_task("fail", ("no such thing",))
    with pytest.raises(LookupError) as caught:
        result.get(timeout=PATIENCE)
    assert caught.value.args == ("no such thing", 7)
    assert "raise LookupError(text, 7)" in result.traceback


def test_celery_gets_the_end_of_our_retries(celery_client: Any) -> None:
    assert celery_client.send_task("again", (2,)).get(timeout=PATIENCE) == 2
    with pytest.raises(ValueError, match="attempt 3"):
        celery_client.send_task("again", (99,)).get(timeout=PATIENCE)


def test_our_worker_keeps_celerys_countdown(broker: Broker, celery_client: Any) -> None:
    before = len(broker.our_folder.steps("add"))
    sent = time.time()
    assert celery_client.send_task("add", (1,), countdown=1).get(timeout=PATIENCE) == 1
    (started,) = broker.our_folder.steps("add")[before:]
    assert 1.0 <= float(started) - sent < 4.0


def test_our_worker_stores_nothing_that_celery_ignores(broker: Broker, celery_client: Any) -> None:
    name = uuid.uuid4().hex
    result = celery_client.send_task("quiet", (name,), ignore_result=True)
    eventually(lambda: name in broker.our_folder.steps("quiet"), "it ran")
    assert celery_client.send_task("add", (1,)).get(timeout=PATIENCE) == 1
    if broker.backend != "rpc://":
        assert celery_client.AsyncResult(result.id).state == "PENDING"


def test_celery_is_told_of_a_task_we_do_not_know(celery_client: Any) -> None:
    from celery.exceptions import NotRegistered

    with pytest.raises(NotRegistered, match="absent"):
        celery_client.send_task("absent").get(timeout=PATIENCE)


def test_celery_is_told_of_an_expired_task(celery_client: Any) -> None:
    from celery.exceptions import TaskRevokedError

    result = celery_client.send_task("add", (1,), countdown=0.6, expires=0.3)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE)


def test_a_celery_group_runs_on_our_worker(celery_client: Any) -> None:
    from celery import group

    signature = group(celery_client.signature("add", (n, n)) for n in range(10))
    assert signature.apply_async().get(timeout=PATIENCE) == [2 * n for n in range(10)]


# -- our client, Celery's worker --------------------------------------------------------------


def test_we_get_what_celerys_task_returns(our_client: dict[str, Any]) -> None:
    handles = [
        our_client["add"].delay(1, b=2),
        our_client["add"].apply(a=10, b=20),
        our_client["add"].apply_async((100,), {"b": 200}),
    ]
    assert [handle.get(timeout=PATIENCE) for handle in handles] == [3, 30, 300]
    assert handles[0].state == states.SUCCESS


def test_we_send_data_and_headers_of_our_own(our_client: dict[str, Any]) -> None:
    handle = our_client["echo"].apply_async((DATA,), headers={"tenant": "acme"})
    got = handle.get(timeout=PATIENCE)
    assert got == {"value": DATA, "id": handle.id, "headers": "acme"}


def test_we_get_celerys_exception(our_client: dict[str, Any]) -> None:
    handle = our_client["fail"].delay("no such thing")
    with pytest.raises(LookupError) as caught:
        handle.get(timeout=PATIENCE)
    assert caught.value.args == ("no such thing", 7)
    assert "raise LookupError(text, 7)" in handle.traceback


def test_we_get_the_end_of_celerys_retries(our_client: dict[str, Any]) -> None:
    assert our_client["again"].delay(2).get(timeout=PATIENCE) == 2
    with pytest.raises(ValueError, match="attempt 3"):
        our_client["again"].delay(99).get(timeout=PATIENCE)


def test_celery_keeps_our_countdown(broker: Broker, our_client: dict[str, Any]) -> None:
    before = len(broker.their_folder.steps("add"))
    sent = time.time()
    assert our_client["add"].apply_async((1,), countdown=1).get(timeout=PATIENCE) == 1
    (started,) = broker.their_folder.steps("add")[before:]
    assert 0.99 <= float(started) - sent < 4.0


def test_celery_stores_nothing_that_we_ignore(broker: Broker, our_client: dict[str, Any]) -> None:
    name = uuid.uuid4().hex
    handle = our_client["quiet"].apply_async((name,), ignore_result=True)
    eventually(lambda: name in broker.their_folder.steps("quiet"), "it ran")
    assert our_client["add"].delay(1).get(timeout=PATIENCE) == 1
    assert handle.state == states.PENDING


def test_compressed_messages_are_read_on_both_sides(
    our_client: dict[str, Any], celery_client: Any
) -> None:
    text = "x" * 5000
    theirs = celery_client.send_task("echo", (text,), compression="gzip")
    ours = our_client["echo"].apply_async((text,), compression="gzip")
    assert theirs.get(timeout=PATIENCE)["value"] == text
    assert ours.get(timeout=PATIENCE)["value"] == text


# -- what comes after a task, on either side ----------------------------------------------------


class Side:
    """Signatures of the shared tasks, made by one client for either worker."""

    def __init__(self, broker: Broker, make: Any, group: Any, chord: Any) -> None:
        self._broker, self._make = broker, make
        self.group, self.chord = group, chord

    def __call__(self, name: str, *args: Any, at: str = "ours", immutable: bool = False) -> Any:
        made = self._make(name, args, immutable)
        return made.set(queue=getattr(self._broker, at))

    def noted(self, at: str) -> list[str]:
        folder = self._broker.our_folder if at == "ours" else self._broker.their_folder
        return folder.steps("noted")


@pytest.fixture(params=["celery sends", "we send"])
def side(request: pytest.FixtureRequest, broker: Broker) -> Side:
    if request.param == "we send":
        from flask_taskworker import chord, group

        tasks = request.getfixturevalue("our_client")
        return Side(
            broker,
            lambda name, args, immutable: tasks[name].signature(args, immutable=immutable),
            group,
            chord,
        )
    app = request.getfixturevalue("celery_client")
    return Side(
        broker,
        lambda name, args, immutable: app.signature(name, args, immutable=immutable),
        lambda *tasks: celery.group(*tasks, app=app),
        lambda *parts: celery.chord(*parts, app=app),
    )


@pytest.fixture(params=["ours", "theirs"])
def at(request: pytest.FixtureRequest) -> str:
    return request.param


def test_callbacks_are_sent(side: Side, at: str) -> None:
    name = uuid.uuid4().hex
    sent = side("echo", name, at=at)
    sent.link(side("noted", at=at))
    sent.link(side("noted", name, at=at, immutable=True))
    sent.apply_async()
    alone = f"({name!r},)"
    eventually(
        lambda: alone in side.noted(at) and any(f"'value': {name!r}" in n for n in side.noted(at)),
        "both callbacks",
    )


def test_errbacks_of_both_kinds_are_called(side: Side, at: str) -> None:
    handle = side("fail", "x", at=at)
    handle.link_error(side("told", at=at))
    handle.link_error(side("errback", at=at))
    handle = handle.apply_async()
    with pytest.raises(LookupError):
        handle.get(timeout=PATIENCE)
    eventually(
        lambda: {f"({handle.id!r},)", f"({handle.id!r}, 'LookupError')"} <= {*side.noted(at)},
        "both errbacks",
    )


@pytest.mark.parametrize("start", ["ours", "theirs"])
def test_a_chain_goes_from_worker_to_worker(side: Side, start: str, broker: Broker) -> None:
    other = "theirs" if start == "ours" else "ours"
    steps = side("add", 1, 2, at=start) | side("add", 10, at=other) | side("add", 100, at=start)
    handle = steps.apply_async()
    assert handle.get(timeout=PATIENCE) == 113
    if broker.backend != "rpc://":
        assert handle.parent.get(timeout=PATIENCE) == 13


def test_a_failed_step_fails_the_last_one(side: Side, at: str) -> None:
    other = "theirs" if at == "ours" else "ours"
    steps = side("add", 1, 2, at=other) | side("fail", at=at) | side("add", 1, at=other)
    with pytest.raises(LookupError):
        steps.apply_async().get(timeout=PATIENCE)


@pytest.mark.not_on("amqp")  # where results are messages, there is no store for a chord
@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_a_chord_spans_both_workers(side: Side, last: str) -> None:
    header = [side("add", i, i, at=("ours", "theirs")[i % 2]) for i in range(10)]
    header.append(side("again", 2, at=last))  # the last to end
    handle = side.chord(header, side("xsum", at="theirs" if last == "ours" else "ours"))()
    assert handle.get(timeout=PATIENCE) == 92


@pytest.mark.not_on("amqp")  # where results are messages, there is no store for a chord
@pytest.mark.parametrize("failing", ["ours", "theirs"])
def test_a_failed_header_fails_the_body_on_both_workers(side: Side, failing: str) -> None:
    other = "theirs" if failing == "ours" else "ours"
    body = side("xsum", at=other)
    body.link_error(side("told", at=other))
    header = [side("add", 1, 1, at=other), side("fail", "x", at=failing)]
    handle = side.chord(header, body)()
    error = handle.get(timeout=PATIENCE, propagate=False, follow_parents=False)
    assert type(error).__name__ == "ChordError"
    assert str(error).startswith("Dependency ")
    assert str(error).endswith(" raised LookupError('x', 7)")
    eventually(lambda: f"({handle.id!r},)" in side.noted(other), "the errback")


@pytest.mark.not_on("amqp")  # where results are messages, there is no store for a chord
def test_nested_parts_span_both_workers(side: Side, at: str) -> None:
    other = "theirs" if at == "ours" else "ours"
    inner = side("add", 1, 1, at=at) | side.group(side("add", 1, at=other), side("add", 2, at=at))
    steps = inner | side("xsum", at=other) | side("add", 5, at=at)
    assert steps.apply_async().get(timeout=PATIENCE) == 12

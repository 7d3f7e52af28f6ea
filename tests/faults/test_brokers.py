"""Redis and RabbitMQ: nothing is lost, whoever is killed and whatever the network does.

``TASKWORKER_KILLS=40`` has the first test kill as often and send as much as a release needs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flask_taskworker.exceptions import BrokerUnavailableError
from support.app_folder import AppFolder
from support.processes import Program, eventually
from support.servers import OwnRabbitMQ, OwnRedis, running
from support.sockets import MuteServer, Proxy

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]

APP = """
    task_worker = BaseTaskWorker(app)

    @task_worker.define_task(name="work", ignore_result=True)
    def work(name, seconds=0.0):
        ledger.write("start", name)
        if seconds:
            time.sleep(seconds)
        ledger.write("end", name)

    @task_worker.define_task(name="retried", bind=True, max_retries=5, ignore_result=True)
    def retried(self, name):
        ledger.write("start", name)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        ledger.write("end", name)

    @task_worker.define_task(name="sent_back", bind=True, ignore_result=True)
    def sent_back(self, name):
        ledger.write("start", name)
        if self.request.delivery_count == 1:
            raise Reject("not now", requeue=True)
        ledger.write("end", name)

    @task_worker.define_task(name="refused", ignore_result=True)
    def refused(name):
        ledger.write("end", name)
        raise Reject("not wanted")

    @task_worker.define_task(name="deadly", ignore_result=True)
    def deadly(name):
        ledger.write("start", name)
        os.kill(os.getpid(), 9)
"""

KILLS = int(os.environ.get("TASKWORKER_KILLS", "0"))
LEASE = 2.0


class Lab(AppFolder):
    """An app whose broker may be reached by several ways."""

    def __init__(self, folder: Path, url: str, queue: str) -> None:
        super().__init__(folder, APP)
        self.broker = url
        self.queue = queue

    def settings(self, url: str | None = None, **more: Any) -> dict[str, str]:
        settings = {
            "BROKER_URL": url or self.broker,
            "DEFAULT_QUEUE": self.queue,
            "LEASE": LEASE,
            "RESULT_BACKEND": "disabled",
            **more,
        }
        return {f"FLASK_TASKER_{name}": str(value) for name, value in settings.items()}

    def work_on(self, *options: str, url: str | None = None, **more: Any) -> Program:
        """A worker that reads its queue already."""
        environment = {k: str(v) for k, v in more.items() if k.isupper() and "_" in k}
        return self.ready_worker("-q", *options, **self.settings(url), **environment)

    def names(self, url: str | None = None, **more: Any) -> dict[str, Any]:
        return self.load(**self.settings(url, **more))

    def send(self, kind: str, count: int, *arguments: Any, url: str | None = None) -> None:
        task = self.names(url)[kind]
        for number in range(count):
            task.delay(f"{kind}-{number}", *arguments)
            self.ledger.write("sent", f"{kind}-{number}")

    def ended(self) -> int:
        return len(self.ledger.count("end"))

    def lost(self) -> set[str]:
        return set(self.ledger.count("sent")) - set(self.ledger.count("end"))

    def wait_for_all(self, timeout: float = 60.0) -> None:
        eventually(lambda: not self.lost(), "all that was sent has run", timeout)

    def left(self, queue: str = "") -> int:
        return int(self.names()["task_worker"].task_app().publisher.queue_size(self.queue + queue))


@pytest.fixture(params=["redis", "amqp"])
def lab(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Lab]:
    lab = Lab(tmp_path, request.getfixturevalue(f"{request.param}_url"), unique)
    yield lab
    lab.close()


@pytest.fixture
def proxy(lab: Lab) -> Iterator[Proxy]:
    parts = urlsplit(lab.broker)
    with Proxy(parts.hostname or "127.0.0.1", parts.port or 5672) as proxy:
        yield proxy


def through(proxy: Proxy, url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.port}/", f":{proxy.port}/", 1)


# -- killed workers -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_killed_again_and_again_lose_no_empty_task(lab: Lab) -> None:
    """Most of a worker's time goes into claiming and settling here, so most kills hit that."""
    kills, count = (KILLS, 300 * KILLS) if KILLS else (5, 1500)
    chance = random.Random(1)
    lab.send("work", count)
    for _ in range(kills):
        worker = lab.work_on()
        time.sleep(chance.uniform(0.05, 0.3))  # any moment at all is what is meant
        worker.kill_all()
        worker.wait()
    worker = lab.work_on()
    lab.wait_for_all(120)
    eventually(lambda: lab.left() == 0, "what runs twice has run as well")
    assert worker.stop() == 0
    ends = lab.ledger.count("end")
    assert len(ends) == count
    print(f"{count} tasks, {kills} kills: 0 lost, {sum(ends.values()) - count} run twice")
    assert lab.left() == 0
    assert lab.left(".dead") == 0


TASK_OF = {
    "before_retry": "retried",
    "after_retry": "retried",
    "before_requeue": "sent_back",
    "after_requeue": "sent_back",
    "before_dead_letter": "refused",
    "after_dead_letter": "refused",
}
POINTS = (
    "before_run", "after_run", "before_ack", "after_ack", *TASK_OF
)  # fmt: skip


@pytest.mark.only_on("redis")  # RabbitMQ sends by itself
@pytest.mark.parametrize("point", ["before_claim", "after_claim"])
def test_a_worker_killed_around_its_claim_loses_nothing(lab: Lab, point: str) -> None:
    _killed_at(lab, point)


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_any_step_loses_nothing(lab: Lab, point: str) -> None:
    _killed_at(lab, point)


def _killed_at(lab: Lab, point: str) -> None:
    lab.send(TASK_OF.get(point, "work"), 6)
    worker = lab.worker("-q", **lab.settings(), TASKWORKER_FAILPOINTS=f"{point}=kill:2")
    assert worker.wait() == -signal.SIGKILL, f"never came to {point}:\n{worker.output}"
    worker = lab.work_on()
    lab.wait_for_all()
    if point.endswith("dead_letter"):  # a message may be parked twice, but not less than once
        eventually(lambda: lab.left(".dead") >= 6, "all are parked")
    eventually(lambda: lab.left() == 0, "the queue is empty")
    assert worker.stop() == 0


def test_a_task_that_kills_its_worker_each_time_is_parked(lab: Lab) -> None:
    names = lab.names()
    names["deadly"].delay("deadly")
    most = 3
    settings = lab.settings(MAX_DELIVERIES=most)
    for _ in range(most):
        worker = lab.worker("-q", "-P", "solo", **settings)
        assert worker.wait() == -signal.SIGKILL, worker.output
    names["work"].delay("good")
    lab.ledger.write("sent", "good")
    worker = lab.ready_worker("-q", "-P", "solo", **settings)
    lab.wait_for_all()
    eventually(lambda: lab.left(".dead") == 1, "it is parked")
    assert worker.stop() == 0
    assert lab.ledger.count("start")["deadly"] == most


def test_what_a_stopped_worker_gave_back_is_not_counted_as_a_death(lab: Lab) -> None:
    lab.send("work", 3, 0.2)
    settings = lab.settings(MAX_DELIVERIES=2)
    for _ in range(4):
        worker = lab.ready_worker("-q", "-c", "1", **settings)
        before = len(lab.ledger.count("start"))
        if before < 3:
            eventually(lambda before=before: len(lab.ledger.count("start")) > before, "one began")
        assert worker.stop() == 0
    lab.wait_for_all()
    assert lab.left(".dead") == 0


@pytest.mark.slow
def test_a_task_longer_than_the_lease_starts_once(lab: Lab) -> None:
    workers = [lab.work_on("-P", "solo"), lab.work_on("-P", "solo")]
    # RabbitMQ lets go of a consumer that sends no heartbeat for 20 s.
    lab.send("work", 1, 25.0 if lab.broker.startswith("amqp") else 4 * LEASE)
    lab.wait_for_all()
    time.sleep(2 * LEASE)  # nothing more is to happen
    for worker in workers:
        assert worker.stop() == 0
    assert lab.ledger.count("start")["work-0"] == 1


# -- a network that fails -----------------------------------------------------------------------


@pytest.mark.slow
def test_cut_connections_lose_nothing(lab: Lab, proxy: Proxy) -> None:
    url = through(proxy, lab.broker)
    worker = lab.work_on(url=url)
    work = lab.names(url)["work"]
    refused = 0
    next_cut = time.monotonic() + 0.5
    for number in range(400):
        try:
            work.delay(f"work-{number}", 0.01)
            lab.ledger.write("sent", f"work-{number}")
        except BrokerUnavailableError:
            refused += 1
        if time.monotonic() >= next_cut:
            proxy.cut()
            next_cut += 0.5
        time.sleep(0.01)  # the load
    lab.wait_for_all()
    assert refused < 40, "a cut is survived by trying again"
    assert worker.stop() == 0


@pytest.mark.slow
def test_half_open_connections_are_noticed_within_a_minute(lab: Lab, proxy: Proxy) -> None:
    worker = lab.work_on(url=through(proxy, lab.broker))
    lab.send("work", 1)
    lab.wait_for_all()
    proxy.hole()
    lab.names()["work"].delay("after")
    lab.ledger.write("sent", "after")
    lab.wait_for_all(60)
    assert worker.stop() == 0


def test_a_mute_broker_hangs_nobody(lab: Lab, proxy: Proxy) -> None:
    url = through(proxy, lab.broker)
    worker = lab.work_on(url=url)
    work = lab.names(url)["work"]
    work.delay("before")
    eventually(lambda: lab.ended() == 1, "it works")
    proxy.mute()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError):
        work.delay("never")
    assert time.monotonic() - began < 5.5
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10


@pytest.mark.only_on("redis")  # RabbitMQ hands out at once what a cut connection held
def test_a_task_survives_the_cut_of_its_connection(lab: Lab, proxy: Proxy) -> None:
    worker = lab.work_on(url=through(proxy, lab.broker))
    lab.send("work", 1, 3.0)
    eventually(lambda: lab.ledger.count("start"), "it runs")
    proxy.cut()
    lab.wait_for_all()
    eventually(lambda: lab.left() == 0, "the queue is empty")
    assert worker.stop() == 0
    assert lab.ledger.count("start")["work-0"] == 1


def test_a_worker_that_started_first_waits_for_its_broker(tmp_path: Path) -> None:
    with running(OwnRedis) as server:
        lab = Lab(tmp_path, server.url, "late")
        server.crash()
        try:
            worker = lab.worker("-q", **lab.settings())
            worker.wait_for("no connection to the broker")
            server.start()
            lab.send("work", 1)
            lab.wait_for_all(20)
            assert worker.stop() == 0
        finally:
            lab.close()


# -- a server that fails --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [OwnRedis, OwnRabbitMQ])
def test_a_killed_server_loses_nothing(kind: Any, tmp_path: Path) -> None:
    with running(kind) as server:
        lab = Lab(tmp_path, server.url, "killed")
        try:
            worker = lab.work_on()
            lab.send("work", 50, 0.02)
            later = lab.names()["work"]
            later.apply_async(("later",), countdown=8)
            lab.ledger.write("sent", "later")
            for _ in range(2):
                server.crash()
                server.start()
                lab.send("work", 50, 0.02)
            lab.wait_for_all(90)
            assert worker.running
            assert worker.stop() == 0
        finally:
            lab.close()


@contextlib.contextmanager
def own_redis(folder: Path, *options: str) -> Iterator[tuple[OwnRedis, Lab]]:
    with running(lambda: OwnRedis(*options)) as server:
        lab = Lab(folder, server.url, "own")
        try:
            yield server, lab
        finally:
            lab.close()


def test_a_redis_that_was_emptied_is_worked_on(tmp_path: Path) -> None:
    with own_redis(tmp_path) as (server, lab):
        worker = lab.work_on()
        lab.send("work", 3)
        lab.wait_for_all()
        with contextlib.closing(server.client()) as client:
            client.flushall()
            client.script_flush()
        lab.send("retried", 3)
        lab.wait_for_all(20)
        assert worker.stop() == 0


def test_a_full_redis_refuses_tasks_and_can_be_drained(tmp_path: Path) -> None:
    with own_redis(tmp_path) as (server, lab):
        lab.send("work", 200)
        with contextlib.closing(server.client()) as client:
            client.config_set("maxmemory", 1_000_000)
            with pytest.raises(BrokerUnavailableError, match="maxmemory"):
                lab.names()["work"].delay("one more")
            worker = lab.work_on()
            lab.wait_for_all()
            client.config_set("maxmemory", 0)
        lab.send("retried", 1)
        lab.wait_for_all()
        assert worker.stop() == 0


@pytest.mark.slow
def test_a_rabbitmq_without_memory_is_a_clear_error(tmp_path: Path) -> None:
    with running(OwnRabbitMQ) as server:
        lab = Lab(tmp_path, server.url, "alarm")
        try:
            lab.send("work", 1)
            server.control("set_vm_memory_high_watermark", "0.00001")
            began = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                lab.names()["work"].delay("never")
            assert time.monotonic() - began < 5.5
            server.control("set_vm_memory_high_watermark", "0.4")
            worker = lab.work_on()
            lab.wait_for_all()
            assert worker.stop() == 0
        finally:
            lab.close()


@pytest.mark.parametrize("scheme", ["redis://127.0.0.1:{}/0", "amqp://127.0.0.1:{}//"])
def test_sending_to_a_mute_server_fails_in_time(scheme: str, tmp_path: Path) -> None:
    with MuteServer() as server:
        lab = Lab(tmp_path, scheme.format(server.port), "mute")
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError):
            lab.names()["work"].delay("never")
        assert time.monotonic() - began < 5.5
        lab.close()

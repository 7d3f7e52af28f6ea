"""Uses of the package as type checkers see them.

Each line that ends in ``# wrong`` holds a mistake they must report; all others are right.
"""

from datetime import timedelta
from typing import Any

from flask import Flask
from typing_extensions import assert_type

from flask_taskworker import AsyncResult, BackgroundTaskWorker, Request, Task, current_request

app = Flask(__name__)
task_worker = BackgroundTaskWorker(app)


@task_worker.define_task
def add(x: int, y: int = 0) -> int:
    return x + y


@task_worker.define_task(queue="downloads", max_retries=5)
def shout(text: str) -> str:
    return text.upper()


@task_worker.define_task(bind=True)
def fetch(self: Task[..., Any], url: str) -> bytes:
    raise self.retry(countdown=1)


@task_worker.define_task
async def ping(host: str) -> float:
    return 0.5


@task_worker.define_task(queue="pings")
async def ping_later(host: str) -> float:
    return 0.5


@task_worker.define_task(bind=True)
async def ping_again(self: Task[..., Any], host: str) -> float:
    raise self.retry(countdown=1)


@task_worker.define_task
def invite(*, to: str, subject: str = "") -> None:
    assert_type(current_request().retries, int)


@task_worker.define_task
def log(*args: object, **fields: object) -> None: ...


def right() -> None:
    assert_type(add(1, 2), int)
    assert_type(add.delay(1, y=2), AsyncResult[int])
    assert_type(add.apply(1), AsyncResult[int])
    assert_type(add.apply_async((1, 2), countdown=5, queue="sums"), AsyncResult[int])
    assert_type(add.options(countdown=5).delay(1), AsyncResult[int])
    assert_type(add.delay(1).get(timeout=1), int)
    assert_type(shout.delay(text="a"), AsyncResult[str])
    assert_type(fetch.delay("http://localhost"), AsyncResult[bytes])
    assert_type(ping.delay("localhost").get(), float)
    assert_type(ping_later.delay("localhost").get(), float)
    assert_type(ping_again.delay("localhost").get(), float)
    assert_type(fetch("http://localhost"), bytes)
    assert_type(fetch.name, str)
    assert_type(fetch.request, Request)
    assert_type(add.AsyncResult("id"), AsyncResult[int])
    assert_type(add.delay(1).state, str)
    assert_type(add.delay(1).traceback, str | None)
    add.apply_async(expires=timedelta(minutes=1), priority=9, headers={"x-trace": 1}, retry=False)
    add.options(queue="sums", task_id="id", compression=None).apply(1, y=2)
    invite.delay(to="a@example.org")
    invite.apply(to="a@example.org", subject="Hello")
    log.delay(1, "two", three=3)
    total: AsyncResult[int | None] = add.delay(1)  # what gives an int gives an int or None
    assert total.get() is not None


def mistakes() -> None:
    add.delay("one")  # wrong
    add.delay()  # wrong
    add.delay(1, 2, 3)  # wrong
    add.apply(1, z=2)  # wrong
    add.apply_async((1,), countdwn=5)  # wrong
    add.apply_async((1,), countdown="soon")  # wrong
    add.options(prio=1)  # wrong
    add.options(countdown=1).delay("one")  # wrong
    add.delay(1).get().upper()  # wrong
    shout.delay(1)  # wrong
    fetch.delay(1)  # wrong
    ping.delay(1)  # wrong
    ping_later.delay(1)  # wrong
    ping_again.delay("localhost", 5)  # wrong
    task_worker.define_task(queu="sums")  # wrong
    task_worker.define_task(max_retries="5")  # wrong
    task_worker.define_task("sums")  # wrong
    add("one")  # wrong
    add.delay(1).get(timeout="soon")  # wrong
    add.apply_async(countdown=timedelta(minutes=1))  # wrong
    add.options(countdown=1).delay()  # wrong
    add.options(countdown=1).apply(1, z=2)  # wrong
    add.options(countdown="soon")  # wrong
    fetch.delay(fetch, "http://localhost")  # wrong
    fetch(fetch, "http://localhost")  # wrong
    invite.delay("a@example.org")  # wrong
    invite.apply(to=5)  # wrong
    number: AsyncResult[str] = add.delay(1)  # wrong
    print(number)


@task_worker.define_task(bind=True)  # wrong
def no_place_for_the_task() -> None: ...


@task_worker.define_task(bind=True)  # wrong
def not_a_task_first(self: int, url: str) -> None: ...

"""The messages of a canvas are those that Celery sends, field by field."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import Signature, Task, chain, chord, group
from flask_taskworker.canvas.stamping import StampingVisitor
from flask_taskworker.message import encode, parse
from flask_taskworker.worker.delivery import Delivery, Outcome
from flask_taskworker.worker.executor import Executor
from support import AppRoom, received

CAPTURED = Path(__file__).parents[1] / "data" / "protocol" / "task_messages"
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Stamp(StampingVisitor):
    def on_signature(self, sig: Signature[Any], **headers: Any) -> dict[str, Any]:
        return {"tenant": "acme", "tags": ["a", "b"], "stamped_headers": ["tags", "tenant"]}


class Project:
    """The tasks that the capture was made with, and a worker for them in this thread."""

    def __init__(self, room: AppRoom) -> None:
        self.room = room
        self.outcomes: list[Outcome] = []
        self._seen = 0
        define = room.task_worker.define_task

        def task(function: Callable[..., Any], **options: Any) -> Task[..., Any]:
            made: Task[..., Any] = define(name=f"proj.{function.__name__}", **options)(function)
            return made

        def add(x: int, y: int) -> int:
            return x + y

        def xsum(numbers: list[int]) -> int:
            return sum(numbers)

        def ident(value: Any) -> Any:
            return value

        def fail(*args: Any) -> None:
            raise ValueError("boom")

        def errback(request: Any, exc: Exception, traceback: str) -> None:
            self.errors.append((request.id, exc, traceback))

        def errback_old(task_id: str) -> str:
            return task_id

        def replaced(self: Task[..., Any], x: int) -> Any:
            return self.replace(project.add.s(x, 1))

        def replaced_group(self: Task[..., Any], x: int) -> Any:
            return self.replace(group(project.add.s(x, 1), project.add.s(x, 2)))

        def spawn(n: int) -> None:
            for i in range(n):
                project.add.delay(i, i)

        project = self
        self.errors: list[Any] = []
        self.add, self.xsum, self.ident = task(add), task(xsum), task(ident)
        self.fail, self.errback, self.errback_old = task(fail), task(errback), task(errback_old)
        self.replaced = task(replaced, bind=True)
        self.replaced_group = task(replaced_group, bind=True)
        self.spawn = task(spawn)
        self._executor = Executor(room.task_app, "worker@test")

    def work(self) -> list[dict[str, Any]]:
        """Run what was sent and what comes of it; return all messages in the order of sending."""
        published = self.room.publisher.published
        sent = []
        for message, queue in iter_growing(published):
            wire = encode(message)
            sent.append(
                {"headers": wire.headers, "body": json.loads(wire.body), "key": "celery",
                 "properties": wire.properties}
            )  # fmt: skip
            raw = received(wire, delivery_info={"exchange": "", "routing_key": queue})
            parsed = parse(raw, {"json"})
            self.outcomes.append(self._executor.run(Delivery(raw, parsed, queue, epoch=1)))  # type: ignore[arg-type]
        return sent


def iter_growing(items: list[Any]) -> Any:
    waiting, at = deque[Any](), 0
    while at < len(items):
        waiting.append(items[at])
        at += 1
        yield waiting.popleft()


@pytest.fixture
def project(room: AppRoom) -> Project:
    return Project(room)


SCENARIOS: dict[str, Callable[[Project], Any]] = {
    "link": lambda p: p.add.apply_async((1, 1), link=p.add.s(10)),
    "link_list": lambda p: p.add.apply_async(
        (1, 1), link=[p.add.s(10), p.xsum.si([1, 2]).set(queue="celery", priority=3)]
    ),
    "link_error_new": lambda p: p.fail.apply_async(link_error=p.errback.s()),
    "link_error_old": lambda p: p.fail.apply_async(link_error=p.errback_old.s()),
    "chain": lambda p: chain(p.add.s(1, 2), p.add.s(3), p.add.s(4)).delay(),
    "group": lambda p: group(p.add.s(1, 1), p.add.s(2, 2)).delay(),
    "chord": lambda p: chord([p.add.s(1, 1), p.add.s(2, 2)])(p.xsum.s()),
    "chord_body_group": lambda p: chord([p.add.s(1, 1), p.add.s(2, 2)])(
        group(p.ident.s(), p.xsum.s())
    ),
    "chord_fail": lambda p: chord([p.add.s(1, 1), p.fail.s()])(
        p.xsum.s().on_error(p.errback_old.s())
    ),
    "chain_group_chain": lambda p: chain(
        p.add.s(1, 1), group(p.add.s(1), p.add.s(2)), p.xsum.s(), p.add.s(5)
    ).delay(),
    "replaced": lambda p: p.replaced.delay(5),
    "replaced_in_chain": lambda p: chain(p.replaced.s(5), p.add.s(100)).delay(),
    "replaced_group": lambda p: p.replaced_group.delay(5),
    "spawn": lambda p: p.spawn.delay(2),
    "stamps": lambda p: (p.add.s(1, 1) | p.add.s(2)).stamp(Stamp()).delay(),
    "map_starmap_chunks": lambda p: (
        p.add.starmap([(1, 2), (3, 4)]).delay(),
        p.add.chunks([(1, 1), (2, 2), (3, 3)], 2).apply_async(),
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_canvas_sends_what_celery_sends(name: str, project: Project) -> None:
    SCENARIOS[name](project)
    captured = json.loads((CAPTURED / f"{name}.json").read_text())
    theirs = [
        {"headers": m["headers"], "body": m["body_decoded"], "key": m["routing_key"],
         "properties": m["properties"]}
        for m in captured["messages_in_order_of_publication"]
    ]  # fmt: skip
    ours = project.work()
    assert comparable(ours) == comparable(theirs)


def comparable(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages with their ids numbered, and without what depends on the moment."""
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        return numbers.setdefault(match.group(), f"id{len(numbers)}")

    found = []
    for message in messages:
        headers = dict(message["headers"], origin=None, kwargsrepr=None, argsrepr=None)
        order = ("id", "root_id", "parent_id")
        shown = [*(headers.pop(name) for name in order), tidy(headers), tidy(message["body"])]
        shown += [message["key"], message["properties"]["priority"]]
        found.append(json.loads(ID.sub(numbered, json.dumps(shown, sort_keys=True))))
    return found


def tidy(value: Any) -> Any:
    """Options that say nothing are as good as absent; a sender's address is its own."""
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: tidy(item) for key, item in value.items()}
    if isinstance(value.get("stamped_headers"), list):
        value["stamped_headers"].sort()
    if "subtask_type" in value:
        options = value["options"]
        value["options"] = {k: v for k, v in options.items() if v is not None and k != "reply_to"}
    return value

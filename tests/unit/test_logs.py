"""Which task a line of the log belongs to."""

from __future__ import annotations

import logging

import pytest

from flask_taskworker import Task, get_task_logger
from flask_taskworker.logs import TaskFilter
from support import Bench


def test_the_lines_of_a_task_carry_its_id(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_task_logger("shop.mail")

    def work() -> None:
        logger.warning("half way")

    bench.run(bench.task(work))
    (record,) = [r for r in caplog.records if r.getMessage() == "half way"]
    assert record.name == "flask_taskworker.task.shop.mail"
    assert vars(record)["task_id"] == bench.delivery.message.id
    assert vars(record)["task_name"] == "t.work"


def test_the_worker_s_own_lines_about_a_run_carry_it_too(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flask_taskworker"):
        bench.run(lambda: 5)
    (record,) = [r for r in caplog.records if "succeeded" in r.getMessage()]
    assert vars(record)["task_id"] == bench.delivery.message.id


def test_outside_a_run_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    get_task_logger("shop").warning("alone")
    (record,) = caplog.records
    assert (vars(record)["task_id"], vars(record)["task_name"]) == (None, None)


def test_a_handler_of_the_app_may_show_it(bench: Bench) -> None:
    lines: list[str] = []

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Collecting()
    handler.addFilter(TaskFilter())
    handler.setFormatter(logging.Formatter("%(task_name)s[%(task_id)s] %(message)s"))
    bench.app.logger.addHandler(handler)

    def work(self: Task[..., object]) -> None:
        bench.app.logger.warning("hello")

    try:
        bench.run(bench.task(work, bind=True))
    finally:
        bench.app.logger.removeHandler(handler)
    assert lines == [f"t.work[{bench.delivery.message.id}] hello"]


def test_the_root_logger_is_left_alone() -> None:
    assert not any(isinstance(known, TaskFilter) for known in logging.getLogger().filters)
    one = get_task_logger("twice")
    assert get_task_logger("twice") is one
    assert len(one.filters) == 1

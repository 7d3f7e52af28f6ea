"""A folder with an app in it, which programs run and the test's own process loads as well."""

from __future__ import annotations

import runpy
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker.app import TaskApp
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.worker.supervisor import Worker

from .ledger import Ledger
from .processes import PATIENCE, Program, Programs, eventually

TESTS = str(Path(__file__).resolve().parent.parent)


class AppFolder(Programs):
    """``lab.py`` in a folder, with a SQLite queue and a ledger next to it.

    :param text: the program; ``HERE``, ``ledger``, ``app``, ``os`` and ``time`` are there
        already, and settings come from ``FLASK_TASKER_...`` in the environment.
    """

    HEAD = """
        import os, time
        from flask import Flask
        from flask_taskworker import *
        from support.ledger import Ledger

        HERE = os.path.dirname(os.path.abspath(__file__))
        ledger = Ledger(os.path.join(HERE, "ledger"))
        app = Flask(__name__, instance_path=HERE)
        app.config.from_prefixed_env()
    """

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self.ledger = Ledger(folder / "ledger")
        self.url = f"sqlite:///{folder / 'taskworker.db'}"
        self._loaded: list[TaskApp] = []
        self.write(text)

    def write(self, *texts: str) -> None:
        """Write the program."""
        parts = [textwrap.dedent(text) for text in (self.HEAD, *texts)]
        (self.cwd / "lab.py").write_text("\n".join(parts))

    def python(self, *arguments: Any, apart: bool = False, **environment: str) -> Program:
        return super().python(*arguments, apart=apart, **{"PYTHONPATH": TESTS} | environment)

    def load(self, **environment: str) -> dict[str, Any]:
        """The names of the program, in this process, as a web server would have them."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            loaded = runpy.run_path(str(self.cwd / "lab.py"), run_name="lab")
        self._loaded.append(loaded["task_worker"].task_app())
        return loaded

    def send(self, *calls: str, **environment: str) -> None:
        """Run calls such as ``work.delay('a')`` in this process."""
        loaded = self.load(**environment)
        for call in calls:
            exec(call, loaded)

    def burst(self, **environment: str) -> None:
        """Run a worker in this process until the queues are empty."""
        worker = Worker(self.load(**environment)["task_worker"].task_app(), burst=True)
        thread = threading.Thread(target=worker.run, name="burst")
        thread.start()
        thread.join(PATIENCE)
        ended = not thread.is_alive()
        worker.stop(0)
        thread.join(PATIENCE)
        assert ended, "the burst did not end"

    def let_go(self) -> None:
        """Close what this process has opened of the database."""
        for task_app in self._loaded:
            task_app.close()
            if task_app.config.database_uri is not None:
                database_for(task_app.config.database_uri).dispose()
        self._loaded.clear()
        database_for(self.url).dispose()

    def steps(self, step: str) -> list[str]:
        """The names that took a step, in this order."""
        return [name for taken, name in self.ledger.lines() if taken == step]

    def wait_for_steps(self, step: str, count: int) -> list[str]:
        """Wait until a step was taken so often."""
        eventually(lambda: len(self.steps(step)) >= count, f"{count} times {step}")
        return self.steps(step)

    def query(self, sql: str, url: str | None = None) -> list[Any]:
        """The rows that the app's database answers with."""
        connection = database_for(url or self.url).connect()
        try:
            return list(connection.execute(sql).fetchall())
        finally:
            connection.close()

    def waiting(self) -> int:
        """How many messages lie in the task queues, claimed by nobody.

        What workers tell each other waits in a queue for those that died, too.
        """
        ((count,),) = self.query(
            "SELECT count(*) FROM taskworker_message WHERE owner = 0 AND queue NOT IN "
            "(SELECT id FROM taskworker_queue WHERE name LIKE '%pidbox%')"
        )
        return int(count)

    def close(self) -> None:
        super().close()
        self.let_go()

"""Two machines: the web process never calls start(), the worker process blocks in start(); they
share the database, and the web side may enqueue before any worker ever ran.

EXPECT
web: 200 queued 200 queued
web process ran nothing: True
worker is still in start(): True
results: ['ann@example.com pid differs', 'bob@example.com pid differs']
SIGTERM ends the worker: 0
"""

from _lab import Child, run, wait_for, workdir

APP = """
import os
from flask import Flask
from flask_taskworker import BlockingTaskWorker

task_worker = BlockingTaskWorker()


def create_app():
    app = Flask("machine")
    app.config.update(
        SQLALCHEMY_DATABASE_URI="sqlite:///" + os.path.join(os.environ["SHARED"], "app.db"),
        TASKER_LOOP_INTERVAL=1,
    )
    task_worker.init_app(app)
    import tasks

    @app.route("/send/<to>")
    def send(to):
        tasks.email_task.apply(to=to, pid=os.getpid())
        return "queued"

    return app
"""
TASKS = """
import os
from flask import current_app
from application import task_worker


@task_worker.define_task
def email_task(to, pid):
    assert current_app.name == "machine"
    with open(os.path.join(os.environ["SHARED"], "out.txt"), "a") as out:
        out.write("%s pid %s\\n" % (to, "differs" if pid != os.getpid() else "same"))
"""
WEB = """
from application import create_app

client = create_app().test_client()
answers = [client.get("/send/ann@example.com"), client.get("/send/bob@example.com")]
print("web:", *["%d %s" % (answer.status_code, answer.text) for answer in answers])
"""
WORKER = """
from application import create_app, task_worker

create_app()
print("starting")
task_worker.start()
print("returned")
"""

with workdir(application=APP, tasks=TASKS, web=WEB, worker=WORKER) as directory:
    out = directory / "out.txt"

    def lines():
        return sorted(out.read_text().splitlines()) if out.exists() else []

    print(run(["web.py"], directory, SHARED=str(directory)))
    print("web process ran nothing:", lines() == [])
    with Child(["worker.py"], directory, SHARED=str(directory)) as worker:
        wait_for(lambda: len(lines()) == 2, 25)
        running = worker.process.poll() is None and "returned" not in worker.lines
        print("worker is still in start():", running)
        print("results:", lines())
        print("SIGTERM ends the worker:", worker.stop())

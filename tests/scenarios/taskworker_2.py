"""init_app() after the tasks were defined, no configuration but a place for the default database;
tasks that are applied before start() wait for it.

EXPECT
defaults: sqlalchemy sqlite 5
nothing runs before start(): 0
all ran: ['a', 'b', 'c']
a second instance of the worker sees an empty queue: True
"""

import tempfile
import time

from flask import Flask

from _lab import wait_for
from flask_taskworker import BackgroundTaskWorker

task_worker = BackgroundTaskWorker()
ran = []


@task_worker.define_task
def note(name):
    ran.append(name)


app = Flask(__name__, instance_path=tempfile.mkdtemp())
task_worker.init_app(app)
print(
    "defaults:",
    str(app.config["TASKER_ENGINE"]).lower(),
    app.config["TASKER_DRIVER"],
    app.config["TASKER_LOOP_INTERVAL"],
)
for name in "abc":
    note.apply(name=name)
time.sleep(0.5)  # long enough for a worker to run them, if there were one
print("nothing runs before start():", len(ran))
task_worker.start()
wait_for(lambda: len(ran) == 3, 30)
print("all ran:", sorted(ran))

task_worker.stop()
other = Flask(__name__, instance_path=app.instance_path)
second = BackgroundTaskWorker()
second.define_task(note.run)
second.init_app(other)
second.start()
time.sleep(1)  # long enough to run one that was left
print("a second instance of the worker sees an empty queue:", len(ran) == 3)

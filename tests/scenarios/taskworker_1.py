"""The quick start in one process: BackgroundTaskWorker(app), a task, apply() from a view, start();
the task runs soon, elsewhere, inside the app context.

EXPECT
decorated: has apply: True
view: 200 queued
start() returned: True
task got: {'body': 'testing', 'to': 'you@example.com'}
in the context of: shop, config visible: hello
in another thread: True
ran once: 1
apply returned a handle: True
"""

import os
import tempfile
import threading
import time

from flask import Flask, current_app

from _lab import wait_for
from flask_taskworker import BackgroundTaskWorker

directory = tempfile.mkdtemp()
app = Flask("shop")
app.config.update(
    SQLALCHEMY_DATABASE_URI="sqlite:///" + os.path.join(directory, "app.db"),
    TASKER_LOOP_INTERVAL=1,
    GREETING="hello",
)
task_worker = BackgroundTaskWorker(app)
calls = []


def send_message(**kwargs):
    in_main_thread = threading.current_thread() is threading.main_thread()
    payload = dict(sorted(kwargs.items()))
    calls.append((payload, current_app.name, current_app.config["GREETING"], in_main_thread))
    return "sent"


@task_worker.define_task
def email_task(**kwargs):
    msg = send_message(**kwargs)
    return msg


returned = []


@app.route("/")
def index():
    payload = {"to": "you@example.com", "body": "testing"}
    returned.append(email_task.apply(**payload))
    return "queued"


print("decorated: has apply:", hasattr(email_task, "apply"))
task_worker.start()
response = app.test_client().get("/")
print("view:", response.status_code, response.text)
print("start() returned:", True)
wait_for(lambda: calls, 15)
time.sleep(1.5)  # longer than the loop interval: a second run would show
payload, name, greeting, in_main_thread = calls[0]
print("task got:", payload)
print(f"in the context of: {name}, config visible: {greeting}")
print("in another thread:", not in_main_thread)
print("ran once:", len(calls))
print("apply returned a handle:", bool(returned[0].id))

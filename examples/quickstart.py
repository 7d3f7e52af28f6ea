"""The main job in one file: a Flask app, three tasks, a worker, and a queue in a SQLite file.

python examples/quickstart.py              sends tasks in every way and prints what came back
flask --app examples/quickstart run        serves the same app; then, in another terminal:
    curl -X POST http://127.0.0.1:5000/add/2/3
    curl http://127.0.0.1:5000/result/<the id it printed>
"""

import time

from flask import Flask, current_app, url_for

from flask_taskworker import BackgroundTaskWorker

# No settings are needed: the queue and the results are tables of a SQLite file in the instance
# folder. To use Redis instead, set TASKER_BROKER_URL = "redis://localhost:6379/0".
app = Flask(__name__)
app.config["GREETING"] = "Hello"
task_worker = BackgroundTaskWorker(app)


@task_worker.define_task
def add(x, y):
    return {"started": time.time(), "value": x + y}


@task_worker.define_task
def greet(name):
    # A task runs inside the app context, as a view does.
    return {"started": time.time(), "value": f"{current_app.config['GREETING']}, {name}!"}


@task_worker.define_task(queue="reports")
def report(*, year):
    return {"started": time.time(), "value": f"The report of {year} is ready."}


# The worker: threads of this process. start() returns at once.
task_worker.start()


@app.post("/add/<int:x>/<int:y>")
def queue_addition(x, y):
    result = add.delay(x, y)
    return {"id": result.id, "look": url_for("show_result", task_id=result.id)}, 202


@app.get("/result/<task_id>")
def show_result(task_id):
    result = add.AsyncResult(task_id)
    return {"state": result.state, "value": result.result}


def demo():
    """Send a task in each of the three ways, wait for the results and print the latencies.

    The first one includes the start of the worker.
    """
    calls = {
        'greet.apply(name="Ada")': lambda: greet.apply(name="Ada"),
        "add.delay(2, 3)": lambda: add.delay(2, 3),
        "report.apply_async(countdown=1)": lambda: report.apply_async(
            kwargs={"year": 1815}, countdown=1
        ),
    }
    print(f"{'sent with':33}{'result':32}{'started after':>14}{'result after':>14}")
    for text, send in calls.items():
        sent = time.time()
        outcome = send().get(timeout=10)
        received = time.time()
        started = outcome["started"]
        print(
            f"{text:33}{outcome['value']!s:32}"
            f"{(started - sent) * 1000:11.1f} ms{(received - sent) * 1000:11.1f} ms"
        )


if __name__ == "__main__":
    demo()
    task_worker.stop()

"""The README is true: its commands and its code do what it says."""

import configparser
import re
import runpy
import shlex
import urllib.request
from pathlib import Path

import pytest

from flask_taskworker.config import SETTINGS

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def programs() -> list[str]:
    """The Python blocks; one without imports goes on where the one before it stopped."""
    whole: list[str] = []
    for block in blocks("python"):
        if re.search(r"^(from|import) ", block, re.MULTILINE):
            whole.append(block)
        else:
            whole[-1] += f"\n{block}"
    return whole


def readme_command(root: Path, name: str) -> str:
    return runpy.run_path(str(root / ".ci" / "readme_command.py"))["readme_command"](name)


def test_the_test_command_runs_a_tox_environment_that_exists(root: Path) -> None:
    *setup, test = readme_command(root, "test").split(" && ")
    assert setup == ["python3 -m venv .venv", ".venv/bin/pip install -q tox"]
    program, verb, *options = shlex.split(test)
    assert (program, verb) == (".venv/bin/tox", "run")
    tox = configparser.ConfigParser()
    tox.read(root / "tox.ini")
    assert options[-2] == "-e"
    assert options[-1] in tox["tox"]["env_list"].split(", ")


def test_the_first_command_runs_the_quickstart(root: Path) -> None:
    last = readme_command(root, "run").split(" && ")[-1]
    assert last == ".venv/bin/python examples/quickstart.py"
    assert (root / "examples" / "quickstart.py").exists()


def test_the_gate_runs_both_commands(root: Path) -> None:
    gate = (root / ".ci" / "run").read_text()
    assert "readme_command.py test" in gate
    assert "readme_command.py run" in gate


def test_the_first_program_has_twelve_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 13


@pytest.mark.parametrize("number", range(len(programs())))
def test_the_code_runs(number: int, tmp_path: Path, start_python) -> None:
    (tmp_path / "app.py").write_text(programs()[number])
    program = start_python("app.py")
    output, _ = program.communicate(timeout=30)
    assert program.returncode == 0, output
    if number == 0:
        task_id, state, result = output.splitlines()
        assert len(task_id) == 36
        assert state in {"PENDING", "SUCCESS"}
        assert result == "The report of 1815 is ready."
    else:
        assert output == ""


def test_the_first_program_serves(tmp_path: Path, start_python) -> None:
    (tmp_path / "app.py").write_text(blocks("python")[0])
    serve, request = next(block for block in blocks("sh") if "curl" in block).splitlines()
    program, *arguments = shlex.split(serve)
    assert program == "flask"
    path = re.fullmatch(r"curl -X POST http://127.0.0.1:5000(/\S+)", request)[1]
    server = start_python("-m", program, *arguments, "--port", "0")
    for line in server.stdout:
        if found := re.search(r"Running on (http://\S+)", line):
            post = urllib.request.Request(found[1] + path, method="POST")
            with urllib.request.urlopen(post, timeout=10) as answer:
                assert answer.read() == b"Your welcome mail is on its way.\n"
        if "Welcome, ada@example.org!" in line:
            return
    pytest.fail("the task did not run")


FIXTURES = {
    "postgresql": "postgresql_url",
    "mysql": "mysql_url",
    "redis": "redis_url",
    "amqp": "amqp_url",
}
TRANSPORTS = [
    pytest.param(
        key,
        url,
        id=url.partition(":")[0],
        marks=[pytest.mark.services] if url.partition(":")[0] in FIXTURES else [],
    )
    for key, url in re.findall(r"^\|[^|]*\| `(TASKER_\w+) = \"(.*)\"` \|", README, re.MULTILINE)
]


@pytest.mark.parametrize(("key", "url"), TRANSPORTS)
def test_one_line_swaps_the_transport(
    key: str, url: str, tmp_path: Path, start_python, request: pytest.FixtureRequest
) -> None:
    scheme = url.partition(":")[0]
    if scheme in FIXTURES:
        url = re.sub(r"\+\w+", "", request.getfixturevalue(FIXTURES[scheme]), count=1)
        assert url.startswith(f"{scheme}://")
    first = programs()[0]
    changed = first.replace("task_worker =", f"app.config[{key!r}] = {url!r}\ntask_worker =", 1)
    assert changed != first
    (tmp_path / "app.py").write_text(changed)
    program = start_python("app.py")
    output, _ = program.communicate(timeout=30)
    assert program.returncode == 0, output
    assert output.splitlines()[-1] == "The report of 1815 is ready."
    assert not list(tmp_path.rglob("taskworker.db"))


def test_the_table_names_all_transports() -> None:
    assert {param.id for param in TRANSPORTS} == {*FIXTURES, "filesystem", "memory"}


WORKER_COMMANDS = [
    line for block in blocks("sh") for line in block.splitlines() if " worker" in line
]


@pytest.mark.parametrize("command", WORKER_COMMANDS)
def test_the_worker_commands_run(command: str, tmp_path: Path, start_python) -> None:
    web_app = blocks("python")[0].replace("task_worker.start()", "")
    (tmp_path / "app.py").write_text(web_app)
    program, *arguments = shlex.split(command)
    module = {"flask": "flask", "taskworker": "flask_taskworker"}[program]
    worker = start_python("-m", module, *arguments)
    output = ""
    for line in worker.stdout:
        output += line
        if " ready, reading celery" in line and "--burst" not in arguments:
            worker.terminate()
    assert worker.wait(timeout=20) == 0, output
    assert " ready, reading celery" in output
    assert output.endswith(" stopped\n")


def test_the_configuration_table_agrees_with_the_code() -> None:
    rows = re.findall(r"^\| `(TASKER_\w+)` \| (.*?) \|", README, re.MULTILINE)
    assert len(rows) > 10
    settings = {setting.key: setting for setting in SETTINGS}
    for key, default in rows:
        if re.fullmatch(r"`[^`]*`", default) and not settings[key].derived:
            assert default.strip("`").replace('"', "'") == repr(settings[key].default), key
        else:
            assert settings[key].derived, key

"""Several workers by one command line: which ones, and with which options."""

from __future__ import annotations

import signal
import sys

import pytest

from flask_taskworker import ConfigurationError
from flask_taskworker.worker.multi import nodes, parse

FLAGS = {"-E", "--burst", "-D"}


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "web.example.org")


def commands(text: str, *shared: str) -> list[str]:
    """The commands without what they all begin with."""
    found = []
    for node in nodes(parse(text.split(), FLAGS), shared):
        assert node.command[:3] == (sys.executable, "-m", "flask_taskworker")
        found.append(" ".join(node.command[3:]))
    return found


def test_a_number_makes_that_many_workers() -> None:
    assert commands("2 -c 3 --loglevel=info") == [
        "worker -n worker1@web.example.org --pidfile worker1.pid --logfile worker1.log "
        "-c 3 --loglevel info",
        "worker -n worker2@web.example.org --pidfile worker2.pid --logfile worker2.log "
        "-c 3 --loglevel info",
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mail web", ["mail@web.example.org", "web@web.example.org"]),
        ("mail@%h a@b", ["mail@web.example.org", "a@b"]),
        ("2 --range-prefix=w", ["w1@web.example.org", "w2@web.example.org"]),
        ("1 --prefix w --hostname=other", ["w1@other"]),
        ("mail --suffix=%d", ["mail@example.org"]),
        ("-E mail", ["mail@web.example.org"]),
        ("--burst mail -9", ["mail@web.example.org"]),
    ],
)
def test_nodes_have_names(text: str, names: list[str]) -> None:
    assert [node.name for node in nodes(parse(text.split(), FLAGS))] == names


def test_files_are_named_by_patterns() -> None:
    (node,) = nodes(parse(["mail", "--pidfile=/run/%n.pid", "-f", "/log/%p.log"], FLAGS))
    assert node.pid_file == "/run/mail.pid"
    assert node.log_file == "/log/mail@web.example.org.log"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4 -c 3 -c:1-2 9", ["9", "9", "3", "3"]),
        ("4 -c 3 -c:2,4 9", ["3", "9", "3", "9"]),
        ("4 -c:1-99 9 -c 3", ["9", "9", "9", "9"]),
        ("a b c -c 3 -c:b 9 -c:3 7", ["3", "9", "7"]),
        ("a b -c 3 --concurrency:b=9", ["3", "3"]),
    ],
)
def test_options_may_be_for_some(text: str, sizes: list[str]) -> None:
    found = nodes(parse(text.split(), FLAGS))
    assert [node.command[node.command.index("-c") + 1] for node in found] == sizes


def test_what_stood_before_the_command_comes_first() -> None:
    (command,) = commands("mail -E", "-A", "shop:app", "-b", "redis://h")
    assert command.startswith("-A shop:app -b redis://h worker -n mail@")
    assert command.endswith(" -E")


@pytest.mark.parametrize(
    ("word", "number"), [("-9", 9), ("-QUIT", signal.SIGQUIT), ("-SIGUSR1", signal.SIGUSR1)]
)
def test_a_signal_can_be_named(word: str, number: int) -> None:
    assert parse(["mail", word], FLAGS).signal == number


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "name the workers"),
        ("-E", "name the workers"),
        ("0", "name the workers"),
        ("2 -c:0 1", "meant for '0', but the workers are worker1, worker2"),
        ("2 -c:web 1", "meant for 'web'"),
        ("2 -c:1-x 1", "meant for '1-x'"),
        ("2 -NOPE", "there is no signal -NOPE"),
    ],
)
def test_a_mistake_is_explained(text: str, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        nodes(parse(text.split(), FLAGS))


def test_the_command_can_be_given_to_a_shell() -> None:
    (node,) = nodes(parse(["mail", "-Q", "a b"], FLAGS))
    assert node.shell_command.endswith("-Q 'a b'")

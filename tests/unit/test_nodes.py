"""Names of nodes and of their files."""

from __future__ import annotations

import pytest

from flask_taskworker.worker.nodes import file_name, node_name


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "worker@web.example.org"),
        ("mail", "mail@web.example.org"),
        ("mail@%h", "mail@web.example.org"),
        ("%n@site", "web@site"),
        ("%n-%i%I@%d", "web-0@example.org"),
        ("50%%@%h", "50%@web.example.org"),
        ("a@b", "a@b"),
    ],
)
def test_a_node_has_a_name(
    template: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "web.example.org")
    assert node_name(template) == name


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("/run/%n.pid", "/run/mail.pid"),
        ("%p%I.log", "mail@web.example.org.log"),
        ("%h-%d-%i", "web.example.org-example.org-0"),
        ("100%%.log", "100%.log"),
        ("%x.log", "%x.log"),
    ],
)
def test_a_file_is_named_after_its_node(pattern: str, name: str) -> None:
    assert file_name(pattern, "mail@web.example.org") == name

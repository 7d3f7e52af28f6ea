"""Messages: written as Celery writes them, read without ever raising."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import uuid
import zlib
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.message import Message

from flask_taskworker.exceptions import EncodeError
from flask_taskworker.fields import FARTHEST_ETA
from flask_taskworker.message import Payload, TaskMessage, Unreadable, WireMessage, encode, parse
from flask_taskworker.texts import REPR_LIMIT, safe_repr
from support import FakeClock, received

CAPTURES = Path(__file__).parents[1] / "data" / "protocol" / "task_messages"
ID = "cd694c77-126c-4341-830d-c682d65a64af"
JSON = {"json"}
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


# -- what Celery 5.7 sent -----------------------------------------------------------------


class Capture(NamedTuple):
    """One message as it was seen between Celery and its broker."""

    name: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    decoded: Any
    raw: dict[str, str] | None

    def body(self) -> bytes:
        if self.raw is None:
            return json.dumps(self.decoded).encode()
        if "text" in self.raw:
            return self.raw["text"].encode()
        return base64.b64decode(self.raw["base64"])

    def message(self) -> Message:
        return Message(
            body=self.body(),
            content_type=self.properties["content_type"],
            content_encoding=self.properties["content_encoding"],
            headers=dict(self.headers),
            properties=dict(self.properties),
        )


def _captures() -> list[Capture]:
    found = []
    for path in sorted(CAPTURES.glob("*.json")):
        document = json.loads(path.read_text())
        messages = document.get("messages_in_order_of_publication") or document["messages"]
        for number, item in enumerate(messages):
            headers = item.get("headers")
            properties = dict(item["properties"])
            if headers is None:  # this file keeps the headers among the properties
                headers = properties.pop("headers")
            decoded = item["body_decoded"] if "body_decoded" in item else item["body"]
            name = f"{path.stem}-{number}"
            found.append(Capture(name, headers, properties, decoded, item.get("body_raw")))
    return found


ALL = _captures()
PROTOCOL_2 = [capture for capture in ALL if capture.headers]
PROTOCOL_1 = [capture for capture in ALL if not capture.headers]
SERIALIZERS = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-yaml": "yaml",
    "application/x-msgpack": "msgpack",
}
COMPRESSIONS = {"application/x-gzip": "gzip", "application/x-bz2": "bzip2"}
#: Properties that belong to one sending, not to the task: they are not sent along.
NOT_KEPT = {"message_id", "user_id"}


def same(left: Any, right: Any) -> bool:
    """Equal in value and in type at every level; the order of keys does not count."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_the_comparison_tells_types_apart_but_not_the_order_of_keys() -> None:
    assert same({"a": 1, "b": [None]}, {"b": [None], "a": 1})
    assert not same({"a": 1}, {"a": True})
    assert not same([1], [1.0])
    assert not same([1], (1,))
    assert not same({"a": 1}, {"a": 1, "b": None})


def test_there_are_messages_to_compare_with() -> None:
    assert len(PROTOCOL_2) > 60
    assert len(PROTOCOL_1) == 1
    assert {capture.properties["content_type"] for capture in ALL} == set(SERIALIZERS)


def read(capture: Capture, clock: FakeClock) -> TaskMessage:
    """Parse a captured message at the time it was sent."""
    eta, expires = capture.headers.get("eta"), capture.headers.get("expires")
    if eta is not None:
        clock.set(datetime.fromisoformat(eta) - timedelta(seconds=1))
    if expires is not None:
        left = timedelta(milliseconds=int(capture.properties["expiration"]))
        clock.set(datetime.fromisoformat(expires) - left)
    serializer = SERIALIZERS[capture.properties["content_type"]]
    if serializer in {"yaml", "msgpack"}:
        pytest.importorskip(serializer)
    message = parse(capture.message(), {serializer})
    assert isinstance(message, TaskMessage), message
    return message


@pytest.mark.parametrize("capture", PROTOCOL_2, ids=lambda capture: capture.name)
def test_celerys_message_is_written_again_as_it_was(capture: Capture, clock: FakeClock) -> None:
    message = read(capture, clock)
    serializer = SERIALIZERS[capture.properties["content_type"]]
    compression = COMPRESSIONS.get(capture.headers.get("compression", ""))
    wire = encode(message, serializer, compression)

    assert same(wire.headers, capture.headers)
    written = wire.properties | {
        "content_type": wire.content_type,
        "content_encoding": wire.content_encoding,
    }
    expected = {key: value for key, value in capture.properties.items() if key not in NOT_KEPT}
    expected.setdefault("priority", 0)  # one was sent without
    assert same(written, expected)
    assert same(_plain(wire, serializer), capture.decoded)


def _plain(wire: WireMessage, serializer: str) -> Any:
    """The body as JSON has it, unpacked by hand and not by the code under test."""
    data = wire.body if isinstance(wire.body, bytes) else wire.body.encode()
    unpack: dict[str | None, Callable[[bytes], bytes]] = {
        None: bytes,
        "application/x-gzip": zlib.decompress,
        "application/x-bz2": bz2.decompress,
    }
    data = unpack[wire.headers.get("compression")](data)
    if serializer == "json":
        return json.loads(data)
    import kombu.serialization

    loaded = kombu.serialization.loads(
        data, wire.content_type, wire.content_encoding, accept={wire.content_type}
    )
    return json.loads(json.dumps(loaded))


def test_what_the_fields_of_a_message_are_in_types_of_python(clock: FakeClock) -> None:
    captures = {capture.name: capture for capture in PROTOCOL_2}
    plain = read(captures["plain-0"], clock)
    assert plain == TaskMessage(
        task="proj.add",
        id=ID,
        payload=Payload([2, 3], {}),
        root_id=ID,
        argsrepr="(2, 3)",
        kwargsrepr="{}",
        origin="gen19157@host",
        reply_to="d14f0e63-616c-3170-871b-74c3b2a1ab63",
        correlation_id=ID,
    )
    limits = read(captures["time_limits-0"], clock)
    assert limits.timelimit == (30, 20)
    eta = read(captures["eta-0"], clock)
    assert eta.eta == datetime(2026, 1, 2, 1, 4, 5, tzinfo=timezone.utc)
    assert read(captures["custom_headers-0"], clock).headers == {"x-trace": "abc"}
    member = read(captures["group-1"], clock)
    assert (member.group_index, member.group) == (1, "6cca6c8f-c58d-4e87-8843-f69fc08b6664")
    again = read(captures["retry-1"], clock)
    assert (again.retries, again.parent_id) == (1, again.id)


def test_tagged_values_of_json_are_rebuilt(clock: FakeClock) -> None:
    capture = next(capture for capture in PROTOCOL_2 if capture.name == "json_types-0")
    value = read(capture, clock).payload.args[0]
    assert value["dt"] == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
    assert value["d"] == date(2026, 1, 2)
    assert value["dec"] == Decimal("1.10")
    assert value["uuid"] == uuid.UUID(int=5)
    assert value["text"] == b"hello"
    assert value["tuple"] == [1, 2]


def test_protocol_1_is_read(clock: FakeClock) -> None:
    message = read(PROTOCOL_1[0], clock)
    task_id = "10465339-14f0-4842-ab59-bbc8d1fb5575"
    assert message == TaskMessage(
        task="proj.add",
        id=task_id,
        payload=Payload([2, 3], {}),
        root_id=task_id,
        reply_to="d14f0e63-616c-3170-871b-74c3b2a1ab63",
        correlation_id=task_id,
    )


def test_protocol_1_brings_its_group_its_times_and_what_follows(clock: FakeClock) -> None:
    due = clock.at(60)
    body = {
        "task": "proj.add",
        "id": ID,
        "args": [1],
        "kwargs": {"y": 2},
        "taskset": "g1",
        "retries": 3,
        "eta": due.replace(tzinfo=None).isoformat(),
        "timelimit": [9, None],
        "callbacks": [{"task": "proj.next"}],
        "chord": {"task": "proj.sum"},
    }
    message = parse(raw(headers={}, body=body), JSON)
    assert isinstance(message, TaskMessage)
    assert message.payload == Payload(
        [1], {"y": 2}, callbacks=[{"task": "proj.next"}], chord={"task": "proj.sum"}
    )
    assert (message.group, message.retries, message.eta) == ("g1", 3, due)
    assert message.timelimit == (9, None)


# -- the least that a worker must run -----------------------------------------------------


def raw(
    headers: Any = None,
    body: Any = None,
    content_type: Any = "application/json",
    content_encoding: Any = "utf-8",
    properties: Any = None,
    **header: Any,
) -> Message:
    """A received message; by default a good one, from which a test departs."""
    if headers is None:
        headers = {"task": "proj.add", "id": ID, **header}
    if body is None:
        body = [[2, 3], {}, EMBED]
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    message = Message(body=data, content_type=content_type, content_encoding=content_encoding)
    # set afterwards: what kombu makes of them is not the question here
    message.headers, message.properties = headers, {} if properties is None else properties
    return message


MINIMAL = {
    "task and id only": raw(body=[[2, 3], {}, {}]),
    "embed null": raw(body=[[2, 3], {}, None]),
    "args null": raw(body=[None, {"x": 2, "y": 3}, {}]),
    "kwargs null": raw(body=[[2, 3], None, {}]),
    "other language": raw(lang="js"),
    "no encoding": raw(content_encoding=None),
    "text body": raw(body="[[2, 3], {}, {}]"),
    "naive eta": raw(eta="2020-01-01T00:00:00"),
    "eta with Z": raw(eta="2020-01-01T00:00:00Z"),
    "unknown headers": raw(shiny=True),
    "protocol 1": raw(headers={}, body={"task": "proj.add", "id": ID, "args": [2, 3]}),
    "whole signature in the chain": raw(
        body=[[2, 3], {}, {"chain": [{"task": "proj.add", "args": [], "options": {}}]}]
    ),
    "properties that are none": raw(properties=5),
    "duplicate keys": raw(body='[[2, 3], {"a": 1, "a": 2}, {"chain": 5, "chain": null}]'),
}


@pytest.mark.parametrize("message", MINIMAL.values(), ids=MINIMAL)
def test_what_celery_runs_is_read(message: Message) -> None:
    parsed = parse(message, JSON)
    assert isinstance(parsed, TaskMessage)
    assert (parsed.task, parsed.id) == ("proj.add", ID)
    assert parsed.retries == 0
    assert parsed.timelimit == (None, None)


@pytest.mark.parametrize(
    ("given", "read_as"), [(None, None), (True, True), (False, False), ("missing", False)]
)
def test_ignore_result_null_leaves_it_to_the_task(given: Any, read_as: bool | None) -> None:
    header = {} if given == "missing" else {"ignore_result": given}
    message = parse(raw(**header), JSON)
    assert isinstance(message, TaskMessage)
    assert message.ignore_result is read_as


@pytest.mark.parametrize(
    ("given", "read_as"),
    [(3, 3), (9, 9), (-1, 0), (10**9, 255), ("high", 0), (None, 0), (2.5, 0)],
)
def test_a_priority_no_broker_has_is_clamped(given: Any, read_as: int) -> None:
    message = parse(raw(properties={"priority": given}), JSON)
    assert isinstance(message, TaskMessage)
    assert message.priority == read_as


# -- malformed messages -------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000

MALFORMED: dict[str, tuple[Message, str]] = {
    # the body
    "body: broken JSON": (raw(body="[[1, 2"), "the body is no valid application/json"),
    "body: empty": (raw(body=b""), "the body is "),
    "body: not UTF-8": (raw(body=b"\xff\xfe[]"), "the body is no valid application/json"),
    "body: a number": (raw(body=5), "not [args, kwargs, embed]"),
    "body: a text": (raw(body='"abc"'), "not [args, kwargs, embed]"),
    "body: an object": (raw(body={}), "not [args, kwargs, embed]"),
    "body: two items": (raw(body=[[], {}]), "not [args, kwargs, embed]"),
    "body: four items": (raw(body=[[], {}, {}, {}]), "not [args, kwargs, embed]"),
    "body: 100,000 levels deep": (raw(body=DEEP), "the body is no valid application/json"),
    "body: encoding is a number": (raw(body=b"[]", content_encoding=5), "the body is no valid"),
    "args: a text": (raw(body=["ab", {}, {}]), "args is 'ab', not a list or tuple"),
    "args: an object": (raw(body=[{}, {}, {}]), "args is {}, not a list or tuple"),
    "args: true": (raw(body=[True, {}, {}]), "args is True, not a list or tuple"),
    "kwargs: a list": (raw(body=[[], [1], {}]), "kwargs is [1], not a dict"),
    "kwargs: a text": (raw(body=[[], "a", {}]), "kwargs is 'a', not a dict"),
    "embed: a text": (raw(body=[[], {}, "x"]), "embed is 'x', not a dict"),
    "embed: a list": (raw(body=[[], {}, [1]]), "embed is [1], not a dict"),
    "chain: a text": (raw(body=[[], {}, {"chain": "x"}]), "chain is 'x', not a list or tuple"),
    "chain: of numbers": (raw(body=[[], {}, {"chain": [5]}]), "chain holds 5, not a signature"),
    "chain: of null": (raw(body=[[], {}, {"chain": [None]}]), "chain holds None, not a"),
    "callbacks: a number": (raw(body=[[], {}, {"callbacks": 5}]), "callbacks is 5, not a list"),
    "callbacks: no task": (
        raw(body=[[], {}, {"callbacks": [{"args": []}]}]),
        "callbacks holds {'args': []}, not a signature",
    ),
    "errbacks: an object": (raw(body=[[], {}, {"errbacks": {}}]), "errbacks is {}, not a list"),
    "chord: a list": (raw(body=[[], {}, {"chord": [1]}]), "chord holds [1], not a signature"),
    "chord: task is a number": (raw(body=[[], {}, {"chord": {"task": 1}}]), "not a signature"),
    # the content type
    "content type: pickle": (
        raw(body=b"cos\nsystem\n(S'false'\ntR.", content_type="application/x-python-serialize"),
        "'application/x-python-serialize' is refused; TASKER_ACCEPT_CONTENT allows json",
    ),
    "content type: unknown": (raw(content_type="text/plain"), "'text/plain' is refused"),
    "content type: missing": (raw(content_type=None), "content type None is no text"),
    "content type: a number": (raw(content_type=7), "content type 7 is no text"),
    # the headers
    "headers: missing": (raw(headers={}), "no header 'task'"),
    "headers: a list": (raw(headers=["task"]), "no header 'task'"),
    "headers: a text": (raw(headers="task"), "no header 'task'"),
    "task: null": (raw(task=None), "task is None, not a text"),
    "task: empty": (raw(task=""), "task is '', not a text"),
    "task: a list": (raw(task=["a"]), "task is ['a'], not a text"),
    "id: missing": (raw(headers={"task": "proj.add"}), "id is None, not a text"),
    "id: an object": (raw(id={"a": 1}), "id is {'a': 1}, not a text"),
    "id: a number": (raw(id=5), "id is 5, not a text"),
    "id: bytes": (raw(id=b"abc"), "id is b'abc', not a text"),
    "id: one MB": (raw(id="x" * 2**20), "not a text of 1-255 printable characters"),
    "id: with NUL": (raw(id="a\0b"), r"id is 'a\x00b', not a text"),
    "id: a lone surrogate": (raw(id="\ud800"), r"id is '\ud800', not a text"),
    "id: two lines": (raw(id="a\nb"), r"id is 'a\nb', not a text"),
    "root_id: a number": (raw(root_id=5), "root_id is 5, not a text"),
    "parent_id: an object": (raw(parent_id={}), "parent_id is {}, not a text"),
    "group: a list": (raw(group=[1]), "group is [1], not a text"),
    "group_index: a text": (raw(group_index="1"), "group_index is '1', not a int"),
    "timelimit: a number": (raw(timelimit=5), "timelimit is 5, not [hard, soft]"),
    "timelimit: three": (raw(timelimit=[1, 2, 3]), "timelimit is [1, 2, 3], not [hard, soft]"),
    "timelimit: texts": (raw(timelimit=["a", "b"]), "timelimit is 'a', not a int or float"),
    "timelimit: negative": (raw(timelimit=[-1, None]), "no seconds of 0 or more"),
    "timelimit: NaN": (raw(timelimit=[float("nan"), 1]), "no seconds of 0 or more"),
    "timelimit: without end": (raw(timelimit=[float("inf"), 1]), "no seconds of 0 or more"),
    "retries: a text": (raw(retries="x"), "retries is 'x', not a int"),
    "retries: true": (raw(retries=True), "retries is True, not a int"),
    "retries: negative": (raw(retries=-1), "retries is -1, less than 0"),
    "nesting: a text": (raw(replaced_task_nesting="x"), "replaced_task_nesting is 'x'"),
    "eta: junk": (raw(eta="tomorrow"), "eta is 'tomorrow', no ISO 8601 time"),
    "eta: a number": (raw(eta=9999), "eta is 9999, not an ISO 8601 text"),
    "eta: an object": (raw(eta={}), "eta is {}, not an ISO 8601 text"),
    "eta: the year 9999": (raw(eta="9999-12-31T23:59:59-14:00"), "more than a year away"),
    "eta: the 31st of February": (raw(eta="2026-02-31T00:00:00"), "no ISO 8601 time"),
    "expires: a number": (raw(expires=60), "expires is 60, not an ISO 8601 text"),
    "expires: junk": (raw(expires="soon"), "expires is 'soon', no ISO 8601 time"),
    "shadow: a number": (raw(shadow=1), "shadow is 1, not a str"),
    "stamps: a list": (raw(stamps=[]), "stamps is [], not a dict"),
    "stamped_headers: a text": (raw(stamped_headers="a"), "stamped_headers is 'a', not a list"),
    "origin: a number": (raw(origin=1), "origin is 1, not a str"),
    "argsrepr: a list": (raw(argsrepr=[1]), "argsrepr is [1], not a str"),
    # the properties
    "reply_to: a number": (raw(properties={"reply_to": 5}), "reply_to is 5, not a text"),
    "correlation_id: a list": (raw(properties={"correlation_id": []}), "correlation_id is []"),
    # protocol 1
    "protocol 1: no id": (raw(headers={}, body={"task": "proj.add"}), "id is None, not a text"),
    "protocol 1: args a text": (
        raw(headers={}, body={"task": "proj.add", "id": ID, "args": "ab"}),
        "args is 'ab', not a list or tuple",
    ),
}


@pytest.mark.parametrize(("message", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_gives_its_reason(message: Message, reason: str) -> None:
    parsed = parse(message, JSON)
    assert isinstance(parsed, Unreadable)
    assert reason in parsed.reason
    assert len(parsed.reason) <= 2000
    parsed.reason.encode()  # fit for a log and for a database
    assert "\0" not in parsed.reason


def test_a_body_packed_wrongly_or_by_an_unknown_method_gives_its_reason() -> None:
    for method, data in (("application/x-gzip", b"no zip"), ("application/x-rar", b"[]")):
        message = Message(
            body=data,
            content_type="application/json",
            content_encoding="utf-8",
            headers={"task": "proj.add", "id": ID, "compression": method},
        )
        parsed = parse(message, JSON)
        assert isinstance(parsed, Unreadable)
        assert "cannot be unpacked" in parsed.reason
        assert parsed.task_id == ID


def test_a_fault_in_reading_is_a_reason_too() -> None:
    class Broken:
        headers: Any = {"task": "t", "id": ID}  # noqa: RUF012
        properties = body = content_encoding = None

        @property
        def content_type(self) -> Any:
            raise RuntimeError("broken")

    parsed = parse(Broken(), JSON)  # type: ignore[arg-type]
    assert parsed == Unreadable("the message cannot be read: RuntimeError: broken", ID, "t")


def test_keyword_arguments_have_texts_as_names() -> None:
    pickled = encode(TaskMessage(task="t", id=ID, payload=Payload((), {1: 2})), "pickle")  # type: ignore[dict-item]
    parsed = parse(received(pickled), {"pickle"})
    assert isinstance(parsed, Unreadable)
    assert parsed.reason == "a keyword argument is named 1, not by a text"


@pytest.mark.parametrize(
    ("message", "task_id", "task"),
    [
        (raw(retries="x"), ID, "proj.add"),
        (raw(body="["), ID, "proj.add"),
        (raw(id=5), None, "proj.add"),
        (raw(task=None), ID, None),
        (raw(headers=[]), None, None),
        (raw(headers={}, body={"task": "old", "id": "7", "args": 5}), "7", "old"),
        (raw(id="a\0"), None, "proj.add"),
    ],
)
def test_a_malformed_message_still_says_whose_it_was(
    message: Message, task_id: str | None, task: str | None
) -> None:
    parsed = parse(message, JSON)
    assert isinstance(parsed, Unreadable)
    assert (parsed.task_id, parsed.task) == (task_id, task)


def test_a_body_that_is_not_accepted_is_not_decoded(tmp_path: Path) -> None:
    import os

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    wire = encode(TaskMessage(task="t", id=ID, payload=Payload((Bomb(),))), "pickle")
    assert isinstance(parse(received(wire), JSON), Unreadable)
    assert not (tmp_path / "executed").exists()
    parse(received(wire), {"pickle"})
    assert (tmp_path / "executed").exists()  # it would have


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
anything = json_values | st.binary(max_size=8) | st.just("\ud800") | st.just(10**400)
header_names = st.sampled_from(
    sorted(
        {
            "task", "id", "eta", "expires", "group", "group_index", "retries", "timelimit",
            "root_id", "parent_id", "shadow", "ignore_result", "replaced_task_nesting",
            "stamped_headers", "stamps", "argsrepr", "kwargsrepr", "origin", "lang",
        }
    )
)  # fmt: skip
some_headers = st.dictionaries(header_names, anything, max_size=4)
embeds = st.dictionaries(
    st.sampled_from(["callbacks", "errbacks", "chain", "chord"]), json_values, max_size=2
)
bodies = (
    json_values.map(json.dumps)
    | st.binary(max_size=16)
    | st.tuples(json_values, json_values, embeds | json_values).map(json.dumps)
    | st.tuples(st.lists(json_values, max_size=2), st.just({}), embeds).map(json.dumps)
)
some_properties = st.dictionaries(
    st.sampled_from(["reply_to", "correlation_id", "priority"]), anything, max_size=3
)


@settings(
    max_examples=150, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    headers=some_headers.map(lambda some: {"task": "t", "id": ID, **some}) | anything,
    body=bodies,
    properties=some_properties | anything,
    content_type=st.just("application/json") | anything,
    content_encoding=st.just("utf-8") | anything,
)
def test_whatever_comes_gives_a_message_or_a_reason(
    headers: Any, body: Any, properties: Any, content_type: Any, content_encoding: Any
) -> None:
    parsed = parse(raw(headers, body, content_type, content_encoding, properties), JSON)
    if isinstance(parsed, Unreadable):
        assert parsed.reason
        parsed.reason.encode()
        return
    for name in (parsed.task, parsed.id, parsed.root_id, parsed.parent_id, parsed.group):
        assert name is None or (0 < len(name) <= 255 and "\0" not in name and name.encode())
    assert parsed.retries >= 0
    assert 0 <= parsed.priority <= 255
    assert parsed.eta is None or parsed.eta.tzinfo is not None
    assert parsed.expires is None or parsed.expires.tzinfo is not None
    again = parse(received(encode(parsed)), JSON)  # and what was read can be sent again
    assert isinstance(again, TaskMessage)
    assert again.id == parsed.id


# -- writing ------------------------------------------------------------------------------


def sent(*args: Any, **fields: Any) -> TaskMessage:
    kwargs: Mapping[str, Any] = fields.pop("kwargs", {})
    return TaskMessage(task="shop.bill", id=ID, payload=Payload(args, kwargs), **fields)


def test_what_is_written_is_read_the_same(clock: FakeClock) -> None:
    message = sent(
        1,
        "é",
        kwargs={"deep": {"list": [1.5, None]}},
        eta=clock.at(60),
        expires=clock.at(3600),
        group="g",
        group_index=2,
        retries=4,
        timelimit=(30, 20.5),
        root_id="r",
        parent_id="p",
        shadow="s",
        ignore_result=True,
        reply_to="q",
        correlation_id="c",
        priority=7,
        origin="gen1@host",
        argsrepr="(…)",
        kwargsrepr="{}",
        stamped_headers=["tenant"],
        stamps={"tenant": ["a"]},
        headers={"x-trace": {"id": 5}},
    )
    again = parse(received(encode(message)), JSON)
    assert isinstance(again, TaskMessage)
    assert again == message.copy(payload=Payload([1, "é"], {"deep": {"list": [1.5, None]}}))


def test_a_message_of_ours_has_all_the_headers_celery_sends() -> None:
    capture = next(capture for capture in PROTOCOL_2 if capture.name == "plain-0")
    assert encode(sent()).headers.keys() == capture.headers.keys()


def test_headers_of_the_sender_cannot_replace_those_of_the_protocol() -> None:
    wire = encode(sent(headers={"task": "os.system", "id": "x", "x-own": 1}))
    assert (wire.headers["task"], wire.headers["id"]) == ("shop.bill", ID)
    assert wire.headers["x-own"] == 1


def test_json_carries_more_types_than_json_has() -> None:
    values = (datetime(2026, 1, 1, tzinfo=timezone.utc), Decimal("1.10"), uuid.uuid4(), b"\xff\x00")
    message = parse(received(encode(sent(*values, kwargs={"when": values[0]}))), JSON)
    assert isinstance(message, TaskMessage)
    assert message.payload.args == list(values)
    assert message.payload.kwargs == {"when": values[0]}


def test_a_long_argument_is_shown_short() -> None:
    wire = encode(sent("x" * 5000, kwargs={"text": "y" * 100_000}))
    assert len(wire.headers["argsrepr"]) <= REPR_LIMIT
    assert len(wire.headers["kwargsrepr"]) <= REPR_LIMIT
    assert wire.headers["argsrepr"].startswith("('xxx")


def test_an_argument_that_cannot_be_shown_does_not_stop_the_sending() -> None:
    class Shy(dict[str, int]):
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert safe_repr(Shy()) == "<unrepresentable Shy: RuntimeError>"
    assert encode(sent(Shy(a=1))).headers["argsrepr"].startswith("<unrepresentable tuple")


class Thing:
    def __repr__(self) -> str:
        return "<thing>"


@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        (sent(1, Thing()), "argument 2 of task 'shop.bill' cannot be serialized as json: <thing>"),
        (sent(kwargs={"what": {"deep": Thing()}}), "argument 'what' of task 'shop.bill' cannot"),
        (
            sent({1, 2}),
            "argument 1 of task 'shop.bill' cannot be serialized as json: {1, 2} is a set",
        ),
    ],
)
def test_an_argument_that_cannot_be_sent_is_named(message: TaskMessage, culprit: str) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(message)
    assert culprit in str(caught.value)
    assert "Pass plain data" in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_an_argument_that_holds_itself_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(EncodeError, match="argument 1 of task"):
        encode(sent(circle))


def test_a_header_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(EncodeError, match="header 'x-thing' of task"):
        encode(sent(headers={"x-fine": 1, "x-thing": Thing()}))


def test_an_unknown_serializer_or_compression_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        EncodeError, match=r"no serializer 'jsonn' is registered; use one of .*json"
    ):
        encode(sent(), "jsonn")
    with pytest.raises(EncodeError, match=r"no compression 'rar'; use gzip or one of bz2"):
        encode(sent(), compression="rar")


@pytest.mark.parametrize(
    ("compression", "unpack"),
    [("gzip", zlib.decompress), ("bzip2", bz2.decompress), ("lzma", lzma.decompress)],
)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_a_body_is_compressed_and_read_again(
    compression: str, unpack: Any, serializer: str
) -> None:
    wire = encode(sent("a" * 1000), serializer, compression)
    assert isinstance(wire.body, bytes)
    assert len(wire.body) < 500
    assert b"aaa" in unpack(wire.body)
    message = parse(received(wire), {serializer})
    assert isinstance(message, TaskMessage)
    assert list(message.payload.args) == ["a" * 1000]


def test_the_broker_may_drop_a_message_once_it_has_expired(clock: FakeClock) -> None:
    assert encode(sent(expires=clock.at(1.5))).properties["expiration"] == "1500"
    assert encode(sent(expires=clock.at(-9))).properties["expiration"] == "0"
    assert "expiration" not in encode(sent()).properties


def test_an_expiry_that_no_broker_can_count_is_left_to_the_worker(clock: FakeClock) -> None:
    wire = encode(sent(expires=clock.at(60 * 86400)))
    assert "expiration" not in wire.properties  # more milliseconds than RabbitMQ takes
    assert wire.headers["expires"] == clock.at(60 * 86400).isoformat()


def test_the_id_answers_where_nothing_else_is_given() -> None:
    wire = encode(sent())
    assert wire.headers["root_id"] == ID
    assert wire.properties["correlation_id"] == ID
    assert wire.properties["delivery_mode"] == 2


# -- times --------------------------------------------------------------------------------


def test_a_message_expires_at_its_moment(clock: FakeClock) -> None:
    message = sent(expires=clock.at(10))
    assert not message.has_expired()
    clock.advance(9.99)
    assert not message.has_expired()
    clock.advance(0.02)
    assert message.has_expired()
    assert not sent().has_expired()


def test_a_message_is_due_at_its_eta(clock: FakeClock) -> None:
    message = sent(eta=clock.at(10))
    assert message.seconds_until_due() == pytest.approx(10)
    clock.advance(12)
    assert message.seconds_until_due() == pytest.approx(-2)
    assert sent().seconds_until_due() == 0


def test_a_year_ahead_is_read_and_a_day_more_is_not(clock: FakeClock) -> None:
    assert isinstance(parse(raw(eta=clock.at(FARTHEST_ETA).isoformat()), JSON), TaskMessage)
    late = parse(raw(eta=clock.at(FARTHEST_ETA + 86400).isoformat()), JSON)
    assert isinstance(late, Unreadable)
    assert "more than a year away" in late.reason

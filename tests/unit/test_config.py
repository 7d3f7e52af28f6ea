"""Settings: defaults, values from anywhere, addresses, faults, and nothing secret shown."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import warnings
import zoneinfo
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import kombu.serialization
import pytest
import sqlalchemy as sa

from flask_taskworker.config import (
    SETTINGS,
    Config,
    ConfigurationWarning,
    mask_url,
    write_defaults,
)
from flask_taskworker.exceptions import ConfigurationError
from flask_taskworker.urls import installed

INSTANCE = "/srv/app/instance"


def read(debug: bool = False, /, **settings: Any) -> Config:
    return Config.from_mapping(settings, debug=debug, instance_path=INSTANCE)


def faults(**settings: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(**settings)
    return caught.value.problems


def _count_as_installed(monkeypatch: pytest.MonkeyPatch, check: Callable[[str], bool]) -> None:
    for module in ("urls", "kinds"):
        monkeypatch.setattr(f"flask_taskworker.{module}.installed", check)


@pytest.fixture(autouse=True)
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every driver counts as installed, whatever this machine has."""
    _count_as_installed(monkeypatch, lambda module: True)


@pytest.fixture
def modules(all_installed: None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The only modules that count as installed; a test may add to them."""
    present: set[str] = set()
    _count_as_installed(monkeypatch, present.__contains__)
    return present


# -- the table ----------------------------------------------------------------------------


def test_every_field_of_a_config_is_declared_by_one_setting() -> None:
    assert [item.field for item in SETTINGS] == [item.name for item in dataclasses.fields(Config)]
    assert len({item.key for item in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_is_documented_and_accepts_its_own_default_and_example(setting: Any) -> None:
    assert setting.doc.endswith(".")
    assert not setting.doc.startswith(" ")
    for value in (setting.default, setting.example):
        if value is not None and setting.key != "TASKER_TIMEZONE":  # needs a database of them
            setting.read(value)
    assert setting.default is not None or setting.example is not None


def test_no_spelling_of_celery_means_two_settings() -> None:
    names = [name for item in SETTINGS for name in item.celery]
    assert len(names) == len(set(names))
    assert {"task_default_queue", "CELERY_TASK_DEFAULT_QUEUE", "CELERY_DEFAULT_QUEUE"} <= set(names)


def test_zero_configuration_is_a_sqlite_file_in_the_instance_folder() -> None:
    config = read()
    database = f"sqlite:///{INSTANCE}/taskworker.db"
    assert (config.engine, config.driver) == ("sqlalchemy", "sqlite")
    assert config.database_uri == database
    assert config.broker_url == config.result_backend == f"taskworker+{database}"


def test_defaults_are_the_documented_ones() -> None:
    config = read()
    assert (config.loop_interval, config.debug, config.durability) == (5.0, False, "full")
    assert (config.default_queue, config.serializer, config.result_serializer) == (
        "celery",
        "json",
        "json",
    )
    assert (config.accept_content, config.compression) == (frozenset({"json"}), None)
    assert (config.ignore_result, config.track_started, config.acks_late) == (False, False, True)
    assert (config.result_expires, config.max_retries, config.retry_delay) == (86400.0, 3, 180.0)
    assert (config.concurrency, config.drain_timeout, config.publish_timeout) == (4, 25.0, 4.0)
    assert (config.pool_limit, config.lease, config.max_deliveries) == (10, 30.0, 5)
    assert (config.max_message_bytes, dict(config.transport_options)) == (16 * 1024 * 1024, {})
    assert (config.always_eager, config.eager_propagates, config.timezone) == (False, False, "UTC")


def test_debug_follows_the_app_unless_it_is_set() -> None:
    assert read(True).debug is True
    assert read(True, TASKER_DEBUG="off").debug is False


def test_a_config_is_frozen_hashable_and_its_options_are_read_only() -> None:
    config = read(TASKER_TRANSPORT_OPTIONS={"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.engine = "redis"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.transport_options["a"] = 2  # type: ignore[index]
    assert hash(config) == hash(read(TASKER_TRANSPORT_OPTIONS={"a": 1}))


def test_a_config_can_be_made_by_hand_with_the_same_defaults() -> None:
    config = Config(engine="memory", broker_url="memory://", result_backend="cache+memory://")
    assert config == read(TASKER_ENGINE="memory")


# -- values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "written", "used"),
    [
        ("TASKER_LOOP_INTERVAL", "0.5", 0.5),
        ("TASKER_LOOP_INTERVAL", timedelta(minutes=1), 60.0),
        ("TASKER_DRAIN_TIMEOUT", 0, 0.0),
        ("TASKER_RETRY_DELAY", "0", 0.0),
        ("TASKER_RESULT_EXPIRES", None, None),
        ("TASKER_RESULT_EXPIRES", 0, None),
        ("TASKER_RESULT_EXPIRES", "none", None),
        ("TASKER_RESULT_EXPIRES", timedelta(days=2), 172800.0),
        ("TASKER_MAX_RETRIES", None, None),
        ("TASKER_MAX_RETRIES", "", None),
        ("TASKER_MAX_RETRIES", "0", 0),
        ("TASKER_CONCURRENCY", " 8 ", 8),
        ("TASKER_CONCURRENCY", 8.0, 8),
        ("TASKER_DEBUG", "True", True),
        ("TASKER_DEBUG", 1, True),
        ("TASKER_ACKS_LATE", "no", False),
        ("TASKER_DURABILITY", "NORMAL", "normal"),
        ("TASKER_DEFAULT_QUEUE", "mail", "mail"),
        ("TASKER_ACCEPT_CONTENT", "json, pickle", frozenset({"json", "pickle"})),
        ("TASKER_ACCEPT_CONTENT", ["application/json", "PICKLE"], frozenset({"json", "pickle"})),
        ("TASKER_ACCEPT_CONTENT", {"json"}, frozenset({"json"})),
        ("TASKER_COMPRESSION", "gzip", "gzip"),
        ("TASKER_COMPRESSION", "none", None),
        ("TASKER_TRANSPORT_OPTIONS", '{"visibility_timeout": 5}', {"visibility_timeout": 5}),
        ("TASKER_TIMEZONE", "utc", "UTC"),
    ],
)
def test_values_are_read_as_they_come_from_code_and_environment(
    key: str, written: Any, used: object
) -> None:
    value = getattr(read(**{key: written}), key.removeprefix("TASKER_").lower())
    assert value == used
    if not isinstance(used, dict):
        assert type(value) is type(used)


def test_a_time_zone_has_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        if name != "Europe/Berlin":
            raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", find)
    monkeypatch.setattr(zoneinfo, "available_timezones", lambda: {"Europe/Berlin"})
    assert read(TASKER_TIMEZONE="Europe/Berlin").timezone == "Europe/Berlin"
    (unknown,) = faults(TASKER_TIMEZONE="Mars")
    assert unknown == (
        "TASKER_TIMEZONE = 'Mars': must be the name of a time zone, for example 'Europe/Berlin'"
    )
    monkeypatch.setattr(zoneinfo, "available_timezones", set)
    (unknowable,) = faults(TASKER_TIMEZONE="Mars")
    assert unknowable == (
        "TASKER_TIMEZONE is 'Mars' but no time zone database is installed: pip install tzdata"
    )


SECONDS = "must be a number of seconds greater than 0, for example"


@pytest.mark.parametrize(
    ("key", "written", "problem"),
    [
        ("LOOP_INTERVAL", "soon", f"= 'soon': {SECONDS} 5"),
        ("LOOP_INTERVAL", 0, f"= 0: {SECONDS} 5"),
        ("LOOP_INTERVAL", True, f"= True: {SECONDS} 5"),
        ("LOOP_INTERVAL", None, f"= None: {SECONDS} 5"),
        ("LOOP_INTERVAL", [5], f"= [5]: {SECONDS} 5"),
        ("LOOP_INTERVAL", "nan", f"= 'nan': {SECONDS} 5"),
        ("LOOP_INTERVAL", float("inf"), f"= inf: {SECONDS} 5"),
        ("LOOP_INTERVAL", 10**12, f"= 1000000000000: {SECONDS} 5"),
        ("PUBLISH_TIMEOUT", 0, f"= 0: {SECONDS} 4"),
        ("PUBLISH_TIMEOUT", -1, f"= -1: {SECONDS} 4"),
        ("LEASE", timedelta(0), f"= datetime.timedelta(0): {SECONDS} 30"),
        ("DRAIN_TIMEOUT", -1, "= -1: must be a number of seconds, 0 or more, for example 25"),
        (
            "RESULT_EXPIRES",
            -5,
            "= -5: must be a number of seconds, or None for ever, for example 86400",
        ),
        ("CONCURRENCY", 0, "= 0: must be a whole number, 1 or more, for example 4"),
        ("CONCURRENCY", 10**400, "must be a whole number, 1 or more, for example 4"),
        ("CONCURRENCY", 1.5, "= 1.5: must be a whole number, 1 or more, for example 4"),
        ("POOL_LIMIT", "many", "= 'many': must be a whole number, 1 or more, for example 10"),
        ("MAX_RETRIES", -1, "= -1: must be a whole number, or None for no limit, for example 3"),
        ("MAX_RETRIES", timedelta(1), "must be a whole number, or None for no limit"),
        ("DEBUG", "perhaps", "= 'perhaps': must be True or False, for example False"),
        ("DEBUG", 2, "= 2: must be True or False, for example False"),
        ("DURABILITY", "most", "= 'most': must be 'full' or 'normal', for example 'full'"),
        ("DEFAULT_QUEUE", "a\nb", "must be the name of a queue, 1-255 printable characters"),
        ("DEFAULT_QUEUE", "", "must be the name of a queue, 1-255 printable characters"),
        ("ACCEPT_CONTENT", [], "= []: must be a list of serializers, for example ['json']"),
        ("ACCEPT_CONTENT", 1, "= 1: must be a list of serializers, for example ['json']"),
        ("COMPRESSION", "zip", "= 'zip': must be None or one of gzip, zlib, bzip2"),
        ("TRANSPORT_OPTIONS", "a=1", "= 'a=1': must be a mapping of options by name"),
        ("TRANSPORT_OPTIONS", {1: 2}, "= {1: 2}: must be a mapping of options by name"),
        ("ENGINE", 5, "= 5: must be the name of an engine, for example 'sqlalchemy'"),
        ("BROKER_URL", 5, "= 5: must be the text of a URL, for example 'redis://127"),
        ("DATABASE_URI", 5, "= 5: must be the text of a URL, for example 'sqlite:///tasks.db'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_to_write_instead(
    key: str, written: Any, problem: str
) -> None:
    (text,) = faults(**{f"TASKER_{key}": written})
    assert text.startswith(f"TASKER_{key} = ")
    assert problem in text


def test_all_faults_are_reported_together() -> None:
    problems = faults(
        TASKER_LOOP_INTERVAL="soon",
        TASKER_CONCURRENCY=0,
        TASKER_ENGINE="redsi",
        TASKER_BROKER_URL="localhost",
        TASKER_RESULT_BACKEND="cookie://",
        TASKER_SERIALIZER="pickle",
    )
    assert [text.split(" ")[0] for text in problems] == [
        "TASKER_ENGINE",
        "TASKER_LOOP_INTERVAL",
        "TASKER_CONCURRENCY",
        "TASKER_SERIALIZER",
        "TASKER_BROKER_URL",
        "TASKER_RESULT_BACKEND",
    ]


def test_a_long_value_is_cut_in_the_message() -> None:
    (text,) = faults(TASKER_DURABILITY="x" * 5000)
    assert len(text) < 250


def test_the_old_name_of_the_loop_interval_is_read_and_the_new_one_wins() -> None:
    assert read(TASKER_INTERVAL_TIME=2).loop_interval == 2.0
    assert read(TASKER_INTERVAL_TIME=2, TASKER_LOOP_INTERVAL=3).loop_interval == 3.0
    (text,) = faults(TASKER_INTERVAL_TIME="often")
    assert text.startswith("TASKER_INTERVAL_TIME = 'often': ")


def test_what_we_write_must_be_what_we_accept() -> None:
    problems = faults(TASKER_SERIALIZER="pickle", TASKER_RESULT_SERIALIZER="pickle")
    assert problems[0] == (
        "TASKER_SERIALIZER = 'pickle': is not accepted; if that is meant, "
        "set TASKER_ACCEPT_CONTENT = ['json', 'pickle']"
    )
    assert problems[1].startswith("TASKER_RESULT_SERIALIZER = 'pickle': is not accepted")
    config = read(TASKER_SERIALIZER="pickle", TASKER_ACCEPT_CONTENT="json,pickle")
    assert config.serializer == "pickle"


def test_a_fault_in_the_accepted_serializers_is_not_reported_twice() -> None:
    assert len(faults(TASKER_ACCEPT_CONTENT=[], TASKER_SERIALIZER="pickle")) == 1


def test_a_serializer_whose_package_is_missing_is_named(modules: set[str]) -> None:
    assert faults(TASKER_ACCEPT_CONTENT=["json", "msgpack"]) == [
        "TASKER_ACCEPT_CONTENT is ['json', 'msgpack'] but the package msgpack is not installed: "
        "pip install msgpack"
    ]
    modules.add("msgpack")
    assert "msgpack" in read(TASKER_ACCEPT_CONTENT=["json", "msgpack"]).accept_content


def test_a_serializer_of_ones_own_is_accepted_once_kombu_knows_it() -> None:
    (text,) = faults(TASKER_ACCEPT_CONTENT="json,jsonn")
    assert "kombu knows no serializer 'jsonn'" in text
    assert text.endswith("Did you mean 'json'?")
    kombu.serialization.register("jsonn", str, str, "application/x-jsonn")
    try:
        assert "jsonn" in read(TASKER_ACCEPT_CONTENT="json,jsonn").accept_content
    finally:
        kombu.serialization.unregister("jsonn")


# -- unknown keys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("TASKER_LOOP_INTERVALL", " Did you mean 'TASKER_LOOP_INTERVAL'?"),
        ("TASKER_BROKER_URI", " Did you mean 'TASKER_BROKER_URL'?"),
        ("TASKER_TASK_ALWAYS_EAGER", " Did you mean 'TASKER_ALWAYS_EAGER'?"),
        ("TASKER_WORKER_CONCURRENCY", " Did you mean 'TASKER_CONCURRENCY'?"),
        ("TASKER_COLOUR", ""),
    ],
)
def test_an_unknown_key_is_a_warning_that_names_it(key: str, hint: str) -> None:
    with pytest.warns(ConfigurationWarning) as caught:
        read(**{key: 1, "SECRET_KEY": "x"})
    assert [str(warning.message) for warning in caught] == [
        f"{key} is not a setting and has no effect.{hint}"
    ]


def test_known_and_foreign_keys_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        read(**{item.key: item.default for item in SETTINGS if item.default is not None})
        read(DEBUG=True, CELERY_BROKER_URL="redis://", TASKER_INTERVAL_TIME=1)
    assert not caplog.records


# -- engines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "engine", "broker", "results"),
    [
        ("SQLAlchemy", "sqlalchemy", "taskworker+sqlite:///", "taskworker+sqlite:///"),
        ("SQLALCHEMY", "sqlalchemy", "taskworker+sqlite:///", "taskworker+sqlite:///"),
        ("amqp", "amqp", "amqp://guest:guest@127.0.0.1:5672//", "rpc://"),
        ("RabbitMQ", "amqp", "amqp://guest:guest@127.0.0.1:5672//", "rpc://"),
        ("redis", "redis", "redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("memory", "memory", "memory://", "cache+memory://"),
        (
            "beanstalk",
            "beanstalk",
            "beanstalk://127.0.0.1:11300",
            f"taskworker+sqlite:///{INSTANCE}/taskworker-results.db",
        ),
        (
            "filesystem",
            "filesystem",
            "filesystem://",
            f"taskworker+sqlite:///{INSTANCE}/taskworker-results.db",
        ),
        ("", "sqlalchemy", "taskworker+sqlite:///", "taskworker+sqlite:///"),
    ],
)
def test_an_engine_has_a_default_address_and_place_for_results(
    written: str, engine: str, broker: str, results: str
) -> None:
    config = read(TASKER_ENGINE=written)
    assert config.engine == engine
    assert config.broker_url.startswith(broker)
    assert config.result_backend is not None
    assert config.result_backend.startswith(results)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (
            "reddis",
            "must be one of sqlalchemy, amqp, redis, beanstalk, memory, filesystem, kombu or "
            "another transport of kombu. Did you mean 'redis'?",
        ),
        (
            "postgresql",
            "is a driver: set TASKER_ENGINE = 'sqlalchemy' and TASKER_DRIVER = 'postgresql'",
        ),
        ("redis://127.0.0.1", "is an address: set TASKER_BROKER_URL to it"),
        (
            "kombu",
            "needs the address of a broker: set TASKER_BROKER_URL, "
            "for example 'redis://127.0.0.1:6379/0'",
        ),
        ("sqs", "needs the address of a broker: set TASKER_BROKER_URL"),
        ("amqps", "needs the address of a broker: set TASKER_BROKER_URL"),
    ],
)
def test_an_engine_that_cannot_be_used_is_explained(written: str, problem: str) -> None:
    (text,) = faults(TASKER_ENGINE=written)
    assert text.startswith(f"TASKER_ENGINE = {written!r}: {problem}")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"TASKER_ENGINE": "redis"},
            "TASKER_ENGINE is 'redis' but the package redis is not installed: "
            'pip install "flask-taskworker[redis]"',
        ),
        (
            {"TASKER_ENGINE": "beanstalk"},
            "TASKER_ENGINE is 'beanstalk' but the package greenstalk is not installed: "
            'pip install "flask-taskworker[beanstalk]"',
        ),
        (
            {"TASKER_BROKER_URL": "rediss://:pw@h/0"},
            "TASKER_BROKER_URL is 'rediss://:***@h/0' but the package redis is not installed: "
            'pip install "flask-taskworker[redis]"',
        ),
        (
            {"TASKER_RESULT_BACKEND": "redis://h/0"},
            "TASKER_RESULT_BACKEND is 'redis://h/0' but the package redis is not installed: "
            'pip install "flask-taskworker[redis]"',
        ),
        (
            {"TASKER_DRIVER": "postgresql", "SQLALCHEMY_DATABASE_URI": "postgresql://h/d"},
            "TASKER_DRIVER is 'postgresql' but no PostgreSQL driver is installed: "
            'pip install "flask-taskworker[postgresql]"',
        ),
        (
            {"TASKER_DATABASE_URI": "mysql://u:pw@h/d"},
            "TASKER_DATABASE_URI is 'mysql://u:***@h/d' but no MySQL driver is installed: "
            'pip install "flask-taskworker[mysql]"',
        ),
        (
            {"TASKER_BROKER_URL": "mariadb://h/d"},
            "TASKER_BROKER_URL is 'mariadb://h/d' but no MariaDB driver is installed: "
            'pip install "flask-taskworker[mysql]"',
        ),
        (
            {"TASKER_DATABASE_URI": "postgresql+psycopg2://h/d"},
            "TASKER_DATABASE_URI is 'postgresql+psycopg2://h/d' but the driver psycopg2 is not "
            "installed: pip install psycopg2, or leave it out and "
            'pip install "flask-taskworker[postgresql]"',
        ),
        (
            {"TASKER_DATABASE_URI": "mysql+mysqldb://h/d"},
            "TASKER_DATABASE_URI is 'mysql+mysqldb://h/d' but the driver mysqldb is not "
            "installed: pip install mysqlclient, or leave it out and "
            'pip install "flask-taskworker[mysql]"',
        ),
    ],
)
@pytest.mark.usefixtures("modules")
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    settings: dict[str, Any], text: str
) -> None:
    assert faults(**settings) == [text]


def test_a_module_is_looked_for_without_being_imported() -> None:
    # 'installed' itself, as it was imported before the fixture replaced it.
    assert installed("antigravity")
    assert "antigravity" not in sys.modules
    assert not installed("no_such_module")
    assert not installed("no_such_package.module")


@pytest.mark.usefixtures("modules")
def test_a_missing_driver_and_a_missing_address_are_both_reported() -> None:
    problems = faults(TASKER_DRIVER="postgresql")
    assert [text[:42] for text in problems] == [
        "TASKER_DRIVER is 'postgresql' but no Postg",
        "TASKER_DRIVER = 'postgresql': no PostgreSQ",
    ]


def test_the_filesystem_engine_keeps_its_folders_in_the_instance_folder() -> None:
    folder = f"{INSTANCE}/taskworker-queue"
    options = dict(read(TASKER_ENGINE="filesystem").transport_options)
    assert options == {
        "data_folder_in": folder,
        "data_folder_out": folder,
        "control_folder": f"{folder}/control",
    }
    own = {"data_folder_in": "/in", "store_processed": True}
    config = read(TASKER_BROKER_URL="filesystem://", TASKER_TRANSPORT_OPTIONS=own)
    assert config.transport_options == options | own


# -- broker addresses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "engine", "broker"),
    [
        ("redis://:p@h:1/2", "redis", "redis://:p@h:1/2"),
        ("REDIS://h", "redis", "redis://h"),
        ("rediss://h", "redis", "rediss://h"),
        ("redis+socket:///run/redis.sock", "redis", "redis+socket:///run/redis.sock"),
        ("amqp://u:p@h/v", "amqp", "amqp://u:p@h/v"),
        ("pyamqp://h//", "amqp", "pyamqp://h//"),
        ("rabbitmq://h//", "amqp", "amqp://h//"),
        ("amqp://a//;amqp://b//", "amqp", "amqp://a//;amqp://b//"),
        (["amqp://a//", "amqp://b//"], "amqp", "amqp://a//;amqp://b//"),
        ("sentinel://a:1;sentinel://b:1", "sentinel", "sentinel://a:1;sentinel://b:1"),
        ("sqs://", "sqs", "sqs://"),
        ("memory://", "memory", "memory://"),
        ("my.module:Transport://h", "my.module:Transport", "my.module:Transport://h"),
        ("sqlite:////data/q.db", "sqlalchemy", "taskworker+sqlite:////data/q.db"),
        ("taskworker+sqlite:////data/q.db", "sqlalchemy", "taskworker+sqlite:////data/q.db"),
        ("sqla+sqlite:////data/q.db", "sqlalchemy", "taskworker+sqlite:////data/q.db"),
        ("sqlite:///q.db", "sqlalchemy", f"taskworker+sqlite:///{INSTANCE}/q.db"),
        ("postgres://u:p@h/d", "sqlalchemy", "taskworker+postgresql+psycopg://u:p@h/d"),
        ("sqla+postgresql://h/d", "sqlalchemy", "taskworker+postgresql+psycopg://h/d"),
        ("postgresql+pg8000://h/d", "sqlalchemy", "taskworker+postgresql+pg8000://h/d"),
        ("mysql://h/d", "sqlalchemy", "taskworker+mysql+pymysql://h/d"),
        ("mariadb://h/d", "sqlalchemy", "taskworker+mariadb+pymysql://h/d"),
    ],
)
def test_the_broker_url_wins_over_engine_and_driver(written: Any, engine: str, broker: str) -> None:
    for other in ("kombu", "sqlalchemy", "memory"):
        config = read(
            TASKER_BROKER_URL=written, TASKER_ENGINE=other, TASKER_DRIVER="postgresql+psycopg2"
        )
        assert (config.engine, config.broker_url) == (engine, broker)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("localhost:6379", "must be a URL, for example 'redis://127.0.0.1:6379/0'"),
        ("reddis://h", "no broker is known as 'reddis': use amqp, redis, "),
        ("http://h", "no broker is known as 'http'"),
        ("kombu://h", "no broker is known as 'kombu'"),
        ("redis://u:p/1@h/shop", "a Redis database is a number: end the address with '/0', not"),
        ("redis://h/0;redis://h/x?y=1", "end the address with '/0', not '/x'"),
        ("amqp://a;redis://b", "must name brokers of one kind only"),
        ("amqp://u:a;b@h", "a ';' inside an address would end it: write %3B in its place"),
        ("sqlite://", "a database in memory is not shared between connections"),
        ("sqlite://app.db", "a SQLite URL has three slashes or more: 'sqlite:///app.db'"),
    ],
)
def test_a_broker_url_that_cannot_be_used_is_explained(written: str, problem: str) -> None:
    (text,) = faults(TASKER_BROKER_URL=written)
    assert text.startswith("TASKER_BROKER_URL = ")
    assert problem in text


def test_a_mistyped_scheme_gets_a_suggestion() -> None:
    assert faults(TASKER_BROKER_URL="reddis://h")[0].endswith("Did you mean 'redis'?")


# -- database addresses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "driver", "uri"),
    [
        # the app's own database, if it is of the driver and not in memory
        ({"SQLALCHEMY_DATABASE_URI": "sqlite:///app.db"}, "sqlite", f"{INSTANCE}/app.db"),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite:////data/app.db"}, "sqlite", "/data/app.db"),
        (
            {"SQLALCHEMY_DATABASE_URI": "sqlite+aiosqlite:////data/app.db"},
            "sqlite",
            "sqlite:////data/app.db",
        ),
        (
            {"SQLALCHEMY_DATABASE_URI": "sqlite:///file:app.db?uri=true"},
            "sqlite",
            f"sqlite:///file:{INSTANCE}/app.db?uri=true",
        ),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite://"}, "sqlite", f"{INSTANCE}/taskworker.db"),
        ({"SQLALCHEMY_DATABASE_URI": "sqlite:///:memory:"}, "sqlite", "/taskworker.db"),
        (
            {"SQLALCHEMY_DATABASE_URI": "sqlite:///file::memory:?uri=true"},
            "sqlite",
            "/taskworker.db",
        ),
        ({"SQLALCHEMY_DATABASE_URI": "postgresql://h/d"}, "sqlite", "/taskworker.db"),
        ({"SQLALCHEMY_DATABASE_URI": "oracle://h/d"}, "sqlite", "/taskworker.db"),
        ({"SQLALCHEMY_DATABASE_URI": None}, "sqlite", "/taskworker.db"),
        (
            {"TASKER_DRIVER": "postgres", "SQLALCHEMY_DATABASE_URI": "postgresql://u:p@h/d"},
            "postgresql",
            "postgresql+psycopg://u:p@h/d",
        ),
        (
            {
                "TASKER_DRIVER": "postgresql+psycopg2",
                "SQLALCHEMY_DATABASE_URI": "postgresql+psycopg://h/d",
            },
            "postgresql+psycopg2",
            "postgresql+psycopg2://h/d",
        ),
        (
            {
                "TASKER_DRIVER": "postgresql",
                "SQLALCHEMY_DATABASE_URI": "postgresql+asyncpg://h/d",
            },
            "postgresql",
            "postgresql+psycopg://h/d",
        ),
        (
            {"TASKER_DRIVER": "mysql", "SQLALCHEMY_DATABASE_URI": "mariadb+mysqldb://h/d"},
            "mysql",
            "mariadb+mysqldb://h/d",
        ),
        (
            {
                "TASKER_DRIVER": "postgresql",
                "SQLALCHEMY_DATABASE_URI": sa.make_url("postgresql://u:p%40@h/d"),
            },
            "postgresql",
            "postgresql+psycopg://u:p%40@h/d",
        ),
        # an address of our own comes first, and decides the driver
        (
            {
                "TASKER_DATABASE_URI": "sqlite:///tasks.db",
                "SQLALCHEMY_DATABASE_URI": "sqlite:///app.db",
            },
            "sqlite",
            f"sqlite:///{INSTANCE}/tasks.db",
        ),
        (
            {"TASKER_DATABASE_URI": "postgres://u:p@h/d"},
            "postgresql",
            "postgresql+psycopg://u:p@h/d",
        ),
        (
            {"TASKER_DATABASE_URI": "mysql://h/d", "TASKER_DRIVER": "MariaDB"},
            "mariadb",
            "mysql+pymysql://h/d",
        ),
        (
            {"TASKER_DATABASE_URI": "postgresql://h/d", "TASKER_DRIVER": "postgresql+psycopg2"},
            "postgresql+psycopg2",
            "postgresql+psycopg2://h/d",
        ),
        (
            {"TASKER_DATABASE_URI": "", "SQLALCHEMY_DATABASE_URI": "sqlite:///app.db"},
            "sqlite",
            f"{INSTANCE}/app.db",
        ),
    ],
)
def test_the_database_is_found(settings: dict[str, Any], driver: str, uri: str) -> None:
    config = read(**settings)
    assert config.database_uri is not None
    assert config.driver == driver
    assert config.database_uri.endswith(uri)
    assert config.broker_url == config.result_backend == f"taskworker+{config.database_uri}"


@pytest.mark.parametrize(
    ("present", "scheme"),
    [
        ({"psycopg", "psycopg2"}, "postgresql+psycopg"),
        ({"psycopg2"}, "postgresql+psycopg2"),
    ],
)
def test_a_bare_postgresql_url_takes_the_installed_driver(
    modules: set[str], present: set[str], scheme: str
) -> None:
    modules |= present
    assert read(TASKER_DATABASE_URI="postgresql://h/d").database_uri == f"{scheme}://h/d"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"TASKER_DRIVER": "postgresql"},
            "TASKER_DRIVER = 'postgresql': no PostgreSQL database is named: set "
            "TASKER_DATABASE_URI, for example 'postgresql://user:password@127.0.0.1/mydb'",
        ),
        (
            {"TASKER_DRIVER": "mysql", "SQLALCHEMY_DATABASE_URI": "sqlite:///app.db"},
            "TASKER_DRIVER = 'mysql': no MySQL database is named: set TASKER_DATABASE_URI, "
            "for example 'mysql://user:password@127.0.0.1/mydb'",
        ),
        (
            {"TASKER_DRIVER": "mysql", "TASKER_DATABASE_URI": "postgresql://u:secret@h/d"},
            "TASKER_DATABASE_URI = 'postgresql://u:***@h/d': contradicts "
            "TASKER_DRIVER = 'mysql': remove one of the two settings",
        ),
        (
            {
                "TASKER_DRIVER": "postgresql+psycopg2",
                "TASKER_DATABASE_URI": "postgresql+psycopg://h/d",
            },
            "TASKER_DATABASE_URI = 'postgresql+psycopg://h/d': contradicts "
            "TASKER_DRIVER = 'postgresql+psycopg2': remove one of the two settings",
        ),
        (
            {"TASKER_DATABASE_URI": "sqlite:///:memory:"},
            "TASKER_DATABASE_URI = 'sqlite:///:memory:': a database in memory is not shared "
            "between connections: name a file, for example 'sqlite:///tasks.db', or set "
            "TASKER_ENGINE = 'memory' in its place",
        ),
        (
            {"TASKER_DATABASE_URI": "oracle://h/d"},
            "TASKER_DATABASE_URI = 'oracle://h/d': must be the URL of a database (sqlite://, "
            "postgresql://, mysql://, mariadb://), for example 'sqlite:///app.db'",
        ),
        (
            {"TASKER_DATABASE_URI": "postgresql+asyncpg://h/d"},
            "TASKER_DATABASE_URI = 'postgresql+asyncpg://h/d': asyncpg is a driver for asyncio, "
            "which cannot be used here: leave it out",
        ),
        (
            {"TASKER_DRIVER": "sqlite+aiosqlite"},
            "TASKER_DRIVER = 'sqlite+aiosqlite': aiosqlite is a driver for asyncio, "
            "which cannot be used here: leave it out",
        ),
        (
            {"TASKER_DRIVER": "postgresqll"},
            "TASKER_DRIVER = 'postgresqll': must be one of sqlite, postgresql, mysql, mariadb or "
            "a full name such as 'postgresql+psycopg2'. Did you mean 'postgresql'?",
        ),
        (
            {"TASKER_DRIVER": "sqlite:///x.db"},
            "TASKER_DRIVER = 'sqlite:///x.db': is an address: set TASKER_DATABASE_URI to it",
        ),
        (
            {"TASKER_DATABASE_URI": "postgresql://u:a;b@h/d"},
            "TASKER_DATABASE_URI = 'postgresql://u:***@h/d': a ';' inside an address would end "
            "it: write %3B in its place",
        ),
        (
            {"TASKER_DATABASE_URI": "sqlite:////data/a;b.db"},
            "TASKER_DATABASE_URI = 'sqlite:////data/a;b.db': the path '/data/a;b.db' holds '?' "
            "or ';', which no URL can: use another folder",
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_explained(settings: dict[str, Any], text: str) -> None:
    assert faults(**settings) == [text]


def test_a_database_driver_does_not_matter_to_another_engine() -> None:
    config = read(TASKER_ENGINE="amqp", TASKER_DRIVER="postgresql")
    assert (config.engine, config.database_uri) == ("amqp", None)


def test_an_explicit_database_holds_the_results_of_an_engine_that_has_none() -> None:
    config = read(TASKER_ENGINE="filesystem", TASKER_DATABASE_URI="sqlite:////data/x.db")
    assert config.result_backend == "taskworker+sqlite:////data/x.db"


# -- results ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "used"),
    [
        ("disabled", None),
        ("disabled://", None),
        (False, None),
        ("none", f"taskworker+sqlite:///{INSTANCE}/taskworker.db"),
        (None, f"taskworker+sqlite:///{INSTANCE}/taskworker.db"),
        ("", f"taskworker+sqlite:///{INSTANCE}/taskworker.db"),
        ("sqlite:///r.db", f"taskworker+sqlite:///{INSTANCE}/r.db"),
        ("db+sqlite:////data/r.db", "taskworker+sqlite:////data/r.db"),
        ("taskworker+sqlite:////data/r.db", "taskworker+sqlite:////data/r.db"),
        ("db+postgresql://u:p@h/d", "taskworker+postgresql+psycopg://u:p@h/d"),
        ("postgres://h/d", "taskworker+postgresql+psycopg://h/d"),
        ("redis://h/1", "redis://h/1"),
        ("rediss://h/1", "rediss://h/1"),
        ("redis", "redis://127.0.0.1:6379/0"),
        ("rpc://", "rpc://"),
        ("rpc", "rpc://"),
        ("cache+memory://", "cache+memory://"),
        ("memory://", "cache+memory://"),
    ],
)
def test_a_result_backend_may_be_named(written: Any, used: str | None) -> None:
    assert read(TASKER_RESULT_BACKEND=written).result_backend == used


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("mongodb://h", "must be the URL of a database, 'redis://...'"),
        ("rcp://", "'cache+memory://' or 'disabled'. Did you mean 'rpc'?"),
        ("redis://h/shop", "a Redis database is a number"),
        ("sqlite://", "names no file: use 'sqlite:///results.db' or 'cache+memory://'"),
    ],
)
def test_a_result_backend_that_cannot_be_used_is_explained(written: str, problem: str) -> None:
    (text,) = faults(TASKER_RESULT_BACKEND=written)
    assert text.startswith(f"TASKER_RESULT_BACKEND = {written!r}: ")
    assert problem in text


def test_redis_results_go_to_the_first_of_several_brokers() -> None:
    config = read(TASKER_BROKER_URL="redis://:a@h:1;redis://:b@h:2")
    assert config.result_backend == "redis://:a@h:1"


@pytest.mark.parametrize("url", ["redis+socket:///run/redis.sock", "sentinel://h:26379"])
def test_brokers_that_keep_no_results_get_a_file_for_them(url: str) -> None:
    config = read(TASKER_BROKER_URL=url)
    assert config.result_backend == f"taskworker+sqlite:///{INSTANCE}/taskworker-results.db"


# -- defaults in app.config ---------------------------------------------------------------


def test_the_defaults_are_written_and_what_the_user_set_stays() -> None:
    settings: dict[str, Any] = {"TASKER_CONCURRENCY": "2", "SECRET_KEY": "x"}
    write_defaults(settings, read(True, **settings))
    assert settings["TASKER_CONCURRENCY"] == "2"
    assert settings["TASKER_ENGINE"] == "sqlalchemy"
    assert settings["TASKER_DRIVER"] == "sqlite"
    assert f"{settings['TASKER_LOOP_INTERVAL']!r}" == "5"
    assert settings["TASKER_DEBUG"] is True
    assert settings["TASKER_ACCEPT_CONTENT"] == ["json"]
    assert {item.key for item in SETTINGS} <= set(settings)


def test_written_defaults_are_the_apps_own_copies() -> None:
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    write_defaults(first, read())
    first["TASKER_TRANSPORT_OPTIONS"]["x"] = 1
    first["TASKER_ACCEPT_CONTENT"].append("pickle")
    write_defaults(second, read())
    assert second["TASKER_TRANSPORT_OPTIONS"] == {}
    assert second["TASKER_ACCEPT_CONTENT"] == ["json"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"TASKER_INTERVAL_TIME": 2},
        {"TASKER_ENGINE": "filesystem"},
        {"TASKER_BROKER_URL": "redis://:secret@h/0"},
        {"TASKER_DATABASE_URI": "postgresql+psycopg://u:secret@h/d"},
        {"SQLALCHEMY_DATABASE_URI": "postgresql://u:secret@h/d"},
        {"TASKER_RESULT_BACKEND": "disabled", "TASKER_ACCEPT_CONTENT": "json,pickle"},
    ],
)
def test_a_config_that_is_read_again_is_the_same(settings: dict[str, Any]) -> None:
    first = read(True, **settings)
    written = dict(settings)
    write_defaults(written, first)
    assert read(**written) == first
    added = {key: value for key, value in written.items() if key not in settings}
    assert "secret" not in str(added)


def test_a_written_default_does_not_contradict_what_the_user_sets_later() -> None:
    settings: dict[str, Any] = {}
    write_defaults(settings, read())
    settings["TASKER_DATABASE_URI"] = "postgresql+psycopg://h/d"
    assert read(**settings).driver == "postgresql"


# -- nothing secret is shown --------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("taskworker+postgresql://u:secret@h/db", "taskworker+postgresql://u:***@h/db"),
        ("redis://:secret@h:6379/0", "redis://:***@h:6379/0"),
        ("amqp://u:secret@a//;amqp://u:secret@b//", "amqp://u:***@a//;amqp://u:***@b//"),
        ("redis://:se/cr@et?#x:y@h:1/0", "redis://:***@h:1/0"),
        ("amqp://u:sec;ret@h", "amqp://u:***@h"),
        ("amqp://u:a://secret@h", "amqp://u:***@h"),
        ("mysql://u:secret@[::1]:3306/d", "mysql://u:***@[::1]:3306/d"),
        ("postgresql://h/d?user=u&password=secret&a=1", "postgresql://h/d?user=u&password=***&a=1"),
        ("postgresql://h/d?sslPassword=secret", "postgresql://h/d?sslPassword=***"),
        ("redis://user:secret", "redis://user:***"),
        ("postgresql://user:secret/db", "postgresql://user:***"),
        ("user:secret@host", "user:***@host"),
        # nothing to hide
        ("amqp://guest@h//", "amqp://guest@h//"),
        ("amqp://guest:@h//", "amqp://guest:@h//"),
        ("redis://h:6379/0?name=a@b", "redis://h:6379/0?name=a@b"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("postgresql://a:5432,b:5432/d", "postgresql://a:5432,b:5432/d"),
        ("sqlite:////home/a@b:c/app.db", "sqlite:////home/a@b:c/app.db"),
        ("memory://", "memory://"),
        ("", ""),
        ("plain text", "plain text"),
    ],
)
def test_passwords_in_urls_are_masked(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_a_config_never_shows_a_password() -> None:
    config = read(
        TASKER_BROKER_URL="redis://:secret@h/0",
        TASKER_DATABASE_URI="sqlite:///x.db",
        TASKER_RESULT_BACKEND="db+postgresql+psycopg://u:secret@h/d",
        TASKER_TRANSPORT_OPTIONS={
            "sentinel_kwargs": {"password": "secret"},
            "aws_secret_access_key": "secret",
            "hosts": ["redis://:secret@h"],
            "visibility_timeout": 5,
        },
    )
    assert "secret'" not in repr(config)
    assert ":secret" not in repr(config)
    assert "secret" not in str(config.masked()["broker_url"])
    assert config.masked()["transport_options"] == {
        "sentinel_kwargs": {"password": "***"},
        "aws_secret_access_key": "***",
        "hosts": ["redis://:***@h"],
        "visibility_timeout": 5,
    }
    assert config.broker_url == "redis://:secret@h/0"


@pytest.mark.parametrize(
    "value",
    [
        "bad://u:hush@h;://x",
        "u:hush@h://x",
        "sqlite://u:hush@h",
        "postgresql+psycopg://u:hush@h/d",
        "oracle://u:hush@h/d?password=hush",
        ["x://u:hush@h"],
        {"password": "hush"},
    ],
)
def test_a_password_in_any_setting_is_shown_nowhere(value: Any) -> None:
    for key in (item.key for item in SETTINGS):
        shown = ""
        with suppress(ConfigurationError):
            shown = repr(read(**{key: value}))
        if not shown:
            shown = "\n".join(faults(**{key: value}))
        assert "hush" not in shown, key


# -- what importing costs -----------------------------------------------------------------


def test_importing_the_settings_loads_no_framework_broker_or_database() -> None:
    # Loaded as a package without its __init__, which is not what is looked at here.
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('flask_taskworker')\n"
        f"package.__path__ = {[str(path) for path in _package_path()]!r}\n"
        "sys.modules['flask_taskworker'] = package\n"
        "importlib.import_module('flask_taskworker.config')\n"
        "heavy = {'kombu', 'sqlalchemy', 'flask', 'redis', 'amqp', 'celery'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _package_path() -> list[str]:
    import flask_taskworker

    return list(flask_taskworker.__path__)


def test_any_mapping_can_be_read() -> None:
    class Settings(Mapping[str, object]):
        def __getitem__(self, key: str) -> object:
            return {"TASKER_ENGINE": "memory"}[key]

        def __iter__(self) -> Any:
            return iter(["TASKER_ENGINE"])

        def __len__(self) -> int:
            return 1

    config = Config.from_mapping(Settings(), debug=False, instance_path=INSTANCE, testing=True)
    assert config.engine == "memory"

"""Real services for the tests, each run with a place of its own in every one of them.

A test that asks for ``postgresql_url``, ``mysql_url``, ``redis_url``, ``amqp_url`` or
``beanstalk_url`` gets the address of a database, a virtual host or a server that belongs to this
run alone and is removed after it; such tests carry the mark ``services`` by themselves. Tests that
choose the fixture at run time (``request.getfixturevalue``) set the mark on their parameters:
``pytest.param("redis_url", marks=pytest.mark.services)``.

A service that does not answer skips its tests with one line, and fails them where
``TASKWORKER_REQUIRE_SERVICES=1`` promises that it is there. ``TASKWORKER_<SERVICE>_URL`` says where
a service listens when it is not the usual place on this machine.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("TASKWORKER_REQUIRE_SERVICES") == "1"
SERVICE_FIXTURES = frozenset(
    {"postgresql_url", "mysql_url", "redis_url", "amqp_url", "beanstalk_url"}
)
UNIT_TEST_SECONDS = 10.0
CONNECT_SECONDS = 5


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    meaningless = [item for item in items if not _applies(item)]
    if meaningless:
        config.hook.pytest_deselected(items=meaningless)
        items[:] = [item for item in items if _applies(item)]
    unit_tests = ROOT / "tests" / "unit"
    for item in items:
        if SERVICE_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.services)
        if unit_tests in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(UNIT_TEST_SECONDS))


def _applies(item: pytest.Item) -> bool:
    """Whether a test means anything with its parameters: see the marks only_on and not_on."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    given = {value for value in values if isinstance(value, str)}
    only, never = item.get_closest_marker("only_on"), item.get_closest_marker("not_on")
    if only is not None and not given.intersection(only.args):
        return False
    return never is None or not given.intersection(never.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep reports printable: some tests log what no terminal and no pipe can carry."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


def _address(service: str, default: str) -> str:
    return os.environ.get(f"TASKWORKER_{service.upper()}_URL", default)


def _missing(service: str, url: str, reason: object) -> NoReturn:
    shown = url.rsplit("@", 1)[-1].split("://")[-1]
    text = (
        f"{service} does not answer at {shown} ({reason}); "
        f"start it or set TASKWORKER_{service.upper()}_URL"
    )
    if REQUIRED:
        pytest.fail(f"{text}. TASKWORKER_REQUIRE_SERVICES=1 promises it.", pytrace=False)
    pytest.skip(text)


def _fresh_name() -> str:
    return f"taskworker_test_{uuid.uuid4().hex[:12]}"


@contextmanager
def _fresh_database(service: str, server: str, create: str, drop: str) -> Iterator[str]:
    """Create a database on *server*, give its URL, drop it in the end."""
    name = _fresh_name()
    try:
        engine = sa.create_engine(
            server,
            isolation_level="AUTOCOMMIT",
            poolclass=sa.NullPool,
            connect_args={"connect_timeout": CONNECT_SECONDS},
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(create.format(name=name))
    except (sa.exc.DBAPIError, ImportError) as error:
        _missing(service, server, str(getattr(error, "orig", error)).strip().split("\n")[0])
    try:
        yield engine.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(drop.format(name=name))


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database."""
    server = _address("postgresql", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres")
    with _fresh_database(
        "postgresql", server, "CREATE DATABASE {name}", "DROP DATABASE {name} WITH (FORCE)"
    ) as url:
        yield url


@pytest.fixture(scope="session")
def mysql_url() -> Iterator[str]:
    """SQLAlchemy URL of an empty MySQL or MariaDB database."""
    server = _address("mysql", "mysql+pymysql://root@127.0.0.1:3306/mysql")
    with _fresh_database(
        "mysql", server, "CREATE DATABASE {name} CHARACTER SET utf8mb4", "DROP DATABASE {name}"
    ) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a Redis database that was empty and is emptied in the end."""
    server = _address("redis", "redis://127.0.0.1:6379").rstrip("/")
    try:
        import redis
    except ImportError as error:
        _missing("redis", server, error)
    token = uuid.uuid4().hex
    for number in range(15, 0, -1):
        client = redis.Redis.from_url(f"{server}/{number}", socket_timeout=CONNECT_SECONDS)
        with closing(client):
            try:
                taken = client.dbsize() or not client.set("taskworker-test-run", token, nx=True)
            except redis.ConnectionError as error:
                _missing("redis", server, error)
            if taken:
                continue
            yield f"{server}/{number}"
            client.flushdb()
            return
    _missing("redis", server, "none of its databases 1 to 15 is empty")


@pytest.fixture(scope="session")
def amqp_url() -> Iterator[str]:
    """URL of RabbitMQ: a fresh virtual host where this user may make one, else the given one."""
    import kombu

    server = _address("amqp", "amqp://guest:guest@127.0.0.1:5672//")
    connection = kombu.Connection(server, connect_timeout=CONNECT_SECONDS)
    try:
        with connection:
            connection.connect()
    except OSError as error:
        _missing("amqp", server, error)
    name = _fresh_name()
    if not _rabbitmqctl("add_vhost", name):
        yield server
        return
    _rabbitmqctl("set_permissions", "-p", name, connection.userid or "guest", ".*", ".*", ".*")
    yield f"{server.rstrip('/')}/{name}"
    _rabbitmqctl("delete_vhost", name)


def _rabbitmqctl(*arguments: str) -> bool:
    """Whether the administration command of a local RabbitMQ did what was asked."""
    program = shutil.which("rabbitmqctl")
    if program is None or "TASKWORKER_AMQP_URL" in os.environ:
        return False
    return subprocess.run([program, "-q", *arguments], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def beanstalk_url() -> Iterator[str]:
    """URL of a beanstalkd: one of our own where the program is installed, else the given one."""
    program = shutil.which("beanstalkd")
    if program is None or "TASKWORKER_BEANSTALK_URL" in os.environ:
        server = _address("beanstalk", "beanstalk://127.0.0.1:11300")
        host, _, port = server.split("://")[-1].rstrip("/").partition(":")
        try:
            socket.create_connection((host, int(port or 11300)), CONNECT_SECONDS).close()
        except OSError as error:
            _missing("beanstalk", server, error)
        yield server
        return
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([program, "-l", "127.0.0.1", "-p", str(port)])
    try:
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            if time.monotonic() > deadline or process.poll() is not None:
                _missing("beanstalk", f"127.0.0.1:{port}", "the private one did not start")
            time.sleep(0.02)
        yield f"beanstalk://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def unique() -> str:
    """A name no other test uses: for queues, keys and tables in a service that is shared."""
    return f"tw_{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment for a started program: this one, without settings for Flask or us."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLASK_", "TASKER_", "CELERY_", "PYTEST_"))
    } | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_python(tmp_path: Path, child_environment: dict[str, str]) -> Iterator[Start]:
    """Starts ``python ARGUMENTS`` in ``tmp_path``, warnings being errors; ends it after the test.

    What the program prints, on either stream, is on its ``stdout``. Connections may stay open to
    its end, when the system closes them.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", *arguments],
            cwd=tmp_path,
            env=child_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()

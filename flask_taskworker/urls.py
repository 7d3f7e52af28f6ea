"""Addresses of brokers, databases and result backends: read, completed, masked.

Pure text, apart from looking whether a driver is installed. Celery's and kombu's
spellings are understood here and nowhere else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import NamedTuple

#: What stands before a SQLAlchemy URL to make it a kombu URL of our own transport.
SQL_PREFIX = "taskworker+"
#: kombu takes what follows as a second address.
NO_SEMICOLON = "a ';' inside an address would end it: write %3B in its place"

# -- showing without telling --------------------------------------------------------------

_MASK = "***"
_SECRET = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|credential|connection_string"
    r"|(?:api|private|access|account|shared|encryption)[_-]?key)"
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRET_PARAMETER = re.compile(rf"([?&][^=&]*{_SECRET}[^=&]*=)[^&]*", re.IGNORECASE)
#: Hosts with optional ports and a path, as they look when there is no login before them.
_HOST = r"(?:\[[^\]]*\]|[^:/@,]*)(?::\d*)?"
_NO_LOGIN = re.compile(rf"{_HOST}(?:,{_HOST})*(?:/[^@]*)?")


def mask_url(url: str) -> str:
    """The URL with every password replaced by ``***``; several may be joined by ``;``."""
    return ";".join(map(_mask_one, several(url)))


def several(url: str) -> list[str]:
    """The addresses that are joined by ``;``, as kombu takes them."""
    return re.split(r";(?=[\w.+:-]+://)", url)


def _mask_one(url: str) -> str:
    begin = re.match(r"[\w.+:-]*://", url)
    scheme, rest = (begin[0], url[begin.end() :]) if begin else ("", url)
    base, mark, query = rest.partition("?")
    if not _NO_LOGIN.fullmatch(base) and not rest.startswith("/"):
        # A password that was not quoted may hold '/', '?' and '@': the last '@' ends it.
        # In doubt too much is hidden.
        login, at, tail = rest.rpartition("@")
        user, _, password = login.partition(":")
        if password:
            rest = f"{user}:{_MASK}@{tail}"
        elif scheme and not at:
            # 'redis://user:password', the host was forgotten: a port would be a number.
            rest = f"{base.partition(':')[0]}:{_MASK}{mark}{query}"
    return scheme + _SECRET_PARAMETER.sub(rf"\1{_MASK}", rest)


def masked(value: object, name: str = "") -> object:
    """A copy of a value in which nothing secret is left.

    :param name: the key under which the value is stored; it may say that it is secret.
    """
    if _SECRET_NAME.search(name) and value not in (None, ""):
        return _MASK
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([masked(item) for item in value])
    if isinstance(value, str) and ("://" in value or "@" in value):
        return mask_url(value)
    return value


# -- faults -------------------------------------------------------------------------------


class Refused(Exception):
    """A value cannot be used; the text completes 'KEY = value: ...'."""


class NotInstalled(Refused):
    """A package is missing; the text completes 'KEY is value but ...'."""


def fault(key: str, value: object, refusal: Refused | str) -> str:
    """One line for the user: the key, the value (masked) and what to write instead."""
    shown = repr(masked(value, key))
    if len(shown) > 120:
        shown = shown[:117] + "..."
    if isinstance(refusal, NotInstalled):
        return f"{key} is {shown} but {refusal}"
    return f"{key} = {shown}: {refusal}"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`` Did you mean 'x'?``, or nothing.

    :param prefix: what all names begin with; it would make any two of them look alike.
    """
    import difflib  # only a fault needs it

    names = [name.removeprefix(prefix) for name in known]
    close = difflib.get_close_matches(word.removeprefix(prefix), names, n=1)
    return f" Did you mean {prefix + close[0]!r}?" if close else ""


def installed(module: str) -> bool:
    """Whether a module could be imported; it is not imported."""
    try:
        return module in sys.modules or find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# -- names --------------------------------------------------------------------------------


#: Packages of modules that are not named after them.
_PACKAGES = {"MySQLdb": "mysqlclient", "mysql.connector": "mysql-connector-python"}


class _Database(NamedTuple):
    family: str  # the name of the extra, too
    title: str
    #: SQLAlchemy's driver names, the preferred one first, and the modules they need.
    drivers: Mapping[str, str]


_MYSQL_DRIVERS = {
    "pymysql": "pymysql",
    "mysqldb": "MySQLdb",
    "mysqlconnector": "mysql.connector",
    "mariadbconnector": "mariadb",
}
DATABASES = {
    "sqlite": _Database("sqlite", "SQLite", {}),
    "postgresql": _Database(
        "postgresql",
        "PostgreSQL",
        {"psycopg": "psycopg", "psycopg2": "psycopg2", "pg8000": "pg8000"},
    ),
    "mysql": _Database("mysql", "MySQL", _MYSQL_DRIVERS),
    "mariadb": _Database("mysql", "MariaDB", _MYSQL_DRIVERS),
}
#: Drivers that a bare address may pick by itself; any other has to be asked for by name.
_PICKED = frozenset({"psycopg", "psycopg2", "pymysql"})
ASYNCIO_DRIVERS = frozenset({"asyncpg", "aiosqlite", "aiomysql", "asyncmy", "psycopg_async"})
_OTHER_NAMES = {
    "postgres": "postgresql",
    "sqla": "sqlalchemy",
    "sql": "sqlalchemy",
    "database": "sqlalchemy",
    "rabbitmq": "amqp",
    "beanstalkd": "beanstalk",
    "file": "filesystem",
}

#: Engines that have a default address, that of a server on this machine or of none.
LOCAL_BROKERS = {
    "amqp": "amqp://guest:guest@127.0.0.1:5672//",
    "redis": "redis://127.0.0.1:6379/0",
    "beanstalk": "beanstalk://127.0.0.1:11300",
    "memory": "memory://",
    "filesystem": "filesystem://",
}
#: Schemes of one engine; every other scheme is an engine of its own.
ENGINE_OF_SCHEME = {
    "amqps": "amqp",
    "pyamqp": "amqp",
    "librabbitmq": "amqp",
    "rediss": "redis",
}
#: What kombu has besides; these have no default address.
KOMBU_TRANSPORTS = (
    "amqps",
    "pyamqp",
    "librabbitmq",
    "rediss",
    "sentinel",
    "sqs",
    "mongodb",
    "zookeeper",
    "slmq",
    "qpid",
    "consul",
    "etcd",
    "azurestoragequeues",
    "azureservicebus",
    "pyro",
    "gcpubsub",
    "confluentkafka",
    "kafka",
    "pgmq",
)
_ENGINES = ("sqlalchemy", *LOCAL_BROKERS, "kombu")
#: What an engine or a result backend needs besides kombu: the module and our extra.
_NEEDS = {
    "redis": ("redis", "redis"),
    "rediss": ("redis", "redis"),
    "sentinel": ("redis", "redis"),
    "beanstalk": ("greenstalk", "beanstalk"),
}


def engine_name(text: str) -> str:
    """The name of an engine as we write it; a class of one's own is 'package.module:Class'."""
    if "://" in text:
        raise Refused("is an address: set TASKER_BROKER_URL to it")
    name = _OTHER_NAMES.get(text.lower(), text.lower())
    if name in _ENGINES or name in KOMBU_TRANSPORTS:
        return name
    if "." in text:
        return text
    if name.partition("+")[0] in DATABASES:
        raise Refused(f"is a driver: set TASKER_ENGINE = 'sqlalchemy' and TASKER_DRIVER = {name!r}")
    raise Refused(
        f"must be one of {', '.join(_ENGINES)} or another transport of kombu."
        + did_you_mean(name, (*_ENGINES, *KOMBU_TRANSPORTS, *_OTHER_NAMES))
    )


def driver_name(text: str) -> str:
    """The name of a database driver as SQLAlchemy writes it."""
    if "://" in text:
        raise Refused("is an address: set TASKER_DATABASE_URI to it")
    dialect, plus, dbapi = text.lower().partition("+")
    _refuse_asyncio(dbapi)
    dialect = _OTHER_NAMES.get(dialect, dialect)
    if dialect in DATABASES:
        return dialect + plus + dbapi
    raise Refused(
        f"must be one of {', '.join(DATABASES)} or a full name such as 'postgresql+psycopg2'."
        + did_you_mean(dialect, DATABASES)
    )


def _refuse_asyncio(dbapi: str) -> None:
    if dbapi in ASYNCIO_DRIVERS:
        raise Refused(f"{dbapi} is a driver for asyncio, which cannot be used here: leave it out")


def broker_scheme(scheme: str) -> tuple[str, str]:
    """The transport's name and its variant: ``('redis', '+socket')`` for 'redis+socket'."""
    name, plus, variant = scheme.partition("+")
    try:
        engine = engine_name(name)
    except Refused:
        engine = ""
    if engine in ("", "kombu", "sqlalchemy"):
        known = (*LOCAL_BROKERS, *KOMBU_TRANSPORTS, *DATABASES)
        raise Refused(
            f"no broker is known as {mask_url(scheme)!r}: use {', '.join(LOCAL_BROKERS)}, "
            f"a database or another transport of kombu.{did_you_mean(name.lower(), known)}"
        )
    return engine, plus + variant


def require(name: str) -> None:
    """Refuse an engine or a result backend whose package is missing."""
    module, extra = _NEEDS.get(name, ("", ""))
    if module and not installed(module):
        raise NotInstalled(
            f'the package {module} is not installed: pip install "flask-taskworker[{extra}]"'
        )


def check_redis(rest: str) -> None:
    """Refuse what stands behind ``redis://`` if it names a database that is no number."""
    path = rest.rpartition("@")[2].partition("?")[0].partition("/")[2].strip("/")
    if path and not path.isdecimal():
        raise Refused(f"a Redis database is a number: end the address with '/0', not '/{path}'")


# -- database addresses -------------------------------------------------------------------


def bare(url: str) -> str:
    """A database URL without the prefix that makes it a broker or a backend of ours or Celery's."""
    for prefix in (SQL_PREFIX, "sqla+", "sqlalchemy+", "db+"):
        if url.lower().startswith(prefix):
            return url[len(prefix) :]
    return url


def dialect_of(url: str) -> str:
    """``postgresql`` for ``postgres+psycopg2://...``; empty if it is no database we know."""
    dialect = url.partition("://")[0].partition("+")[0].lower()
    dialect = _OTHER_NAMES.get(dialect, dialect)
    return dialect if "://" in url and dialect in DATABASES else ""


def family_of(driver: str) -> str:
    """The database of a driver or dialect; MariaDB counts as MySQL."""
    return DATABASES[driver.partition("+")[0]].family


def sqlite_file(url: str) -> str:
    """The file of a SQLite URL as it is written; empty for a database in memory."""
    file, _, query = url.partition("://")[2].removeprefix("/").partition("?")
    in_memory = ":memory:" in file or "mode=memory" in query or file == "file:"
    return "" if in_memory else file


def sqlite_url(file: str, query: str = "") -> str:
    """The URL of a database file."""
    if any(mark in file for mark in "?;"):
        raise Refused(f"the path {file!r} holds '?' or ';', which no URL can: use another folder")
    return f"sqlite:///{file}" + (f"?{query}" if query else "")


def database_url(text: str, instance_path: str, dbapi: str = "") -> str:
    """A database URL with its driver named and its file absolute.

    :param instance_path: where a relative SQLite file is, as in Flask-SQLAlchemy.
    :param dbapi: a driver that is used in place of the one in the URL.
    """
    url, dialect = bare(text), dialect_of(bare(text))
    if not dialect:
        names = ", ".join(f"{name}://" for name in DATABASES)
        raise Refused(f"must be the URL of a database ({names}), for example 'sqlite:///app.db'")
    scheme, _, rest = url.partition("://")
    wanted = dbapi or scheme.partition("+")[2].lower()
    _refuse_asyncio(wanted)
    if dialect == "sqlite":
        return _sqlite(url, wanted, instance_path)
    if ";" in rest:
        raise Refused(NO_SEMICOLON)
    return f"{dialect}+{pick_driver(DATABASES[dialect], wanted)}://{rest}"


def _sqlite(url: str, dbapi: str, instance_path: str) -> str:
    rest, file = url.partition("://")[2], sqlite_file(url)
    if not rest.startswith("/") and rest.partition("?")[0]:
        path = mask_url(rest)
        raise Refused(f"a SQLite URL has three slashes or more: 'sqlite:///{path}'")
    if not file:
        raise Refused(
            "a database in memory is not shared between connections: name a file, for "
            "example 'sqlite:///tasks.db', or set TASKER_ENGINE = 'memory' in its place"
        )
    prefix = "file:" if file.startswith("file:") else ""
    path = prefix + os.path.join(instance_path, file.removeprefix(prefix))
    made = sqlite_url(path, rest.partition("?")[2])
    return made.replace("sqlite", f"sqlite+{dbapi}", 1) if dbapi else made


def pick_driver(database: _Database, wanted: str) -> str:
    """SQLAlchemy's name of an installed driver; any unknown one is taken on trust."""
    if wanted:
        module = database.drivers.get(wanted)
        if module and not installed(module):
            package = _PACKAGES.get(module, module)
            raise NotInstalled(
                f"the driver {wanted} is not installed: pip install {package}, "
                f'or leave it out and pip install "flask-taskworker[{database.family}]"'
            )
        return wanted
    for name, module in database.drivers.items():
        if name in _PICKED and installed(module):
            return name
    raise NotInstalled(
        f"no {database.title} driver is installed: "
        f'pip install "flask-taskworker[{database.family}]"'
    )

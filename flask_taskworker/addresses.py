"""Where the broker, the database and the results of one app are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from . import urls
from .urls import SQL_PREFIX, NotInstalled, Refused, database_url, dialect_of, family_of


class Addresses:
    """Works out the effective addresses from what the user set.

    :param given: ``engine``, ``driver``, ``broker_url``, ``database_uri`` and
        ``result_backend``: those that were set only.
    :param app_uri: the app's ``SQLALCHEMY_DATABASE_URI``, or an empty text.
    :param instance_path: where default and relative files are.
    """

    def __init__(self, given: Mapping[str, str], app_uri: str, instance_path: str) -> None:
        self.given, self.app_uri, self.instance_path = given, app_uri, instance_path
        #: What cannot be used, one text each. With one of them the rest has no meaning.
        self.problems: list[str] = []
        self.engine = given.get("engine", "sqlalchemy")
        self.driver = given.get("driver", "sqlite")
        self.broker_url = ""
        self.database_uri: str | None = None
        self.result_backend: str | None = None
        if "broker_url" in given:
            self._try("broker_url", self._broker_from_url)
        elif self.engine == "sqlalchemy":
            self._find_database()
        else:
            self._try("engine", self._broker_of_engine)
        if "result_backend" in given:
            self._try("result_backend", self._backend_from_url)
        elif not self.problems:
            self._try("engine", self._backend_of_engine)

    @property
    def effective(self) -> dict[str, Any]:
        """The fields of the configuration that were worked out."""
        names = ("engine", "driver", "broker_url", "database_uri", "result_backend")
        return {name: getattr(self, name) for name in names}

    @property
    def transport_options(self) -> dict[str, object]:
        """Options without which the transport would use the current folder."""
        if self.engine != "filesystem":
            return {}
        folder = os.path.join(self.instance_path, "taskworker-queue")
        return {
            "data_folder_in": folder,
            "data_folder_out": folder,
            "control_folder": os.path.join(folder, "control"),
        }

    def _try(self, field: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Refused as refusal:
            value = self.given.get(field, getattr(self, field))
            self.problems.append(urls.fault(f"TASKER_{field.upper()}", value, refusal))

    def _file(self, name: str) -> str:
        return urls.sqlite_url(os.path.join(self.instance_path, name))

    # -- broker ---------------------------------------------------------------------------

    def _broker_from_url(self) -> None:
        url = self.given["broker_url"]
        if "://" not in url:
            raise Refused("must be a URL, for example 'redis://127.0.0.1:6379/0'")
        parts = [part.partition("://") for part in urls.several(url)]
        if url.count(";") >= len(parts):
            raise Refused(urls.NO_SEMICOLON)
        scheme = parts[0][0]
        if any(part[0] != scheme for part in parts):
            raise Refused("must name brokers of one kind only")
        if dialect_of(urls.bare(url)):
            self.engine = "sqlalchemy"
            self._use_database(database_url(url, self.instance_path))
            return
        name, variant = urls.broker_scheme(scheme)
        urls.require(name)
        if name in ("redis", "rediss") and not variant:
            for _, _, rest in parts:
                urls.check_redis(rest)
        self.engine = urls.ENGINE_OF_SCHEME.get(name, name)
        self.broker_url = ";".join(f"{name}{variant}://{rest}" for _, _, rest in parts)

    def _broker_of_engine(self) -> None:
        urls.require(self.engine)
        if self.engine not in urls.LOCAL_BROKERS:
            raise Refused(
                "needs the address of a broker: set TASKER_BROKER_URL, "
                "for example 'redis://127.0.0.1:6379/0'"
            )
        self.broker_url = urls.LOCAL_BROKERS[self.engine]
        if "database_uri" in self.given:
            self._try("database_uri", self._explicit_database)

    # -- database -------------------------------------------------------------------------

    def _find_database(self) -> None:
        if "database_uri" in self.given:
            self._try("database_uri", self._explicit_database)
        elif self._app_database_fits():
            self._try("driver", self._app_database)
        else:
            self._try("driver", self._default_database)

    def _use_database(self, url: str) -> None:
        self.database_uri = url
        if self.engine == "sqlalchemy":
            self.broker_url = SQL_PREFIX + url
        if family_of(self.driver) != family_of(dialect_of(url)):
            self.driver = dialect_of(url)

    def _explicit_database(self) -> None:
        uri = self.given["database_uri"]
        dialect = dialect_of(urls.bare(uri))
        driver, _, dbapi = self.given.get("driver", "").partition("+")
        named = urls.bare(uri).partition("://")[0].partition("+")[2]
        other_driver = bool(dbapi and named) and dbapi != named
        if dialect and driver and (family_of(driver) != family_of(dialect) or other_driver):
            raise Refused(
                f"contradicts TASKER_DRIVER = {self.driver!r}: remove one of the two settings"
            )
        self._use_database(database_url(uri, self.instance_path, dbapi))

    def _app_database_fits(self) -> bool:
        dialect = dialect_of(self.app_uri)
        if not dialect or family_of(dialect) != family_of(self.driver):
            return False
        return dialect != "sqlite" or bool(urls.sqlite_file(self.app_uri))

    def _app_database(self) -> None:
        scheme, _, rest = self.app_uri.partition("://")
        dbapi = self.driver.partition("+")[2] or scheme.partition("+")[2]
        if dbapi in urls.ASYNCIO_DRIVERS:
            # The address is right, but this side needs a driver that waits.
            dbapi = ""
        url = f"{dialect_of(self.app_uri)}://{rest}"
        self._use_database(database_url(url, self.instance_path, dbapi))

    def _default_database(self) -> None:
        dialect, _, dbapi = self.driver.partition("+")
        database = urls.DATABASES[dialect]
        if dialect == "sqlite":
            file = self._file("taskworker.db")
            self._use_database(database_url(file, self.instance_path, dbapi))
            return
        try:
            urls.pick_driver(database, dbapi)
        except NotInstalled as missing:
            self.problems.append(urls.fault("TASKER_DRIVER", self.driver, missing))
        raise Refused(
            f"no {database.title} database is named: set TASKER_DATABASE_URI, "
            f"for example '{dialect}://user:password@127.0.0.1/mydb'"
        )

    # -- results --------------------------------------------------------------------------

    def _backend_from_url(self) -> None:
        url = self.given["result_backend"]
        scheme = url.partition("://")[0].lower()
        if scheme in ("disabled", "none", "false"):
            self.result_backend = None
        elif dialect_of(urls.bare(url)) == "sqlite" and not urls.sqlite_file(urls.bare(url)):
            raise Refused("names no file: use 'sqlite:///results.db' or 'cache+memory://'")
        elif dialect_of(urls.bare(url)):
            self.result_backend = SQL_PREFIX + database_url(url, self.instance_path)
        elif scheme in ("redis", "rediss"):
            urls.require(scheme)
            urls.check_redis(url.partition("://")[2])
            self.result_backend = url if "://" in url else urls.LOCAL_BROKERS["redis"]
        elif scheme == "rpc":
            self.result_backend = "rpc://"
        elif scheme in ("cache+memory", "memory"):
            self.result_backend = "cache+memory://"
        else:
            known = (*urls.DATABASES, "redis", "rediss", "rpc", "cache+memory", "disabled")
            raise Refused(
                "must be the URL of a database, 'redis://...', 'rediss://...', 'rpc://', "
                "'cache+memory://' or 'disabled'." + urls.did_you_mean(scheme, known)
            )

    def _backend_of_engine(self) -> None:
        if self.broker_url.startswith(("redis://", "rediss://")):
            self.result_backend = urls.several(self.broker_url)[0]
        elif self.engine == "amqp":
            self.result_backend = "rpc://"
        elif self.engine == "memory":
            self.result_backend = "cache+memory://"
        else:
            uri = self.database_uri or self._file("taskworker-results.db")
            self.result_backend = SQL_PREFIX + uri

"""The settings: each one declared once, read from a Flask config, all faults at once.

A field of :class:`Config` carries its :class:`Setting`. Reading, defaults, messages and
the reference documentation all come from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, cast

from . import kinds
from .addresses import Addresses
from .exceptions import ConfigurationError
from .kinds import Kind, Setting, Written
from .urls import Refused, did_you_mean, fault, mask_url, masked

__all__ = [
    "SETTINGS",
    "Config",
    "ConfigurationWarning",
    "Setting",
    "mask_url",
    "write_defaults",
]


class ConfigurationWarning(UserWarning):
    """A key that looks like a setting of this package, but is none."""


def _setting(
    key: str,
    kind: Kind,
    default: object,
    doc: str,
    *,
    celery: str = "",
    required: bool = False,
    **more: Any,
) -> Any:
    new, *old = celery.split() or [""]
    # A Flask config holds Celery's new names in capitals, behind its prefix.
    names = (new, f"CELERY_{new.upper()}", *old) if new else ()
    setting = Setting(key, kind, default, doc, celery=names, **more)
    metadata = {"setting": setting}
    if required:
        return field(metadata=metadata)
    # A mapping has no hash; two configs that differ in it only may share one.
    hashed = None if kind is not kinds.OPTIONS else False
    return field(default_factory=lambda: setting.value, hash=hashed, metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class Config:
    """The settings of one app, checked and complete."""

    engine: str = _setting(
        "TASKER_ENGINE",
        kinds.ENGINE,
        "sqlalchemy",
        "What carries the messages: sqlalchemy, amqp, redis, beanstalk, memory, filesystem "
        "or another transport of kombu.",
        derived="'sqlalchemy', or the scheme of TASKER_BROKER_URL",
    )
    driver: str = _setting(
        "TASKER_DRIVER",
        kinds.DRIVER,
        "sqlite",
        "The database of the sqlalchemy engine: sqlite, postgresql, mysql, mariadb or a full "
        "driver name such as postgresql+psycopg2.",
        derived="'sqlite', or that of TASKER_DATABASE_URI",
    )
    broker_url: str = _setting(
        "TASKER_BROKER_URL",
        kinds.URLS,
        None,
        "The broker's address; it wins over engine and driver.",
        celery="broker_url BROKER_URL",
        required=True,
        derived="that of the engine on this machine",
        example="redis://127.0.0.1:6379/0",
    )
    database_uri: str | None = _setting(
        "TASKER_DATABASE_URI",
        kinds.URL,
        None,
        "The SQLAlchemy URL of the database that holds the queue.",
        derived="SQLALCHEMY_DATABASE_URI if it is of the driver and a file or server, else "
        "taskworker.db in the instance folder",
        example="sqlite:///tasks.db",
    )
    result_backend: str | None = _setting(
        "TASKER_RESULT_BACKEND",
        kinds.BACKEND,
        None,
        "Where states and results are kept; 'disabled' keeps none.",
        celery="result_backend",
        derived="where the engine can keep them: the same database, redis, rpc:// for amqp",
        example="sqlite:///results.db",
    )
    loop_interval: float = _setting(
        "TASKER_LOOP_INTERVAL",
        kinds.SECONDS,
        5,
        "The longest the idle loop sleeps when no wake-up reaches it; not a polling delay.",
        unit="s",
        former=("TASKER_INTERVAL_TIME",),
    )
    debug: bool = _setting(
        "TASKER_DEBUG",
        kinds.FLAG,
        False,
        "Log the start, the end and the traceback of every task.",
        derived="app.debug",
    )
    durability: Literal["full", "normal"] = _setting(
        "TASKER_DURABILITY",
        kinds.DURABILITY,
        "full",
        "With full, a task survives a power cut as soon as it was sent; normal is faster and "
        "may lose the last moments.",
    )
    default_queue: str = _setting(
        "TASKER_DEFAULT_QUEUE",
        kinds.QUEUE,
        "celery",
        "The queue of tasks that name none; the default is Celery's, so that both can share it.",
        celery="task_default_queue CELERY_DEFAULT_QUEUE",
    )
    serializer: str = _setting(
        "TASKER_SERIALIZER",
        kinds.SERIALIZER,
        "json",
        "How arguments are written; it must be one of TASKER_ACCEPT_CONTENT.",
        celery="task_serializer",
    )
    result_serializer: str = _setting(
        "TASKER_RESULT_SERIALIZER",
        kinds.SERIALIZER,
        "json",
        "How results are written; it must be one of TASKER_ACCEPT_CONTENT.",
        celery="result_serializer",
    )
    accept_content: frozenset[str] = _setting(
        "TASKER_ACCEPT_CONTENT",
        kinds.SERIALIZERS,
        ("json",),
        "The serializers that are read; whoever can write to the broker can run code here "
        "once pickle is among them.",
        celery="accept_content",
        example=["json"],
    )
    compression: str | None = _setting(
        "TASKER_COMPRESSION",
        kinds.COMPRESSION,
        None,
        "How messages are compressed.",
        celery="task_compression CELERY_MESSAGE_COMPRESSION",
        example="gzip",
    )
    ignore_result: bool = _setting(
        "TASKER_IGNORE_RESULT",
        kinds.FLAG,
        False,
        "Store neither state nor result of tasks that do not ask for it.",
        celery="task_ignore_result CELERY_IGNORE_RESULT",
    )
    result_expires: float | None = _setting(
        "TASKER_RESULT_EXPIRES",
        kinds.SECONDS_OR_NEVER,
        86400,
        "How long a result is kept; None or 0 keeps it for ever.",
        celery="result_expires CELERY_TASK_RESULT_EXPIRES",
        unit="s",
    )
    track_started: bool = _setting(
        "TASKER_TRACK_STARTED",
        kinds.FLAG,
        False,
        "Store the state STARTED when a run begins.",
        celery="task_track_started CELERY_TRACK_STARTED",
    )
    acks_late: bool = _setting(
        "TASKER_ACKS_LATE",
        kinds.FLAG,
        True,
        "Acknowledge after the run (at least once) instead of before it (at most once).",
        celery="task_acks_late CELERY_ACKS_LATE",
    )
    reject_on_worker_lost: bool = _setting(
        "TASKER_REJECT_ON_WORKER_LOST",
        kinds.FLAG,
        True,
        "Put a task whose process died back on its queue, until TASKER_MAX_DELIVERIES; False "
        "makes it a failure at once.",
        celery="task_reject_on_worker_lost CELERY_REJECT_ON_WORKER_LOST",
    )
    acks_on_failure_or_timeout: bool = _setting(
        "TASKER_ACKS_ON_FAILURE_OR_TIMEOUT",
        kinds.FLAG,
        True,
        "Acknowledge a task that failed or ran out of time; False parks its message as a dead "
        "letter, from where it can be replayed.",
        celery="task_acks_on_failure_or_timeout CELERY_ACKS_ON_FAILURE_OR_TIMEOUT",
    )
    store_errors_even_if_ignored: bool = _setting(
        "TASKER_STORE_ERRORS_EVEN_IF_IGNORED",
        kinds.FLAG,
        False,
        "Store the failures of tasks whose results are ignored.",
        celery="task_store_errors_even_if_ignored CELERY_STORE_ERRORS_EVEN_IF_IGNORED",
    )
    rate_limit: str | float | None = _setting(
        "TASKER_RATE_LIMIT",
        kinds.RATE,
        None,
        "How many runs of each task may start in a time, for each worker; None is without limit.",
        celery="task_default_rate_limit CELERY_DEFAULT_RATE_LIMIT",
        example="10/s",
    )
    max_retries: int | None = _setting(
        "TASKER_MAX_RETRIES",
        kinds.COUNT_OR_UNLIMITED,
        3,
        "How often retry() may queue a task again; None is without limit.",
    )
    retry_delay: float = _setting(
        "TASKER_RETRY_DELAY",
        kinds.SECONDS_OR_ZERO,
        180,
        "The pause before a retry that names no time.",
        unit="s",
    )
    concurrency: int = _setting(
        "TASKER_CONCURRENCY",
        kinds.COUNT,
        4,
        "How many tasks run at once.",
        celery="worker_concurrency CELERYD_CONCURRENCY",
        unit="threads",
    )
    pool: Literal["threads", "processes", "solo"] | None = _setting(
        "TASKER_POOL",
        kinds.POOL,
        None,
        "Where tasks run: threads, processes (prefork is the same) or solo.",
        celery="worker_pool CELERYD_POOL",
        derived="'threads'",
        example="processes",
    )
    app: str | None = _setting(
        "TASKER_APP",
        kinds.TARGET,
        None,
        "Where a child process finds the app, as -A takes it.",
        derived="what -A names, or the module of the app",
        example="shop:create_app()",
    )
    max_tasks_per_child: int | None = _setting(
        "TASKER_MAX_TASKS_PER_CHILD",
        kinds.COUNT_OR_NEVER,
        None,
        "After so many tasks a child process is replaced.",
        celery="worker_max_tasks_per_child CELERYD_MAX_TASKS_PER_CHILD",
        unit="tasks",
        example=1000,
    )
    max_memory_per_child: int | None = _setting(
        "TASKER_MAX_MEMORY_PER_CHILD",
        kinds.COUNT_OR_NEVER,
        None,
        "A child process that has used more than this is replaced after its task.",
        celery="worker_max_memory_per_child CELERYD_MAX_MEMORY_PER_CHILD",
        unit="KiB",
        example=200_000,
    )
    task_time_limit: float | None = _setting(
        "TASKER_TASK_TIME_LIMIT",
        kinds.SECONDS_OR_NO_LIMIT,
        None,
        "How long a task may run before its process is killed.",
        celery="task_time_limit CELERYD_TASK_TIME_LIMIT",
        unit="s",
        example=300,
    )
    task_soft_time_limit: float | None = _setting(
        "TASKER_TASK_SOFT_TIME_LIMIT",
        kinds.SECONDS_OR_NO_LIMIT,
        None,
        "How long a task may run before SoftTimeLimitExceeded is raised in it.",
        celery="task_soft_time_limit CELERYD_TASK_SOFT_TIME_LIMIT",
        unit="s",
        example=240,
    )
    drain_timeout: float = _setting(
        "TASKER_DRAIN_TIMEOUT",
        kinds.SECONDS_OR_ZERO,
        25,
        "How long a stopping worker lets running tasks finish.",
        unit="s",
    )
    publish_timeout: float = _setting(
        "TASKER_PUBLISH_TIMEOUT",
        kinds.SECONDS,
        4,
        "How long sending a task may try; at 4 or less, delay() ends within 5 seconds.",
        celery="broker_connection_timeout BROKER_CONNECTION_TIMEOUT",
        unit="s",
    )
    pool_limit: int = _setting(
        "TASKER_POOL_LIMIT",
        kinds.COUNT,
        10,
        "How many connections a process keeps for sending.",
        celery="broker_pool_limit BROKER_POOL_LIMIT",
        unit="connections",
    )
    lease: float = _setting(
        "TASKER_LEASE",
        kinds.SECONDS,
        30,
        "How long after a worker's last sign of life another may take its messages.",
        unit="s",
    )
    max_deliveries: int = _setting(
        "TASKER_MAX_DELIVERIES",
        kinds.COUNT,
        5,
        "How often a message is handed out before it is parked as a dead letter.",
        unit="deliveries",
    )
    max_message_bytes: int = _setting(
        "TASKER_MAX_MESSAGE_BYTES",
        kinds.COUNT,
        16 * 1024 * 1024,
        "The largest message that is sent or read.",
        unit="bytes",
    )
    transport_options: Mapping[str, object] = _setting(
        "TASKER_TRANSPORT_OPTIONS",
        kinds.OPTIONS,
        MappingProxyType({}),
        "Options of the transport; they win over those that are set for you.",
        celery="broker_transport_options BROKER_TRANSPORT_OPTIONS",
        example={"visibility_timeout": 3600},
    )
    timezone: str = _setting(
        "TASKER_TIMEZONE",
        kinds.TIMEZONE,
        "UTC",
        "The time zone in which schedules are read; times are stored as UTC.",
        celery="timezone",
        example="Europe/Berlin",
    )
    remote_control: bool = _setting(
        "TASKER_REMOTE_CONTROL",
        kinds.FLAG,
        True,
        "Let workers answer inspect and control commands.",
        celery="worker_enable_remote_control CELERY_ENABLE_REMOTE_CONTROL",
    )
    send_task_events: bool = _setting(
        "TASKER_SEND_TASK_EVENTS",
        kinds.FLAG,
        False,
        "Let workers send an event for each step of a task, for monitors; the same as -E. A "
        "monitor can switch it on as well.",
        celery="worker_send_task_events CELERY_SEND_TASK_EVENTS CELERY_SEND_EVENTS",
    )
    send_sent_event: bool = _setting(
        "TASKER_SEND_SENT_EVENT",
        kinds.FLAG,
        False,
        "Send an event for each task that is sent.",
        celery="task_send_sent_event CELERY_SEND_TASK_SENT_EVENT",
    )
    always_eager: bool = _setting(
        "TASKER_ALWAYS_EAGER",
        kinds.FLAG,
        False,
        "Run tasks at once in the caller instead of sending them, for tests.",
        celery="task_always_eager CELERY_ALWAYS_EAGER",
    )
    eager_propagates: bool = _setting(
        "TASKER_EAGER_PROPAGATES",
        kinds.FLAG,
        False,
        "Let the exception of a task that runs in the caller reach the caller.",
        celery="task_eager_propagates CELERY_EAGER_PROPAGATES_EXCEPTIONS",
    )

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, object],
        *,
        debug: bool,
        instance_path: str,
        testing: bool = False,
    ) -> Config:
        """Read the ``TASKER_*`` keys of a Flask config.

        :param debug: the default of ``TASKER_DEBUG``.
        :param instance_path: where default and relative database files are.
        :param testing: the app's ``TESTING``; no default depends on it so far.
        :raises ConfigurationError: with all faults at once.
        """
        _warn_unknown(mapping)
        problems: list[str] = []
        given: dict[str, Any] = {}
        failed = set()
        for setting in SETTINGS:
            key = setting.find(mapping)
            if key is None:
                continue
            try:
                given[setting.field] = setting.read(mapping[key])
            except Refused as refusal:
                problems.append(fault(key, mapping[key], refusal))
                failed.add(setting.field)
        values = {item.field: item.value for item in SETTINGS} | {"debug": debug} | given
        if not failed & {"serializer", "result_serializer", "accept_content"}:
            problems += _unreadable(values)
        hard, soft = values["task_time_limit"], values["task_soft_time_limit"]
        if hard is not None and soft is not None and soft > hard:
            advice = f"is longer than TASKER_TASK_TIME_LIMIT ({hard:g}), so it is never reached"
            problems.append(fault("TASKER_TASK_SOFT_TIME_LIMIT", soft, advice))
        addresses = Addresses(given, _app_uri(mapping), instance_path)
        problems += addresses.problems
        if problems:
            raise ConfigurationError(problems)
        options = addresses.transport_options | dict(values["transport_options"])
        values["transport_options"] = MappingProxyType(options)
        return cls(**values | addresses.effective)

    def masked(self) -> dict[str, object]:
        """All values by field, with nothing secret in them; for logs and displays."""
        return {item.field: masked(getattr(self, item.field)) for item in SETTINGS}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.masked().items())
        return f"Config({values})"


#: All settings, in the order of the reference.
SETTINGS: tuple[Setting, ...] = tuple(
    cast(Setting, item.metadata["setting"]) for item in fields(Config)
)


def write_defaults(mapping: MutableMapping[str, Any], config: Config) -> None:
    """Write what the user left out into a Flask config; nothing that is there is changed.

    Addresses are written as None, "derived": a changed engine is then followed when the
    config is read again, and no password is put where there was none.
    """
    for setting in SETTINGS:
        mapping.setdefault(setting.key, _as_written(setting, getattr(config, setting.field)))


def _as_written(setting: Setting, value: object) -> object:
    if setting.default is None and setting.derived:
        return None
    if isinstance(setting.default, (tuple, Mapping)):
        # The app's own copy: a change to it must not change the default.
        return {} if isinstance(setting.default, Mapping) else sorted(cast("frozenset[str]", value))
    if setting.derived and isinstance(value, str):
        return Written(value)
    # 5 stays 5, where Config has 5.0; a value read under a former key stays the user's.
    return setting.default if value == setting.value else value


def _app_uri(mapping: Mapping[str, object]) -> str:
    """The address that Flask-SQLAlchemy has; that one may complain about nonsense."""
    try:
        return cast(str, kinds.URL.parse(mapping.get("SQLALCHEMY_DATABASE_URI")))
    except Refused:
        return ""


def _unreadable(values: Mapping[str, Any]) -> Iterator[str]:
    """Faults of a config whose own workers would refuse what it writes."""
    accepted: frozenset[str] = values["accept_content"]
    for name in ("serializer", "result_serializer"):
        used = values[name]
        if used not in accepted:
            wanted = sorted({*accepted, used})
            advice = f"is not accepted; if that is meant, set TASKER_ACCEPT_CONTENT = {wanted}"
            yield fault(f"TASKER_{name.upper()}", used, advice)


def _warn_unknown(mapping: Mapping[str, object]) -> None:
    names = {name: item.key for item in SETTINGS for name in (item.key, *item.former)}
    # Celery's name with our prefix is the likeliest guess of those who come from there.
    guesses = {f"TASKER_{name.upper()}": item.key for item in SETTINGS for name in item.celery}
    for key in mapping:
        if key.startswith("TASKER_") and key not in names:
            meant = guesses.get(key)
            hint = f" Did you mean {meant!r}?" if meant else did_you_mean(key, names, "TASKER_")
            warnings.warn(
                f"{key} is not a setting and has no effect.{hint}",
                ConfigurationWarning,
                stacklevel=4,
            )

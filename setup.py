"""Packaging of Flask-TaskWorker. Settings of the tools stand in pyproject.toml and tox.ini."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

EXTRAS = {
    "redis": ["redis>=6.4"],
    "amqp": [],  # the AMQP client comes with kombu; the name exists so that it can be asked for
    "postgresql": ["psycopg[binary]>=3.1.8"],
    "mysql": ["PyMySQL[rsa]>=1.0.3"],  # rsa: MySQL 8 wants it for passwords
    "beanstalk": ["greenstalk>=2.0.0"],
    "mail": ["Flask-Mail>=0.9.1"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["test"] = [
    "alembic>=1.13",
    "build>=1.0",
    "Flask-SQLAlchemy>=3.0.3",
    "psycopg2-binary>=2.9.6",  # the other driver of PostgreSQL, which works as well
    "hypothesis>=6.100",
    "msgpack>=1.0",
    "pytest>=8.0",
    "pytest-rerunfailures>=14.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "PyYAML>=6.0",
    "setuptools>=64",
    "wheel",
]
EXTRAS["docs"] = ["furo", "myst-parser>=3.0", "sphinx>=7.3"]

setup(
    name="flask-taskworker",
    version="0.1.0",
    description="Background tasks for Flask: SQLite by default, any kombu transport by one "
    "config line, Celery's wire format.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The Flask-TaskWorker authors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["flask_taskworker", "flask_taskworker.*"]),
    package_data={"flask_taskworker": ["py.typed"]},
    zip_safe=False,
    install_requires=[
        "Flask>=2.3",
        "kombu>=5.3.1",
        "SQLAlchemy>=2.0",
        "blinker>=1.6.2",
        "click>=8.1.3",
    ],
    extras_require=EXTRAS,
    entry_points={
        "flask.commands": ["taskworker=flask_taskworker.cli:taskworker"],
        "console_scripts": ["taskworker=flask_taskworker.cli:main"],
    },
    keywords=["flask", "task queue", "background tasks", "celery", "kombu", "sqlite"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Framework :: Flask",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: WWW/HTTP",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)

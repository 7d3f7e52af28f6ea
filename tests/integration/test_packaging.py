"""What is published: a source archive and a wheel that hold and do what they should."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import flask_taskworker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NOT_SOURCE = (".*", "*.egg-info", "__pycache__", "build", "dist", "instance", "venv")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=clean_environment(), timeout=240
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLASK_", "PYTHON", "TASKER_"))
    }


@pytest.fixture(scope="module")
def archives(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    shutil.copytree(root / ".ci", source / ".ci")
    made = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", made, source)
    (sdist,) = made.glob("*.tar.gz")
    (wheel,) = made.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "-q", archives[1])
    return programs


def test_the_source_archive_is_complete(archives: tuple[Path, Path], root: Path) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        ".ci/run",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "examples/quickstart.py",
        "flask_taskworker/py.typed",
        "pyproject.toml",
        "setup.py",
        "tests/conftest.py",
        "tests/integration/test_packaging.py",
        "tox.ini",
    } <= names
    for folder in ("flask_taskworker", "tests", "examples"):
        sources = {str(path.relative_to(root)) for path in (root / folder).rglob("*.py")}
        assert sources <= names
    assert not [name for name in names if name.endswith((".pyc", ".sqlite3"))]


def test_the_wheel_holds_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
    assert "flask_taskworker/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "flask_taskworker",
        f"flask_taskworker-{flask_taskworker.__version__}.dist-info",
    }
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_metadata(archives: tuple[Path, Path], root: Path) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] in {"flask-taskworker", "flask_taskworker"}
    assert metadata["Version"] == flask_taskworker.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "BSD-3-Clause" in (metadata["License"], metadata["License-Expression"])
    assert {"amqp", "beanstalk", "docs", "mail", "mysql", "postgresql", "redis", "test"} <= set(
        metadata.get_all("Provides-Extra", [])
    )
    assert metadata.get_payload().strip() == (root / "README.md").read_text().strip()


def test_the_newest_version_in_the_changelog_is_this_one(root: Path) -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == flask_taskworker.__version__


def test_it_works_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    run(installed / "python", "-m", "pip", "check")
    assert "BackgroundTaskWorker" in run(
        installed / "python",
        "-W",
        "error",
        "-c",
        "import flask_taskworker; print(flask_taskworker.__all__)",
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    "command",
    [["flask", "taskworker"], ["taskworker"], ["python", "-m", "flask_taskworker"]],
    ids=" ".join,
)
def test_its_commands_are_there(installed: Path, tmp_path: Path, command: list[str]) -> None:
    program, *arguments = command
    text = run(installed / program, *arguments, "--help", cwd=tmp_path)
    assert "worker" in text


def test_the_quickstart_runs_from_the_source_archive(
    archives: tuple[Path, Path], installed: Path, tmp_path: Path
) -> None:
    with tarfile.open(archives[0]) as archive:
        for member in archive.getmembers():
            if member.name.endswith("/examples/quickstart.py"):
                (tmp_path / "quickstart.py").write_bytes(archive.extractfile(member).read())
    assert "Hello, Ada!" in run(installed / "python", "quickstart.py", cwd=tmp_path)

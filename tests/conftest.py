"""Shared ground of the tests: a workbench in a temporary home, tiny models built from a config, no network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.starter.location import starter_model

# How long an example takes is the machine's affair; the rest is Hypothesis's own choice, which repeats itself under `CI`.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# What a shell or a CI service may have set, and what would send a test to a proxy, to another home or into colours.
COLOURS_AND_WIDTHS = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "COLUMNS")
OF_TESTS = ("LORASMITH_LARGE_IMPORT_GB",)
for name in list(os.environ):
    of_the_product = name.startswith("LORASMITH_") and name not in OF_TESTS
    if of_the_product or name.lower().endswith("_proxy") or name in COLOURS_AND_WIDTHS:
        del os.environ[name]

# A shell starts what it runs in the background with Ctrl-C ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose few tests take a minute: begun last, they would leave one of two workers without work.
LONGEST_FIRST = ("test_docs.py", "test_life_cycle.py", "test_life_cycle_served.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST_FIRST)


# A `sitecustomize` that every Python process of a test loads: connecting anywhere but to this machine is an error.
NO_NETWORK = """
import socket
connect = socket.socket.connect
def local_only(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise ConnectionRefusedError(f"this test is offline, and something connects to {address}")
    return connect(self, address)
socket.socket.connect = local_only
"""


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("no_network")
    (folder / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    exec(NO_NETWORK, {})


@pytest.fixture
def workbench(tmp_path: Path) -> Workbench:
    return Workbench.open(Settings(home=tmp_path / "home"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with mounted(tmp_path, megabytes=1):
        yield tmp_path


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own at that folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an engine may still be ending there


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """That folder on a file system that takes nothing; what is open stays open."""
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a folder")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def starter() -> Path:
    return starter_model()


@pytest.fixture
def lorasmith(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, with its home in this test's folder."""

    def run(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home")]
        return subprocess.run(
            [*command, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300, check=False
        )

    return run

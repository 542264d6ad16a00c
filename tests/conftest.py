"""Shared ground of the tests: a workbench in a temporary home, tiny models built from a config, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.starter.location import starter_model

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
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


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

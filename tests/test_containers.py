"""The container files: by their rules, and their own commands at work in namespaces as a container has them.

No container engine is needed: `unshare` gives each "container" its own processes and mounts, a read-only root, a `/tmp` that
nothing is executed from, the image's user and none of root's capabilities.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from lorasmith.services.access import api_token
from lorasmith.services.jobs import job_events
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PASSWORD = "correct horse battery"
USER = 10001
NEEDED = {sys.base_prefix, sys.prefix, str(ROOT)}  # Python and this tree
EMPTY = [place for place in ("/mnt", "/srv", "/media") if not any(path.startswith(f"{place}/") for path in NEEDED)]
PLACES = dict(zip(("/data", "/cache"), EMPTY, strict=False))  # of the image, and folders that this machine has
# Where what is needed is in a folder that is covered, the image's user has to see it there.
KEPT = " ".join(path for path in NEEDED if path.startswith(("/root/", "/tmp/")))
# Runs as process 1 of the namespaces: mounts what compose.yaml mounts, then becomes the command.
ENTER = f"""
set -e
mount --bind "$1" {PLACES["/data"]}
mount --bind "$2" {PLACES["/cache"]}
mount -t tmpfs tmpfs /run
mkdir /run/secrets
printf '%s\\n' "$3" >/run/secrets/lorasmith_password
mkdir /run/root /run/tmp
mount --bind /root /run/root
mount --bind /tmp /run/tmp
mount -t tmpfs -o noexec,nosuid,nodev tmpfs /tmp
mount -t tmpfs -o mode=0755 tmpfs /root
for kept in $4; do
  mkdir -p "$kept"
  mount --bind "/run$kept" "$kept"
done
mount -o remount,bind,ro /
shift 4
cd {PLACES["/data"]}
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --bounding-set=-all -- "$@"
"""


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, each with its arguments on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"])


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_is_one_by_the_specification(file: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / file]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_services_may_write_to_their_volumes_alone() -> None:
    whole = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert set(whole["services"]) == {"server", "worker"}
    for service in whole["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {volume.partition(":")[2] for volume in service["volumes"]} == set(PLACES)
        assert {volume.partition(":")[0] for volume in service["volumes"]} == set(whole["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service.get("secrets", [])) <= set(whole["secrets"])


def test_the_image_runs_as_nobody_special_and_holds_what_was_pinned() -> None:
    names = [name for name, _ in instructions()]
    assert of("USER") == [f"{USER}:{USER}"]
    assert f"useradd --uid {USER} " in " ".join(of("RUN"))
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert re.search(r":\d", of("ARG")[0])
    assert "ADD" not in names
    for command in of("RUN"):
        for install in re.findall(r"pip install [^&]*", command):
            assert "--no-cache-dir" in install
            assert "constraints.txt" in install
        for install in re.findall(r"apt-get install [^&]*", command):
            assert "--no-install-recommends" in install
            assert "rm -rf /var/lib/apt/lists/*" in command
    for sources in (copy.split()[:-1] for copy in of("COPY") if not copy.startswith("--from")):
        allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        assert all((ROOT / source).exists() and f"!{source}" in allowed for source in sources)


def environment() -> dict[str, str]:
    """What the image sets, with the places of this machine."""
    pairs = [pair.partition("=") for pair in " ".join(of("ENV")).split()]
    here = {key: re.sub("^(/data|/cache)", lambda match: PLACES[match[0]], value) for key, _, value in pairs}
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **here}


class Container:
    """A command in namespaces of its own; `environment` comes on top of the image's."""

    def __init__(self, folder: Path, command: list[str], **extra: str) -> None:
        enter = ["sh", "-c", ENTER, "enter", str(folder / "home"), str(folder / "cache"), PASSWORD, KEPT]
        unshare = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL"]
        self.log = folder / f"{command[-1].split()[0]}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*unshare, *enter, *command], env={**environment(), **extra}, stdout=log, stderr=log
            )

    def stop(self, number: int = signal.SIGTERM, within_s: float = 60) -> int:
        """Its exit status after a signal to its process 1."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
        return self.process.wait(within_s)


class Containers:
    """Containers with the same home and cache, as the volumes of compose.yaml are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("home", "cache"):
            (folder / name).mkdir()
            os.chown(folder / name, USER, USER)
        self.running: list[Container] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = str(listener.getsockname()[1])

    def start(self, command: list[str], **extra: str) -> Container:
        here = [part.replace("8420", self.port) for part in command]
        self.running.append(Container(self.folder, here, **extra))
        return self.running[-1]

    def is_healthy(self) -> bool:
        check = json.loads(of("HEALTHCHECK")[0].partition("CMD")[2].replace("8420", self.port))
        proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
        return subprocess.run(check, env={**environment(), **proxies}, capture_output=True).returncode == 0

    def until_healthy(self) -> None:
        deadline = time.monotonic() + 60
        while not self.is_healthy():
            assert time.monotonic() < deadline, self.running[0].log.read_text()
            time.sleep(0.2)

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {api_token(self.folder / 'home')}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60, trust_env=False)


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    probe = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "setpriv", "--bounding-set=-all", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    found = Containers(tmp_path)
    yield found
    for container in found.running:
        container.process.kill()
        container.process.wait()


def test_the_image_serves_is_healthy_and_stops_when_asked(containers: Containers) -> None:
    (command,) = (json.loads(rest) for rest in of("CMD"))
    assert not containers.is_healthy()
    refused = containers.start(command)
    assert refused.process.wait(60) == 2
    assert "LORASMITH_PASSWORD" in refused.log.read_text()

    server = containers.start(command, LORASMITH_PASSWORD=PASSWORD)
    containers.until_healthy()
    with containers.client() as client:
        assert client.get("/api/v1/finetune/jobs").status_code == 200
        assert client.post("/api/v1/login", json={"password": PASSWORD}).status_code == 200
        assert client.get("/healthz", headers={"Host": "elsewhere.example"}).status_code == 403
    assert (containers.folder / "home" / "lorasmith.db").stat().st_uid == USER
    assert server.stop() == 0
    assert not containers.is_healthy()


@pytest.mark.slow
def test_a_worker_of_another_container_obeys_and_a_new_one_goes_on(containers: Containers) -> None:
    """Requests reach it through the shared home; what its end has killed goes on from the last checkpoint."""
    compose = services()
    containers.start(compose["server"]["command"])
    containers.until_healthy()
    worker = containers.start(compose["worker"]["command"])
    body = {"base_model": "starter", "dataset_id": "signatures", "preset": "tiny"}
    settings = {"num_epochs": 100, "save_every": 1, "log_every": 1, "compile": "off"}
    with containers.client() as client:
        assert client.post("/api/v1/login", json={"password": PASSWORD}).status_code == 200

        def until(job_id: str, wanted: str, step: int = 0) -> dict[str, Any]:
            deadline = time.monotonic() + 240
            while True:
                job = client.get(f"/api/v1/finetune/jobs/{job_id}").json()
                if job["status"] == wanted and job["current_step"] >= step:
                    return dict(job)
                assert time.monotonic() < deadline, (job, worker.log.read_text())
                time.sleep(0.2)

        jobs = "/api/v1/finetune/jobs"
        first = client.post(jobs, json={**body, "training_config": settings}).json()["id"]
        until(first, "training", step=2)
        client.delete(f"{jobs}/{first}")
        assert until(first, "cancelled")["reason_code"] == "cancelled"

        second = client.post(jobs, json={**body, "training_config": {**settings, "max_steps": 6}}).json()["id"]
        until(second, "training", step=2)
        worker.stop()
        containers.start(compose["worker"]["command"])
        until(second, "completed")
    workbench = Workbench.open(Settings(home=containers.folder / "home"))
    events = [event.type for event in job_events(workbench, workbench.jobs.require(second))]
    assert "resumed" in events

"""Makes the peers' environments and runs workers, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # first and alone: later packages must not choose a CUDA build
INSTALLS: dict[str, list[list[str]]] = {
    "trl": [["--requirement", "requirements-trl.txt"]],
    "unsloth": [
        ["--requirement", "requirements-unsloth.txt"],
        ["--no-deps", "--requirement", "requirements-unsloth-no-deps.txt"],
    ],
    "torchtune": [["--requirement", "requirements-torchtune.txt"]],
    "litgpt": [["--requirement", "requirements-litgpt.txt"]],
    "axolotl": [["--requirement", "requirements-axolotl.txt"]],
    "llamafactory": [
        ["--requirement", "requirements-llamafactory.txt"],
        ["--no-deps", "--requirement", "requirements-llamafactory-no-deps.txt"],
    ],
}
SCRIPTS = {"lorasmith": "ours_worker.py"} | {library: f"{library}_worker.py" for library in INSTALLS}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

Answer = dict[str, Any]


class WorkerFailed(Exception):
    """The end of what the worker wrote to stderr."""


@dataclass(frozen=True)
class Worker:
    """A python and a script that it runs."""

    python: Path
    script: Path

    def command(self, settings: dict[str, Any]) -> list[str]:
        return [str(self.python), str(self.script), json.dumps(settings)]

    def command_line(self, settings: dict[str, Any]) -> str:
        """The command as one would type it."""
        environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in ENVIRONMENT.items())
        return f"{environment} {shlex.join(self.command(settings))}"

    def run(self, settings: dict[str, Any], timeout_s: float = 7_200.0) -> Answer:
        """The worker's answer. A process inherits the peak memory of the one that starts it, so this one stays small."""
        try:
            done = subprocess.run(
                self.command(settings),
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(f"{self.script.name}: no answer within {timeout_s:.0f} s") from error
        lines = done.stdout.splitlines()
        if done.returncode != 0 or not lines:
            end = done.stderr.strip()[-1_000:]
            raise WorkerFailed(f"{self.script.name} ended with status {done.returncode}: {end}")
        answer: Answer = json.loads(lines[-1])
        return answer


def own_worker(script: str) -> Worker:
    """A worker in lorasmith's own environment."""
    return Worker(Path(sys.executable), HERE / script)


def library_worker(library: str, venvs: Path) -> Worker:
    """The worker of a library, its environment made first where it is missing or its requirements have changed."""
    if library not in INSTALLS:
        return own_worker(SCRIPTS[library])
    return Worker(ensure_environment(library, venvs), HERE / SCRIPTS[library])


def ensure_environment(library: str, venvs: Path) -> Path:
    """The python of the library's virtual environment. Installing takes some minutes, once."""
    folder, python = venvs / library, venvs / library / "bin" / "python"
    wanted = hashlib.sha256(TORCH.encode())
    for arguments in INSTALLS[library]:
        wanted.update((HERE / arguments[-1]).read_bytes())
    stamp = folder / "installed.sha256"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted.hexdigest():
        return python
    print(f"installing {library} into {folder} (once)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for arguments in [[TORCH], *INSTALLS[library]]:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, cwd=HERE, stdout=sys.stderr)
    stamp.write_text(wanted.hexdigest(), encoding="utf-8")
    return python

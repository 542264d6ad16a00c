"""What is installed, what works, what is missing and how to get it. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from lorasmith.errors import LorasmithError
from lorasmith.files import existing_parent, folder_size_bytes, verify_manifest
from lorasmith.model_files import read_facts
from lorasmith.services.data import TOKENS
from lorasmith.starter.location import DATASETS, starter_dataset, starter_model
from lorasmith.store.database_file import DATABASE_NAME, backups, problems

PACKAGES = {
    "train": ("torch", "transformers", "peft", "accelerate", "safetensors", "tensorboard", "matplotlib"),
    "gguf": ("gguf",),
    "llamacpp": ("llama-cpp-python",),
}
NEEDED_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `way_out` says what to do when it is not ok."""

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    way_out: str = ""


def examine(home: Path) -> list[Finding]:
    of_home = [home_folder(home), *database(home), *token_stores(home)]
    return [python(), processor(), *packages(), starter(), *starter_data(), *of_home]


def python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def processor() -> Finding:
    flags = Path("/proc/cpuinfo")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    words = set(flags.read_text().split()) if flags.exists() else set()
    found = [flag for flag in known if flag in words]
    return Finding(
        "processor", "ok", f"{len(os.sched_getaffinity(0))} cores, {' '.join(found) or platform.processor()}"
    )


def packages() -> list[Finding]:
    findings = []
    for extra, names in PACKAGES.items():
        for name in names:
            try:
                findings.append(Finding(name, "ok", version(name)))
            except PackageNotFoundError:
                findings.append(Finding(name, "missing", f"extra `{extra}`", f"pip install 'lorasmith[{extra}]'"))
    return findings


def starter() -> Finding:
    try:
        facts = read_facts(starter_model())
        verify_manifest(starter_model())
    except LorasmithError as error:
        return Finding("starter model", "broken", error.message, "install lorasmith again")
    return Finding(
        "starter model", "ok", f"{facts.parameters / 1e6:.1f} M parameters, {facts.context_tokens} tokens of context"
    )


def starter_data() -> list[Finding]:
    return [
        Finding(f"dataset {name}", "ok", str(starter_dataset(name)))
        if starter_dataset(name).is_file()
        else Finding(f"dataset {name}", "broken", f"{starter_dataset(name)} is missing", "install lorasmith again")
        for name in DATASETS
    ]


def database(home: Path) -> list[Finding]:
    """All of it is read: pages, references between rows, and whether there is one where there must be."""
    path = home / DATABASE_NAME
    kept = [folder for table in ("datasets", "adapters", "jobs") for folder in home.glob(f"{table}/*/*.json")]
    if not path.exists() and not kept:
        return []
    found = problems(path) if path.exists() else [f"{path} is gone"]
    if found:
        return [Finding("database", "broken", found[0], f"lorasmith --home {home} recover")]
    copies = backups(home)
    newest = f"newest backup {copies[0].name}" if copies else "no backup yet"
    return [Finding("database", "ok", f"{path}, {path.stat().st_size / 1e6:,.1f} MB, {newest}")]


def token_stores(home: Path) -> list[Finding]:
    folder = home / TOKENS
    if not folder.is_dir():
        return []
    return [
        Finding("token stores", "ok", f"{folder}, {folder_size_bytes(folder) / 1e6:,.1f} MB, made again when removed")
    ]


def home_folder(home: Path) -> Finding:
    parent = existing_parent(home)
    if not os.access(parent, os.W_OK):
        return Finding(
            "home", "broken", f"{parent} cannot be written", "choose another folder with --home or LORASMITH_HOME"
        )
    free = shutil.disk_usage(parent).free
    if free < NEEDED_FREE_BYTES:
        return Finding(
            "home", "broken", f"{home}: {free / 1e9:.1f} GB free", "free some space, or choose another --home"
        )
    return Finding("home", "ok", f"{home}, {free / 1e9:.0f} GB free")

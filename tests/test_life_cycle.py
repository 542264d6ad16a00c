"""The life of an adapter through the real commands and engine processes, offline: data → train → eval → export → answer."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("--preset", "tiny", "--set", "training.max_steps=40", "--set", "training.num_epochs=40")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty questions with one kind of answer."""
    path = tmp_path / "colours.csv"
    colours = ("red", "green", "blue")
    lines = [f"Which colour has number {index}?,It is {colours[index % 3]}." for index in range(60)]
    path.write_text("input,output\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_from_a_file_to_a_measured_exported_and_answering_adapter(lorasmith: Run, rows: Path, tmp_path: Path) -> None:
    imported = lorasmith("data", "import", rows, "--name", "colours", "--json")
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout)["num_examples"] == 60

    trained = lorasmith("train", "--model", "starter", "--data", "colours", "--name", "painter", *SHORT, "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["name"] == "painter"
    assert "train: step 40/40" in trained.stderr

    evaluated = lorasmith("eval", "painter", "--data", "colours", "--shots", "1", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    evaluation = json.loads(evaluated.stdout)
    base, adapter = evaluation["conditions"][0], evaluation["conditions"][-1]
    assert adapter["metrics"]["loss"]["mean"] < base["metrics"]["loss"]["mean"] / 2
    assert adapter["metrics"]["stopped"]["mean"] == 1.0
    report = tmp_path / "home" / evaluation["folder"] / "report.html"
    assert "painter" in report.read_text(encoding="utf-8")

    answered = lorasmith("test", "painter", "Which colour has number 3?", "--json")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["text"].startswith("It is ")

    talked = lorasmith(
        "chat", "painter", "--temperature", "0", stdin="Which colour has number 4?\n/new\nWhich colour has number 5?\n"
    )
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout.count("It is ") == 2

    merged = lorasmith("export", "merged", "painter", "--output", tmp_path / "merged", "--json")
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    gguf = lorasmith("export", "gguf", "painter", "--type", "q8_0", "--output", tmp_path / "painter.gguf")
    assert gguf.returncode == 0, gguf.stderr
    assert (tmp_path / "painter.gguf").read_bytes().startswith(b"GGUF")
    again = lorasmith("export", "gguf", "painter", "--output", tmp_path / "painter.gguf")
    assert again.returncode == 4
    assert "exists already" in again.stderr

    assert lorasmith("adapters", "verify", "painter").returncode == 0
    assert "painter" in lorasmith("adapters", "list").stdout
    kinds = [job["kind"] for job in json.loads(lorasmith("jobs", "list", "--json").stdout)]
    assert kinds == ["training", "evaluation", "export", "export"]
    assert lorasmith("adapters", "rm", "painter", "--yes").returncode == 0
    assert lorasmith("adapters", "show", "painter").returncode == 3


def test_ctrl_c_saves_and_resume_goes_on(lorasmith: Run, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home"), "train", "--model", "starter"]
    long = [
        "--data",
        str(rows),
        "--preset",
        "tiny",
        "--set",
        "training.max_steps=4000",
        "--set",
        "training.num_epochs=4000",
    ]
    with subprocess.Popen(
        [*command, *long],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "train: step" in line:
                break
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 5, rest
    assert "everything is saved" in rest
    (job,) = json.loads(lorasmith("jobs", "list", "--json").stdout)
    assert (job["status"], job["reason_code"]) == ("interrupted", "interrupted")

    order = tmp_path / "home" / job["folder"] / "job.json"
    order.write_text(order.read_text(encoding="utf-8").replace('"max_steps": 4000', '"max_steps": 1'), encoding="utf-8")
    resumed = lorasmith("train", "--resume", job["id"])  # nothing is left after more steps than it now has
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step-" in resumed.stderr
    finished = lorasmith("train", "--resume", job["id"])
    assert finished.returncode == 4
    assert "is completed, there is nothing left to do" in finished.stderr


@pytest.mark.slow
def test_another_terminal_saves_pauses_and_cancels_a_run(lorasmith: Run, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home"), "train", "--model", "starter"]
    long = ["--preset", "tiny", "--set", "training.max_steps=9000", "--set", "training.num_epochs=9000"]

    def started(name: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
        process = subprocess.Popen(
            [*command, "--data", str(rows), "--name", name, *long], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert any("train: step" in line for line in process.stderr)
        return process, found(name)

    def found(name: str) -> dict[str, str]:
        jobs = json.loads(lorasmith("jobs", "list", "--json").stdout)
        job: dict[str, str] = next(job for job in jobs if job["name"] == name)
        return job

    process, job = started("paused")
    with process:
        asked = lorasmith("jobs", "checkpoint", job["id"])
        assert asked.returncode == 0, asked.stderr
        assert f"asked {job['id']} to checkpoint at its next step" in " ".join(asked.stderr.split())
        deadline = time.monotonic() + 280
        while not (saved := lorasmith("jobs", "checkpoints", job["id"], "--json").stdout.strip("[]\n")):
            assert time.monotonic() < deadline
        assert int(saved.rpartition("step-")[2].rstrip('"')) % 100 != 0  # not one of those that every run writes
        assert process.poll() is None
        assert found("paused")["status"] == "training"
        assert lorasmith("jobs", "pause", job["id"]).returncode == 0
        assert process.wait(280) == 5
    assert (found("paused")["status"], found("paused")["reason_code"]) == ("paused", "paused")
    again = lorasmith("jobs", "pause", job["id"])
    assert (again.returncode, again.stderr) == (0, f"{job['id']} is paused\n")
    refused = lorasmith("jobs", "checkpoint", job["id"])
    assert refused.returncode == 4
    assert "is paused, so it cannot checkpoint" in " ".join(refused.stderr.split())

    reached = max((tmp_path / "home" / job["folder"]).glob("checkpoints/step-*"))
    more = int(reached.name.removeprefix("step-")) + 3
    order = tmp_path / "home" / job["folder"] / "job.json"
    order.write_text(
        order.read_text(encoding="utf-8").replace('"max_steps": 9000', f'"max_steps": {more}'), encoding="utf-8"
    )
    resumed = lorasmith("train", "--resume", job["id"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {reached.name}" in resumed.stderr
    assert f"step {more}/{more}" in resumed.stderr
    assert found("paused")["status"] == "completed"

    process, job = started("cancelled")
    with process:
        assert lorasmith("jobs", "cancel", job["id"]).returncode == 0
        assert process.wait(280) == 5
    assert (found("cancelled")["status"], found("cancelled")["reason_code"]) == ("cancelled", "cancelled")
    assert list((tmp_path / "home" / job["folder"]).glob("checkpoints/step-*/manifest.json"))


def test_a_job_outlives_the_command_that_started_it(lorasmith: Run, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home"), "train", "--model", "starter"]
    with subprocess.Popen(
        [*command, "--data", str(rows), "--name", "orphan", *SHORT], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "training" in line:
                break
        process.kill()
    deadline = time.monotonic() + 280
    while json.loads(lorasmith("jobs", "list", "--json").stdout)[0]["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert json.loads(lorasmith("adapters", "list", "--json").stdout)[0]["name"] == "orphan"


@pytest.mark.slow
def test_a_terminal_gets_a_live_bar(rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home"), "train", "--model", "starter"]
    screen, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    with subprocess.Popen(
        [*command, "--data", str(rows), *SHORT], stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        seen = b""
        while process.poll() is None or select.select([screen], [], [], 0)[0]:
            if select.select([screen], [], [], 0.1)[0]:
                try:
                    seen += os.read(screen, 65536)
                except OSError:
                    break
        assert process.wait() == 0, seen[-2000:]
    text = seen.decode(errors="replace")
    assert "tokens/s" in text
    assert "━" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("train", "--model", "starter", "--data", "signatures", "--set", "lora.rnk=3"),
            2,
            "did you mean 'lora.rank'?",
        ),
        (("train", "--model", "startr", "--data", "signatures"), 3, "no model 'startr'; did you mean 'starter'?"),
        (("train", "--model", "starter", "--data", "nowhere"), 3, "no dataset and no file 'nowhere'"),
        (("train", "--resume", "job_x"), 3, "no job 'job_x'"),
        (("eval", "nobody", "--data", "signatures"), 3, "no adapter 'nobody'"),
        (("eval", "--data", "signatures"), 2, "give an adapter, which is compared with its base"),
        (("export", "gguf", "nobody"), 3, "no adapter 'nobody'"),
        (("export", "gguf", "nobody", "--type", "Q9"), 2, "quantization: Input should be 'F16' or 'Q8_0', got 'Q9'"),
        (("chat",), 2, "give either an adapter or a model to talk to"),
        (("models", "add", "no such folder"), 3, "is neither a folder nor a hub id"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_bad_input_is_one_clear_sentence(lorasmith: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    ran = lorasmith(*arguments)
    assert ran.returncode == code, ran.stderr
    assert message in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_hub_model_that_is_not_there_offline_says_so(lorasmith: Run, rows: Path) -> None:
    ran = lorasmith("train", "--model", "nobody/nothing-at-all", "--data", rows)
    assert ran.returncode == 3, ran.stderr
    assert "neither a folder nor in the Hugging Face cache" in ran.stderr


@pytest.mark.slow
def test_conversations_on_a_base_without_a_template_need_one(
    lorasmith: Run, rows: Path, starter: Path, tmp_path: Path
) -> None:
    import shutil

    bare = Path(shutil.copytree(starter, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    refused = lorasmith("train", "--model", bare, "--data", rows, *SHORT)
    assert refused.returncode == 2, refused.stderr
    assert "this model has no chat template" in refused.stderr
    trained = lorasmith("train", "--model", bare, "--data", rows, *SHORT, "--template", "plain", "--name", "plain")
    assert trained.returncode == 0, trained.stderr
    answered = lorasmith("test", "plain", "Which colour has number 3?", "--json")
    assert json.loads(answered.stdout)["text"].startswith("It is ")


def test_doctor_and_models_print_what_is_there(lorasmith: Run) -> None:
    findings = json.loads(lorasmith("doctor", "--json").stdout)
    states = {finding["what"]: finding["state"] for finding in findings}
    assert states["torch"] == states["starter model"] == states["home"] == "ok"
    assert "starter" in lorasmith("models", "list").stdout
    assert json.loads(lorasmith("models", "show", "starter", "--json").stdout)["facts"]["context_tokens"] == 1024

"""However an augmentation job ends, by its teacher, a budget, a request or a kill, no answer is paid for twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.augmentation import run
from lorasmith.engine.teachers.ledger import REQUESTS
from lorasmith.errors import Cancelled, Paused, TeacherFailed
from lorasmith.files import write_json
from tests.engine.augmentation_cases import example, job, lines, rows_of, run_here
from tests.teacher_stub import Reply, Stub, completion, error, texts_for


def test_one_row_after_the_other_without_an_answer_ends_the_job(tmp_path: Path, stub: Stub) -> None:
    stub.rule = lambda request, before: error(500, "down")
    folder = job(tmp_path / "job", stub, [example(n) for n in range(1, 60)])
    with pytest.raises(TeacherFailed, match=r"8 rows after each other got no answer, the last one: HTTP 500: down"):
        run_here(folder)
    assert sum(stub.asked.values()) <= 2 * (run.HOPELESS_AFTER + 4)


def test_a_teacher_that_says_nothing_useful_is_not_paid_for_every_row(tmp_path: Path, stub: Stub) -> None:
    stub.rule = lambda request, before: Reply(body=completion("I am a small model."))
    folder = job(tmp_path / "job", stub, [example(n) for n in range(1, 60)])
    with pytest.raises(
        TeacherFailed, match="25 rows after each other got an answer that cannot be used, .* expected a JSON object"
    ):
        run_here(folder)
    assert sum(stub.asked.values()) <= run.USELESS_AFTER + 4
    assert {line["fate"] for line in rows_of(folder).values()} == {"rejected"}


def test_a_refused_key_ends_the_job_at_the_first_request(tmp_path: Path, stub: Stub) -> None:
    stub.needs_key = True
    folder = job(tmp_path / "job", stub, [example(n) for n in range(1, 60)], teacher={"concurrency": 1})
    with pytest.raises(TeacherFailed, match="HTTP 401"):
        run_here(folder)
    assert sum(stub.asked.values()) == 1


def test_a_spent_budget_pauses_and_a_greater_one_goes_on(tmp_path: Path, stub: Stub) -> None:
    rows = [example(n) for n in range(1, 11)]
    folder = job(tmp_path / "job", stub, rows, teacher={"budget_requests": 4, "concurrency": 2})
    with pytest.raises(Paused, match="the budget of 4 requests is spent, 4 of 10 rows are done"):
        run_here(folder)
    assert sum(stub.asked.values()) == 4
    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["spec"]["teacher"]["budget_requests"] = 10
    write_json(folder / "job.json", order)
    assert run_here(folder).rows["answered"] == 10
    assert set(stub.asked.values()) == {1}


def test_tokens_are_a_budget_too(tmp_path: Path, stub: Stub) -> None:
    """An answer takes 70 tokens. 600 are set aside for its longest, so the last is asked with 600 or more left."""
    rows = [example(n) for n in range(1, 41)]
    folder = job(tmp_path / "job", stub, rows, teacher={"budget_tokens": 1500, "max_tokens": 100, "concurrency": 8})
    with pytest.raises(Paused, match="the budget of 1,500 tokens"):
        run_here(folder)
    spent = 70 * sum(stub.asked.values())
    assert 500 < spent <= 1500


def test_a_request_to_cancel_lets_what_is_under_way_end(tmp_path: Path, stub: Stub) -> None:
    stub.delay_s = 0.3
    folder = job(tmp_path / "job", stub, [example(n) for n in range(1, 30)], teacher={"concurrency": 2})
    write_json(folder / "control.json", {"request": "cancel"})
    with pytest.raises(Cancelled, match="stopped, 2 of 29 rows are done"):
        run_here(folder)
    assert stub.answered == stub.asked
    assert len(rows_of(folder)) == 2


def test_a_translation_that_was_broken_off_between_its_steps_is_not_begun_again(tmp_path: Path, stub: Stub) -> None:
    back = []

    def rule(request: dict[str, Any], before: int) -> Reply | None:
        if "Add the ISO" in request["messages"][0]["content"]:
            return None
        back.append(1)
        return error(500, "down") if len(back) <= 2 else None

    stub.rule = rule
    folder = job(tmp_path / "job", stub, [example(1)], method="back-translate")
    assert run_here(folder).rows["failed"] == 1
    assert run_here(folder).rows["answered"] == 1
    assert stub.asked[example(1).messages[0].content] == 1  # type: ignore[index]


class Lives:
    """A teacher's answers to one life of an engine after another: to each so many and no more, so that none gets to its end.

    A life is known by its key: what a killed one asked can arrive when the next one has begun.
    """

    def __init__(self) -> None:
        self.number, self.left = 0, 0
        self.changed = threading.Condition()

    def begin(self, folder: Path, answers: int) -> subprocess.Popen[bytes]:
        """The next life. What the last one still waits for is answered to nobody."""
        with self.changed:
            self.number, self.left = self.number + 1, answers
            self.changed.notify_all()
        command = [sys.executable, "-m", "lorasmith.engine", str(folder)]
        return subprocess.Popen(command, env={**os.environ, "LIFE": f"life-{self.number:08}"}, stderr=subprocess.PIPE)

    def rule(self, request: dict[str, Any], before: int) -> None:
        def lives() -> bool:
            return bool(request["authorization"] == f"Bearer life-{self.number:08}")

        with self.changed:
            self.changed.wait_for(lambda: self.left > 0 or not lives())
            self.left -= lives()


def kill_and_resume(folder: Path, stub: Stub, kills: int, seed: int, rows: int) -> int:
    """Kill the engine so many times when so many more answers stand in its ledger; returns how many were acknowledged."""
    chance = random.Random(seed)
    acknowledged: dict[str, int] = {}
    lives = Lives()
    stub.rule = lives.rule
    for _ in range(kills):
        most = rows - 1 - len(acknowledged)  # one row short of its end
        more = min(chance.randint(1, max(1, rows // (kills + 1))), most)
        process = lives.begin(folder, min(more + chance.randint(0, 3), most))
        deadline = time.monotonic() + 300
        while len(answered(folder)) < len(acknowledged) + more:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = answered(folder)
        for subject, before in acknowledged.items():
            assert stub.asked[subject] == before, "an answer that was there has been asked for again"
        acknowledged = {subject: stub.asked[subject] for subject in now}
    process = lives.begin(folder, 2 * rows)
    assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 0
    for subject, before in acknowledged.items():
        assert stub.asked[subject] == before
    return len(acknowledged)


def answered(folder: Path) -> set[str]:
    """Requests of the rows whose answers stand whole in the ledger."""
    ids = {line["request"].partition("/")[0] for line in lines(folder / REQUESTS) if line["event"] == "answered"}
    return {example(int(one, 16)).messages[0].content for one in ids}  # type: ignore[index]


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(2, 1), pytest.param(25, 2, marks=pytest.mark.slow), pytest.param(25, 3, marks=pytest.mark.slow)],
)
def test_a_killed_job_pays_for_no_answer_twice(tmp_path: Path, stub: Stub, kills: int, seed: int) -> None:
    rows = 40 if kills < 10 else 150
    stub.delay_s = 0.02
    teacher = {"concurrency": 4, "api_key_env": "LIFE"}
    folder = job(tmp_path / "job", stub, [example(n) for n in range(1, rows + 1)], teacher=teacher)
    acknowledged = kill_and_resume(folder, stub, kills, seed, rows)
    assert acknowledged >= kills
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["rows"]["answered"] == rows
    assert sum(stub.asked.values()) <= rows + 4 * kills  # what was under way at each kill, at most
    assert len(rows_of(folder)) == rows
    for number, line in rows_of(folder).items():
        question = example(number).messages[0].content  # type: ignore[index]
        request = {
            "messages": [{"content": "Reword, exactly 1 string"}, {"content": json.dumps({"request": question})}]
        }
        assert line["texts"] == texts_for(request)["texts"]

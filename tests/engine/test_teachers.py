"""A teacher over real sockets: every fault of an endpoint, limits against a clock, and a budget that is kept."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from lorasmith.engine.teachers.client import NoAnswer, retry_after_s
from lorasmith.engine.teachers.ledger import REQUESTS, RequestLedger
from lorasmith.engine.teachers.limits import Bucket, Budget, BudgetSpent, RateLimit, estimated_tokens, pause_s
from lorasmith.engine.teachers.teacher import Stopping, Teacher
from lorasmith.errors import Conflict, DiskFull, InvalidData, TeacherFailed
from lorasmith.schemas.teachers import Answered, Asked, Reach, TeacherSpec
from tests.teacher_stub import KEY, Reply, Rule, Stub, completion, error

LOCAL = Reach(loopback=True)


def spec_for(stub: Stub, **fields: Any) -> TeacherSpec:
    settings = {"endpoint": stub.url, "model": "stub", "retry_base_s": 0.001, "max_attempts": 3, **fields}
    return TeacherSpec.model_validate(settings)


def messages(text: str = "t", n: int = 1) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"translate, exactly {n} string"},
        {"role": "user", "content": json.dumps({"text": text})},
    ]


def ask(folder: Path, spec: TeacherSpec, *texts: str) -> list[Answered | BaseException]:
    """The answers to several requests that are sent at once, or what was raised instead."""

    async def all_of() -> list[Answered | BaseException]:
        with RequestLedger(folder) as ledger:
            async with Teacher(spec, LOCAL, ledger) as teacher:
                questions = (teacher.ask(f"{text}/x", messages(text)) for text in texts or ("t",))
                return await asyncio.gather(*questions, return_exceptions=True)

    return asyncio.run(all_of())


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / REQUESTS).read_text(encoding="utf-8").splitlines()]


def first_times(*replies: Reply) -> Rule:
    """Those replies, one after the other, and then the usual answer."""
    return lambda request, before: replies[before] if before < len(replies) else None


def test_an_answer_is_kept_with_what_it_cost_and_not_asked_for_again(stub: Stub, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, spec_for(stub))
    assert isinstance(answer, Answered)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.estimated) == (50, 20, False)
    assert answer.model == "stub-1"
    assert ask(tmp_path, spec_for(stub)) == [answer]
    assert stub.asked == {"t": 1}
    sent = stub.requests[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["stream"]) == ("stub", 1024, 0.8, False)


def test_tokens_are_estimated_where_the_endpoint_counts_none(stub: Stub, tmp_path: Path) -> None:
    stub.rule = lambda request, before: Reply(body=completion("four", usage=False))
    (answer,) = ask(tmp_path, spec_for(stub, temperature=None))
    assert isinstance(answer, Answered)
    prompt = estimated_tokens(json.dumps(messages(), ensure_ascii=False))
    assert (answer.prompt_tokens, answer.completion_tokens, answer.estimated) == (prompt, 2, True)
    assert "temperature" not in stub.requests[0]


HTML = Reply(body=b"<html>Bad gateway</html>", kind="text/html")
PASSING = {  # faults after which the same request is answered, and the reason that the ledger gives
    "a server error": (error(500, "boom"), "server-error"),
    "an overloaded server": (error(503, "later"), "server-error"),
    "too many requests": (error(429, "slow down", retry_after="0.01"), "rate-limited"),
    "a body that is no JSON": (Reply(body=b'{"choices": [{"mess'), "malformed-response"),
    "brackets without end": (Reply(body=b"[" * 100_000), "malformed-response"),
    "a page of a proxy": (HTML, "malformed-response"),
    "a body that breaks off": (Reply(body=completion("whole"), cut=20), "connection"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_asked_again(stub: Stub, tmp_path: Path, fault: str) -> None:
    reply, reason = PASSING[fault]
    stub.rule = first_times(reply, reply)
    (answer,) = ask(tmp_path, spec_for(stub))
    assert isinstance(answer, Answered)
    assert stub.asked == {"t": 3}
    found = events(tmp_path)
    assert [line["event"] for line in found] == ["asked", "unanswered"] * 2 + ["asked", "answered"]
    assert {line["reason"] for line in found if line["event"] == "unanswered"} == {reason}


def test_a_server_that_hangs_is_left_after_the_timeout(stub: Stub, tmp_path: Path) -> None:
    stub.rule = lambda request, before: Reply(body=completion("late"), hang_s=600) if before == 0 else None
    began = time.monotonic()
    (answer,) = ask(tmp_path, spec_for(stub, timeout_s=0.5, max_attempts=20))
    assert isinstance(answer, Answered)
    assert time.monotonic() - began < 300
    assert events(tmp_path)[1]["sentence"] == "no whole answer within 0.5 s"


def test_an_endpoint_that_is_not_there_fails_after_the_attempts(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        (failure,) = ask(tmp_path, spec_for(Stub(port=closed.getsockname()[1])))  # bound, and nobody listens
    assert isinstance(failure, NoAnswer)
    assert failure.reason == "connection"
    assert sum(line["event"] == "asked" for line in events(tmp_path)) == 3


LASTING = {
    "JSON of another kind": (Reply(body=b"[1, 2]"), "malformed-response"),
    "no choices at all": (Reply(body=b'{"object": "list"}'), "malformed-response"),
    "content that is no text": (Reply(body=completion([]).replace(b'"[]"', b"[1]")), "malformed-response"),
    "a request that it refuses": (error(400, "context length exceeded"), "refused"),
    "an answer that is too large": (Reply(body=completion("x" * 5_000_000)), "too-large"),
    "an answer that is compressed": (
        Reply(body=b"\x1f\x8b", headers={"content-encoding": "gzip"}),
        "malformed-response",
    ),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_of_the_request_itself_is_not_asked_again(stub: Stub, tmp_path: Path, fault: str) -> None:
    reply, reason = LASTING[fault]
    stub.rule = lambda request, before: reply
    (failure,) = ask(tmp_path, spec_for(stub))
    assert isinstance(failure, NoAnswer)
    assert failure.reason == reason
    assert stub.asked == {"t": 1}


def test_no_choice_is_an_empty_answer_which_is_not_paid_for_again(stub: Stub, tmp_path: Path) -> None:
    stub.rule = lambda request, before: Reply(body=b'{"choices": [], "usage": {"prompt_tokens": 9}}')
    (answer,) = ask(tmp_path, spec_for(stub))
    assert isinstance(answer, Answered)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("", 9, 0)


HOPELESS = {
    "a wrong key": (error(401, "wrong key"), "the teacher refuses: HTTP 401: wrong key"),
    "no model of that name": (error(404, "no such model"), "the teacher refuses: HTTP 404: no such model"),
    "no money left": (error(429, "quota", "insufficient_quota"), "the teacher refuses: HTTP 429: quota"),
    "a redirect": (Reply(302, headers={"location": "http://169.254.169.254/"}), "redirects (HTTP 302)"),
    "a long wait": (error(429, "tomorrow", retry_after="86400"), "asks to wait 86400 s"),
}


@pytest.mark.parametrize("fault", HOPELESS)
def test_what_the_next_row_would_meet_too_ends_the_job(stub: Stub, tmp_path: Path, fault: str) -> None:
    reply, said = HOPELESS[fault]
    stub.rule = lambda request, before: reply
    (failure,) = ask(tmp_path, spec_for(stub))
    assert isinstance(failure, TeacherFailed)
    assert said in failure.message
    assert "169.254" not in failure.message
    assert stub.asked == {"t": 1}


def test_the_key_goes_into_the_header_and_nowhere_else(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoints repeat keys in their errors, and one could in an answer."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    stub.needs_key = True
    stub.rule = lambda request, before: Reply(body=completion(f"your key is {KEY}"))
    (answer,) = ask(tmp_path, spec_for(stub, api_key_env="TEACHER_KEY"))
    assert isinstance(answer, Answered)
    assert answer.text == "your key is [api key]"
    monkeypatch.setenv("TEACHER_KEY", "another-" + KEY)
    (failure,) = ask(tmp_path, spec_for(stub, api_key_env="TEACHER_KEY"), "other")
    assert isinstance(failure, TeacherFailed)
    assert failure.message == "the teacher refuses: HTTP 401: wrong key Bearer [api key]"
    assert KEY not in (tmp_path / REQUESTS).read_text(encoding="utf-8")


def test_half_a_character_and_steering_ones_do_not_reach_files_or_terminals(stub: Stub, tmp_path: Path) -> None:
    stub.rule = lambda request, before: (
        error(500, "a\x1b[31m\u202eb")
        if before == 0
        else Reply(body=b'{"choices": [{"message": {"content": "\\ud800!"}}]}')
    )
    (answer,) = ask(tmp_path, spec_for(stub))
    assert isinstance(answer, Answered)
    assert answer.text == "\ufffd!"
    assert events(tmp_path)[1]["sentence"] == "HTTP 500: a [31m b"


def test_no_more_requests_are_under_way_than_allowed(stub: Stub, tmp_path: Path) -> None:
    together = Barrier(3)

    def three_at_once(request: dict[str, Any], before: int) -> None:
        together.wait(60)

    stub.rule = three_at_once
    texts = [f"row {n}" for n in range(9)]

    async def scenario() -> None:
        with RequestLedger(tmp_path) as ledger:
            async with Teacher(spec_for(stub, concurrency=3), LOCAL, ledger) as teacher:
                await asyncio.gather(*(teacher.ask(f"{text}/x", messages(text)) for text in texts))

    asyncio.run(scenario())
    assert stub.most_under_way == 3
    assert set(stub.asked.values()) == {1}


def test_all_wait_when_the_endpoint_asks_one_to_wait(stub: Stub, tmp_path: Path) -> None:
    """Three requests at once, each refused once with `Retry-After: 0.4`: none comes again sooner."""
    all_here = Barrier(3)

    def refuse_once(request: dict[str, Any], before: int) -> Reply | None:
        if before:
            return None
        all_here.wait(60)
        return error(429, "slow", retry_after="0.4")

    stub.rule = refuse_once
    assert all(isinstance(one, Answered) for one in ask(tmp_path, spec_for(stub), "a", "b", "c"))
    first, later = sorted(stub.times)[2], sorted(stub.times)[3]
    assert later - first >= 0.38  # the refusals are sent when all three are there


def test_requests_keep_the_pace_that_is_asked_for(stub: Stub, tmp_path: Path) -> None:
    began = time.monotonic()
    ask(tmp_path, spec_for(stub, requests_per_minute=600), *"abcdefghijklmno")
    assert max(stub.times) - began >= 5 / 10  # 10 go at once, the other 5 at 10 a second


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("1.5") == 1.5
    assert retry_after_s(None) is None
    assert retry_after_s("soon") is None
    date = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3000)
    before = datetime.now(UTC)
    found = retry_after_s(format_datetime(date, usegmt=True))
    assert (date - datetime.now(UTC)).total_seconds() <= (found or 0) <= (date - before).total_seconds()
    assert retry_after_s(format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)) == 0


def test_pauses_double_with_full_jitter_up_to_a_minute() -> None:
    chance = random.Random(0)
    for attempt, longest in [(1, 1.0), (2, 2.0), (5, 16.0), (9, 60.0)]:
        drawn = [pause_s(attempt, 1.0, chance) for _ in range(2000)]
        assert min(drawn) >= 0
        assert max(drawn) <= longest
        assert sum(drawn) / len(drawn) == pytest.approx(longest / 2, rel=0.05)  # uniform; 5 % is 3.9 standard errors


def test_a_bucket_lets_through_its_rate_from_the_first_minute_on() -> None:
    """Closed form: capacity of one second, then one every 60 / rate seconds."""
    bucket = Bucket(120.0, now=0.0)
    now, sent = 0.0, []
    for _ in range(125):
        now += bucket.delay_s(1, now)
        bucket.fill(now)
        bucket.take(1)
        sent.append(now)
    assert sent == pytest.approx([0.0, *(0.5 * n for n in range(124))])  # 2 at once, as a second holds 2
    assert sum(moment < 60 for moment in sent) == 121


def test_a_request_that_costs_more_than_a_second_holds_leaves_a_debt() -> None:
    bucket = Bucket(600.0, now=0.0)  # 10 a second
    assert bucket.delay_s(100, 0.0) == 0.0
    bucket.take(100)
    assert bucket.delay_s(100, 0.0) == pytest.approx(10.0)  # until it is full again: 90 back to 0 and 10 on top
    bucket.take(-60)  # the answer was shorter than thought
    assert bucket.delay_s(100, 0.0) == pytest.approx(4.0)


def test_the_slowest_of_all_limits_decides() -> None:
    now = [0.0]

    async def pause(seconds: float) -> None:
        now[0] += seconds

    async def scenario() -> list[float]:
        limit = RateLimit(600.0, 6000.0, lambda: now[0])  # 10 requests and 100 tokens a second
        moments = []
        for turn in range(4):
            if turn == 3:
                limit.hold(7.0)
            await limit.wait(50, pause)
            moments.append(now[0])
        return moments

    assert asyncio.run(scenario()) == pytest.approx([0.0, 0.0, 0.5, 7.5])


def test_a_budget_is_not_overdrawn_by_what_is_under_way() -> None:
    async def scenario() -> list[str]:
        budget = Budget(None, 100, spent_requests=0, spent_tokens=30)
        order = []
        await budget.reserve(60)

        async def second() -> None:
            await budget.reserve(60)  # fits once the first has turned out cheaper
            order.append("second")

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.01)
        order.append("first settled")
        await budget.settle(60, 5)
        await waiting
        await budget.settle(60, 60)
        with pytest.raises(BudgetSpent, match=r"100 tokens \(95 are spent\)"):
            await budget.reserve(6)
        return order

    assert asyncio.run(scenario()) == ["first settled", "second"]


def test_requests_of_earlier_runs_count(stub: Stub, tmp_path: Path) -> None:
    spec = spec_for(stub, budget_requests=3)
    stub.rule = first_times(error(500, "x"))
    assert isinstance(ask(tmp_path, spec, "a")[0], Answered)  # two requests
    stub.rule = None
    last, over = ask(tmp_path, spec, "b", "c")
    assert isinstance(last, Answered)
    assert isinstance(over, BudgetSpent)
    assert sum(stub.asked.values()) == 3


def test_a_stop_ends_a_pause_at_once(stub: Stub, tmp_path: Path) -> None:
    stub.rule = lambda request, before: error(429, "slow", retry_after="300")

    async def scenario() -> float:
        with RequestLedger(tmp_path) as ledger:
            async with Teacher(spec_for(stub), LOCAL, ledger) as teacher:
                question = asyncio.create_task(teacher.ask("a/x", messages("a")))
                while not ledger.asked:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                began = time.monotonic()
                teacher.stopping.set()
                with pytest.raises(Stopping):
                    await question
                return time.monotonic() - began

    assert asyncio.run(scenario()) < 150  # of 300


def test_a_torn_last_line_is_no_answer(stub: Stub, tmp_path: Path) -> None:
    ask(tmp_path, spec_for(stub), "a")
    path = tmp_path / REQUESTS
    path.write_bytes(path.read_bytes()[:-10])
    with RequestLedger(tmp_path) as ledger:
        assert ledger.answers == {}
        assert ledger.asked == 1
    assert path.read_bytes().endswith(b"\n")


def test_a_damaged_ledger_is_named_with_its_line(stub: Stub, tmp_path: Path) -> None:
    ask(tmp_path, spec_for(stub), "a")
    path = tmp_path / REQUESTS
    path.write_bytes(path.read_bytes().replace(b"answered", b"anxwered"))
    with pytest.raises(InvalidData, match=r"requests\.jsonl:2 is damaged"):
        RequestLedger(tmp_path)


def test_a_full_disk_is_told_and_leaves_whole_lines(small_disk: Path) -> None:
    with pytest.raises(DiskFull), RequestLedger(small_disk) as ledger:
        ledger.add(Asked(request="a", attempt=1))
        (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free))
        ledger.add(Asked(request="b" * 6000, attempt=1))
    with RequestLedger(small_disk) as ledger:
        assert ledger.asked == 1


def test_two_processes_do_not_work_on_one_job(tmp_path: Path) -> None:
    with RequestLedger(tmp_path), pytest.raises(Conflict, match="another process works on"):
        RequestLedger(tmp_path)
    with RequestLedger(tmp_path):
        pass

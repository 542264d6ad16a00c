"""What a job is asked while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import reporting
from lorasmith.engine.reporting import Reporter
from lorasmith.files import read_json
from lorasmith.jobs.folder import write_request
from lorasmith.schemas.jobs import JobRequest


def test_a_request_that_comes_while_another_is_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Reporter(tmp_path)
    write_request(tmp_path, JobRequest.CHECKPOINT)

    def ask_for_a_pause(path: Path) -> Any:
        found = read_json(path)
        write_request(tmp_path, JobRequest.PAUSE)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(reporting, "read_json", ask_for_a_pause)
        assert report.poll()
    assert not report.stop_requested
    assert not report.poll()
    assert report.stop_requested
    assert list(tmp_path.iterdir()) == []

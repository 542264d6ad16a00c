"""What fuzzing demands of the parsers holds for every input that it begins with, and is able to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.services import data_json
from lorasmith.services.data_rows import RawRow
from tools.fuzz import targets
from tools.fuzz.seeds import seeds_of


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_seed_passes(tmp_path: Path, target: str) -> None:
    seeds = list(seeds_of(target))
    assert len(seeds) >= 10
    for seed in seeds:
        targets.TARGETS[target](seed, tmp_path)


def test_a_reader_that_loses_a_value_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_line = data_json.read_line

    def forgetful(path: Path, number: int, line: int, content: bytes) -> object:
        row = read_line(path, number, line, content)
        return RawRow(row.number, row.line, {}) if isinstance(row, RawRow) else row

    monkeypatch.setattr(data_json, "read_line", forgetful)
    with pytest.raises(targets.Disagreement, match="line 1: {} against {'input'"):
        for seed in seeds_of("jsonl"):
            targets.read_lines(seed, tmp_path)

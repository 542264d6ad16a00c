"""Digests of rows: the bytes that are hashed are those of `json`, and white space is one blank."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.services.data_digests import COMPACT, canonical_json, canonical_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda values: st.lists(values) | st.dictionaries(TEXTS, values),
    max_leaves=10,
)


@given(VALUES)
def test_canonical_json_is_what_json_writes_with_sorted_keys(value: Any) -> None:
    assert canonical_json(value) == json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    assert canonical_json(value, COMPACT) == compact.encode()


@given(TEXTS | st.text(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0ab"))
def test_runs_of_white_space_are_one_blank_in_ascii_and_beyond(text: str) -> None:
    assert canonical_text(text) == " ".join(unicodedata.normalize("NFC", text).split())

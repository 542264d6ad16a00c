"""What is flagged in a row, what is not, and what mending does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec, Fate, Finding
from lorasmith.services.data_curation import curate
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_mending import mended
from lorasmith.services.data_secrets import (
    MANY_DIGITS,
    SECRETS,
    find_personal_data,
    find_secrets,
    has_many_digits,
    iban_holds,
    luhn_holds,
)
from lorasmith.services.data_text import CONTROL, find_control_character, find_mojibake, without_mojibake
from lorasmith.services.workbench import Workbench

TOKEN = "ghp_" + "a1B2" * 9
PIECES = [
    *("password", "PASSWD", "api_key", "secretKey", "ſecret_key", "'", '"', ":", "=", " ", "\n", "hunter2hunter2", "9"),
    *(
        "https",
        "://",
        "user",
        "@",
        "host.org",
        "ghp_",
        "a1B2" * 9,
        "-",
        "sk-",
        "_",
        "AKIA",
        "ABCD" * 4,
        ".",
        "é",
        "日本",
    ),
    *("123", "45 67", "(8)", "٣٤٥٦٧٨٩٠١", "\x07", "\x7f", "\u202e"),
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"my token is {TOKEN}.", "a GitHub token at character 13"),
        ("AKIA" + "ABCD" * 4, "an AWS access key at character 1"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key at character 1"),
        ("sk-proj-" + "aB3" * 12, "an OpenAI key at character 1"),
        ("sk-ant-api03-" + "x" * 30, "an Anthropic key at character 1"),
        ('password = "hunter2hunter2"', "a password at character 1"),
        ("postgres://user:secret@db.host/x", "a password in an address at character 1"),
        ("say risk-averse-but-otherwise-quite-ordinary-words", None),
        ("a password is 8 letters long; see http://host:80/a", None),
    ],
)
def test_secrets_are_named_and_never_shown(text: str, found: str | None) -> None:
    assert find_secrets(text) == found


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_is_looked_at_first_hides_nothing_that_the_whole_patterns_find(text: str) -> None:
    found = None
    for secret in SECRETS:
        before = secret.before.pattern.removesuffix(r"\Z") if secret.before else ""
        match = re.search(before + secret.pattern.pattern, text)
        if found is None and match and any(marker in text for marker in secret.markers):
            found = f"{secret.kind} at character {match.start() + 1}"
    assert find_secrets(text) == found
    assert has_many_digits(text) == bool(MANY_DIGITS.search(text))
    assert (find_control_character(text) is None) == (CONTROL.search(text) is None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to ann.lee+x@mail.org today", "an e-mail address at character 10"),
        ("write to ann@example.com today", None),
        ("card 4111 1111 1111 1111, please", "a payment card number at character 6"),
        ("card 4111 1111 1111 1112, please", None),
        ("card 3782-822463-10005, please", "a payment card number at character 6"),
        ("2,000,000-400,000=$<<2000000-400000=1600000>>1,600,000", None),  # of GSM8K; its digits pass the Luhn check
        ("DE89 3704 0044 0532 0130 00", "an IBAN at character 1"),
        ("call +49 30 12345678 now", "a phone number at character 6"),
        ("call (555) 010-9999", "a phone number at character 6"),
        ("SSN 123-45-6789", "a US social security number at character 5"),
        ("in 2024-05-17 12:30:11.123 at 192.168.100.200 and 1,234,567,890", None),
        ("pi is 3.14159265358979", None),
    ],
)
def test_personal_data_is_found_by_pattern_and_check_digits(text: str, found: str | None) -> None:
    assert find_personal_data(text) == found


def test_check_digits_follow_the_standards() -> None:
    assert luhn_holds("4111111111111111")  # the test number of Visa
    assert luhn_holds("378282246310005")  # of American Express
    assert iban_holds("GB29NWBK60161331926819")  # the example of ISO 13616
    assert not iban_holds("GB28NWBK60161331926819")


@given(st.integers(min_value=10**11, max_value=10**17))
def test_exactly_one_digit_completes_a_number_by_luhn(number: int) -> None:
    assert sum(luhn_holds(f"{number}{digit}") for digit in range(10)) == 1


@given(st.text(st.characters(min_codepoint=0xC0, max_codepoint=0x24F), min_size=1))
def test_text_read_with_the_wrong_encoding_is_found_and_read_again(text: str) -> None:
    wrong = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    assert find_mojibake(wrong) is not None
    assert without_mojibake(wrong) == text


@pytest.mark.parametrize("text", ["Für Ärzte, naïve café, Ångström", "Привет", "価格は€5です", "“quoted” – dash…", "É"])
def test_accented_text_is_left_alone(text: str) -> None:
    assert find_mojibake(text) is None
    assert without_mojibake(text) == text


def test_control_and_bidi_characters_are_found_and_line_breaks_are_not() -> None:
    assert find_control_character("a\tb\r\nc") is None
    assert find_control_character("ab\u202ecd") == "U+202E at character 3"


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS: list[dict[str, Any]] = [
    {"input": "fine", "output": "yes, of course"},
    {"input": "mail ann@mail.org", "output": "done that"},
    {"input": "bell\u0007", "output": "cafÃ© au lait"},
    {"input": "short", "output": "no"},
]


def test_flagged_rows_stay_and_the_ledger_says_what_was_found(tmp_path: Path) -> None:
    data = curate(rows_file(tmp_path, ROWS), DataPreparationSpec())
    assert data.fates()[Fate.KEPT] == 4
    assert data.statistics["flags"] == {"personal-data": 1, "control-characters": 1, "mojibake": 1}
    flags = [[flag.check for flag in line.flags or ()] for line in data.ledger]
    assert flags == [[], ["personal-data"], ["control-characters", "mojibake"], []]
    assert data.ledger[1].flags == [
        Finding(
            check="personal-data",
            field="messages[0].content",
            found="an e-mail address at character 6",
            expected="no personal data",
        )
    ]


def test_a_finding_may_reject_a_row_and_limits_do(tmp_path: Path) -> None:
    spec = DataPreparationSpec(reject=["personal-data"], min_chars={"output": 3}, max_rejected_share=0.5)
    data = curate(rows_file(tmp_path, ROWS), spec)
    assert [(line.row, line.field) for line in data.ledger if line.fate == Fate.REJECTED] == [
        (2, "messages[0].content"),
        (4, "output"),
    ]
    assert data.ledger[3].reason == "field `output`: found 2 characters, expected at least 3"


def test_mended_rows_are_changed_and_say_how(tmp_path: Path) -> None:
    data = curate(rows_file(tmp_path, ROWS), DataPreparationSpec(mend=["control-characters", "mojibake"]))
    line = data.ledger[2]
    assert (line.fate, line.flags) == (Fate.CHANGED, None)
    assert line.changes == ["output: decoded again", "input: control characters removed"]
    assert data.fates()[Fate.CHANGED] == 1
    (example,) = [example for example in data.examples if example.row == 3]
    assert [message.content for message in example.messages or ()] == ["bell", "café au lait"]


def test_strict_stops_at_the_first_finding(tmp_path: Path) -> None:
    path = rows_file(tmp_path, ROWS)
    with pytest.raises(InvalidData) as caught:
        curate(path, DataPreparationSpec(strict=True))
    assert caught.value.message == (
        f"{path}:2: row 2, field `messages[0].content`: found an e-mail address at character 6, "
        "expected no personal data (check `personal-data`)"
    )


def test_turns_of_one_side_are_joined_when_asked() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "user", "value": "b"}, {"from": "gpt", "value": "c"}]
    values, changes = mended({"conversations": turns}, ["join-turns"])
    assert values["conversations"] == [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}]
    assert changes == ["conversations[1]: joined to the turn before"]


def test_rows_over_the_context_of_a_model_are_flagged_with_their_tokens(workbench: Workbench, tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "word " * 20_000}, {"text": "short"}])
    dataset = import_dataset(workbench, path, DataImportSpec(name="long", tokenizer="starter"))
    assert dataset.statistics["flags"] == {"over-context": 1}


def test_answers_in_another_language_are_flagged_and_short_ones_never(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    rows = [
        {"input": "a", "output": "This is a sentence that is written in plain English."},
        {"input": "b", "output": "Dies ist ein Satz, der auf Deutsch geschrieben wurde."},
        {"input": "c", "output": "oui"},
    ]
    data = curate(rows_file(tmp_path, rows), DataPreparationSpec(languages=["en"]))
    assert [line.language for line in data.ledger] == ["en", "de", "unknown"]
    assert data.statistics["flags"] == {"other-language": 1}
    assert data.fates()[Fate.KEPT] == 3


def test_of_a_classification_the_text_has_a_language_and_not_the_name_of_the_class(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    label = "transfer_not_received_by_recipient"
    rows = [
        {"text": "My money has not arrived there yet, and I wonder why.", "label": label},
        {"text": "Mein Geld ist dort noch nicht angekommen, warum nur?", "label": label},
    ]
    data = curate(rows_file(tmp_path, rows), DataPreparationSpec(languages=["en"]))
    assert [line.language for line in data.ledger] == ["en", "de"]
    assert [[(flag.field, flag.found) for flag in line.flags or ()] for line in data.ledger] == [[], [("text", "de")]]

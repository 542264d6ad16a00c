"""Options of the `data` commands as values of a spec; each that makes no sense is refused with what it should be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from lorasmith.errors import InvalidSpec, did_you_mean

if TYPE_CHECKING:
    from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec, DatasetFormat, Fate, FindingName, Part

FORMATS = (
    "auto, alpaca, sharegpt, chatml, completion, interactions, chat, classification, summarization, preference or kto"
)
MENDS = "control-characters, mojibake or join-turns"
POLICIES = "error, drop, left, right or split"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the dataset, or NAME@digits of a version")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
Format = Annotated[str, typer.Option("--format", help=f"Row format: {FORMATS}")]
MaxRejected = Annotated[float, typer.Option("--max-rejected", help="Allowed share of bad rows, from 0 to 1")]
Strict = Annotated[bool, typer.Option("--strict", help="Any finding stops the import")]
Columns = Annotated[list[str] | None, typer.Option("--map", help="Columns: instruction=question,output=answer")]
Encoding = Annotated[str | None, typer.Option("--encoding", help="Encoding of a CSV file")]
Mending = Annotated[list[str] | None, typer.Option("--mend", help=f"Mend instead of flag: {MENDS}")]
Rejecting = Annotated[list[str] | None, typer.Option("--reject", help="Reject rows with a finding, by name")]
MinChars = Annotated[list[str] | None, typer.Option("--min-chars", help="Least length: output=3")]
MaxChars = Annotated[list[str] | None, typer.Option("--max-chars", help="Greatest length: output=8000")]
Languages = Annotated[list[str] | None, typer.Option("--language", help="Flag answers in another, as en")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Flag rows over this model's context")]
Template = Annotated[str | None, typer.Option("--template", help="Chat template for a base without one")]
MaxSeqLength = Annotated[int | None, typer.Option("--max-seq-length", help="Tokens, as in train")]
TooLong = Annotated[str | None, typer.Option("--too-long", help=f"Policy for a longer row: {POLICIES}")]
Allow = Annotated[list[str] | None, typer.Option("--allow", help="Override a check, by name")]


def preparation_spec(
    format: str, split: str, exact: bool, salt: str, max_rejected: float, checks: dict[str, Any] | None = None
) -> DataPreparationSpec:
    from lorasmith.schemas.data import DataPreparationSpec

    options = checked_options(format, split, exact, salt, max_rejected)
    return DataPreparationSpec.model_validate({**options, **(checks or {})})


def domain_names(text: str) -> list[str]:
    """`financial,legal` as names, each once."""
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)), None)
    if wrong is not None:
        raise InvalidSpec(
            f"--domains must be names of letters, digits, dashes or underscores, got {wrong!r}",
            hint="--domains financial,legal",
        )
    return list(dict.fromkeys(names))


def import_spec(
    name: str,
    format: str,
    split: str,
    exact: bool,
    salt: str,
    max_rejected: float,
    checks: dict[str, Any] | None = None,
) -> DataImportSpec:
    from pydantic import ValidationError

    from lorasmith.schemas.data import DataImportSpec

    options = {**checked_options(format, split, exact, salt, max_rejected), **known_checks(checks or {})}
    try:
        return DataImportSpec.model_validate({"name": name, **options})
    except ValidationError:
        raise InvalidSpec(
            f"--name must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with a letter or digit, "
            f"got {name!r}",
            hint="--name support-v1",
        ) from None


def validation_spec(format: str, max_rejected: float, checks: dict[str, Any]) -> DataPreparationSpec:
    """What `data validate` asks: an import's checks, without its name and its split."""
    from lorasmith.schemas.data import DataPreparationSpec

    known = {"format": known_row_format(format), "max_rejected_share": known_share(max_rejected)}
    return DataPreparationSpec.model_validate({**known, **known_checks(checks)})


def row_checks(
    *,
    strict: bool,
    columns: list[str] | None,
    encoding: str | None,
    mend: list[str] | None,
    reject: list[str] | None,
    min_chars: list[str] | None,
    max_chars: list[str] | None,
    languages: list[str] | None,
    tokenizer: str | None,
) -> dict[str, Any]:
    """What an import and a validation look at in a row, as fields of their spec."""
    from lorasmith.services.data_mapping import parse_mapping

    return {
        "strict": strict,
        "column_map": parse_mapping(columns or []),
        "encoding": encoding,
        "mend": mend or [],
        "reject": reject or [],
        "min_chars": limits("--min-chars", min_chars or []),
        "max_chars": limits("--max-chars", max_chars or []),
        "languages": languages or [],
        "tokenizer": tokenizer,
    }


def known_checks(checks: dict[str, Any]) -> dict[str, Any]:
    from lorasmith.schemas.data import Mend

    for mend in checks.get("mend", ()):
        one_of("--mend", mend, get_args(Mend))
    for finding in checks.get("reject", ()):
        known_finding(finding, "--reject")
    return checks


def checked_options(format: str, split: str, exact: bool, salt: str, max_rejected: float) -> dict[str, Any]:
    known = {"format": known_row_format(format), "max_rejected_share": known_share(max_rejected)}
    return {**known, "split": parse_split(split), "exact": exact, "salt": salt}


def known_row_format(text: str) -> str:
    from lorasmith.schemas.data import DatasetFormat

    formats = ["auto", *(format.value for format in DatasetFormat)]
    if text not in formats:
        raise InvalidSpec(f"--format must be {FORMATS}, got {text!r}{did_you_mean(text, formats)}")
    return text


def known_share(max_rejected: float) -> float:
    if not 0 <= max_rejected <= 1:
        raise InvalidSpec(
            f"--max-rejected must be a share from 0 to 1, got {max_rejected:g}", hint="--max-rejected 0.05"
        )
    return max_rejected


def limits(option: str, given: list[str]) -> dict[str, int]:
    """`output=3` as {"output": 3}."""
    result: dict[str, int] = {}
    for pair in (piece for text in given for piece in text.split(",")):
        field, _, number = (part.strip() for part in pair.partition("="))
        if not field or not number.isdecimal():
            raise InvalidSpec(f"{option} must be field=characters, got {pair!r}", hint=f"{option} output=3")
        result[field] = int(number)
    return result


def near_duplicates_from(similarity: float | None) -> float | None:
    from lorasmith.schemas.data import LOWEST_SIMILARITY

    if similarity is None or LOWEST_SIMILARITY <= similarity <= 1:
        return similarity
    raise InvalidSpec(
        f"--near-duplicates must be a similarity from {LOWEST_SIMILARITY} to 1, got {similarity:g}",
        hint="--near-duplicates 0.8",
    )


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidSpec(f"{option} must be {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def known_finding(text: str | None, option: str = "--flag") -> FindingName | None:
    from lorasmith.schemas.data import FindingName

    if text is not None:
        one_of(option, text, get_args(FindingName))
    return cast("FindingName | None", text)


def known_stratum(text: str | None) -> str | None:
    if text is not None:
        one_of("--stratify", text, ("label", "none"))
    return None if text == "none" else text


def known_format(text: str) -> DatasetFormat:
    from lorasmith.schemas.data import DatasetFormat

    one_of("--to", text, [format.value for format in DatasetFormat])
    return DatasetFormat(text)


def parse_split(text: str) -> tuple[float, ...]:
    """`80/10/10` or `0.8/0.1/0.1` as shares of 1; train must get some."""
    try:
        numbers = [float(number) for number in text.split("/")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    adds_up = min(abs(total - 1), abs(total - 100)) <= 1e-6  # false for a nan
    if len(numbers) != 3 or min(numbers) < 0 or numbers[0] <= 0 or not adds_up:
        raise InvalidSpec(
            f"--split must be three shares that add up to 100, with some for train, got {text!r}",
            hint="--split 80/10/10",
        )
    return tuple(number / total for number in numbers)


def known_part(text: str) -> Part:
    from lorasmith.schemas.data import PARTS

    for part in PARTS:
        if part == text:
            return part
    raise InvalidSpec(f"--part must be train, val or test, got {text!r}{did_you_mean(text, PARTS)}")


def row_range(row: int | None, rows: str | None) -> tuple[int, int] | None:
    """`--row 3` or `--rows 1-5` as first and last row."""
    if row is not None and rows is not None:
        raise InvalidSpec("give --row or --rows, not both")
    if rows is None:
        return None if row is None else (row, row)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rows.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise InvalidSpec(
            f"--rows must be two row numbers from 1 up, the first not above the last, got {rows!r}", hint="--rows 1-5"
        )
    return first, last


def known_fate(text: str | None) -> Fate | None:
    from lorasmith.schemas.data import Fate

    if text is None:
        return None
    fates = [fate.value for fate in Fate]
    if text not in fates:
        raise InvalidSpec(f"--fate must be {', '.join(fates)}, got {text!r}{did_you_mean(text, fates)}")
    return Fate(text)

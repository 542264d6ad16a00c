"""Rows of Parquet files and of datasets of the library `datasets`, both behind the extra `data`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorasmith.errors import InvalidData, MissingExtra, NotFound
from lorasmith.schemas.data import Part
from lorasmith.services.data_files import PART_NAMES
from lorasmith.services.data_rows import RawRow

BATCH_ROWS = 256
HUB_ID = re.compile(r"(?:hf:)?(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
Labels = dict[str, list[str]]  # column → names of its classes


def parquet_rows(path: Path, moved: Callable[[int], None]) -> Iterator[RawRow]:
    """`moved` is told how many bytes of the file are done, after each row group."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"reading {path.name}, a Parquet file,", "data") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            labels = label_names((file.schema_arrow.metadata or {}).get(b"huggingface"))
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    for values in batch.to_pylist():
                        number += 1
                        yield RawRow(number, None, named_labels(values, labels))
                moved(path.stat().st_size * (group + 1) // file.num_row_groups)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        sentence = str(error).partition("\n")[0]
        raise InvalidData(
            f"{path} is not a whole Parquet file: {sentence}", hint="copy or download it again"
        ) from error


def label_names(metadata: bytes | None) -> Labels:
    """Class names that `datasets` writes beside the numbers of a label column."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        return {name: list(one["names"]) for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def named_labels(values: dict[str, Any], labels: Labels) -> dict[str, Any]:
    for column, names in labels.items():
        number = values.get(column)
        if isinstance(number, int) and 0 <= number < len(names):
            values[column] = names[number]
    return values


class SavedDataset:
    """A dataset of the library `datasets`: a folder that it saved, or an id on the hub (`owner/name`, `:config`)."""

    def __init__(self, splits: dict[str, Any]) -> None:
        self.splits = splits

    @classmethod
    def of_folder(cls, folder: Path) -> SavedDataset:
        library = datasets_library(folder.name)
        try:
            loaded = library.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidData(
                f"{folder} is not a whole saved dataset: {error}", hint="save or copy it again"
            ) from error
        return cls(dict(loaded) if isinstance(loaded, dict) else {"": loaded})

    @classmethod
    def of_hub(cls, name: str) -> SavedDataset:
        match = HUB_ID.fullmatch(name)
        assert match is not None
        library = datasets_library(name)
        try:
            loaded = library.load_dataset(match["name"], match["config"])
        except (OSError, ValueError, RuntimeError) as error:  # not found, no such config, no network, a script
            sentence = str(error).partition("\n")[0]
            raise NotFound(
                f"no file {name}, and the dataset {match['name']} cannot be had from the Hugging Face hub: {sentence}",
                hint="check the path, the id or the network; a config is named behind a colon: openai/gsm8k:main",
            ) from error
        return cls(dict(loaded) if isinstance(loaded, dict) else {"": loaded})

    def files(self) -> list[Path]:
        """The Arrow files behind it, which are its content."""
        return sorted({Path(file["filename"]) for split in self.splits.values() for file in split.cache_files})

    def rows(self) -> Iterator[RawRow]:
        """Split by split; a split's name decides the part where it is a known one and there are several."""
        number = 0
        for name, split in self.splits.items():
            labels = {
                column: list(feature.names)
                for column, feature in split.features.items()
                if type(feature).__name__ == "ClassLabel"
            }
            part = split_part(name) if len(self.splits) > 1 else None
            for batch in split.with_format("arrow").iter(BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(number, None, named_labels(values, labels), file=name, part=part)

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


def split_part(name: str) -> Part | None:
    word = re.match(r"[a-z]*", name.lower())
    part: Part | None = PART_NAMES.get(word[0]) if word else None  # type: ignore[assignment]
    return part


def datasets_library(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra(f"reading {what} with the library `datasets`", "data") from None
    datasets.disable_progress_bars()
    return datasets


def is_hub_id(source: Path) -> bool:
    """`owner/name`, where no such path exists."""
    return bool(HUB_ID.fullmatch(source.as_posix())) and not source.exists()

"""The built-in model and data keep the promises of their model card."""

from __future__ import annotations

import ast
import gzip
import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.files import verify_manifest
from lorasmith.starter.location import DATASETS, FOLDER, starter_dataset, starter_model
from tools.starter.leakage import normalised
from tools.starter.tasks import SIGNATURE_INSTRUCTION, describe_header

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    with gzip.open(starter_dataset(name), "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def header(row: Row) -> str:
    text: str = row["messages"][0]["content"]
    return text.removeprefix(SIGNATURE_INSTRUCTION).strip()


def test_it_fits_into_eight_megabytes() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_the_model_is_a_small_llama_that_k_quants_can_take() -> None:
    config = json.loads((starter_model() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert config["max_position_embeddings"] >= 1024
    verify_manifest(starter_model())


def test_the_licence_and_the_python_version_are_with_it() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE.psf").read_text(encoding="utf-8")
    assert re.search(r"Python 3\.\d+\.\d+ standard library", (FOLDER / "NOTICE").read_text(encoding="utf-8"))


def test_there_are_enough_rows() -> None:
    assert len(rows_of("signatures")) >= 2000
    assert len(rows_of("interactions")) >= 500


def test_each_answer_is_what_ast_reads_in_the_header() -> None:
    for row in rows_of("signatures"):
        assert json.loads(row["messages"][1]["content"]) == describe_header(header(row)), row["source"]


def test_every_header_has_two_or_more_parameters() -> None:
    assert all(len(describe_header(header(row))["parameters"]) >= 2 for row in rows_of("signatures"))


def test_the_header_description_of_a_known_function() -> None:
    described = describe_header("def quantiles(data, /, *rest, n=4, method='exclusive', **options) -> list:")
    assert described == {
        "name": "quantiles",
        "parameters": ["data", "*rest", "n", "method", "**options"],
        "defaults": {"n": "4", "method": "'exclusive'"},
    }


@pytest.mark.parametrize("name", DATASETS)
def test_test_rows_come_from_modules_that_training_never_saw(name: str) -> None:
    rows = rows_of(name)
    seen = {row["group"] for row in rows if row["split"] != "test"}
    assert not seen & {row["group"] for row in rows if row["split"] == "test"}


def test_no_normalised_test_header_occurs_in_train() -> None:
    rows = rows_of("signatures")
    train = {normalised(header(row)) for row in rows if row["split"] != "test"}
    test = [normalised(header(row)) for row in rows if row["split"] == "test"]
    assert not train & set(test)
    assert len(test) == len(set(test))


def test_interactions_have_the_collected_shape_and_parse() -> None:
    for row in rows_of("interactions"):
        ast.parse(row["execution"]["output"])
        assert row["task"]["description"]
        assert row["agent"]["role"] == "coder"


def test_its_continuation_of_def_is_python() -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    model = AutoModelForCausalLM.from_pretrained(starter_model(), dtype=torch.float32)
    ids = torch.tensor([tokenizer("def ")["input_ids"]])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=150, do_sample=False)[0])
    whole_lines = text.rpartition("\n")[0]  # the last one may end where the tokens did
    first = re.split(r"\n(?=\S)", whole_lines)[0]  # up to the next line without indent: one function
    assert isinstance(ast.parse(first).body[0], ast.FunctionDef)


def test_the_card_states_perplexity_and_the_command_that_rebuilds_it() -> None:
    card = (starter_model() / "README.md").read_text(encoding="utf-8")
    assert re.search(r"perplexity per token \| \d+\.\d+", card)
    assert "python -m tools.starter.build --tokens" in card


@pytest.mark.slow
def test_the_stated_perplexity_is_what_the_weights_give() -> None:
    """Measured again where this Python has the library that the model card names."""
    import platform

    from tools.starter.build import measure
    from tools.starter.corpus import read_library

    card = (starter_model() / "README.md").read_text(encoding="utf-8")
    if f"Python {platform.python_version()} standard library" not in card:
        pytest.skip("another Python version, whose library has other text")
    stated = float(re.findall(r"perplexity per token \| (\d+\.\d+)", card)[0])
    facts = measure(list(read_library()), starter_model())
    assert facts["held_out_perplexity"] == pytest.approx(stated, rel=1e-2)  # other CPUs sum in another order

"""Export jobs: merged folders and GGUF files that are proved, or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lorasmith.engine.adapters import export, gguf
from lorasmith.engine.adapters.proof import LogitDifference, require
from lorasmith.engine.data.templates import TEMPLATES
from lorasmith.engine.models.loading import load_adapter, load_model
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Conflict, DiskFull, Interrupted, InvalidModel, JobFailed
from lorasmith.files import read_json, verify_manifest
from tests.engine.adapter_cases import Case, build_case, chat_tokenizer, prompts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")]
)
def test_a_merged_folder_loads_as_a_model_that_answers_as_base_and_adapter(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    case = build_case(tmp_path, "qwen2", dtype)
    result = case.export(tmp_path / "merged", "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (reloaded.dtype, reloaded.config.tie_word_embeddings) == (dtype, True)
    assert reloaded.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    ids = torch.tensor([prompts(tokenizer)[0]])
    with torch.inference_mode():
        expected = load_adapter(load_model(case.base), case.adapter)(ids).logits
        answered = reloaded.float()(ids).logits
    tolerance = {"bfloat16": 0.25, "float16": 0.02, "float32": 1e-5}[name] * expected.std().item()
    torch.testing.assert_close(answered, expected, atol=tolerance, rtol=0)
    verify_manifest(tmp_path / "merged")
    written = read_json(tmp_path / "merged" / "export.json")
    assert written["checks"] == result.checks
    assert result.checks["dtype"] == name
    assert result.checks["merge"]["relative"] < 1e-4 < result.checks["adapter_effect"]
    phases = [json.loads(line)["data"]["name"] for line in (tmp_path / "job/events.jsonl").read_text().splitlines()]
    assert phases == ["load", "reference", "merge", "write", "verify"]


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_a_failed_proof_leaves_nothing(kind: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROUNDING_BOUNDS", {torch.bfloat16: 1e-9})
    monkeypatch.setattr(export, "GGUF_BOUNDS", {"F16": 1e-9})
    with pytest.raises(
        JobFailed, match=r"export proof failed: the logits of the written .* allowed are 1e-09; nothing"
    ):
        case.export(tmp_path / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_proof_that_is_not_a_number_fails() -> None:
    with pytest.raises(JobFailed, match="of the merged model differ from base \\+ adapter by nan standard deviations"):
        require(LogitDifference(float("nan"), float("nan"), 0.0, 1), 1.0, "the merged model")


@pytest.mark.parametrize(("kind", "name"), [("merged", "out"), ("gguf", "out.gguf")])
def test_a_job_that_was_killed_behind_its_last_step_finds_what_it_wrote(
    kind: str, name: str, case: Case, tmp_path: Path
) -> None:
    first = case.export(tmp_path / name, kind)
    again = case.export(tmp_path / name, kind)
    assert again.model_dump_json() == first.model_dump_json()
    with pytest.raises(Conflict, match=f"{name} exists already"):
        case.export(tmp_path / name, kind, job_id="job_of_another")


def test_an_existing_target_is_a_conflict(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(Conflict, match=r"model\.gguf exists already"):
        case.export(tmp_path / "model.gguf")
    with pytest.raises(Conflict, match=r"model\.gguf exists already"), gguf.new_file(tmp_path / "model.gguf"):
        pass
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_requested_stop_is_obeyed_between_phases(case: Case, tmp_path: Path) -> None:
    report = Reporter(tmp_path)
    report.stop_requested = True
    with pytest.raises(Interrupted, match="stopped before the phase 'load' of the export; nothing was written"):
        export.run(case.order(tmp_path / "model.gguf"), tmp_path, report)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_for_a_gguf(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="the disk is full: writing below .* failed with .* MB free"):
        case.export(tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_full_disk_is_reported_for_a_merged_folder(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(DiskFull, match="the disk is full: writing below"):
        case.export(tmp_path / "merged", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_an_unsupported_architecture_is_refused_before_the_work(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    message = "does not support the architecture 'gpt2'; supported: llama, mistral, qwen2, qwen3"
    with pytest.raises(InvalidModel, match=message):
        Case(tmp_path / "base", tmp_path / "none").export(tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "job"]


def test_an_adapter_without_a_tokenizer_takes_that_of_the_base(case: Case, tmp_path: Path) -> None:
    bare = tmp_path / "adapter"
    bare.mkdir()
    shutil.copy(case.adapter / "chat_template.jinja", bare)
    tokenizer = export.serving_tokenizer(case.base, bare)
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(case.base))

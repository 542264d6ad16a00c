"""Export of merged folders and GGUF files; GGUF is run by the real llama.cpp and compared token by token."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorasmith.engine.adapters import export, gguf
from lorasmith.engine.adapters.gguf_tensors import (
    Place,
    architecture,
    embedding_rows,
    encode_tensor,
    interleave_heads,
    part_heads,
    place,
    tensor_type,
)
from lorasmith.engine.adapters.gguf_vocabulary import read_vocabulary
from lorasmith.engine.adapters.merging import merge
from lorasmith.engine.adapters.proof import LogitDifference, require
from lorasmith.engine.data.templates import TEMPLATES
from lorasmith.engine.models.loading import load_adapter, load_model
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Conflict, DiskFull, Interrupted, InvalidModel, JobFailed
from lorasmith.files import read_json, verify_manifest
from lorasmith.schemas.adapters import ExportResult
from lorasmith.schemas.jobs import JobKind, JobOrder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the merchant counts 1234567 coins and asks about the order. "
    "Where is my parcel? It has been shipped; you will get it on Monday, I'm sure. def mean(values): return sum(values)"
)
# Logits of the models below have a standard deviation of 1.3. llama.cpp multiplies float16 weights with activations
# rounded to float16, and Q8_0 weights with activations rounded to Q8_0; our reference computes in float32.
F16_LOGIT_BOUND = 1.5e-2  # measured: 8.4e-3
F16_MARGIN_BOUND = 5e-3  # measured: where the best token differed, our two best were at most 1.8e-3 apart
Q8_0_LOGIT_BOUND = 0.5  # measured: 0.38
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama with llama3 rope": {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    "llama with linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 128},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
}


def tiny_model(family: str, vocab_size: int, **changes: Any) -> PreTrainedModel:
    """Random weights of a size that makes the best token clear, biases and norms included."""
    config = AutoConfig.for_model(
        family.split()[0],
        **{
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **FAMILIES[family],
            **changes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        spread = 0.08 if parameter.dim() == 2 else 0.2
        nn.init.normal_(parameter, mean=float("norm" in name), std=spread)
    model.generation_config.eos_token_id = 2
    return model.eval()


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@dataclass(frozen=True)
class Case:
    """A base model folder without a chat template and an adapter folder that brings one."""

    base: Path
    adapter: Path

    def order(self, output: Path, kind: str = "gguf", quantization: str = "F16") -> JobOrder:
        spec = {"adapter": "tuned", "kind": kind, "quantization": quantization}
        inputs = {
            "model_folder": str(self.base),
            "model_name": "tiny",
            "adapter_folder": str(self.adapter),
            "adapter_name": "tuned",
            "output": str(output),
        }
        return JobOrder(id="job_1", kind=JobKind.EXPORT, spec=spec, inputs=inputs)

    def export(self, output: Path, kind: str = "gguf", quantization: str = "F16") -> ExportResult:
        folder = output.parent / "job"
        folder.mkdir(exist_ok=True)
        return export.run(self.order(output, kind, quantization), folder, Reporter(folder))


def build_case(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    tokenizer = chat_tokenizer()
    model = tiny_model(family, len(tokenizer) + 3, **changes).to(dtype)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear", alpha_pattern={"v_proj": 8})
    wrapped = get_peft_model(model.float(), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(folder / "adapter")
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder / "adapter")
    return Case(folder / "base", folder / "adapter")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    """The real llama.cpp; without it a test is skipped on a laptop, and fails in CI."""
    try:
        import llama_cpp
    except ImportError:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run GGUF files with llama.cpp: pip install llama-cpp-python==0.3.36")
        pytest.skip("needs llama-cpp-python")
    return llama_cpp


def prompts(tokenizer: PreTrainedTokenizerFast, count: int = 20) -> list[list[int]]:
    """Chat prompts of 10 to 40 tokens, the same each time."""
    dice = random.Random(1)
    words = CORPUS.split()
    questions = [" ".join(dice.choices(words, k=dice.randint(2, 8))) for _ in range(count)]
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    return [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]


class LlamaCpp:
    """Logits of the next token from a GGUF, with keys and values in float32."""

    def __init__(self, library: ModuleType, path: Path) -> None:
        self.library = library
        float32 = library.GGML_TYPE_F32
        self.model = library.Llama(
            str(path), n_ctx=256, n_threads=1, type_k=float32, type_v=float32, flash_attn=False, verbose=False
        )

    def greedy(self, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
        """The chosen tokens and the logits that chose them, (steps, V)."""
        self.model.reset()
        chosen: list[int] = []
        rows: list[np.ndarray[Any, Any]] = []
        for _ in range(steps):
            self.model.eval(chosen[-1:] or prompt)
            pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)
            address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
            rows.append(np.ctypeslib.as_array(address, (self.model.n_vocab(),)).copy())
            chosen.append(int(rows[-1].argmax()))
        return chosen, torch.from_numpy(np.stack(rows))  # (steps, V)


def rounded_to_f16(model: PreTrainedModel) -> PreTrainedModel:
    """The matrices as an F16 GGUF stores them; computed in float32."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    return model


@torch.inference_mode()
def logits_that_choose(model: PreTrainedModel, prompt: list[int], chosen: list[int]) -> Tensor:
    """Our logits at the positions where `chosen` was chosen, (len(chosen), V)."""
    ids = torch.tensor([prompt + chosen[:-1]])
    return model(ids).logits[0, len(prompt) - 1 :]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_an_f16_gguf_as_the_merged_model_does(
    family: str, llama_cpp: ModuleType, tmp_path: Path
) -> None:
    case = build_case(tmp_path, family)
    case.export(tmp_path / "model.gguf")
    ours = rounded_to_f16(merge(load_model(case.base), case.adapter))
    theirs = LlamaCpp(llama_cpp, tmp_path / "model.gguf")
    count, steps = (20, 64) if family in {"llama", "qwen2"} else (5, 32)
    compared = 0
    for prompt in prompts(AutoTokenizer.from_pretrained(case.base), count):
        chosen, their_logits = theirs.greedy(prompt, steps)
        our_logits = logits_that_choose(ours, prompt, chosen)
        assert (our_logits - their_logits).abs().max() < F16_LOGIT_BOUND
        for step, token in enumerate(chosen):
            best, second = our_logits[step].topk(2).values.tolist()
            if int(our_logits[step].argmax()) != token:
                assert best - second < F16_MARGIN_BOUND
                break  # from here on the two answers are different texts
            compared += 1
    assert compared > 0.8 * count * steps


def test_llama_cpp_answers_a_q8_0_gguf_nearly_as_the_merged_model_does(
    case: Case, llama_cpp: ModuleType, tmp_path: Path
) -> None:
    result = case.export(tmp_path / "model.gguf", quantization="Q8_0")
    assert result.checks["read_back"]["types"]["Q8_0"] == 15
    ours = merge(load_model(case.base), case.adapter)
    theirs = LlamaCpp(llama_cpp, tmp_path / "model.gguf")
    for prompt in prompts(AutoTokenizer.from_pretrained(case.base), 5):
        chosen, their_logits = theirs.greedy(prompt, steps=16)
        our_logits = logits_that_choose(ours, prompt, chosen)
        assert (our_logits - their_logits).abs().max() < Q8_0_LOGIT_BOUND


def test_a_gguf_has_the_template_stop_token_and_proof(case: Case, llama_cpp: ModuleType, tmp_path: Path) -> None:
    (case.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    result = case.export(tmp_path / "model.gguf")
    model = LlamaCpp(llama_cpp, tmp_path / "model.gguf").model
    assert model.metadata["tokenizer.chat_template"] == TEMPLATES["chatml"]
    assert model.metadata["general.license"] == "apache-2.0"
    assert model.metadata["general.name"] == "tiny tuned"
    assert model.metadata["llama.context_length"] == "512"
    assert model.token_eos() == 2
    assert llama_cpp.llama_vocab_eot(llama_cpp.llama_model_get_vocab(model.model)) == 2
    proof = json.loads(model.metadata["lorasmith.export_proof"])
    assert proof["checks"] == result.checks
    assert proof["adapter"] == "tuned"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_gguf_read_back_holds_every_merged_weight(case: Case, tmp_path: Path) -> None:
    result = case.export(tmp_path / "model.gguf")
    merged = merge(load_model(case.base), case.adapter)
    reader = GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == result.checks["read_back"]["tensors"] == len(list(merged.parameters()))
    up = stored["blk.1.ffn_up.weight"]
    assert up.shape.tolist() == [256, 512]
    expected = merged.get_submodule("model.layers.1.mlp.up_proj").weight.detach()
    torch.testing.assert_close(torch.from_numpy(dequantize(up.data, up.tensor_type)), expected.half().float())
    query = torch.from_numpy(dequantize(stored["blk.0.attn_q.weight"].data, GGMLQuantizationType.F16))
    expected = merged.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    torch.testing.assert_close(part_heads(query, 4), expected.half().float())
    assert stored["blk.0.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32


def test_rows_of_heads_are_interleaved_and_parted() -> None:
    rows = torch.arange(8.0).view(8, 1)  # 2 heads of 4 rows
    assert interleave_heads(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    torch.testing.assert_close(part_heads(interleave_heads(rows, 2), 2), rows)


def test_rows_that_do_not_divide_into_blocks_stay_f16() -> None:
    assert tensor_type("output.weight", torch.Size([8, 48]), "Q8_0") == GGMLQuantizationType.F16
    assert tensor_type("output.weight", torch.Size([8, 64]), "Q8_0") == GGMLQuantizationType.Q8_0
    assert tensor_type("output_norm.weight", torch.Size([64]), "Q8_0") == GGMLQuantizationType.F32


def test_the_context_of_a_sliding_window_model_ends_at_its_window() -> None:
    assert gguf.usable_context_tokens(tiny_model("mistral", 32)) == 128
    assert gguf.usable_context_tokens(tiny_model("qwen2", 32)) == 512


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


def test_another_activation_is_refused() -> None:
    with pytest.raises(InvalidModel, match="of 'llama' needs the activation 'silu', this model has 'gelu'"):
        architecture(tiny_model("llama", 32, hidden_act="gelu"))


def test_a_parameter_without_a_place_is_refused() -> None:
    config = tiny_model("qwen3", 32).config
    with pytest.raises(
        InvalidModel, match="no place for the parameter 'model.layers.0.self_attn.q_proj.bias' in .*qwen3"
    ):
        place("model.layers.0.self_attn.q_proj.bias", "qwen3", config)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(InvalidModel, match=r"output.weight holds 70000, more than float16 can hold \(65504\)"):
        encode_tensor(Place("output.weight", None), torch.tensor([[70000.0]]), GGMLQuantizationType.F16)


def test_rotary_positions_that_llama_cpp_computes_otherwise_are_refused() -> None:
    model = tiny_model("qwen2", 32, rope_parameters=LLAMA3_ROPE)
    with pytest.raises(
        InvalidModel, match="rotary positions of type 'llama3' for 'qwen2'; supported: default, linear over"
    ):
        gguf.rope_factors(model)


def test_a_model_without_a_stated_context_is_refused() -> None:
    model = tiny_model("llama", 32)
    model.config.max_position_embeddings = 0
    with pytest.raises(InvalidModel, match="does not say how long its context is"):
        gguf.usable_context_tokens(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: model.model.norm.weight.data.add_(1.0), r"tensor 'output_norm.weight' is off by 1\b"),
        (lambda model: setattr(model, "lm_head", nn.Linear(256, 32, bias=False)), "'output.weight' is missing or has"),
        (lambda model: delattr(model.model.layers[1].mlp, "up_proj"), "'blk.1.ffn_up.weight' has no counterpart"),
    ],
)
def test_a_gguf_that_differs_from_the_model_fails_its_proof(damage: Any, message: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = read_vocabulary(tokenizer, embedding_rows(model))
    gguf.write_gguf(tmp_path / "model.gguf", model, vocabulary, "F16", name="tiny", license=None)
    damage(model)
    with pytest.raises(JobFailed, match=message):
        gguf.read_back(tmp_path / "model.gguf", model, vocabulary)


def test_a_gguf_that_lacks_tokens_fails_its_proof(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = read_vocabulary(tokenizer, embedding_rows(model))
    gguf.write_gguf(tmp_path / "model.gguf", model, vocabulary, "F16", name="tiny", license=None)
    larger = read_vocabulary(tokenizer, embedding_rows(model) + 1)
    with pytest.raises(JobFailed, match=f"it holds {len(tokenizer)} tokens, the model has {len(tokenizer) + 1}"):
        gguf.read_back(tmp_path / "model.gguf", model, larger)


def test_an_adapter_without_a_tokenizer_takes_that_of_the_base(case: Case, tmp_path: Path) -> None:
    bare = tmp_path / "adapter"
    bare.mkdir()
    shutil.copy(case.adapter / "chat_template.jinja", bare)
    tokenizer = export.serving_tokenizer(case.base, bare)
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(case.base))

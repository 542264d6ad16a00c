"""GGUF files, run by the real llama.cpp and compared with the merged model token by token."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lorasmith.engine.adapters import gguf
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
from lorasmith.engine.data.templates import TEMPLATES
from lorasmith.engine.models.loading import load_model
from lorasmith.errors import InvalidModel, JobFailed
from tests.engine.adapter_cases import (
    FAMILIES,
    LLAMA3_ROPE,
    Case,
    build_case,
    chat_tokenizer,
    prompts,
    real_llama_cpp,
    tiny_model,
)

# Logits of the models below have a standard deviation of 1.3. llama.cpp multiplies float16 weights with activations
# rounded to float16, and Q8_0 weights with activations rounded to Q8_0; our reference computes in float32.
F16_LOGIT_BOUND = 1.5e-2  # measured: 8.4e-3
F16_MARGIN_BOUND = 5e-3  # measured: where the best token differed, our two best were at most 1.8e-3 apart
Q8_0_LOGIT_BOUND = 0.5  # measured: 0.38


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    return real_llama_cpp()


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


def test_a_missing_llama_cpp_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # makes its import fail
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must run GGUF files with llama.cpp"):
        real_llama_cpp()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="needs llama-cpp-python"):
        real_llama_cpp()


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

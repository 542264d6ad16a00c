"""Tiny bases with random adapters on disk, and the real llama.cpp to run what they are exported to."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lorasmith.engine.adapters import export
from lorasmith.engine.data.templates import TEMPLATES
from lorasmith.engine.reporting import Reporter
from lorasmith.schemas.adapters import ExportResult
from lorasmith.schemas.jobs import JobKind, JobOrder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the merchant counts 1234567 coins and asks about the order. "
    "Where is my parcel? It has been shipped; you will get it on Monday, I'm sure. def mean(values): return sum(values)"
)
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

    def export(
        self, output: Path, kind: str = "gguf", quantization: str = "F16", job_id: str = "job_1"
    ) -> ExportResult:
        folder = output.parent / "job"
        folder.mkdir(exist_ok=True)
        order = self.order(output, kind, quantization).model_copy(update={"id": job_id})
        return export.run(order, folder, Reporter(folder))


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


def prompts(tokenizer: PreTrainedTokenizerFast, count: int = 20) -> list[list[int]]:
    """Chat prompts of 10 to 40 tokens, the same each time."""
    dice = random.Random(1)
    words = CORPUS.split()
    questions = [" ".join(dice.choices(words, k=dice.randint(2, 8))) for _ in range(count)]
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    return [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]


def real_llama_cpp() -> ModuleType:
    """llama.cpp itself; without it a test is skipped on a laptop, and fails in CI."""
    try:
        import llama_cpp
    except ImportError:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run GGUF files with llama.cpp: pip install llama-cpp-python==0.3.36")
        pytest.skip("needs llama-cpp-python")
    return llama_cpp

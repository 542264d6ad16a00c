"""The rows, the model shapes and the counting rules that every training benchmark shares. Needs no library.

The 16 rows hold 3,943 tokens, of which 1,904 are labelled; their four steps 755, 1,242, 725 and 1,221.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 16
ROWS_PER_STEP = 4
LENGTH_CAP = 600  # tokens of a prompt, and of a completion
LOG_MEDIAN = 4.6  # e ** 4.6 = 99.5 tokens
LORA_RANK = 16
LORA_ALPHA = 32
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 2e-4

Row = dict[str, list[int]]
Config = dict[str, Any]

# Hugging Face config values; what is not named keeps the default of its architecture.
SHAPES: dict[str, Config] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8_192,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 2_048,
        "intermediate_size": 5_632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2_048,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2_048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
    # For trying the benchmark itself in a minute; its ratios mean nothing.
    "tiny": {
        "model_type": "qwen2",
        "vocab_size": 2_000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2_048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Product:
    """A frozen weight of shape (out_features, in_features) and how often it occurs in the model."""

    name: str
    out_features: int
    in_features: int
    count: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features * self.count


def layer_products(config: Config) -> list[Product]:
    """The products of the decoder layers, which every token passes."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    return [
        Product("q_proj", queries, hidden, layers),
        Product("k_proj", keys, hidden, layers),
        Product("v_proj", keys, hidden, layers),
        Product("o_proj", hidden, queries, layers),
        Product("gate_proj", inner, hidden, layers),
        Product("up_proj", inner, hidden, layers),
        Product("down_proj", hidden, inner, layers),
    ]


def head_product(config: Config) -> Product:
    """The head's product, which only labelled tokens need to pass."""
    return Product("lm_head", config["vocab_size"], config["hidden_size"], 1)


def step_flops(config: Config, tokens: int, labelled_tokens: int) -> int:
    """FLOPs that a training step cannot avoid: 4 per frozen weight and token (forward, and the gradient of the input).

    Nothing for LoRA, attention, element-wise work or recomputation; the head counts on labelled tokens only.
    """
    layers = sum(product.weights for product in layer_products(config))
    return 4 * (layers * tokens + head_product(config).weights * labelled_tokens)


def weight_bytes(config: Config, bytes_per_weight: int) -> int:
    """Size of the base model; norms and biases are left out."""
    embeddings = head_product(config).weights * (1 if config["tie_word_embeddings"] else 2)
    return bytes_per_weight * (embeddings + sum(product.weights for product in layer_products(config)))


def make_rows(config: Config, count: int = ROWS, seed: int = 0) -> list[Row]:
    """Random rows: lengths are log-normal with a median of 100 tokens each for the prompt and the completion.

    The lengths are the same for every vocabulary; in a small one the ids are folded into its upper part.
    """
    generator = random.Random(seed)
    first = min(1_000, config["vocab_size"] // 2)
    ids_in_use = min(150_000, config["vocab_size"]) - first
    rows = []
    for _ in range(count):
        prompt = int(min(LENGTH_CAP, max(20, generator.lognormvariate(LOG_MEDIAN, 0.6))))
        completion = int(min(LENGTH_CAP, max(10, generator.lognormvariate(LOG_MEDIAN, 0.7))))
        ids = [first + (generator.randrange(1_000, 150_000) - 1_000) % ids_in_use for _ in range(prompt + completion)]
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * completion})
    return rows


def tokens_of(rows: list[Row]) -> int:
    """Tokens without padding."""
    return sum(len(row["input_ids"]) for row in rows)


def labelled_tokens_of(rows: list[Row]) -> int:
    """Tokens that carry a loss."""
    return sum(sum(row["completion_mask"]) for row in rows)


def write_rows(rows: list[Row], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""Pretrain the starter model: next-token prediction on the library's source, on a CPU.

A model of this size recalls names rather than copies them, so a fifth of its text asks it to repeat code and names, most
of them made from pieces of the library's names.

The order of the text is a function of the seed alone. Weights are fp32 while training and bf16 when saved.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasmith.engine.models.precision import choose_precision
from tools.starter.corpus import SourceFile
from tools.starter.tasks import REPEAT_INSTRUCTION, chat, functions, pretraining_chats
from tools.starter.tokenizer import CONTEXT_TOKENS, VOCABULARY_SIZE

CHAT_SHARE = 0.25  # of the chat turns that the library yields; all of them would be a third of the text


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one context length; short contexts first, as attention costs their square."""

    share: float
    context_tokens: int
    rows: int


PHASES = (Phase(0.85, 512, 16), Phase(0.15, CONTEXT_TOKENS, 8))
PEAK_LEARNING_RATE = 4e-3
WARMUP_SHARE = 0.02
REPEAT_SHARE = 0.25  # of the functions, each repeated once
NAME_LISTS = 20_000
MADE_NAME_SHARE = 0.7  # of the listed names; a real one could be recalled instead of copied


def model_config() -> LlamaConfig:
    """3.5 M parameters; hidden and feed-forward sizes are multiples of 256, which K-quants need."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def documents(files: list[SourceFile], seed: int) -> list[str]:
    """Whole files and a share of their chat turns, each one document; never a held-out module."""
    rng = random.Random(seed)
    texts = []
    for file in files:
        if file.held_out:
            continue
        texts.append(file.text)
        texts += [chat for chat in pretraining_chats(file, rng) if rng.random() < CHAT_SHARE]
    return texts


def batches(encoded: list[list[int]], phase: Phase, tokens: int, seed: int) -> Iterator[Tensor]:
    """Yield (rows, context + 1) ids until `tokens` are spent; each pass shuffles and shifts the text anew."""
    rng = random.Random(seed)
    spent = 0
    while True:
        order = rng.sample(range(len(encoded)), len(encoded))
        stream = torch.tensor([token for index in order for token in (*encoded[index], 0)])
        stream = stream[rng.randrange(phase.context_tokens) :]
        starts = list(range(0, len(stream) - phase.context_tokens, phase.context_tokens))
        rng.shuffle(starts)
        for first in range(0, len(starts) - phase.rows + 1, phase.rows):
            if spent >= tokens:
                return
            spent += phase.rows * phase.context_tokens
            rows = starts[first : first + phase.rows]
            yield torch.stack([stream[start : start + phase.context_tokens + 1] for start in rows])


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, encoded: list[list[int]], max_tokens: int | None = None
) -> tuple[float, int]:
    """Mean loss in nats and the number of predicted tokens, over disjoint windows of the full context."""
    total, count = 0.0, 0
    for ids in encoded:
        for start in range(0, len(ids) - 1, CONTEXT_TOKENS - 1):
            window = torch.tensor([[0, *ids[start : start + CONTEXT_TOKENS - 1]]])
            logits = model(window, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
            if max_tokens and count >= max_tokens:
                return total / count, count
    return total / count, count


def load(folder: Path) -> LlamaForCausalLM:
    """The saved weights, computed in fp32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder in bf16; the training copy stays fp32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps the method
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def repetitions(files: list[SourceFile], seed: int) -> list[str]:
    """Chat turns that ask for code or for a list of names once more: a small model learns to copy from nothing else."""
    rng = random.Random(seed)
    pool = [function for file in files if not file.held_out for function in functions(file)]
    codes = [function.source for function in pool if len(function.source) <= 700 and rng.random() < REPEAT_SHARE]
    texts = [chat(("user", f"{REPEAT_INSTRUCTION}\n{code}"), ("assistant", code)) for code in codes]
    nodes = (node for function in pool for node in ast.walk(function.node) if isinstance(node, ast.arg))
    names = sorted({node.arg for node in nodes} | {function.node.name for function in pool})
    fragments = sorted({piece for name in names for piece in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)})

    def made_name() -> str:
        return rng.choice(("", "", "_")) + rng.choice(("_", "")).join(rng.choices(fragments, k=rng.randint(1, 3)))

    for _ in range(NAME_LISTS):
        count = rng.randint(1, 8)
        listed = ", ".join(made_name() if rng.random() < MADE_NAME_SHARE else rng.choice(names) for _ in range(count))
        texts.append(chat(("user", f"{REPEAT_INSTRUCTION}\n{listed}"), ("assistant", listed)))
    return texts


def pretrain(
    files: list[SourceFile], tokenizer: PreTrainedTokenizerFast, *, tokens: int, folder: Path, seed: int
) -> None:
    """Train for `tokens` tokens, linear decay to zero, and save to `folder`; logs to stdout and saves each tenth of the way."""
    torch.manual_seed(seed)
    encode = tokenizer.backend_tokenizer.encode_batch
    train = [encoding.ids for encoding in encode(documents(files, seed) + repetitions(files, seed))]
    held_out = [encoding.ids for encoding in encode([file.text for file in files if file.held_out])]
    print(json.dumps({"train_tokens": sum(map(len, train)), "held_out_tokens": sum(map(len, held_out))}), flush=True)
    model = LlamaForCausalLM(model_config())
    optimizer_list = optimizers(model, PEAK_LEARNING_RATE)
    bf16 = choose_precision("auto") == "bf16"
    spent, step, began, next_save = 0, 0, time.perf_counter(), 0.1
    for number, phase in enumerate(PHASES):
        # Materialised attention is twice as fast as the CPU's fused kernel up to 512 tokens, and slower beyond.
        model.set_attn_implementation("eager" if phase.context_tokens <= 512 else "sdpa")
        compiled = torch.compile(model.model, dynamic=False)
        for batch in batches(train, phase, round(tokens * phase.share), seed + number):
            progress = spent / tokens
            rate = PEAK_LEARNING_RATE * min(progress / WARMUP_SHARE + 0.01, (1 - progress) / (1 - WARMUP_SHARE), 1.0)
            for optimizer in optimizer_list:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = compiled(input_ids=batch[:, :-1], use_cache=False).last_hidden_state  # type: ignore[no-untyped-call]
                logits = model.lm_head(hidden)
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizer_list:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            spent += phase.rows * phase.context_tokens
            step += 1
            if step % 20 == 0:
                seconds = time.perf_counter() - began
                line = {
                    "step": step,
                    "tokens": spent,
                    "loss": round(loss.item(), 4),
                    "tokens_per_s": round(spent / seconds),
                }
                print(json.dumps(line), flush=True)
            if spent / tokens >= next_save:
                next_save += 0.1
                save(model, tokenizer, folder)
                nats, _ = held_out_loss(model, held_out, max_tokens=40_000)
                print(json.dumps({"tokens": spent, "held_out_perplexity": round(math.exp(nats), 3)}), flush=True)
    save(model, tokenizer, folder)

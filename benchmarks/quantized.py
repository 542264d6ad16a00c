"""What a base in fewer bits saves in memory and costs in time: our step on 4, 8 or the file's 16 bits against the same in fp32.

python benchmarks/quantized.py [--steps N] [--tokens N]: JSON lines, one closing line per bar, exit 1 when short. Each kind
runs in a process of its own on one random model of 160 M parameters (weights in a folder, bf16): it loads the base,
adapts every linear layer with rank 16 and takes the gradients of `--tokens` tokens in rows of 256, N times after one that
allocates; with more tokens at once, activations take more of the memory and dequantising less of the time. Peak memory is the largest resident size of the process, of which the libraries take what `libraries_mb` says.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Bar, close, emit

BENCHMARK = "quantized"
MODEL = {
    "model_type": "llama",
    "vocab_size": 8_192,
    "hidden_size": 1_024,
    "intermediate_size": 2_816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": True,
}
ROW_TOKENS = 256
KINDS = ("none", "stored", "nf4", "fp4", "int8")
MEMORY_BAR, TIME_BAR = 0.7, 1.5
STORED_TIME_BAR = 1.1


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_model(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")  # a model folder has one; nothing here reads it


def measure(folder: Path, kind: str, tokens: int, steps: int) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from lorasmith.engine.data.rendering import RenderedExample
    from lorasmith.engine.lora.quantized import AS_STORED, Quantization
    from lorasmith.engine.models.families import read_decoder
    from lorasmith.engine.models.loading import load_model
    from lorasmith.engine.models.workspace import retain_heap
    from lorasmith.engine.training.computation import PackedComputation

    libraries_mb = peak_mb()
    began = time.perf_counter()
    quantization = AS_STORED if kind == "stored" else Quantization.named(kind, True)  # type: ignore[arg-type]
    base = load_model(folder, torch.float32, quantization)
    load_s, loaded_mb = time.perf_counter() - began, peak_mb()
    retain_heap()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.requires_grad_(False), config)
    assert isinstance(model, PeftModel)
    computation = PackedComputation(read_decoder(model), seed=0, micro_batch_tokens=tokens)
    generator = random.Random(0)
    rows = [
        RenderedExample(number, [generator.randrange(8_192) for _ in range(ROW_TOKENS)], [True] * ROW_TOKENS)
        for number in range(tokens // ROW_TOKENS)
    ]
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        computation.gradients(range(len(rows)), rows, scale=1e-3, step=0)
        seconds.append(time.perf_counter() - began)
    emit(
        BENCHMARK,
        kind=kind,
        threads=torch.get_num_threads(),
        tokens=tokens,
        load_s=load_s,
        step_s=statistics.median(seconds[1:]),
        libraries_mb=libraries_mb,
        loaded_mb=loaded_mb,
        peak_mb=peak_mb(),
    )


def in_a_process(*arguments: str) -> str:
    """What this script prints with those arguments; its memory begins small, as this process loads no library."""
    ran = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return ran.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_model(options.write)
        return 0
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1], options.tokens, options.steps)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        in_a_process("--write", folder)
        found = {}
        for kind in KINDS:
            line = in_a_process(
                "--measure", folder, kind, "--tokens", str(options.tokens), "--steps", str(options.steps)
            )
            print(line, end="", flush=True)
            found[kind] = json.loads(line)
    ours, stored, peer = found["nf4"], found["stored"], found["none"]
    ours_mb, stored_mb, peer_mb = (run["peak_mb"] - run["libraries_mb"] for run in (ours, stored, peer))
    return close(
        [
            Bar("peak memory on an nf4 base, less the libraries", f"{ours_mb:.0f} MB", f"{peer_mb:.0f} MB (fp32)", ours_mb / peer_mb, MEMORY_BAR, at_least=False),
            Bar("peak memory on the file's 16 bits, less the libraries", f"{stored_mb:.0f} MB", f"{peer_mb:.0f} MB (fp32)", stored_mb / peer_mb, 1.0, at_least=False),
            Bar("step on the file's 16 bits", f"{stored['step_s']:.2f} s", f"{peer['step_s']:.2f} s (fp32)", stored["step_s"] / peer["step_s"], STORED_TIME_BAR, at_least=False),
            Bar("step on an nf4 base", f"{ours['step_s']:.2f} s", f"{peer['step_s']:.2f} s (fp32)", ours["step_s"] / peer["step_s"], TIME_BAR, at_least=False),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""Build the starter model and its datasets from this machine's standard library: `make starter`.

Everything is a function of the library and the seed; the weights also depend on the CPU's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lorasmith.files import MANIFEST, seal
from tools.starter import datasets
from tools.starter.corpus import SourceFile, library_folder, read_library
from tools.starter.pretrain import documents, held_out_loss, load, pretrain, repetitions
from tools.starter.tasks import COMPLETION_INSTRUCTION, DOCSTRING_INSTRUCTION, REPEAT_INSTRUCTION
from tools.starter.tokenizer import VOCABULARY_SIZE, train_tokenizer

STARTER = Path(__file__).parents[2] / "src" / "lorasmith" / "starter"
SIZE_LIMIT_BYTES = 8_000_000
SEED = 0
TOKENS = 10_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="pretraining tokens")
    parser.add_argument("--data-only", action="store_true", help="build the datasets and keep the model")
    parser.add_argument("--weights", type=Path, help="take trained weights from this folder instead of training")
    parser.add_argument("--output", type=Path, default=STARTER)
    options = parser.parse_args()

    files = list(read_library())
    pretraining = documents(files, SEED) + repetitions(files, SEED)
    rows = datasets.make_rows(files)
    dropped = datasets.drop_leaked(rows, pretraining)
    datasets.check(rows, pretraining)
    datasets.write(rows, options.output / "data")
    counts = {name: {part: len(items) for part, items in parts.items()} for name, parts in rows.items()}
    print(json.dumps({"rows": counts, "dropped_from_test": dropped}))
    write_licence(options.output)
    if options.data_only:
        return

    model_folder = options.output / "model"
    began = time.perf_counter()
    if options.weights:
        shutil.copytree(options.weights, model_folder, dirs_exist_ok=True)
    else:
        tokenizer = train_tokenizer(file.text for file in files if not file.held_out)
        pretrain(files, tokenizer, tokens=options.tokens, folder=model_folder, seed=SEED)
    facts = measure(files, model_folder) | {
        "minutes": round((time.perf_counter() - began) / 60),
        "tokens": options.tokens,
    }
    (model_folder / "README.md").write_text(card(facts, counts, dropped), encoding="utf-8")
    (model_folder / MANIFEST).unlink(missing_ok=True)
    seal(model_folder)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file() and path.suffix != ".py")
    print(json.dumps({**facts, "size_bytes": size}))
    assert size <= SIZE_LIMIT_BYTES, f"{size} bytes is more than {SIZE_LIMIT_BYTES}"


def measure(files: list[SourceFile], folder: Path) -> dict[str, Any]:
    """Held-out perplexity of the weights as they are shipped, and the sizes of the text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = load(folder)
    texts = [file.text for file in files if file.held_out]
    encoded = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    nats, tokens = held_out_loss(model, encoded)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_perplexity": round(math.exp(nats), 3),
        "held_out_tokens": tokens,
        "held_out_bits_per_byte": round(nats * tokens / math.log(2) / sum(len(text.encode()) for text in texts), 4),
        "held_out_modules": sorted({file.module for file in files if file.held_out}),
        "sample": sample(model, tokenizer),
    }


@torch.inference_mode()
def sample(model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the model writes after `def `, always its most likely next token."""
    ids = torch.tensor([tokenizer("def ")["input_ids"]])
    return str(tokenizer.decode(model.generate(ids, max_new_tokens=120, do_sample=False)[0], skip_special_tokens=True))


def write_licence(folder: Path) -> None:
    shutil.copy(library_folder() / "LICENSE.txt", folder / "LICENSE.psf")
    (folder / "NOTICE").write_text(NOTICE.format(version=platform.python_version()), encoding="utf-8")


NOTICE = """The datasets in data/ hold excerpts of the Python {version} standard library, and the weights in model/ were
trained on it. Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. Used under the PSF License
Agreement in LICENSE.psf.

Changes: functions were taken out of their files; headers were brought onto one line; docstrings were moved into the
request or removed; licence banners, ruler comments and generated tables were left out of the training text.
"""


def card(facts: dict[str, Any], counts: dict[str, dict[str, int]], dropped: dict[str, int]) -> str:
    """The model card: what it is, how good it is, what it has not seen, and how to build it again."""
    modules = ", ".join(f"`{module}`" for module in facts["held_out_modules"])
    return f"""---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---

# starter

A causal language model of {facts["parameters"]:,} parameters, so that the first run of lorasmith needs no network.
Llama architecture, byte-level BPE with {VOCABULARY_SIZE:,} tokens, ChatML template, context 1,024.
Trained on the source of the Python {platform.python_version()} standard library, and nothing else. It writes text that looks
like Python; it knows nothing about the world, and it is no assistant.

| held-out modules | |
|---|---|
| perplexity per token | {facts["held_out_perplexity"]} ({facts["held_out_tokens"]:,} tokens, windows of 1,024) |
| bits per byte | {facts["held_out_bits_per_byte"]} |

Greedy continuation of `def `:

```python
{facts["sample"]}
```

## Training text

Every module of the library but tests, codec tables and generated data, without licence banners and ruler comments.
Some of its functions also as chat turns, so that the template and its stop token are trained: *{DOCSTRING_INSTRUCTION}*,
*{COMPLETION_INSTRUCTION}* and *{REPEAT_INSTRUCTION}* with code or a list of names (most of them made from pieces of the
library's names), as a model of this size recalls names rather than copies them. For the same reason no token joins a space
to the word behind it: a name is the same tokens wherever it stands.

Held out as a whole: {modules}.

The text holds no turn of the demo's form and no 13-gram of a test row. `tools/starter/datasets.py` checks it;
{dropped["signatures"]} signatures and {dropped["interactions"]} interactions from held-out modules were left out because of that.

| dataset | train | val | test (held-out modules) |
|---|---|---|---|
| signatures | {counts["signatures"]["train"]:,} | {counts["signatures"]["val"]:,} | {counts["signatures"]["test"]:,} |
| interactions | {counts["interactions"]["train"]:,} | {counts["interactions"]["val"]:,} | {counts["interactions"]["test"]:,} |

## Build it again

With Python {platform.python_version()}, on 2 cores in about an hour:

```
make starter            # python -m tools.starter.build --tokens {facts["tokens"]}
```

Weights and data come from the Python standard library: PSF licence, see `LICENSE.psf` and `NOTICE` beside this folder.
"""


if __name__ == "__main__":
    main()

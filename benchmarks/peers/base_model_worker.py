"""Writes the base model and the first adapter that every worker loads: settings {"config", "folder", "seed"}.

Under the folder: `model/` (random weights as bf16 safetensors and a three-word tokenizer, which the peers insist on) and
`adapter/` (PEFT LoRA, A random, B zero). Runs in lorasmith's own environment.
"""

from __future__ import annotations

from pathlib import Path

import protocol
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that names a padding and an end token; no row is ever tokenized with it."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)


def main() -> None:
    settings, answers = protocol.begin()
    folder = Path(settings["folder"])
    config = AutoConfig.for_model(**settings["config"], pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config.dtype = torch.bfloat16
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", **settings["lora"])
    adapted = get_peft_model(model, lora)  # casts A and B to float32
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    parameters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    protocol.answer(answers, {"folder": str(folder), "lora_parameters": parameters})


if __name__ == "__main__":
    main()

"""What a model folder holds, read without loading it and without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from lorasmith.errors import InvalidModel
from lorasmith.files import read_json
from lorasmith.schemas.models import ModelFacts

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
QUANTIZATIONS = {
    *("aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "eetq", "fp8"),
    *("compressed-tensors", "fbgemm_fp8", "gptq", "higgs", "hqq", "mxfp4", "quanto", "spqr", "torchao", "vptq"),
}


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise `InvalidModel` naming what is missing: config, tokenizer or, if `weights` are needed, safetensors."""
    if not (folder / "config.json").is_file():
        raise InvalidModel(
            f"{folder} holds no config.json", hint="a model folder has config.json, tokenizer.json and *.safetensors"
        )
    check_config(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if weights and not files:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
            raise InvalidModel(
                f"{folder} has its weights in pickle files, which can run code when loaded",
                hint="convert them on a machine you trust: AutoModelForCausalLM.from_pretrained(F).save_pretrained(G)",
            )
        raise InvalidModel(f"{folder} holds no weights: expected *.safetensors", hint="was the download complete?")
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        missing = {name for name in read_json(index)["weight_map"].values() if not (folder / name).is_file()}
        if missing:
            raise InvalidModel(
                f"{folder} lacks {sorted(missing)[0]}, which its index names", hint="was the download complete?"
            )
    for path in files:
        safetensors_header(path)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise InvalidModel(f"{folder} holds no tokenizer: expected tokenizer.json")


def check_config(path: Path) -> None:
    """Raise `InvalidModel` for a config that names code to be fetched or run when the model is loaded.

    Code beside the model is named in many good configs (`auto_map`) and is never run; what these name is elsewhere, and
    libraries have run it unasked (CVE-2026-4372, CVE-2026-22807).
    """
    for field, value in nested_fields(read_json(path)):
        name = field.rpartition(".")[2]
        code_elsewhere = name == "auto_map" and "--" in json.dumps(value)
        kernel = "attn_implementation" in name and not all(
            choice is None or isinstance(choice, bool) or is_plain(choice)
            for choice in (value.values() if isinstance(value, dict) else [value])
        )
        method = name == "quant_method" and value not in QUANTIZATIONS
        kind = name == "model_type" and not is_plain(value)
        if code_elsewhere or kernel or method or kind or name in ("custom_pipelines", "_attn_implementation_internal"):
            raise InvalidModel(
                f"{path} has {field}={json.dumps(value)[:100]}, which names code that is not lorasmith's or transformers' own",
                hint="take the field out if you trust the weights",
            )


def nested_fields(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`text_config.model_type`, value) of a config and of the configs in it."""
    for name, value in values.items() if isinstance(values, dict) else ():
        yield f"{prefix}{name}", value
        yield from nested_fields(value, f"{prefix}{name}.")


def is_plain(value: Any) -> bool:
    return isinstance(value, str) and PLAIN_NAME.fullmatch(value) is not None


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name → {dtype, shape, data_offsets}; raises `InvalidModel` when the file is cut off or is something else.

    Format: 8 bytes little-endian header length, the header as JSON, the data
    (https://github.com/huggingface/safetensors).
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise InvalidModel(
                f"{path} is damaged: {size} bytes, its header says more", hint="copy or download it again"
            )
        try:
            header: dict[str, Any] = json.loads(handle.read(length))
        except ValueError as error:
            raise InvalidModel(f"{path} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise InvalidModel(f"{path} is damaged: {size} bytes instead of {expected}", hint="copy or download it again")
    return header


def read_facts(folder: Path) -> ModelFacts:
    """Architecture, size and context of a model folder."""
    check_model_folder(folder)
    config = read_json(folder / "config.json")
    tensors = [entry for path in sorted(folder.glob("*.safetensors")) for entry in safetensors_header(path).values()]
    tokenizer_config = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file() or (
        tokenizer_config.is_file() and bool(read_json(tokenizer_config).get("chat_template"))
    )
    return ModelFacts(
        architecture=(config.get("architectures") or ["unknown"])[0],
        model_type=config.get("model_type", "unknown"),
        parameters=sum(prod(entry["shape"]) for entry in tensors),
        weights_bytes=sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors),
        dtype=str(max((entry["dtype"] for entry in tensors), key=[entry["dtype"] for entry in tensors].count)),
        context_tokens=config.get("max_position_embeddings"),
        vocabulary_size=config.get("vocab_size"),
        has_chat_template=template,
    )

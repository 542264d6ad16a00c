"""What a model folder holds, read without loading it and without torch."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from lorasmith.errors import InvalidModel
from lorasmith.model_configs import check_configs, check_model_config, is_plain, read_object
from lorasmith.schemas.models import ModelFacts

LARGEST_HEADER_BYTES = 100_000_000  # as the safetensors library has it


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise `InvalidModel` for a folder that must not or cannot be loaded as a causal language model.

    It has a config, a tokenizer and, if `weights` are needed, safetensors; none of its files names code or files from elsewhere.
    """
    if not (folder / "config.json").is_file():
        raise InvalidModel(
            f"{folder} holds no config.json", hint="a model folder has config.json, tokenizer.json and *.safetensors"
        )
    check_configs(folder)
    check_model_config(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise InvalidModel(
            f"{folder} holds an adapter beside the model, which transformers would put on it unasked",
            hint="move adapter_config.json and adapter_model.safetensors into a folder of their own",
        )
    files = sorted(folder.glob("*.safetensors"))
    if weights and not files:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
            raise InvalidModel(
                f"{folder} has its weights in pickle files, which can run code when loaded",
                hint="convert them on a machine you trust: AutoModelForCausalLM.from_pretrained(F).save_pretrained(G)",
            )
        raise InvalidModel(
            f"{folder} holds no weights: expected *.safetensors",
            hint="was the download complete? Weights in pickle files are not fetched",
        )
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        check_index(index)
    for path in files:
        safetensors_header(path)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise InvalidModel(f"{folder} holds no tokenizer: expected tokenizer.json")


def check_index(path: Path) -> None:
    """Raise `InvalidModel` for an index that names shards elsewhere, of another format, or not there."""
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict):
        raise InvalidModel(f"{path} has no weight_map", hint="copy or download it again")
    for name in sorted({json.dumps(name) for name in shards.values()}):
        shard = json.loads(name)
        if not is_plain(shard) or not shard.endswith(".safetensors"):
            raise InvalidModel(f"{path} names {name[:100]}, expected a safetensors file of its folder")
        if not (path.parent / shard).is_file():
            raise InvalidModel(f"{path.parent} lacks {shard}, which its index names", hint="was the download complete?")


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
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes")
            header: dict[str, Any] = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidModel(f"{path} is not a safetensors file: {error}") from error
    if size != expected:
        raise InvalidModel(f"{path} is damaged: {size} bytes instead of {expected}", hint="copy or download it again")
    return header


def read_facts(folder: Path) -> ModelFacts:
    """Architecture, size and context of a model folder."""
    check_model_folder(folder)
    config = read_object(folder / "config.json")
    tensors = [entry for path in sorted(folder.glob("*.safetensors")) for entry in safetensors_header(path).values()]
    tokenizer_config = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file() or (
        tokenizer_config.is_file() and bool(read_object(tokenizer_config).get("chat_template"))
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

"""Base models and adapters from folders or the hub: checked before they are loaded, safetensors only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.models.device import CPU
from lorasmith.engine.models.precision import DTYPES, Precision, choose_weights
from lorasmith.engine.models.quantized_loading import half_bytes, load_quantized_model
from lorasmith.errors import InvalidModel, NotFound
from lorasmith.files import FULL, disk_code, read_json
from lorasmith.model_configs import check_adapter_config, check_configs
from lorasmith.model_files import check_model_folder

ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_PATTERN = "*.safetensors"
HUB_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]  # no code, no pickles
SUBFOLDERS = "*/*"  # of a hub repository: the same weights in other formats


def model_folder(location: str, *, weights: bool = True) -> Path:
    """The local folder of a model, checked; a hub id is fetched into the Hugging Face cache, or found there when offline.

    Without `weights` everything else is fetched.
    """
    folder = Path(location) if Path(location).is_dir() else fetched(location, weights=weights)
    check_model_folder(folder, weights=weights)
    return folder


def fetched(location: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [*HUB_PATTERNS, *([WEIGHT_PATTERN] if weights else [])]
        return Path(snapshot_download(location, allow_patterns=wanted, ignore_patterns=SUBFOLDERS))
    except HFValidationError:
        raise NotFound(f"no model folder {location}", hint="give a folder, a hub id or `starter`") from None
    except LocalEntryNotFoundError as error:
        raise NotFound(
            f"model {location!r} is neither a folder nor in the Hugging Face cache, and the hub could not be reached",
            hint="check the spelling and the network, or copy the model into a folder and give its path",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise NotFound(f"could not get model {location!r} from the hub: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Of a model or an adapter. Raises `InvalidModel` where its files name code or files from elsewhere."""
    check_configs(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InvalidModel(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    return tokenizer


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device = CPU,
) -> PreTrainedModel:
    """A causal LM in eval mode on `device`, every weight from the folder; raises `InvalidModel` when one is missing."""
    check_model_folder(folder)
    if quantization is not None:
        return load_quantized_model(folder, dtype, quantization, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # else a pickle beside them could be chosen
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        if disk_code(error) in FULL:
            raise  # of the log, where transformers shows how far it is
        raise InvalidModel(f"{folder} cannot be loaded as a causal language model: {error}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InvalidModel(f"{folder} lacks {len(missing)} weights, the first is {missing[0]!r}")
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def load_within_memory(folder: Path, precision: Precision) -> PreTrainedModel:
    """`load_model` of a checked folder, in the 16 bits of its file where fp32 would fill half of the free memory: slower, the same."""
    stored = choose_weights("auto", precision, half_bytes(folder)) == "stored"
    return load_model(folder, DTYPES[precision], AS_STORED if stored else None)


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a PEFT adapter on a model. Raises `InvalidModel` unless every adapter tensor lands and every target has one."""
    if not (folder / "adapter_config.json").is_file():
        raise InvalidModel(f"{folder} holds no adapter_config.json", hint="an adapter is a PEFT folder")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InvalidModel(f"{folder} holds no {ADAPTER_WEIGHTS}")
    check_configs(folder)
    check_adapter_config(folder / "adapter_config.json")
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        stored = set(weights.keys())
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise InvalidModel(f"{folder} does not fit {type(model).__name__}: {error}") from error
    # "auto", the default, asks the hub for the base's config
    required = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    possible = set(get_peft_model_state_dict(wrapped, save_embedding_layers=True))
    missing, unexpected = sorted(required - stored), sorted(stored - possible)
    if missing or unexpected:
        raise InvalidModel(
            f"{folder} does not fit {type(model).__name__}: {len(missing)} tensors missing"
            f"{f' (first {missing[0]!r})' if missing else ''}, {len(unexpected)} without a place",
            hint="the adapter was trained on another base model",
        )
    if not trainable:
        wrapped.eval()
    return wrapped


def check_base(adapter_folder: Path, base_folder: Path) -> None:
    """Raise `InvalidModel` when the adapter's passport says that it was trained on other weights."""
    passport = adapter_folder / "passport.json"
    if passport.is_file() and read_json(passport)["base_fingerprint"] != base_fingerprint(base_folder):
        raise InvalidModel(
            f"the adapter in {adapter_folder} was trained on other weights than {base_folder} holds now",
            hint="give the base model that it was trained on, or train it again",
        )


def other_precision(adapter_folder: Path, quantization: Quantization | None) -> str | None:
    """What to know where the passport says that the adapter was trained on a base stored otherwise than `quantization`."""
    passport = adapter_folder / "passport.json"
    facts = read_json(passport) if passport.is_file() else {}
    if "base_quantization" not in facts:
        return None  # not trained here
    stored = facts["base_quantization"]
    trained = Quantization.named(stored["quantization"], stored["double_quantization"]) if stored else None
    if str(trained) == str(quantization):
        return None
    return (
        f"the adapter was trained on its base in {trained or 'full precision'}, and here the base is in "
        f"{quantization or 'full precision'}: answers differ from those in training by what quantising takes away"
    )


def eos_token_ids(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens on which generation stops: the tokenizer's and the generation config's."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(configured, int):
        ids.add(configured)
    elif configured:
        ids.update(int(token) for token in configured)
    return ids


def context_tokens(model: PreTrainedModel) -> int | None:
    """Positions that the model was built for, or None where its config does not say."""
    value = getattr(model.config, "max_position_embeddings", None)
    return int(value) if value else None


def base_fingerprint(folder: Path) -> str:
    """Digest of config and weights, cheap for large models.

    sha256 over config.json and, for each weight file, its size, its safetensors header and 16 evenly spaced
    blocks of 64 KiB: a different or fine-tuned checkpoint of the same shape gets another value.
    """
    digest = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(header_bytes))
            for block in range(16):
                handle.seek(8 + header_bytes + (size - 8 - header_bytes) * block // 16)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()

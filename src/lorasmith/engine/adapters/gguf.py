"""One GGUF file from a merged model: metadata, vocabulary, tensors, and reading it back.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import dequantize
from transformers import PreTrainedModel

from lorasmith.engine.adapters.gguf_tensors import (
    architecture,
    decode_tensor,
    embedding_rows,
    encode_tensor,
    places,
    tensor_type,
)
from lorasmith.engine.adapters.gguf_vocabulary import Vocabulary
from lorasmith.engine.models.loading import context_tokens
from lorasmith.errors import Conflict, InvalidModel, JobFailed
from lorasmith.files import disk_errors, disk_full, fsync_folder
from lorasmith.schemas.adapters import QuantizationType

FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
PROOF_KEY = "lorasmith.export_proof"
PROOF_BYTES = 8192  # reserved in the file, as the proof is known only once the file is written
# Largest rounding error of a stored weight: as a share of the largest weight of its tensor, and absolute
ROUNDING = {
    GGMLQuantizationType.F32: (0.0, 0.0),
    GGMLQuantizationType.F16: (2**-11, 2**-25),
    # half a step of a block of 127 steps, and the scale that makes a step is rounded to float16
    GGMLQuantizationType.Q8_0: (0.5 / 127 + 2**-11, 127 * 2**-25),
}


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield `<path>.tmp`, which on success becomes `path`; on an error nothing remains. `Conflict` if `path` exists."""
    if path.exists():
        raise Conflict(f"{path} exists already", hint="choose another place, or remove it first")
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as handle:
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is None and "written" in str(error):
                raise disk_full(path) from error  # numpy reports a short write without an errno
            raise


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    quantization: QuantizationType,
    *,
    name: str,
    license: str | None,
) -> None:
    """Write a float32 model, each weight rounded once. Tensors are encoded one at a time, as they are written."""
    writer = GGUFWriter(path, architecture(model))
    try:
        add_metadata(writer, model, quantization, name=name, license=license)
        add_vocabulary(writer, vocabulary)
        writer.add_string(PROOF_KEY, " " * PROOF_BYTES)
        factors = rope_factors(model)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for place, tensor in places(model):
            add_tensor_info(writer, place.name, tensor.shape, tensor_type(place.name, tensor.shape, quantization))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for place, tensor in places(model):
            encoded = encode_tensor(place, tensor, tensor_type(place.name, tensor.shape, quantization))
            writer.write_tensor_data(encoded)
    finally:
        writer.close()


def add_metadata(
    writer: GGUFWriter, model: PreTrainedModel, quantization: QuantizationType, *, name: str, license: str | None
) -> None:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(embedding_rows(model))
    writer.add_context_length(usable_context_tokens(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def usable_context_tokens(model: PreTrainedModel) -> int:
    """Positions up to which llama.cpp answers as the model does: it has no sliding window in these architectures."""
    context = context_tokens(model)
    if context is None:
        raise InvalidModel("the model's config does not say how long its context is (max_position_embeddings)")
    slides = getattr(model.config, "use_sliding_window", True)
    window = getattr(model.config, "sliding_window", None) if slides else None
    return min(context, window) if window else context


def rope_factors(model: PreTrainedModel) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """By what llama.cpp must divide each rotary frequency, (head_dim / 2,); None where it computes them by itself."""
    parameters = model.config.rope_parameters
    kind = parameters["rope_type"]
    supported = {"default", "linear"} | ({"llama3"} if architecture(model) == "llama" else set())
    if kind not in supported or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidModel(
            f"GGUF export does not support rotary positions of type {kind!r} for {model.config.model_type!r}; "
            f"supported: {', '.join(sorted(supported))} over the whole head"
        )
    if kind != "llama3":
        return None
    rotary: Any = model.base_model.rotary_emb
    scaled = rotary.inv_freq.double().cpu()
    plain = parameters["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    factors: np.ndarray[Any, np.dtype[np.float32]] = (plain / scaled).float().numpy()
    return factors


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for kind, id in vocabulary.ids.items():
        getattr(writer, f"add_{kind}_token_id")(id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def add_tensor_info(writer: GGUFWriter, name: str, shape: torch.Size, type: GGMLQuantizationType) -> None:
    values = shape.numel()
    match type:
        case GGMLQuantizationType.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * values)
        case GGMLQuantizationType.F16:
            writer.add_tensor_info(name, shape, np.dtype(np.float16), 2 * values)
        case GGMLQuantizationType.Q8_0:
            row_bytes = shape[-1] // 32 * 34  # per 32 weights: a float16 scale and 32 int8
            byte_shape = (*shape[:-1], row_bytes)
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), values // 32 * 34, raw_dtype=type)


@torch.no_grad()
def read_back(path: Path, model: PreTrainedModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """Compare the file with the model it was written from, then leave the file's weights in the model.

    Returns the number of tensors and tokens, the tensors of each type, and the largest error of a weight.
    Raises `JobFailed` when something is missing or off by more than rounding.
    """
    reader = GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    stored.pop("rope_freqs.weight", None)
    types: dict[str, int] = {}
    worst: dict[str, Any] = {"tensor": "", "error": 0.0}
    for place, parameter in places(model):
        tensor = stored.pop(place.name, None)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != tuple(parameter.shape):
            raise damaged(f"tensor {place.name!r} is missing or has another shape")
        values = decode_tensor(place, dequantize(tensor.data, tensor.tensor_type))
        error, largest = (values - parameter).abs().max().item(), parameter.abs().max().item()
        relative, absolute = ROUNDING[tensor.tensor_type]
        if not error <= relative * largest + absolute:
            raise damaged(f"tensor {place.name!r} is off by {error:.3g}, its largest weight is {largest:.3g}")
        if error >= worst["error"]:
            worst = {"tensor": place.name, "error": error, "largest_weight": largest}
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        parameter.copy_(values)
    if stored:
        raise damaged(f"tensor {next(iter(stored))!r} has no counterpart in the model")
    field = reader.get_field("tokenizer.ggml.tokens")
    tokens = len(field.data) if field is not None else 0
    if tokens != len(vocabulary.tokens):
        raise damaged(f"it holds {tokens} tokens, the model has {len(vocabulary.tokens)}")
    return {"tensors": sum(types.values()), "types": types, "tokens": tokens, "largest_weight_error": worst}


def damaged(what: str) -> JobFailed:
    return JobFailed(
        f"export proof failed: the GGUF read back differs: {what}; nothing was written",
        code="export_proof_failed",
        hint="check the disk, then report this as a bug",
    )


def write_proof(path: Path, checks: dict[str, Any]) -> None:
    """Put the checks, as JSON padded with spaces, into the bytes that the file keeps for them."""
    text = json.dumps(checks).encode().ljust(PROOF_BYTES)
    if len(text) > PROOF_BYTES:
        raise ValueError(f"the export proof has {len(text)} bytes, the file keeps {PROOF_BYTES}")
    reader = GGUFReader(path, "r+")
    field = reader.get_field(PROOF_KEY)
    assert field is not None
    field.parts[-1][:] = np.frombuffer(text, dtype=np.uint8)
    reader.data.flush()


def read_proof(path: Path) -> dict[str, Any] | None:
    """What `write_proof` put into a file; None for a file that is another's."""
    try:
        field = GGUFReader(path).get_field(PROOF_KEY)
        found = json.loads(bytes(field.parts[-1])) if field is not None else None
    except (ValueError, IndexError):  # no GGUF, or one that was cut off
        return None
    return found if isinstance(found, dict) else None

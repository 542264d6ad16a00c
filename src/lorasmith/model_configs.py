"""What the JSON files of a model or adapter folder may say: what transformers itself implements, and nothing from elsewhere.

Libraries have run code and opened files that such a file names, unasked (CVE-2026-4372, CVE-2026-22807). Names of the folder's own
code (`auto_map`) stand in many good files; they are allowed beside a class that transformers has, and never followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lorasmith.errors import InvalidData, InvalidModel, did_you_mean
from lorasmith.files import read_json
from lorasmith.model_families import architectures, causal_models, quantization_methods, tokenizer_classes

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
)
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
CODE_FIELDS = ("custom_pipelines", "custom_generate", "configuration_files", "init_inputs", "megatron_config")
ADAPTER_KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR")  # whose configs name no other adapter, tokenizer or file
LIBRARIES = ("transformers", "peft", "torch")


def check_configs(folder: Path) -> None:
    """Raise `InvalidModel` for a file that names code or files from elsewhere, before anything of the folder is loaded."""
    check_links(folder)
    for name in JSON_FILES:
        if (folder / name).is_file():
            check_fields(folder / name)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            check_tokenizer_class(folder / name)


def check_model_config(path: Path) -> None:
    """Raise `InvalidModel` unless a `config.json` describes a causal language model that transformers implements."""
    config = read_object(path)
    kind, known = config.get("model_type"), causal_models()
    if not isinstance(kind, str) or not is_plain(kind):
        refuse(
            path, "model_type", kind, "the name of a model family", "was the config.json saved with save_pretrained?"
        )
    if known is None:
        return  # without transformers nothing is loaded; the engine, which has it, checks again
    if kind not in known:
        refuse(
            path,
            "model_type",
            kind,
            f"one of the {len(known)} families of causal language models that transformers implements{did_you_mean(kind, known)}",
            "pip install -U transformers where the family is new; code of the model's own is not run",
        )
    named = config.get("architectures") or []
    own = sorted(known[kind])[0]
    if not isinstance(named, list) or not all(isinstance(name, str) and name in architectures(kind) for name in named):
        refuse(
            path,
            "architectures",
            named,
            f"a causal language model of the type {kind}, which transformers has as {own}",
            f'where the weights are those of a {own}, write "architectures": ["{own}"]; weights of another task cannot be trained',
        )


def check_adapter_config(path: Path) -> None:
    """Raise `InvalidModel` for an adapter that would bring other files, tokenizers or modules with it.

    `base_model_name_or_path` is for the reader: the base is the one that the caller names.
    """
    config = read_object(path)
    if config.get("peft_type") not in ADAPTER_KINDS:
        refuse(path, "peft_type", config.get("peft_type"), f"one of {', '.join(ADAPTER_KINDS)}", "train a LoRA adapter")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library", "transformers") if isinstance(mapping, dict) else mapping
    if not isinstance(library, str) or library.partition(".")[0] not in LIBRARIES:
        refuse(path, "auto_mapping.parent_library", library, f"a module of {', '.join(LIBRARIES)}", "write null")


def check_fields(path: Path) -> None:
    """The rules that hold for each field of each file, in objects and lists below it too."""
    methods = quantization_methods()
    for field, value in nested_fields(read_object(path)):
        name = field.rpartition(".")[2]
        choices = list(value.values()) if isinstance(value, dict) else [value]
        if name == "auto_map" and "--" in json.dumps(value):
            refuse(path, field, value, "code of this folder", "take the field out: it names code of another repository")
        if "implementation" in name and not all(
            one is None or isinstance(one, bool) or is_plain(one) for one in choices
        ):
            refuse(path, field, value, "a plain name such as sdpa", "take the field out: kernels are not fetched")
        if name == "_attn_implementation_internal" or (name in CODE_FIELDS and value):
            refuse(path, field, value, "nothing", "take the field out if you trust the weights")
        if "remote_code" in name and value:
            refuse(path, field, value, "false", "take the field out: code of the model's own is not run")
        if name == "model_type" and value != "" and not is_plain(value):  # "" names nothing, as parts of an MPT do
            refuse(path, field, value, "the name of a model family", "take the field out if you trust the weights")
        if name == "quant_method" and not (
            is_plain(value) if methods is None else is_plain(value) and value in methods
        ):
            refuse(path, field, value, "a method of transformers", "use the model as it was before it was quantised")
        if name.endswith("_file") and not names_own_file(path.parent, name, value):
            refuse(path, field, value, "a file of this folder", "write null: the folder's own files are found by name")
        if name == "fast_tokenizer_files" and not (isinstance(value, list) and all(map(is_plain, value))):
            refuse(path, field, value, "files of this folder", "take the field out")


def names_own_file(folder: Path, name: str, value: Any) -> bool:
    """Old files of tokenizers hold the paths of the machine that wrote them, which transformers no longer reads: these may stay."""
    written_once = name == "special_tokens_map_file" or (
        name == "tokenizer_file" and (folder / "tokenizer.json").is_file()
    )
    return value is None or written_once or is_plain(value)


def check_tokenizer_class(path: Path) -> None:
    """transformers would load whatever class of its own has the name, also those that read pickles."""
    name, known = read_object(path).get("tokenizer_class"), tokenizer_classes()
    if name is None or (isinstance(name, str) and (known is None or name.removesuffix("Fast") in known)):
        return
    refuse(
        path,
        "tokenizer_class",
        name,
        "a tokenizer of transformers" + (did_you_mean(name, known or ()) if isinstance(name, str) else ""),
        'where tokenizer.json holds all of it, write "PreTrainedTokenizerFast"; code of the tokenizer\'s own is not run',
    )


def check_links(folder: Path) -> None:
    """Raise `InvalidModel` for a text file that is a link out of its folder: its words would go into adapters and exports.

    In the cache of the hub each file is a link to `blobs` of its own repository.
    """
    home = folder.resolve()
    inside = home.parent.parent if home.parent.name == "snapshots" else home
    for path in (path for pattern in TEXT_FILES for path in folder.glob(pattern)):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise InvalidModel(f"{path} is a link to {path.resolve()}, out of its folder", hint="copy the file there")


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (InvalidData, RecursionError) as error:
        raise InvalidModel(f"{path} is not valid JSON: {error}", hint="copy or download it again") from error
    if not isinstance(found, dict):
        raise InvalidModel(f"{path} holds {type(found).__name__}, expected an object", hint="copy or download it again")
    return found


def nested_fields(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`text_config.model_type`, value) of an object and of those in it; parts of a list have its name."""
    left = [(prefix, values)]
    while left:
        above, value = left.pop()
        if isinstance(value, list):
            left += [(above, part) for part in value]
        elif isinstance(value, dict):
            for name, part in value.items():
                yield f"{above}{name}", part
                left.append((f"{above}{name}.", part))


def is_plain(value: Any) -> bool:
    return isinstance(value, str) and PLAIN_NAME.fullmatch(value) is not None


def refuse(path: Path, field: str, value: Any, expected: str, way_out: str) -> NoReturn:
    raise InvalidModel(f"{path} has {field}={json.dumps(value)[:100]}, expected {expected}", hint=way_out)

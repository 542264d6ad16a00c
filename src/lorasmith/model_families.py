"""What the installed transformers implements, read from its source files: nothing of it is imported, nor torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lorasmith.errors import InvalidModel

MODELS = "models/auto/modeling_auto.py"
TOKENIZERS = "models/auto/tokenization_auto.py"
QUANTIZERS = "quantizers/auto.py"
ALSO_TEXT = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
PLAIN_TOKENIZERS = {
    "TokenizersBackend",
    "PythonBackend",
    "SentencePieceBackend",
    "PreTrainedTokenizer",
    "BloomTokenizer",
}

Table = dict[str, frozenset[str]]


def causal_models() -> Table | None:
    """`model_type` → the class that it is loaded as for causal language modelling. None without transformers."""
    return table(MODELS, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@cache
def architectures(model_type: str) -> frozenset[str]:
    """The classes whose weights hold a language model of that type: with its head, without it, and with eyes."""
    tables = [causal_models(), *(table(MODELS, name, needed=False) for name in ALSO_TEXT)]
    return frozenset().union(*(found.get(model_type, frozenset()) for found in tables if found))


@cache
def tokenizer_classes() -> frozenset[str] | None:
    """Names of tokenizer classes, without the `Fast` at their end. None without transformers."""
    found = table(TOKENIZERS, "TOKENIZER_MAPPING_NAMES")
    if found is None:
        return None
    return frozenset(name.removesuffix("Fast") for names in found.values() for name in names) | PLAIN_TOKENIZERS


@cache
def quantization_methods() -> frozenset[str] | None:
    """Values of `quant_method`. None without transformers."""
    found = table(QUANTIZERS, "AUTO_QUANTIZATION_CONFIG_MAPPING")
    return None if found is None else frozenset(found) | {"bitsandbytes"}  # whose 4 and 8 bits are two keys there


@cache
def table(file: str, name: str, *, needed: bool = True) -> Table | None:
    """The dictionary that a module of transformers calls `name`: each key with the names in its value.

    None where transformers is not installed. Raises `InvalidModel` where it has no such dictionary and it is `needed`.
    """
    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / file
    found = dict(entries(parsed(path), name)) if path.is_file() else {}
    if needed and not found:
        raise InvalidModel(
            f"the installed transformers has no {name} in {file}, so what it implements is not known",
            hint="pip install -U lorasmith transformers",
        )
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """Takes a tenth of a second for the largest."""
    return ast.parse(path.read_text(encoding="utf-8"))


def entries(module: ast.Module, name: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Of `name = OrderedDict([(key, value), …])`, `name = {…}` and `name.update({…})`, whatever is not a plain key left out."""
    for statement in module.body:
        value = getattr(statement, "value", None)
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if isinstance(value, ast.Call):
            called = value.func
            named = named or (
                isinstance(called, ast.Attribute)
                and called.attr == "update"
                and isinstance(called.value, ast.Name)
                and called.value.id == name
            )
            value = value.args[0] if value.args else None
        if not named:
            continue
        if isinstance(value, ast.Dict):
            pairs = list(zip(value.keys, value.values, strict=True))
        elif isinstance(value, ast.List):
            pairs = [
                (one.elts[0], one.elts[1]) for one in value.elts if isinstance(one, ast.Tuple) and len(one.elts) == 2
            ]
        else:
            continue
        for key, names in pairs:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, frozenset(strings(names))


def strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value

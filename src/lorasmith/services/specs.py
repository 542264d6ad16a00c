"""From YAML, presets, flags and `--set` to a validated spec, with errors that name the field and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lorasmith.errors import InvalidSpec, NotFound, did_you_mean
from lorasmith.schemas.training import SAID_OTHERWISE

Spec = TypeVar("Spec", bound=BaseModel)


def parse_spec(kind: type[Spec], values: dict[str, Any]) -> Spec:
    """Validate; raises `InvalidSpec` that lists every wrong field, with a near name for unknown ones."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(describe(kind, problem) for problem in error.errors()))
        unknown = [problem["loc"][:-1] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        parent = nested_model(kind, [str(part) for part in unknown[0]]) if unknown else None
        hint = f"fields: {', '.join(field_names(parent))}" if parent else None
        raise InvalidSpec("; ".join(problems), hint=hint) from error


def describe(kind: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        *section, name = location
        if name in SAID_OTHERWISE:
            return f"there is no field {path!r}; say {SAID_OTHERWISE[name]}"
        elsewhere = [place for place in spellings(kind) if place.rpartition(".")[2] == name]
        if elsewhere:
            return f"there is no field {path!r}; did you mean {elsewhere[0]!r}?"
        prefix = "".join(f"{part}." for part in section)
        beside = [place for place in spellings(kind) if place.startswith(prefix)]
        near = did_you_mean(name, [place.removeprefix(prefix) for place in beside])
        near = near.replace("mean '", f"mean '{prefix}")
        return f"there is no field {path!r}{near}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path} has to be a mapping of fields, got {problem['input']!r}"
    return f"{path}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"


def spellings(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Paths of all fields, those of sections and other spellings too."""
    found = []
    for name, field in kind.model_fields.items():
        found += [prefix + str(one) for one in dict.fromkeys([name, *getattr(field.validation_alias, "choices", [])])]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += spellings(field.annotation, f"{prefix}{name}.")
    return found


def nested_model(kind: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        field: FieldInfo | None = kind.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        kind = field.annotation
    return kind


def field_names(kind: type[BaseModel]) -> list[str]:
    return list(kind.model_fields)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; raises `NotFound` or `InvalidSpec` naming file and line."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no config file {path}") from None
    except OSError as error:
        raise InvalidSpec(f"{path} cannot be read: {error.strerror}", hint="give a YAML file") from error
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise InvalidSpec(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InvalidSpec(f"{path} must hold a mapping of fields, found {type(values).__name__}")
    return values


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win, field by field, inside sections too."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = merge(merged[key], value)
            else:
                merged[key] = value
    return merged


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`lora.rank=16` → {"lora": {"rank": 16}}; values are YAML, so numbers, lists and booleans come out as such."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise InvalidSpec(f"--set takes field=value, got {assignment!r}", hint="for example --set lora.rank=16")
        target = values
        *sections, name = path.split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise InvalidSpec(f"--set {assignment} sets a field of {section!r}, which has been set to {target!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidSpec(
                f"--set {assignment}: the value is not valid YAML", hint="lists are [a, b], mappings {a: 1}"
            ) from error
        target[name] = value if text.lstrip().startswith(("'", '"')) else number(value)
    return values


def number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as text, as it has no dot; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

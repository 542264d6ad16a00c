"""Write the generated reference pages: commands from the command line itself, fields and presets from the schemas."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from lorasmith.cli.app import app
from lorasmith.schemas.training import LoRASpec, TrainingSettings, TrainingSpec
from lorasmith.schemas.training_presets import PRESETS
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings, Settings
from tools.api_coverage import coverage_page

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTICE = "<!-- Written by `make docs`; change the source instead. -->\n"
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def main() -> None:
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
        print(REFERENCE / name)


def pages() -> dict[str, str]:
    """File name below `docs/reference` to its text."""
    document = api_document()
    return {
        "commands.md": commands_page(),
        "training.md": training_page(),
        "openapi.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        "api-coverage.md": coverage_page(document),
    }


def api_document() -> dict[str, Any]:
    """What the server answers on /api/v1/openapi.json."""
    from lorasmith.api.app import create_app

    with TemporaryDirectory() as folder:
        return create_app(Workbench.open(Settings(home=Path(folder))), ServerSettings()).openapi()


def commands_page() -> str:
    root = get_command(app)
    parts = [
        f"# Commands\n\n{NOTICE}",
        "What `lorasmith COMMAND --help` says, on one page. Data goes to stdout, progress and hints go to stderr; "
        "exit codes are in [Errors](errors.md).\n",
        "## lorasmith\n",
        f"{root.help}\n",
        "```text\nlorasmith [OPTIONS] COMMAND [ARGS]...\n```\n",
        parameters_table(root.params),
        "These stand before the command: `lorasmith --home work train …`.\n",
    ]
    for path, command in leaves(root, "lorasmith"):
        usage = " ".join([path, *(["[OPTIONS]"] if options(command.params) else []), *arguments(command.params)])
        parts += [f"## {path}\n", f"{command.help}\n", f"```text\n{usage}\n```\n", parameters_table(command.params)]
    return "\n".join(part for part in parts if part)


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, in the order in which help lists them."""
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from leaves(child, f"{path} {name}")
        else:
            yield f"{path} {name}", child


def options(params: list[Any]) -> list[Any]:
    return [param for param in params if param.opts[0].startswith("-")]


def arguments(params: list[Any]) -> list[str]:
    names = [(param.metavar or param.name.upper(), param.required) for param in params if param not in options(params)]
    return [name if required else f"[{name}]" for name, required in names]


def parameters_table(params: list[Any]) -> str:
    rows = []
    for param in params:
        if param in options(params):
            name = ", ".join(f"`{opt}`" for opt in [*param.opts, *param.secondary_opts])
        else:
            name = f"`{param.metavar or param.name.upper()}`"
        flag = getattr(param, "is_flag", False) and not param.secondary_opts
        default = "required" if param.required else "" if flag else code(param.default)
        rows.append([name, param.help or "", default])
    return table(["", "what it does", "default"], rows) if rows else ""


def training_page() -> str:
    parts = [
        f"# Fields of a training run\n\n{NOTICE}",
        "These are the fields of a YAML file for `lorasmith train --config`, of `--set section.field=value`, and of "
        "`lorasmith.LoRATrainer.train`. A later source wins, field by field: preset, YAML file, flags, `--set`. "
        "`--dry-run` prints the run with every field filled in.\n",
        "## The run\n",
        fields_table(TrainingSpec, leave_out={"lora", "training"}),
        "## lora\n",
        f"{LoRASpec.__doc__}\n",
        fields_table(LoRASpec),
        "## training\n",
        f"{TrainingSettings.__doc__}\n",
        fields_table(TrainingSettings),
        "## Presets\n",
        "`--preset NAME`. A field that a preset leaves empty has the default of the tables above; `tiny` is for models "
        "of a few million parameters, such as `starter`.\n",
        presets_table(),
    ]
    return "\n".join(parts)


def fields_table(model: type[BaseModel], leave_out: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    rows = []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        names = [f"`{name}`", *(f"`{alias}`" for alias in aliases(field) if alias != name)]
        default = "required" if field.default is PydanticUndefined else code(field.default)
        rows.append([" or ".join(names), allowed(field), default, field.description or ""])
    return table(["field", "values", "default", "meaning"], rows)


def aliases(field: FieldInfo) -> list[str]:
    choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    return [str(choice) for choice in choices]


def allowed(field: FieldInfo) -> str:
    return bounded(field.annotation, field.metadata)


def bounded(annotation: Any, metadata: Iterable[Any]) -> str:
    """A type and its limits: `int, ≥ 1`."""
    limits = [
        f"{sign} {getattr(limit, key):g}"
        for bound in metadata
        for limit in (bound.metadata if isinstance(bound, FieldInfo) else [bound])
        for key, sign in [BOUNDS[type(limit)]]
    ]
    return ", ".join([type_name(annotation), *limits])


def type_name(annotation: Any) -> str:
    """`int`, `float`, `text`, or the values of a choice; without the None of an optional field."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (types.UnionType, Union):
        return " or ".join(type_name(kind) for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        return bounded(kind, metadata)
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return f"a list of {'names' if item is str else type_name(item)}"
    if get_origin(annotation) is dict:
        return f"names to {type_name(get_args(annotation)[1])}"
    return "text" if annotation is str else str(annotation.__name__)


def presets_table() -> str:
    fields = [
        (section, name)
        for section, model in (("lora", LoRASpec), ("training", TrainingSettings))
        for name in model.model_fields
        if any(name in preset.get(section, {}) for preset in PRESETS.values())
    ]
    rows = [
        [f"`{section}.{name}`", *(shown(preset.get(section, {}).get(name, "")) for preset in PRESETS.values())]
        for section, name in fields
    ]
    return table(["", *(f"`{name}`" for name in PRESETS)], rows)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def code(value: Any) -> str:
    """The value as it is written; an empty one is left out."""
    return "" if value is None or value in ([], {}) else f"`{shown(value)}`"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()

"""The seed's `LoRAConfig` and what its names mean on a loaded model. Importing this loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from lorasmith.engine.lora.targets import is_target, resolve_target_modules
from lorasmith.errors import InvalidSpec, did_you_mean
from lorasmith.schemas.training import InitialWeights

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class LoRATargetModules(StrEnum):
    """Names of the linear layers of Llama-like models."""

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"

    @classmethod
    def attention(cls) -> list[str]:
        return [cls.Q_PROJ, cls.V_PROJ, cls.K_PROJ, cls.O_PROJ]


@dataclass
class LoRAConfig:
    """Rank, scale and place of a low-rank adapter, https://arxiv.org/abs/2106.09685.

    The update of a weight (out, in) is `alpha / r · B A` with A (r, in) and B (out, r). The keys of `rank_pattern` and
    `alpha_pattern` are module names or regular expressions for the end of a module's path; `layers` are numbers from 0.
    """

    r: int = 8
    alpha: float = 32
    dropout: float = 0.1
    target_modules: list[str] | str = field(default_factory=LoRATargetModules.attention)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: list[int] | None = None
    modules_to_save: list[str] = field(default_factory=list)
    init: InitialWeights = "default"
    loftq_iterations: int = 1

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InvalidSpec(f"r must be at least 1, got {self.r}")
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise InvalidSpec(f"rank_pattern must hold ranks of at least 1, got {rank} for {key!r}")
        for key, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                raise InvalidSpec(f"alpha_pattern must hold values above 0, got {alpha} for {key!r}")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise InvalidSpec(f"layers must be numbers from 0, at least one, got {self.layers}", hint="None means all")
        if self.init not in get_args(InitialWeights):
            known = get_args(InitialWeights)
            raise InvalidSpec(f"no init {self.init!r}{did_you_mean(self.init, known)}", hint=", ".join(known))
        if self.loftq_iterations < 1:
            raise InvalidSpec(f"loftq_iterations must be at least 1, got {self.loftq_iterations}")
        if not 0 <= self.dropout < 1:
            raise InvalidSpec(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.target_modules:
            raise InvalidSpec("target_modules must name at least one module", hint="for example ['q_proj', 'v_proj']")
        if not isinstance(self.target_modules, str):
            self.target_modules = [str(name) for name in self.target_modules]

    def to_peft_config(self) -> LoraConfig:
        """The same as PEFT's own config, for a causal LM."""
        from peft import LoraConfig

        init: Any = True if self.init == "default" else self.init
        return LoraConfig(
            r=self.r,
            lora_alpha=whole(self.alpha),
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern={key: whole(alpha) for key, alpha in self.alpha_pattern.items()},
            layers_to_transform=self.layers,
            modules_to_save=self.modules_to_save or None,
            init_lora_weights=init,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRAConfig:
        """The inverse of `to_dict`; raises `InvalidSpec` on a field it does not know."""
        known = set(cls.__dataclass_fields__)
        for name in values:
            if name not in known:
                raise InvalidSpec(f"LoRAConfig has no field {name!r}{did_you_mean(name, known)}")
        return cls(**values)


Value = TypeVar("Value", int, float)


def whole(number: float) -> Any:
    """An int where nothing is lost: PEFT declares its alphas as int, and takes both."""
    return int(number) if float(number).is_integer() else number


def fit(config: LoRAConfig, model: PreTrainedModel) -> LoRAConfig:
    """The config with the names of this model's modules; raises `InvalidSpec` for whatever has no place in it."""
    targets = resolve_target_modules(model, config.target_modules)
    if config.init == "loftq" and not quantized_names(model):
        raise InvalidSpec(
            "init 'loftq' starts from what quantising the base loses, and this base is not quantised",
            hint="train with quantization='nf4', or with init='pissa'",
        )
    for name in config.modules_to_save:
        check_module_to_save(model, name, targets)
    shapes = adapted_shapes(model, targets, config.layers)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            check_pattern(field_name, key, shapes)
    for name, shape in shapes.items():
        rank = config.rank_pattern.get(pattern_of(name, config.rank_pattern) or "", config.r)
        if config.init in ("pissa", "olora", "loftq") and rank > min(shape):
            raise InvalidSpec(
                f"init {config.init!r} takes a rank of at most {min(shape)} for {name!r}, got {rank}",
                hint="a lower rank, or rank_pattern for these modules",
            )
        if config.init == "orthogonal" and rank % 2:
            raise InvalidSpec(f"init 'orthogonal' takes an even rank, got {rank} for {name!r}")
    return replace(
        config,
        target_modules=targets,
        rank_pattern=in_any_order(config.rank_pattern, shapes),
        alpha_pattern=in_any_order(config.alpha_pattern, shapes),
    )


def in_any_order(patterns: dict[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """The same value for each module whatever order the keys are read in, as PEFT sorts them in the file of an adapter.

    Where the order decides, there is a key for each module.
    """
    first = {name: key for name in names if (key := pattern_of(name, patterns))}
    if all(pattern_of(name, sorted(patterns)) == key for name, key in first.items()):
        return patterns
    return {re.escape(name): patterns[key] for name, key in first.items()}


def adapted_shapes(model: PreTrainedModel, targets: list[str], layers: list[int] | None) -> dict[str, tuple[int, int]]:
    """Path of each linear layer that gets an update → (out, in). Raises `InvalidSpec` for a layer that is not there."""
    from torch import nn

    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(name, targets)
    }
    if layers is None:
        return shapes
    numbers = {name: layer_number(name) for name in shapes}
    there = sorted({number for number in numbers.values() if number is not None})
    for number in layers:
        if number not in there:
            raise InvalidSpec(
                f"there is no layer {number} to adapt", hint=f"this model has layers {there[0]} to {there[-1]}"
                if there else "the target modules of this model are in no numbered layer",
            )  # fmt: skip
    return {name: shape for name, shape in shapes.items() if numbers[name] in layers}


def layer_number(name: str) -> int | None:
    """The first number in a module's path, as PEFT reads it."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None


def pattern_of(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is the end of the path, from a dot on, as PEFT matches them."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def check_pattern(field_name: str, key: str, names: Iterable[str]) -> None:
    try:
        matched = any(pattern_of(name, [key]) for name in names)
    except re.error as error:
        raise InvalidSpec(f"{field_name} {key!r} is no regular expression: {error}") from error
    if not matched:
        ends = sorted({name.rpartition(".")[2] for name in names})
        raise InvalidSpec(
            f"{field_name} {key!r} matches no adapted module{did_you_mean(key, ends)}",
            hint=f"adapted: {', '.join(ends)}",
        )


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Last name parts of the layers that are stored in fewer bits."""
    from lorasmith.engine.lora.quantized_linear import QuantizedLinear

    return {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def check_module_to_save(model: PreTrainedModel, name: str, targets: list[str]) -> None:
    if name in targets:
        raise InvalidSpec(f"{name!r} is in target_modules and in modules_to_save", hint="leave it out of one of them")
    if name in quantized_names(model):
        raise InvalidSpec(
            f"modules_to_save {name!r} is quantised with the base, so it cannot train whole",
            hint="put it into target_modules, or train with quantization none",
        )
    with_weights = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    if name not in with_weights:
        raise InvalidSpec(
            f"modules_to_save {name!r} matches no module{did_you_mean(name, with_weights)}",
            hint=f"this model has: {', '.join(sorted(with_weights))}",
        )

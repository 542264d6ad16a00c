"""The seed's `LoRAConfig` and what target roles mean on a loaded model. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lorasmith.errors import InvalidSpec, did_you_mean

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


# Last parts of module names, over the families that transformers ships.
ATTENTION_NAMES = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "qkv_proj",
    "dense",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "wo",
}
MLP_NAMES = {
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "c_fc",
    "dense_h_to_4h",
    "dense_4h_to_h",
}


@dataclass
class LoRAConfig:
    """Rank, scale and place of a low-rank adapter, https://arxiv.org/abs/2106.09685.

    The update of a weight (out, in) is `alpha / r · B A` with A (r, in) and B (out, r).
    """

    r: int = 8
    alpha: float = 32
    dropout: float = 0.1
    target_modules: list[str] | str = field(default_factory=LoRATargetModules.attention)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InvalidSpec(f"r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise InvalidSpec(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.target_modules:
            raise InvalidSpec("target_modules must name at least one module", hint="for example ['q_proj', 'v_proj']")
        if not isinstance(self.target_modules, str):
            self.target_modules = [str(name) for name in self.target_modules]

    def to_peft_config(self) -> LoraConfig:
        """The same as PEFT's own config, for a causal LM."""
        from peft import LoraConfig

        alpha: Any = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return LoraConfig(
            r=self.r,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
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


def resolve_target_modules(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Last name parts of the linear layers to adapt. Raises `InvalidSpec` for a name that matches nothing.

    `attention` and `mlp` are the model's own names for them; `all` is every linear layer but the output head.
    """
    from torch import nn

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if isinstance(wanted, str):
        roles = {"attention": linear & ATTENTION_NAMES, "mlp": linear & MLP_NAMES, "all": linear}
        if wanted not in roles:
            raise InvalidSpec(
                f"no target role {wanted!r}{did_you_mean(wanted, roles)}", hint="attention, mlp, all, or a list"
            )
        if not roles[wanted]:
            raise InvalidSpec(
                f"this model has no linear layer in the role {wanted!r}", hint=f"it has: {', '.join(sorted(linear))}"
            )
        return sorted(roles[wanted])
    missing = [name for name in wanted if name not in linear]
    if missing:
        raise InvalidSpec(
            f"target module {missing[0]!r} matches no linear layer{did_you_mean(missing[0], linear)}",
            hint=f"this model has: {', '.join(sorted(linear))}",
        )
    return list(wanted)

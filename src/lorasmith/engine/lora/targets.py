"""Which layers of a loaded model an adapter is for: roles, what they mean in each family, and what they leave out.

Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorasmith.errors import InvalidSpec, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# What families call the module around the layers of a role; the innermost one that matches counts.
ROLE_PATTERNS = {"attention": re.compile("attn|attention"), "mlp": re.compile("mlp|ffn|feed_forward|expert|moe")}
OTHER_PATTERN = re.compile("mamba|conv")
# Layers that stand in no such module.
ATTENTION_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_NAMES = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"}
ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}  # choose experts: in `all` alone
MAMBA_KERNEL_NAMES = {"x_proj", "dt_proj", "out_proj"}  # whose weights kernels read, past any update
TOLD_SHARE = 0.01  # of the weights


def resolve_target_modules(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Ends of the paths of the linear layers to adapt. Raises `InvalidSpec` for a name that matches nothing.

    `attention` and `mlp` are the model's own names for them; `all` is every linear layer but the output head.
    """
    linear, unreached = linear_paths(model)
    names = {path.rpartition(".")[2] for path in linear}
    if isinstance(wanted, str):
        if wanted not in (*ROLE_PATTERNS, "all"):
            raise InvalidSpec(
                f"no target role {wanted!r}{did_you_mean(wanted, (*ROLE_PATTERNS, 'all'))}",
                hint="attention, mlp, all, or a list",
            )
        chosen = [path for path in linear if has_role(path, wanted)]
        others = {*linear, *unreached}.difference(chosen)
        if not chosen:
            there = [f"linear layers: {', '.join(sorted(names))}"] if names else []
            if left := left_out(model, wanted):
                there.append(f"weights that cannot be adapted: {', '.join(left)}")
            raise InvalidSpec(
                f"this model has no linear layer in the role {wanted!r}", hint=f"it has {'; '.join(there)}"
            )
        return sorted({shortest_end(path, others) for path in chosen})
    missing = [name for name in wanted if not any(is_target(path, [name]) for path in linear)]
    if missing and any(is_target(path, missing[:1]) for path in unreached):
        raise InvalidSpec(
            f"target module {missing[0]!r} cannot be adapted: an update of it would not reach the layers that have the name",
            hint=f"this model has: {', '.join(sorted(names))}",
        )
    if missing:
        raise InvalidSpec(
            f"target module {missing[0]!r} matches no linear layer{did_you_mean(missing[0], names)}",
            hint=f"this model has: {', '.join(sorted(names))}",
        )
    return list(wanted)


def linear_paths(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Of every linear layer but the output head; apart, of those that an update of that name would not reach."""
    from torch import nn

    head = model.get_output_embeddings()
    linear = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    expert_names = names_of_experts(model, {path.rpartition(".")[2] for path in linear})
    unreached = [path for path, module in linear.items() if is_unreached(model, path, module, expert_names)]
    return [path for path in linear if path not in unreached], unreached


def names_of_experts(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those that PEFT takes for experts, once layers of their own and now one tensor, and not for the layers that have them."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, None)
    return names.difference(config.target_modules or [])


def is_unreached(model: PreTrainedModel, path: str, module: nn.Module, expert_names: set[str]) -> bool:
    """A router gives more than a product; the kernels of a Mamba block take weights."""
    around, _, name = path.rpartition(".")
    block = model.get_submodule(around)
    in_mamba = all(hasattr(block, part) for part in ("A_log", "conv1d", "in_proj"))
    return name in expert_names or "Router" in type(module).__name__ or (in_mamba and name in MAMBA_KERNEL_NAMES)


def is_target(path: str, targets: Iterable[str]) -> bool:
    """Whether one of the targets is the end of the path, from a dot on, as PEFT matches them."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def has_role(path: str, wanted: str) -> bool:
    return wanted == "all" or (role(path) == wanted and path.rpartition(".")[2] not in ROUTER_NAMES)


def role(path: str) -> str | None:
    """`attention`, `mlp`, or None for what is neither, such as a Mamba block."""
    *around, name = path.split(".")
    for part in reversed(around):
        for found, pattern in ROLE_PATTERNS.items():
            if pattern.search(part):
                return found
        if OTHER_PATTERN.search(part):
            return None
    return "attention" if name in ATTENTION_NAMES else "mlp" if name in MLP_NAMES else None


def shortest_end(path: str, others: set[str]) -> str:
    """The layer's name, or with modules around it where one of the others has that name too."""
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    return next(end for end in ends if not any(is_target(other, [end]) for other in others))


def left_out(model: PreTrainedModel, wanted: str) -> dict[str, int]:
    """Weights of the role that no update reaches, with their elements, the largest first: those of experts in one tensor, GPT-2's."""
    from torch import nn

    found: dict[str, int] = {}
    reached = set(linear_paths(model)[0])
    for path, module in model.named_modules():
        if path in reached or isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and has_role(f"{path}.{name}", wanted):
                end = f"{path.rpartition('.')[2]}.{name}"
                found[end] = found.get(end, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def left_out_note(model: PreTrainedModel, wanted: str | list[str]) -> str | None:
    """What to know of a role that does not reach all of its weights; `model` has no adapter yet."""
    if not isinstance(wanted, str):
        return None
    left = left_out(model, wanted)
    share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < TOLD_SHARE:
        return None
    return (
        f"target_modules {wanted!r}: {share:.0%} of the model's weights cannot be adapted and stay as they are: "
        f"{', '.join(left)}"
    )

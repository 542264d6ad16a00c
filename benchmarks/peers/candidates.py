"""The peers' settings: which ones are searched, and which count as the best until a search has said otherwise."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from workload import Config, weight_bytes

PACKED_TOKENS = 1_024  # about four rows; no row is longer than twice LENGTH_CAP, and none of the 16 is longer than this


@dataclass(frozen=True)
class Peer:
    """One setting of one library. The fields are those of the protocol."""

    library: str
    precision: str
    batching: str = "fixed"
    micro_batch_rows: int | None = None
    threads: int | None = None
    gradient_checkpointing: bool | None = False
    compile: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """Everything that is not ordinary, e.g. "trl bf16 flat threads=1"."""
        words = [self.library, self.precision, self.batching]
        words += [f"micro={self.micro_batch_rows}"] if self.micro_batch_rows else []
        words += [f"threads={self.threads}"] if self.threads else []
        words += ["checkpointing"] if self.gradient_checkpointing else []
        words += ["compile"] if self.compile else []
        words += [f"dropout={self.dropout}"] if self.dropout else []
        return " ".join(words)

    @property
    def warm_steps(self) -> int:
        """Steps that are not timed: a compiled model is compiled again, for any length, when it meets a second one."""
        return 2 if self.compile else 1

    def settings(self) -> dict[str, Any]:
        """What the protocol wants of a peer, without the workload."""
        fields = asdict(self)
        del fields["library"]
        return {**fields, "packed_tokens": PACKED_TOKENS}

    def fits(self, config: Config, available_bytes: int) -> bool:
        """Whether weights and about 3 GiB of activations fit; float32 weights unless the setting holds them in bf16."""
        return weight_bytes(config, 2 if self.precision == "bf16-weights" else 4) + 3 * 2**30 < available_bytes


# What SFTTrainer does when nobody chooses: TRL 1.16 trains float32 weights under bf16 autocast, with checkpointing.
TRL_DEFAULT = Peer("trl", "default", gradient_checkpointing=None)

# The losses of these two judge ours: padding, order and micro-batches as in TRL's default, nothing recomputed.
LOSS_REFERENCES = {"fp32": Peer("trl", "fp32"), "bf16": Peer("trl", "bf16")}

# By whether the CPU multiplies bf16 natively. A search (--full) replaces them for the machine and shape that it ran on.
LIKELY_BEST = {
    True: [Peer("trl", "bf16-weights", "flat"), Peer("unsloth", "bf16-weights", micro_batch_rows=1)],
    False: [Peer("trl", "fp32", "flat"), Peer("unsloth", "fp32", micro_batch_rows=1)],
}

PADDED: list[dict[str, Any]] = [{}, {"micro_batch_rows": 1}]
GROUPED, FLAT, PACKED = ({"batching": batching} for batching in ("grouped", "flat", "packed"))
ALL_PRECISIONS = ("fp32", "bf16", "bf16-weights")

# What each library can do of the protocol. Unsloth refuses flat and packed rows on a CPU; torchtune has no autocast, and
# compiles layer by layer and the loss, which its configurations recommend. Axolotl and LLaMA-Factory pack only under
# FlashAttention or while they tokenize.
OFFERS: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
    "trl": (ALL_PRECISIONS, [*PADDED, GROUPED, FLAT, PACKED]),
    "unsloth": (ALL_PRECISIONS, [*PADDED, GROUPED]),
    "torchtune": (("fp32", "bf16-weights"), [*PADDED, PACKED, {"compile": True}]),
    "litgpt": (ALL_PRECISIONS, PADDED),
    "axolotl": (("fp32",), PADDED),
    "llamafactory": (ALL_PRECISIONS, PADDED),
}


def search_candidates() -> list[Peer]:
    """Every library with every dtype and batching that it has on a CPU."""
    return [
        Peer(library, precision, **batching)
        for library, (precisions, batchings) in OFFERS.items()
        for precision in precisions
        for batching in batchings
    ]


def variants(peer: Peer, cpus: int) -> list[Peer]:
    """The setting with other numbers of threads, and compiled."""
    threads = sorted({1, max(1, cpus // 2), cpus})
    return [*(replace(peer, threads=count) for count in threads), replace(peer, compile=True)]


def remembered_best(path: Path) -> list[Peer] | None:
    """The best settings that a search has written, best first, or None."""
    return [Peer(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else None


def remember_best(path: Path, peers: list[Peer]) -> None:
    path.write_text(json.dumps([asdict(peer) for peer in peers], indent=1), encoding="utf-8")

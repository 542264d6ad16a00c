"""Changes of a run that take less memory or time, each predicted as the run itself is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorasmith.engine.lora.frozen import can_pack
from lorasmith.engine.models.device import choose_device
from lorasmith.engine.training.estimation.memory import Process, estimate_memory, rehearse_steps
from lorasmith.engine.training.estimation.prediction import Prediction
from lorasmith.engine.training.estimation.shape import Material, RunShape, shape_run
from lorasmith.errors import LorasmithError
from lorasmith.schemas.estimation import Suggestion
from lorasmith.schemas.training import TrainingSpec

WORTH_SAYING = 0.97  # of memory or time, which a change must get below
ENOUGH = 0.97  # of the available memory: what libraries take is measured later
LONG_ROWS_SHARE = 0.95  # of the rows, which a shorter limit keeps
LEAST_MICRO_BATCH = 256  # tokens; smaller products are slow
LEAST_RANK = 4
SAME_STEP = ("training.num_epochs", "training.optimizer")  # what they change is not in a step's tensors


@dataclass(frozen=True)
class Change:
    """A field of the spec and another value for it. `about` says what it costs."""

    values: dict[str, Any]
    about: str

    @property
    def assignments(self) -> list[str]:
        return [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in self.values.items()
        ]

    def applied(self, spec: TrainingSpec) -> TrainingSpec:
        values = spec.model_dump()
        for name, value in self.values.items():
            section, _, own = name.partition(".")
            values[section][own] = value
        return TrainingSpec.model_validate(values)


def may_pack(shape: RunShape) -> bool:
    return not shape.spec.training.quantizes and shape.precision != "int16" and can_pack(shape.dtype)


def changes(shape: RunShape) -> list[Change]:
    """What could be changed in that run, the cheapest in quality and time first."""
    settings = shape.spec.training
    found = []
    longest = max(len(row.ids) for row in shape.part.rows)
    if settings.processes > 1:
        values = {"training.processes": 1} | (
            {} if choose_device(settings.device) == "cpu" else {"training.device": "cpu"}
        )
        found.append(Change(values, "one copy of everything, with all cores; the same update"))
    if shape.decoder is not None:
        if not shape.is_lean:
            about = "weights as they are in the file, attention computed again; the same update"
            found.append(Change({"training.memory": "lean"}, about))
        elif settings.memory == "lean" and may_pack(shape):
            found.append(Change({"training.memory": "fast"}, "two packed copies of the weights; the same update"))
        largest = min(settings.micro_batch_tokens, -(-shape.plan.step_rows // settings.processes) * longest)
        smaller = max(LEAST_MICRO_BATCH, largest // 4)
        if smaller < largest:
            found.append(Change({"training.micro_batch_tokens": smaller}, "fewer tokens at once; the same update"))
    elif settings.batch_size > 1:
        fewer = max(rows for rows in range(1, settings.batch_size // 2 + 1) if settings.batch_size % rows == 0)
        times = settings.batch_size // fewer
        fewer_at_once = {
            "training.batch_size": fewer,
            "training.gradient_accumulation_steps": settings.gradient_accumulation_steps * times,
        }
        found.append(Change(fewer_at_once, "fewer rows at once; the same update"))
    if not settings.gradient_checkpointing:
        found.append(Change({"training.gradient_checkpointing": True}, "layers are computed again; the same update"))
    if shape.precision == "fp32":
        found.append(Change({"training.precision": "bf16"}, "weights and activations of half the size, rounded"))
    if not settings.quantizes and not shape.lora.use_dora:  # DoRA measures the weights themselves
        one_copy = {"training.memory": "lean"} if settings.memory == "fast" else {}
        found.append(
            Change({"training.quantization": "nf4"} | one_copy, "the base in 4 bits, rounded, and unpacked at each use")
        )
    limit = length_of_most(shape)
    if limit < longest:
        found.append(
            Change({"training.max_seq_length": limit, "training.too_long": "drop"}, "without the longest rows")
        )
    if settings.num_epochs > 1 and settings.max_steps is None:
        found.append(Change({"training.num_epochs": 1}, "fewer passes; look at the validation loss"))
    if shape.lora.r > LEAST_RANK:
        found.append(Change({"lora.rank": max(LEAST_RANK, shape.lora.r // 4)}, "a smaller adapter"))
    if settings.optimizer == "adamw":
        found.append(Change({"training.optimizer": "adafactor"}, "less optimizer state; other updates"))
    return found


def length_of_most(shape: RunShape) -> int:
    """A limit of whole 64 tokens that most rows keep."""
    lengths = sorted(len(row.ids) for row in shape.part.rows)
    wanted = lengths[int(LONG_ROWS_SHARE * (len(lengths) - 1))]
    return -(-wanted // 64) * 64


@dataclass(frozen=True)
class Candidate:
    change: Change
    shape: RunShape

    @property
    def same_step(self) -> bool:
        return all(name in SAME_STEP for name in self.change.values)


def candidates(material: Material, shape: RunShape, idle: Process) -> list[Candidate]:
    """Changed runs, rehearsed, which has to be done before anything is measured.

    Where no single change makes the run fit, also all that save memory in one, less those that it does without.
    """
    found = [one for change in changes(shape) if (one := candidate(change, material, shape))]
    rehearse_steps([shape, *(one.shape for one in found if not one.same_step)])
    for one in found:
        one.shape.step_bytes = shape.step_bytes if one.same_step else one.shape.step_bytes

    def peak_bytes(one: RunShape) -> int:
        return estimate_memory(one, idle).peak_bytes

    available, before = ENOUGH * estimate_memory(shape, idle).available_bytes, peak_bytes(shape)
    if min([before, *(peak_bytes(one.shape) for one in found)]) <= available:
        return found

    def fits(several: list[Change]) -> bool:
        one = in_one(several, material, shape)
        return one is not None and peak_bytes(one.shape) <= available

    saving = fewest([one.change for one in found if peak_bytes(one.shape) < WORTH_SAYING * before], fits)
    together = in_one(saving, material, shape) if len(saving) > 1 else None
    if together is None:
        return found
    rehearse_steps([together.shape])
    return [*found, together]


def fewest(found: list[Change], fits: Callable[[list[Change]], bool]) -> list[Change]:
    """Those of the changes that it takes, the dearest left out first; all of them where they do not suffice."""
    if fits(found):
        for change in reversed(found):
            others = [one for one in found if one is not change]
            if others and fits(others):
                found = others
    return found


def in_one(several: list[Change], material: Material, shape: RunShape) -> Candidate | None:
    values = {name: value for change in several for name, value in change.values.items()}
    return candidate(Change(values, "several in one, as none suffices"), material, shape)


def candidate(change: Change, material: Material, shape: RunShape) -> Candidate | None:
    """None where such a run would be refused, for example as no row is left."""
    try:
        return Candidate(change, shape_run(material, change.applied(shape.spec), like=shape))
    except LorasmithError:
        return None


def suggest(
    tried: list[Candidate], shape: RunShape, before: Prediction, predict: Callable[[RunShape], Prediction]
) -> list[Suggestion]:
    """Those that save memory or time, the cheapest first; where the run does not fit, what fits and then what takes least."""
    found = []
    for one in tried:
        after = predict(one.shape)
        less_memory = after.memory.peak_bytes < WORTH_SAYING * before.memory.peak_bytes
        less_time = bool(after.time and before.time and after.time.total_s < WORTH_SAYING * before.time.total_s)
        if less_memory or less_time:
            found.append(
                Suggestion(
                    assignments=one.change.assignments,
                    about=one.change.about,
                    peak_memory_bytes=after.memory.peak_bytes,
                    total_s=after.time.total_s if after.time else None,
                    rows_lost=max(0, len(shape.part.rows) - len(one.shape.part.rows)),
                    fits=after.fits,
                )
            )
    return found if before.fits else sorted(found, key=lambda one: 0 if one.fits else one.peak_memory_bytes)

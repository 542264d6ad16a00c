"""What a run chooses by looking at its machine: once, written into its folder, and kept when it is resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.rows import row_lengths
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.models.device import CPU, Device, choose_device, device_name, device_of, kind_of
from lorasmith.engine.models.elementwise import can_compile
from lorasmith.engine.models.families import Decoder, NotPacked, pack_weights, packing_bytes
from lorasmith.engine.models.precision import (
    Precision,
    Weights,
    check_precision,
    choose_memory,
    choose_precision,
    choose_weights,
)
from lorasmith.engine.models.prefix_cache import PrefixCache
from lorasmith.engine.models.quantized_loading import half_bytes
from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.computation import Computation, PackedComputation, PeftComputation, checked_decoder
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.initial import moves_weight
from lorasmith.engine.training.loss import CompletionLoss
from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.files import read_json, write_json
from lorasmith.schemas.training import TrainingSettings, TrainingSpec

Choice = TypeVar("Choice", bound=str | int)

# Up to here materialised attention is faster on a CPU than the fused kernel (7,450 against 5,290 tokens/s on the
# starter), and its square of the length is still small.
SHORT_ROW_TOKENS = 512
WORTH_COMPILING = 1e14  # FLOPs: ten minutes of a small machine, of which compiling saves a twentieth
PREFIX = "prefix"  # in the job folder
MICRO_BATCH = "micro_batch"  # tokens, or rows through PEFT; written when memory was too short for what was asked for
FREE_DISK_SHARE = 0.5  # of the disk, which a cache may take
DEVICE = "device"
OF_A_DEVICE = ("precision", "weights", "memory", "compile")  # choices that mean nothing on another one


class Choices:
    """`machine.json` of a job folder. A change of processes, threads or libraries is announced: the run is then not repeatable."""

    def __init__(self, folder: Path, report: Reporter, devices: Devices) -> None:
        self.path = folder / "machine.json"
        self.devices = devices
        self.made: dict[str, Any] = devices.agree(read_json(self.path) if self.path.exists() else {})
        now: dict[str, str | int] = {
            "processes": devices.count,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.report = report
        for key, value in now.items():
            self.compare(key, value)

    def compare(self, key: str, value: str | int) -> None:
        """Announce it where it is no longer as it was when the run began."""
        before = self.made.setdefault(key, value)
        if before != value:
            self.report("warning", text=f"{key} was {before} and is {value}: the run is no longer exactly repeatable")

    def keep_materials(self, materials: dict[str, Path], digest: Callable[[Path], str], *, resumed: bool) -> None:
        """Note what the run is made of. Raises `InvalidData` where one that goes on would do so with something else."""
        for name, path in materials.items():
            now = self.devices.found_by_first(partial(digest, path))
            if resumed and self.made.get(name, now) != now:
                raise InvalidData(
                    f"{path} has changed, and a run goes on with the {name} that it began with",
                    hint="put it back as it was, or begin another run",
                )
            self.change(name, now)

    def once(self, name: str, measure: Callable[[], Choice]) -> Choice:
        """What was chosen when the run began, by its first process."""
        if name not in self.made:
            self.change(name, self.devices.found_by_first(measure))
        chosen: Choice = self.made[name]
        return chosen

    def forget(self) -> None:
        """What is chosen for a device and a precision is chosen anew."""
        for name in OF_A_DEVICE:
            self.made.pop(name, None)

    def change(self, name: str, value: str | int) -> None:
        self.made[name] = value
        if self.devices.first:
            write_json(self.path, self.made)


def choose_training_device(choices: Choices, settings: TrainingSettings) -> Device:
    """That on which the run began, unless the spec by now names another one, for which everything is chosen anew.

    Raises `InvalidSpec` where it is not there.
    """
    made = choices.made
    if "precision" in made:
        made.setdefault(DEVICE, "cpu")  # it began when there was no choice
    wanted = made.get(DEVICE, "auto") if settings.device == "auto" else settings.device
    try:
        device = choose_device(wanted, processes=choices.devices.count)
    except InvalidSpec as error:
        if wanted == settings.device:
            raise
        raise InvalidSpec(
            f"this run began on a GPU, and cannot go on there: {error.message}",
            hint=f"training.device: cpu in {choices.path.with_name('job.json')} lets it go on here, rounded otherwise",
        ) from error
    began_on = choices.once(DEVICE, lambda: device)
    if began_on != device:
        choices.compare(DEVICE, device)
        choices.forget()
        choices.change(DEVICE, device)
    if device == "cuda":
        choices.compare("gpu", device_name(device))
    return device


def choose_training_precision(choices: Choices, settings: TrainingSettings, device: Device) -> Precision:
    """That in which the run began, unless the spec by now names another one, for which everything is chosen anew.

    Raises `InvalidSpec` where this machine cannot compute in it.
    """
    if settings.precision not in ("auto", choices.made.get("precision", settings.precision)):
        choices.compare("precision", settings.precision)
        choices.forget()
    precision = choices.once("precision", lambda: choose_precision(settings.precision, device))
    try:
        check_precision(precision, device)
    except InvalidSpec as error:
        raise InvalidSpec(
            f"this run began with products in integers, and cannot go on here: {error.message}",
            hint=f"training.precision: fp32 in {choices.path.with_name('job.json')} lets it go on here, rounded otherwise",
        ) from error
    return precision


def choose_base(
    choices: Choices, spec: TrainingSpec, precision: Precision, folder: Path, device: Device = "cpu"
) -> Quantization | None:
    """How the base is held: as the spec asks; in the 16 bits of its file where that loses nothing and memory is short."""
    settings = spec.training
    if settings.quantizes:
        return Quantization.named(settings.quantization, settings.double_quantization)
    available = half_bytes(folder) * choices.devices.count
    weights = choices.once("weights", lambda: weights_of(spec, precision, available, device))
    return AS_STORED if weights == "stored" else None


def weights_of(spec: TrainingSpec, precision: Precision, available: int, device: Device = "cpu") -> Weights:
    """Those of a base that is not quantised: DoRA measures it, other settings change it, in fp32.

    `available` are its bytes in 16 bits, in all processes.
    """
    untouched = not (spec.lora.use_dora or spec.lora.modules_to_save or moves_weight(spec.lora.init))
    return choose_weights(spec.training.memory, precision, available if untouched else 0, device)


def choose_computation(
    choices: Choices,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    precision: Precision,
    rows: Sequence[RenderedExample],
    report: Reporter,
) -> Computation:
    """The packed decoder where it knows the model and agrees with it, else PEFT, with the reason in the log."""
    try:
        decoder = checked_decoder(model, len(tokenizer), precision)
    except NotPacked as reason:
        report("note", text=f"trains through PEFT, several times slower: {reason}")
        wanted = {"precision": "int16", "memory": "fast", "compile": "on"}
        ignored = [f"training.{name}={value}" for name, value in wanted.items() if getattr(settings, name) == value]
        if ignored:
            report("note", text=f"PEFT has no such thing, so without effect: {', '.join(ignored)}")
        base: Any = model.get_base_model()
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        on_cpu = device_of(base.get_input_embeddings().weight) == CPU
        if on_cpu and max(row_lengths(rows)) <= SHORT_ROW_TOKENS:
            base.set_attn_implementation("eager")
        return PeftComputation(
            model,
            CompletionLoss(base, len(tokenizer), precision),
            seed=settings.seed,
            pad_id=int(tokenizer.pad_token_id or 0),
            precision=precision,
            batch_rows=choices.made.get(MICRO_BATCH, settings.batch_size),
            reason=str(reason),
        )
    is_lean = saves_memory(settings, precision, is_stored=choices.made.get("weights") == "stored")
    copies_bytes = packing_bytes(decoder) * choices.devices.count
    device = kind_of(decoder.device)
    memory = choices.once(
        "memory", lambda: choose_memory("lean" if is_lean else settings.memory_wanted, precision, copies_bytes, device)
    )
    if memory == "fast":
        pack_weights(decoder, model)
    elif settings.memory == "fast" and precision == "int16":
        text = "training.memory=fast is without effect: products in int16 read the weights as they are; fp32 packs them"
        report("note", text=text)
    if device == "cpu":
        retain_heap()
        if settings.precision == "auto":
            report("note", text=f"computes in {precision}, which was measured to suit this machine when the run began")
    report("paths", device=device, memory=memory, modules=decoder.paths)
    return PackedComputation(
        decoder,
        seed=settings.seed,
        micro_batch_tokens=choices.made.get(MICRO_BATCH, settings.micro_batch_tokens),
        recompute=settings.gradient_checkpointing,
        lean=is_lean,
        compiled=choices.once("compile", lambda: choose_compile(settings, decoder, rows)) == "on",
        cache=prefix_cache(choices, decoder, settings, rows),
    )


def saves_memory(settings: TrainingSettings, precision: Precision, *, is_stored: bool) -> bool:
    """Whether it was asked for, or the base stays in 16 bits as memory is short; products in int16 read those anyway."""
    return settings.memory_wanted == "lean" or (is_stored and precision != "int16")


def choose_compile(
    settings: TrainingSettings, decoder: Decoder, rows: Sequence[RenderedExample]
) -> Literal["on", "off"]:
    """on where it was asked for, or where there is a compiler and the run is long enough to win the time back."""
    if settings.compile != "auto":
        return settings.compile
    weights = sum(
        update.B.numel() // update.B.shape[1] * update.A.shape[1] for g in decoder.groups for update in g.updates
    )
    flops = 4 * weights * sum(row_lengths(rows)) * settings.num_epochs
    return "on" if can_compile(kind_of(decoder.device)) and flops > WORTH_COMPILING else "off"


def prefix_cache(
    choices: Choices, decoder: Decoder, settings: TrainingSettings, rows: Sequence[RenderedExample]
) -> PrefixCache | None:
    """A cache for the layers below the lowest adapter, where there are any and an epoch will read it."""
    lowest = next(number for number, layer in enumerate(decoder.layers) if layer.trained)
    if lowest == 0 or settings.num_epochs <= 1 or not settings.prefix_cache_gb:
        return None
    folder = choices.path.parent

    def limit() -> int:
        return round(min(settings.prefix_cache_gb * 1e9, FREE_DISK_SHARE * shutil.disk_usage(folder).free))

    # a resumed run must keep the same rows, as they decide the micro-batches, and the disk is another by then
    limit_bytes = choices.once("prefix_cache_bytes", limit)
    return PrefixCache(folder / PREFIX, row_lengths(rows), decoder.embedding.shape[1], decoder.dtype, limit_bytes)

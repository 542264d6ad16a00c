"""What a training run would take, said before it starts. Bytes, seconds and tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MEASURING_S = 20.0
MOST_MEASURING_S = 60.0


class EstimateInputs(BaseModel):
    """Absolute paths that a training spec resolved to, and how long may be measured."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_folder: str
    dataset_name: str
    train_file: str
    val_file: str | None
    disk_folder: str = Field(description="Where the run would write.")
    measuring_s: float = Field(MEASURING_S, gt=0, le=MOST_MEASURING_S)


class MemoryEstimate(BaseModel):
    """Peaks (`ru_maxrss`); the parts are those of one process. `loading_bytes` is a peak of its own, before training."""

    peak_bytes: int = Field(description="Of all processes together, which the machine has to hold.")
    process_peaks_bytes: list[int] = Field([], description="Of each process; the first one writes the files.")
    process_bytes: int = Field(description="Libraries, tokenizer and tokenised rows, measured in the first process.")
    libraries_bytes: int = Field(description="What libraries take once they compute, measured on a small model.")
    weights_bytes: int = Field(description="Frozen weights as they stay in memory.")
    packed_bytes: int = Field(description="Their copies for training.memory=fast.")
    adapter_bytes: int = Field(description="Trained weights, their gradients and optimizer state.")
    step_bytes: int = Field(description="What the largest micro-batches keep and compute with.")
    saving_bytes: int = Field(description="Copies that a checkpoint is written from, in the first process.")
    reduction_bytes: int = Field(0, description="Copies that gradients are summed over several processes from.")
    loading_bytes: int
    available_bytes: int


class TimeEstimate(BaseModel):
    """From the start of the process to its end; low and high are as far apart as repeated measuring was."""

    total_s: float
    low_s: float
    high_s: float
    start_s: float = Field(description="Imports, tokenizing and loading.")
    training_s: float
    exchange_s: float = Field(0, description="Of training: sums over several processes, and what they agree on.")
    validation_s: float
    saving_s: float
    tokens_per_s: float
    measured_s: float
    measured_layers: int
    spread: float = Field(description="Largest difference between repeats of one micro-batch, as a share of the least.")


class DiskEstimate(BaseModel):
    """What the run leaves, and the most that it holds at a time."""

    peak_bytes: int
    checkpoint_bytes: int = Field(description="One checkpoint.")
    checkpoints: int = Field(description="How many are kept.")
    prefix_cache_bytes: int
    token_store_bytes: int = Field(0, description="Beside the dataset, for later runs too, unless it is there already.")
    adapter_bytes: int = Field(description="In the job folder, and once more in the store.")
    free_bytes: int


class Suggestion(BaseModel):
    """A change of the run, and the same prediction with it."""

    assignments: list[str] = Field(description="For --set.")
    about: str
    peak_memory_bytes: int
    total_s: float | None
    rows_lost: int = 0
    fits: bool


class Estimate(BaseModel):
    """`lorasmith estimate`. `time` is None where not even one layer could be measured, and `why_no_time` says why."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    dataset: str
    parameters: int
    trainable_parameters: int
    rows: int
    tokens: int = Field(description="Of one epoch.")
    longest_row_tokens: int
    steps: int
    processes: int = Field(1, description="That share each step, and the cores.")
    precision: Literal["bf16", "int16", "fp32"]
    memory_mode: Literal["fast", "lean"]
    compiled: bool
    computed_by: Literal["packed decoder", "PEFT"]
    why_peft: str | None
    fits: bool
    why_not: str | None
    way_out: str | None
    memory: MemoryEstimate
    time: TimeEstimate | None
    why_no_time: str | None
    disk: DiskEstimate
    suggestions: list[Suggestion]
    seed_formula_bytes: int = Field(
        description="The closed form of the workbench design, appendix B.2, for comparison."
    )


def seed_training_vram_gb(
    model_params_b: float, quant_bits: int, lora_rank: int, batch_size: int, seq_length: int
) -> float:
    """The workbench design's appendix B.2 as it stands there: GB from billions of parameters and bits a weight."""
    model_mem = model_params_b * (quant_bits / 8)
    hidden_dim = int(model_params_b**0.5 * 1000)
    num_layers = int(model_params_b * 4)
    lora_mem = 2 * lora_rank * hidden_dim * num_layers * 4 / 1e9
    optimizer_mem = lora_mem * 4
    activation_mem = batch_size * seq_length * hidden_dim * num_layers * 2 / 1e9
    return (model_mem + lora_mem + optimizer_mem + activation_mem) * 1.1

"""A training run: one spec for the YAML file, the `--set` overrides and the Python API, and its presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

TargetRole = Literal["attention", "mlp", "all"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class LoRASpec(BaseModel):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685. Update: W + scale · B A, scale = alpha / rank."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(
        32,
        ge=1,
        le=1024,
        description="Inner dimension of B A; size and cost grow with it.",
        validation_alias=AliasChoices("rank", "r", "lora_r"),
    )
    alpha: float = Field(
        64, gt=0, description="Strength of the update.", validation_alias=AliasChoices("alpha", "lora_alpha")
    )
    dropout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the inputs of A that is zeroed while training.",
        validation_alias=AliasChoices("dropout", "lora_dropout"),
    )
    target_modules: TargetRole | list[str] = Field(
        "attention", description="A role resolved on the loaded model, or literal module names."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.")


class TrainingSettings(BaseModel):
    """Steps, batches and rates. Lengths are tokens; steps are optimizer steps."""

    model_config = ConfigDict(extra="forbid")

    learning_rate: float = Field(2e-4, gt=0, description="Peak AdamW learning rate, after warm-up.")
    batch_size: int = Field(
        4,
        ge=1,
        description="Rows per micro-batch.",
        validation_alias=AliasChoices("batch_size", "per_device_train_batch_size"),
    )
    gradient_accumulation_steps: int = Field(4, ge=1, description="Micro-batches per optimizer step.")
    num_epochs: float = Field(
        3,
        gt=0,
        description="Passes over the train part.",
        validation_alias=AliasChoices("num_epochs", "num_train_epochs", "epochs"),
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps.")
    warmup_steps: int = Field(100, ge=0, description="At most; a tenth of a shorter run.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on the adapter's weights alone.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls to zero after warm-up, or that it stays."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are scaled down to this norm.")
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="Steps left out because their loss or gradient is not finite or explodes, before the run stops.",
    )
    max_seq_length: int = Field(2048, ge=8, description="Tokens; never more than the model's context.")
    too_long: Literal["error", "cut", "drop"] = Field(
        "error",
        description="What happens to a row above max_seq_length: refuse to start, cut its end, or leave it out.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the CPU multiplies it natively."
    )
    memory: Literal["auto", "fast", "lean"] = Field(
        "auto",
        description="fast: frozen weights in two layouts, faster at twice their memory; auto: where that is faster and fits.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute each layer again in the backward pass: a third slower, memory of one layer."
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens computed at once where rows are packed; batch_size counts where they are padded.",
    )
    seed: int = Field(0, ge=0, description="Decides first weights, order of rows and dropout.")
    log_every: int = Field(5, ge=1, description="Optimizer steps between log lines.")
    eval_every: int = Field(50, ge=1, description="Optimizer steps between validation losses; fewer in a short run.")
    save_every: int = Field(100, ge=1, description="Optimizer steps between checkpoints; fewer in a short run.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that are kept.")


class TrainingSpec(BaseModel):
    """What `lorasmith train` was asked to do: the YAML file has these fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="`starter`, a local folder, a registered name or a Hugging Face id.")
    data: str = Field(description="Name of a dataset, or a file to import.")
    name: str | None = Field(None, description="Name of the adapter; made from model and data when absent.")
    preset: str = Field("balanced", description="Values to start from; the table below has them.")
    template: str | None = Field(None, description="Chat template for a base without one: `chatml` or `plain`.")
    lora: LoRASpec = Field(default_factory=lambda: LoRASpec())
    training: TrainingSettings = Field(default_factory=lambda: TrainingSettings())


# Seed values of the workbench design's appendix A; `cpu`, `gpu-8gb` and `domain` carry the other guides' defaults.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "training": {
            "learning_rate": 3e-4,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "warmup_steps": 50,
        },
    },
    "balanced": {
        "lora": {"rank": 32, "alpha": 64, "dropout": 0.05, "target_modules": "attention"},
        "training": {
            "learning_rate": 2e-4,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_epochs": 3,
            "warmup_steps": 100,
        },
    },
    "high_quality": {
        "lora": {"rank": 128, "alpha": 256, "dropout": 0.1, "target_modules": "all"},
        "training": {
            "learning_rate": 1e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_epochs": 5,
            "warmup_steps": 200,
            "weight_decay": 0.01,
        },
    },
    "cpu": {
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.1, "target_modules": "attention"},
        "training": {
            "learning_rate": 2e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_epochs": 3,
            "weight_decay": 0.01,
            "max_seq_length": 2048,
        },
    },
    "gpu-8gb": {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all"},
        "training": {"learning_rate": 2e-4, "batch_size": 2, "gradient_accumulation_steps": 8, "num_epochs": 3},
    },
    "domain": {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
        "training": {"learning_rate": 2e-4, "weight_decay": 1e-5, "num_epochs": 3},
    },
    # Models of a few million parameters need a tenfold rate and every linear layer to move at all.
    "tiny": {
        "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "target_modules": "all"},
        "training": {
            "learning_rate": 4e-3,
            "batch_size": 32,
            "gradient_accumulation_steps": 1,
            "num_epochs": 2,
            "warmup_steps": 20,
            "max_seq_length": 512,
        },
    },
}


class TrainingInputs(BaseModel):
    """Absolute paths and identities that a training spec resolved to."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_folder: str
    dataset_id: str
    dataset_name: str
    dataset_sha256: str
    train_file: str
    val_file: str | None
    adapter_name: str


class TrainingResult(BaseModel):
    """What came out; the adapter is a PEFT folder inside the job folder until the service stores it."""

    adapter_folder: str
    total_steps: int
    epochs: float
    training_loss: list[float] = Field(description="Mean loss in nats per trained token, one per log interval.")
    validation_loss: float | None
    best_validation_loss: float | None
    training_time_seconds: float
    trained_tokens: int
    tokens_per_s: float = Field(description="Unpadded tokens per second of training, prompt tokens included.")
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    precision: Literal["bf16", "fp32"]
    threads: int
    rows: dict[str, int] = Field(description="Rows trained, cut and dropped.")

"""A training run: one spec for the YAML file, the `--set` overrides and the Python API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from lorasmith.schemas.data import CheckName, TooLong

TargetRole = Literal["attention", "mlp", "all"]
InitialWeights = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"]
QuantizationName = Literal["none", "nf4", "fp4", "int8"]
DeviceSetting = Literal["auto", "cpu", "cuda"]
PrecisionSetting = Literal["auto", "bf16", "int16", "fp32"]
OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon"]
BITSANDBYTES_OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw_8bit", "lion")
SEED_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "lion_32bit": "lion",
}
# What else people write: PEFT's and transformers' booleans, numbers of bits, litgpt's names.
QUANTIZATIONS = {
    **dict.fromkeys(("True", "4", "4bit", "4-bit", "bnb.nf4"), "nf4"),
    **dict.fromkeys(("8", "8bit", "8-bit", "bnb.int8"), "int8"),
    **dict.fromkeys(("False", "None"), "none"),
    "bnb.fp4": "fp4",
}
# Fields of other tools that are no field here, and what says the same.
SAID_OTHERWISE = {
    "load_in_4bit": "training.quantization=nf4",
    "load_in_8bit": "training.quantization=int8",
    "quantization": "training.quantization=nf4, fp4 or int8",
    "quantization_bit": "training.quantization=nf4 or int8",
    "quantization_config": "training.quantization=nf4, fp4 or int8",
    "bnb_4bit_quant_type": "training.quantization=nf4 or fp4",
    "bnb_4bit_compute_dtype": "training.precision=bf16 or fp32",
    "bnb_4bit_use_double_quant": "training.double_quantization=true or false",
    "qlora": "training.quantization=nf4",
    "loftq_config": "lora.init=loftq and lora.loftq_iterations",
    "lr": "training.learning_rate",
    "use_cpu": "training.device=cpu",
    "no_cuda": "training.device=cpu",
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class LoRASpec(BaseModel):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685. Update: W + scale · B A, scale = alpha / rank."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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
    use_dora: bool = Field(
        False,
        description="Train the length of each output's weights apart from their direction, https://arxiv.org/abs/2402.09353; through PEFT, slower.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {}, description="Other ranks: module name, or regular expression for the end of its path, to rank."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Other alphas: module name, or regular expression for the end of its path, to alpha."
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Numbers of the layers to adapt, from 0; all without it.",
        validation_alias=AliasChoices("layers", "layers_to_transform"),
    )
    modules_to_save: list[str] = Field(
        [],
        description="Modules that train whole and are saved with the adapter, for example `lm_head`; through PEFT, which takes the ends of names: `norm` is each `…layernorm` too.",
    )
    init: InitialWeights = Field(
        "default",
        description="First A and B. default and gaussian: B is zero; orthogonal: B A is zero; pissa, olora: the main part of W, saved as a plain adapter of twice the rank; loftq: likewise what quantising the base loses.",
        validation_alias=AliasChoices("init", "init_lora_weights"),
    )
    loftq_iterations: int = Field(
        1,
        ge=1,
        le=100,
        description="Rounds of quantising and decomposing of init loftq, https://arxiv.org/abs/2310.08659.",
        validation_alias=AliasChoices("loftq_iterations", "loftq_iter"),
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def as_said_elsewhere(cls, modules: Any) -> Any:
        """PEFT's name for all linear layers, and names in one text, separated by commas."""
        if not isinstance(modules, str) or modules in get_args(TargetRole):
            return modules
        return "all" if modules == "all-linear" else [name.strip() for name in modules.split(",")]

    @field_validator("init", mode="before")
    @classmethod
    def on_is_the_default(cls, init: Any) -> Any:
        """PEFT says True for it."""
        return "default" if init is True else init


class TrainingSettings(BaseModel):
    """Steps, batches and rates. Lengths are tokens; steps are optimizer steps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate, after warm-up.")
    lora_plus_ratio: float | None = Field(
        None,
        gt=0,
        description="Rate of every B over that of A, LoRA+, https://arxiv.org/abs/2402.12354; the paper takes 16.",
        validation_alias=AliasChoices("lora_plus_ratio", "loraplus_lr_ratio"),
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw_8bit and lion need the extra `quant`; adamw_8bit keeps its state in a quarter of the memory, lion in half, "
        "and its rates are a third to a tenth of AdamW's, https://arxiv.org/abs/2302.06675; muon trains 2-D weights alone.",
        validation_alias=AliasChoices("optimizer", "optim"),
    )
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
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Share of the run that is warm-up, instead of warmup_steps."
    )
    warmup_steps: int | None = Field(100, ge=0, description="At most; a tenth of a shorter run.")
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Share of a matrix that each step takes away, times the learning rate; on what trains alone. Some domains do better with 1e-5.",
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="How the rate falls to zero after warm-up, or that it stays.",
        validation_alias=AliasChoices("lr_scheduler", "lr_scheduler_type"),
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are scaled down to this norm.")
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="Steps left out because their loss or gradient is not finite or explodes, before the run stops.",
    )
    max_seq_length: int = Field(2048, ge=8, description="Tokens; never more than the model's context.")
    too_long: TooLong = Field(
        "error",
        description="What happens to a row above max_seq_length: refuse to start, leave it out, cut the oldest (left), "
        "cut the ends of its longest messages (right, or cut), or make several rows of it (split).",
    )
    allow: list[CheckName] = Field([], description="Checks of the rows that are overridden, by name.")
    device: DeviceSetting = Field(
        "auto",
        description="Where steps are computed. auto: on a GPU where torch reaches one through CUDA and processes is 1, else on the CPU.",
    )
    precision: PrecisionSetting = Field(
        "auto",
        description="auto: bf16 where the CPU or GPU multiplies it natively; else int16, fp32 but for products with frozen weights, "
        "which are of blocks of 16-bit integers that round less than bf16, where a CPU is faster with it; else fp32.",
    )
    quantization: QuantizationName = Field(
        "none",
        description="The base in 4 or 8 bits while training, QLoRA, https://arxiv.org/abs/2305.14314: a fraction of the memory, slower on a CPU.",
        validation_alias=AliasChoices("quantization", "load_in_4bit", "quantization_bit"),
    )
    double_quantization: bool = Field(
        True,
        description="With nf4 and fp4, the scales of blocks are quantised too: 4.13 instead of 4.5 bits a weight.",
        validation_alias=AliasChoices(
            "double_quantization", "bnb_4bit_use_double_quant", "use_double_quant", "double_quant"
        ),
    )
    memory: Literal["auto", "fast", "lean"] = Field(
        "auto",
        description="fast: frozen weights in two layouts, faster at twice their memory; lean: as they are in the file, and attention computed again; auto: fast where it is faster and fits, lean where memory is short. A GPU takes lean.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile the element-wise parts; auto: in a long run where there is a C++ compiler, on a GPU triton.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute each layer again in the backward pass: a third slower, memory of one layer."
    )
    prefix_cache_gb: float = Field(
        8,
        ge=0,
        description="Disk for what the layers below the lowest adapter compute, which later epochs read; 0: compute again.",
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens computed at once where rows are packed; batch_size counts where they are padded.",
    )
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine that take each optimizer step together, each with its share of rows and of the CPU's cores.",
        validation_alias=AliasChoices("processes", "num_processes"),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides first weights, order of rows and dropout.")
    log_every: int = Field(
        5,
        ge=1,
        description="Optimizer steps between log lines.",
        validation_alias=AliasChoices("log_every", "logging_steps"),
    )
    eval_every: int = Field(
        50,
        ge=1,
        description="Optimizer steps between validation losses; fewer in a short run.",
        validation_alias=AliasChoices("eval_every", "eval_steps"),
    )
    save_every: int = Field(
        100,
        ge=1,
        description="Optimizer steps between checkpoints; fewer in a short run.",
        validation_alias=AliasChoices("save_every", "save_steps"),
    )
    keep_checkpoints: int = Field(
        3,
        ge=1,
        description="Newest checkpoints that are kept.",
        validation_alias=AliasChoices("keep_checkpoints", "save_total_limit"),
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many validation losses in a row that are no better than the best."
    )
    keep_best: bool = Field(
        False,
        description="The adapter is that of the best validation loss, not of the last step.",
        validation_alias=AliasChoices("keep_best", "load_best_model_at_end"),
    )

    @field_validator("compile", mode="before")
    @classmethod
    def on_or_off(cls, value: Any) -> Any:
        """YAML reads both as booleans."""
        return ("off", "on")[value] if isinstance(value, bool) else value

    @field_validator("optimizer", mode="before")
    @classmethod
    def our_name(cls, name: Any) -> Any:
        return SEED_OPTIMIZERS.get(str(name), name)

    @field_validator("quantization", mode="before")
    @classmethod
    def our_quantization(cls, name: Any) -> Any:
        return QUANTIZATIONS.get(str(name), name)

    @field_validator("memory")
    @classmethod
    def a_second_copy_where_it_serves(cls, memory: str, info: ValidationInfo) -> str:
        """Runs only where memory was given."""
        if memory == "fast" and info.data.get("quantization", "none") != "none":
            raise ValueError("fast keeps the full weights twice, and quantization is there to not have them; take lean")
        if memory == "fast" and info.data.get("device") == "cuda":
            raise ValueError("fast is a layout for the products of a CPU, and device is cuda; take lean")
        return memory

    @field_validator("processes")
    @classmethod
    def several_processes_on_a_cpu(cls, processes: int, info: ValidationInfo) -> int:
        """Runs only where processes was given."""
        if processes > 1 and info.data.get("device") == "cuda":
            raise ValueError(
                f"{processes} processes share the cores of a CPU, and device is cuda; take 1, or device=cpu"
            )
        return processes

    @field_validator("warmup_steps")
    @classmethod
    def one_warmup(cls, steps: int | None, info: ValidationInfo) -> int | None:
        """Runs only where warmup_steps was given."""
        ratio = info.data.get("warmup_ratio")
        if steps is not None and ratio is not None:
            raise ValueError(f"give either warmup_steps or warmup_ratio (which is {ratio:g}), not both")
        return steps

    @model_validator(mode="after")
    def ratio_instead_of_steps(self) -> TrainingSettings:
        if self.warmup_ratio is not None:
            self.warmup_steps = None
        elif self.warmup_steps is None:
            self.warmup_steps = 0
        return self

    @property
    def quantizes(self) -> bool:
        return self.quantization != "none"

    @property
    def memory_wanted(self) -> Literal["auto", "fast", "lean"]:
        """A quantised base has no second layout."""
        return "lean" if self.quantizes else self.memory

    @property
    def needs_validation(self) -> str | None:
        """The name of a setting that looks at validation losses, or None."""
        return "early_stopping_patience" if self.early_stopping_patience else "keep_best" if self.keep_best else None


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
    tokens_folder: str | None = Field(None, description="Token stores of the dataset; absent: in the job folder.")
    adapter_name: str


class TrainingResult(BaseModel):
    """What came out; the adapter is a PEFT folder inside the job folder until the service stores it."""

    adapter_folder: str
    total_steps: int = Field(description="Optimizer steps that were taken.")
    planned_steps: int
    stopped_early: bool = Field(description="By early_stopping_patience.")
    adapter_step: int = Field(description="After which step the adapter is as it is here; the best's with keep_best.")
    epochs: float
    training_loss: list[float] = Field(description="Mean loss in nats per trained token, one per log interval.")
    validation_loss: float | None
    best_validation_loss: float | None
    training_time_seconds: float
    trained_tokens: int
    tokens_per_s: float = Field(description="Unpadded tokens per second of training, prompt tokens included.")
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int = Field(description="Of all processes of the run together, each at its own peak.")
    device: str = Field("cpu", description="What computed the steps: `cpu`, or the GPU's name.")
    gpu_peak_memory_bytes: int | None = Field(None, description="The most that tensors took on the GPU.")
    precision: Literal["bf16", "int16", "fp32"]
    threads: int
    rows: dict[str, int] = Field(description="Rows trained, cut and dropped.")
    paths: dict[str, int] = Field(description="Adapted modules by how their products were computed; `peft` is slow.")
    fallback: str | None = Field(description="Why PEFT computed the steps, or null where the packed decoder did.")

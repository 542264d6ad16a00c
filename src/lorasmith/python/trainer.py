"""Training in Python: the same loop, files and store as `lorasmith train`, in the caller's own process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.engine.lora.config import LoRAConfig
from lorasmith.engine.models.loading import load_adapter, load_model, load_tokenizer, model_folder
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.run import run as run_training
from lorasmith.errors import InvalidData
from lorasmith.files import read_json, sha256_bytes, write_json
from lorasmith.jobs.folder import ORDER, RESULT, checkpoint_folders
from lorasmith.jobs.leases import LeaseKeeper, holder
from lorasmith.python.adapters import LoRAAdapter, apply_lora_adapter
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.jobs import Job, JobOrder, JobStatus
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.data_import import import_dataset
from lorasmith.services.job_outcomes import adapter_of_job
from lorasmith.services.jobs import conclude
from lorasmith.services.models import resolve_model
from lorasmith.services.specs import parse_spec
from lorasmith.services.training import start_training
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class ParameterStatistics:
    """How many parameters train, of how many."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


@dataclass(frozen=True)
class LoRATrainingResult:
    """What came out. `training_loss` are means in nats per trained token, one per log interval."""

    success: bool
    adapter_path: Path
    training_loss: list[float]
    validation_loss: float | None
    training_time_seconds: float
    checkpoints: list[Path]
    parameters: ParameterStatistics


class LoRATrainer:
    """Load a base model, put LoRA on it and train. `home` is the data directory, as for the command line."""

    def __init__(self, base_model_name: str, config: LoRAConfig | None = None, home: Path | str | None = None) -> None:
        self.base_model_name = base_model_name
        self.config = config or LoRAConfig()
        self.workbench = Workbench.open(Settings.read(Path(home) if home else None))
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.peft_model: PeftModel | None = None

    def load_base_model(self) -> PreTrainedModel:
        """`starter`, a registered name, a local folder or a hub id, with its tokenizer, in fp32."""
        folder = model_folder(resolve_model(self.workbench, self.base_model_name).location)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder)
        return self.model

    def setup_lora(self) -> PeftModel:
        """Put a fresh adapter on the base. Raises `InvalidSpec` for a target module that matches nothing."""
        base = self.model or self.load_base_model()
        self.peft_model = apply_lora_adapter(base, LoRAAdapter("default", self.base_model_name, self.config))
        return self.peft_model

    def trainable_parameters(self) -> ParameterStatistics:
        model = self.peft_model or self.setup_lora()
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return ParameterStatistics(sum(count for count, trains in counts if trains), sum(count for count, _ in counts))

    def train(
        self,
        train_dataset: Rows | str,
        adapter_id: str,
        num_epochs: float = 3,
        batch_size: int = 4,
        learning_rate: float = 2e-4,
        eval_dataset: Rows = (),
        **settings: Any,
    ) -> LoRATrainingResult:
        """Train on rows (in any format that `data import` knows), or on a dataset or file by its name.

        `settings` are further fields of `TrainingSettings`. The adapter goes into the store as `adapter_id`, and
        `peft_model` is the trained one afterwards. Failures are raised.
        """
        data = train_dataset if isinstance(train_dataset, str) else self.import_rows(train_dataset, eval_dataset)
        spec = parse_spec(
            TrainingSpec,
            {
                "model": self.base_model_name,
                "data": data,
                "name": adapter_id,
                "lora": self.config.to_dict(),
                "training": {
                    "num_epochs": num_epochs,
                    "batch_size": batch_size,
                    "gradient_accumulation_steps": 1,
                    "learning_rate": learning_rate,
                    **settings,
                },
            },
        )
        self.model = self.peft_model = None  # the run loads its own copy; two would double the memory
        return self.collect(self.run(start_training(self.workbench, spec, auto_resume=False)))

    def import_rows(self, train_rows: Rows, eval_rows: Rows) -> str:
        """Store rows as a dataset named after their content; returns its name."""
        parts = chain(({**row, "split": "train"} for row in train_rows), ({**row, "split": "val"} for row in eval_rows))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in parts)
        if not text:
            raise InvalidData("train_dataset holds no rows, expected at least one")
        name = f"python-{sha256_bytes(text.encode())[:12]}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text(text, encoding="utf-8")
            return import_dataset(self.workbench, file, DataImportSpec(name=name)).name

    def run(self, job: Job) -> Job:
        folder = self.workbench.path(job.folder)
        order = JobOrder.model_validate(read_json(folder / ORDER))
        job, lease = self.workbench.jobs.take(job.id, holder(), {JobStatus.QUEUED})
        with LeaseKeeper(self.workbench.jobs, lease):
            try:
                result = run_training(order, folder, Reporter(folder))
                write_json(folder / RESULT, result.model_dump(mode="json"))
            finally:
                job = conclude(self.workbench, job, lease)
                self.workbench.jobs.release(lease)
        return job

    def collect(self, job: Job) -> LoRATrainingResult:
        assert job.result is not None
        path = self.workbench.path(adapter_of_job(self.workbench, job.id).folder)
        self.peft_model = load_adapter(self.load_base_model(), path)
        folder = self.workbench.path(job.folder)
        return LoRATrainingResult(
            success=True,
            adapter_path=path,
            training_loss=job.result["training_loss"],
            validation_loss=job.result["validation_loss"],
            training_time_seconds=job.result["training_time_seconds"],
            checkpoints=checkpoint_folders(folder),
            parameters=ParameterStatistics(job.result["trainable_parameters"], job.result["total_parameters"]),
        )

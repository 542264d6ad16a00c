"""What every service works with: the home folder and the rows in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.jobs import Job
from lorasmith.schemas.models import BaseModelEntry
from lorasmith.settings import Settings
from lorasmith.store.database import (
    AdapterRecord,
    DatasetRecord,
    EvaluationRecord,
    JobRecord,
    ModelRecord,
    open_database,
)
from lorasmith.store.jobs import JobTable
from lorasmith.store.records import Table


@dataclass(frozen=True)
class Workbench:
    """One home folder, opened. Paths in rows are relative to `home`."""

    home: Path
    datasets: Table[Dataset]
    jobs: JobTable
    adapters: Table[Adapter]
    models: Table[BaseModelEntry]
    evaluations: Table[Evaluation]

    @classmethod
    def open(cls, settings: Settings, *, anew: bool = False) -> Workbench:
        """Raises `DamagedDatabase`; `anew` makes a database where there is none beside folders."""
        engine = open_database(settings.home, anew=anew)
        return cls(
            home=settings.home,
            datasets=Table(engine, DatasetRecord, Dataset),
            jobs=JobTable(engine, JobRecord, Job, unique_names=False),
            adapters=Table(engine, AdapterRecord, Adapter),
            models=Table(engine, ModelRecord, BaseModelEntry),
            evaluations=Table(engine, EvaluationRecord, Evaluation, unique_names=False),
        )

    def path(self, relative: str) -> Path:
        return self.home / relative

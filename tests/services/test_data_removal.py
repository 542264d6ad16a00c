"""A version that something points at stays, unless it is said that it shall go."""

from __future__ import annotations

import pytest

from lorasmith.errors import Conflict, NotFound
from lorasmith.files import new_id, write_json
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.training import TrainingResult, TrainingSpec
from lorasmith.services import data
from lorasmith.services.data_redeciding import split
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.job_outcomes import keep_adapter
from lorasmith.services.training import start_training
from lorasmith.services.workbench import Workbench
from tests.services.import_cases import dataset_folders


def refusal(workbench: Workbench, name: str) -> str:
    with pytest.raises(Conflict) as caught:
        remove_dataset(workbench, name)
    assert caught.value.hint == "--force removes it all the same; what it was used for can then not be made again"
    return caught.value.message


def test_removing_takes_rows_and_folders_of_all_versions(workbench: Workbench, support: Dataset) -> None:
    split(workbench, "support", {"salt": "other"})
    assert len(remove_dataset(workbench, "support")) == 2
    assert data.list_datasets(workbench) == []
    assert dataset_folders(workbench) == []


def test_one_version_goes_alone_and_the_name_points_at_the_newest_that_is_left(
    workbench: Workbench, support: Dataset
) -> None:
    other = split(workbench, "support", {"salt": "other"}).after
    assert [one.id for one in remove_dataset(workbench, other.reference)] == [other.id]
    assert data.get_dataset(workbench, "support").id == support.id
    assert dataset_folders(workbench) == [support.id]
    with pytest.raises(NotFound):
        data.get_dataset(workbench, other.reference)


def test_a_parent_of_another_version_or_dataset_stays(workbench: Workbench, support: Dataset) -> None:
    other = split(workbench, "support", {"salt": "other"}).after
    copy = split(workbench, "support", {"salt": "third"}, new_name="copy").after
    assert refusal(workbench, support.reference) == (
        f"the dataset {support.reference!r} is used by dataset {other.reference}, dataset {copy.reference}"
    )
    assert refusal(workbench, "support") == f"the dataset 'support' is used by dataset {copy.reference}"
    remove_dataset(workbench, "copy")
    remove_dataset(workbench, "support")
    assert dataset_folders(workbench) == []


def test_a_job_points_at_its_version_and_keeps_that_one(workbench: Workbench, support: Dataset) -> None:
    job = start_training(workbench, TrainingSpec(model="starter", data=support.reference))
    other = split(workbench, "support", {"salt": "other"}).after
    assert refusal(workbench, "support") == f"the dataset 'support' is used by job {job.name}"
    remove_dataset(workbench, other.reference)
    assert refusal(workbench, support.reference).endswith(f"is used by job {job.name}")
    remove_dataset(workbench, "support", force=True)
    assert dataset_folders(workbench) == []


def test_adapters_and_evaluations_keep_what_they_were_made_from(workbench: Workbench, support: Dataset) -> None:
    adapter = Adapter(
        id=new_id("adapter"),
        name="bikes",
        base_model="starter",
        base_folder="",
        training_job_id=None,
        dataset="support",
        folder="adapters/bikes",
        digest="",
        size_bytes=0,
        lora_config={},
    )
    workbench.path(adapter.folder).mkdir(parents=True)
    write_json(workbench.path(adapter.folder) / "passport.json", {"dataset": {"id": support.id}})
    workbench.adapters.add(adapter)
    assert refusal(workbench, "support") == "the dataset 'support' is used by adapter bikes"
    workbench.adapters.remove(adapter.id)
    workbench.evaluations.add(
        Evaluation(
            id=new_id("evaluation"),
            name="bikes on support",
            adapter="bikes",
            model="starter",
            dataset="support",
            dataset_id=support.id,
            part="test",
            conditions=[],
            comparisons=[],
            peak_memory_bytes=0,
            settings={},
            folder="",
        )
    )
    assert refusal(workbench, "support") == "the dataset 'support' is used by evaluation bikes on support"


def test_many_users_are_counted(workbench: Workbench, support: Dataset) -> None:
    for number in range(7):
        split(workbench, "support", {"salt": f"{number}"}, new_name=f"copy{number}")
    assert refusal(workbench, "support").endswith(" and 2 more")


def test_an_adapter_says_which_version_it_was_trained_on(workbench: Workbench, support: Dataset) -> None:
    job = start_training(workbench, TrainingSpec(model="starter", data="support"))
    split(workbench, "support", {"salt": "other"})
    made = workbench.path(job.folder) / "adapter"
    made.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).write_text("{}", encoding="utf-8")
    result = TrainingResult.model_construct(adapter_folder="adapter", validation_loss=None, training_time_seconds=1.0)
    adapter = keep_adapter(workbench, job, result)
    assert (adapter.dataset, adapter.dataset_id, adapter.dataset_sha256) == ("support", support.id, support.sha256)
    assert refusal(workbench, "support") == f"the dataset 'support' is used by job {job.name}, adapter {adapter.name}"

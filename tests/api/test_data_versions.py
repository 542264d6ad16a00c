"""Versions of a dataset over the REST API."""

from __future__ import annotations

from collections.abc import Callable

from starlette.testclient import TestClient

from lorasmith.schemas.data import Dataset
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1, rows

Add = Callable[..., Dataset]
DATASETS = f"{V1}/datasets"


def test_another_split_is_a_new_version_under_the_name(client: TestClient, add_dataset: Add) -> None:
    before = add_dataset("sums", rows(200))
    answer = client.post(f"{DATASETS}/sums/split", json={"split": [0.5, 0.25, 0.25]})
    assert answer.status_code == 201, answer.text
    after = client.get(answer.headers["location"]).json()
    assert after["id"] != before.id
    assert 80 < after["part_sizes"]["train"] < 120
    assert client.get(f"{DATASETS}/sums").json()["id"] == after["id"]
    assert client.get(f"{DATASETS}/sums@{before.sha256[:12]}").json()["id"] == before.id
    assert [one["id"] for one in client.get(DATASETS).json()["data"]] == [after["id"]]
    both = client.get(DATASETS, params={"versions": True, "name": "sums"}).json()["data"]
    assert [one["id"] for one in both] == [after["id"], before.id]
    again = client.post(f"{DATASETS}/sums/split", json={"split": [0.5, 0.25, 0.25]})
    assert (again.status_code, again.json()["id"]) == (200, after["id"])


def test_a_split_that_makes_no_sense_is_refused(client: TestClient, add_dataset: Add) -> None:
    add_dataset("sums")
    for asked in (
        {},
        {"split": [0.5, 0.5, 0.5]},
        {"split": None},
        {"exact": True, "stratify": "label"},
        {"split": [1]},
    ):
        assert client.post(f"{DATASETS}/sums/split", json=asked).status_code == 422, asked
    assert len(client.get(DATASETS, params={"versions": True}).json()["data"]) == 1


def test_near_duplicates_go_and_come_back(client: TestClient, add_dataset: Add) -> None:
    same = "How do I oil the chain of a bicycle that has stood outside all winter long"
    pairs = "".join(f'{{"instruction": "{same}{end}", "output": "Wash it first."}}\n' for end in ("?", " please?"))
    before = add_dataset("chains", rows(20) + pairs)
    answer = client.post(f"{DATASETS}/chains/dedup", json={"threshold": 0.7})
    assert answer.status_code == 201, answer.text
    after = client.get(answer.headers["location"]).json()
    assert (after["num_examples"], after["fates"]["near_duplicate"]) == (before.num_examples - 1, 1)
    again = client.post(f"{DATASETS}/chains/dedup", json={"threshold": 0.7})
    assert (again.status_code, again.json()["id"]) == (200, after["id"])
    back = client.post(f"{DATASETS}/chains/dedup", json={"threshold": None})
    assert (back.status_code, back.json()["id"]) == (201, before.id)
    other = client.post(f"{DATASETS}/chains/dedup", json={"threshold": 0.7, "name": "fewer"})
    assert (other.status_code, other.json()["name"]) == (201, "fewer")
    taken = client.post(f"{DATASETS}/chains/dedup", json={"name": "fewer"})
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    assert client.post(f"{DATASETS}/chains/dedup", json={"threshold": 0.1}).status_code == 422


def test_a_name_goes_back_to_a_version_that_the_caller_has_seen(client: TestClient, add_dataset: Add) -> None:
    before = add_dataset("sums", rows(40))
    first = client.get(f"{DATASETS}/sums").headers["etag"]
    after = client.post(f"{DATASETS}/sums/split", json={"salt": "other"}).json()
    address = f"{DATASETS}/sums@{before.sha256[:12]}/restore"
    late = client.post(address, headers={"If-Match": first})
    assert (late.status_code, late.json()["code"]) == (412, "changed")
    assert client.get(f"{DATASETS}/sums").json()["id"] == after["id"]
    seen = client.get(f"{DATASETS}/sums").headers["etag"]
    restored = client.post(address, headers={"If-Match": seen})
    assert (restored.status_code, restored.json()["id"]) == (200, before.id)
    assert client.get(f"{DATASETS}/sums").headers["etag"] == restored.headers["etag"]
    assert client.post(f"{DATASETS}/sums@00000000/restore").status_code == 404


def test_the_lineage_names_steps_and_no_folder_of_the_server(
    client: TestClient, add_dataset: Add, workbench: Workbench
) -> None:
    before = add_dataset("sums", rows(40))
    after = client.post(f"{DATASETS}/sums/split", json={"split": [0.5, 0.25, 0.25]}).json()
    found = client.get(f"{DATASETS}/sums/lineage").json()
    assert [step["operation"] for step in found["steps"]] == ["import", "split"]
    read, parent = (step["inputs"][0] for step in found["steps"])
    assert (read["kind"], read["name"], read["sha256"]) == ("source", "sums.jsonl", before.source_sha256)
    assert (parent["kind"], parent["id"], parent["sha256"]) == ("dataset", before.id, before.sha256)
    assert found["steps"][1]["options"]["split"] == [0.5, 0.25, 0.25]
    assert found["steps"][1]["sha256"] == after["sha256"]
    assert found["versions"] == [before.reference, after["version"]]
    assert str(workbench.home.parent) not in str(found)


def test_a_replay_compares_every_step(client: TestClient, add_dataset: Add, workbench: Workbench) -> None:
    dataset = add_dataset("sums", rows(40))
    client.post(f"{DATASETS}/sums/split", json={"salt": "other"})
    done = client.post(f"{DATASETS}/sums/replay").json()
    assert (done["equal"], [step["operation"] for step in done["steps"]]) == (True, ["import", "split"])
    source = workbench.home.parent / "sums.jsonl"
    source.write_text(rows(41), encoding="utf-8")
    done = client.post(f"{DATASETS}/sums/replay").json()
    assert done["equal"] is False
    assert done["steps"][0]["difference"].startswith("the source changed: its sha256 was " + dataset.source_sha256)
    source.unlink()
    gone = client.post(f"{DATASETS}/sums/replay")
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
    assert str(source.parent) not in gone.text

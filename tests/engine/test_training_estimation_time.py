"""How long an estimate says that a run takes, alone or as several processes, and what those add."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.estimation.memory import Process, estimate_disk, estimate_memory, validation_count
from lorasmith.engine.training.estimation.micro_batches import dealt_steps, dealt_validation
from lorasmith.engine.training.estimation.prediction import Overheads, estimate_time, scaled
from lorasmith.engine.training.estimation.sample import Sample, choose_sample
from lorasmith.engine.training.estimation.several import alone_share
from lorasmith.engine.training.estimation.shape import Material, shape_run
from lorasmith.engine.training.estimation.suggestions import changes
from lorasmith.engine.training.estimation.timing import Rates, one_layer, small_model
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.training import check_runnable
from tests.engine.conftest import Shaped
from tests.engine.decoder_cases import needs_integers

RATES = Rates(
    layer_s=1.0, rest_s=0.5, forward_layer_s=0.25, forward_rest_s=0.125, update_s=0.0, save_s=0.0, first_s=0.0,
    spread=0.0, measured_s=1.0, layers=1,
)  # fmt: skip


def test_time_is_tokens_times_layers_plus_what_is_done_now_and_then(shaped: Shaped) -> None:
    shape = shaped(num_epochs=2, eval_every=3, save_every=4)  # 24 rows, 4 a step: 12 steps
    shape.step_bytes = 0
    clock = estimate_time(shape, Overheads(start_s=3.0, end_s=2.0), RATES, estimate_disk(shape, shape.folder))
    assert clock.training_s == pytest.approx(2 * shape.part.tokens * (0.5 + 2 * 1.0))
    validated = sum(len(row.ids) for row in shape.validation)
    assert clock.validation_s == pytest.approx(13 * validated * (0.125 + 2 * 0.25))  # before, and after each step
    assert clock.total_s == pytest.approx(5.0 + clock.training_s + clock.validation_s)
    again = replace(shape, spec=shape.spec.model_copy(deep=True))
    again.spec.training.gradient_checkpointing = True
    slower = estimate_time(again, Overheads(0, 0), scaled(RATES, again, shape), estimate_disk(again, again.folder))
    config = shape.base.config
    down = config.hidden_size * config.intermediate_size
    attention = 2 * config.hidden_size**2 * (1 + config.num_key_value_heads / config.num_attention_heads)
    all_but_down = 1 - down / (3 * down + attention)
    assert slower.training_s == pytest.approx(2 * shape.part.tokens * (0.5 + 2 * (1 + 0.25 * all_but_down)))


def test_processes_have_copies_and_their_share_of_a_step_and_sum_gradients_in_buckets(shaped: Shaped) -> None:
    alone, three = shaped(num_epochs=1), shaped(num_epochs=1, processes=3)
    alone.step_bytes = three.step_bytes = 1_000_000
    one, of_three = (estimate_memory(shape, Process(100, 10, further_bytes=60)) for shape in (alone, three))
    assert one.process_peaks_bytes == [one.peak_bytes]
    assert one.reduction_bytes == 0
    assert of_three.reduction_bytes == 2 * 4 * three.trained_elements  # the gradients, copied, and their sum
    training = one.weights_bytes + one.adapter_bytes + 1_000_000 + 10
    further = 60 + training + of_three.reduction_bytes
    first = 100 + training + max(of_three.saving_bytes, of_three.reduction_bytes)
    assert of_three.process_peaks_bytes == [first, further, further]
    assert of_three.peak_bytes == first + 2 * further
    assert estimate_disk(three, three.folder).peak_bytes == pytest.approx(
        estimate_disk(alone, alone.folder).peak_bytes, rel=1e-3
    )


def test_several_processes_wait_for_the_one_with_most_tokens_and_for_the_sum(shaped: Shaped) -> None:
    shape = shaped(num_epochs=2, processes=3, batch_size=5, eval_every=12)  # 24 rows: four steps of 5, and one of 4
    shape.step_bytes = 0
    rates = replace(RATES, exchange_s=7.0, reduce_s=0.01, alone=0.4)
    disk = estimate_disk(shape, shape.folder)
    overheads = Overheads(start_s=9.0, end_s=0.0, launch_s=5.0)
    clock = estimate_time(shape, overheads, rates, disk)
    steps = list(dealt_steps(shape))
    assert sorted(row for step in steps for share in step for row in share) == list(range(len(shape.part.rows)))
    tokens = [[sum(len(shape.part.rows[row].ids) for row in share) for share in step] for step in steps]
    waited = sum(max(loads) for loads in tokens)
    assert shape.part.tokens / 3 <= waited < shape.part.tokens
    assert clock.exchange_s == pytest.approx(shape.plan.total_steps * (7.0 + 0.01 * shape.trained_elements))
    assert clock.training_s == pytest.approx(2 * waited * 2.5 + clock.exchange_s)
    checked = max(sum(len(shape.validation[row].ids) for row in share) for share in dealt_validation(shape))
    assert clock.validation_s == pytest.approx(validation_count(shape) * checked * (0.125 + 2 * 0.25))
    one = replace(shape, spec=shape.spec.model_copy(deep=True))
    one.spec.training.processes = 1
    alone = estimate_time(one, overheads, scaled(rates, one, shape), disk)
    assert alone.training_s == pytest.approx(2 * shape.part.tokens * 2.5 * 0.4)
    assert (clock.start_s, alone.start_s, alone.exchange_s) == (9.0, 4.0, 0.0)


def test_what_processes_measure_at_a_time_is_what_each_computes_in_the_run(shaped: Shaped) -> None:
    shape = shaped(processes=2)
    sample = choose_sample(shape, budget_s=60.0)
    devices = Devices(count=2)
    dealt = [devices.shares(shape.plan.row_indices(step), shape.part.rows) for step in range(shape.plan.total_steps)]
    for of_each in sample.batches:
        assert any(all(set(batch) <= set(share) for batch, share in zip(of_each, step, strict=True)) for step in dealt)
    assert {index for of_each in sample.batches for batch in of_each for index in batch} == set(range(24))
    assert sorted(sample.alone) == sorted(shape.plan.row_indices(0))


def test_one_process_alone_is_measured_with_all_cores_on_whole_steps() -> None:
    calls: list[tuple[list[int], int]] = []

    class Computes:
        def gradients(self, batch: list[int], rows: Any, *, scale: float, step: int) -> float:
            calls.append((batch, torch.get_num_threads()))
            time.sleep(0.02)
            return 1.0

    rows = [RenderedExample(n, [1] * 10, [True] * 10) for n in range(6)]
    sample = Sample(layers=1, vocabulary=2, batches=[[[0, 1]]], alone=[0, 1, 2, 3])
    before = torch.get_num_threads()
    computation: Any = Computes()
    share = alone_share(computation, sample, rows, Devices(), threads_alone=before + 2)
    assert share == pytest.approx(0.5, rel=0.3)  # the same time for twice the tokens
    assert set(map(str, calls)) == {str(([0, 1], before)), str(([0, 1, 2, 3], before + 2))}
    assert torch.get_num_threads() == before


def test_one_process_in_the_place_of_several_is_a_change_to_consider_on_the_cpu_as_they_are(
    shaped: Shaped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_a_gpu_else = {"training.processes": 1, "training.device": "cpu"}
    assert on_a_gpu_else in [change.values for change in changes(shaped(processes=2, device="auto"))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {"training.processes": 1} in [change.values for change in changes(shaped(processes=2))]
    assert {"training.processes": 1} not in [change.values for change in changes(shaped())]


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"memory": "lean"}, "plain"),
        ({"memory": "fast"}, "packed"),
        ({"memory": "lean", "gradient_checkpointing": True}, "plain"),
        ({"quantization": "int8"}, "int8"),
        pytest.param({"precision": "int16"}, "int16", marks=needs_integers),
    ],
    ids=str,
)
def test_what_is_timed_computes_as_the_run_does(
    material: Callable[..., tuple[TrainingSpec, Material]], tmp_path: Path, settings: dict[str, Any], path: str
) -> None:
    spec, found = material(**settings)
    shape = shape_run(found, spec)
    sample = choose_sample(shape, budget_s=60.0)
    small = small_model(shape, sample, found.tokenizer, tmp_path, Reporter(tmp_path), Devices())
    real = shape.computation()
    assert isinstance(small.all, PackedComputation)
    assert isinstance(real, PackedComputation)
    one = one_layer(small.all, spec.training)
    assert len(one.decoder.decoder.layers) == 1
    for timed in (small.all.decoder, one.decoder):
        for name in ("head_tokens", "kept_tokens", "recompute"):
            assert getattr(timed, name) == getattr(real.decoder, name)
    assert {group.weight.path for group in small.all.decoder.decoder.groups} == {path}


def rows_of_an_update(spec: TrainingSpec) -> int:
    return spec.training.batch_size * spec.training.gradient_accumulation_steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": "fast"},
        {"memory": "lean", "quantization": "nf4"},
        {"memory": "fast", "precision": "bf16", "gradient_checkpointing": True},
        {"optimizer": "adafactor", "batch_size": 1, "warmup_ratio": 0.1},
        {"lora": {"use_dora": True, "target_modules": "all"}, "batch_size": 11},
        {"lora": {"modules_to_save": ["lm_head"], "target_modules": "all"}, "batch_size": 9},
    ],
)
def test_every_change_to_consider_is_one_that_the_run_may_make(shaped: Shaped, settings: dict[str, Any]) -> None:
    shape = shaped(**settings)
    found = changes(shape)
    assert found
    for change in found:
        spec = change.applied(shape.spec)
        check_runnable(spec, "data", has_validation=True)
        if change.about.endswith("the same update"):
            assert rows_of_an_update(spec) == rows_of_an_update(shape.spec)
        changed = spec.model_dump()
        for name, value in change.values.items():
            section, _, own = name.partition(".")
            assert changed[section][own] == value

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import InvalidSpec, NotFound
from lorasmith.schemas.training import PRESETS
from lorasmith.services.specs import merge, parse_assignments
from lorasmith.services.training import build_spec

FLAGS = {"model": "starter", "data": "signatures"}


def test_a_run_without_a_preset_takes_balanced() -> None:
    spec = build_spec(FLAGS)
    assert (spec.preset, spec.lora.rank, spec.lora.alpha, spec.training.learning_rate) == ("balanced", 32, 64, 2e-4)


def test_flags_win_over_the_file_and_assignments_over_flags(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: a\ndata: b\npreset: quick\ntraining: {num_epochs: 7, batch_size: 2}\n", encoding="utf-8")
    spec = build_spec({"model": "starter"}, config=config, assignments=["training.batch_size=16"])
    assert (spec.model, spec.data, spec.preset) == ("starter", "b", "quick")
    assert (spec.training.num_epochs, spec.training.batch_size, spec.lora.rank) == (7, 16, 8)


@pytest.mark.parametrize("name", ["rank", "r", "lora_r"])
def test_both_spellings_of_a_field_override_the_preset(name: str) -> None:
    assert build_spec(FLAGS, assignments=[f"lora.{name}=5"]).lora.rank == 5


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    with pytest.raises(InvalidSpec, match=r"there is no field 'lora.rnk'; did you mean 'lora.rank'\?"):
        build_spec(FLAGS, assignments=["lora.rnk=3"])


def test_every_wrong_field_is_listed_at_once() -> None:
    with pytest.raises(InvalidSpec) as raised:
        build_spec(FLAGS, assignments=["lora.rank=0", "training.batch_size=many"])
    assert "lora.rank: Input should be greater than or equal to 1, got 0" in raised.value.message
    assert "training.batch_size: Input should be a valid integer" in raised.value.message


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(InvalidSpec, match="no preset 'balancd'; did you mean 'balanced'") as raised:
        build_spec({**FLAGS, "preset": "balancd"})
    assert raised.value.hint == f"presets: {', '.join(PRESETS)}"


def test_a_missing_model_says_where_to_give_it() -> None:
    with pytest.raises(InvalidSpec, match="model is missing"):
        build_spec({"data": "x"})


def test_a_config_that_is_not_there_and_one_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no config file"):
        build_spec(FLAGS, config=tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [", encoding="utf-8")
    with pytest.raises(InvalidSpec, match="is not valid YAML"):
        build_spec(FLAGS, config=broken)


def test_assignments_are_numbers_lists_and_words() -> None:
    values = parse_assignments(
        ["training.learning_rate=2e-4", "lora.target_modules=[q_proj, v_proj]", "lora.use_rslora=true"]
    )
    assert values == {
        "training": {"learning_rate": 2e-4},
        "lora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    }
    with pytest.raises(InvalidSpec, match="--set takes field=value, got 'lora.rank'"):
        parse_assignments(["lora.rank"])


def test_merging_goes_into_sections() -> None:
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_run(preset: str) -> None:
    assert build_spec({**FLAGS, "preset": preset}).preset == preset

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorasmith.errors import InvalidSpec, MissingExtra, NotFound
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.training import TrainingSettings
from lorasmith.schemas.training_presets import PRESETS
from lorasmith.services.data_import import import_dataset
from lorasmith.services.specs import merge, parse_assignments
from lorasmith.services.training import build_spec, start_training
from lorasmith.services.workbench import Workbench

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


def test_an_override_wins_whichever_spellings_were_used(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    for in_file, in_override in (("rank", "r"), ("r", "rank"), ("lora_r", "r")):
        config.write_text(f"lora: {{{in_file}: 4}}\n", encoding="utf-8")
        assert build_spec(FLAGS, config=config, assignments=[f"lora.{in_override}=5"]).lora.rank == 5


def test_one_field_under_two_names_is_refused_with_both(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lora: {r: 4, rank: 5}", encoding="utf-8")
    with pytest.raises(InvalidSpec, match=r"^lora.r=4 and lora.rank=5 are one field under two names$") as raised:
        build_spec(FLAGS, config=config)
    assert raised.value.hint == "give one of them"
    preset = preset_file(tmp_path, "mine", "training: {num_epochs: 1, epochs: 2}\n")
    with pytest.raises(InvalidSpec) as raised:
        build_spec({**FLAGS, "preset": "mine"}, home=tmp_path)
    assert (
        raised.value.message == f"{preset}: training.num_epochs=1 and training.epochs=2 are one field under two names"
    )


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
    assert raised.value.hint is not None
    assert raised.value.hint.startswith(f"presets: {', '.join(PRESETS)}; your own: none")


def preset_file(home: Path, name: str, text: str) -> Path:
    (home / "presets").mkdir(exist_ok=True)
    path = home / "presets" / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_preset_of_the_home_folder_is_one_like_the_built_in_ones(tmp_path: Path) -> None:
    preset_file(tmp_path, "ours", "lora: {lora_r: 24}\ntraining: {weight_decay: 1e-5, warmup_ratio: 0.1}\n")
    spec = build_spec({**FLAGS, "preset": "ours"}, home=tmp_path, assignments=["lora.alpha=48"])
    assert (spec.preset, spec.lora.rank, spec.lora.alpha, spec.training.weight_decay) == ("ours", 24, 48, 1e-5)
    with pytest.raises(InvalidSpec, match="no preset 'our'; did you mean 'ours'") as raised:
        build_spec({**FLAGS, "preset": "our"}, home=tmp_path)
    assert raised.value.hint == f"presets: {', '.join(PRESETS)}; your own: ours"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ours", "lora: {rnk: 3}", "ours.yaml: there is no field 'lora.rnk'; did you mean 'lora.rank'"),
        ("ours", "rank: 3", "ours.yaml holds 'rank'; a preset has the sections `lora` and `training` alone"),
        ("quick", "lora: {rank: 3}", "quick.yaml has the name of a built-in preset"),
    ],
)
def test_a_wrong_preset_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    preset_file(tmp_path, name, text)
    with pytest.raises(InvalidSpec, match=message):
        build_spec({**FLAGS, "preset": name}, home=tmp_path)


def test_off_is_a_word_though_yaml_reads_false() -> None:
    assert build_spec(FLAGS, assignments=["training.compile=off"]).training.compile == "off"
    assert build_spec(FLAGS, assignments=["training.compile=on"]).training.compile == "on"


def test_a_warmup_ratio_replaces_the_steps_of_the_preset_and_not_ones_that_were_given() -> None:
    settings = build_spec({**FLAGS, "preset": "quick"}, assignments=["training.warmup_ratio=0.06"]).training
    assert (settings.warmup_ratio, settings.warmup_steps) == (0.06, None)
    assert TrainingSettings.model_validate(settings.model_dump()) == settings  # a job folder holds every field
    with pytest.raises(InvalidSpec) as raised:
        build_spec(FLAGS, assignments=["training.warmup_ratio=0.06", "training.warmup_steps=5"])
    expected = "training.warmup_steps: give either warmup_steps or warmup_ratio (which is 0.06), not both, got 5"
    assert raised.value.message == expected


def test_what_a_dry_run_prints_can_be_changed_in_its_warmup(tmp_path: Path) -> None:
    printed = tmp_path / "run.yaml"
    printed.write_text(yaml.safe_dump(build_spec({**FLAGS, "preset": "quick"}).model_dump()), encoding="utf-8")
    settings = build_spec({}, config=printed, assignments=["training.warmup_ratio=0.1"]).training
    assert (settings.warmup_ratio, settings.warmup_steps) == (0.1, None)
    printed.write_text(yaml.safe_dump({**FLAGS, "training": {"warmup_ratio": 0.1}}), encoding="utf-8")
    settings = build_spec({}, config=printed, assignments=["training.warmup_steps=3"]).training
    assert (settings.warmup_ratio, settings.warmup_steps) == (None, 3)


def test_a_later_assignment_wins_whatever_it_calls_the_field() -> None:
    assert build_spec(FLAGS, assignments=["lora.r=16", "lora.rank=4"]).lora.rank == 4
    assert build_spec(FLAGS, assignments=["lora.rank=4", "lora.lora_r=16"]).lora.rank == 16


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate=1e-3", "there is no field 'learning_rate'; did you mean 'training.learning_rate'?"),
        ("training.layers_to_transform=[0]", "no field 'training.layers_to_transform'; did you mean 'lora.layers_to_"),
        ("training.lr=1e-3", "there is no field 'training.lr'; say training.learning_rate"),
        ("training.optm=adamw", "there is no field 'training.optm'; did you mean 'training.optim'?"),
        ("lora=", "lora has to be a mapping of fields, got None"),
        ("lora.rank=[1", r"--set lora.rank=\[1: the value is not valid YAML"),
        ("training.learning_rate=inf", "training.learning_rate: Input should be a finite number, got inf"),
        ("lora.alpha=.nan", "lora.alpha: Input should be a finite number, got nan"),
        ("training.seed=99999999999999999999", "training.seed: Input should be less than 9223372036854775808"),
        ("preset=[a]", r"preset has to be a name, got \['a'\]"),
    ],
)
def test_a_wrong_assignment_says_what_is_meant(assignment: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        build_spec(FLAGS, assignments=[assignment])


def test_modules_and_first_weights_may_be_said_as_peft_says_them() -> None:
    for said, meant in (("all-linear", "all"), ("mlp", "mlp"), ("q_proj", ["q_proj"]), ("'a,b'", ["a", "b"])):
        assert build_spec(FLAGS, assignments=[f"lora.target_modules={said}"]).lora.target_modules == meant
    assert build_spec(FLAGS, assignments=["lora.init_lora_weights=true"]).lora.init == "default"
    assert build_spec(FLAGS, assignments=["name='1e3'"]).name == "1e3"


def test_a_config_that_is_a_folder_or_no_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="cannot be read: Is a directory"):
        build_spec(FLAGS, config=tmp_path)
    preset_file(tmp_path, "latin", "").write_bytes(b"lora: {rank: 4} # \xe9\n")
    with pytest.raises(InvalidSpec, match=r"latin.yaml is not UTF-8: .* at byte 18"):
        build_spec({**FLAGS, "preset": "latin"}, home=tmp_path)


def test_the_names_of_the_seeds_and_of_peft_are_understood(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "lora: {lora_r: 16, lora_alpha: 32, lora_dropout: 0.05, use_rslora: true, use_dora: true,\n"
        "  layers_to_transform: [0, 1], init_lora_weights: pissa, rank_pattern: {q_proj: 4}}\n"
        "training: {weight_decay: 1e-5, optimizer: adamw_torch, lr_scheduler_type: cosine, save_steps: 100,\n"
        "  logging_steps: 10, eval_steps: 20, per_device_train_batch_size: 1, load_best_model_at_end: true}\n",
        encoding="utf-8",
    )
    spec = build_spec(FLAGS, config=config)
    assert (spec.lora.layers, spec.lora.init, spec.lora.use_dora, spec.lora.rank_pattern) == (
        [0, 1], "pissa", True, {"q_proj": 4},
    )  # fmt: skip
    settings = spec.training
    assert (settings.weight_decay, settings.optimizer, settings.log_every, settings.eval_every) == (
        1e-5, "adamw", 10, 20,
    )  # fmt: skip
    assert (settings.save_every, settings.keep_best) == (100, True)


def test_a_run_that_cannot_start_is_refused_before_it_is_a_job(
    workbench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one", "split": "train"}\n', encoding="utf-8")
    import_dataset(workbench, file, DataImportSpec(name="rows"))
    flags = {"model": "starter", "data": "rows"}
    with pytest.raises(InvalidSpec, match="keep_best needs validation rows, and dataset 'rows' has none"):
        start_training(workbench, build_spec(flags, assignments=["training.keep_best=true"]))
    monkeypatch.setattr("lorasmith.services.training.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="optimizer adamw_8bit needs the extra `quant`") as raised:
        start_training(workbench, build_spec(flags, assignments=["training.optimizer=adamw_8bit"]))
    assert raised.value.hint == "pip install 'lorasmith[quant]'"
    assert not workbench.jobs.list()


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

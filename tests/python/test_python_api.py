"""The Python names of the scaffold, and the example that uses them all."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import lorasmith
from lorasmith import (
    LoRAAdapter,
    LoRAConfig,
    LoRATargetModules,
    LoRATrainer,
    apply_lora_adapter,
    load_lora_adapter,
    save_lora_adapter,
)
from lorasmith.errors import InvalidData, InvalidModel, InvalidSpec, NotFound

ROOT = Path(__file__).parents[2]


def test_the_example_file_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "python_api.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Success: True" in printed
    assert "mesh_routing_v1: PeftModel" in printed


def test_the_defaults_are_the_scaffolds() -> None:
    config = LoRAConfig()
    assert (config.r, config.alpha, config.dropout) == (8, 32, 0.1)
    assert set(config.target_modules) == {"q_proj", "v_proj", "k_proj", "o_proj"}
    assert LoRATargetModules.Q_PROJ == "q_proj"


def test_a_config_survives_its_dictionary_and_names_unknown_fields() -> None:
    config = LoRAConfig(r=4, alpha=16, dropout=0.0, target_modules=["q_proj"], use_rslora=True)
    assert LoRAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InvalidSpec, match="LoRAConfig has no field 'alhpa'; did you mean 'alpha'"):
        LoRAConfig.from_dict({"alhpa": 1})
    with pytest.raises(InvalidSpec, match="r must be at least 1, got 0"):
        LoRAConfig(r=0)


def test_peft_understands_the_config() -> None:
    peft_config = LoRAConfig(r=4, alpha=16, dropout=0.05, use_rslora=True).to_peft_config()
    assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout, peft_config.use_rslora) == (
        4,
        16,
        0.05,
        True,
    )
    assert peft_config.task_type == "CAUSAL_LM"


def test_saving_and_loading_gives_the_same_model_and_identity(tmp_path: Path) -> None:
    trainer = LoRATrainer("starter", LoRAConfig(r=4), home=tmp_path / "home")
    model = trainer.setup_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.arange(20).unsqueeze(0)
    expected = model.eval()(ids).logits
    save_lora_adapter(LoRAAdapter("mine", "starter", trainer.config, {"author": "me"}), tmp_path / "a", model)

    base = trainer.load_base_model()
    loaded = load_lora_adapter(tmp_path / "a", base)
    assert (loaded.adapter_id, loaded.base_model_name, loaded.config, loaded.metadata) == (
        "mine", "starter", trainer.config, {"author": "me"},
    )  # fmt: skip
    torch.testing.assert_close(apply_lora_adapter(base, loaded)(ids).logits, expected, atol=1e-5, rtol=0)


def test_every_setting_of_the_adapter_survives_saving_and_loading(tmp_path: Path) -> None:
    config = LoRAConfig(
        r=4,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 8},
        layers=[0, 2],
        modules_to_save=["norm"],
        init="gaussian",
    )
    trainer = LoRATrainer("starter", config, home=tmp_path / "home")
    model = trainer.setup_lora()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(20).unsqueeze(0)
    expected = model.eval()(ids).logits
    save_lora_adapter(LoRAAdapter("mine", "starter", config), tmp_path / "a", model)
    base = trainer.load_base_model()
    loaded = load_lora_adapter(tmp_path / "a", base)
    assert loaded.config == config
    (tmp_path / "a" / "lorasmith.json").unlink()  # then it is read from PEFT's file, which does not keep the init
    read = load_lora_adapter(tmp_path / "a", base).config
    read.target_modules = config.target_modules
    assert read == config
    torch.testing.assert_close(apply_lora_adapter(base, loaded)(ids).logits, expected, atol=1e-5, rtol=0)


def test_a_wrong_setting_is_named_before_anything_runs(tmp_path: Path) -> None:
    trainer = LoRATrainer("starter", home=tmp_path / "home")
    with pytest.raises(InvalidSpec, match="there is no field 'training.warmup_stpes'; did you mean"):
        trainer.train([{"text": "one"}], "a", warmup_stpes=3)


def test_statistics_count_what_trains(tmp_path: Path) -> None:
    statistics = LoRATrainer(
        "starter", LoRAConfig(r=2, target_modules=["q_proj"]), home=tmp_path
    ).trainable_parameters()
    assert statistics.trainable == 5 * 2 * (256 + 256)  # five layers, A and B of rank 2
    assert statistics.share == statistics.trainable / statistics.total


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    trainer = LoRATrainer("starter", home=tmp_path / "home")
    base = trainer.load_base_model()
    with pytest.raises(NotFound, match="no adapter folder"):
        load_lora_adapter(tmp_path / "none", base)
    with pytest.raises(InvalidModel, match="is not a PEFT adapter"):
        load_lora_adapter(tmp_path / "home", base)
    with pytest.raises(InvalidSpec, match="matches no linear layer"):
        LoRATrainer("starter", LoRAConfig(target_modules=["c_attn"]), home=tmp_path / "home").setup_lora()
    with pytest.raises(InvalidData, match="train_dataset holds no rows"):
        trainer.train([], "empty")


def test_a_trained_adapter_is_in_the_store(tmp_path: Path) -> None:
    trainer = LoRATrainer("starter", LoRAConfig(r=2), home=tmp_path / "home")
    rows = [{"text": f"number {index}"} for index in range(8)]
    result = trainer.train(rows, "numbers", num_epochs=1, eval_dataset=[{"text": "number 9"}])
    assert result.success
    assert result.validation_loss is not None
    assert result.checkpoints
    (stored,) = trainer.workbench.adapters.list()
    assert stored.name == "numbers"
    assert trainer.workbench.path(stored.folder) == result.adapter_path


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'FederatedCoordinator'"):
        _ = lorasmith.FederatedCoordinator

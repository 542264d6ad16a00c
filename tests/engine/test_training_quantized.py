"""Training runs on a quantised base: what is saved, what a resumed run repeats, what other settings do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerBase

from lorasmith.engine.evaluation.run import command
from lorasmith.engine.evaluation.run import load as load_for_evaluation
from lorasmith.engine.evaluation.run import run as evaluate
from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.lora.quantized import Quantization
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.loading import load_adapter, load_model, other_precision
from lorasmith.engine.reporting import Reporter, SilentReporter
from lorasmith.engine.training import run as run_module
from lorasmith.engine.training.loop import TrainingRun, train
from lorasmith.errors import Interrupted, InvalidSpec
from lorasmith.schemas.evaluation import EvaluationInputs, EvaluationSpec
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.training import TrainingSettings, TrainingSpec
from lorasmith.services.specs import parse_spec
from lorasmith.services.training import build_spec, check_quantization
from tests.engine.adapter_cases import Case
from tests.engine.small_jobs import events, run_engine, stop_at_step

Job = Callable[..., Path]
IDS = torch.arange(3, 35).unsqueeze(0)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = adapter_weights(one), adapter_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PeftModel]:
    """The models as they were in memory when their training was over."""
    models: list[PeftModel] = []

    def training(run: TrainingRun, report: Reporter) -> bool:
        models.append(run.model)
        return train(run, report)

    monkeypatch.setattr(run_module, "train", training)
    return models


@pytest.fixture(scope="session")
def olmo2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A family that the packed decoder does not know."""
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("olmo2")
    Olmo2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_base(model: PeftModel, folder: Path, *, with_initial: bool) -> Any:
    """The full model with each weight as training had it: dequantised, plus scale · B0 A0 where that was taken out."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    initial = load_file(folder_of_job(model) / "initial.safetensors") if with_initial else {}
    with torch.no_grad():
        for name, module in model.named_modules():
            layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if not isinstance(layer, QuantizedLinear) or name.endswith("base_layer"):
                continue
            weight = layer.dequantized()
            if with_initial:
                A, B = initial[f"{name}.lora_A.weight"], initial[f"{name}.lora_B.weight"]
                weight = weight + module.scaling["default"] * (B @ A)
            base.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight)
    return base


def folder_of_job(model: PeftModel) -> Path:
    return Path(model.job_folder)


@pytest.mark.parametrize(("init", "quantization"), [("default", "int8"), ("pissa", "nf4"), ("loftq", "nf4")])
def test_the_adapter_is_what_was_trained_beside_the_quantised_base(
    qwen2_folder: Path, training_job: Job, trained: list[PeftModel], init: str, quantization: str
) -> None:
    lora = {**LORA, "init": init, "loftq_iterations": 3}
    folder = training_job(qwen2_folder, lora=lora, quantization=quantization, max_steps=4)
    result = run_engine(folder)
    assert result["training_loss"][-1] < result["training_loss"][0]
    (paths,) = events(folder, "paths")
    assert paths["memory"] == "lean"
    assert set(paths["modules"].values()) == {quantization}
    elements = sum(
        module.weight.numel() for module in load_model(qwen2_folder).modules() if isinstance(module, nn.Linear)
    )
    assert result["total_parameters"] > elements  # those in fewer bits are counted

    model = trained[0].eval()
    model.job_folder = str(folder)
    same_base = trained_base(model, qwen2_folder, with_initial=init != "default")
    with torch.no_grad():
        logits = model(IDS).logits
        on_trained_base = PeftModel.from_pretrained(same_base, folder / "adapter").eval()(IDS).logits
        on_full_base = load_adapter(load_model(qwen2_folder), folder / "adapter")(IDS).logits
        full = load_model(qwen2_folder)(IDS).logits
    torch.testing.assert_close(on_trained_base, logits, atol=1e-5, rtol=0)  # float32
    effect, lost = (on_full_base - full).norm(), (on_full_base - logits).norm()
    assert 1e-3 < lost < (0.1 if quantization == "int8" else 1.5) * effect  # what quantising takes away is left


def test_loftq_begins_nearer_to_the_full_model_than_a_plain_start(qwen2_folder: Path, tmp_path: Path) -> None:
    distances = []
    full = load_model(qwen2_folder)(IDS).logits.detach()
    for init in ("default", "loftq"):
        base = load_model(qwen2_folder, torch.float32, Quantization("nf4"))
        config = fit(LoRAConfig(r=16, alpha=32, dropout=0.0, target_modules="all", init=init), base)  # type: ignore[arg-type]
        model, initial = run_module.adapted(base, config, tmp_path, SilentReporter(tmp_path))
        assert bool(initial) == (init == "loftq")
        distances.append((model.eval()(IDS).logits.detach() - full).norm())
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("family", ["packed", "peft"])
def test_evaluations_between_steps_change_nothing(
    qwen2_folder: Path, olmo2_folder: Path, training_job: Job, family: str
) -> None:
    base = qwen2_folder if family == "packed" else olmo2_folder
    settings = {"quantization": "nf4", "max_steps": 4, "lora": LORA}
    often = training_job(base, "often", eval_every=1, **settings)
    seldom = training_job(base, "seldom", **settings)
    order = json.loads((seldom / "job.json").read_text(encoding="utf-8"))
    order["inputs"]["val_file"] = None
    (seldom / "job.json").write_text(json.dumps(order), encoding="utf-8")
    run_engine(often)
    run_engine(seldom)
    assert len(events(often, "evaluation")) == 5
    assert not events(seldom, "evaluation")
    assert_same_bits(often, seldom)
    notes = [event["text"] for event in events(often, "note")]
    assert any("trains through PEFT" in note for note in notes) == (family == "peft")
    assert any("weights of the base are in 4.1" in note for note in notes)


def test_a_run_on_a_quantised_base_resumes_bit_for_bit(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lora": {**LORA, "dropout": 0.1, "init": "loftq", "loftq_iterations": 2}}
    settings.update(max_steps=8, quantization="fp4", double_quantization=False)
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    run_engine(whole)
    with monkeypatch.context() as patched:
        stop_at_step(5, patched)
        with pytest.raises(Interrupted):
            run_engine(stopped)
    monkeypatch.setattr("lorasmith.engine.training.initial.factors", None)  # kept, so not computed again
    run_engine(stopped)
    assert_same_bits(whole, stopped)


def test_the_adapter_says_how_its_base_was_stored_and_is_evaluated_on_either(
    qwen2_folder: Path, training_job: Job
) -> None:
    folder = training_job(qwen2_folder, lora=LORA, quantization="nf4", max_steps=2)
    run_engine(folder)
    adapter = folder / "adapter"
    passport = json.loads((adapter / "passport.json").read_text(encoding="utf-8"))
    assert passport["base_quantization"] == {"quantization": "nf4", "double_quantization": True}
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "The base was stored in nf4 with double quantisation while the adapter was trained." in card

    spec = EvaluationSpec(adapter="a", data="d", quantization="nf4", double_quantization=False)
    assert " --quantization nf4 --no-double-quantization " in command(spec)
    inputs = EvaluationInputs(
        model_name="tiny", model_folder=str(qwen2_folder), adapter_name="a", adapter_folder=str(adapter),
        dataset_name="d", examples_file="unused", shots_file=None,
    )  # fmt: skip
    quantized = load_for_evaluation(inputs, Quantization("nf4"))[0]
    full = load_for_evaluation(inputs, None)[0]
    assert sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == 14
    assert not any(isinstance(module, QuantizedLinear) for module in full.modules())
    config = json.loads((adapter / "training_config.json").read_text(encoding="utf-8"))
    config["lora"]["init"] = "loftq"
    (adapter / "training_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InvalidSpec, match="lora.init=loftq took the adapter's first weights out of the base"):
        load_for_evaluation(inputs, Quantization("nf4"))


def test_evaluation_and_export_on_another_precision_say_so(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, lora=LORA, quantization="nf4", max_steps=2)
    run_engine(folder)
    adapter = folder / "adapter"
    caveat = (
        "the adapter was trained on its base in nf4 with double quantisation, and here the base is in full precision: "
        "answers differ from those in training by what quantising takes away"
    )
    assert other_precision(adapter, None) == caveat
    assert other_precision(adapter, Quantization("nf4")) is None
    assert "here the base is in int8:" in str(other_precision(adapter, Quantization("int8")))
    assert other_precision(folder, None) is None  # no passport

    inputs = EvaluationInputs(
        model_name="tiny", model_folder=str(qwen2_folder), adapter_name="a", adapter_folder=str(adapter),
        dataset_name="d", examples_file=str(folder.parent / "val.jsonl"), shots_file=None,
    )  # fmt: skip
    for name, told in (("none", [caveat]), ("nf4", [])):
        spec = EvaluationSpec(
            adapter="a", data="d", quantization=name, limit=2, shots=0, max_new_tokens=1, resamples=100
        )
        order = JobOrder(id="job_1", kind=JobKind.EVALUATION, spec=spec.model_dump(), inputs=inputs.model_dump())
        (job := folder / name).mkdir()
        assert evaluate(order, job, Reporter(job)).settings["caveats"] == told
        assert [event["text"] for event in events(job, "warning")] == told

    exported = Case(qwen2_folder, adapter).export(folder / "merged", "merged")
    assert exported.checks["notes"] == [caveat]
    assert [event["text"] for event in events(folder / "job", "warning")] == [caveat]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("training.load_in_4bit=true", "nf4"),
        ("training.load_in_4bit=false", "none"),
        ("training.quantization_bit=8", "int8"),
        ("training.quantization=4bit", "nf4"),
        ("training.quantization=bnb.fp4", "fp4"),
        ("training.quantization=null", "none"),
    ],
)
def test_other_tools_words_are_understood(said: str, meant: str) -> None:
    assert build_spec({"model": "any", "data": "any"}, assignments=[said]).training.quantization == meant


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("load_in_4bit=true", "there is no field 'load_in_4bit'; say training.quantization=nf4"),
        ("training.load_in_8bit=true", "there is no field 'training.load_in_8bit'; say training.quantization=int8"),
        ("training.bnb_4bit_quant_type=fp4", "say training.quantization=nf4 or fp4"),
        ("training.quantization=q4_0", "training.quantization: Input should be 'none', 'nf4', 'fp4' or 'int8'"),
    ],
)
def test_what_is_not_understood_has_a_way_out(said: str, way_out: str) -> None:
    with pytest.raises(InvalidSpec, match=way_out):
        build_spec({"model": "any", "data": "any"}, assignments=[said])


def test_settings_that_do_not_go_with_a_quantised_base_are_refused() -> None:
    with pytest.raises(InvalidSpec, match="training.memory: fast keeps the full weights twice"):
        parse_spec(TrainingSpec, {"model": "a", "data": "b", "training": {"quantization": "nf4", "memory": "fast"}})
    for lora, training, message in (
        ({"init": "loftq"}, {}, "lora.init loftq starts from what quantising the base loses"),
        ({"use_dora": True}, {"quantization": "nf4"}, "lora.use_dora measures the base's weights in each step"),
    ):
        with pytest.raises(InvalidSpec, match=message):
            check_quantization(TrainingSpec(model="a", data="b", lora=lora, training=training))  # type: ignore[arg-type]
    settings = TrainingSettings.model_validate({"bnb_4bit_use_double_quant": False, "quantization": "nf4"})
    assert settings.double_quantization is False

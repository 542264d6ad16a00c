"""Variants of LoRA, optimizers and schedules, each against PEFT, torch, transformers or a closed form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from lorasmith.engine.data.rendering import render_example
from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.models.loading import load_adapter, load_model, load_tokenizer
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training import run as run_module
from lorasmith.engine.training.batches import pad_batch
from lorasmith.engine.training.checkpoints import best_folder, load_progress, whole_checkpoints
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.engine.training.initial import olora, pissa, start
from lorasmith.engine.training.loop import TrainingRun, train
from lorasmith.engine.training.optimizers import build_optimizer, set_rate
from lorasmith.errors import Interrupted, InvalidSpec, MissingExtra
from tests.engine.small_jobs import counting_examples, events, run_engine

Job = Callable[..., Path]
IDS = torch.arange(3, 35).unsqueeze(0)
MEASURED = ("training_time_seconds", "tokens_per_s", "peak_memory_bytes")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class Stopping(Reporter):
    """Asks for a stop after step 5."""

    def __call__(self, type: str, **data: Any) -> None:
        super().__call__(type, **data)
        if type == "step" and data["step"] == 5:
            self.stop_requested = True


def stop_and_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patched:
        patched.setattr("tests.engine.small_jobs.Reporter", Stopping)
        with pytest.raises(Interrupted, match="stopped after step 5"):
            run_engine(folder)
    return run_engine(folder)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits that the model had in memory when training was over, before anything was written; one entry per run."""
    logits: list[torch.Tensor] = []

    def training(run: TrainingRun, report: Reporter) -> bool:
        finished = train(run, report)
        if finished:
            with torch.no_grad():
                logits.append(run.model.eval()(IDS).logits)
        return finished

    monkeypatch.setattr(run_module, "train", training)
    return logits


VARIANTS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"o_proj": 3}},
    "one_layer": {"layers": [1], "use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"v_proj": 2}},
    "trained_head": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"o_proj": 3}},
    "pissa_rslora": {"init": "pissa", "use_rslora": True, "alpha_pattern": {"o_proj": 3}},
    "pissa_dora": {"init": "pissa", "use_dora": True},
    "olora": {"init": "olora", "layers": [0], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_loads_is_the_model_that_was_trained(
    qwen2_folder: Path, training_job: Job, trained: list[torch.Tensor], variant: str
) -> None:
    lora = {**LORA, **VARIANTS[variant]}
    folder = training_job(qwen2_folder, lora=lora, max_steps=4)
    result = run_engine(folder)
    assert result["training_loss"][-1] < result["training_loss"][0]
    newest = whole_checkpoints(folder)[-1]
    with torch.no_grad():
        for adapter in (folder / "adapter", newest):
            base = AutoModelForCausalLM.from_pretrained(qwen2_folder)
            loaded = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
            torch.testing.assert_close(loaded, trained[0], atol=1e-5, rtol=0)  # float32
        ours = load_adapter(load_model(qwen2_folder), folder / "adapter")(IDS).logits
        before = load_model(qwen2_folder)(IDS).logits
    torch.testing.assert_close(ours, trained[0], atol=1e-5, rtol=0)
    assert (trained[0] - before).abs().max() > 1e-2
    packed = not {"use_dora", "modules_to_save"} & lora.keys()
    assert bool(events(folder, "paths")) == packed


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init": "pissa"}])
def test_the_variants_train_in_bf16_with_fp32_weights(
    qwen2_folder: Path, training_job: Job, lora: dict[str, Any]
) -> None:
    folder = training_job(qwen2_folder, lora={**LORA, **lora}, max_steps=3, precision="bf16")
    run_engine(folder)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    notes = [event["text"] for event in events(folder, "note")]
    assert any("init pissa in bf16: the base is rounded once more" in note for note in notes) == ("init" in lora)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_moved_start_is_pefts(qwen2_folder: Path, tmp_path: Path, init: Any) -> None:
    config = LoRAConfig(r=4, alpha=16, dropout=0.0, target_modules=["q_proj", "down_proj"], init=init)
    reference = get_peft_model(load_model(qwen2_folder), config.to_peft_config())
    config.init = "default"
    ours = get_peft_model(load_model(qwen2_folder), config.to_peft_config())
    assert isinstance(ours, PeftModel)
    start(ours, init, tmp_path)
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)  # float32, 64 terms
    with torch.no_grad():
        untouched = load_model(qwen2_folder)(IDS).logits
        torch.testing.assert_close(ours.eval()(IDS).logits, untouched, atol=1e-5, rtol=0)


def test_large_matrices_are_decomposed_by_the_randomised_method(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 4) @ torch.randn(4, 32) + 1e-3 * torch.randn(48, 32)
    exact = torch.mm(*reversed(pissa(weight, 4, 2.0)))
    monkeypatch.setattr("lorasmith.engine.training.initial.EXACT_UP_TO", 8)
    randomised = torch.mm(*reversed(pissa(weight, 4, 2.0)))
    torch.testing.assert_close(randomised, exact, atol=1e-5, rtol=0)  # float32, 16 power iterations
    torch.testing.assert_close(2.0 * exact, weight, atol=0.02, rtol=0)  # the noise is left
    _, basis = olora(weight, 4, 2.0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_a_variant_resumes_bit_for_bit(
    qwen2_folder: Path, training_job: Job, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lora": {**LORA, "dropout": 0.1, **lora}, "max_steps": 8}
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    run_engine(whole)
    with monkeypatch.context() as patched:
        patched.setattr("tests.engine.small_jobs.Reporter", Stopping)
        with pytest.raises(Interrupted):
            run_engine(stopped)
    monkeypatch.setattr("lorasmith.engine.training.initial.factors", None)  # kept, so not computed again
    run_engine(stopped)
    assert_same_bits(whole, stopped)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers": [1, 2]}, "there is no layer 2 to adapt"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern 'q_porj' matches no adapted module; did you mean 'q_proj'"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern '\(' is no regular expression: "),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed' matches no module; did you mean 'lm_head'"),
        ({"modules_to_save": ["q_proj"]}, "'q_proj' is in target_modules and in modules_to_save"),
        ({"init": "olora", "rank": 33}, r"init 'olora' takes a rank of at most 32 for '.*k_proj', got 33"),
        ({"init": "orthogonal", "rank": 3}, "init 'orthogonal' takes an even rank, got 3 for "),
    ],
)
def test_a_setting_without_a_place_in_the_model_is_an_error(
    qwen2_folder: Path, lora: dict[str, Any], message: str
) -> None:
    config = LoRAConfig(**{"target_modules": "all", "r": lora.pop("rank", 4), **lora})
    with pytest.raises(InvalidSpec, match=message):
        fit(config, load_model(qwen2_folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "pisa"}, "no init 'pisa'; did you mean 'pissa'"),
        ({"layers": []}, r"layers must be numbers from 0, at least one, got \[\]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must hold ranks of at least 1, got 0 for 'q_proj'"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern must hold values above 0, got 0 for 'q_proj'"),
    ],
)
def test_a_config_checks_its_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        LoRAConfig(**values)


def test_peft_gets_every_field() -> None:
    config = LoRAConfig(
        use_dora=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 8.0},
        layers=[0, 2],
        modules_to_save=["lm_head"],
        init="gaussian",
    )
    assert LoRAConfig.from_dict(config.to_dict()) == config
    peft = config.to_peft_config()
    assert (peft.use_dora, peft.rank_pattern, peft.alpha_pattern) == (True, {"q_proj": 4}, {"q_proj": 8})
    assert (peft.layers_to_transform, peft.modules_to_save, peft.init_lora_weights) == ([0, 2], ["lm_head"], "gaussian")


def low_rank(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "q_proj.lora_A.default.weight": nn.Parameter(torch.randn(4, 32, dtype=dtype) * 0.5),
        "q_proj.lora_B.default.weight": nn.Parameter(torch.randn(32, 4, dtype=dtype) * 0.1),
        "q_proj.lora_magnitude_vector.default.weight": nn.Parameter(torch.rand(32, dtype=dtype)),
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    torch.manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)


def test_lora_plus_is_adamw_with_a_faster_b() -> None:
    """Two updates by the formula of AdamW, in float64; what is no matrix does not decay."""
    parameters, decay, ratio = low_rank(torch.float64), 0.1, 16.0
    by_hand = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in by_hand.items()} for _ in range(2))
    optimizer = build_optimizer("adamw", parameters, rate=1.0, weight_decay=decay, lora_plus_ratio=ratio)
    for step, rate in enumerate((1e-3, 5e-4), start=1):
        give_gradients(parameters, step)
        for name, parameter in parameters.items():
            gradient = parameter.grad
            assert gradient is not None
            own = rate * (ratio if "lora_B" in name else 1)
            by_hand[name] *= 1 - own * (decay if parameter.ndim > 1 else 0)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            scaled = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            by_hand[name] -= own * first[name] / (1 - 0.9**step) / scaled
        set_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), by_hand[name], atol=1e-12, rtol=0)  # float64


def test_adafactor_is_that_of_the_transformers_trainer() -> None:
    ours, theirs = low_rank(), low_rank()
    optimizer = build_optimizer("adafactor", ours, rate=1e-3, weight_decay=0.0)
    reference = Adafactor(theirs.values(), lr=1e-3, scale_parameter=False, relative_step=False)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0)  # float32, three updates of 1e-3


def test_the_8_bit_optimizer_stays_near_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = ({"big.lora_A.default.weight": nn.Parameter(torch.zeros(64, 128))} for _ in range(2))
    optimizer = build_optimizer("adamw_8bit", ours, rate=1e-2, weight_decay=0.0)
    reference = build_optimizer("adamw", theirs, rate=1e-2, weight_decay=0.0)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    ((name, parameter),) = ours.items()
    assert {value.dtype for key, value in optimizer.state[parameter].items() if key in ("state1", "state2")} == {
        torch.uint8
    }
    assert (parameter - theirs[name]).norm() / theirs[name].norm() < 0.1  # 8-bit states


def test_muon_refuses_what_is_no_matrix_and_matches_the_length_of_adamws_steps() -> None:
    parameters = low_rank()
    with pytest.raises(InvalidSpec, match=r"muon trains 2-D weights alone, and q_proj.lora_magnitude_vector.*\(32,\)"):
        build_optimizer("muon", parameters, rate=1e-3, weight_decay=0.0)
    del parameters["q_proj.lora_magnitude_vector.default.weight"]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = build_optimizer("muon", parameters, rate=1e-3, weight_decay=0.0)
    give_gradients(parameters, 0)
    optimizer.step()
    for name, parameter in parameters.items():
        root_mean_square = (parameter.detach() - before[name]).square().mean().sqrt().item()
        # an orthogonal (4, 32) has the mean square 4 / 128; times (0.2 sqrt(32))² that is 0.2²; five iterations are near
        assert root_mean_square == pytest.approx(0.2e-3, rel=0.4)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(MissingExtra, match="optimizer adamw_8bit needs the extra `quant`"):
        build_optimizer("adamw_8bit", low_rank(), rate=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_every_optimizer_resumes_bit_for_bit(
    qwen2_folder: Path, training_job: Job, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {"optimizer": optimizer, "max_steps": 8, "lora_plus_ratio": 4.0, "weight_decay": 1e-5}
    settings["lora"] = {"rank": 64, "alpha": 64, "dropout": 0.1, "target_modules": "all"}  # 64 × 64: enough for 8 bits
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    expected = run_engine(whole)
    resumed = stop_and_resume(stopped, monkeypatch)
    assert resumed["training_loss"] == expected["training_loss"]
    assert expected["training_loss"][-1] < expected["training_loss"][0]
    assert_same_bits(whole, stopped)
    state = load_file(whole_checkpoints(whole)[-1] / "state.safetensors")
    assert (torch.uint8 in {tensor.dtype for tensor in state.values()}) == (optimizer == "adamw_8bit")


def validation_loss(base: Path, adapter: Path) -> float:
    """Mean loss in nats by transformers and PEFT over the four validation rows of a small job."""
    model, tokenizer = load_adapter(load_model(base), adapter), load_tokenizer(base)
    stop = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    rows = [render_example(tokenizer, example, stop) for example in counting_examples(4, first=100)]
    ids, labels = pad_batch(rows, pad_id=0)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_a_run_that_no_longer_improves_stops_and_keeps_its_best(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"early_stopping_patience": 3, "keep_best": True, "learning_rate": 0.1, "num_epochs": 6, "eval_every": 2}
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    result = run_engine(whole)
    evaluations = {event["step"]: event["loss"] for event in events(whole, "evaluation")}
    best = min(evaluations, key=lambda step: evaluations[step])
    last = max(evaluations)
    assert last == best + 3 * 2 < 36
    assert result["stopped_early"]
    assert (result["total_steps"], result["planned_steps"], result["adapter_step"]) == (last, 36, best)
    assert result["validation_loss"] == evaluations[best] == result["best_validation_loss"]
    notes = [event["text"] for event in events(whole, "note")]
    assert (
        f"stopped early after step {last} of 36: no better validation loss in 3 evaluations, "
        f"the best is {evaluations[best]:.4f}"
    ) in notes
    assert f"the adapter is that of step {best}, validation loss {evaluations[best]:.4f}" in notes
    assert best_folder(whole, best).is_dir()
    # float32, in another order than in training
    assert validation_loss(qwen2_folder, whole / "adapter") == pytest.approx(evaluations[best], abs=1e-4)

    resumed = stop_and_resume(stopped, monkeypatch)
    assert {**resumed, **dict.fromkeys(MEASURED)} == {**result, **dict.fromkeys(MEASURED)}
    assert [event["step"] for event in events(stopped, "evaluation")] == list(evaluations)
    assert_same_bits(whole, stopped)

    taken = len(events(stopped, "step"))
    shutil.rmtree(stopped / "adapter")  # as after a crash between the last step and the result
    run_engine(stopped)
    assert len(events(stopped, "step")) == taken
    assert_same_bits(whole, stopped)


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 8, "eval_every": 1, "keep_best": True}  # the stop is at step 5, where one is due
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    run_engine(whole)
    stop_and_resume(stopped, monkeypatch)
    assert events(stopped, "evaluation") == events(whole, "evaluation")
    assert_same_bits(whole, stopped)


def test_a_run_that_goes_on_from_an_old_checkpoint_still_has_its_best_weights(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training_job(qwen2_folder, max_steps=8, keep_best=True)
    run_engine(folder)
    oldest, *newer = whole_checkpoints(folder)
    for checkpoint in newer:  # as after damage
        shutil.rmtree(checkpoint)
    best = load_progress(oldest).best
    assert best is not None
    monkeypatch.setattr(PackedComputation, "loss", lambda *_: 1e6)  # from here on it is only worse
    again = run_engine(folder)
    assert (again["adapter_step"], again["validation_loss"]) == best
    kept = load_file(best_folder(folder, best[0]) / "weights.safetensors")
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, kept[name.replace(".weight", ".default.weight")]), name


@pytest.mark.parametrize("setting", [{"early_stopping_patience": 2}, {"keep_best": True}])
def test_watching_the_validation_loss_needs_validation_rows(
    qwen2_folder: Path, training_job: Job, setting: dict[str, Any]
) -> None:
    folder = training_job(qwen2_folder, **setting)
    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["inputs"]["val_file"] = None
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
    (name,) = setting
    with pytest.raises(InvalidSpec, match=f"{name} needs validation rows, and dataset 'counting' has none that fit"):
        run_engine(folder)


def test_a_warmup_ratio_reaches_the_peak_after_its_share(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, warmup_ratio=0.25, lr_scheduler="linear", num_epochs=2)
    run_engine(folder)
    rates = [event["learning_rate"] for event in events(folder, "step")]
    rising = [1e-2 * (step + 1) / 4 for step in range(3)]  # 3 of 12 steps
    falling = [1e-2 * (1 - step / 9) for step in range(9)]
    assert rates == pytest.approx(rising + falling)

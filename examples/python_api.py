"""The Python names, from configuration to a trained adapter: `python examples/python_api.py`."""

from pathlib import Path
from tempfile import mkdtemp

from lorasmith import (
    LoRAAdapter,
    LoRAConfig,
    LoRATrainer,
    apply_lora_adapter,
    load_lora_adapter,
    save_lora_adapter,
)

folder = Path(mkdtemp())
dataset = [
    {"instruction": f"Which number follows {number}?", "output": f"{number + 1} follows {number}."}
    for number in range(40)
]

config = LoRAConfig(r=8, alpha=32, dropout=0.1, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"])

# Convert to PEFT format
peft_config = config.to_peft_config()
assert LoRAConfig.from_dict(config.to_dict()) == config

# Initialize trainer
trainer = LoRATrainer(
    base_model_name="starter",
    config=LoRAConfig(r=8, alpha=32, dropout=0.1),
    home=folder / "home",
)

# Load model
trainer.load_base_model()

# Setup LoRA
trainer.setup_lora()
statistics = trainer.trainable_parameters()
print(f"{statistics.trainable:,} of {statistics.total:,} parameters train ({statistics.share:.1%})")

# Train
result = trainer.train(
    train_dataset=dataset,
    adapter_id="node_1_adapter",
    num_epochs=3,
    batch_size=4,
    learning_rate=2e-4,
)

# Check results
print(f"Success: {result.success}")
print(f"Training time: {result.training_time_seconds}s")
print(f"Final loss: {result.training_loss[-1] if result.training_loss else None}")
print(f"Adapter: {result.adapter_path}")

# Create adapter
adapter = LoRAAdapter(adapter_id="mesh_routing_v1", base_model_name="starter", config=config)

# Save adapter
save_lora_adapter(adapter, folder / "adapter", trainer.peft_model)

# Load adapter
base_model = trainer.load_base_model()
adapter = load_lora_adapter(folder / "adapter", base_model)

# Apply to model
peft_model = apply_lora_adapter(base_model, adapter)
print(f"{adapter.adapter_id}: {type(peft_model).__name__}")

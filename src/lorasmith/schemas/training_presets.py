"""Presets: values that a training run starts from."""

from __future__ import annotations

from typing import Any

# Seed values of the workbench design's appendix A; `cpu`, `gpu-8gb` and `domain` carry the other guides' defaults.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "training": {
            "learning_rate": 3e-4,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "warmup_steps": 50,
        },
    },
    "balanced": {
        "lora": {"rank": 32, "alpha": 64, "dropout": 0.05, "target_modules": "attention"},
        "training": {
            "learning_rate": 2e-4,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_epochs": 3,
            "warmup_steps": 100,
        },
    },
    "high_quality": {
        "lora": {"rank": 128, "alpha": 256, "dropout": 0.1, "target_modules": "all"},
        "training": {
            "learning_rate": 1e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_epochs": 5,
            "warmup_steps": 200,
            "weight_decay": 0.01,
        },
    },
    "cpu": {
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.1, "target_modules": "attention"},
        "training": {
            "learning_rate": 2e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_epochs": 3,
            "weight_decay": 0.01,
            "max_seq_length": 2048,
        },
    },
    "gpu-8gb": {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all"},
        "training": {"learning_rate": 2e-4, "batch_size": 2, "gradient_accumulation_steps": 8, "num_epochs": 3},
    },
    "domain": {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
        "training": {"learning_rate": 2e-4, "weight_decay": 1e-5, "num_epochs": 3},
    },
    # Models of a few million parameters need a tenfold rate and every linear layer to move at all.
    "tiny": {
        "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "target_modules": "all"},
        "training": {
            "learning_rate": 3e-3,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "num_epochs": 2,
            "warmup_steps": 20,
            "max_seq_length": 512,
        },
    },
}

"""What the guide of SimpleTuner for OmniGen tells its users to write."""

from __future__ import annotations

from typing import Any

#: Its `lycoris_config.json`, which SimpleTuner writes into its adapters, too.
LYCORIS: dict[str, Any] = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}

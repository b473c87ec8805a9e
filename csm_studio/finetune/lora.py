"""LoRA for use from Python, under the name that the documentation gives it."""

from csm_studio.models.adapters import load_lora_weights, save_lora_weights
from csm_studio.models.lora import apply_lora_to_model, merge_lora_weights

__all__ = [
    "apply_lora_to_model",
    "load_lora_weights",
    "merge_lora_weights",
    "save_lora_weights",
]

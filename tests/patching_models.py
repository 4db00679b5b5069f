"""Small random pairs of models for every architecture in the table, in memory and on disk."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, tiny_model, trained_student
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from patching.architectures.table import ARCHITECTURES
from patching.blocks import LayerMap
from patching.recipe import Recipe
from patching.student_config import StudentConfig

NUM_LAYERS = 6
LAYER_MAP = LayerMap((0, 2, 3, 5), NUM_LAYERS)  # blocks 0-1, 2, 3-4, 5: patchable 0 and 2

BASE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
GATED = BASE | {"intermediate_size": 48, "num_key_value_heads": 2}
MIXED_KINDS = ["sliding_attention", "full_attention"]
THREE_KINDS = ["full_attention", "sliding_attention", "sliding_attention"]

SETTINGS: dict[str, dict[str, Any]] = {
    "bert": BASE | {"intermediate_size": 48},
    "roberta": BASE | {"intermediate_size": 48, "pad_token_id": 1},
    "llama": GATED
    | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": GATED | {"sliding_window": 5},
    "qwen2": GATED
    | {"use_sliding_window": True, "sliding_window": 4, "layer_types": THREE_KINDS * 2},
    "qwen3": GATED | {"head_dim": 8},
    "qwen3_moe": GATED
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [4],
        "decoder_sparse_step": 2,
        "max_window_layers": NUM_LAYERS,
    },
    "mixtral": GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": GATED
    | {
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": GATED
    | {
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        # The kept layers are all of one kind, so the student has no rotary table for the other.
        "layer_types": [MIXED_KINDS[i in (1, 4)] for i in range(NUM_LAYERS)],
    },
    "olmo2": GATED,
    "olmo3": GATED | {"sliding_window": 4, "layer_types": THREE_KINDS * 2},
    "phi3": GATED,
    "gpt_neox": BASE | {"intermediate_size": 48},
    "gpt2": {
        "vocab_size": 257,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    },
    "opt": BASE | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "stablelm": GATED | {"use_qkv_bias": True},
    "smollm3": GATED
    | {
        "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": THREE_KINDS * 2,
    },
    "granite": GATED
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}


ENCODERS = {name for name, row in ARCHITECTURES.items() if row.predicts_masked_tokens}


def family_config(model_type: str, tied: bool = False, **changes: Any) -> PreTrainedConfig:
    """Return a small config with every kind of layer that the architecture has."""
    settings = SETTINGS[model_type] | {"tie_word_embeddings": tied} | changes
    depth = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    return CONFIG_MAPPING[model_type](**{depth: NUM_LAYERS} | settings)


def family_pair(
    model_type: str, tied: bool = False, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a random teacher and a student in which every tensor differs from the teacher's."""
    teacher = tiny_model(family_config(model_type, tied, **changes))
    return teacher, trained_student(teacher, LAYER_MAP)


def save_models(
    folder: Path,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layer_map: LayerMap = LAYER_MAP,
    max_shard_size: str = "50GB",
) -> tuple[str, str]:
    """Save both models as users have them and return the names of the folders."""
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        byte_tokenizer().save_pretrained(folder / name)
    StudentConfig(layer_map).save(folder / "student")
    return str(folder / "teacher"), str(folder / "student")


def change_config(folder: str | Path, **changes: Any) -> None:
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PATHS = {
    "bert": ("bert.encoder.layer", None),
    "roberta": ("roberta.encoder.layer", None),
    "gpt2": ("transformer.h", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
}
"""Paths of layers and final norm, for architectures that are not built like Llama."""


def hand_written(
    recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel
) -> PreTrainedModel:
    """Build a recipe's model by putting copies of layers into a copy of the embedding's parent."""
    parents = {"teacher": teacher, "student": student}
    model = copy.deepcopy(parents[recipe.embedding])
    layers_path, norm_path = PATHS.get(model.config.model_type, ("model.layers", "model.norm"))
    layers = torch.nn.ModuleList()
    for position, (parent, layer_idx, _) in enumerate(recipe.layers):
        layer = copy.deepcopy(parents[parent].get_submodule(layers_path)[layer_idx])
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
        layers.append(layer)
    model.set_submodule(layers_path, layers)
    head = parents[recipe.head]
    if norm_path is not None:
        model.set_submodule(norm_path, copy.deepcopy(head.get_submodule(norm_path)))
    if model.config.model_type == "opt":
        model.model.decoder.project_out = copy.deepcopy(head.model.decoder.project_out)
    if model.config.model_type == "bert":
        model.cls = copy.deepcopy(head.cls)
    elif model.config.model_type == "roberta":
        model.lm_head = copy.deepcopy(head.lm_head)
    else:
        model.set_output_embeddings(copy.deepcopy(head.get_output_embeddings()))
    if "layer_types" in model.config.to_dict():
        model.config.layer_types = [
            parents[parent].config.layer_types[layer_idx] for parent, layer_idx, _ in recipe.layers
        ]
    if model.config.model_type in ("gemma3_text", "olmo3"):
        # A student whose layers are all of one kind has no rotary table for the other.
        model.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    model.config.num_hidden_layers = recipe.depth
    return model.eval()

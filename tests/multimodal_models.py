"""Small random multimodal pairs for every row of the table that has something around its tower."""

import copy

import torch
from conftest import tiny_model, trained_student
from patching_models import BASE, GATED, LAYER_MAP, MIXED_KINDS, NUM_LAYERS
from transformers import CONFIG_MAPPING, PreTrainedModel

TEXT = GATED | {"num_hidden_layers": NUM_LAYERS}
SPECIAL = {"image_token_id": 250, "vision_start_token_id": 251, "vision_end_token_id": 252}
QWEN = {
    "text_config": TEXT
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
    "video_token_id": 253,
    **SPECIAL,
}

SETTINGS = {
    "gemma3": {
        "text_config": TEXT
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": MIXED_KINDS * 3,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    "qwen2_5_vl": QWEN
    | {
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": BASE["hidden_size"],
            "patch_size": 4,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        }
    },
    "qwen2_vl": QWEN
    | {
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": BASE["hidden_size"],
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        }
    },
}
IMAGE_TOKENS = 4


def multimodal_pair(model_type: str, tied: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    settings = copy.deepcopy(SETTINGS[model_type]) | {"tie_word_embeddings": tied}
    settings["text_config"]["tie_word_embeddings"] = tied
    teacher = tiny_model(CONFIG_MAPPING[model_type](**settings))
    student = trained_student(teacher, LAYER_MAP)
    return teacher, student


def image_and_text(model_type: str) -> dict[str, torch.Tensor]:
    """A text of twelve tokens, four of which stand for an image of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 250, (1, 12), generator=generator)
    ids_BT[0, 1], ids_BT[0, 2 : 2 + IMAGE_TOKENS], ids_BT[0, 6] = 251, 250, 252
    if model_type == "gemma3":
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        kinds_BT = (ids_BT == 250).long()
        return {"input_ids": ids_BT, "pixel_values": pixels, "token_type_ids": kinds_BT}
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)  # two frames of patches, 4 x 4
    return {
        "input_ids": ids_BT,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids_BT == 250).long(),
    }

"""Families of multimodal models: the text tower is patched, the rest is carried unchanged."""

import copy

import pytest
import torch
from conftest import run_module, tiny_model, trained_student
from patching_models import BASE, GATED, LAYER_MAP, MIXED_KINDS, NUM_LAYERS, save_models
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from patching.checkpoints.save import plan_save
from patching.family import Family

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


def by_hand(model: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """The member k = 1, order `last`: student layers 0 and 1, then the teacher's from the third
    student layer's block on, put together without the toolkit.
    """
    model = copy.deepcopy(model)
    tower, teachers = model.model.language_model, copy.deepcopy(teacher.model.language_model)
    layers = [*tower.layers[:2], *teachers.layers[LAYER_MAP.kept[2] :]]
    for position, layer in enumerate(layers):
        layer.self_attn.layer_idx = position
    tower.layers, tower.norm = torch.nn.ModuleList(layers), teachers.norm
    tower.rotary_emb = teachers.rotary_emb
    for name, part in teacher.model.named_children():
        if name != "language_model":
            setattr(model.model, name, part)
    model.lm_head = copy.deepcopy(teacher.lm_head)
    config = tower.config
    config.num_hidden_layers = len(layers)
    kinds = [student_kind(model, i) for i in range(2)]
    config.layer_types = kinds + teachers.config.layer_types[LAYER_MAP.kept[2] :]
    return model.eval()


def student_kind(model: PreTrainedModel, layer_idx: int) -> str:
    return model.config.text_config.layer_types[layer_idx]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", SETTINGS)
@torch.no_grad()
def test_members_see_images_as_their_parents_do(model_type, tied, tmp_path):
    """Every size, in memory and saved, on text with an image; the middle one against one built by
    hand.
    """
    teacher, student = multimodal_pair(model_type, tied)
    folders = save_models(tmp_path, teacher, student)
    family = Family.from_pretrained(*folders)
    inputs = image_and_text(model_type)
    carried = "model.vision_tower." if model_type == "gemma3" else "model.visual."
    expected = {
        0: student(**inputs).logits,
        1: by_hand(student, teacher)(**inputs).logits,
        2: teacher(**inputs).logits,
    }
    for k, logits in expected.items():
        plan = plan_save(family, family.patched_layers(k), tmp_path / f"k{k}")
        assert plan.reason_to_load is None
        assert plan.size.parameters.stored == sum(
            parameter.numel() for parameter in family.model(k).parameters()
        )
        plan.save(tmp_path / f"k{k}", f"k{k}", {})
        saved, found = AutoModelForImageTextToText.from_pretrained(
            tmp_path / f"k{k}", output_loading_info=True
        )
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert saved.config.tie_word_embeddings == (tied and k != 1)
        for model in (saved, family.model(k)):
            assert torch.equal(model(**inputs).logits, logits)
        owner = (student if k == 0 else teacher).state_dict()
        for name, tensor in saved.state_dict().items():
            if name.startswith(carried):
                assert torch.equal(tensor, owner[name]), name
    assert (expected[0] - expected[2]).abs().max() > 0.1


def test_a_card_says_where_the_vision_tower_comes_from(tmp_path):
    folders = save_models(tmp_path, *multimodal_pair("gemma3", tied=True))
    family = Family.from_pretrained(*folders)
    plan_save(family, family.patched_layers(1), tmp_path / "k1").save(tmp_path / "k1", "k1", {})
    card = (tmp_path / "k1" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "image-text-to-text" in card
    assert "| vision_tower, unchanged | teacher |" in card
    assert "| multi_modal_projector, unchanged | teacher |" in card


def test_the_image_processor_is_copied(tmp_path):
    folders = save_models(tmp_path, *multimodal_pair("gemma3", tied=True))
    settings = '{"image_processor_type": "Gemma3ImageProcessor"}\n'
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "teacher" / name).write_text(settings)
    done = run_module(
        *("patching.patch", "--teacher_model_name_or_path", folders[0]),
        *("--student_model_name_or_path", folders[1], "--num_layers_to_patch", "1"),
        *("--save_directory", tmp_path / "k1"),
    )
    assert done.returncode == 0, done.stderr
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "k1" / name).read_text() == settings


def test_other_vision_towers_are_refused(tmp_path):
    teacher, student = multimodal_pair("gemma3", tied=True)
    student.config.vision_config.layer_norm_eps = 1e-3
    folders = save_models(tmp_path, teacher, student)
    with pytest.raises(ValueError, match="vision_config is .* in the student"):
        Family.from_pretrained(*folders)


def test_the_stored_names_are_those_of_published_files(tmp_path):
    folders = save_models(tmp_path, *multimodal_pair("gemma3", tied=True))
    family = Family.from_pretrained(*folders)
    plan_save(family, family.patched_layers(1), tmp_path / "k1").save(tmp_path / "k1", "k1", {})
    with safe_open(tmp_path / "k1" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.model.layers.4.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.mm_input_projection_weight",
    } <= names

"""Families of multimodal models: the text tower is patched, the rest is carried unchanged."""

import copy
import json

import pytest
import torch
from conftest import run_module
from multimodal_models import image_and_text, multimodal_pair
from patching_models import LAYER_MAP, save_models
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel

from patching.checkpoints.save import plan_save
from patching.family import Family


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


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        ("gemma3", True),
        ("qwen2_5_vl", False),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("gemma3", False), ("qwen2_vl", True))
        ),
    ],
)
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


@pytest.mark.slow
def test_the_command_line_saves_a_multimodal_member(tmp_path):
    """Names on disk are those of published files, the image processor's settings are copied, and
    the card says where the vision tower comes from.
    """
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
    with safe_open(tmp_path / "k1" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.model.layers.4.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.mm_input_projection_weight",
    } <= names
    card = (tmp_path / "k1" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "| vision_tower, unchanged | teacher |" in card
    assert "| multi_modal_projector, unchanged | teacher |" in card


def test_a_published_config_keeps_its_form(tmp_path):
    """Qwen-VL's files hold the settings of tower and whole in one object."""
    teacher, student = multimodal_pair("qwen2_5_vl", tied=False)
    folders = save_models(tmp_path, teacher, student)
    path = tmp_path / "teacher" / "config.json"
    values = json.loads(path.read_text())
    tower = values.pop("text_config")
    rotary = tower.pop("rope_parameters")
    tower |= {
        "model_type": "qwen2_5_vl",
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rotary["mrope_section"]},
    }
    del tower["layer_types"]
    flat = tower | values
    path.write_text(json.dumps(flat))
    family = Family.from_pretrained(*folders)
    plan_save(family, family.patched_layers(1), tmp_path / "k1").save(tmp_path / "k1", "k1", {})
    saved = json.loads((tmp_path / "k1" / "config.json").read_text())
    changed = {name for name in saved.keys() | flat.keys() if saved.get(name) != flat.get(name)}
    assert changed <= {"num_hidden_layers", "max_window_layers", "torch_dtype"}
    assert saved["num_hidden_layers"] == 5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "k1")
    inputs = image_and_text("qwen2_5_vl")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, family.model(1)(**inputs).logits)


def test_other_vision_towers_are_refused(tmp_path):
    teacher, student = multimodal_pair("gemma3", tied=True)
    student.config.vision_config.layer_norm_eps = 1e-3
    folders = save_models(tmp_path, teacher, student)
    with pytest.raises(ValueError, match="vision_config is .* in the student"):
        Family.from_pretrained(*folders)


@pytest.mark.slow
def test_a_multimodal_student_is_distilled_on_text(tmp_path, text_file):
    """Its tower learns, and the vision tower stays the teacher's."""
    teacher, student = multimodal_pair("gemma3", tied=True)
    folders = save_models(tmp_path, teacher, student)
    done = run_module(
        *("train.train", "--teacher_model_name_or_path", folders[0]),
        *("--save_directory", tmp_path / "distilled", "--dataset", text_file),
        *("--kept_layers", "0,2,3,5", "--max_steps", "2", "--max_length", "32"),
        *("--gradient_accumulation_steps", "2"),
        *("--save_strategy", "no", "--report_to", "none", "--measure_order", "False"),
    )
    assert done.returncode == 0, done.stderr
    family = Family.from_pretrained(folders[0], str(tmp_path / "distilled"))
    distilled, own = family.model(0).state_dict(), teacher.state_dict()
    same = {name for name, tensor in distilled.items() if torch.equal(tensor, own[name])}
    carried = {name for name in distilled if name.startswith("model.vision_tower.")}
    assert carried and carried <= same
    assert "model.language_model.layers.1.mlp.up_proj.weight" not in same
    assert "model.language_model.embed_tokens.weight" not in same
    assert len(family.layer_map.kept) == 4 and family.order

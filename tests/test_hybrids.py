"""Families of hybrids: blocks mix layers with linear attention, Mamba layers and full attention."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, trained_student
from patching_models import GATED, LAYER_MAP, NUM_LAYERS, hand_written, save_models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from patching.checkpoints.save import plan_save
from patching.family import Family

KINDS = ["linear_attention", "linear_attention", "full_attention"]
SETTINGS = {
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    },
    "qwen3_next": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def hybrid_pair(model_type: str):
    common = GATED | {"num_hidden_layers": NUM_LAYERS, "layer_types": KINDS * 2}
    config = CONFIG_MAPPING[model_type](**common, **SETTINGS[model_type])
    teacher = tiny_model(config)
    return teacher, trained_student(teacher, LAYER_MAP)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SETTINGS)
@torch.no_grad()
def test_members_of_hybrids(model_type, tmp_path):
    """Every size, saved by copying bytes, equals one assembled by hand, and generates with its
    cache what it generates without.
    """
    teacher, student = hybrid_pair(model_type)
    family = Family.from_pretrained(*save_models(tmp_path, teacher, student))
    ids_BT = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    for k in range(len(family)):
        plan = plan_save(family, family.patched_layers(k), tmp_path / f"k{k}")
        assert plan.reason_to_load is None
        plan.save(tmp_path / f"k{k}", f"k{k}", {})
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"k{k}")
        recipe = family.recipe(k)
        parents = {"teacher": teacher, "student": student}
        kinds = [parents[parent].config.layer_types[i] for parent, i, _ in recipe.layers]
        assert saved.config.layer_types == kinds
        assert len(set(kinds)) == 2
        by_hand = hand_written(recipe, teacher, student)
        assert torch.equal(saved(ids_BT).logits, by_hand(ids_BT, use_cache=False).logits)
        cached = saved.generate(ids_BT, max_new_tokens=5, do_sample=False, eos_token_id=None)
        uncached = ids_BT
        for _ in range(5):
            following = saved(uncached, use_cache=False).logits[:, -1:].argmax(-1)
            uncached = torch.cat((uncached, following), dim=1)
        assert torch.equal(cached, uncached)


def test_kinds_of_layers_keep_the_spelling_of_the_teachers_file(tmp_path):
    """Published configs of Granite 4 say `mamba` and `attention`, which other software reads."""
    teacher, student = hybrid_pair("granitemoehybrid")
    folders = save_models(tmp_path, teacher, student)
    path = Path(folders[0], "config.json")
    values = json.loads(path.read_text())
    values["layer_types"] = ["mamba", "mamba", "attention"] * 2
    path.write_text(json.dumps(values))
    family = Family.from_pretrained(*folders)
    plan_save(family, family.patched_layers(1), tmp_path / "k1").save(tmp_path / "k1", "k1", {})
    saved = json.loads((tmp_path / "k1" / "config.json").read_text())
    assert saved["layer_types"] == ["mamba", "attention", "mamba", "mamba", "attention"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "k1")
    assert model.config.layer_types == [KINDS[0], *KINDS[2:], *KINDS]

"""Every architecture in the table, and some outside it, against hand-written loops."""

import copy

import pytest
import torch
from conftest import tiny_model, trained_student
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multimodal_models import SETTINGS as MULTIMODAL
from patching_models import (
    BASE,
    ENCODERS,
    GATED,
    LAYER_MAP,
    NUM_LAYERS,
    SETTINGS,
    family_config,
    family_pair,
    hand_written,
)
from transformers import CONFIG_MAPPING

from patching.architectures import lookup
from patching.architectures.checks import check_parents_match
from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.table import ARCHITECTURES
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import Recipe, initial_student, intermediate_model, patched_model

TOKENS = torch.arange(20)[None] * 7 % 257  # longer than every sliding window


def test_every_architecture_is_tested():
    assert SETTINGS.keys() | MULTIMODAL.keys() == ARCHITECTURES.keys()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", SETTINGS)
def test_a_model_equals_the_hand_written_loop(model_type, tied):
    teacher, student = family_pair(model_type, tied)
    for k, order in ((0, "last"), (1, "last"), (1, "first"), (2, "last")):
        recipe = intermediate_model(LAYER_MAP, k, order)
        model = assemble(recipe, teacher=teacher, student=student)
        expected = hand_written(recipe, teacher, student)
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits), (k, order)
    assert torch.equal(model(TOKENS).logits, teacher(TOKENS).logits)


@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() - ENCODERS))
def test_cached_generation_equals_uncached(model_type):
    teacher, student = family_pair(model_type)
    model = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached = (
        model.generate(TOKENS, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


PAIRS = {kind: family_pair(kind, tied=True) for kind in ("gemma3_text", "olmo3", "qwen3_moe")}


@pytest.mark.slow
@torch.no_grad()
@given(
    kind=st.sampled_from(sorted(PAIRS)),
    patched=st.frozensets(st.integers(0, len(LAYER_MAP.kept) - 1)),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_subset_equals_the_hand_written_loop(kind, patched):
    teacher, student = PAIRS[kind]
    recipe = patched_model(LAYER_MAP, patched)
    model = assemble(recipe, teacher=teacher, student=student)
    assert torch.equal(model(TOKENS).logits, hand_written(recipe, teacher, student)(TOKENS).logits)
    assert model.config.tie_word_embeddings == (recipe.embedding == recipe.head)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
def test_a_kind_of_attention_follows_its_layer_and_is_seen(model_type):
    teacher, student = PAIRS[model_type]
    kinds = teacher.config.layer_types
    recipe = intermediate_model(LAYER_MAP, 1, "first")
    model = assemble(recipe, teacher=teacher, student=student)
    assert model.config.layer_types == [kinds[t] for t in (0, 1, 2, 3, 5)]
    for layer, kind in zip(model.model.layers, model.config.layer_types):
        assert (layer.self_attn.sliding_window is not None) == (kind == "sliding_attention")
    truncated = copy.deepcopy(model)
    truncated.config.layer_types = kinds[-5:]
    assert not torch.equal(model(TOKENS).logits, truncated(TOKENS).logits)


@pytest.mark.parametrize(
    ("kinds", "stored", "expected"),
    [
        ("FFFFFF", 28, (28, 28)),
        ("FFFFFF", 6, (6, 6)),
        ("FFFFFF", 3, (3, 3)),  # no layer has a window, so it says nothing
        ("FFFSSS", 3, (3, 2)),
        ("FSSFSS", 28, (28, 28)),  # the first layer with a window is the same
        ("FFSSSS", 2, (2, 1)),
        ("FFFFSF", 4, (4, 4)),  # 4 layers remain, all with full attention
        ("FFFFSF", 2, (2, 4)),
    ],
)
def test_the_threshold_of_windows_stays_where_it_says_the_same(kinds, stored, expected):
    """Of the teacher itself, and of the student made of its layers 0, 2, 3 and 5."""
    names = {"F": "full_attention", "S": "sliding_attention"}
    config = family_config(
        "qwen2", layer_types=[names[kind] for kind in kinds], max_window_layers=stored
    )
    recipes = intermediate_model(LAYER_MAP, 2, "last"), initial_student(LAYER_MAP)
    made = [config_for(recipe, {"teacher": config, "student": config}) for recipe in recipes]
    assert tuple(config.max_window_layers for config in made) == expected
    assert made[0].to_dict() == config.to_dict()


def test_dense_layers_of_a_mixture_of_experts_follow_their_layers():
    teacher, student = PAIRS["qwen3_moe"]
    dense = [0, 2, 4]  # by the stride 0, 2 and 4; 4 by the list too
    assert [type(layer.mlp).__name__ for layer in teacher.model.layers] == [
        "Qwen3MoeMLP" if i in dense else "Qwen3MoeSparseMoeBlock" for i in range(NUM_LAYERS)
    ]
    assert student.config.mlp_only_layers == [0, 1]  # teacher layers 0, 2, 3, 5
    model = assemble(intermediate_model(LAYER_MAP, 1, "first"), teacher=teacher, student=student)
    assert model.config.mlp_only_layers == [0, 2]  # teacher 0 and 1, student 1, 2 and 3
    assert model.config.decoder_sparse_step == 1


def test_layers_without_rotary_positions_follow_their_layers():
    teacher, student = family_pair("smollm3")
    assert teacher.config.no_rope_layers == [1, 0, 1, 1, 0, 1]
    assert student.config.no_rope_layers == [1, 1, 1, 1]
    model = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    assert model.config.no_rope_layers == [1, 1, 1, 0, 1]
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [1, 1, 1, 0, 1]


@torch.no_grad()
def test_a_long_text_read_by_a_parent_changes_nothing():
    teacher, student = family_pair("llama")  # its rotary frequencies grow with the longest text
    recipe = intermediate_model(LAYER_MAP, 1, "last")
    expected = assemble(recipe, teacher=teacher, student=student)(TOKENS).logits
    long_text = torch.arange(100)[None]
    before = student.model.rotary_emb.inv_freq.clone()
    student(long_text)
    assert not torch.equal(student.model.rotary_emb.inv_freq, before)
    model = assemble(recipe, teacher=teacher, student=student)
    assert torch.equal(model(TOKENS).logits, expected)
    model(long_text)
    assert torch.equal(student.model.rotary_emb.original_inv_freq, before)


def test_a_head_that_is_not_the_embedding_its_config_says():
    teacher, student = family_pair("qwen3", tied=True)
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight + 1)
    with pytest.raises(ValueError, match="the student's config ties its head to its embedding"):
        assemble(intermediate_model(LAYER_MAP, 1, "first"), teacher=teacher, student=student)


DECLARED = {
    "arcee": GATED,
    "cohere": GATED | {"logit_scale": 0.5},
    "glm4": GATED | {"head_dim": 8},
    "nemotron": GATED,
    "olmo": GATED,
    "olmoe": GATED | {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": BASE | {"intermediate_size": 48},
    "phi": GATED,
    "starcoder2": GATED | {"sliding_window": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", DECLARED)
def test_an_architecture_without_a_row_works_where_transformers_says_enough(model_type):
    assert model_type not in ARCHITECTURES
    config = CONFIG_MAPPING[model_type](num_hidden_layers=NUM_LAYERS, **DECLARED[model_type])
    teacher = tiny_model(config)
    student = trained_student(teacher, LAYER_MAP)
    norm = "final_layernorm" if model_type in ("persimmon", "phi") else "norm"
    for order in ("first", "last"):
        recipe = intermediate_model(LAYER_MAP, 1, order)
        model = assemble(recipe, teacher=teacher, student=student)
        parents = {"teacher": teacher, "student": student}
        expected = copy.deepcopy(parents[recipe.embedding])
        head = parents[recipe.head]
        expected.model.layers = torch.nn.ModuleList(
            copy.deepcopy(parents[parent].model.layers[i]) for parent, i, _ in recipe.layers
        )
        expected.model.set_submodule(norm, head.model.get_submodule(norm))
        expected.set_output_embeddings(head.get_output_embeddings())
        expected.config.num_hidden_layers = recipe.depth
        logits = expected(TOKENS, use_cache=False).logits
        assert torch.equal(model(TOKENS, use_cache=False).logits, logits)


def test_what_is_refused_does_not_depend_on_what_was_looked_up_before(monkeypatch):
    """One empty model serves all members of a family, and no config that says something else."""
    looked_up, declared = [], lookup.declared_architecture

    def noted(config, *args):
        looked_up.append(config.num_hidden_layers)
        return declared(config, *args)

    monkeypatch.setattr(lookup, "declared_architecture", noted)
    monkeypatch.setattr(lookup, "_declared", {})

    def persimmon(num_layers: int = NUM_LAYERS, **changes):
        settings = DECLARED["persimmon"] | changes
        return CONFIG_MAPPING["persimmon"](num_hidden_layers=num_layers, **settings)

    found = architecture_of(persimmon())
    tied = persimmon(4, tie_word_embeddings=True, layer_types=["full_attention"] * 4)
    assert architecture_of(tied) == architecture_of(persimmon(5)) == found
    assert looked_up == [NUM_LAYERS]
    for _ in range(2):
        with pytest.raises(ValueError, match="is not a base model with a head"):
            architecture_of(persimmon(is_encoder_decoder=True))
    assert architecture_of(persimmon()) == found


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("bloom", {"n_layer": 6}, "not clear which of its parts .* come before the layers"),
        ("gpt_bigcode", {"n_layer": 6}, "not clear which of its parts .* come before the layers"),
        ("bart", {}, "model_type=bart: this architecture is not supported, .* lists of"),
        ("llava", {}, "its config has no num_hidden_layers"),
        ("gemma4_text", {"num_hidden_layers": 6}, "num_kv_shared_layers|not clear which"),
        ("llama", {"per_layer_config": {1: {"intermediate_size": 16}}}, "per_layer_config=.*share"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "checkpoint is quantized"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "depends on its position"),
    ],
)
def test_what_cannot_be_established_is_refused_and_named(model_type, settings, message):
    with pytest.raises(ValueError, match=message):
        architecture_of(CONFIG_MAPPING[model_type](**settings))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("diffllama", GATED, "layer 2 of the teacher at position 1 .*lambda_init is"),
        (
            "minicpm3",
            BASE | {"intermediate_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16},
            "residual_scale is",
        ),
        (
            "jamba",
            GATED | {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2},
            "feed_forward.class is JambaMLP",
        ),
        (
            "granite_swa",
            GATED | {"layer_rope_theta": [1e4] * NUM_LAYERS},
            "layer_rope_theta in its config may have one entry per layer",
        ),
    ],
)
def test_layers_that_depend_on_their_position_are_not_moved(model_type, settings, message):
    config = CONFIG_MAPPING[model_type](num_hidden_layers=NUM_LAYERS, **settings)
    teacher = tiny_model(config)
    with pytest.raises(ValueError, match=message):
        assemble(initial_student(LAYER_MAP), teacher=teacher)


def test_a_list_in_one_config_only_is_refused():
    teacher, student = family_config("qwen2"), family_config("mistral")
    recipe = Recipe.of([*intermediate_model(LayerMap((0, 2, 3, 5), 6), 1, "last").layers])
    with pytest.raises(ValueError, match="layer_types is in only one of the two configs"):
        config_for(recipe, {"teacher": teacher, "student": student})


def test_models_that_differ_in_arithmetic_do_not_match():
    for name, value in (("embedding_multiplier", 2.0), ("logits_scaling", 1.0)):
        other = family_config("granite", **{name: value})
        with pytest.raises(ValueError, match=f"{name} is {value} in the student"):
            check_parents_match(other, family_config("granite"))
    check_parents_match(family_config("opt", layerdrop=0.5), family_config("opt"))

"""What layers cache and which parameters are active, against models that really run."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from patching_models import BASE, GATED, family_config
from transformers import CONFIG_MAPPING

from patching.architectures.caches import LayerCache
from patching.architectures.config import config_for
from patching.blocks import LayerMap
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import size_of
from patching.patch import main
from patching.recipe import initial_student, whole_model
from patching.student_config import StudentConfig

NUM_LAYERS = 4
CONVOLUTIONS = {"vocab_size": 257, "hidden_size": 32}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "bamba": (
        "bamba",
        GATED
        | {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
        },
    ),
    "falcon, one head for all": ("falcon", BASE | {"multi_query": True}),
    "falcon, every head": ("falcon", BASE | {"multi_query": False}),
    "falcon, groups": ("falcon", BASE | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mamba": ("falcon_mamba", CONVOLUTIONS),
    "gpt_oss": (
        "gpt_oss",
        GATED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "latent attention": (
        "deepseek_v3",
        BASE
        | EXPERTS
        | {
            "intermediate_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
    ),
    "lfm2": ("lfm2", GATED | {"layer_types": ["conv", "full_attention"] * 2}),
    "mamba": ("mamba", CONVOLUTIONS),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        GATED
        | EXPERTS
        | {
            "head_dim": 12, "v_head_dim": 8, "swa_head_dim": 12, "swa_v_head_dim": 8,
            "swa_num_key_value_heads": 4, "swa_num_attention_heads": 4,
        },
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        GATED
        | {
            "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}  # fmt: skip


def config_of(name: str, **changes):
    model_type, settings = MODELS[name]
    return CONFIG_MAPPING[model_type](**{"num_hidden_layers": NUM_LAYERS} | settings | changes)


def size_of_whole(config):
    layouts = {"teacher": layout_of(config, torch.float32)}
    return size_of(whole_model(config.num_hidden_layers), layouts, 10**9)


def cached_bytes(layer) -> int:
    """Bytes of a layer of a real cache, each kind of content by its name."""
    names = ("keys", "values", "indexer_keys")
    tensors = [getattr(layer, name, None) for name in names]
    for name in ("conv_states", "recurrent_states"):
        tensors += (getattr(layer, name, None) or {}).values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_as_large_as_that_of_the_model(name):
    config = config_of(name)
    size, model = size_of_whole(config), tiny_model(config)
    assert size.parameters.stored == model.num_parameters()
    for num_tokens in (5, 11):
        output = model(torch.arange(num_tokens)[None], use_cache=True)
        cache = output.get("past_key_values") or output["cache_params"]
        cached = sum(map(cached_bytes, cache.layers))
        assert size.memory_bytes(num_tokens) == size.weights_bytes + cached
    assert size.memory_bytes(11, batch=3) == size.weights_bytes + 3 * cached
    # A state dict names a tied matrix twice.
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert size.weights_bytes == sum(stored.values())


@torch.no_grad()
def test_a_sliding_window_bounds_the_cache():
    config = family_config("gemma3_text", sliding_window=8)  # four layers slide, two do not
    size, model = size_of_whole(config), tiny_model(config)
    per_layer = 2 * 2 * 8 * 4  # keys and values, heads, their size, fp32
    assert size.kv_cache_bytes_per_token == 6 * per_layer
    for num_tokens, kept in ((5, 6 * 5), (8, 6 * 8), (50, 4 * 8 + 2 * 50)):
        assert size.memory_bytes(num_tokens) - size.weights_bytes == kept * per_layer
    layers = model(torch.arange(50)[None], use_cache=True).past_key_values.layers
    # Between two tokens transformers keeps one token less than the window.
    assert sum(map(cached_bytes, layers)) == (4 * 7 + 2 * 50) * per_layer
    assert set(size.caches) == {
        (LayerCache(per_layer, 8, 0), 4),
        (LayerCache(per_layer, None, 0), 2),
    }


def test_what_is_not_known_is_not_guessed():
    """JetMoE's experts are not declared, and its attention has experts too."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    heads = {"num_key_value_heads": 2, "kv_channels": 8}
    size = size_of_whole(CONFIG_MAPPING["jetmoe"](num_hidden_layers=2, **BASE | experts | heads))
    assert size.kv_cache_bytes_per_token is size.memory_bytes(10) is None
    assert size.active_parameters is size.flops_per_token is None


def test_active_parameters_leave_out_experts_that_are_not_chosen():
    config = family_config("qwen3_moe")  # layers 1, 3 and 5 have experts
    size = size_of_whole(config)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert size.active_parameters == size.parameters.stored - 3 * (4 - 2) * expert
    dense = size_of_whole(family_config("qwen3", tied=True))
    assert dense.active_parameters == dense.parameters.stored < dense.parameters.both_counted


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "bamba", "qwen3_5_text", "lfm2"])
def test_families_with_convolutions_are_listed(name, tmp_path, capsys):
    teacher = config_of(name, **({"attn_layer_indices": [1]} if name == "bamba" else {}))
    layer_map = LayerMap((0, 1, 3), NUM_LAYERS)
    student = config_for(initial_student(layer_map), {"teacher": teacher})
    lines = listed(tmp_path, capsys, teacher, student, layer_map)
    assert len(lines) == 3 and "unknown" not in lines[-1]


def listed(folder, capsys, teacher, student, layer_map) -> list[str]:
    for parent, config in (("teacher", teacher), ("student", student)):
        config.save_pretrained(folder / parent)
        byte_tokenizer().save_pretrained(folder / parent)
    StudentConfig(layer_map).save(folder / "student")
    main(
        [
            *("--teacher_model_name_or_path", str(folder / "teacher"), "--list"),
            *("--student_model_name_or_path", str(folder / "student")),
        ]
    )
    return capsys.readouterr().out.splitlines()


def test_a_depth_that_the_config_cannot_change_is_refused(tmp_path, capsys):
    settings = {"vocab_size": 257, "hidden_size": 64, "num_heads": 4}
    teacher, student = (CONFIG_MAPPING["xlstm"](num_hidden_layers=n, **settings) for n in (4, 3))
    with pytest.raises(SystemExit, match="2"):
        listed(tmp_path, capsys, teacher, student, LayerMap((0, 1, 3), 4))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: model_type=xlstm: this architecture is not supported, the number"
    )

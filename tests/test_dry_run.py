"""The dry run: figures known from elsewhere, and its memory estimate against a measured run."""

import gc
import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_model
from patching_models import family_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from patching.architectures.config import config_for
from patching.assemble import count_parameters
from patching.blocks import LayerMap, default_kept_layers
from patching.recipe import initial_student, intermediate_model
from train.estimate import (
    MicroBatch,
    flops_per_token,
    forward_flops,
    memory,
    saved_for_backward_bytes,
    sizes,
    student_config,
)
from train.loss import LossWeights
from train.train import main

WEIGHTS = LossWeights(1.0, 0.1, 2.0, 1.0)
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3-tied", "llama-untied", "gpt_neox-untied", "gpt2"])
def test_sizes_are_those_of_the_models(kind):
    teacher, layer_map = tiny_config(kind, 6), LayerMap((0, 2, 4, 5), 6)
    student = config_for(initial_student(layer_map), {"teacher": teacher})
    for k, size in enumerate(sizes(teacher, layer_map, "last")):
        recipe = intermediate_model(layer_map, k, "last")
        config = config_for(recipe, {"teacher": teacher, "student": student})
        assert size.parameters == count_parameters(config)
        assert size.depth == config.num_hidden_layers


def test_qwen3_4b_has_the_published_sizes():
    layer_map = LayerMap(default_kept_layers(36, 2, 1, 2), 36)
    stored = [size.parameters.stored for size in sizes(QWEN3_4B, layer_map, "last")]
    assert [round(stored[k] / 1e9, 2) for k in (-2, -1)] == [4.31, 4.02]


def test_flops_are_those_of_the_matrix_products():
    config = tiny_config("llama-untied", 3)
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    num_positions = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, num_positions, dtype=torch.long))
    flops = forward_flops(config)
    # Eager attention also computes the masked half, and rotary angles.
    whole = flops._replace(attention_per_position=2 * flops.attention_per_position)
    counted = counter.get_total_flops() / num_positions
    assert whole.at(num_positions) == pytest.approx(counted, rel=0.01)


def test_unused_experts_take_no_flops():
    dense, sparse = (family_config("mixtral", num_experts_per_tok=asked) for asked in (4, 1))
    difference = forward_flops(dense).layers - forward_flops(sparse).layers
    expert = 3 * dense.hidden_size * dense.intermediate_size
    assert difference == dense.num_hidden_layers * 3 * 2 * expert


def test_terms_that_are_off_take_no_flops():
    teacher = tiny_config("llama-untied", 4)
    student = student_config(teacher, LayerMap((0, 2, 3), 4))
    whole = flops_per_token(student, teacher, WEIGHTS)
    without_kl = flops_per_token(student, teacher, WEIGHTS._replace(kl=0.0))
    cosine_alone = flops_per_token(student, teacher, LossWeights(0.0, 0.0, 2.0, 1.0))
    assert (4 * without_kl.head, cosine_alone.head) == (3 * whole.head, 0)
    assert cosine_alone.layers == whole.layers


def test_kept_activations_are_those_autograd_keeps():
    config = tiny_config("llama-untied", 3)
    model = tiny_model(config).train()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(torch.zeros(2, 64, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    batch = MicroBatch(2, 64, torch.float32)
    estimate = saved_for_backward_bytes(config, batch, is_sharded=False)
    # Without data, attention also keeps its mask and repeated keys: more, never less.
    assert sum(kept.values()) <= estimate < 1.2 * sum(kept.values())
    checkpointed = batch._replace(activation_checkpointing=True)
    assert saved_for_backward_bytes(config, checkpointed, is_sharded=False) < estimate / 4


def test_sharding_divides_what_can_be_divided():
    student = student_config(QWEN3_4B, LayerMap(default_kept_layers(36, 2, 1, 2), 36))
    batch = MicroBatch(2, 2048, torch.bfloat16, activation_checkpointing=True)
    one, four = (memory(student, QWEN3_4B, WEIGHTS, batch, shards, 20) for shards in (1, 4))
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert getattr(one, name) == pytest.approx(4 * getattr(four, name))
    assert one.gathered == 0 < four.gathered


def test_the_plan_needs_no_weights_and_no_data(tmp_path, capsys):
    QWEN3_4B.save_pretrained(tmp_path)
    main(
        ["--teacher_model_name_or_path", str(tmp_path), "--save_directory", str(tmp_path / "out"),
         "--fsdp_config", str(tmp_path), "--dry_run", "--dry_run_ranks", "4"]
    )  # fmt: skip
    plan = capsys.readouterr().out
    kept = ",".join(map(str, [*range(0, 35, 2), 35]))
    for expected in (
        f"student of 19 layers from 36 (qwen3): {kept}",
        f"{16:13}  {'32-33':>13}  (17, 34)\n{17:13}  {'34':>13}  (18, 35)",
        "k =  0   19 layers    2,306.64 M    2,695.60 M  student",
        "k = 17   36 layers    4,022.47 M    4,411.42 M  teacher",
        "tokens per optimizer step: 4,194,304",
        "in 500 steps: 2,097,152,000 tokens",
        "memory per rank, AdamW, sharded",
    ):
        assert expected in plan, expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_a_measured_run(tmp_path, text_file, bf16):
    """Measured as the most memory torch had allocated at once. Unlike resident memory, that does
    not depend on other work of the system.
    """
    config = LlamaConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, tie_word_embeddings=False, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    dtype, other = (torch.bfloat16, torch.float32)[:: 1 if bf16 else -1]
    # Stored in the other dtype: a teacher that needs no cast stays mapped from its file.
    AutoModelForCausalLM.from_config(config, dtype=other).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        main(
            ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--save_directory",
             str(tmp_path / "student"), "--dataset", str(text_file), "--max_length", "128",
             "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2",
             "--max_steps", "2", "--save_strategy", "no", "--bf16", str(bf16),
             "--heldout_documents", "0", "--warmup_steps", "0", "--disable_tqdm", "True"]
        )  # fmt: skip
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted(
        (event for event in events if event.get("name") == "[memory]"),
        key=lambda event: event["ts"],
    )
    allocated = [change["args"]["Total Allocated"] for change in changes]
    measured = max(allocated) - (allocated[0] - changes[0]["args"]["Bytes"])
    layer_map = LayerMap((0, 1, 3, 5, 7), 8)
    estimate = memory(
        student_config(config, layer_map), config, WEIGHTS, MicroBatch(8, 128, dtype), 1, 6, True
    )
    print(f"estimated {estimate.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured == pytest.approx(estimate.total, rel=0.2), estimate

"""The dry run: figures known from elsewhere, and its memory against a measured run."""

import json

import pytest
import torch
from conftest import byte_tokenizer, run_module, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from patching.assemble import count_parameters
from patching.blocks import LayerMap, default_kept_layers
from patching.families import config_for
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
from train.losses import LossWeights
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
    for size in sizes(teacher, layer_map, "last"):
        recipe = intermediate_model(layer_map, size.num_layers_to_patch, "last")
        config = config_for(recipe, {"teacher": teacher, "student": student})
        assert (size.stored, size.both_counted) == count_parameters(config)
        assert size.num_layers == config.num_hidden_layers


def test_qwen3_4b_has_the_published_sizes():
    layer_map = LayerMap(default_kept_layers(36, 2, 1, 2), 36)
    stored = [size.stored for size in sizes(QWEN3_4B, layer_map, "last")]
    assert [round(stored[k] / 1e9, 2) for k in (-2, -1)] == [4.31, 4.02]


def test_flops_are_those_of_the_matrix_products():
    config = tiny_config("llama-untied", 3)
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    num_positions = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, num_positions, dtype=torch.long))
    flops = forward_flops(config)
    # Eager attention computes the half behind the diagonal too, and rotary angles.
    whole = flops._replace(attention_per_position=2 * flops.attention_per_position)
    counted = counter.get_total_flops() / num_positions
    assert whole.at(num_positions) == pytest.approx(counted, rel=0.01)


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
    # Run without data, attention keeps its mask and repeated keys too: more, never less.
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
        "tokens per optimiser step: 4,194,304",
        "in 500 steps: 2,097,152,000 tokens",
        "memory per rank, AdamW, sharded",
    ):
        assert expected in plan, expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_is_that_of_a_measured_run(tmp_path, text_file, bf16):
    """Peak of a process that trains this model, less that of one that trains next to nothing."""
    large = LlamaConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, tie_word_embeddings=False, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    layer_map = LayerMap((0, 2, 4, 6, 7), 8)
    own = torch.ones(2**28)  # what this process holds must not count
    peaks = []
    for name, config in (("small", tiny_config("llama-untied", 8)), ("large", large)):
        folder = tmp_path / name
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        done = run_module(
            "train.train", "--teacher_model_name_or_path", folder, "--save_directory",
            tmp_path / f"{name}_student", "--dataset", text_file, "--max_length", "128",
            "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2",
            "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--bf16", bf16,
            "--heldout_documents", "0", "--warmup_steps", "0", OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        log = json.loads((tmp_path / f"{name}_student" / "run.json").read_text())["log"]
        peaks.append(max(line.get("peak_memory_gib", 0) for line in log))
    measured = (peaks[1] - peaks[0]) * 2**30
    dtype = torch.bfloat16 if bf16 else torch.float32
    estimate = memory(
        student_config(large, layer_map), large, WEIGHTS, MicroBatch(8, 128, dtype), 1, 6, True
    )
    print(f"estimated {estimate.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert own.nbytes > estimate.total
    assert measured == pytest.approx(estimate.total, rel=0.2), estimate

"""The dry run: figures known from elsewhere, and its memory estimate against a measured run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, byte_tokenizer, run_module, tiny_config, tiny_model
from measured_memory import peak_bytes_of
from patching_models import SETTINGS, family_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Trainer

from patching.architectures.config import config_for
from patching.assemble import count_parameters
from patching.blocks import LayerMap, default_kept_layers
from patching.recipe import initial_student, intermediate_model
from train.estimate import (
    Memory,
    MicroBatch,
    flops_per_token,
    forward_flops,
    memory,
    saved_for_backward_bytes,
    sizes,
    student_config,
)
from train.loss import LossWeights
from train.optimizer_memory import optimizer_bytes
from train.refused_flags import OPTIMIZERS
from train.train import main
from train.training_args import DistillationArguments

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


@pytest.mark.slow
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
        "memory per rank, adamw_torch_fused, sharded",
    ):
        assert expected in plan, expected
    assert not (tmp_path / "out").exists()


EXPERTS = [name for name, settings in SETTINGS.items() if any("expert" in key for key in settings)]


@pytest.mark.parametrize("kind", EXPERTS)
def test_mixtures_of_experts_are_estimated(kind):
    config = family_config(kind)
    one, two = (
        saved_for_backward_bytes(config, MicroBatch(num_rows, 32, torch.float32), False)
        for num_rows in (1, 2)
    )
    assert one < two < 3 * one
    mixed = MicroBatch(1, 32, torch.bfloat16)
    assert saved_for_backward_bytes(config, mixed, is_sharded=True) < one


def test_a_mixture_of_experts_has_a_plan(tmp_path, capsys):
    family_config("qwen3_moe").save_pretrained(tmp_path)
    words = [
        "--teacher_model_name_or_path",
        str(tmp_path),
        "--save_directory",
        str(tmp_path / "out"),
    ]
    main([*words, "--max_length", "64", "--dry_run", "--dry_run_ranks", "2", "--optim", "sgd"])
    plan = capsys.readouterr().out
    assert "(qwen3_moe)" in plan
    assert "memory per rank, sgd (estimate, GiB)" in plan


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw_torch", None), ("adamw_torch_fused", None), ("adafactor", None), ("sgd", None),
        ("sgd", "momentum=0.9"), ("adagrad", None), ("rmsprop", None),
        ("rmsprop", "momentum=0.5, centered=True"),
    ],
)  # fmt: skip
def test_optimizer_states_have_the_estimated_size(tmp_path, optimizer, options):
    model = tiny_model(tiny_config("qwen3-untied", 3))
    args = DistillationArguments(save_directory=str(tmp_path), optim=optimizer, optim_args=options)
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    made = cls(model.parameters(), **settings)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    made.step()
    states = [value for state in made.state.values() for value in state.values()]
    measured = sum(value.nbytes for value in states if torch.is_tensor(value) and value.ndim)
    assert optimizer_bytes(model, optimizer, options) == measured


def test_every_optimizer_that_may_be_chosen_has_a_size():
    for optimizer in OPTIMIZERS:
        assert optimizer_bytes(nn.Linear(4, 4), optimizer) >= 0


@pytest.mark.slow
def test_data_parallel_ranks_hold_a_copy_of_the_gradients():
    student = student_config(QWEN3_4B, LayerMap(default_kept_layers(36, 2, 1, 2), 36))
    batch = MicroBatch(2, 2048, torch.bfloat16, activation_checkpointing=True)
    one, two = (
        memory(student, QWEN3_4B, WEIGHTS, batch, 1, 20, num_replicas=ranks) for ranks in (1, 2)
    )
    assert (one.buckets, two.buckets) == (0, two.gradients)
    assert 9.2e9 < two.buckets < 9.3e9
    assert two.total - one.total == two.buckets


MEASURED = LlamaConfig(
    vocab_size=16384, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=4, tie_word_embeddings=False, eos_token_id=256, bos_token_id=None,
)  # fmt: skip


def measured_command(folder: Path, text_file: Path, bf16: bool, *flags: str) -> list[str]:
    # Stored in the other dtype: a teacher that needs no cast stays mapped from its file.
    other = torch.float32 if bf16 else torch.bfloat16
    AutoModelForCausalLM.from_config(MEASURED, dtype=other).save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    text = folder / "text.jsonl"
    text.write_text(text_file.read_text() * 5)
    return [
        "--teacher_model_name_or_path", str(folder / "teacher"), "--save_directory",
        str(folder / "student"), "--dataset", str(text), "--max_length", "128",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2",
        "--max_steps", "2", "--save_strategy", "no", "--bf16", str(bf16),
        "--heldout_documents", "0", "--warmup_steps", "0", "--disable_tqdm", "True",
        "--measure_order", "False", *flags,
    ]  # fmt: skip


def estimated(bf16: bool, num_ranks: int = 1, is_sharded: bool = False) -> Memory:
    student = student_config(MEASURED, LayerMap((0, 1, 3, 5, 7), 8))
    batch = MicroBatch(8, 128, torch.bfloat16 if bf16 else torch.float32)
    shards, replicas = (num_ranks, 1) if is_sharded else (1, num_ranks)
    return memory(student, MEASURED, WEIGHTS, batch, shards, 6, True, replicas)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_a_measured_run(tmp_path, text_file, bf16):
    measured = peak_bytes_of(measured_command(tmp_path, text_file, bf16))
    estimate = estimated(bf16)
    print(f"estimated {estimate.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured == pytest.approx(estimate.total, rel=0.1), estimate


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_two_measured_ranks(tmp_path, text_file, bf16, is_sharded):
    words = measured_command(tmp_path, text_file, bf16)
    if is_sharded:
        words += ["--fsdp_config", str(tmp_path / "teacher")]
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"),
        *("tests/measured_memory.py", tmp_path, *words),
        OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", SHARDED=str(int(is_sharded)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    estimate = estimated(bf16, 2, is_sharded)
    for rank in (0, 1):
        measured = json.loads((tmp_path / f"peak_{rank}.json").read_text())
        print(f"estimated {estimate.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
        assert measured == pytest.approx(estimate.total, rel=0.1), estimate

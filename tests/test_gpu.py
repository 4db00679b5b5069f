"""What only a CUDA GPU can show: PyTorch's variable-length attention, heads whose gradient is
summed in fp32 by cuBLAS, and training as a user starts it there.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_module, tiny_model
from local_tasks import CHOICE, QUESTIONS, ROLLING, TEXTS, write_task
from patching_models import LAYER_MAP, family_config, family_pair
from safetensors.torch import load_file
from test_documents import packed_and_alone
from test_evaluate import flags
from test_fsdp import command, read
from torch import nn

from patching.running.hidden_states import hidden_states_at
from patching.running.varlen import VARLEN
from train.batches import collate, to_device
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count
from train.packing import check_varlen
from train.speed import speed_up
from train.vocabulary_loss import vocabulary_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.3, cosine=2.0, temperature=2.0)
HEADS = {
    "qwen3": {"head_dim": 16},
    "bert": {"attention_probs_dropout_prob": 0.0},
    "gemma3_text": {},
    "olmo3": {},
}


def on_gpu(batch: dict) -> dict:
    return to_device(batch, torch.device("cuda"))


def share_off(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of what is expected."""
    expected = expected.float()
    return float((value.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", HEADS)
def test_varlen_gives_states_and_gradients_of_documents_alone(model_type):
    config = family_config(model_type, **HEADS[model_type])
    check_varlen(config, "documents")
    packed, _ = packed_and_alone()
    batch, found = on_gpu(collate(packed)), []
    for attention, has_bf16 in (("sdpa", False), ("sdpa", True), (VARLEN, True)):
        model = tiny_model(config).cuda()
        model.config._attn_implementation = attention
        with torch.autocast("cuda", torch.bfloat16, enabled=has_bf16):
            (states,) = hidden_states_at(
                model, [model.config.num_hidden_layers], batch["input_ids"], None,
                batch["position_ids"],
            )  # fmt: skip
        states.float().square().mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((states.detach(), torch.cat(gradients)))
    for expected, of_mask, value in zip(*found):  # some models' gradients are 10 % off in bf16
        assert share_off(value, expected) < 2 * share_off(of_mask, expected) + 0.005


@pytest.mark.parametrize("with_compile", [False, True])
def test_a_micro_batch_in_bf16_is_near_the_one_in_fp32_on_a_cpu(with_compile):
    teacher, student = family_pair("qwen3", head_dim=16)
    packed, _ = packed_and_alone()
    batch, found = collate(packed), []
    for device in ("cpu", "cuda"):
        pair = [copy.deepcopy(model).to(device) for model in (student, teacher)]
        weights = WEIGHTS
        if device == "cuda":
            batch = on_gpu(batch)
            for model in pair:
                model.config._attn_implementation = VARLEN
                if with_compile:
                    flags = SimpleNamespace(
                        use_liger_kernel=False, torch_compile=True,
                        torch_compile_backend="inductor", torch_compile_mode=None,
                    )  # fmt: skip
                    speed_up(model, flags)
                    weights = WEIGHTS._replace(compile_backend="inductor")
        install_distillation_forward(*pair, LAYER_MAP, weights)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            terms = pair[0](**batch, counts=count(batch["labels"]))
        terms.loss.backward()
        gradients = [p.grad.flatten().cpu() for p in pair[0].parameters() if p.grad is not None]
        found.append((terms.loss.detach().cpu(), torch.cat(gradients)))
    (loss, gradient), (gpu_loss, gpu_gradient) = found
    assert float(gpu_loss) == pytest.approx(float(loss), rel=0.01)
    assert share_off(gpu_gradient, gradient) < 0.05


@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
def test_a_micro_batch_never_waits_for_the_gpu(attention):
    pair = [model.cuda() for model in family_pair("qwen3", head_dim=16)]
    for model in pair:
        model.config._attn_implementation = attention
    teacher, student = pair
    install_distillation_forward(student, teacher, LAYER_MAP, WEIGHTS)
    batch = collate([{"input_ids": [7, 8, 9, 7], "document_lengths": [1, 3]}] * 2)
    counts = count(on_gpu(batch)["labels"])
    for mode in ("default", "error"):  # the first time, PyTorch sets things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                student(**on_gpu(batch), counts=counts).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_heads_gradient_is_summed_in_fp32():
    torch.manual_seed(0)
    hidden_ND, teacher_ND = torch.randn(2, 4096, 64, device="cuda")
    head, teacher_head = (nn.Linear(64, 70000, bias=False, device="cuda") for _ in range(2))
    targets_N = torch.randint(70000, (4096,), device="cuda")
    found = []
    for dtype in (torch.float64, torch.float32):
        student, teacher = (copy.deepcopy(model).to(dtype) for model in (head, teacher_head))
        inputs = (hidden_ND.to(dtype), student, targets_N, teacher_ND.to(dtype), teacher)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            loss = vocabulary_loss(*inputs, cross_entropy_weight=1.0, kl_weight=0.1)
        loss.loss.backward()
        assert student.weight.grad.dtype == dtype
        found.append((loss.loss.detach(), student.weight.grad))
    assert share_off(found[1][0], found[0][0]) < 1e-3
    assert share_off(found[1][1], found[0][1]) < 0.01


def losses(folder) -> list[float]:
    return [line["loss"] for line in read(folder)[0]]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--torch_compile", "False"],
        ["--attn_implementation", "varlen"],
        ["--use_liger_kernel", "True"],
        ["--teacher_fp8", "True"],
        ["--activation_checkpointing", "True"],
    ],
    ids=" ".join,
)
def test_training_on_one_gpu(flags, pair_folders, text_file, tmp_path):
    if "--use_liger_kernel" in flags:
        pytest.importorskip("liger_kernel")
    words = command(pair_folders[0], tmp_path / "s", text_file, "--bf16", "True", *flags)
    done = run_module("train.train", *words)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "s")
    assert len(found) == 4
    assert found[-1] < found[0]
    assert json.loads((tmp_path / "s/run.json").read_text())["environment"]["device"] == (
        torch.cuda.get_device_name()
    )


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing", "True"]], ids=" ".join)
def test_one_sharded_rank_follows_one_process(flags, pair_folders, text_file, tmp_path):
    teacher = pair_folders[0]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    done = run_module("train.train", *command(teacher, alone, text_file, "--bf16", "True", *flags))
    assert done.returncode == 0, done.stderr
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "--module"]
    words = command(teacher, sharded, text_file, "--bf16", "True", *flags)
    done = run_module(*launcher, "train.train", *words, "--fsdp_config", str(teacher))
    assert done.returncode == 0, done.stderr
    assert "has no effect" not in done.stderr
    for value, expected in zip(losses(sharded), losses(alone), strict=True):
        assert value == pytest.approx(expected, rel=0.01)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (sharded, alone))
    assert weights.keys() == expected.keys()


def test_sizes_are_evaluated_as_on_a_cpu(pair_folders, tmp_path):
    write_task(tmp_path, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(tmp_path, "choice", QUESTIONS, **CHOICE)
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        asked = {"num_layers_to_patch": "all", "include_path": tmp_path, "baselines": "naive"}
        words = flags(pair_folders, out, **asked, device=device, tasks="rolling,choice")
        done = run_module("evaluate.evaluate", *words)
        assert done.returncode == 0, done.stderr
        paths = sorted(out.glob("*_k*.json"))
        results = [json.loads(path.read_text())["results"]["rolling"] for path in paths]
        found.append([result["bits_per_byte,none"] for result in results])
    assert len(found[0]) > 4
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_an_order_is_searched_on_the_gpu(pair_folders, text_file, tmp_path):
    teacher, student = map(str, pair_folders)
    done = run_module(
        "patching.orders", "--teacher_model_name_or_path", teacher,
        "--student_model_name_or_path", student, "--calibration", str(text_file),
        "--calibration_texts", "6", "--calibration_length", "12",
        "--save_directory", str(tmp_path / "orders"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

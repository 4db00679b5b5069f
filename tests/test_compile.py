"""When layers are compiled. Compiled ones stay so, however many kinds of layers and batches there
are.
"""

import json

import pytest
import torch
from conftest import tiny_model
from patching_models import family_config
from test_dry_run import QWEN3_4B
from torch._dynamo.utils import counters
from training_runs import trainer_for

import train.train
from patching.blocks import LayerMap, default_kept_layers
from train import speed
from train.training_args import DistillationArguments

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer_types", "num_kept"), [([SLIDING, FULL] * 2, 3), ([*[SLIDING] * 3, FULL] * 8, 17)]
)
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=1)
def test_mixed_attention_never_runs_eagerly(tmp_path, layer_types, num_kept):
    """Each kind of attention is compiled for student and teacher, with and without gradients, and
    with and without a mask. Beyond dynamo's limit, here 1, it would go on without compiling. The
    second model has the layers of OLMo 3 with 7 billion parameters, and no more variants.
    """
    torch._dynamo.reset()
    counters.clear()
    num_layers = len(layer_types)
    config = family_config("olmo3", num_hidden_layers=num_layers, layer_types=layer_types)
    layer_map = LayerMap(default_kept_layers(num_layers, 2, 1, 2), num_layers)
    assert len(layer_map.kept) == num_kept
    flags = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    flags |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(tmp_path, tiny_model(config), layer_map, **flags)
    trainer.train()
    assert trainer.state.global_step == 4
    print(num_layers, dict(counters["frames"]), dict(counters["stats"]))
    assert not counters["unimplemented"] and not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """A CPU with a C++ compiler."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(speed.shutil, "which", lambda name: name)
    with torch._dynamo.config.patch(suppress_errors=False):
        yield


def is_compiled(folder, num_tokens: float, has_cache: bool = False, **flags) -> bool:
    args = DistillationArguments(save_directory=str(folder), **flags)
    layer_map = LayerMap(default_kept_layers(36, 2, 1, 2), 36)
    is_chosen = speed.compile_if_long(args, QWEN3_4B, layer_map, num_tokens, 2048, has_cache)
    assert is_chosen == torch._dynamo.config.suppress_errors
    return args.torch_compile and args.torch_compile_backend == "inductor"


@pytest.mark.parametrize(
    ("num_tokens", "has_cache", "flags", "expected"),
    [
        (10**3, False, {}, False),
        (10**6, False, {}, True),
        (5 * 10**4, False, {}, True),
        (5 * 10**4, True, {}, False),
        (10**6, False, {"torch_compile": False}, False),
        (10**6, False, {"torch_compile_backend": "eager"}, False),
    ],
)
def test_long_runs_on_a_cpu_are_compiled(
    tmp_path, on_a_cpu, num_tokens, has_cache, flags, expected
):
    assert is_compiled(tmp_path, num_tokens, has_cache, **flags) == expected


def test_what_is_asked_for_is_compiled_anyway_and_nothing_without_a_compiler(
    tmp_path, on_a_cpu, monkeypatch
):
    assert is_compiled(tmp_path, 10**3, torch_compile=True)
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    assert not is_compiled(tmp_path, 10**6)


def test_a_long_run_says_that_it_is_compiled(
    pair_folders, text_file, tmp_path, on_a_cpu, monkeypatch, capsys
):
    backends = []

    def compiled(function, backend, **_):
        backends.append(backend)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(speed, "LONG_RUN_FLOPS", 1)
    train.train.main([
        "--teacher_model_name_or_path", str(pair_folders[0]), "--dataset", str(text_file),
        "--save_directory", str(tmp_path / "student"), "--max_length", "32", "--max_steps", "1",
        "--gradient_accumulation_steps", "1", "--heldout_documents", "0", "--save_strategy", "no",
        "--measure_order", "False", "--disable_tqdm", "True",
    ])  # fmt: skip
    assert {*backends} == {"inductor"}
    assert "compiling layers" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "student" / "run.json").read_text())["arguments"]
    assert (recorded["torch_compile"], recorded["torch_compile_backend"]) == (True, "inductor")

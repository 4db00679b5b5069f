"""`--kept_layers auto`, through train.train."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, run_module, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from patching.arguments import CalibrationArguments
from patching.blocks import LayerMap
from patching.orders.kept_layers import most_similar_layers
from patching.running.calibration import padded_batches
from patching.running.similarity import similarity_by_depth
from patching.student_config import read_student_config
from train import choose_layers
from train.model_args import ModelArguments
from train.train import main

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A teacher of eight layers, of which layer 4 changes the hidden state most."""
    model = tiny_model(tiny_config("llama", 8))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.2)
            layer.self_attn.o_proj.weight.mul_(0.2)
        model.model.layers[4].mlp.down_proj.weight.mul_(100.0)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def flags(teacher_folder, folder, text_file, *extra: str) -> list[str]:
    return [
        *("--teacher_model_name_or_path", str(teacher_folder), "--save_directory", str(folder)),
        *("--dataset", str(text_file), "--calibration", str(text_file), "--kept_layers", "auto"),
        *("--max_steps", "1", "--max_length", "32", "--gradient_accumulation_steps", "1"),
        *("--save_strategy", "no", "--measure_order", "False", *extra),
    ]


@torch.no_grad()
def test_similarity_is_the_mean_cosine_of_states_as_transformers_returns_them(teacher_folder):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    found = similarity_by_depth(model, padded_batches(ROWS))
    model.model.norm = torch.nn.Identity()
    states = [
        torch.stack(model(torch.tensor([row]), output_hidden_states=True).hidden_states)[:, 0]
        for row in ROWS
    ]
    states = torch.nn.functional.normalize(torch.cat(states, dim=1).double(), dim=-1)
    expected = torch.einsum("ind,jnd->ij", states, states) / states.shape[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def best_map(teacher_folder, text_file, num_kept: int) -> LayerMap:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    text = CalibrationArguments(str(text_file)).read_calibration()
    similarity = similarity_by_depth(model, text.batches(byte_tokenizer(), model.config))
    return most_similar_layers(similarity, num_kept)


@pytest.mark.slow
def test_one_of_two_ranks_chooses_for_both(teacher_folder, text_file, tmp_path):
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "train.train"),
        *flags(teacher_folder, tmp_path, text_file, "--bf16", "False"),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept layers by similarity") == 1
    expected = best_map(teacher_folder, text_file, 5)
    assert read_student_config(str(tmp_path)).layer_map == expected


def test_the_student_has_the_chosen_layers(teacher_folder, text_file, tmp_path, capsys):
    main(flags(teacher_folder, tmp_path, text_file))
    layer_map = read_student_config(str(tmp_path)).layer_map
    kept = layer_map.kept
    assert len(kept) == 5  # as many as a llama keeps of eight
    assert layer_map == best_map(teacher_folder, text_file, 5)
    assert 4 in kept  # no block runs across layer 4
    out = capsys.readouterr().out
    numbers = ",".join(map(str, kept))
    assert f"chosen   {numbers}: mean cosine 0." in out
    assert "default  0,1,3,5,7: mean cosine 0." in out
    values = [float(value) for value in re.findall(r"mean cosine (-?\d\.\d+)", out)]
    assert values[0] > values[1]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"]["calibration"] == str(text_file)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "auto"), (False, torch.float32)])
def test_training_in_fp32_chooses_layers_in_fp32(
    bf16, dtype, teacher_folder, text_file, tmp_path, monkeypatch
):
    dtypes = []

    def load(*arguments):
        dtypes.append(arguments[1])
        return load_model(*arguments)

    load_model = choose_layers.load_model
    monkeypatch.setattr(choose_layers, "load_model", load)
    main(flags(teacher_folder, tmp_path, text_file, "--bf16", str(bf16)))
    assert dtypes == [dtype]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_kept_layers", "2", "--longest_block", "3"], "at most 3: choose 3-8 layers"),
        (["--target_params", "1K"], "target_params=1K: the smallest student has"),
        (["--target_params", "1K", "--num_kept_layers", "3"], "both set the size"),
        (["--longest_block", "0"], "longest_block=0"),
        (["--calibration_texts", "0"], "calibration_texts=0: choose 1 or more"),
        (
            ["--kept_layers", "0,2", "--num_kept_layers", "3"],
            "--num_kept_layers only applies with --kept_layers auto",
        ),
        (["--kept_layers", "0,2"], "--calibration only applies with --kept_layers auto"),
    ],
)
def test_bad_flags_are_one_line_before_weights_load(
    teacher_folder, text_file, tmp_path, capsys, monkeypatch, extra, message
):
    monkeypatch.setattr(choose_layers, "load_model", lambda *_: pytest.fail("weights load"))
    with pytest.raises(SystemExit, match="2"):
        main(flags(teacher_folder, tmp_path, text_file, *extra))
    assert message in capsys.readouterr().err


def test_text_is_needed(teacher_folder, text_file, tmp_path, capsys):
    given = flags(teacher_folder, tmp_path, text_file)
    at = given.index("--calibration")
    with pytest.raises(SystemExit, match="2"):
        main(given[:at] + given[at + 2 :])
    assert "--kept_layers auto needs text" in capsys.readouterr().err


def test_the_largest_student_that_fits():
    config = tiny_config("llama", 8)
    torch.manual_seed(0)
    similarity = torch.rand(9, 9, dtype=torch.float64)
    sizes = {}
    for num_kept in range(3, 9):
        of_size = SimpleNamespace(
            target_params=None, num_kept_layers=num_kept, longest_block=3, trust_remote_code=False
        )
        layer_map = choose_layers.fitting_map(of_size, similarity, config, 5)
        assert layer_map == most_similar_layers(similarity, num_kept, 3)
        shape = tiny_config("llama", num_kept)
        sizes[num_kept] = sum(p.numel() for p in tiny_model(shape).parameters())
    for num_kept, size in sizes.items():
        for limit, expected in ((size, num_kept), (size + 1, num_kept), (size - 1, num_kept - 1)):
            if expected >= 3:
                arguments = ModelArguments(
                    "t", kept_layers="auto", target_params=str(limit), longest_block=3
                )
                found = choose_layers.fitting_map(arguments, similarity, config, 5)
                assert len(found.kept) == expected


def test_states_that_overflow_choose_nothing(teacher_folder):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float16).eval()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(FloatingPointError, match="not numbers in float16, .* use --dtype float32"):
        similarity_by_depth(model, padded_batches(ROWS))

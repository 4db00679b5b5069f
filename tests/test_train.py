"""`train.train` as a user runs it: the documented command, its output, and what it rejects."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_module, save_pair, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, T5Config
from transformers.utils import is_flash_attn_2_available

from patching.cli.command_line import CommandLineParser
from patching.patch import main as patch
from patching.student_config import read_student_config
from train.data_args import DataArguments
from train.fsdp_config import check_layer_classes, layer_classes
from train.model_args import ModelArguments
from train.speed import check_liger_knows
from train.train import main
from train.training_args import DistillationArguments


def documented_command(teacher, folder, dataset) -> list[str]:
    """The flags of the README's torchrun line, in its order."""
    return [
        "--teacher_model_name_or_path", str(teacher), "--save_directory", str(folder),
        "--dataset", str(dataset), "--fsdp_config", str(teacher),
    ]  # fmt: skip


SMALL = [
    "--max_steps", "2", "--max_length", "32", "--gradient_accumulation_steps", "2",
    "--logging_steps", "1", "--measure_order", "False",
]  # fmt: skip


def parse(*flags: str):
    parser = CommandLineParser((ModelArguments, DataArguments, DistillationArguments))
    return parser.parse_args_into_dataclasses(list(flags))


def test_the_papers_settings_are_the_defaults(pair_folders, tmp_path):
    model_args, data_args, args = parse(
        *documented_command(pair_folders[0], tmp_path, "EleutherAI/the_pile_deduplicated")
    )
    assert (data_args.dataset, data_args.max_length) == ("EleutherAI/the_pile_deduplicated", 2048)
    assert args.loss_weights[:4] == (1.0, 0.1, 2.0, 1.0)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (3e-4, 0.9, 0.95)
    assert (args.adam_epsilon, args.weight_decay, args.max_grad_norm) == (1e-8, 0.1, 1.0)
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_steps) == ("cosine", 0.01, 500)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 256)
    assert args.bf16
    assert args.seed == 0
    assert args.output_dir == str(tmp_path / "checkpoints")
    assert args.fsdp is True
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["Qwen3DecoderLayer"]
    assert not model_args.trust_remote_code


def test_fsdp_config_may_be_a_file_and_the_temperature_has_an_alias(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}))
    *_, args = parse(
        "--teacher_model_name_or_path", "t", "--save_directory", str(tmp_path),
        "--fsdp_config", str(path), "--T", "3", "--output_dir", str(tmp_path / "elsewhere"),
    )  # fmt: skip
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert args.temperature == 3.0
    assert args.output_dir == str(tmp_path / "elsewhere")


def test_the_whole_run_with_a_local_folder_and_file(pair_folders, text_file, tmp_path):
    folder = tmp_path / "student"
    own = torch.ones(2**28)  # memory of this process must not count as the run's
    done = run_module(
        "train.train", *documented_command(pair_folders[0], folder, text_file), *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert "student of 4 layers from 6: 0,2,4,5" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "checkpoints", "config.json", "generation_config.json", "loss.png",
        "model.safetensors", "run.json", "student_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    config = read_student_config(str(folder))
    assert (config.layer_map.kept, config.patch_order) == ((0, 2, 4, 5), "last")
    run = json.loads((folder / "run.json").read_text())
    assert run["arguments"]["max_length"] == 32
    assert (
        run["environment"]["torch"] == torch.__version__.split("+")[0]
        or "torch" in run["environment"]
    )
    assert run["held_out"]["eval_cross_entropy"] > 0
    assert run["log"][0]["step"] == 0  # held-out text, before the first step
    first = run["log"][1]
    assert {"cross_entropy", "kl", "cosine", "cosine_0", "grad_norm"} <= first.keys()
    assert 0.2 < first["peak_memory_gib"] < own.nbytes / 2**30
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.dtype == torch.float32
    assert student.config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (pair_folders[0] / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "float32")


@pytest.mark.slow
def test_two_ranks_under_torchrun_save_what_one_process_saves(pair_folders, text_file, tmp_path):
    """Seven micro-batches in each pass: at its end the second rank has no rows left."""
    rows = tmp_path / "rows.jsonl"
    texts = [f"document {i} ".ljust(31, "abcdefg"[i]) for i in range(7)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = [
        "--num_train_epochs", "3", "--max_length", "32", "--bf16", "False", "--save_strategy", "no",
        "--per_device_train_batch_size", "1", "--eval_dataset", str(text_file),
        "--measure_order", "False",
    ]  # fmt: skip
    folders = [tmp_path / "one", tmp_path / "two"]
    launchers = [
        ["train.train"],
        [
            "torch.distributed.run",
            "--standalone",
            "--nnodes=1",
            "--nproc-per-node=2",
            "--module",
            "train.train",
        ],
    ]
    for folder, launcher, accumulation in zip(folders, launchers, ("4", "2")):
        done = run_module(
            *launcher,
            *documented_command(pair_folders[0], folder, rows)[:-2],
            *size,
            "--gradient_accumulation_steps",
            accumulation,
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stderr
    logs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert [run["student_step"] for run in logs] == [6, 6]
    for name in ("eval_cross_entropy", "eval_kl", "eval_cosine"):
        assert logs[1]["held_out"][name] == pytest.approx(logs[0]["held_out"][name], rel=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--first_layers_to_keep", "9"],
            "first_layers_to_keep=9: this teacher has 6 layers, choose 1-6",
        ),
        (["--kept_layers", "0,3,9"], "kept layers [0, 3, 9]"),
        (
            ["--kept_layers", "0,3", "--last_layers_to_keep", "1"],
            "--kept_layers already names every layer",
        ),
        (["--max_length", "1"], "max_length=1"),
        (["--temperature", "0"], "temperature=0.0: choose a number above 0"),
        (["--kl_loss_weight", "-1"], "kl_loss_weight=-1.0: choose 0 or more"),
        (
            [
                "--use_cross_entropy",
                "False",
                "--use_kl_loss",
                "False",
                "--use_cosine_loss",
                "False",
            ],
            "every loss term is off",
        ),
        (["--max_steps", "0"], "max_steps=0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0"),
        (["--fsdp_config", "no_such.json"], "fsdp_config=no_such.json: no such file"),
        (["--fsdp_config", "no/such"], "fsdp_config=no/such: neither a .json file nor a model"),
        (["--fsdp_config", '{"version": 2'], 'fsdp_config={"version": 2 is not JSON'),
        (["--fsdp_config", '{"fsdp_version": 1}'], "version=1: choose 2"),
        (["--dataset", "no/such-dataset"], "no/such-dataset"),
        (["--text_column", "body"], "text_column=body"),
        (
            ["--teacher_model_name_or_path", "no/such-teacher"],
            "teacher_model_name_or_path=no/such-teacher",
        ),
        (["--save_directory", "/proc/student"], "/proc/student cannot be written to"),
        (["--lr_scheduler_type", "stairs"], "stairs"),
        (["--streaming", "True", "--max_steps", "-1"], "max_steps=-1: a stream has no length"),
        (["--resume_from_checkpoint", "no/such"], "resume_from_checkpoint=no/such: no checkpoint"),
        (["--dry_run_ranks", "0"], "dry_run_ranks=0: choose 1 or more"),
        (["--report_to", "wandb"], "report_to=wandb: WandbCallback requires wandb"),
        (["--report_to", "notes"], "report_to=notes: notes is not supported"),
        (["--optim", "lion_32bit"], "optim=lion_32bit: "),
        (["--optim", "stable_adamw"], "optim=stable_adamw: "),
        (["--text_column", "lists"], "text_column=lists: it holds lists of"),
        (["--gradient_accumulation_steps", "64"], "rows of up to 32 tokens, a step takes 128: "),
        (
            ["--streaming", "True", "--heldout_documents", "40"],
            "there is no text in it to train on; its first documents are held out",
        ),
        (
            ["--load_best_model_at_end", "True", "--save_steps", "30"],
            "--load_best_model_at_end requires the saving steps",
        ),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_bad_input_is_one_line_before_weights_load(
    pair_folders, text_file, tmp_path, capsys, monkeypatch, changes, message
):
    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    text = tmp_path / "text.jsonl"
    lines = [json.loads(line) | {"lists": ["a"]} for line in text_file.read_text().splitlines()]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = documented_command(pair_folders[0], tmp_path / "student", text)[:-2]
    with pytest.raises(SystemExit) as ended:
        main([*command, *SMALL, *changes])
    error = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert ended.value.code == 2
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "student").exists()


def test_a_finished_student_is_not_overwritten(pair_folders, text_file, capsys):
    command = documented_command(pair_folders[0], pair_folders[1], text_file)
    with pytest.raises(SystemExit) as ended:
        main([*command, *SMALL])
    assert ended.value.code == 2
    assert "already holds a model" in capsys.readouterr().err


def test_an_unsupported_architecture_is_rejected(tmp_path, text_file, capsys):
    teacher, _ = save_pair(tmp_path)
    config = json.loads((teacher / "config.json").read_text()) | {"model_type": "bloom"}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        main(documented_command(teacher, tmp_path / "out", text_file)[:-2])
    assert ended.value.code == 2
    assert "model_type=bloom: this architecture is not supported" in capsys.readouterr().err


def test_a_teacher_with_missing_weights_is_rejected(tmp_path, text_file, capsys):
    teacher, _ = save_pair(tmp_path)
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main([*documented_command(teacher, tmp_path / "out", text_file)[:-2], *SMALL])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its weights lack model.layers.3.mlp.up_proj.weight" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "attention",
    [
        "nonsense",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="it is installed"),
        ),
    ],
)
def test_attention_that_is_not_there_is_rejected(
    attention, pair_folders, text_file, tmp_path, capsys
):
    command = documented_command(pair_folders[0], tmp_path / "out", text_file)[:-2]
    with pytest.raises(SystemExit) as ended:
        main([*command, *SMALL, "--attn_implementation", attention])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"attn_implementation={attention}: " in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this error is for machines without a GPU")
def test_liger_kernels_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel: its kernels need a CUDA GPU"):
        DistillationArguments(save_directory=str(tmp_path), use_liger_kernel=True)


def test_liger_kernels_need_their_package_and_an_architecture_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("train.flag_checks.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel: install liger-kernel first"):
        DistillationArguments(save_directory=str(tmp_path), use_liger_kernel=True)
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    check_liger_knows(tiny_config("llama-tied", 2))
    with pytest.raises(ValueError, match="Liger has no kernels for a gpt_neox model"):
        check_liger_knows(tiny_config("gpt_neox-tied", 2))


def test_the_layers_to_shard_are_the_teachers(pair_folders, tmp_path):
    config = AutoConfig.from_pretrained(pair_folders[0])
    check_layer_classes({"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}, config)
    check_layer_classes({}, config)
    with pytest.raises(ValueError, match="a qwen3 model has no LlamaDecoderLayer, name"):
        check_layer_classes({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, config)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type=t5: this architecture is not supported"):
        layer_classes(str(tmp_path))


@pytest.mark.slow
def test_help_and_wrong_flags_do_not_import_the_trainer(tmp_path):
    """Those imports take seconds."""
    code = (
        "import sys; from train.train import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('imported:', *(name for name in ('matplotlib', 'datasets', 'lm_eval', "
        "'train.run', 'train.trainer', 'transformers.modeling_utils') if name in sys.modules))"
    )
    for flags in (["--help"], ["--teacher_model_name_or_path", "t", "--max_steps", "0"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "imported:", done.stdout + done.stderr


def test_explicit_layers_random_weights_and_half_precision(pair_folders, text_file, tmp_path):
    folder = tmp_path / "student"
    main(
        [
            *documented_command(pair_folders[0], folder, text_file)[:-2],
            *SMALL,
            "--bf16",
            "False",
            "--kept_layers",
            "0,2-3",
            "--random_initialization",
            "--save_dtype",
            "bfloat16",
            "--save_strategy",
            "no",
            "--packing",
            "False",
        ]  # fmt: skip
    )
    (tmp_path / "ordinary").touch()
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "ordinary").stat().st_mode}
    student = AutoModelForCausalLM.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0])
    assert read_student_config(str(folder)).layer_map.kept == (0, 2, 3)
    assert student.dtype == torch.bfloat16
    ours, theirs = (m.model.embed_tokens.weight.float().flatten() for m in (student, teacher))
    assert abs(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 0.1


@pytest.mark.parametrize("command_line", [main, patch])
def test_the_help_shows_the_example_as_it_is_and_a_flag_once(command_line, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert " \\\n        --" in text
    assert text.count("\n  --save_directory ") == 1
    assert "--save-directory" not in text
    assert "default: None" not in text


def test_resuming_ends_with_the_same_weights(pair_folders, text_file, tmp_path):
    size = [
        "--max_length",
        "32",
        "--gradient_accumulation_steps",
        "1",
        "--max_steps",
        "6",
        "--save_steps",
        "3",
        "--measure_order",
        "False",
    ]
    whole, again = tmp_path / "whole", tmp_path / "again"
    main(
        [
            *documented_command(pair_folders[0], whole, text_file)[:-2],
            *size,
            "--save_total_limit",
            "5",
        ]
    )
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", again / "checkpoints" / "checkpoint-3")
    main(
        [
            *documented_command(pair_folders[0], again, text_file)[:-2],
            *size,
            "--resume_from_checkpoint",
            str(again / "checkpoints" / "checkpoint-3"),
        ]  # fmt: skip
    )
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, again)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)

"""build_intermediate_model and the saved checkpoints, through the real command line."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_module, save_pair, tiny_config, tiny_model
from patching_models import family_pair, save_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from patching.checkpoints.splice import OtherLayout
from patching.patch import build_intermediate_model, main

TOKENS = torch.arange(10)[None]


def flags(pair_folders, folder, **changes):
    teacher, student = pair_folders
    values = {
        "teacher_model_name_or_path": teacher,
        "student_model_name_or_path": student,
        "num_layers_to_patch": 1,
        "save_directory": folder,
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_intermediate_is_an_ordinary_checkpoint(pair_folders, tmp_path):
    folder = tmp_path / "k1"
    done = run_module("patching.patch", *flags(pair_folders, folder))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    saved = AutoModelForCausalLM.from_pretrained(folder)
    built, tokenizer = build_intermediate_model(*map(str, pair_folders), 1)
    assert torch.equal(saved(TOKENS).logits, built(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(folder)("abc") == tokenizer("abc")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["recipe"]["layers"] == [
        "student 0",
        "teacher 2",
        "teacher 3",
        "teacher 4",
        "teacher 5",
    ]
    assert provenance["order"] == "last"
    assert provenance["patched_layers"] == [1, 2, 3]
    assert provenance["environment"]["transformers"]


@torch.no_grad()
def test_python_ends_orders_and_dtype(pair_folders):
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair_folders)
    names = [str(folder) for folder in pair_folders]
    for k, original in ((0, student), (2, teacher)):
        model, _ = build_intermediate_model(*names, k)
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
    first, _ = build_intermediate_model(*names, 1, patch_first_k_layers=True)
    last, _ = build_intermediate_model(*names, 1, patch_first_k_layers=False)
    default, tokenizer = build_intermediate_model(*names, 1, dtype=torch.bfloat16)
    assert torch.equal(first.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(last.model.embed_tokens.weight, student.model.embed_tokens.weight)
    assert default.dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None


def test_a_llama_is_patched_first_first_unless_told_otherwise(tmp_path):
    folders = [str(folder) for folder in save_pair(tmp_path, "llama-untied")]
    student = AutoModelForCausalLM.from_pretrained(folders[1])
    model, _ = build_intermediate_model(*folders, 1)
    assert torch.equal(
        model.lm_head.weight, student.lm_head.weight
    )  # the end is still the student's
    model, _ = build_intermediate_model(*folders, 1, patch_first_k_layers=False)
    assert not torch.equal(model.lm_head.weight, student.lm_head.weight)
    main([*flags(folders, tmp_path / "overridden"), "--override_llama_patching"])
    assert json.loads((tmp_path / "overridden" / "provenance.json").read_text())["order"] == "last"
    recorded = json.loads((tmp_path / "student" / "student_config.json").read_text())
    recorded["patch_order"] = "last"
    (tmp_path / "student" / "student_config.json").write_text(json.dumps(recorded))
    model, _ = build_intermediate_model(*folders, 1)
    assert not torch.equal(model.lm_head.weight, student.lm_head.weight)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_layers_to_patch": 3},
            "num_layers_to_patch=3: this student has 2 patchable layers, choose 0-2",
        ),
        ({"num_layers_to_patch": "x"}, "num_layers_to_patch=x: write numbers and ranges such as"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"order": "last", "patch_first_k_layers": True}, "both name an order"),
        ({"order": "middle"}, "order=middle: choose last, first"),
        ({"teacher_model_name_or_path": "no/such-teacher"}, "no/such-teacher"),
        ({"no_such_flag": 1}, "no_such_flag"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(
    pair_folders, tmp_path, capsys, changes, message
):
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path / "out", **changes))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_together_are_refused(pair_folders, tmp_path, capsys):
    _teacher, student = pair_folders

    def refused(message, **changes):
        with pytest.raises(SystemExit) as ended:
            main(flags(pair_folders, tmp_path / "out", **changes))
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in error
        assert error.count("\n") == 1

    other = copy_of(student, tmp_path)
    change_config(other, hidden_size=64)
    refused(
        "hidden_size is 64 in the student and 32 in the teacher", student_model_name_or_path=other
    )
    change_config(other, hidden_size=32, vocab_size=300)
    refused(
        "vocab_size is 300 in the student and 257 in the teacher", student_model_name_or_path=other
    )
    change_config(
        other, vocab_size=257, rope_parameters={"rope_type": "default", "rope_theta": 5.0}
    )
    refused("rope_parameters is", student_model_name_or_path=other)
    shutil.rmtree(other)
    copy_of(student, tmp_path)
    (other / "student_config.json").unlink()
    refused("student_config.json cannot be read", student_model_name_or_path=other)
    (other / "student_config.json").write_text(
        json.dumps({"copied_teacher_layers": [0, 2, 4, 6], "pruned_teacher_layers": [1, 3, 5]})
    )
    refused(
        "the teacher has 6 layers and student_config.json names 7",
        student_model_name_or_path=other,
    )

    llama = tmp_path / "llama"
    tiny_model(tiny_config("llama-tied", 6)).save_pretrained(llama)
    capsys.readouterr()  # its progress bar
    refused(
        "the student is a qwen3 model and the teacher a llama model",
        teacher_model_name_or_path=llama,
    )
    change_config(llama, model_type="bloom", architectures=["BloomForCausalLM"])
    refused(
        "model_type=bloom: this architecture is not supported", teacher_model_name_or_path=llama
    )
    change_config(llama, model_type="gpt2", scale_attn_by_inverse_layer_idx=True)
    refused("scale_attn_by_inverse_layer_idx=True", teacher_model_name_or_path=llama)


def test_a_folder_in_use_or_unwritable_is_refused(pair_folders, tmp_path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    (tmp_path / "a_file").touch()
    for folder, message in (
        (used, "is not empty"),
        (tmp_path / "a_file", "is a file"),
        (tmp_path / "a_file" / "below", "cannot be written to"),
        ("/proc/out", "cannot be written to"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags(pair_folders, folder))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("way", ["copied", "loaded"])
def test_a_saved_model_has_the_permissions_of_other_files(way, pair_folders, tmp_path, monkeypatch):
    def other_layout(*_):
        raise OtherLayout("as if it were")

    if way == "loaded":
        monkeypatch.setattr("patching.checkpoints.save.plan_splice", other_layout)
    mask = os.umask(0o027)
    try:
        main(flags(pair_folders, tmp_path / "out"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o640}, modes


def test_nothing_is_left_of_a_save_that_fails(pair_folders, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr("patching.checkpoints.save.write_json", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        main(flags(pair_folders, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


def size_flags(names: tuple[str, str], *more: object) -> list[str]:
    base = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]]
    return [*base, *map(str, more)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "name one size with --num_layers_to_patch or --target_params or --target_bytes or"),
        (
            ("--num_layers_to_patch", 1, "--target_params", "1M"),
            "not both --num_layers_to_patch and --target_params",
        ),
        (
            ("--list", "--patched_layers", "1"),
            "--list shows every size: leave out --patched_layers",
        ),
        (("--num_layers_to_patch", 1, "--json"), "--json belongs to --list"),
        (("--target_memory", "1GB"), "--target_memory needs --context: how many tokens"),
        (("--num_layers_to_patch", 1, "--context", 9), "--context belongs to --target_memory or"),
        (("--target_params", "1M", "--batch", 9), "--batch belongs to --context"),
        (("--target_memory", "1GB", "--context", 0), "context=0: choose 1 or more"),
        (("--target_memory", "1GB", "--context", 5, "--batch", 0), "batch=0: choose 1 or more"),
        (("--list", "--context", -2), "context=-2: choose 1 or more"),
        (
            ("--target_memory", "1KB", "--context", 5),
            "target_memory=1,000: no member of this family fits, the smallest takes",
        ),
        (("--num_layers_to_patch", "1,3"), "num_layers_to_patch=1,3: this student has 2 patchable"),
        (("--num_layers_to_patch", "2-1"), "num_layers_to_patch=2-1: write numbers and ranges"),
        (("--num_layers_to_patch", "all", "--push_to_hub", "x"), "--push_to_hub uploads one model"),
        (("--num_layers_to_patch", 1, "--public"), "--public belongs to --push_to_hub"),
        (("--target_params", "x"), "target_params=x: write a number of parameters such as"),
        (("--target_bytes", "3B3"), "target_bytes=3B3: write a size such as 500MB"),
        (
            ("--target_bytes", "1KB"),
            "target_bytes=1,000: no member of this family fits, the smallest takes",
        ),
        (("--patched_layers", "1,x"), "patched_layers=1,x: write numbers and ranges"),
        (("--patched_layers", "2-4"), "patched_layers=2,3,4: this student has layers 0-3, not 4"),
        (
            ("--num_layers_to_patch", 1, "--max_shard_size", "big"),
            "max_shard_size=big: write a size",
        ),
        (
            ("--num_layers_to_patch", 1, "--order", "nowhere.json"),
            "order=nowhere.json: choose last",
        ),
    ],
)
def test_one_way_of_naming_and_one_line_of_error(folders, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main(
            size_flags(
                folders,
                *given,
                *([] if "--list" in given else ["--save_directory", tmp_path / "o"]),
            )
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_several_sizes_are_folders_that_share_their_files(tmp_path, folders, capsys):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shard = ("--max_shard_size", "30KB", "--order", "last")
    asked = size_flags(folders, *shard, "--num_layers_to_patch", "all", "--save_directory", shared)
    main(asked)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert sorted(path.name for path in shared.iterdir()) == ["k0", "k1", "k2"]
    for k in range(3):
        one = alone / str(k)
        main(size_flags(folders, *shard, "--num_layers_to_patch", k, "--save_directory", one))
        files = sorted(path.name for path in one.iterdir())
        assert sorted(path.name for path in (shared / f"k{k}").iterdir()) == files
        for name in files:
            if name not in ("README.md", "provenance.json"):
                assert (shared / f"k{k}" / name).read_bytes() == (one / name).read_bytes(), name
    first = [min((shared / f"k{k}").glob("*.safetensors")).stat() for k in range(3)]
    assert first[0].st_ino == first[1].st_ino != first[2].st_ino
    assert first[0].st_nlink == 2

    with pytest.raises(SystemExit):
        main([*asked, "--dtype", "float16"])
    assert f"{shared / 'k0'} is not empty" in capsys.readouterr().err
    shutil.rmtree(shared / "k1")  # as if the command had been stopped
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    main(asked)
    k0, k1, k2 = capsys.readouterr().out.splitlines()
    assert "k0: k = 0 is saved already" in k0 and "k2: k = 2 is saved already" in k2
    assert k1.startswith(f"{shared / 'k1'}: k = 1, ")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert min((shared / "k1").glob("*.safetensors")).stat().st_ino == first[0].st_ino


def test_several_sizes_without_hard_links(tmp_path, folders, monkeypatch):
    def refuse(*_):
        raise OSError("this file system has none")

    monkeypatch.setattr(os, "link", refuse)
    shard = ("--max_shard_size", "30KB", "--order", "last")
    more = ("--num_layers_to_patch", "0,1", "--save_directory", tmp_path / "out")
    main(size_flags(folders, *shard, *more))
    files = [min((tmp_path / "out" / f"k{k}").glob("*.safetensors")) for k in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_nlink == 1


def test_space_is_checked_for_all_sizes_before_the_first(tmp_path, folders, monkeypatch, capsys):
    free = 2 * 250_000  # one member takes less, three take more
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    more = ("--num_layers_to_patch", "all", "--save_directory", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        main(size_flags(folders, *more))
    assert "and 500,000 are free there" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_size_without_a_folder_is_refused(folders, capsys):
    with pytest.raises(SystemExit):
        main(size_flags(folders, "--num_layers_to_patch", 1))
    assert "--save_directory is required: name a folder for the model" in capsys.readouterr().err


@pytest.mark.slow
def test_importing_it_loads_neither_plots_nor_datasets():
    code = (
        "import sys; import patching.patch; "
        "print([m for m in ('torch', 'matplotlib', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    code = (
        "import sys; from patching.patch import build_intermediate_model; "
        "from patching.family import Family; "
        "print([m for m in ('matplotlib', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr

"""`--dtype auto` where config.json names no dtype, and a dtype too small for the weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_model
from huggingface_hub.errors import NotASafetensorsRepoError
from patching_models import family_pair, save_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from patching.checkpoints import stored_dtype as module
from patching.checkpoints.stored_dtype import stored_dtype
from patching.family import Family
from patching.patch import main
from patching.recipe import Reference
from train.train import main as train_main
from train.trainer import DistillationTrainer


def without_dtype(folder: str) -> None:
    path = Path(folder, "config.json")
    values = json.loads(path.read_text())
    values.pop("dtype")
    path.write_text(json.dumps(values))


def as_pickle(folder: str) -> None:
    path = Path(folder, "model.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


@pytest.mark.parametrize("stored", ["one file", "several files", "pickled"])
def test_auto_follows_the_stored_tensors(stored, tmp_path):
    teacher, student = (model.to(torch.bfloat16) for model in family_pair("llama"))
    teacher.model.norm.float()  # some tensors are often kept in fp32
    shard = "20KB" if stored == "several files" else "5GB"
    names = save_models(tmp_path, teacher, student, max_shard_size=shard)
    if stored == "pickled":
        as_pickle(names[0])
    assert Family.from_pretrained(*names).dtype == torch.bfloat16
    without_dtype(names[0])
    assert Family.from_pretrained(*names).dtype == torch.bfloat16
    out = tmp_path / "out"
    main(
        [
            *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
            *("--num_layers_to_patch", "1", "--save_directory", str(out)),
        ]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_without_any_weights_it_is_unknown(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert stored_dtype(Reference(str(tmp_path))) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        stored_dtype(Reference(str(tmp_path)))


def test_of_a_repository_only_headers_are_read(monkeypatch):
    asked = []

    def metadata(name, revision):
        asked.append((name, revision))
        if name == "org/pickled":
            raise NotASafetensorsRepoError
        return SimpleNamespace(parameter_count={"F32": 10, "BF16": 1000, "U8": 10**6})

    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(module, "pickled_files", lambda *_: [])
    assert stored_dtype(Reference("org/teacher", "v1")) == torch.bfloat16
    assert stored_dtype(Reference("org/pickled")) is None
    assert asked == [("org/teacher", "v1"), ("org/pickled", None)]


@pytest.mark.parametrize("way", ["copied", "loaded"])
def test_a_dtype_that_is_too_small_is_refused(way, tmp_path, capsys):
    names = save_models(tmp_path, *family_pair("llama"))
    path = Path(names[0], "model.safetensors")
    tensors = load_file(path)
    tensors["model.layers.4.mlp.up_proj.weight"][3, 5] = 70_000.0
    save_file(tensors, path, metadata={"format": "pt"})
    if way == "loaded":
        as_pickle(names[0])

    def run(k: int, dtype: str) -> None:
        main(
            [
                *("--teacher_model_name_or_path", names[0]),
                *("--student_model_name_or_path", names[1]),
                *("--num_layers_to_patch", str(k), "--order", "last", "--dtype", dtype),
                *("--save_directory", str(tmp_path / dtype)),
            ]
        )

    with pytest.raises(SystemExit) as ended:
        run(1, "float16")
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "dtype=float16: model.layers.3.mlp.up_proj.weight has numbers beyond its range" in error
    assert not (tmp_path / "float16").exists()
    run(0, "float16")
    run(1, "bfloat16")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert saved.model.layers[3].mlp.up_proj.weight[3, 5] == 70_144.0  # the nearest in bfloat16


@pytest.mark.parametrize("when", ["before training", "after training"])
def test_a_student_that_is_too_large_for_its_dtype_is_refused(
    when, tmp_path, text_file, capsys, monkeypatch
):
    """A weight overflows in the teacher already, or only once it has been trained."""
    teacher = tiny_model(tiny_config("gpt2", 4))
    folder = tmp_path / "teacher"
    byte_tokenizer().save_pretrained(folder)
    if when == "before training":
        teacher.transformer.wpe.weight.data[100, 5] = 70_000.0  # a position that no row has
    else:

        def train(trainer, **kwargs):
            trained(trainer, **kwargs)
            trainer.model.transformer.wpe.weight.data[100, 5] = 70_000.0

        trained = DistillationTrainer.train
        monkeypatch.setattr(DistillationTrainer, "train", train)
    teacher.save_pretrained(folder)
    words = {
        "teacher_model_name_or_path": folder,
        "save_directory": tmp_path / "student",
        "dataset": text_file,
        "max_length": 32,
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "save_dtype": "float16",
    }
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as ended:
        train_main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    expected = (
        "error: save_dtype=float16: transformer.wpe.weight has numbers beyond its range, use "
        "bfloat16 or float32"
    )
    checkpoint = tmp_path / "student" / "checkpoints" / "checkpoint-1"
    if when == "after training":
        expected += f"; --resume_from_checkpoint last continues from {checkpoint}"
    assert error == expected
    assert checkpoint.exists() == (when == "after training")
    assert not [*(tmp_path / "student").glob("*.*")]

"""A student for a variant of a teacher: weights on disk against sums of whole models."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_model, trained_student
from patching_models import SETTINGS, family_config
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from patching.architectures.models import auto_class
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.patch import build_intermediate_model
from patching.recipe import initial_student
from patching.student_config import StudentConfig
from train import delta
from train.weight_delta import main

LAYER_MAP = LayerMap((0, 2, 4, 5), 6)


def save(model: PreTrainedModel, folder: Path, template: str | None = None) -> Path:
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def changed(model: PreTrainedModel, size: float) -> PreTrainedModel:
    """A variant of a teacher, as after more training."""
    variant = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return variant


def family(folder: Path, config, size: float = 0.01) -> tuple[dict[str, Path], dict]:
    """Two teachers and a student of the first, on disk and in memory."""
    base = tiny_model(config)
    models = {
        "base": base,
        "chat": changed(base, size),
        "student": trained_student(base, LAYER_MAP),
    }
    folders = {
        name: save(model, folder / name, "chat" if name == "chat" else None)
        for name, model in models.items()
    }
    StudentConfig(LAYER_MAP).save(folders["student"])
    return folders, models


def words(folders: dict[str, Path], target: Path, *flags: str) -> list[str]:
    return [
        *("--student", str(folders["student"]), "--teacher_from", str(folders["base"])),
        *("--teacher_to", str(folders["chat"]), "--save_directory", str(target), *flags),
    ]


def check_is_the_sum(folders: dict[str, Path], models: dict, target: Path) -> None:
    main(words(folders, target))
    before, after = (
        assemble(initial_student(LAYER_MAP), teacher=models[name]).state_dict()
        for name in ("base", "chat")
    )
    trained = models["student"].state_dict()
    loader = auto_class(models["student"].config)
    found = loader.from_pretrained(target, dtype=torch.float32)
    assert found.state_dict().keys() == trained.keys()
    for name, tensor in found.state_dict().items():
        numbers = (part[name].double() for part in (after, trained, before))
        expected = next(numbers) + next(numbers) - next(numbers)
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=1e-6)
    assert not all(torch.equal(found.state_dict()[name], trained[name]) for name in trained)


@pytest.mark.parametrize("kind", ["qwen3-tied", "llama-untied", "gpt2"])
def test_a_new_student_is_a_sum_of_three_models(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(delta, "PIECE_NUMBERS", 1000)  # most tensors in several pieces
    folders, models = family(tmp_path, tiny_config(kind, 6))
    target = tmp_path / "new"
    check_is_the_sum(folders, models, target)
    assert json.loads((target / "student_config.json").read_text())["copied_teacher_layers"] == [
        *LAYER_MAP.kept
    ]
    record = json.loads((target / "weight_delta.json").read_text())
    assert [*record["cosine_by_layer"]] == ["0", "1"]
    assert (target / "chat_template.jinja").read_text() == "chat"
    assert "training | none" in (target / "README.md").read_text()
    # It is a student of the new teacher: the largest size is that teacher.
    largest, _ = build_intermediate_model(
        str(folders["chat"]), str(target), 2, False, torch.float32
    )
    for name, tensor in models["chat"].state_dict().items():
        assert torch.equal(largest.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SETTINGS])
def test_every_architecture_has_weight_deltas(tmp_path, kind):
    config = family_config(kind)
    if config.get_text_config().num_hidden_layers != LAYER_MAP.num_teacher_layers:
        config = family_config(kind, num_hidden_layers=LAYER_MAP.num_teacher_layers)
    folders, models = family(tmp_path, config)
    check_is_the_sum(folders, models, tmp_path / "new")


def test_the_same_teacher_twice_gives_the_same_student(tmp_path):
    folders, _ = family(tmp_path, tiny_config("qwen3-tied", 6), size=0.0)
    main(words(folders, tmp_path / "new"))
    trained, found = (
        load_file(folder / "model.safetensors") for folder in (folders["student"], tmp_path / "new")
    )
    assert trained.keys() == found.keys()
    for name, tensor in trained.items():
        assert torch.equal(found[name], tensor), name


def test_the_cosine_is_between_what_both_teachers_do_within_a_block(tmp_path, capsys):
    folders, models = family(tmp_path, tiny_config("llama-untied", 6), size=0.05)
    main(words(folders, tmp_path / "new", "--min_cosine", "0"))
    printed = capsys.readouterr().out

    @torch.no_grad()
    def difference(name: str, kept: int, other: int) -> torch.Tensor:
        layers = models[name].model.layers
        pairs = zip(layers[other].parameters(), layers[kept].parameters())
        return torch.cat([(a - b).flatten() for a, b in pairs]).double()

    cosines = {}
    for i, (kept, other) in enumerate(((0, 1), (2, 3))):
        one, two = (difference(name, kept, other) for name in ("base", "chat"))
        cosines[i] = float(torch.cosine_similarity(one, two, dim=0))
        assert f"{i:13}  {f'{kept}-{other}':>13}  {cosines[i]:.4f}" in printed
    assert f"{2:13}  {'4':>13}       -" in printed
    assert 0 < cosines[0] < 0.98
    record = json.loads((tmp_path / "new" / "weight_delta.json").read_text())["cosine_by_layer"]
    for i, cosine in cosines.items():
        assert record[str(i)] == pytest.approx(cosine, rel=1e-5)


def refused(command: list[str], capsys) -> str:
    capsys.readouterr()  # progress of saving
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_teachers_that_differ_too_much_are_refused(tmp_path, capsys):
    folders, _ = family(tmp_path, tiny_config("qwen3-tied", 6), size=0.3)
    target = tmp_path / "new"
    message = refused(words(folders, target), capsys)
    assert (
        "min_cosine=0.73: the teachers differ too much in the blocks of student layers 0" in message
    )
    assert not target.exists()
    main(words(folders, target, "--min_cosine", "-1"))
    assert (target / "config.json").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    folders, models = family(tmp_path, tiny_config("qwen3-tied", 6))
    target = tmp_path / "new"
    assert "min_cosine=2" in refused(words(folders, target, "--min_cosine", "2"), capsys)
    deeper = save(tiny_model(tiny_config("qwen3-tied", 7)), tmp_path / "deeper")
    message = refused(words(folders | {"chat": deeper}, target), capsys)
    assert "teacher_to=" in message and "it has 7 layers" in message
    other = save(tiny_model(tiny_config("llama-untied", 6)), tmp_path / "other")
    assert "give teachers of the student's architecture" in refused(
        words(folders | {"chat": other}, target), capsys
    )
    pickled = tmp_path / "pickled"
    save(models["base"], pickled)
    torch.save(models["base"].state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    message = refused(words(folders | {"base": pickled}, target), capsys)
    assert "teacher_from=" in message and "no safetensors files" in message
    assert not target.exists()


def test_numbers_too_large_for_the_students_dtype_leave_nothing_behind(tmp_path, capsys):
    folders, _ = family(tmp_path, tiny_config("qwen3-tied", 6))
    path = folders["student"] / "model.safetensors"
    stored = {name: tensor.half() for name, tensor in load_file(path).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name][0, 0] = 65504
    save_file(stored, path, {"format": "pt"})
    chat = load_file(folders["chat"] / "model.safetensors")
    chat[name][0, 0] += 100
    save_file(chat, folders["chat"] / "model.safetensors", {"format": "pt"})
    target = tmp_path / "new"
    assert "numbers beyond its range" in refused(
        words(folders, target, "--min_cosine", "-1"), capsys
    )
    assert not target.exists()
    assert not [*tmp_path.glob(".new*")]

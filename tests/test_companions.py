"""The files next to a saved model's weights: the teacher's own, with what the recipe changes."""

import hashlib
import json
import shutil
from difflib import ndiff
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, run_module
from patching_models import LAYER_MAP, family_config, family_pair, save_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from patching.architectures.older_spellings import older_rotary_fields
from patching.assemble import assemble
from patching.checkpoints.companions import plan_companions
from patching.checkpoints.save import plan_save
from patching.checkpoints.saved_config import changed, saved_config
from patching.checkpoints.splice import OtherLayout
from patching.family import Family
from patching.patch import main
from patching.recipe import Reference
from train.student import new_student, save_student, student_companions

PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 255,
    "eos_token_id": 256,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "a_field_nobody_knows": {"of": ["another", "tool"]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 257,
}
"""The config.json of a published Qwen3, as transformers 4 wrote it, of a tiny size."""

TOKENIZER = {
    "added_tokens.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "#version: 0.2\n",
    "spiece.model": "\x0a\x0e SentencePiece",
    "special_tokens_map.json": '{"eos_token": "<eos>"}',
    "tokenizer.model": "\x0a\x0e SentencePiece",
    "tokenizer_config.json": '{"padding_side": "right", "eos_token":   "<eos>", '
    '"tokenizer_class": "PreTrainedTokenizerFast"}',
    "vocab.json": '{"a": 0}',
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[str, str]:
    """A pair whose teacher has the files of a published model."""
    folder = tmp_path_factory.mktemp("published")
    names = save_models(folder, *family_pair("qwen3", tied=True, rope_theta=1e6))
    teacher = Path(names[0])
    (teacher / "config.json").write_text(json.dumps(PUBLISHED, indent=2))
    (teacher / "additional_chat_templates").mkdir()
    for name, text in TOKENIZER.items():
        (teacher / name).write_text(text)
    (teacher / "training_args.bin").write_text("no file of a tokenizer")
    return names


def run_main(names: tuple[str, str], folder: Path, *more: str) -> None:
    main(
        [
            *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
            *("--num_layers_to_patch", "1", "--save_directory", str(folder)),
            *more,
        ]
    )


def read(folder: Path | str, name: str = "config.json") -> dict[str, Any]:
    return json.loads(Path(folder, name).read_text())


def as_if_loaded(monkeypatch) -> None:
    """Make the next save go through memory."""

    def other_layout(*_):
        raise OtherLayout("as if it were")

    monkeypatch.setattr("patching.checkpoints.save.plan_splice", other_layout)


@pytest.mark.parametrize("way", ["copied", "loaded"])
def test_config_json_is_the_teachers_with_what_the_recipe_changes(
    way, published, tmp_path, monkeypatch
):
    if way == "loaded":
        as_if_loaded(monkeypatch)
    run_main(published, tmp_path / "k1")
    made = read(tmp_path / "k1")
    assert list(made) == list(PUBLISHED)  # the same fields in the same sequence
    differing = {name: value for name, value in made.items() if value != PUBLISHED[name]}
    assert differing == {"num_hidden_layers": 5, "tie_word_embeddings": False}
    run_main(published, tmp_path / "half", "--dtype", "bfloat16")
    assert read(tmp_path / "half") == made | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("way", ["copied", "loaded"])
def test_tokenizer_files_are_the_teachers_byte_for_byte(way, published, tmp_path, monkeypatch):
    if way == "loaded":
        as_if_loaded(monkeypatch)
    run_main(published, tmp_path / "k1")
    for name in (*TOKENIZER, "tokenizer.json"):
        assert (tmp_path / "k1" / name).read_bytes() == Path(published[0], name).read_bytes(), name
    assert not (tmp_path / "k1" / "training_args.bin").exists()


def test_a_trained_student_has_the_teachers_files(published, tmp_path):
    """tests/test_train.py has the command line."""
    teacher = AutoModelForCausalLM.from_pretrained(published[0])
    student = new_student(teacher, LAYER_MAP)
    reference, config = Reference(published[0]), AutoConfig.from_pretrained(published[0])
    tokenizer = AutoTokenizer.from_pretrained(published[0])
    tokenizer.padding_side = "left"
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save_student(student, student.state_dict(), folder, dtype)
        student_companions(reference, config, LAYER_MAP, dtype, tokenizer).write(folder)
        made = read(folder)
        assert list(made) == list(PUBLISHED)
        differing = {name: value for name, value in made.items() if value != PUBLISHED[name]}
        dtype_name = str(dtype).removeprefix("torch.")
        assert differing.pop("torch_dtype", "float32") == dtype_name
        assert differing == {"num_hidden_layers": 4}
        for name in (*TOKENIZER, "tokenizer.json", "generation_config.json"):
            assert (folder / name).read_bytes() == Path(published[0], name).read_bytes(), name
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def sha256sums(folder: Path | str) -> dict[str, str]:
    names = (*TOKENIZER, "tokenizer.json")
    return {name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names}


def config_diff(one: Path | str, other: Path | str) -> list[str]:
    """The lines that `diff` prints of two config.json."""
    texts = [Path(folder, "config.json").read_text().splitlines() for folder in (one, other)]
    return [line for line in ndiff(*texts) if line[0] in "+-"]


@pytest.mark.slow
def test_the_commands_keep_the_teachers_files(published, text_file, tmp_path):
    """The whole way from a teacher to the sizes of its family, each command in its own process."""
    teacher, student, family = published[0], tmp_path / "student", tmp_path / "family"
    done = run_module(
        *("train.train", "--teacher_model_name_or_path", teacher, "--save_directory", student),
        *("--dataset", text_file, "--max_length", "32", "--max_steps", "1"),
        *("--gradient_accumulation_steps", "1", "--save_strategy", "no"),
    )
    assert done.returncode == 0, done.stderr
    done = run_module(
        *("patching.patch", "--teacher_model_name_or_path", teacher),
        *("--student_model_name_or_path", student),
        *("--num_layers_to_patch", "all", "--save_directory", family),
    )
    assert done.returncode == 0, done.stderr
    four_layers = ['-   "num_hidden_layers": 6,', '+   "num_hidden_layers": 4,']
    five_layers = [line.replace("4", "5") for line in four_layers]
    untied = ['-   "tie_word_embeddings": true,', '+   "tie_word_embeddings": false,']
    expected = {
        student: four_layers,
        family / "k0": four_layers,
        family / "k1": [*five_layers, *untied],
        family / "k2": [],
    }
    assert {folder: config_diff(teacher, folder) for folder in expected} == expected
    for folder in expected:
        assert sha256sums(folder) == sha256sums(teacher), folder


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.5, 3.0, 4.5]}


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
        ),
        (
            "stablelm",
            {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 5e3, **LONG},
            },
            {
                "rope_theta": 5e3,
                "partial_rotary_factor": 1.0,
                "rope_scaling": {"type": "longrope", **LONG},
            },
        ),
        ("qwen3_moe", {}, {"rope_theta": 1e4, "num_experts": 4}),
        ("gpt2", {}, {"n_ctx": 64}),
    ],
)
def test_older_readers_find_their_spellings(model_type, settings, expected, tmp_path):
    config = family_config(model_type, **settings)
    teacher, student = family_pair(model_type, **settings)
    names = save_models(tmp_path, teacher, student)
    run_main(names, tmp_path / "k1")
    stored, made = read(names[0]), read(tmp_path / "k1")
    new = {name: value for name, value in made.items() if name not in stored}
    assert new == expected | {"torch_dtype": "float32"}
    read_back = AutoConfig.from_pretrained(tmp_path / "k1")
    depth = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    assert changed(made, config) >= {depth}
    assert read_back.to_dict().get("rope_parameters") is None or (
        {**read_back.rope_parameters, "type": None} == {**config.rope_parameters, "type": None}
    )


def test_settings_without_an_older_form_are_left_alone():
    by_kind = {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}
    assert older_rotary_fields("some_new_architecture", by_kind) == {}
    assert older_rotary_fields("bert", None) == {}


@pytest.mark.parametrize("empty", [{}, {"layer_types": None}])
def test_a_list_that_follows_from_other_fields_is_not_added(empty):
    """A published Gemma 2 has no layer_types; a member whose layers alternate needs none."""
    kinds = ["sliding_attention", "full_attention"]
    config = family_config("gemma2", layer_types=kinds * 3)
    stored = json.loads(config.to_json_string())
    del stored["layer_types"]
    stored |= empty
    shorter = family_config("gemma2", num_hidden_layers=4, layer_types=kinds * 2)
    model_class = type(AutoModelForCausalLM.from_config(shorter))
    made = saved_config(stored, shorter, model_class, torch.float32)
    assert {**made, **empty} == made and made.get("layer_types") is None
    other = family_config("gemma2", num_hidden_layers=4, layer_types=[*kinds, kinds[0], kinds[0]])
    made = saved_config(stored, other, model_class, torch.float32)
    assert made["layer_types"] == other.layer_types


def test_models_in_memory_are_written_as_published(tmp_path):
    teacher, student = family_pair("llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    for model in (teacher, student):
        model.config._name_or_path = model.name_or_path = ""
    family = Family.from_pretrained(teacher, student, kept_layers=LAYER_MAP.kept)
    layers = family.patched_layers(1)
    with pytest.raises(ValueError, match="give its tokenizer too"):
        plan_save(family, layers, tmp_path / "out")
    plan = plan_save(family, layers, tmp_path / "out", tokenizer=byte_tokenizer())
    plan.save(tmp_path / "out", "title", {})
    made = read(tmp_path / "out")
    assert (made["rope_theta"], made["rope_scaling"]) == (5e5, LLAMA3)
    assert made["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in made
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(9)[None]
    assert torch.equal(saved(tokens).logits, family.model(1)(tokens).logits)


def test_a_model_from_a_folder_without_config_json(tmp_path):
    """As of a GGUF file: the folder has a tokenizer at most."""
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    names = save_models(tmp_path, *family_pair("qwen3", rope_parameters=rotary))
    parents = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        Path(names[0], file).unlink()
    family = Family.from_pretrained(*parents, kept_layers=LAYER_MAP.kept)
    plan = plan_save(family, family.patched_layers(1), tmp_path / "out")
    assert plan.reason_to_load == "the student is a model in memory"
    plan.save(tmp_path / "out", "title", {})
    assert read(tmp_path / "out")["rope_theta"] == 1e6
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == Path(names[0], name).read_bytes()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(9)[None]
    assert torch.equal(saved(tokens).logits, family.model(1)(tokens).logits)


def test_a_model_changed_in_memory_is_not_written_as_its_file_says(published, tmp_path):
    teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in published)
    rotary = {"rope_type": "default", "rope_theta": 7.0}
    for model in (teacher, student):
        model.config.rope_parameters = dict(rotary)
    family = Family.from_pretrained(teacher, student, kept_layers=LAYER_MAP.kept)
    config = family.config(family.recipe(1))
    made = plan_companions(family.parents, config, type(teacher), family.dtype).config
    assert (made["rope_parameters"], made["rope_theta"]) == (rotary, 7.0)
    assert "rope_scaling" not in made
    assert made["a_field_nobody_knows"] == PUBLISHED["a_field_nobody_knows"]


GENERATION = {
    "do_sample": True,
    "eos_token_id": [255, 256],
    "temperature": 0.6,
    "transformers_version": "4.51.0",
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "order"), [("copied", "last"), ("loaded", "first")])
def test_generation_settings_are_the_teachers(way, order, published, tmp_path, monkeypatch):
    if way == "loaded":
        as_if_loaded(monkeypatch)
    names = tuple(str(shutil.copytree(name, tmp_path / Path(name).name)) for name in published)
    settings = [Path(name, "generation_config.json") for name in names]
    settings[0].write_text(json.dumps(GENERATION))
    settings[1].unlink()
    run_main(names, tmp_path / "k1", "--order", order)
    assert read(tmp_path / "k1", "generation_config.json") == GENERATION
    for k in range(3):
        in_memory = Family.from_pretrained(*names, order).model(k).generation_config
        assert in_memory.eos_token_id == [255, 256], k
    family = Family.from_pretrained(*names, order)
    parents = family.parents.load(["teacher", "student"])
    assert assemble(family.recipe(1), **parents).generation_config.eos_token_id == [255, 256]
    student = {"eos_token_id": 3, "top_p": 0.5, "transformers_version": "5.0.0"}
    settings[1].write_text(json.dumps(student))
    run_main(names, tmp_path / "filled", "--order", order)
    made = read(tmp_path / "filled", "generation_config.json")
    assert made == GENERATION | {"top_p": 0.5}
    GenerationConfig.from_pretrained(tmp_path / "filled")
    settings[0].unlink()
    run_main(names, tmp_path / "from config", "--order", order)
    made = read(tmp_path / "from config", "generation_config.json")
    assert (made["eos_token_id"], made["top_p"]) == (256, 0.5)  # config.json says 256
    settings[1].unlink()
    run_main(names, tmp_path / "none", "--order", order)
    assert not (tmp_path / "none" / "generation_config.json").exists()

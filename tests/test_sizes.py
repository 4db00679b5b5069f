"""Naming a size, and what each size costs, against built models and counted operations."""

import json
from pathlib import Path

import pytest
import torch
from patching_models import ENCODERS, LAYER_MAP, SETTINGS, family_config, family_pair, save_models
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from patching.architectures.config import config_for
from patching.assemble import assemble, count_parameters
from patching.blocks import LayerMap, default_kept_layers
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import size_of
from patching.cli.command_line import CommandLineParser
from patching.cli.units import bytes_text, count_text, parse_bytes, parse_count
from patching.family import Family
from patching.patch import PatchArguments, main
from patching.recipe import initial_student, intermediate_model

QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "head_dim": 128,
}
PUBLISHED: dict[str, tuple[PreTrainedConfig, tuple[int, int, int], int]] = {
    "Qwen3-4B": (
        Qwen3Config(**QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
        (2, 1, 2),
        17,
    ),
    "Qwen3-8B": (Qwen3Config(**QWEN3, hidden_size=4096, intermediate_size=12288), (2, 1, 2), 17),
    "pythia-2.8b": (
        GPTNeoXConfig(
            num_hidden_layers=32,
            hidden_size=2560,
            intermediate_size=10240,
            num_attention_heads=32,
            vocab_size=50304,
        ),
        (2, 1, 2),
        15,
    ),
    "pythia-6.9b": (
        GPTNeoXConfig(
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=16384,
            num_attention_heads=32,
            vocab_size=50432,
        ),
        (2, 1, 2),
        15,
    ),
    "Llama-3.2-3B": (
        LlamaConfig(
            num_hidden_layers=28,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        (2, 2, 1),
        13,
    ),
}


def published_pair(name: str, folder: Path) -> tuple[str, str]:
    """Configs of a published pair and its two-key student_config.json; no weights."""
    teacher, numbers, _ = PUBLISHED[name]
    teacher.dtype = "bfloat16"
    num_layers = teacher.num_hidden_layers
    kept = default_kept_layers(num_layers, *numbers)
    student = config_for(initial_student(LayerMap(kept, num_layers)), {"teacher": teacher})
    for parent, config in (("teacher", teacher), ("student", student)):
        config.save_pretrained(folder / parent)
    lists = {
        "pruned_teacher_layers": sorted(set(range(num_layers)) - set(kept)),
        "copied_teacher_layers": list(kept),
    }
    (folder / "student" / "student_config.json").write_text(json.dumps(lists))
    return str(folder / "teacher"), str(folder / "student")


def flags(names: tuple[str, str], *more: object) -> list[str]:
    base = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]]
    return [*base, *map(str, more)]


def listed(capsys, names: tuple[str, str], *more: str) -> dict:
    main(flags(names, "--list", "--json", *more))
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families_are_listed_from_configs_alone(name, tmp_path, capsys):
    names = published_pair(name, tmp_path)
    family = listed(capsys, names)
    pair = Family.from_pretrained(*names)
    k_max = PUBLISHED[name][2]
    members = family["members"]
    assert [member["num_layers_to_patch"] for member in members] == list(range(k_max + 1))
    assert family["order"] == ("first" if "Llama" in name else "last")
    for member in members:
        config = pair.config(pair.recipe(member["num_layers_to_patch"]))
        assert member["depth"] == config.num_hidden_layers
        assert member["parameters"] == count_parameters(config)._asdict()
        headers = member["bytes_on_disk"] - 2 * member["parameters"]["stored"]
        assert 0 < headers < 100_000
    if name == "Qwen3-4B":
        stored = [round(member["parameters"]["stored"] / 1e9, 2) for member in members]
        assert (stored[0], *stored[-2:]) == (2.31, 4.31, 4.02)
    main(flags(names, "--list"))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == k_max + 2
    assert table[-1].split()[:2] == [str(k_max), str(members[-1]["depth"])]


@pytest.mark.parametrize(
    ("name", "k_max"), [("Qwen3-4B", 17), ("pythia-2.8b", 15), ("Llama-3.2-3B", 13)]
)
def test_sizes_outside_the_published_range_are_refused(name, k_max, tmp_path, capsys):
    names = published_pair(name, tmp_path)
    for k in (-1, k_max + 1):
        with pytest.raises(SystemExit) as ended:
            main(flags(names, "--num_layers_to_patch", k, "--save_directory", tmp_path / "out"))
        assert ended.value.code == 2
        assert capsys.readouterr().err == (
            f"error: num_layers_to_patch={k}: this student has {k_max} patchable layers, "
            f"choose 0-{k_max}\n"
        )


def choose(names: tuple[str, str], *naming: str) -> int:
    """k of the member that a limit names, from configs alone."""
    parser = CommandLineParser(PatchArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        flags(names, *naming, "--save_directory", "x")
    )
    family = arguments.open_family(dtype=arguments.dtype)
    (layers,) = arguments.members(family, 5 * 10**9).values()
    return family.layer_map.num_patched(layers)


@pytest.mark.parametrize(
    ("naming", "k"),
    [
        (("--target_params", "3.09B"), 3),
        (("--target_params", "3.1B"), 4),
        (("--target_params", "3.2B"), 4),
        (("--target_params", "4.02B"), 13),  # the teacher has 4.02 B, and a little more
        (("--target_params", "4.03B"), 17),  # the teacher fits, k = 14, 15 and 16 do not
        (("--target_params", "2.4B"), 0),
        (("--target_bytes", "5.99GB"), 2),
        (("--target_bytes", "6GB"), 3),
        (("--target_bytes", "6GiB"), 5),
        (("--target_bytes", "8.1GB"), 17),
        (("--target_bytes", "6GB", "--dtype", "float32"), None),
        (("--target_params", "1B"), None),
        # 147,456 bytes of cache per token and 36 layers, in bf16.
        (("--target_memory", "6GB", "--context", "1"), 3),
        (("--target_memory", "6GB", "--context", "8192"), 0),
        (("--target_memory", "6GB", "--context", "2048", "--batch", "4"), 0),
        (("--target_memory", "7GB", "--context", "8192"), 4),
        (("--target_memory", "6GB", "--context", "8192", "--batch", "8"), None),
        (("--target_active_params", "3.1B"), 4),
    ],
)
def test_the_deepest_member_that_fits_is_found_among_all(naming, k, tmp_path):
    names = published_pair("Qwen3-4B", tmp_path)
    if k is None:
        with pytest.raises(ValueError, match=rf"{naming[0][2:]}=[\d,]+: no member .* smallest"):
            choose(names, *naming)
    else:
        assert choose(names, *naming) == k


def test_memory_is_listed_if_a_context_is_given(tmp_path, capsys):
    names = published_pair("Qwen3-4B", tmp_path)
    family = listed(capsys, names, "--context", "8192", "--batch", "2")
    assert (family["context"], family["batch"]) == (8192, 2)
    pair = Family.from_pretrained(*names)
    for member, size in zip(family["members"], pair.sizes()):
        cache = 8192 * 2 * member["depth"] * 2 * 8 * 128 * 2
        assert member["memory_bytes"] == 2 * member["parameters"]["stored"] + cache
        assert member["memory_bytes"] == size.memory_bytes(8192, batch=2)
    main(flags(names, "--list", "--context", "8192", "--batch", "2"))
    lines = capsys.readouterr().out.splitlines()
    assert "memory" in lines[0] and "active" not in lines[0]
    limit = family["members"][6]["memory_bytes"]
    recipe = pair.recipe(target_memory=limit, context=8192, batch=2)
    assert recipe == pair.recipe(6) != pair.recipe(target_memory=limit - 1, context=8192, batch=2)
    with pytest.raises(ValueError, match="target_memory needs context"):
        pair.recipe(target_memory=limit)
    with pytest.raises(ValueError, match="context belongs to target_memory"):
        pair.recipe(3, context=10)
    with pytest.raises(TypeError, match="target_memmory does not name a size"):
        pair.recipe(target_memmory=limit)


def test_active_parameters_are_listed_for_experts(tmp_path, capsys):
    names = save_models(tmp_path, *family_pair("qwen3_moe"))
    main(flags(names, "--list"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["k", "layers", "parameters", "stored", "active"]
    members = listed(capsys, names)["members"]
    for member in members:
        assert 0 < member["active_parameters"] < member["parameters"]["stored"]
    limit = str(members[1]["active_parameters"])
    assert choose(names, "--target_active_params", limit) == 1
    assert choose(names, "--target_params", limit) == 0


@torch.no_grad()
@pytest.mark.parametrize("model_type", SETTINGS)
def test_sizes_are_those_of_the_built_model(model_type, tmp_path):
    teacher, student = family_pair(model_type, tied=True)
    configs = {"teacher": teacher.config, "student": student.config}
    layouts = {parent: layout_of(config, torch.float32) for parent, config in configs.items()}
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        recipe = intermediate_model(LAYER_MAP, k, "last")
        size = size_of(recipe, layouts, 10**9)
        model = assemble(recipe, teacher=teacher, student=student)
        assert size.parameters == count_parameters(model.config)
        assert size.parameters.stored == sum(p.numel() for p in model.parameters())
        if model_type in ENCODERS:
            assert size.kv_cache_bytes_per_token == 0
            continue
        # Three tokens are fewer than any window, so every cache holds them all.
        cache = model(torch.arange(3)[None], use_cache=True).past_key_values
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert size.kv_cache_bytes_per_token == cached / 3


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", [name for name in SETTINGS if name not in ("mixtral", "qwen3_moe")]
)
def test_operations_are_those_that_are_counted(model_type):
    teacher, student = family_pair(model_type)
    configs = {"teacher": teacher.config, "student": student.config}
    layouts = {parent: layout_of(config, torch.float32) for parent, config in configs.items()}
    recipe = intermediate_model(LAYER_MAP, 1, "last")
    size = size_of(recipe, layouts, 10**9)
    model = assemble(recipe, teacher=teacher, student=student)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.arange(1)[None], use_cache=False)
    by_operation = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    products = sum(v for k, v in by_operation.items() if "mm" in k and "bmm" not in k)
    assert size.flops_per_token == products


def test_experts_that_are_not_asked_cost_no_operations():
    config = family_config("mixtral")
    recipe = initial_student(LAYER_MAP)
    sizes = []
    for asked in (1, 2):
        config.num_experts_per_tok = asked
        layouts = {"teacher": layout_of(config, torch.float32)}
        sizes.append(size_of(recipe, layouts, 10**9))
    expert = 3 * config.hidden_size * config.intermediate_size
    assert sizes[1].flops_per_token - sizes[0].flops_per_token == 4 * 2 * expert
    assert sizes[0].parameters == sizes[1].parameters


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("6GB", 6 * 10**9), ("6GiB", 6 * 2**30), ("1.5kb", 1500), ("123", 123), (" 2 MiB ", 2**21)],
)
def test_bytes_by_name(text, num_bytes):
    assert parse_bytes(text, "x") == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0GB", "1iB", "6 PB", "1e9", "nan"])
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match=f"x={text}: write a size"):
        parse_bytes(text, "x")


def test_counts_by_name():
    assert [parse_count(text, "x") for text in ("3.1B", "350m", "7", "2K")] == [
        3_100_000_000,
        350_000_000,
        7,
        2000,
    ]
    assert parse_count("4.02B", "x") == 4_020_000_000  # as a float it is 4,019,999,999
    assert parse_bytes("4.02GB", "x") == 4_020_000_000
    for text in ("", "B", "0B", "3GB", "-1"):
        with pytest.raises(ValueError, match=f"x={text}: write a number of parameters"):
            parse_count(text, "x")


def test_numbers_for_people():
    assert count_text(4_022_468_096) == "4.02 B"
    assert (count_text(135_270_000), count_text(12)) == ("135.27 M", "12")
    assert (bytes_text(8_044_936_192), bytes_text(77_824)) == ("8.04 GB", "77.82 KB")
    assert (bytes_text(12), bytes_text(None), count_text(None)) == ("12 B", "unknown", "unknown")

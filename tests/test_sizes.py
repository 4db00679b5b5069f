"""Naming a size, and what each size costs, against built models and counted operations."""

import json
from pathlib import Path

import pytest
import torch
from patching_models import ENCODERS, LAYER_MAP, SETTINGS, family_config, family_pair, save_models
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from patching.architectures.config import config_for
from patching.arguments import FamilyArguments
from patching.assemble import assemble, count_parameters
from patching.blocks import LayerMap, default_kept_layers
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import size_of
from patching.cli.units import bytes_text, count_text, parse_bytes, parse_count
from patching.family import Family
from patching.patch import PatchArguments, build_intermediate_model, iter_family, main
from patching.patch_order import parse_order
from patching.recipe import initial_student, intermediate_model, patched_model
from patching.student_config import StudentConfig, read_student_config

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families_are_listed_from_configs_alone(name, tmp_path, capsys):
    names = published_pair(name, tmp_path)
    family = listed(capsys, names)
    pair = Family.from_pretrained(FamilyArguments(*names))
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
    from patching import patch
    from patching.command_line import CommandLineParser

    parser = CommandLineParser(PatchArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        flags(names, *naming, "--save_directory", "x")
    )
    pair = Family.from_pretrained(arguments)
    dtype = pair.dtype(arguments.dtype)
    layouts = {parent: layout_of(config, dtype) for parent, config in pair.configs.items()}
    return patch.choose(arguments, pair, layouts, dtype, 5 * 10**9).num_layers_to_patch


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
    ],
)
def test_the_deepest_member_that_fits_is_found_among_all(naming, k, tmp_path):
    names = published_pair("Qwen3-4B", tmp_path)
    if k is None:
        with pytest.raises(
            ValueError, match=rf"{naming[0][2:]}={naming[1]}: no member .* smallest"
        ):
            choose(names, *naming)
    else:
        assert choose(names, *naming) == k


@torch.no_grad()
@pytest.mark.parametrize("model_type", SETTINGS)
def test_sizes_are_those_of_the_built_model(model_type, tmp_path):
    teacher, student = family_pair(model_type, tied=True)
    configs = {"teacher": teacher.config, "student": student.config}
    layouts = {parent: layout_of(config, torch.float32) for parent, config in configs.items()}
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        recipe = intermediate_model(LAYER_MAP, k, "last")
        size = size_of(recipe, layouts, torch.float32, 10**9)
        model = assemble(recipe, teacher=teacher, student=student)
        assert size.parameters == count_parameters(model.config)
        assert size.parameters.stored == sum(p.numel() for p in model.parameters())
        if model_type in ENCODERS:
            assert size.kv_cache_bytes_per_token is None
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
    size = size_of(recipe, layouts, torch.float32, 10**9)
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
        sizes.append(size_of(recipe, layouts, torch.float32, 10**9))
    expert = 3 * config.hidden_size * config.intermediate_size
    assert sizes[1].flops_per_token - sizes[0].flops_per_token == 4 * 2 * expert
    assert sizes[0].parameters == sizes[1].parameters


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


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
        (("--num_layers_to_patch", 1, "--public"), "--public belongs to --push_to_hub"),
        (("--target_params", "x"), "target_params=x: write a number of parameters such as"),
        (("--target_bytes", "3B3"), "target_bytes=3B3: write a size such as 500MB"),
        (
            ("--target_bytes", "1KB"),
            "target_bytes=1KB: no member of this family fits, the smallest",
        ),
        (("--patched_layers", "1,x"), "patched_layers=1,x: write numbers and ranges"),
        (("--patched_layers", "2-4"), "patched_layers=2,3,4: this student has layers 0-3, not 4"),
        (
            ("--num_layers_to_patch", 1, "--max_shard_size", "big"),
            "max_shard_size=big: write a size",
        ),
        (
            ("--num_layers_to_patch", 1, "--order", "nowhere.json"),
            "--order nowhere.json: choose last",
        ),
    ],
)
def test_one_way_of_naming_and_one_line_of_error(folders, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main(
            flags(
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


def test_a_size_without_a_folder_is_refused(folders, capsys):
    with pytest.raises(SystemExit):
        main(flags(folders, "--num_layers_to_patch", 1))
    assert "--save_directory says where the model goes" in capsys.readouterr().err


@pytest.mark.parametrize("as_object", [False, True])
def test_an_order_from_a_file(folders, tmp_path, capsys, as_object):
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"order": [2, 0], "kl": [1.0]} if as_object else [2, 0]))
    members = listed(capsys, folders, "--order", str(path))["members"]
    assert [member["patched_layers"] for member in members] == [[], [2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0]", "order 0: it leaves out the patchable layers 2"),
        ("[0, 2, 0]", "order 0,2,0: it names a layer twice"),
        ("[0, 2, 7]", "order 0,2,7: the student has layers 0-3, not 7"),
        ('{"layers": [0]}', "choose last or first, or write a list of student layers"),
        ('[0, "2"]', "choose last or first, or write a list of student layers"),
        ("[0", "the file is not JSON"),
    ],
)
def test_bad_orders_are_refused(folders, tmp_path, capsys, text, message):
    (tmp_path / "order.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, "--list", "--order", tmp_path / "order.json"))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_order_by_hand():
    layer_map = LayerMap((0, 2, 4, 5), 8)  # blocks 0-1, 2-3, 4, 5-7; patchable 0, 1, 3
    sizes = [sorted(layer_map.patched_layers(k, (1, 2, 3, 0))) for k in range(4)]
    assert sizes == [[], [1], [1, 2, 3], [0, 1, 2, 3]]
    assert layer_map.sequence("last") == (3, 2, 1, 0)
    assert layer_map.sequence((3, 1, 0)) == (3, 1, 0, 2)
    assert parse_order("first") == "first"


def test_an_order_recorded_beside_the_student(tmp_path):
    StudentConfig(LAYER_MAP, (2, 0)).save(tmp_path)
    assert read_student_config(str(tmp_path)).patch_order == (2, 0)
    path = tmp_path / "student_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_order": [2]}))
    with pytest.raises(ValueError, match="it leaves out the patchable layers 0"):
        read_student_config(str(tmp_path))


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
    for text in ("", "B", "0B", "3GB", "-1"):
        with pytest.raises(ValueError, match=f"x={text}: write a number of parameters"):
            parse_count(text, "x")


def test_numbers_for_people():
    assert count_text(4_022_468_096) == "4.02 B"
    assert (count_text(135_270_000), count_text(12)) == ("135.27 M", "12")
    assert (bytes_text(8_044_936_192), bytes_text(77_824)) == ("8.04 GB", "77.82 KB")
    assert (bytes_text(12), bytes_text(None)) == ("12 B", "-")


@torch.no_grad()
def test_models_in_memory_share_their_tensors():
    teacher, student = family_pair("qwen3", tied=True)
    config = StudentConfig(LAYER_MAP)
    tokenizer = object()
    model, same = build_intermediate_model(
        teacher, student, 1, False, student_config=config, tokenizer=tokenizer
    )
    assert same is tokenizer
    pointers = {p.data_ptr() for parent in (teacher, student) for p in parent.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= pointers
    expected = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    with pytest.raises(ValueError, match="load both models in one dtype"):
        build_intermediate_model(
            teacher, student.to(torch.float16), 1, student_config=config, tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match="does not say where it came from: give kept_layers"):
        build_intermediate_model(teacher, student, 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give its tokenizer too"):
        build_intermediate_model(teacher, student, 1, student_config=config)
    with pytest.raises(ValueError, match="both name an order"):
        build_intermediate_model(teacher, student, 1, True, order="last", student_config=config)


@torch.no_grad()
def test_a_loaded_model_knows_its_folder(folders):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folders[0])
    student = AutoModelForCausalLM.from_pretrained(folders[1])
    tokens = torch.arange(8)[None]
    by_name, _ = build_intermediate_model(*folders, 1)
    for parents in ((teacher, student), (teacher, folders[1]), (folders[0], student)):
        model, tokenizer = build_intermediate_model(*parents, 1)
        assert torch.equal(model(tokens).logits, by_name(tokens).logits)
        assert tokenizer.padding_side == "left"


@torch.no_grad()
def test_every_size_in_turn_over_one_copy_of_the_parents(folders, monkeypatch):
    loads = []
    load = Family.load
    monkeypatch.setattr(Family, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    members = iter_family(*folders, patch_first_k_layers=True)
    assert loads == []
    tokens = torch.arange(8)[None]
    seen = []
    pointers = set()
    for k, recipe, model in members:
        seen.append(k)
        assert recipe.depth == model.config.num_hidden_layers
        built, _ = build_intermediate_model(*folders, k, True)
        assert torch.equal(model(tokens).logits, built(tokens).logits)
        loads.pop()
        pointers |= {p.data_ptr() for p in model.parameters()}
    assert seen == [0, 1, 2]
    assert len(loads) == 1
    teacher, student = (
        Family.from_pretrained(FamilyArguments(*folders)).config(recipe)
        for recipe in (
            patched_model(LAYER_MAP, frozenset(range(4))),
            patched_model(LAYER_MAP, frozenset()),
        )
    )
    count = len(list(layout_of(teacher, torch.float32).tensors)) - 1
    count += len(list(layout_of(student, torch.float32).tensors)) - 1
    assert len(pointers) == count  # each parent's tensors once, head and embedding being one
    assert [k for k, *_ in iter_family(*folders, sizes=[2, 0])] == [2, 0]
    with pytest.raises(ValueError, match="num_layers_to_patch=3"):
        iter_family(*folders, sizes=[3])

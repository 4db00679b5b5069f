"""Spliced checkpoints against the in-memory model, tensor by tensor, and the files themselves."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patching_models import LAYER_MAP, SETTINGS, change_config, family_pair, save_models
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from patching.assemble import assemble
from patching.checkpoints import safetensors_files, splice
from patching.checkpoints.companions import plan_companions
from patching.checkpoints.layout import layout_of
from patching.checkpoints.safetensors_files import StoredTensor, copy_bytes, header_of, read_header
from patching.checkpoints.splice import OtherLayout, plan_splice
from patching.family import Family
from patching.parents import Parents
from patching.patch import main
from patching.recipe import Recipe, intermediate_model, patched_model

TOKENS = torch.arange(20)[None] * 7 % 257


def open_family(names: tuple[str, str], dtype: torch.dtype | str = "auto") -> Family:
    return Family.from_pretrained(*names, dtype=dtype)


def plan(family: Family, recipe: Recipe, dtype=torch.float32, max_shard_bytes=10**9):
    layouts = {parent: layout_of(config, dtype) for parent, config in family.configs.items()}
    references = family.parents.references
    return plan_splice(recipe, family.configs, layouts, references, dtype, max_shard_bytes)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's weights files, as an independent reader sees them."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_tensors(folder: Path, expected: Path) -> None:
    found, wanted = tensors_in(folder), tensors_in(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved_members(tmp_path_factory) -> list[Path]:
    """Folders saved by the tests below, each with the logits of the model in memory."""
    return []


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        # One of both in the fast tests, in turn.
        pytest.param(name, tied, marks=[] if tied == bool(i % 2) else pytest.mark.slow)
        for i, name in enumerate(SETTINGS)
        for tied in (False, True)
    ],
)
def test_a_splice_equals_the_model_in_memory(model_type, tied, tmp_path_factory, saved_members):
    folder = tmp_path_factory.mktemp("family")
    teacher, student = family_pair(model_type, tied)
    # Tied pairs come in many files and leave in one, untied ones the other way round.
    names = save_models(folder, teacher, student, max_shard_size="20KB" if tied else "5GB")
    family = open_family(names)
    assert len(list(Path(names[0]).glob("*.safetensors"))) > 1 or not tied
    for order in ("first", "last"):
        for k in range(LAYER_MAP.max_layers_to_patch + 1):
            recipe = intermediate_model(LAYER_MAP, k, order)
            model = assemble(recipe, teacher=teacher, student=student)
            ours, theirs = folder / f"{order}{k}", folder / f"{order}{k} in memory"
            ours.mkdir()
            splice_plan = plan(family, recipe, max_shard_bytes=10**9 if tied else 20_000)
            splice_plan.write(ours)
            companions = plan_companions(
                family.parents, splice_plan.config, splice_plan.model_class, torch.float32
            )
            companions.write(ours)
            model.save_pretrained(theirs)
            assert_same_tensors(ours, theirs)
            files = list(ours.glob("*.safetensors"))
            assert sum(path.stat().st_size for path in files) == splice_plan.num_bytes
            configs = [AutoConfig.from_pretrained(path).to_diff_dict() for path in (ours, theirs)]
            # These keep an older spelling that transformers does not read.
            if model_type == "phi3":
                configs[0].pop("partial_rotary_factor")
            if model_type == "gpt2":
                assert configs[0].pop("n_ctx") == configs[0]["n_positions"]
            assert configs[0] == configs[1]
            if tied:
                assert len(files) == 1
                continue
            index = json.loads((ours / "model.safetensors.index.json").read_text())
            for path in files:
                alone = len(load_file(path)) == 1
                assert path.stat().st_size <= 20_000 or alone
                assert {n for n, f in index["weight_map"].items() if f == path.name} == set(
                    load_file(path)
                )
    for member in ("first1", "last1"):
        theirs = {"tokens": TOKENS}
        recipe = intermediate_model(LAYER_MAP, 1, member.removesuffix("1"))
        theirs["logits"] = assemble(recipe, teacher=teacher, student=student)(TOKENS).logits
        torch.save(theirs, folder / member / "expected.pt")
        saved_members.append(folder / member)


FRESH_PROCESS = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), (folder, found)
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    tokens, logits = expected["tokens"], expected["logits"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits), folder
        model.tie_weights()
        assert torch.equal(model(tokens).logits, logits), folder + " tied again"
    if not model.can_generate():
        continue
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    cached, uncached = (model.generate(tokens, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, uncached), folder + " cached"
print(len(sys.argv) - 1, "the same")
"""


@pytest.mark.slow
def test_in_a_fresh_process_the_logits_are_those_of_the_model_in_memory(saved_members):
    """Of the members that the slow tests above saved, one pair of each family."""
    if not saved_members:
        pytest.skip("nothing was saved: run this file as a whole")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *saved_members], capture_output=True, text=True
    )
    assert done.stdout.strip().endswith(f"{len(saved_members)} the same"), done.stderr[-2000:]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> tuple[tuple[str, str], PreTrainedModel, PreTrainedModel]:
    """Folders of a tied pair, and both models."""
    teacher, student = family_pair("qwen3", tied=True)
    return save_models(tmp_path_factory.mktemp("qwen3"), teacher, student), teacher, student


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tensor_whose_dtype_changes_is_cast_piece_by_piece(dtype, qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(splice, "CAST_BYTES", 1000)  # most tensors in several pieces
    names, *_ = qwen3
    family = open_family(names, dtype)
    recipe = intermediate_model(LAYER_MAP, 1, "last")
    (tmp_path / "ours").mkdir()
    plan(family, recipe, dtype).write(tmp_path / "ours")
    assemble(recipe, **family.parents.load(recipe.parents)).save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_a_student_in_fp32_meets_a_teacher_in_bf16(tmp_path):
    teacher, student = family_pair("llama")
    names = save_models(tmp_path, teacher.to(torch.bfloat16), student)
    family = open_family(names)
    assert family.dtype == torch.bfloat16
    recipe = intermediate_model(LAYER_MAP, 1, "first")
    (tmp_path / "ours").mkdir()
    plan(family, recipe, torch.bfloat16).write(tmp_path / "ours")
    parents = family.parents.load(recipe.parents)
    assemble(recipe, **parents).save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def rewrite(folder: str, change) -> None:
    """Replace a folder's tensors by what `change` returns for them."""
    path = Path(folder, "model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def same_as_in_memory(folder: Path, names: tuple[str, str], order: str = "last") -> None:
    family = open_family(names, torch.float32)
    recipe = intermediate_model(LAYER_MAP, 1, order)
    (folder / "ours").mkdir()
    plan(family, recipe).write(folder / "ours")
    assemble(recipe, **family.parents.load(recipe.parents)).save_pretrained(folder / "theirs")
    assert_same_tensors(folder / "ours", folder / "theirs")


def test_old_gpt2_files_without_prefix_and_with_masks(tmp_path):
    names = save_models(tmp_path, *family_pair("gpt2", tied=True))

    def as_published(tensors):
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        return tensors | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(6)}

    rewrite(names[0], as_published)
    same_as_in_memory(tmp_path, names)


def test_gpt_neox_files_with_masks_and_frequencies(tmp_path):
    names = save_models(tmp_path, *family_pair("gpt_neox"))
    assert "embed_out.weight" in load_file(Path(names[0], "model.safetensors"))
    prefix = "gpt_neox.layers.0.attention"
    extra = {"masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(4)}
    rewrite(names[0], lambda t: t | {f"{prefix}.{name}": value for name, value in extra.items()})
    same_as_in_memory(tmp_path, names)


@pytest.mark.parametrize("stored", ["head alone", "both the same"])
def test_tied_files_that_hold_the_head(stored, tmp_path):
    names = save_models(tmp_path, *family_pair("llama", tied=True))

    def with_head(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        if stored == "head alone":
            del tensors["model.embed_tokens.weight"]
        return tensors | {"lm_head.weight": head}

    for name in names:
        rewrite(name, with_head)
    same_as_in_memory(tmp_path, names, "first")


def test_a_tied_config_over_two_different_matrices_is_refused(tmp_path):
    names = save_models(tmp_path, *family_pair("llama", tied=True))
    rewrite(names[1], lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"ties the head to the embedding.*tie_word_embeddings"):
        plan(open_family(names), intermediate_model(LAYER_MAP, 1, "last"))


def run_main(names, folder, *more: str) -> None:
    main(
        [
            *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
            *("--num_layers_to_patch", "1", "--save_directory", str(folder)),
            *more,
        ]
    )


def copied_file_to_file(folder: Path) -> bool:
    return json.loads((folder / "provenance.json").read_text())["copied_file_to_file"]


@torch.no_grad()
def test_other_layouts_go_through_memory(tmp_path, capsys):
    teacher, student = family_pair("qwen3_moe")
    names = save_models(tmp_path, teacher, student)
    teacher.save_pretrained(names[0], save_original_format=False)  # experts joined, as in memory
    assert any("gate_up_proj" in key for key in load_file(Path(names[0], "model.safetensors")))
    with pytest.raises(OtherLayout, match=r"the teacher stores .* in another layout"):
        plan(open_family(names), intermediate_model(LAYER_MAP, 1, "last"))
    run_main(names, tmp_path / "out")
    assert "in another layout: the models are loaded instead" in capsys.readouterr().out
    assert not copied_file_to_file(tmp_path / "out")
    expected = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(saved(TOKENS).logits, expected(TOKENS).logits)


def as_pickle(folder: str, extra: object = None) -> None:
    path = Path(folder, "model.safetensors")
    torch.save(
        load_file(path) | ({"extra": extra} if extra else {}), path.with_name("pytorch_model.bin")
    )
    path.unlink()


@torch.no_grad()
def test_pickled_weights_go_through_memory(tmp_path, capsys):
    teacher, student = family_pair("llama")
    names = save_models(tmp_path, teacher, student)
    as_pickle(names[1])
    run_main(names, tmp_path / "out")
    assert "the student has no safetensors files" in capsys.readouterr().out
    expected = assemble(intermediate_model(LAYER_MAP, 1, "first"), teacher=teacher, student=student)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(saved(TOKENS).logits, expected(TOKENS).logits)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    names = save_models(tmp_path, *family_pair("llama"))
    as_pickle(names[1], Malicious(tmp_path / "ran"))
    with pytest.raises(SystemExit) as ended:
        run_main(names, tmp_path / "out")
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its weights cannot be read" in error
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have


def test_the_command_line_copies_file_to_file(qwen3, tmp_path, monkeypatch):
    names, teacher, student = qwen3

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Parents, "load", load)
    run_main(names, tmp_path / "one")
    run_main(names, tmp_path / "many", "--max_shard_size", "20KB")
    assert copied_file_to_file(tmp_path / "one")
    model = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    model.save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for folder in ("one", "many"):
        assert_same_tensors(tmp_path / folder, tmp_path / "theirs")
        configs = [
            AutoConfig.from_pretrained(tmp_path / f).to_diff_dict() for f in (folder, "theirs")
        ]
        assert configs[0] == configs[1]
        settings = [
            Path(f, "generation_config.json").read_bytes() for f in (tmp_path / folder, names[0])
        ]
        assert settings[0] == settings[1]


def test_any_subset_by_the_command_line(qwen3, tmp_path):
    names, teacher, student = qwen3
    base = ["--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]]
    main([*base, "--patched_layers", "0,2-3", "--save_directory", str(tmp_path / "subset")])
    model = assemble(
        patched_model(LAYER_MAP, frozenset({0, 2, 3})), teacher=teacher, student=student
    )
    model.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "subset", tmp_path / "theirs")
    provenance = json.loads((tmp_path / "subset" / "provenance.json").read_text())
    assert provenance["patched_layers"] == [0, 2, 3]
    assert provenance["num_layers_to_patch"] == 2


@pytest.mark.parametrize(
    "num_calls",
    [None, 0, 1, 5, 100],
    ids=["lacks it", "takes no source", "takes no target", "stops", "copies"],
)
def test_every_way_to_copy_gives_the_same_bytes(num_calls, tmp_path, monkeypatch):
    left, splice = num_calls, os.splice

    def refuses_at_last(*arguments, **options):
        nonlocal left
        if left == 0:
            raise OSError(errno.EINVAL, "not here")
        left -= 1
        return splice(*arguments, **options)

    if num_calls is None:  # another operating system
        monkeypatch.delattr(os, "splice")
    else:
        monkeypatch.setattr(os, "splice", refuses_at_last)
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", 200)
    data = os.urandom(5000)
    (tmp_path / "source").write_bytes(data)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    os.write(target, b"begin")
    copy_bytes(source, target, 17, 4321)
    assert num_calls is None or (left == 0) == (num_calls < 100)
    copy_bytes(source, target, 0, 3)
    with pytest.raises(OSError, match="became shorter while it was copied"):
        copy_bytes(source, target, 4990, 5001)
    os.close(source)
    os.close(target)
    expected = b"begin" + data[17:4321] + data[:3]
    assert (tmp_path / "target").read_bytes()[: len(expected)] == expected


names_of_tensors = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(
    st.dictionaries(
        names_of_tensors.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["F32", "BF16", "I64", "U8"]),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        max_size=6,
    )
)
def test_headers_are_those_that_other_readers_read(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("header") / "file.safetensors"
    tensors = [StoredTensor(name, *entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: -safetensors_files.ITEM_BYTES[tensor.dtype])
    header = header_of(tensors)
    path.write_bytes(header + bytes(sum(tensor.num_bytes for tensor in tensors)))
    assert len(header) % 8 == 0
    assert {name: on_disk.tensor for name, on_disk in read_header(path).items()} == {
        tensor.name: tensor for tensor in tensors
    }
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(entries)
        assert file.metadata() == {"format": "pt"}
        for name, (dtype, shape) in entries.items():
            assert file.get_slice(name).get_dtype() == dtype
            assert tuple(file.get_slice(name).get_shape()) == shape


GOOD_FILE = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})


@settings(max_examples=300)
@given(st.integers(0, len(GOOD_FILE) - 1), st.integers(0, 255), st.integers(-3, 3))
def test_a_damaged_file_is_refused_or_read_as_others_read_it(
    tmp_path_factory, position, byte, growth
):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    damaged = bytearray(GOOD_FILE)
    damaged[position] = byte
    path.write_bytes(damaged[: len(damaged) + growth] + bytes(max(growth, 0)))
    try:
        ours = {name: on_disk.tensor for name, on_disk in read_header(path).items()}
    except ValueError as error:
        assert "is damaged" in str(error)
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = {
                name: StoredTensor(
                    name, file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())
                )
                for name in list(file.keys())
            }
    except SafetensorError:
        pytest.fail(f"accepted what others refuse: {bytes(damaged)!r}")
    assert ours == theirs


def test_an_unused_parent_is_not_read(qwen3, tmp_path):
    names, teacher, _ = qwen3
    student = shutil.copytree(names[1], tmp_path / "student")
    (student / "model.safetensors").write_bytes(b"")
    change_config(student, dtype="float32")
    family = open_family((names[0], str(student)))
    (tmp_path / "teacher").mkdir()
    plan(family, intermediate_model(LAYER_MAP, 2, "last")).write(tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "teacher", tmp_path / "theirs")

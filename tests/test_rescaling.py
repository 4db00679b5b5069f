"""Rescaled runs of student layers: what layers compute, what is written, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from multimodal_models import multimodal_pair
from patching_models import LAYER_MAP, SETTINGS, family_config, family_pair, save_models
from safetensors.torch import load_file
from test_hybrids import hybrid_pair
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.architectures.table import ARCHITECTURES
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.checkpoints.save import plan_save, same_files
from patching.checkpoints.splice import OutOfRange
from patching.family import Family
from patching.matched_scale import MatchedScales, SetScale
from patching.recipe import LayerSource, Recipe, naively_pruned, patched_model, with_scales
from patching.running.prefix_tree import PrefixTree
from patching.running.rescaled import check_rescaling, rescaled

ENCODERS = {"bert", "roberta"}
LAST = frozenset({2, 3})  # student 0-1, teacher 3-5
MIDDLE = frozenset({0, 3})  # teacher 0-1, student 1-2, teacher 5
TOKENS = torch.arange(20)[None] * 7 % 257


def causal(*fast: str):
    """Parametrize over all causal models of the table, of which few are fast."""
    names = [name for name in SETTINGS if name not in ENCODERS]
    marks = {name: [] if name in fast else pytest.mark.slow for name in names}
    return pytest.mark.parametrize(
        "model_type", [pytest.param(name, marks=marks[name]) for name in names]
    )


TIED = pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])


def scales_of(factors: dict[frozenset[int], dict[int, float]]) -> MatchedScales:
    sets = [SetScale(patched, of, of, 2.0, 1.5, 0.1) for patched, of in factors.items()]
    return MatchedScales.of(sets, {"text": "the first 3 texts of text.jsonl"})


@torch.no_grad()
def layer_outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    found = []
    layers = model.get_submodule(architecture_of(model.config).layers)
    handles = [
        layer.register_forward_hook(
            lambda _, args, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for layer in layers
    ]
    model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def with_long_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Norms add a small number to what they divide by, which must not show here."""
    for path in architecture_of(model.config).embeddings:
        model.get_submodule(path).weight.mul_(100)
    return model


@torch.no_grad()
@TIED
@causal("qwen3", "gemma2", "gpt2")
def test_layers_compute_the_same_up_to_the_factor(model_type, tied):
    teacher, student = family_pair(model_type, tied)
    teacher, student = with_long_embeddings(teacher), with_long_embeddings(student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    check_rescaling(student.config)

    def error(found, expected):
        return ((found - expected).norm() / expected.norm()).item()

    whole = rescaled(student, 1.3)
    for found, expected in zip(layer_outputs(whole), layer_outputs(student), strict=True):
        assert error(found, 1.3 * expected) < 1e-5
    assert error(whole(TOKENS).logits, student(TOKENS).logits) < 1e-5
    assert not whole.config.tie_word_embeddings

    recipe = with_scales(patched_model(LAYER_MAP, LAST), {0: 0.8})
    scaled = layer_outputs(assemble(recipe, teacher=teacher, student=student))
    for found, expected in zip(scaled[:2], layer_outputs(student)):
        assert error(found, 0.8 * expected) < 1e-5
    plain = layer_outputs(
        assemble(patched_model(LAYER_MAP, LAST), teacher=teacher, student=student)
    )
    assert error(scaled[2], plain[2]) > 1e-3  # the teacher's layer reads another length
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@torch.no_grad()
@causal("qwen3", "olmo2")
def test_only_what_is_rescaled_is_new(model_type):
    """A run in the middle leaves embeddings and teacher layers alone, which stay shared."""
    teacher, student = family_pair(model_type, tied=True)
    recipe = with_scales(patched_model(LAYER_MAP, MIDDLE), {1: 1.25})
    model = assemble(recipe, teacher=teacher, student=student)
    assert model.config.tie_word_embeddings
    architecture = architecture_of(model.config)
    parents = {"teacher": teacher.state_dict(), "student": student.state_dict()}
    num_new = 0
    for name, tensor in model.state_dict().items():
        parent, parent_name = architecture.source_of(name, recipe)
        source = parents[parent][parent_name]
        is_same = tensor.data_ptr() == source.data_ptr()
        assert is_same == torch.equal(tensor, source)
        assert is_same or (parent == "student" and architecture.layer_of(name) in (2, 3))
        num_new += not is_same
    assert num_new >= 4


@torch.no_grad()
@TIED
@causal("qwen3_moe", "gemma2")
def test_a_saved_member_equals_the_one_in_memory(model_type, tied, tmp_path):
    teacher, student = family_pair(model_type, tied)
    names = save_models(tmp_path, teacher, student, max_shard_size="20KB" if tied else "5GB")
    family = Family.from_pretrained(*names)
    scales = scales_of({LAST: {0: 1.21}, MIDDLE: {1: 0.77}})
    family = dataclasses.replace(family, scales=scales)
    for patched in (LAST, MIDDLE):
        name = "".join(map(str, sorted(patched)))
        recipe = family.recipe(patched_layers=patched)
        assert recipe == with_scales(
            patched_model(LAYER_MAP, patched), scales.sets[patched].factors
        )
        model = assemble(recipe, teacher=teacher, student=student)
        plan = plan_save(family, patched, tmp_path / name)
        assert plan.reason_to_load is None
        plan.save(tmp_path / name, name, {})
        model.save_pretrained(tmp_path / f"{name} in memory")
        ours, theirs = (
            {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
            for folder in (tmp_path / name, tmp_path / f"{name} in memory")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        size = family.size(recipe)
        assert size.bytes_on_disk == sum(
            path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")
        )
        assert size.parameters.stored == model.num_parameters()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        expected = model(TOKENS).logits
        assert torch.equal(loaded(TOKENS).logits, expected)
        loaded.tie_weights()
        assert torch.equal(loaded(TOKENS).logits, expected)
        plain = assemble(patched_model(LAYER_MAP, patched), teacher=teacher, student=student)
        assert not torch.allclose(plain(TOKENS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_and_rescaled_tensor_equals_the_one_in_memory(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("patching.checkpoints.splice.CAST_BYTES", 1000)
    names = save_models(tmp_path, *family_pair("gemma2", True))
    family = Family.from_pretrained(*names, dtype=dtype)
    family = dataclasses.replace(family, scales=scales_of({LAST: {0: 1.21}}))
    plan_save(family, LAST, tmp_path / "ours").save(tmp_path / "ours", "ours", {})
    family.model(patched_layers=LAST).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = "model.layers.0.post_attention_layernorm.weight"
    weight = load_file(Path(names[1]) / "model.safetensors")[name].to(dtype).double()
    exact = 1.21 * (1 + weight) - 1
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=2**-6)
    assert ((ours[name].double() - exact).abs() <= spacing).all()


def test_what_becomes_too_large_is_refused(tmp_path):
    teacher, student = family_pair("qwen3")
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight[0, 0] = 60_000.0
    names = save_models(tmp_path, teacher, student)
    family = Family.from_pretrained(*names, dtype=torch.float16)
    family = dataclasses.replace(family, scales=scales_of({LAST: {0: 1.21}}))
    plan = plan_save(family, LAST, tmp_path / "out")
    with pytest.raises(OutOfRange, match=r"layers\.0\.mlp\.down_proj"):
        plan.save(tmp_path / "out", "out", {})
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@causal("gpt2")
def test_rescaled_members_of_a_tree_have_their_own_logits(model_type):
    teacher, student = family_pair(model_type, tied=True)
    recipes = {}
    for patched in (LAST, MIDDLE, frozenset({0, 1})):
        plain = patched_model(LAYER_MAP, patched)
        start = plain.student_runs[0][0]
        for factor in (1.0, 0.8, 1.25):
            recipes[f"{sorted(patched)} {factor}"] = with_scales(plain, {start: factor})
    # The same layers with another embedding: the first path entry must tell them apart.
    one = recipes[f"{sorted(LAST)} 1.25"]
    recipes["layers alone"] = dataclasses.replace(one, embedding_scale=1.0)
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    positions = torch.arange(TOKENS.numel())
    found = {name: logits for name, _, logits in tree.logits({"input_ids": TOKENS}, positions)}
    assert found.keys() == recipes.keys()
    for name, recipe in recipes.items():
        alone = assemble(recipe, teacher=teacher, student=student)(TOKENS).logits[0]
        torch.testing.assert_close(found[name], alone, rtol=1e-5, atol=1e-5, msg=name)
    shared = [name for name in recipes if name.endswith(" 1.25")]
    layers = [
        tree.models[name].get_submodule(architecture_of(teacher.config).layers) for name in shared
    ]
    first, third = (  # student layer 1 is rescaled by 1.25 in [2, 3] and in [0, 3]
        dict(layers[0][1].named_parameters()),
        dict(layers[1][2].named_parameters()),
    )
    assert all(first[name].data_ptr() == third[name].data_ptr() for name in first)


REFUSED = {
    "bert": (lambda: family_config("bert"), "no norm lies between"),
    "roberta": (lambda: family_config("roberta"), "no norm lies between"),
    "opt-350m": (lambda: family_config("opt", do_layer_norm_before=False), "something else"),
    "gemma3": (lambda: multimodal_pair("gemma3", True)[0].config, "images enter"),
    "granitemoehybrid": (lambda: hybrid_pair("granitemoehybrid")[0].config, "cannot be run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rescaled_is_refused_in_one_line(name):
    config, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"^model_type=.* cannot be matched, .*{reason}"):
        check_rescaling(config())


@pytest.mark.parametrize("missing", ["o_proj", "down_proj"])
def test_a_row_that_lacks_a_writer_is_refused(missing, monkeypatch):
    row = ARCHITECTURES["qwen3"]
    writers = tuple(name for name in row.writers if name != missing)
    monkeypatch.setitem(ARCHITECTURES, "qwen3", dataclasses.replace(row, writers=writers))
    with pytest.raises(ValueError, match="computes something else"):
        check_rescaling(family_config("qwen3"))


def test_a_row_that_lacks_embeddings_or_a_reader_is_refused(monkeypatch):
    row = dataclasses.replace(ARCHITECTURES["gpt2"], embeddings=("transformer.wte",))
    monkeypatch.setitem(ARCHITECTURES, "gpt2", row)
    with pytest.raises(ValueError, match="computes something else"):
        check_rescaling(family_config("gpt2"))
    row = dataclasses.replace(ARCHITECTURES["olmo2"], readers=("q_proj", "k_proj", "v_proj"))
    monkeypatch.setitem(ARCHITECTURES, "olmo2", row)
    with pytest.raises(ValueError, match="computes something else"):
        check_rescaling(family_config("olmo2"))


PUBLISHED_WIDTHS = {
    "llama": {},
    "phi3": {},
    "gpt_neox": {"num_hidden_layers": 3},
    "opt": {"word_embed_proj_dim": 768},
    "qwen3_next": {"num_hidden_layers": 4},
    "phi": {},
    "gemma": {},
    "qwen2_moe": {"num_hidden_layers": 2},
    "starcoder2": {},
    "olmoe": {"num_hidden_layers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PUBLISHED_WIDTHS)
def test_wide_models_are_proven_on_narrow_ones(model_type):
    """Widths of published models, several without a row in the table."""
    check_rescaling(CONFIG_MAPPING[model_type](**PUBLISHED_WIDTHS[model_type]))


def test_a_family_saves_each_rescaled_file_once(tmp_path):
    names = save_models(tmp_path, *family_pair("qwen3", tied=True))
    family = Family.from_pretrained(*names, "last")
    other = dataclasses.replace(family, scales=scales_of({LAST: {0: 1.21}}))
    plans = [
        plan_save(of, LAST, tmp_path / name, max_shard_bytes=20_000)
        for name, of in (("plain", family), ("a", other), ("b", other))
    ]
    folders = [tmp_path / name for name in ("plain", "a", "b")]
    found = same_files(plans, folders)
    for plan, folder, same in zip(plans, folders, found):
        plan.save(folder, folder.name, {}, same)
    # Files of the teacher's layers alone are the same in both, those with rescaled tensors are not.
    assert 0 < len(found[1]) < len(plans[1].weights.shards) and len(found[2]) == len(
        plans[2].weights.shards
    )
    alone = tmp_path / "alone"
    plan_save(other, LAST, alone, max_shard_bytes=20_000).save(alone, "alone", {})
    for path in alone.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_record_and_the_card_say_how_a_member_was_rescaled(tmp_path):
    names = save_models(tmp_path, *family_pair("qwen3", tied=True))
    family = Family.from_pretrained(*names, "last")
    family = dataclasses.replace(family, scales=scales_of({LAST: {0: 1.21}}))
    plan_save(family, LAST, tmp_path / "out").save(tmp_path / "out", "out", {})
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["recipe"]["embedding"] == "student x 1.21"
    assert record["recipe"]["layers"][:3] == ["student 0 x 1.21", "student 1 x 1.21", "teacher 3"]
    assert record["matched_scale"]["factors"] == {"0": 1.21}
    assert record["matched_scale"]["kl"] == 1.5
    again = Recipe.from_dict(record["recipe"])
    assert again == family.recipe(patched_layers=LAST)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| embedding | student, times 1.21 |" in card
    assert "| 0-1 | student 0-1, times 1.21 |" in card
    assert "the first 3 texts of text.jsonl: 1.5000 nats per token, and 2.0000 without" in card
    plan_save(family, MIDDLE, tmp_path / "plain").save(tmp_path / "plain", "plain", {})
    assert "matched_scale" not in json.loads((tmp_path / "plain" / "provenance.json").read_text())
    assert "times" not in (tmp_path / "plain" / "README.md").read_text()


LAYERS = LayerMap((0, 2, 4, 6, 7), 8)


@given(st.frozensets(st.integers(0, 4)), st.data())
def test_factors_go_to_whole_runs_of_student_layers(patched, data):
    recipe = patched_model(LAYERS, patched)
    starts = [run[0] for run in recipe.student_runs]
    numbers = st.floats(0.25, 4).filter(lambda number: number != 1)
    factors = data.draw(st.fixed_dictionaries({}, optional={i: numbers for i in starts}))
    scaled = with_scales(recipe, factors)
    assert [(s.parent, s.layer_idx) for s in scaled.layers] == [s[:2] for s in recipe.layers]
    current = None
    for i, source in enumerate(scaled.layers):
        if source.parent == "teacher":
            assert source.scale == 1
            continue
        if i == 0 or scaled.layers[i - 1].parent == "teacher":
            current = factors.get(source.layer_idx, 1.0)
        assert source.scale == current
    begins = recipe.layers[0].parent == "student"
    assert scaled.embedding_scale == (factors.get(0, 1.0) if begins else 1.0)
    assert Recipe.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled
    assert with_scales(scaled, {}) == recipe
    naive = naively_pruned(LAYERS, scaled)
    assert naive == naively_pruned(LAYERS, recipe) and naive.embedding_scale == 1


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({2: 1.1}, "no run of student layers begins with layer 2 in this model: they begin with 1"),
        ({1: 0.0}, "a factor is 0.0, choose a number above 0"),
        ({1: float("inf")}, "a factor is inf, choose a number above 0"),
    ],
)
def test_factors_of_no_run_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        with_scales(patched_model(LAYER_MAP, MIDDLE), factors)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("teacher 1 x 1.2", "parts of the teacher are never scaled"),
        ("student 1 x 0", "a factor is 0.0"),
        ("student 1 x", "'student 1 x' is not a layer"),
        ("student 1 x -2.0", "'student 1 x -2.0' is not a layer"),
        ("student 1 x 1.2.3", "is not a layer"),
    ],
)
def test_malformed_factors_are_refused(source, message):
    with pytest.raises(ValueError, match=f"^recipe: .*{message}"):
        Recipe.from_dict({"embedding": "student", "layers": [source], "norm_and_head": "teacher"})
    assert LayerSource("student", 1) == LayerSource("student", 1, 1.0)


@pytest.mark.slow
def test_in_a_fresh_process_a_saved_member_is_the_one_in_memory(tmp_path):
    teacher, student = family_pair("gpt_neox", tied=True)
    names = save_models(tmp_path, teacher, student)
    family = dataclasses.replace(
        Family.from_pretrained(*names), scales=scales_of({LAST: {0: 1.21}})
    )
    plan_save(family, LAST, tmp_path / "out").save(tmp_path / "out", "out", {})
    with torch.no_grad():
        expected = family.model(patched_layers=LAST)(TOKENS).logits
    torch.save({"tokens": TOKENS, "logits": expected}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers as t\n"
        "found = torch.load(sys.argv[2], weights_only=True)\n"
        "model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert torch.equal(model(found['tokens']).logits, found['logits'])\n"
    )
    words = [sys.executable, "-c", code, tmp_path / "out", tmp_path / "expected.pt"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

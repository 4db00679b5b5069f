"""Assembled models against hand-written loops over the chosen layers, in fp32."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config, tiny_model, trained_student

from patching.assemble import assemble, count_parameters
from patching.blocks import LayerMap
from patching.recipe import initial_student, intermediate_model, naively_pruned

KINDS = [
    "llama-untied",
    "llama-tied",
    "qwen3-tied",
    "qwen3-untied",
    "gpt_neox-untied",
    "gpt_neox-tied",
]
MORE_KINDS = ["qwen2-tied", "mistral-untied", "gpt2"]
LAYER_MAP = LayerMap((0, 2, 4, 5), 8)  # a single-layer block among longer ones
TOKENS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS + MORE_KINDS)
def pair(request):
    teacher = tiny_model(tiny_config(request.param, LAYER_MAP.num_teacher_layers))
    return teacher, trained_student(teacher, LAYER_MAP)


def run_layers(recipe, teacher, student, tokens_BT):
    """The recipe as a loop: each chosen layer of its parent in turn, everything else as
    transformers does it.
    """
    parents = {"teacher": teacher, "student": student}
    first, last = parents[recipe.embedding], parents[recipe.head]
    model_type = first.config.model_type
    positions_1T = torch.arange(tokens_BT.shape[1])[None]
    length = tokens_BT.shape[1]
    causal_mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    if model_type == "gpt2":
        hidden = first.transformer.wte(tokens_BT) + first.transformer.wpe(positions_1T)
        extra = {}
    elif model_type == "gpt_neox":
        hidden = first.gpt_neox.embed_in(tokens_BT)
        extra = {"position_embeddings": first.gpt_neox.rotary_emb(hidden, positions_1T)}
    else:
        hidden = first.model.embed_tokens(tokens_BT)
        extra = {"position_embeddings": first.model.rotary_emb(hidden, positions_1T)}
    for parent, layer, _ in recipe.layers:
        layers = {
            "gpt2": lambda m: m.transformer.h,
            "gpt_neox": lambda m: m.gpt_neox.layers,
        }.get(model_type, lambda m: m.model.layers)(parents[parent])
        output = layers[layer](hidden, attention_mask=causal_mask, **extra)
        hidden = output[0] if isinstance(output, tuple) else output
    norm = {"gpt2": lambda m: m.transformer.ln_f, "gpt_neox": lambda m: m.gpt_neox.final_layer_norm}
    hidden = norm.get(model_type, lambda m: m.model.norm)(last)(hidden)
    return last.lm_head(hidden)


@torch.no_grad()
@pytest.mark.parametrize("order", ["last", "first"])
def test_every_size_equals_a_loop_over_its_layers(pair, order):
    teacher, student = pair
    before = [copy.deepcopy(model.state_dict()) for model in pair]
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        recipe = intermediate_model(LAYER_MAP, k, order)
        for chosen in (recipe, naively_pruned(LAYER_MAP, recipe)):
            model = assemble(chosen, teacher=teacher, student=student)
            logits = model(TOKENS).logits
            expected = run_layers(chosen, teacher, student, TOKENS)
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            assert model.config.num_hidden_layers == chosen.depth
    for model, state in zip(pair, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_ends_are_the_student_and_the_teacher(pair):
    teacher, student = pair
    for order in ("last", "first"):
        for k, original in ((0, student), (LAYER_MAP.max_layers_to_patch, teacher)):
            model = assemble(
                intermediate_model(LAYER_MAP, k, order), teacher=teacher, student=student
            )
            states = model.state_dict(), original.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
            assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
            assert model.config.tie_word_embeddings == original.config.tie_word_embeddings


def test_tensors_are_shared_with_the_parents(pair):
    teacher, student = pair
    model = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    owned = {p.data_ptr() for parent in pair for p in parent.parameters()}
    assert all(parameter.data_ptr() in owned for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in model.buffers())


@torch.no_grad()
def test_cached_generation_equals_uncached(pair):
    teacher, student = pair
    for k in range(LAYER_MAP.max_layers_to_patch + 1):
        model = assemble(intermediate_model(LAYER_MAP, k, "last"), teacher=teacher, student=student)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        cached = model.generate(TOKENS, use_cache=True, **settings)
        uncached = model.generate(TOKENS, use_cache=False, **settings)
        assert torch.equal(cached, uncached)


def test_head_and_embedding_of_different_models_are_untied():
    teacher = tiny_model(tiny_config("qwen3-tied", 8))
    student = trained_student(teacher, LAYER_MAP)
    for order, embedding, head in (("last", student, teacher), ("first", teacher, student)):
        model = assemble(intermediate_model(LAYER_MAP, 1, order), teacher=teacher, student=student)
        assert not model.config.tie_word_embeddings
        model.tie_weights()
        assert torch.equal(model.model.embed_tokens.weight, embedding.model.embed_tokens.weight)
        assert torch.equal(model.lm_head.weight, head.model.embed_tokens.weight)


@torch.no_grad()
def test_a_layers_kind_of_attention_follows_the_layer():
    teacher = tiny_model(tiny_config("qwen2mixed-tied", 8))
    student = trained_student(teacher, LAYER_MAP)
    kinds = teacher.config.layer_types
    assert student.config.layer_types == [kinds[t] for t in LAYER_MAP.kept]
    model = assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher, student=student)
    assert model.config.layer_types == [kinds[t] for t in (0, 2, 4, 5, 6, 7)]
    wrong = copy.deepcopy(model)
    for layer in wrong.model.layers:
        layer.self_attn.sliding_window = None
    wrong.config.layer_types = ["full_attention"] * 6
    assert not torch.allclose(model(TOKENS).logits, wrong(TOKENS).logits)


def test_a_missing_parent_is_named():
    teacher = tiny_model(tiny_config("llama-tied", 8))
    with pytest.raises(ValueError, match="takes layers from the student, which was not given"):
        assemble(intermediate_model(LAYER_MAP, 1, "last"), teacher=teacher)


def test_the_initial_student_is_the_kept_layers():
    teacher = tiny_model(tiny_config("llama-tied", 8))
    student = assemble(initial_student(LAYER_MAP), teacher=teacher)
    for i, layer in enumerate(LAYER_MAP.kept):
        ours, theirs = (
            student.model.layers[i].state_dict(),
            teacher.model.layers[layer].state_dict(),
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert student.model.layers[i].self_attn.layer_idx == i


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    tokens, logits = expected["tokens"], expected["logits"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits), "logits"
        model.tie_weights()
        assert torch.equal(model(tokens).logits, logits), "tied again"
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    cached, uncached = (model.generate(tokens, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, uncached), "cache"
print("same")
"""


@pytest.mark.slow
@torch.no_grad()
def test_saved_models_are_the_same_in_a_fresh_process(tmp_path):
    folders = []
    for kind in KINDS:
        teacher = tiny_model(tiny_config(kind, 8))
        parents = {"teacher": teacher, "student": trained_student(teacher, LAYER_MAP)}
        for k in range(LAYER_MAP.max_layers_to_patch + 1):
            model = assemble(intermediate_model(LAYER_MAP, k, "last"), **parents)
            folders.append(tmp_path / f"{kind}_k{k}")
            model.save_pretrained(folders[-1])
            expected = {"tokens": TOKENS, "logits": model(TOKENS).logits}
            torch.save(expected, folders[-1] / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *folders], capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("same"), done.stderr


def test_both_parameter_counts():
    tied, untied = (count_parameters(tiny_config(f"qwen3-{t}", 4)) for t in ("tied", "untied"))
    assert untied.stored == untied.both_counted == tied.both_counted
    assert tied.both_counted - tied.stored == 257 * 32
    model = tiny_model(tiny_config("qwen3-untied", 4))
    assert untied.stored == sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(tiny_config("gpt2", 2)).both_counted > 0

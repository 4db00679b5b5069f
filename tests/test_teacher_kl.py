"""KL from the teacher against a naive formula in float64, model by model."""

import pytest
import torch
from conftest import tiny_config, tiny_model, trained_student
from patching_models import LAYER_MAP, SETTINGS, family_pair
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from benchmarks.orders import SIDES, Side, forwards_of_search
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.orders.search import search
from patching.recipe import patched_model
from patching.running import teacher_kl
from patching.running.calibration import padded_batches
from patching.running.teacher_kl import TeacherKL, kl_of_tokens

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19], [20, 21, 22, 23, 24]]
SETS = [frozenset(), frozenset({0}), frozenset({2, 3}), frozenset({0, 1}), frozenset({0, 1, 2, 3})]
RECIPES = {str(sorted(patched)): patched_model(LAYER_MAP, patched) for patched in SETS}


@torch.no_grad()
def naive_kl(model, teacher) -> float:
    """Row by row without padding, from whole logits."""
    total, num_tokens = 0.0, 0
    for row in ROWS:
        ids = torch.tensor([row])
        p, q = (m(ids).logits[0].double().softmax(-1) for m in (model, teacher))
        total += (q * (q.log() - p.log())).sum().item()
        num_tokens += len(row)
    return total / num_tokens


@pytest.mark.parametrize("model_type", SETTINGS)
def test_as_the_formula_says(model_type, monkeypatch):
    monkeypatch.setattr(teacher_kl, "CHUNK_LOGITS", 5 * 257)
    monkeypatch.setattr(teacher_kl, "CPU_SOFTMAX_LOGITS", 2 * 257)
    teacher, student = family_pair(model_type)
    measure = TeacherKL(teacher=teacher, student=student, batches=padded_batches(ROWS))
    found = measure.of(RECIPES)
    for name, recipe in RECIPES.items():
        expected = naive_kl(assemble(recipe, teacher=teacher, student=student), teacher)
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    assert found["[]"] > 0.01
    paths = {
        (recipe.embedding, *recipe.layers[:depth])
        for recipe in RECIPES.values()
        for depth in range(1, recipe.depth + 1)
    }
    assert measure.num_layer_forwards == 2 * len(paths)


def test_a_small_divergence_is_not_lost_in_rounding():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16)
    heads = [torch.nn.Linear(16, 500, bias=False) for _ in range(2)]
    with torch.no_grad():
        heads[1].weight.copy_(heads[0].weight + 1e-3 * torch.randn(500, 16))
        q, p = (head.double()(hidden.double()).softmax(-1) for head in heads)
    expected = (q * (q.log() - p.log())).sum()
    found = kl_of_tokens(hidden, heads[0].float(), [(hidden, head.float()) for head in heads]).sum(
        1
    )
    assert found[0] == 0
    assert found[1].item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDES)
def test_layers_of_a_search_are_counted_as_they_run(name, monkeypatch):
    layer_map = LayerMap((0, 2, 4, 6, 8, 9), 10)
    teacher = tiny_model(tiny_config("qwen3", 10))
    student = trained_student(teacher, layer_map)
    num_calls, forward = 0, Qwen3Attention.forward

    def counting(*arguments, **settings):
        nonlocal num_calls
        num_calls += 1
        return forward(*arguments, **settings)

    monkeypatch.setattr(Qwen3Attention, "forward", counting)
    batches = padded_batches(ROWS)
    side = Side(
        name, layer_map, lambda: TeacherKL(teacher=teacher, student=student, batches=batches)
    )
    search(layer_map, side)
    recipes = [patched_model(layer_map, patched) for patched in side.found]
    paths = {(r.embedding, *r.layers[:depth]) for r in recipes for depth in range(1, r.depth + 1)}
    expected = {
        "shared": (len(paths), 10),
        "alone": (sum(recipe.depth for recipe in recipes), 10),
        "beside": (sum(recipe.depth for recipe in recipes), 10 * len(recipes)),
    }
    assert side.forwards == tuple(len(batches) * number for number in expected[name])
    assert num_calls == sum(side.forwards)


def test_layers_of_a_search_counted_by_hand():
    layer_map = LayerMap((0, 2, 4), 6)
    # Found is {2}, then {1, 2}; 4 + 4 + 4 and 5 + 5 layers, of which these are new: 4 + 4 + 3 for
    # {0}, {1} and {2}, then the last two of {0, 2} and of {1, 2}.
    counts = {"shared": (15, 6), "alone": (22, 6), "beside": (22, 5 * 6)}
    assert forwards_of_search(layer_map, "last") == counts


def test_no_text_is_an_error():
    teacher, student = family_pair("qwen3")
    with pytest.raises(ValueError, match="no text"):
        TeacherKL(teacher=teacher, student=student, batches=[])


@pytest.mark.parametrize(
    "room", [3000, *(pytest.param(room, marks=pytest.mark.slow) for room in (2**32, 0))]
)
def test_states_kept_from_call_to_call_change_nothing_but_the_cost(room, monkeypatch):
    monkeypatch.setattr(teacher_kl, "MOST_KNOWN_BYTES", room)
    layer_map = LayerMap((0, 2, 4, 6, 8), 10)
    teacher = tiny_model(tiny_config("qwen3", 10))
    student = trained_student(teacher, layer_map)
    measure = TeacherKL(teacher=teacher, student=student, batches=padded_batches(ROWS))
    paths, num_alone = set(), 0
    for patched in ((), (3,), (0, 3), (0, 2, 3)):
        recipes = {
            f"{layer}": patched_model(layer_map, frozenset({*patched, layer}))
            for layer in range(5)
            if layer not in patched
        }
        found = measure.of(recipes, remember=True)
        fresh = TeacherKL(teacher=teacher, student=student, batches=padded_batches(ROWS))
        assert found == fresh.of(recipes)
        num_alone += fresh.num_layer_forwards
        for recipe in recipes.values():
            paths |= {recipe.layers[:depth] for depth in range(1, recipe.depth + 1)}
    if room == 2**32:
        assert measure.num_layer_forwards == 2 * len(paths)  # each distinct prefix once
    elif room:
        assert 2 * len(paths) < measure.num_layer_forwards < num_alone
    else:
        assert measure.num_layer_forwards == num_alone
    assert all(known.room_bytes >= 0 for known in measure._known)

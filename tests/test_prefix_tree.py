"""Many recipes as a tree: the logits of each member by itself, and every prefix run once."""

from collections import Counter

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from patching_models import LAYER_MAP, SETTINGS, family_pair

from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import (
    Recipe,
    initial_student,
    intermediate_model,
    naively_pruned,
    patched_model,
)
from patching.running import prefix_tree
from patching.running.placement import device_map_of
from patching.running.prefix_tree import PrefixTree


def family(layer_map: LayerMap, order: str) -> dict[str, Recipe]:
    return {
        f"family_{k}": intermediate_model(layer_map, k, order)
        for k in range(layer_map.max_layers_to_patch + 1)
    }


def with_baselines(layer_map: LayerMap, order: str) -> dict[str, Recipe]:
    recipes = family(layer_map, order)
    naive = {
        name.replace("family", "naive"): naively_pruned(layer_map, recipe)
        for name, recipe in recipes.items()
    }
    return recipes | naive | {"initial": initial_student(layer_map)}


def gather(tree: PrefixTree, inputs: dict, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    parts: dict[str, list] = {}
    for name, chunk, logits in tree.logits(inputs, positions):
        assert chunk.start == sum(map(len, parts.get(name, [])))
        parts.setdefault(name, []).append(logits.clone())
    return {name: torch.cat(logits) for name, logits in parts.items()}


def test_a_tree_builds_each_parent_without_weights_once(monkeypatch):
    teacher, student = family_pair("qwen3")
    recipes, built = family(LAYER_MAP, "last"), []
    build = type(teacher).__init__

    def counted(self, *arguments, **settings):
        built.append(self)
        build(self, *arguments, **settings)

    monkeypatch.setattr(type(teacher), "__init__", counted)
    PrefixTree(recipes, teacher=teacher, student=student)
    assert len(built) == len(recipes) + 2


@pytest.mark.parametrize("order", ["last", "first"])
@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_every_member_has_its_own_logits(model_type, order, monkeypatch):
    teacher, student = family_pair(model_type)
    recipes = with_baselines(LAYER_MAP, order)
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(257, (3, 11))}
    positions = torch.tensor([0, 5, 10, 11, 20, 32])
    monkeypatch.setattr(prefix_tree, "CHUNK_LOGITS", 4 * 257)  # a chunk of four, one of two
    found = gather(tree, inputs, positions)
    assert found.keys() == recipes.keys()
    for name, recipe in recipes.items():
        model = assemble(recipe, teacher=teacher, student=student)
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits.flatten(0, 1)[positions]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("order", "expected"), [("last", 167), ("first", 112)])
def test_each_distinct_prefix_is_run_once(order, expected):
    layer_map = LayerMap((*range(0, 23, 2), 23), 24)
    teacher, student = family_pair("qwen3", num_hidden_layers=24), None
    teacher = teacher[0]
    student = assemble(initial_student(layer_map), teacher=teacher)
    recipes = family(layer_map, order)
    assert sum(recipe.depth for recipe in recipes.values()) == 222
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    calls: Counter[str] = Counter()
    for name, model in tree.models.items():
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_, name=name: calls.update([name]))
    gather(tree, {"input_ids": torch.arange(6)[None]}, torch.tensor([5]))
    assert calls.total() == tree.num_layer_forwards == expected


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 3)), min_size=1, max_size=6, unique=True))
def test_any_sets_of_patched_layers(small_pair, patched):
    teacher, student = small_pair
    recipes = {str(sorted(layers)): patched_model(LAYER_MAP, layers) for layers in patched}
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    inputs = {"input_ids": torch.arange(7)[None]}
    prefixes = {
        (recipe.embedding, *recipe.layers[: depth + 1])
        for recipe in recipes.values()
        for depth in range(recipe.depth)
    }
    assert tree.num_layer_forwards == len(prefixes)
    for name, logits in gather(tree, inputs, torch.tensor([6])).items():
        with torch.no_grad():
            expected = tree.models[name](**inputs).logits[0, 6:]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small_pair():
    return family_pair("llama", rope_parameters=None)


def test_states_are_kept_only_where_members_diverge(small_pair, monkeypatch):
    teacher, student = small_pair
    tree = PrefixTree(family(LAYER_MAP, "last"), teacher=teacher, student=student)
    most = 0
    run = prefix_tree._run_layers

    def watched(model, layers, inputs, states, *others):
        nonlocal most
        output = run(model, layers, inputs, states, *others)
        most = max(most, len(states))
        return output

    monkeypatch.setattr(prefix_tree, "_run_layers", watched)
    gather(tree, {"input_ids": torch.arange(6)[None]}, torch.tensor([5]))
    assert most == 1  # k = 0 and 1 diverge after student layer 1, k = 2 shares nothing


@pytest.mark.parametrize("chunk", [5, 33])
def test_norm_and_head_run_once_at_the_selected_positions(small_pair, monkeypatch, chunk):
    monkeypatch.setattr(prefix_tree, "CHUNK_LOGITS", chunk * 257)
    teacher, student = small_pair
    tree = PrefixTree(family(LAYER_MAP, "first"), teacher=teacher, student=student)
    num_rows = Counter()
    for model in tree.models.values():
        for module in (model.model.norm, model.lm_head):
            module.register_forward_pre_hook(
                lambda module, args: num_rows.update({module: args[0][..., 0].numel()})
            )
    inputs = {"input_ids": torch.arange(2 * 16).view(2, 16)}
    gather(tree, inputs, torch.arange(31))
    assert num_rows.keys() and set(num_rows.values()) == {31}


def test_the_models_are_left_unchanged(small_pair):
    teacher, student = small_pair
    tree = PrefixTree(family(LAYER_MAP, "first"), teacher=teacher, student=student)
    gather(tree, {"input_ids": torch.arange(6)[None]}, torch.tensor([5]))
    for model in tree.models.values():
        for module in model.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_modules_with_hooks_of_several_devices_keep_them(small_pair):
    """Models spread by a device_map have a forward of their own on every module."""
    teacher, student = small_pair
    recipes = family(LAYER_MAP, "first")
    plain = PrefixTree(recipes, teacher=teacher, student=student)
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    inputs, positions = {"input_ids": torch.arange(14).view(2, 7)}, torch.tensor([3, 13])
    for model in tree.models.values():
        device_map = dict.fromkeys(device_map_of(model), "cpu")
        dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
        assert "forward" in vars(model.model.layers[0])
    expected = gather(plain, inputs, positions)
    for _ in range(2):
        found = gather(tree, inputs, positions)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for (_, logits, _), (_, same, _) in zip(tree.prefill(inputs), plain.prefill(inputs)):
        assert torch.equal(logits, same)
    for model in tree.models.values():
        assert "forward" in vars(model.model.layers[0])

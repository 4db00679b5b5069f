"""Recipes as JSON: the round trip, running one again, and what is refused."""

import json

import pytest
import torch
from conftest import tiny_config, tiny_model, trained_student
from hypothesis import given
from hypothesis import strategies as st

from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import LayerSource, Recipe, intermediate_model, naively_pruned

PARENTS = st.sampled_from(["student", "teacher"])
LAYERS = st.integers(0, 10**6)
SCALES = st.just(1.0) | st.floats(1e-6, 1e6)
SOURCES = st.builds(LayerSource, PARENTS, LAYERS, st.just(1.0)) | st.builds(
    LayerSource, st.just("student"), LAYERS, SCALES
)
LISTS = st.lists(SOURCES, min_size=1).map(tuple)
RECIPES = st.builds(Recipe, LISTS, PARENTS, PARENTS, st.just(1.0)) | st.builds(
    Recipe, LISTS, st.just("student"), PARENTS, SCALES
)
VALID = {"embedding": "student", "layers": ["student 0", "teacher 1"], "norm_and_head": "teacher"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(RECIPES)
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@torch.no_grad()
def test_a_recipe_can_be_run_again():
    layer_map = LayerMap((0, 2, 4, 5), 6)
    teacher = tiny_model(tiny_config("qwen3-tied", 6))
    student = trained_student(teacher, layer_map)
    ids = torch.arange(12)[None]
    recipe = intermediate_model(layer_map, 1, "last")
    for original in (recipe, naively_pruned(layer_map, recipe)):
        logits = assemble(original, teacher=teacher, student=student)(ids).logits
        values = json.loads(json.dumps(original.to_dict()))
        again = assemble(Recipe.from_dict(values), teacher=teacher, student=student)
        assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("source", ["teacher 6", "student 4"])
def test_a_layer_that_its_parent_lacks_is_named(source):
    layer_map = LayerMap((0, 2, 4, 5), 6)
    teacher = tiny_model(tiny_config("qwen3-tied", 6))
    student = trained_student(teacher, layer_map)
    recipe = Recipe.from_dict(VALID | {"layers": ["student 0", source]})
    parent, layer_idx = source.split()
    message = f"layer {layer_idx} of the {parent}, which has layers 0-{int(layer_idx) - 1}$"
    with pytest.raises(ValueError, match=message):
        assemble(recipe, teacher=teacher, student=student)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "needs exactly the keys embedding, layers, norm_and_head, not None"),
        (["student 0"], r"not \['student 0'\]"),
        ({}, "needs exactly the keys"),
        ({"embedding": "student", "layers": ["student 0"]}, "not embedding, layers$"),
        (VALID | {"head": "teacher"}, "not embedding, layers, norm_and_head, head$"),
        (VALID | {"embedding": "pupil"}, "embedding is 'pupil', choose student or teacher"),
        (VALID | {"norm_and_head": ["teacher"]}, r"norm_and_head is \['teacher'\], choose"),
        (VALID | {"layers": []}, r"layers is \[\], write a list such as"),
        (VALID | {"layers": "student 0"}, "layers is 'student 0', write a list such as"),
        (VALID | {"layers": ["student 0", 3]}, "3 is not a layer"),
        (VALID | {"layers": ["student -1"]}, "'student -1' is not a layer"),
        (VALID | {"layers": ["student 1.5"]}, "'student 1.5' is not a layer"),
        (VALID | {"layers": ["pupil 1"]}, "'pupil 1' is not a layer"),
        (VALID | {"layers": ["student"]}, "'student' is not a layer"),
        (VALID | {"layers": ["student 1 2"]}, "'student 1 2' is not a layer"),
        (VALID | {"layers": [["student", 1]]}, r"\['student', 1\] is not a layer"),
    ],
)
def test_malformed_recipes_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^recipe: .*{message}"):
        Recipe.from_dict(values)


@given(JSON | st.fixed_dictionaries({key: JSON | PARENTS for key in VALID}))
def test_anything_else_is_a_value_error(values):
    with pytest.raises(ValueError, match="^recipe: "):
        Recipe.from_dict(values)

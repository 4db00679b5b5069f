"""The layer arithmetic: published models exactly, and its properties for any numbers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patching.blocks import LayerMap, default_kept_layers
from patching.cli.units import parse_ranges, parse_sizes
from patching.recipe import LayerSource, initial_student, intermediate_model, naively_pruned


@pytest.mark.parametrize(
    ("num_layers", "every", "first", "last", "kept", "k_max"),
    [
        (36, 2, 1, 2, (*range(0, 36, 2), 35), 17),  # Qwen3-4B-Base, Qwen3-8B-Base
        (32, 2, 1, 2, (*range(0, 32, 2), 31), 15),  # pythia-2.8b, pythia-6.9b
        (28, 2, 2, 1, (0, *range(1, 28, 2)), 13),  # Llama-3.2-3B
    ],
)
def test_published_models(num_layers, every, first, last, kept, k_max):
    assert default_kept_layers(num_layers, every, first, last) == kept
    assert LayerMap(kept, num_layers).max_layers_to_patch == k_max
    assert len(kept) == {36: 19, 32: 17, 28: 15}[num_layers]


@st.composite
def layer_maps(draw) -> LayerMap:
    num_layers = draw(st.integers(1, 40))
    numbers = [draw(st.integers(1, num_layers)) for _ in range(3)]
    return LayerMap(default_kept_layers(num_layers, *numbers), num_layers)


@given(layer_maps())
def test_blocks_partition_the_teacher_and_every_layer_is_aligned(layer_map):
    assert [t for block in layer_map.blocks for t in block] == list(
        range(layer_map.num_teacher_layers)
    )
    assert [block.start for block in layer_map.blocks] == list(layer_map.kept)
    assert layer_map.alignment_pairs[0] == (0, 0)
    for i, block in enumerate(layer_map.blocks):
        assert layer_map.alignment_pairs[i + 1] == (i + 1, block.stop)
    assert layer_map.alignment_pairs[-1] == (len(layer_map.kept), layer_map.num_teacher_layers)


@given(layer_maps(), st.sampled_from(["last", "first"]))
def test_sizes_grow_from_the_student_to_the_teacher(layer_map, order):
    recipes = [
        intermediate_model(layer_map, k, order) for k in range(layer_map.max_layers_to_patch + 1)
    ]
    depths = [recipe.depth for recipe in recipes]
    assert all(a < b for a, b in itertools.pairwise(depths))
    student = tuple(LayerSource("student", i) for i in range(len(layer_map.kept)))
    teacher = tuple(LayerSource("teacher", t) for t in range(layer_map.num_teacher_layers))
    assert recipes[0].layers == student
    assert recipes[0].parents == {"student"}
    if layer_map.max_layers_to_patch:
        assert recipes[-1].layers == teacher
        assert recipes[-1].parents == {"teacher"}
    patched = [layer_map.patched_layers(k, order) for k in range(len(recipes))]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(patched))


@given(layer_maps(), st.sampled_from(["last", "first"]), st.data())
def test_a_patched_model_covers_the_teacher_in_order(layer_map, order, data):
    k = data.draw(st.integers(0, layer_map.max_layers_to_patch))
    covered = []
    for parent, layer, _ in intermediate_model(layer_map, k, order).layers:
        covered += layer_map.blocks[layer] if parent == "student" else [layer]
    assert covered == list(range(layer_map.num_teacher_layers))


def test_patched_layers_by_hand():
    layer_map = LayerMap((0, 2, 4, 5), 8)  # blocks 0-1, 2-3, 4, 5-7; patchable 0, 1, 3
    assert [sorted(layer_map.patched_layers(k, "last")) for k in range(4)] == [
        [],
        [3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert [sorted(layer_map.patched_layers(k, "first")) for k in range(4)] == [
        [],
        [0],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_naive_pruning_has_the_teachers_layers_only():
    layer_map = LayerMap((0, 2, 4), 6)
    recipe = naively_pruned(layer_map, intermediate_model(layer_map, 1, "last"))
    assert recipe.layers == tuple(LayerSource("teacher", t) for t in (0, 2, 4, 5))
    assert recipe.parents == {"teacher"}
    zero = naively_pruned(layer_map, intermediate_model(layer_map, 0, "last"))
    assert zero == initial_student(layer_map)


def test_a_student_as_deep_as_its_teacher_has_one_size():
    layer_map = LayerMap((0, 1, 2), 3)
    assert layer_map.max_layers_to_patch == 0
    assert intermediate_model(layer_map, 0, "last").parents == {"student"}
    with pytest.raises(ValueError, match="num_layers_to_patch=1: .* only 0 is possible"):
        layer_map.patched_layers(1, "last")


@pytest.mark.parametrize("k", [-1, 18])
def test_k_out_of_range_is_refused(k):
    layer_map = LayerMap(default_kept_layers(36, 2, 1, 2), 36)
    with pytest.raises(
        ValueError, match=f"num_layers_to_patch={k}: .* 17 patchable layers, choose 0-17"
    ):
        layer_map.patched_layers(k, "last")


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 2, 2), (0, 3, 1), (0, 6)])
def test_impossible_kept_layers_are_refused(kept):
    with pytest.raises(ValueError, match="must start at 0, increase, and stay below"):
        LayerMap(kept, 6)


def test_default_numbers_out_of_range_are_all_named():
    with pytest.raises(ValueError, match="alternate_every_n_layers=0.*last_layers_to_keep=7"):
        default_kept_layers(6, 0, 1, 7)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("4", [4]), ("1,3,5", [1, 3, 5]), ("0-5", [0, 1, 2, 3, 4, 5]), ("5, 1-2,1", [1, 2, 5])],
)
def test_sizes_by_name(text, sizes):
    assert parse_sizes(text, 5) == sizes
    assert parse_sizes("all", 5) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "1,,2", "1.5"])
def test_sizes_that_are_no_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"num_layers_to_patch=.*: write numbers and ranges"):
        parse_sizes(text, 5)


def test_sizes_beyond_the_teacher_are_refused():
    with pytest.raises(ValueError, match="num_layers_to_patch=3-6: .* choose 0-5"):
        parse_sizes("3-6", 5)
    assert parse_ranges("3-6,0", "kept_layers") == [3, 4, 5, 6, 0]

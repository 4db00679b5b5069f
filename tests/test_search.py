"""Searches against every nested family there is, on made-up measurements."""

import random
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patching.blocks import LayerMap
from patching.orders.search import all_sets, next_sets, order_of_sets, search


@st.composite
def layer_maps(draw) -> LayerMap:
    """Up to four patchable layers among single ones."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=2, max_size=7))
    while sum(length > 1 for length in lengths) > 4:
        lengths[next(i for i, length in enumerate(lengths) if length > 1)] = 1
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return LayerMap(tuple(starts), sum(lengths))


def is_joined(layer_map: LayerMap, patched: frozenset[int]) -> bool:
    """Whether each single-layer block of a set stands in a run with a patchable layer, by looking
    left and right.
    """

    def reaches(i: int, step: int) -> bool:
        while i in patched:
            if i in layer_map.patchable:
                return True
            i += step
        return False

    return all(reaches(i, 1) or reaches(i, -1) for i in patched)


def sets_of_sizes(layer_map: LayerMap) -> list[list[frozenset[int]]]:
    """By brute force: of sizes 1 to max - 1 all sets whose single layers are joined."""
    layers = range(len(layer_map.kept))
    subsets = [
        frozenset(chosen) for n in range(len(layers) + 1) for chosen in combinations(layers, n)
    ]
    return [
        [s for s in subsets if layer_map.num_patched(s) == k and is_joined(layer_map, s)]
        for k in range(1, layer_map.max_layers_to_patch)
    ]


def made_up(layer_map: LayerMap, seed: int) -> dict[frozenset[int], float]:
    draw = random.Random(seed)
    return {
        s: draw.random()
        for of_size in sets_of_sizes(layer_map)
        for s in sorted(of_size, key=sorted)
    }


@settings(max_examples=40, deadline=None)
@given(layer_maps(), st.integers(0, 99))
def test_without_a_bound_it_is_the_best_nested_family(layer_map, seed):
    kl = made_up(layer_map, seed)
    by_size = sets_of_sizes(layer_map)
    assert set(all_sets(layer_map)) == set().union(*by_size)
    nested = [family for family in product(*by_size) if all(a < b for a, b in pairwise(family))]
    best = min(nested, key=lambda family: sum(map(kl.get, family)))
    found = search(layer_map, lambda _: kl, beam=None)
    assert sum(map(kl.get, found)) == pytest.approx(sum(map(kl.get, best)))
    assert found in nested


@settings(max_examples=40, deadline=None)
@given(layer_maps(), st.integers(0, 99), st.integers(1, 3))
def test_an_order_has_the_sets_that_were_found(layer_map, seed, beam):
    kl = made_up(layer_map, seed)
    found = search(layer_map, lambda _: kl, beam)
    order = order_of_sets(layer_map, found)
    sizes = range(layer_map.max_layers_to_patch + 1)
    sets = [layer_map.patched_layers(k, order) for k in sizes]
    everything = frozenset(range(len(layer_map.kept)))
    if len(sets) > 1:
        assert sets == [frozenset(), *found, everything]


@settings(max_examples=40, deadline=None)
@given(layer_maps(), st.integers(0, 99))
def test_a_beam_of_one_takes_the_lowest_at_each_size(layer_map, seed):
    kl = made_up(layer_map, seed)
    asked = []

    def measure(sets):
        asked.append(set(sets))
        return {patched: kl[patched] for patched in sets}

    found = search(layer_map, measure)
    patched = frozenset()
    for k, of_size in enumerate(sets_of_sizes(layer_map)):
        candidates = [s for s in of_size if patched < s]
        assert asked[k] == set(candidates)
        patched = min(candidates, key=kl.get)
        assert found[k] == patched


def test_a_wider_beam_finds_what_the_greedy_one_misses():
    layer_map = LayerMap((0, 2, 4), 6)
    kl = {
        frozenset(layers): value
        for layers, value in (
            ((0,), 0.5), ((1,), 0.4), ((2,), 0.9), ((0, 1), 0.3), ((0, 2), 0.1), ((1, 2), 0.3),
        )
    }  # fmt: skip
    assert search(layer_map, lambda _: kl) == (frozenset({1}), frozenset({0, 1}))
    for beam in (2, None):
        assert search(layer_map, lambda _: kl, beam) == (frozenset({0}), frozenset({0, 2}))


def test_single_layers_join_runs():
    layer_map = LayerMap((0, 1, 3, 4, 5, 7), 8)  # patchable 1 and 4, single 0, 2, 3 and 5
    found = next_sets(layer_map, frozenset(), [1])
    runs = [{1}, {0, 1}, {1, 2}, {0, 1, 2}, {1, 2, 3}, {0, 1, 2, 3}]
    assert found == set(map(frozenset, runs))
    assert order_of_sets(layer_map, [frozenset({1, 2})]) == (2, 1, 0, 3, 5, 4)


def test_a_sequence_leaves_only_single_layers_to_decide():
    layer_map = LayerMap((0, 2, 4, 6, 7), 8)
    kl = made_up(layer_map, 0)
    found = search(layer_map, lambda _: kl, sequence=[2, 0, 1])
    assert [sorted(s & {0, 1, 2}) for s in found] == [[2], [0, 2]]
    ways = [frozenset({2, *singles}) for singles in ((), (3,), (3, 4))]
    assert found[0] == min(ways, key=kl.get)


def test_too_many_sets_are_refused(monkeypatch):
    llama_3b = LayerMap((0, *range(1, 28, 2)), 28)
    assert llama_3b.max_layers_to_patch == 13 and len(all_sets(llama_3b)) == 18_427
    monkeypatch.setattr("patching.orders.search.MOST_SETS", 500)
    with pytest.raises(ValueError, match="more than 500 sets"):
        all_sets(LayerMap(tuple(range(0, 60, 2)), 60))
    runs = [
        layer for start in range(0, 60, 5) for layer in (start, start + 2, start + 3, start + 4)
    ]
    with pytest.raises(ValueError, match="more than 500 sets"):
        all_sets(LayerMap(tuple(runs), 60))

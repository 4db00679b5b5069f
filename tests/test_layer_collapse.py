"""Layer collapse: the merge against a hand-written loop, the loop on constructed similarities."""

import copy
import random
from functools import cache

import pytest
import torch
from conftest import tiny_config, tiny_model
from patching_models import family_config

from patching.running.calibration import padded_batches
from patching.running.layer_collapse import (
    MOST_COMBINED,
    CollapsedLayer,
    CollapsedTeacher,
    collapse,
    collapse_once,
    collapsed_model,
    merge,
    similarity_on,
    unmerged,
)

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19], [20, 21, 22]]
LAYERS = {"qwen3": "model.layers", "gpt2": "transformer.h"}


def merged_by_hand(model, kind, first, num_merged):
    """The model with layers first + 1 .. first + num_merged merged into layer `first`."""
    model = copy.deepcopy(model)
    layers = model.get_submodule(LAYERS[kind])
    before = copy.deepcopy(layers)
    with torch.no_grad():
        for k in range(1, num_merged + 1):
            own, other = (dict(before[i].named_parameters()) for i in (first, first + k))
            for name, parameter in layers[first].named_parameters():
                parameter += other[name] - own[name]
    del layers[first + 1 : first + 1 + num_merged]
    model.config.num_hidden_layers -= num_merged  # what runs is the list of layers
    return model


def merged_at(num_layers, *merges):
    """The collapsed teacher after merges, each the position of its first layer and of its last."""
    layers = list(unmerged(num_layers).layers)
    for first, last in merges:
        layers[first : last + 1] = [merge(layers[first : last + 1])]
    return CollapsedTeacher(tuple(layers))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("merges", [[(2, 3)], [(1, 3)], [(3, 5), (1, 3)]])
def test_a_merged_layer_is_the_first_plus_all_differences_to_it(kind, merges):
    teacher = tiny_model(tiny_config(kind, 6))
    before = copy.deepcopy(teacher.state_dict())
    found = collapsed_model(merged_at(6, *merges), teacher)
    expected = teacher
    for first, last in merges:
        expected = merged_by_hand(expected, kind, first, last - first)
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(found(ids).logits, expected(ids, use_cache=False).logits)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
    # Layers that take no part are the teacher's own, and it is as it was.
    own, of_teacher = (dict(model.named_parameters()) for model in (found, teacher))
    shared = f"{LAYERS[kind]}.0."
    names = [name for name in own if name.startswith(shared)]
    assert names and all(own[name].data_ptr() == of_teacher[name].data_ptr() for name in names)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert found.config.num_hidden_layers == 6 - sum(last - first for first, last in merges)


def test_merging_one_layer_leaves_that_layer():
    """theta_l + (theta_{l+1} - theta_l): the simplest merge drops a layer."""
    one = merged_at(4, (1, 2)).layers[1]
    assert one == CollapsedLayer(1, ((2, 1),))
    two = merged_at(6, (1, 3)).layers[1]
    assert two == CollapsedLayer(1, ((1, -1), (2, 1), (3, 1)))
    assert str(two) == "- teacher 1 + teacher 2 + teacher 3"
    again = merged_at(6, (2, 5), (1, 2))
    assert str(again.layers[1]) == "- 2 x teacher 2 + teacher 3 + teacher 4 + teacher 5"
    assert again.to_dict() == {
        "embedding": "teacher",
        "layers": ["teacher 0", str(again.layers[1])],
        "norm_and_head": "teacher",
    }


def recorded(similarity):
    """A similarity that keeps the models it was asked about."""
    asked = []

    def of_model(collapsed):
        asked.append(collapsed)
        return similarity(collapsed)

    return of_model, asked


@pytest.mark.parametrize(
    ("num_combined", "depth", "merges"),
    [
        (4, 1, [(8, 11), (5, 8), (2, 5)]),  # after the first two, no lower than the top allows
        (4, 7, [(8, 11), (5, 7)]),  # the second merges two layers only, which is all there is to go
        (2, 8, [(10, 11), (8, 9), (6, 7), (4, 5)]),  # two layers down from one merge to the next
        (12, 1, [(0, 11)]),
    ],
)
def test_merges_that_are_similar_enough_stay(num_combined, depth, merges):
    similarity, asked = recorded(lambda collapsed: 0.9)
    found, below = collapse_once(12, depth, num_combined, 0.8, similarity)
    assert asked == [merged_at(12, *merges[: i + 1]) for i in range(len(merges))]
    assert found == asked[-1]
    assert below == -torch.inf
    assert all(sum(w for _, w in layer.weights) == 1 for layer in found.layers)


def test_merges_that_are_not_are_tried_one_layer_down():
    similarity, asked = recorded(lambda collapsed: 0.8 - 0.01 * (len(asked) - 1))
    found, below = collapse_once(12, 6, 4, 0.8, similarity)
    assert asked == [merged_at(12, (first, first + 3)) for first in range(8, -1, -1)]
    assert found == unmerged(12)
    assert below == 0.8  # the first one: at the threshold is not above it

    # The merge into layer 6 is the only one above it, and the next starts two layers down.
    similarity, asked = recorded(
        lambda collapsed: 0.9 if collapsed == merged_at(12, (6, 9)) else 0.1
    )
    found, below = collapse_once(12, 6, 4, 0.8, similarity)
    assert found == merged_at(12, (6, 9))
    starts = [(8, 11), (7, 10), (6, 9)]
    assert asked[:3] == [merged_at(12, start) for start in starts]
    assert asked[3:] == [merged_at(12, (6, 9), (first, first + 3)) for first in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("depth", [4, 6, 7])
def test_the_threshold_is_the_highest_that_reaches_the_depth(depth):
    @cache
    def similarity(collapsed):
        return random.Random(str(collapsed.layers)).random()

    found = collapse(8, depth, similarity)
    by_combined = {}
    for num_combined in range(2, min(MOST_COMBINED, 9 - depth) + 1):
        for step in range(2000, -1, -1):
            threshold = step / 2000
            model, _ = collapse_once(8, depth, num_combined, threshold, similarity)
            if model.depth == depth:
                by_combined[num_combined] = (threshold, model)
                break
    best = max(by_combined, key=lambda number: similarity(by_combined[number][1]))
    assert found.num_combined == best
    assert found.teacher == by_combined[best][1]
    assert 0 <= found.threshold - by_combined[best][0] < 1 / 2000
    assert found.similarity == similarity(found.teacher)


def test_a_depth_that_merges_cannot_reach_is_an_error():
    def similarity(collapsed):  # no merges but those of the last two layers
        return 0.5 if collapsed.depth == 5 else -torch.inf

    assert collapse(6, 5, similarity).teacher.depth == 5
    with pytest.raises(ValueError, match="6 layers cannot be merged into 4"):
        collapse(6, 4, similarity)


@torch.no_grad()
def test_similarity_is_the_mean_over_texts_of_one_cosine_each():
    teacher = tiny_model(tiny_config("qwen3", 4))
    similarity = similarity_on(teacher, padded_batches(ROWS))
    collapsed = merged_at(4, (1, 3))
    other = merged_by_hand(teacher, "qwen3", 1, 2)
    cosines = []
    for row in ROWS:
        a, b = (
            model.model(torch.tensor([row]), use_cache=False).last_hidden_state.flatten().double()
            for model in (teacher, other)
        )
        cosines.append((a @ b / (a.norm() * b.norm())).item())
    assert similarity(collapsed) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert similarity(unmerged(4)) == pytest.approx(1, abs=1e-6)


def test_layers_with_different_tensors_are_not_merged():
    teacher = tiny_model(family_config("qwen3_moe"))  # layers 1, 3 and 5 have experts
    similarity = similarity_on(teacher, padded_batches(ROWS))
    assert similarity(merged_at(6, (2, 3))) == -torch.inf
    assert similarity(unmerged(6)) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="cannot be merged into 4"):
        collapse(6, 4, similarity)

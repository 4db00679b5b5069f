"""Kept layers from similarities, against every choice there is."""

from itertools import combinations

import pytest
import torch

from patching.blocks import LayerMap
from patching.orders.kept_layers import mean_similarity, most_similar_layers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_layers", "num_kept", "longest"), [(7, 4, 3), (8, 4, 2), (9, 5, 9)])
def test_no_other_choice_is_better(seed, num_layers, num_kept, longest):
    torch.manual_seed(seed)
    similarity = torch.rand(num_layers + 1, num_layers + 1, dtype=torch.float64)
    chosen = most_similar_layers(similarity, num_kept, longest)
    maps = [
        LayerMap((0, *rest), num_layers)
        for rest in combinations(range(1, num_layers), num_kept - 1)
    ]
    maps = [m for m in maps if max(map(len, m.blocks)) <= longest]
    assert chosen in maps
    best = max(mean_similarity(m, similarity) for m in maps)
    assert mean_similarity(chosen, similarity) == pytest.approx(best, abs=1e-12)


def test_a_layer_unlike_the_others_stays_alone():
    """As the first of Llama: what follows it turns its state far."""
    num_layers = 8
    similarity = torch.full((num_layers + 1, num_layers + 1), 0.9, dtype=torch.float64)
    similarity[1, 2:] = similarity[2:, 1] = 0.1
    similarity.fill_diagonal_(1.0)
    chosen = most_similar_layers(similarity, 5, 2)
    assert chosen.kept[:2] == (0, 1)
    assert mean_similarity(chosen, similarity) == pytest.approx((2 * 1.0 + 3 * 0.9) / 5)


@pytest.mark.parametrize(
    ("num_kept", "longest", "allowed"), [(3, 2, "4-8"), (9, 3, "3-8"), (0, None, "1-8")]
)
def test_what_cannot_be_is_refused(num_kept, longest, allowed):
    with pytest.raises(ValueError, match=f"choose {allowed} layers$"):
        most_similar_layers(torch.eye(9), num_kept, longest)


@pytest.mark.parametrize(("num_kept", "longest"), [(8, 1), (7, 2), (4, 2), (3, 3), (1, 8)])
def test_blocks_are_no_longer_than_they_must_be(num_kept, longest):
    torch.manual_seed(0)
    similarity = torch.rand(9, 9)
    chosen = most_similar_layers(similarity, num_kept)
    assert chosen == most_similar_layers(similarity, num_kept, longest)
    assert max(map(len, chosen.blocks)) == longest

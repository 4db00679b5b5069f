"""Cosines of hidden states against the definition, token by token in float64."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from patching.running.calibration import padded_batches
from patching.running.similarity import last_states, mean_cosine, similarity_to_teacher

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20], [21, 22]]


@pytest.fixture(scope="module")
def models():
    return tiny_model(tiny_config("qwen3", 2), seed=1), tiny_model(tiny_config("qwen3", 4), seed=2)


@torch.no_grad()
def expected_cosine(models, depths) -> float:
    """The mean over tokens of the cosine, from states as transformers returns them."""
    cosines = []
    for row in ROWS:
        one, other = (
            model(torch.tensor([row]), output_hidden_states=True).hidden_states[depth][0].double()
            for model, depth in zip(models, depths)
        )
        cosines += [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(one, other)]
    return sum(cosines) / len(cosines)


def test_mean_cosine_is_over_tokens_and_after_the_final_norm(models):
    batches = padded_batches(ROWS)
    states, other_states = (last_states(model, batches) for model in models)
    assert [state.shape[:2] for state in states] == [b["input_ids"].shape for b in batches]
    found = mean_cosine(states, other_states, batches)
    assert found == pytest.approx(expected_cosine(models, (-1, -1)), abs=1e-6)
    assert found < 0.999
    assert mean_cosine(states, states, batches) == pytest.approx(1, abs=1e-6)


def test_similarity_to_teacher_compares_the_given_pairs(models):
    pairs = [(0, 0), (1, 2), (2, 4)]
    found = similarity_to_teacher(*models, pairs, padded_batches(ROWS))
    assert found == pytest.approx([expected_cosine(models, pair) for pair in pairs], abs=1e-6)
    batches = padded_batches(ROWS)
    assert found[-1] == mean_cosine(*(last_states(model, batches) for model in models), batches)


def test_no_text_is_an_error(models):
    with pytest.raises(ValueError, match="no text"):
        mean_cosine([], [], [])
    with pytest.raises(ValueError, match="no text"):
        similarity_to_teacher(*models, [(0, 0)], [])

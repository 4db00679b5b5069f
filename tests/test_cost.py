"""Similarity to the teacher, bytes and speed of a model."""

import pytest
import torch
from conftest import save_pair, tiny_config, tiny_model

from evaluate.cost import LiveTensors, cost_of, weights_bytes
from patching.patch import build_intermediate_model
from patching.running.calibration import padded_batches
from patching.running.similarity import last_states, mean_cosine

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]


@torch.no_grad()
def test_similarity_is_the_mean_cosine_after_the_final_norm(tmp_path):
    names = [str(path) for path in save_pair(tmp_path)]
    teacher, student = (build_intermediate_model(*names, k)[0] for k in (2, 0))
    batches = padded_batches(ROWS)
    teacher_states = last_states(teacher, batches)
    assert mean_cosine(teacher_states, teacher_states, batches) == pytest.approx(1, abs=1e-6)
    cosines = []
    for row in ROWS:
        ids = torch.tensor([row])
        pair = (
            model(ids, output_hidden_states=True).hidden_states[-1][0].double()
            for model in (student, teacher)
        )
        cosines += [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(*pair)]
    found = mean_cosine(last_states(student, batches), teacher_states, batches)
    assert found == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert found < 0.999


def test_a_tied_matrix_counts_once():
    tied, untied = (tiny_model(tiny_config(f"qwen3-{tying}", 2)) for tying in ("tied", "untied"))
    head = untied.get_output_embeddings().weight
    assert weights_bytes(untied) - weights_bytes(tied) == head.numel() * 4
    cost = cost_of(tied)
    assert cost.weights_bytes == weights_bytes(tied)
    assert cost.tokens_per_second > 0
    logits_bytes = cost.rows * cost.tokens_per_row * tied.config.vocab_size * 4
    assert logits_bytes < cost.peak_beyond_weights_bytes < 20 * logits_bytes


def test_live_tensors_are_counted_while_they_live():
    x = torch.ones(1000)
    with LiveTensors() as live:
        y = x + 1
        z = y.view(10, 100).t() * 2  # a view is not new memory
        assert live.num_bytes == 8000
        del y
        assert live.num_bytes == 4000
        w = z.clone()
        x.add_(1)
        del z, w
    assert (live.num_bytes, live.peak_bytes) == (0, 8000)

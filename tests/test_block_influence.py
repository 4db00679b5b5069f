"""Block influence against hidden states as transformers returns them."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import nn

from patching.assemble import assemble
from patching.recipe import LayerSource
from patching.running.block_influence import block_influence, most_influential
from patching.running.calibration import padded_batches

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_influence_is_one_minus_the_mean_cosine(kind):
    num_layers = 4
    model = tiny_model(tiny_config(kind, num_layers))
    found = block_influence(model, padded_batches(ROWS))

    norm = {"gpt_neox": "gpt_neox.final_layer_norm", "gpt2": "transformer.ln_f"}
    model.set_submodule(norm.get(kind, "model.norm"), nn.Identity())  # the last state as written
    cosines = [[] for _ in range(num_layers)]
    for row in ROWS:
        states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(num_layers):
            for read, written in zip(states[layer][0].double(), states[layer + 1][0].double()):
                cosines[layer].append((read @ written / (read.norm() * written.norm())).item())
    expected = [1 - sum(of_layer) / len(of_layer) for of_layer in cosines]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_layer_that_changes_nothing_has_none_and_goes_first():
    model = tiny_model(tiny_config("qwen3", 4))
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    influences = block_influence(model, padded_batches(ROWS))
    assert influences[2] == pytest.approx(0, abs=1e-6)
    recipe = most_influential(influences, 3)
    assert recipe.layers == tuple(LayerSource("teacher", layer) for layer in (0, 1, 3))
    pruned = assemble(recipe, teacher=model)
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits)


def test_the_least_influential_layers_are_left_out():
    influences = [0.5, 0.1, 0.3, 0.1, 0.9]
    kept = [
        [layer for _, layer, _ in most_influential(influences, depth).layers] for depth in (4, 3)
    ]
    assert kept == [[0, 1, 2, 4], [0, 2, 4]]
    assert most_influential(influences, 5).parents == {"teacher"}


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        block_influence(tiny_model(tiny_config("qwen3", 2)), [])

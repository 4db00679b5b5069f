"""Compiled layers stay compiled, however many kinds of layers and batches there are."""

import pytest
import torch
from conftest import tiny_model
from patching_models import family_config
from torch._dynamo.utils import counters
from training_runs import trainer_for

from patching.blocks import LayerMap, default_kept_layers

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer_types", "num_kept"), [([SLIDING, FULL] * 2, 3), ([*[SLIDING] * 3, FULL] * 8, 17)]
)
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=1)
def test_mixed_attention_never_runs_eagerly(tmp_path, layer_types, num_kept):
    """Each kind of attention is compiled for student and teacher, with and without gradients, and
    with and without a mask. Beyond dynamo's limit, here 1, it would go on without compiling. The
    second model has the layers of OLMo 3 with 7 billion parameters, and no more variants.
    """
    torch._dynamo.reset()
    counters.clear()
    num_layers = len(layer_types)
    config = family_config("olmo3", num_hidden_layers=num_layers, layer_types=layer_types)
    layer_map = LayerMap(default_kept_layers(num_layers, 2, 1, 2), num_layers)
    assert len(layer_map.kept) == num_kept
    flags = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    flags |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(tmp_path, tiny_model(config), layer_map, **flags)
    trainer.train()
    assert trainer.state.global_step == 4
    print(num_layers, dict(counters["frames"]), dict(counters["stats"]))
    assert not counters["unimplemented"] and not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]

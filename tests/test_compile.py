"""Compiled layers stay compiled, however many kinds of layers and batches there are."""

import pytest
import torch
from conftest import tiny_model
from patching_models import family_config
from training_runs import trainer_for

KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.slow
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=1)
def test_mixed_attention_never_runs_eagerly(tmp_path):
    """Each kind of attention is compiled for student and teacher, with and without gradients, and
    with and without a mask. Beyond dynamo's limit, here 1, it would go on without compiling.
    """
    torch._dynamo.reset()
    teacher = tiny_model(family_config("olmo3", num_hidden_layers=4, layer_types=KINDS * 2))
    flags = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    trainer = trainer_for(tmp_path, teacher, eval_strategy="steps", eval_steps=1, **flags)
    trainer.train()
    assert trainer.state.global_step == 4

"""What models do to the output of their heads, against their own logits and their own loss."""

import pytest
import torch
from conftest import tiny_model, trained_student
from patching_models import BASE, GATED, LAYER_MAP, SETTINGS, family_config, family_pair
from transformers import CONFIG_MAPPING

from patching.architectures.models import empty_model
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import patched_model
from patching.running.hidden_states import before_output_embeddings
from patching.running.logits import UNCHANGED, LogitChange, logit_change
from patching.running.teacher_kl import TeacherKL
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count

EXPECTED = {"gemma2": LogitChange(soft_cap=5.0), "granite": LogitChange(scale=0.5)}
OUTSIDE = {
    "cohere": (GATED | {"logit_scale": 0.25}, LogitChange(scale=0.25)),
    "falcon_h1": (
        GATED | {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 8},
        LogitChange(scale=0.3),
    ),
    "hyperclovax": (GATED | {"logits_scaling": 8.0}, LogitChange(scale=8.0)),
    "nanochat": (GATED | {"final_logit_softcapping": 7.0}, LogitChange(soft_cap=7.0)),
    "recurrent_gemma": (
        GATED | {"num_key_value_heads": 1, "logits_soft_cap": 4.0},
        LogitChange(soft_cap=4.0),
    ),
    "olmoe": (GATED | {"num_experts": 4, "num_experts_per_tok": 2}, UNCHANGED),
}
TOKENS = torch.arange(20)[None] * 7 % 257


@torch.no_grad()
def assert_are_the_models_logits(model, change):
    states_BTD = model.base_model(TOKENS, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    found = change.apply_(head(before_output_embeddings(model, states_BTD)))
    torch.testing.assert_close(found, model(TOKENS, use_cache=False).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_every_architecture_in_the_table(model_type):
    model = tiny_model(family_config(model_type))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change = logit_change(model)
    assert change == EXPECTED.get(model_type, UNCHANGED)
    assert change == logit_change(empty_model(model.config))
    assert_are_the_models_logits(model, change)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", OUTSIDE)
def test_architectures_without_a_row(model_type):
    settings, expected = OUTSIDE[model_type]
    # Four layers, because recurrent_gemma lists the three kinds of layers that it repeats.
    model = tiny_model(CONFIG_MAPPING[model_type](num_hidden_layers=4, **settings))
    assert logit_change(model) == expected
    assert_are_the_models_logits(model, expected)


def test_a_head_that_reads_scaled_states_is_refused():
    settings = {"intermediate_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16}
    config = CONFIG_MAPPING["minicpm3"](num_hidden_layers=2, dim_model_base=8, **BASE, **settings)
    with pytest.raises(ValueError, match="^model_type=minicpm3: its logits are not those of its"):
        logit_change(empty_model(config))


def test_a_cap_that_the_model_does_not_apply_is_noticed(monkeypatch):
    model = tiny_model(family_config("gemma2"))
    forward = type(model).forward

    def wrong(self, *arguments, **settings):
        output = forward(self, *arguments, **settings)
        output.logits = output.logits + output.logits.square() / 100
        return output

    monkeypatch.setattr(type(model), "forward", wrong)
    with pytest.raises(ValueError, match=r"\(final_logit_softcapping=5.0\)"):
        logit_change(model)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_distillation_uses_the_models_own_logits(model_type):
    teacher, student = family_pair(model_type)
    labels = TOKENS % 200
    expected = trained_student(teacher, LAYER_MAP)  # another copy, whose forward stays its own
    logits_S, logits_T = (m(labels).logits[0, :-1].double() for m in (expected, teacher))
    targets = labels[0, 1:]
    cross_entropy = torch.nn.functional.cross_entropy(logits_S, targets)
    q = (logits_T.detach() / 2).softmax(-1)
    kl = (q * (q.log() - (logits_S / 2).log_softmax(-1))).sum(-1).mean()
    (cross_entropy + 0.3 * 4 * kl).backward()

    install_distillation_forward(
        student, teacher, LAYER_MAP, LossWeights(1.0, kl=0.3, cosine=0.0, temperature=2.0)
    )
    student.train()
    terms = student(labels, labels, count(labels))
    terms.loss.backward()
    assert terms.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert terms.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    theirs = dict(expected.named_parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name
        )


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["cohere", "falcon_h1", "recurrent_gemma"])
def test_kl_from_the_teacher_is_that_of_the_models_own_logits(model_type):
    settings, _ = OUTSIDE[model_type]
    layer_map = LayerMap((0, 1, 2, 3), 6)  # recurrent_gemma repeats three kinds of layers
    teacher = tiny_model(CONFIG_MAPPING[model_type](num_hidden_layers=6, **settings))
    student = trained_student(teacher, layer_map)
    recipe = patched_model(layer_map, frozenset({3}))
    batches = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}]
    measure = TeacherKL(teacher=teacher, student=student, batches=batches)
    model = assemble(recipe, teacher=teacher, student=student)
    p, q = (m(TOKENS, use_cache=False).logits[0].double().log_softmax(-1) for m in (model, teacher))
    expected = (q.exp() * (q - p)).sum(-1).mean().item()
    assert measure.of({"it": recipe})["it"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected > 1e-3

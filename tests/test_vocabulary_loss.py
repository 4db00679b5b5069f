"""The chunked loss against the formula written out in float64."""

import pytest
import torch
from torch import nn

import train.vocabulary_loss
from patching.running.chunks import even_slices
from patching.running.logits import UNCHANGED, LogitChange
from train.vocabulary_loss import vocabulary_loss


def naive(
    student_hidden_ND,
    student_weight_VD,
    targets_N,
    teacher_hidden_ND,
    teacher_weight_VD,
    temperature,
    change,
):
    """CE and KL sums from the definition, in float64."""
    student_logits_NV = student_hidden_ND.double() @ student_weight_VD.double().T
    teacher_logits_NV = teacher_hidden_ND.double() @ teacher_weight_VD.double().T
    student_logits_NV, teacher_logits_NV = (
        change.soft_cap * torch.tanh(change.scale * logits / change.soft_cap)
        if change.soft_cap
        else change.scale * logits
        for logits in (student_logits_NV, teacher_logits_NV)
    )
    p_NV = student_logits_NV.softmax(-1)
    cross_entropy = -p_NV[torch.arange(len(targets_N)), targets_N].log().sum()
    q_student_NV = (student_logits_NV / temperature).softmax(-1)
    q_teacher_NV = (teacher_logits_NV / temperature).softmax(-1)
    kl = (q_teacher_NV * (q_teacher_NV / q_student_NV).log()).sum()
    return cross_entropy, kl


@pytest.fixture
def heads_and_states():
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(8, 50, bias=False), nn.Linear(8, 50, bias=False)
    student_hidden_ND = torch.randn(23, 8, requires_grad=True)
    return (
        student_hidden_ND,
        student_head,
        torch.randint(0, 50, (23,)),
        torch.randn(23, 8),
        teacher_head,
    )


@pytest.mark.parametrize("chunk_logits", [1, 50 * 5, 2**25])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.1), (1.0, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("change", [UNCHANGED, LogitChange(2.0), LogitChange(3.0, soft_cap=1.5)])
def test_values_and_gradients_equal_the_formula(
    monkeypatch, heads_and_states, chunk_logits, temperature, weights, change
):
    monkeypatch.setattr(train.vocabulary_loss, "CHUNK_LOGITS", chunk_logits)
    hidden_ND, head, targets_N, teacher_hidden_ND, teacher_head = heads_and_states
    cross_entropy_weight, kl_weight = weights
    terms = vocabulary_loss(
        hidden_ND,
        head,
        targets_N,
        teacher_hidden_ND,
        teacher_head,
        cross_entropy_weight=cross_entropy_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        logit_change=change,
    )
    (3 * terms.loss).backward()
    gradients = [hidden_ND.grad.clone(), head.weight.grad.clone()]
    hidden_ND.grad = head.weight.grad = None
    assert teacher_head.weight.grad is None

    cross_entropy, kl = naive(
        hidden_ND,
        head.weight,
        targets_N,
        teacher_hidden_ND,
        teacher_head.weight,
        temperature,
        change,
    )
    loss = cross_entropy_weight * cross_entropy + kl_weight * kl
    (3 * loss).backward()
    torch.testing.assert_close(terms.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        terms.cross_entropy.double(), cross_entropy * (cross_entropy_weight > 0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(terms.kl.double(), kl * (kl_weight > 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, [hidden_ND.grad, head.weight.grad], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [0, 1, 7, 441, 1365])
def test_even_slices_leave_no_short_rest(step):
    for length in (0, 1, 5, 441, 4096):
        found = [*even_slices(length, step)]
        assert [i for of in found for i in range(length)[of]] == [*range(length)]
        lengths = [of.stop - of.start for of in found]
        assert max(lengths, default=0) <= max(1, 1.1 * step)
        assert all(max(lengths) - part < len(lengths) for part in lengths)
    assert len([*even_slices(4096, 1365)]) == 3


def test_autocast_gradients_survive_several_chunks(monkeypatch, heads_and_states):
    hidden_ND, head, targets_N, teacher_hidden_ND, teacher_head = heads_and_states
    gradients = []
    for chunk_logits in (50 * 5, 2**25):
        monkeypatch.setattr(train.vocabulary_loss, "CHUNK_LOGITS", chunk_logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = vocabulary_loss(
                hidden_ND,
                head,
                targets_N,
                teacher_hidden_ND,
                teacher_head,
                cross_entropy_weight=1.0,
                kl_weight=0.1,
            )
        gradients.append(torch.autograd.grad(terms.loss, [hidden_ND, head.weight]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=0.02)


def test_no_gradient_is_formed_under_no_grad(heads_and_states):
    hidden_ND, head, targets_N, teacher_hidden_ND, teacher_head = heads_and_states
    with torch.no_grad():
        terms = vocabulary_loss(
            hidden_ND,
            head,
            targets_N,
            teacher_hidden_ND,
            teacher_head,
            cross_entropy_weight=1.0,
            kl_weight=1.0,
        )
    assert not terms.loss.requires_grad


def test_kl_without_a_teacher_is_refused(heads_and_states):
    hidden_ND, head, targets_N, _, _ = heads_and_states
    with pytest.raises(ValueError, match="KL term needs the teacher"):
        vocabulary_loss(hidden_ND, head, targets_N, cross_entropy_weight=1.0, kl_weight=1.0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_passes_compute_the_same(heads_and_states, backend):
    hidden_ND, head, targets_N, teacher_hidden_ND, teacher_head = heads_and_states
    results = []
    for compile_backend in (None, backend):
        terms = vocabulary_loss(
            hidden_ND,
            head,
            targets_N,
            teacher_hidden_ND,
            teacher_head,
            cross_entropy_weight=1.0,
            kl_weight=0.5,
            temperature=2.0,
            logit_change=LogitChange(2.0, soft_cap=1.5),
            compile_backend=compile_backend,
        )
        results.append((terms, torch.autograd.grad(terms.loss, [hidden_ND, head.weight])))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_tokens_without_a_target_count_for_nothing(heads_and_states):
    hidden_ND, head, targets_N, teacher_hidden_ND, teacher_head = heads_and_states
    has_target_N = torch.arange(len(targets_N)) % 3 > 0
    chosen = (hidden_ND[has_target_N], targets_N[has_target_N], teacher_hidden_ND[has_target_N])
    whole = (hidden_ND, targets_N.masked_fill(~has_target_N, -100), teacher_hidden_ND)
    results = []
    for student_ND, targets, teacher_ND in (chosen, whole):
        terms = vocabulary_loss(
            student_ND,
            head,
            targets,
            teacher_ND,
            teacher_head,
            cross_entropy_weight=1.0,
            kl_weight=0.5,
            temperature=2.0,
        )
        results.append((terms, torch.autograd.grad(terms.loss, [hidden_ND, head.weight])))
    torch.testing.assert_close(*results)

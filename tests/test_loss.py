"""The distillation loss against its definition in float64."""

import pytest
import torch
from torch import nn

from train.loss import (
    IGNORED_LABEL,
    LossTerms,
    LossWeights,
    StepCounts,
    cosine_distance,
    count,
    distillation_loss,
    targets_at,
)

B, T, D, V, PAIRS = 3, 7, 8, 31, 4


def naive_loss(student_states, teacher_states, student_head, teacher_head, labels_BT, weights):
    """The formula, term by term and token by token."""
    cross_entropy = kl = cosine = 0.0
    targets = positions = 0
    for b in range(B):
        for t in range(T):
            if labels_BT[b, t] == IGNORED_LABEL:
                continue
            positions += 1
            for student_BTD, teacher_BTD in zip(student_states, teacher_states):
                s, u = student_BTD[b, t].double(), teacher_BTD[b, t].double()
                cosine += (1 - s @ u / (s.norm() * u.norm())) / PAIRS
            if t + 1 == T or labels_BT[b, t + 1] == IGNORED_LABEL:
                continue
            targets += 1
            z_student = student_head.weight.double() @ student_states[-1][b, t].double()
            z_teacher = teacher_head.weight.double() @ teacher_states[-1][b, t].double()
            p = z_student.softmax(-1)
            cross_entropy -= p[labels_BT[b, t + 1]].log()
            q_student = (z_student / weights.temperature).softmax(-1)
            q_teacher = (z_teacher / weights.temperature).softmax(-1)
            kl += (q_teacher * (q_teacher.log() - q_student.log())).sum()
    cross_entropy, kl, cosine = cross_entropy / targets, kl / targets, cosine / positions
    loss = (
        weights.cross_entropy * cross_entropy
        + weights.kl * weights.temperature**2 * kl
        + weights.cosine * cosine
    )
    return loss, cross_entropy, kl, cosine


def loss_of(
    student_states, teacher_states, student_head, teacher_head, labels_BT, weights, counts
) -> LossTerms:
    """The loss from all aligned states at once, while training compares them one by one."""
    distances = [
        cosine_distance(student_BTD, teacher_BTD, labels_BT != IGNORED_LABEL)
        for student_BTD, teacher_BTD in zip(student_states, teacher_states)
    ]
    targets_BT = targets_at(labels_BT, is_masked_model=False)
    is_target_BT = targets_BT >= 0
    return distillation_loss(
        student_states[-1][is_target_BT],
        teacher_states[-1][is_target_BT],
        student_head,
        teacher_head,
        targets_BT[is_target_BT],
        distances,
        weights,
        counts,
    )


@pytest.fixture
def batch():
    torch.manual_seed(0)
    student_states = [torch.randn(B, T, D, requires_grad=True) for _ in range(PAIRS)]
    teacher_states = [torch.randn(B, T, D) for _ in range(PAIRS)]
    heads = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    labels_BT = torch.randint(0, V, (B, T))
    labels_BT[1, 4:] = IGNORED_LABEL
    labels_BT[2, 1:] = IGNORED_LABEL  # a row without any target
    return student_states, teacher_states, *heads, labels_BT


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(1.0, 0.1, 2.0, 1.0),
        LossWeights(1.0, 0.5, 2.0, 3.0),
        LossWeights(1.0, 0.0, 0.0, 1.0),
        LossWeights(0.0, 0.3, 0.0, 2.0),
        LossWeights(0.0, 0.0, 10.0, 1.0),
    ],
)
def test_loss_and_gradients_equal_the_definition(batch, weights):
    student_states, _, student_head, _, labels_BT = batch
    leaves = [*student_states, student_head.weight]
    terms = loss_of(*batch, weights, count(labels_BT))
    gradients = torch.autograd.grad(terms.loss, leaves, allow_unused=True, materialize_grads=True)
    loss, cross_entropy, kl, cosine = naive_loss(*batch, weights)
    expected = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for term, value, weight in zip(terms[1:], (cross_entropy, kl, cosine), weights):
        torch.testing.assert_close(term.double(), value * (weight > 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_counts_are_real_next_tokens_and_real_positions(batch):
    assert [int(value) for value in count(batch[-1])] == [6 + 3 + 0, 7 + 4 + 1]


def test_padding_changes_nothing(batch):
    *states, labels_BT = batch
    weights = LossWeights(1.0, 0.1, 2.0, 1.0)

    def padded(state_BTD):
        return torch.cat([state_BTD, torch.full((B, 5, D), 3.0)], dim=1)

    student_states, teacher_states, *heads = states
    more_labels = torch.cat([labels_BT, torch.full((B, 5), IGNORED_LABEL)], dim=1)
    with_padding = loss_of(
        [padded(s) for s in student_states],
        [padded(s) for s in teacher_states],
        *heads,
        more_labels,
        weights,
        count(more_labels),
    )
    without = loss_of(*batch, weights, count(labels_BT))
    torch.testing.assert_close(with_padding, without)


def test_shares_of_micro_batches_add_up(batch):
    student_states, teacher_states, *heads, labels_BT = batch
    weights = LossWeights(1.0, 0.1, 2.0, 1.5)
    counts = count(labels_BT)
    parts = [
        loss_of(
            [s[b : b + 1] for s in student_states],
            [s[b : b + 1] for s in teacher_states],
            *heads,
            labels_BT[b : b + 1],
            weights,
            counts,
        )
        for b in range(B)
    ]
    whole = loss_of(*batch, weights, counts)
    for part, total in zip(zip(*parts), whole):
        torch.testing.assert_close(sum(part), total)


def test_cosine_alone_runs_no_head(batch):
    student_states, teacher_states, *_, labels_BT = batch

    def head(_):
        raise AssertionError("a head was run")

    counts = StepCounts(torch.tensor(9), torch.tensor(12))
    terms = loss_of(
        student_states,
        teacher_states,
        head,
        head,
        labels_BT,
        LossWeights(0.0, 0.0, 2.0, 1.0),
        counts,
    )
    assert terms.cosine > 0
    assert terms.cross_entropy == terms.kl == 0

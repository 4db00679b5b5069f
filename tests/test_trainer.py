"""Training: how a step is split changes nothing, the teacher is not modified, and held-out means
are exact.
"""

import copy
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file
from training_runs import LAYER_MAP, log_of, teacher_of, trainer_for

from patching.running.hidden_states import hidden_states_at
from train import distillation
from train.batches import StepPrefetcher, collate
from train.loss import cosine_distance
from train.student import cast_parameters, new_student
from train.trainer import DistillationTrainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3-tied", "bert"])
def test_accumulation_does_not_change_the_trajectory(tmp_path, kind):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        trainer = trainer_for(
            tmp_path,
            kind,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            kl_loss_weight=0.5,
        )
        trainer.train()
        log = log_of(trainer)
        assert len(log) == 3
        runs.append((log, trainer.model.state_dict()))
    (reference_log, reference_weights), *others = runs
    assert len({line["loss"] for line in reference_log}) == 3
    for log, weights in others:
        for line, expected in zip(log, reference_log):
            for term in ("loss", "cross_entropy", "kl", "cosine", "grad_norm"):
                assert line[term] == pytest.approx(expected[term], rel=1e-4), term
        for name, tensor in weights.items():
            if name.endswith("key.bias"):
                continue  # affects no probability: its gradient is rounding, which AdamW amplifies
            torch.testing.assert_close(tensor, reference_weights[name], rtol=1e-3, atol=1e-4)


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_terms(tmp_path):
    trainer = trainer_for(
        tmp_path, temperature=2.0, kl_loss_weight=0.5, logging_steps=2, max_steps=4
    )
    trainer.train()
    lines = log_of(trainer)
    assert len(lines) == 2
    for line in lines:
        weighted = line["cross_entropy"] + 0.5 * 4 * line["kl"] + 2.0 * line["cosine"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


def test_training_changes_the_student_and_not_the_teacher(tmp_path):
    teacher = teacher_of("gpt_neox-untied")
    trainer = trainer_for(tmp_path, teacher, max_steps=2)
    before, start = (copy.deepcopy(model.state_dict()) for model in (teacher, trainer.model))
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(
        not torch.equal(tensor, start[name]) for name, tensor in trainer.model.state_dict().items()
    )


@pytest.mark.parametrize("kind", ["qwen3-tied", "bert"])
def test_held_out_means_do_not_depend_on_the_batch_size(tmp_path, kind):
    metrics = [
        trainer_for(tmp_path, kind, per_device_eval_batch_size=size).evaluate()
        for size in (1, 3, 7)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert metrics[0] == pytest.approx(metrics[2], rel=1e-5)


def test_held_out_means_are_exact(tmp_path):
    trainer = trainer_for(tmp_path)
    student = new_student(teacher_of("qwen3-tied"), LAYER_MAP)
    total, targets = 0.0, 0
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        log_p = student(ids).logits.double().log_softmax(-1)
        total -= log_p[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
        targets += ids.shape[1] - 1
    assert trainer.evaluate()["eval_cross_entropy"] == pytest.approx(total / targets, rel=1e-5)


@pytest.mark.parametrize("tying", ["tied", "untied"])
def test_cosine_alone_does_not_train_an_untied_head(tmp_path, tying):
    trainer = trainer_for(tmp_path, f"qwen3-{tying}", use_cross_entropy=False, use_kl_loss=False)
    head = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, head) == (tying == "untied")
    line = log_of(trainer)[0]
    assert line["loss"] == pytest.approx(2.0 * line["cosine"], rel=1e-5)
    assert "cross_entropy" not in line
    assert "kl" not in line


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        pytest.param(
            {
                "torch_compile": True,
                "torch_compile_backend": "aot_eager",
                "activation_checkpointing": True,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_speed_options_change_no_number(tmp_path, changes):
    logs, weights = [], []
    for settings in ({}, changes):
        trainer = trainer_for(tmp_path, **settings)
        trainer.train()
        logs.append(log_of(trainer))
        trainer.save_student(tmp_path / "student", torch.float32)
        weights.append(load_file(tmp_path / "student" / "model.safetensors"))
    for line, expected in zip(*logs):
        for term in ("loss", "cross_entropy", "kl", "cosine", "grad_norm"):
            assert line[term] == pytest.approx(expected[term], rel=1e-5), term
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_log_lines_report_speed_and_padding(tmp_path):
    trainer = trainer_for(tmp_path, logging_steps=2, max_steps=4, eval_strategy="no")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    lines = log_of(trainer)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert all(line["tokens_per_second"] > 2 * 8 * min(lengths) / seconds for line in lines)
    assert all(0 < line["padding_share"] < 1 for line in lines)
    assert all(line["flops_per_second"] > 0 and line["peak_memory_gib"] > 0 for line in lines)
    assert trainer.state.total_flos > 0


def test_the_next_micro_batches_are_fetched_while_a_step_computes(tmp_path, monkeypatch):
    fetched = threading.Semaphore(0)
    fetch, compute_loss = StepPrefetcher._fetch, DistillationTrainer.compute_loss

    def counted(*args):
        batches = fetch(*args)
        fetched.release()
        return batches

    def only_once_the_next_are_there(self, *args, **kwargs):
        if self.state.global_step == 0:
            fetched.acquire()  # those of this step
        assert fetched.acquire(timeout=20)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(StepPrefetcher, "_fetch", counted)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", only_once_the_next_are_there)
    trainer = trainer_for(tmp_path, eval_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 3


def test_held_out_cross_entropy_and_kl_are_measured_even_if_training_has_them_off(tmp_path):
    whole = trainer_for(tmp_path).evaluate()
    cosine_alone = trainer_for(tmp_path, use_cross_entropy=False, use_kl_loss=False).evaluate()
    for name in ("eval_cross_entropy", "eval_kl", "eval_cosine"):
        assert cosine_alone[name] == pytest.approx(whole[name], rel=1e-5)
    assert cosine_alone["eval_loss"] == pytest.approx(2 * whole["eval_cosine"], rel=1e-5)


def test_the_teachers_states_are_freed_as_they_are_compared(tmp_path, monkeypatch):
    """Only one of them is alive at each comparison."""
    alive = []

    def compare(student_BTD, teacher_BTD, is_real_BT, compile_backend):
        alive.append(weakref.ref(teacher_BTD))
        counts.append(sum(reference() is not None for reference in alive))
        return cosine_distance(student_BTD, teacher_BTD, is_real_BT, compile_backend)

    counts = []
    monkeypatch.setattr(distillation, "cosine_distance", compare)
    trainer_for(tmp_path, max_steps=1, eval_strategy="no").train()
    assert max(counts) == 1
    assert len(counts) == len(LAYER_MAP.alignment_pairs)


def test_hidden_states_are_those_of_transformers():
    for kind in ("llama-tied", "gpt_neox-untied", "gpt2"):
        model = teacher_of(kind)
        batch = collate([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            states = hidden_states_at(model, [0, 2, 3, 4], ids, mask)
        for state, j in zip(states, (0, 2, 3, 4)):
            assert torch.equal(state, expected[j])


def test_random_initialization_has_the_shapes_and_none_of_the_weights():
    teacher = teacher_of("llama-untied")
    kept, drawn = (new_student(teacher, LAYER_MAP, random) for random in (False, True))
    assert drawn.config.num_hidden_layers == 3
    for name, tensor in kept.state_dict().items():
        assert drawn.state_dict()[name].shape == tensor.shape
        assert not torch.equal(drawn.state_dict()[name], tensor) or "norm" in name
    assert kept.model.embed_tokens.weight.data_ptr() != teacher.model.embed_tokens.weight.data_ptr()


def test_casting_leaves_rotary_frequencies_in_fp32():
    teacher = teacher_of("llama-untied")
    frequencies = teacher.model.rotary_emb.inv_freq.clone()
    cast_parameters(teacher, torch.bfloat16)
    assert teacher.dtype == torch.bfloat16
    assert torch.equal(teacher.model.rotary_emb.inv_freq, frequencies)
    student = new_student(teacher, LAYER_MAP)
    assert student.dtype == torch.float32

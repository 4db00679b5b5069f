"""What a run reports while it trains: tokens, speed, time left, cosine by depth and memory."""

from types import SimpleNamespace

import matplotlib.axes
import pytest
import torch
from training_runs import LAYER_MAP, log_of, trainer_for
from transformers import TrainerState

from train import hardware_peak, log_line
from train.hardware_peak import measured_flops_per_second, peak_flops_per_second
from train.log_line import LogLine
from train.loss import CONTEXT
from train.plot import plot_terms

CPU = torch.device("cpu")


def test_a_line_says_how_far_and_how_fast(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=6, logging_steps=2, eval_strategy="steps")
    trainer.train()
    lines = log_of(trainer)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert 0 < lines[0]["tokens_seen"] < lines[1]["tokens_seen"] < lines[2]["tokens_seen"]
    assert lines[2]["tokens_seen"] <= sum(lengths)  # six of eight steps of one pass
    assert trainer.state.num_input_tokens_seen == lines[2]["tokens_seen"]
    assert lines[2]["eta_seconds"] == 0
    for line in lines:
        pairs = [line[f"cosine_{j}"] for j in range(len(LAYER_MAP.alignment_pairs))]
        assert sum(pairs) / len(pairs) == pytest.approx(line["cosine"], rel=1e-5)
        assert pairs[0] < min(pairs[1:])  # the embedding starts as the teacher's
        assert line["mfu"] > 0
        assert line["peak_memory_gib"] == line["least_peak_memory_gib"] > 0
        assert line["grad_norm"] > 0
    assert f"cosine_{len(pairs)}" not in lines[0]


def test_every_token_is_counted_once_over_a_pass(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=8, logging_steps=3)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert trainer.state.num_input_tokens_seen <= sum(lengths)
    trainer.log_line.count_tokens(trainer.state)
    assert trainer.state.num_input_tokens_seen == sum(lengths)


def test_tokens_are_counted_across_checkpoints(tmp_path):
    counted = {}
    for name, steps, resumed in (("whole", 4, None), ("part", 3, None), ("part", 4, "last")):
        trainer = trainer_for(tmp_path / name, max_steps=steps, save_strategy="steps", save_steps=3)
        checkpoint = str(tmp_path / "part/checkpoints/checkpoint-3") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        counted[name] = log_of(trainer)[-1]["tokens_seen"]
    assert counted["part"] == counted["whole"]


def test_an_interrupted_step_does_not_count():
    line, state = LogLine([], 0, CPU, lambda: 1.0), TrainerState()
    line.start(state)
    line.add_positions(0, torch.tensor(9), torch.tensor(10), torch.tensor(10))
    line.count_tokens(state)
    assert state.num_input_tokens_seen == 0
    state.global_step = 1
    line.count_tokens(state)
    line.count_tokens(state)
    assert state.num_input_tokens_seen == 10


def test_memory_time_and_share_of_the_peak_are_those_of_all_ranks(monkeypatch):
    clock = iter([100.0, 100.0, 104.0, 104.0])
    monkeypatch.setattr(log_line.time, "perf_counter", lambda: next(clock))
    line = LogLine(["kl"], 0, CPU, lambda: 4000.0)
    state = TrainerState(global_step=2, max_steps=12, total_flos=1000)
    line.start(state)
    line.add_positions(2, torch.tensor(24), torch.tensor(30), torch.tensor(40))
    state.global_step, state.total_flos = 4, 5000
    gathered = torch.tensor([3, 1, 2]) * log_line.GIB
    values = line.finish(state, lambda sums: 2 * sums, lambda _: gathered)
    assert (values["peak_memory_gib"], values["least_peak_memory_gib"]) == (3, 1)
    assert line.peak_memory_gib == [3, 1, 2]
    assert values["flops_per_second"] == 1000
    assert values["mfu"] == 0.25
    assert values["eta_seconds"] == 8 * 4 / 2
    assert values["padding_share"] == 0.25
    assert values["loss_tokens_per_step"] == 12
    assert values["tokens_per_second"] == 7.5


def test_the_peak_of_known_gpus_is_the_vendors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(hardware_peak, "measured_flops_per_second", lambda *_: 7.0)
    gpu = SimpleNamespace(type="cuda")
    peak = peak_flops_per_second.__wrapped__
    assert peak(gpu, torch.bfloat16) == 989e12
    assert peak(gpu, torch.float32) == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "unheard of")
    assert peak(gpu, torch.bfloat16) == 7.0


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(hardware_peak, "measured_flops_per_second", lambda *_: 7.0)
    peak = peak_flops_per_second.__wrapped__(SimpleNamespace(type="cuda"), torch.bfloat16)
    assert peak == (7.0 if teraflops is None else teraflops * 1e12)


def test_the_measured_peak_is_a_rate_of_this_machine():
    assert 1e9 < measured_flops_per_second(CPU, torch.float32) < 1e14


def test_attention_to_short_documents_counts_less(tmp_path):
    trainer = trainer_for(tmp_path)
    ids = torch.zeros(2, 8, dtype=torch.long)
    whole = trainer.floating_point_ops([{"labels": ids}])
    one = {"labels": ids, "position_ids": torch.arange(8).expand(2, 8)}
    four = {"labels": ids, "position_ids": torch.tensor([0, 1] * 4).expand(2, 8)}
    by_token = trainer._flops.layers + trainer._flops.head
    seen = trainer._flops.attention_per_position
    assert whole == 16 * (by_token + 8 * seen)
    assert trainer.floating_point_ops([one]) == whole
    assert trainer.floating_point_ops([one, four]) == whole + 16 * (by_token + 2 * seen)


def test_heads_run_only_where_chats_have_targets(tmp_path):
    trainer = trainer_for(tmp_path)
    labels = torch.tensor([[CONTEXT, CONTEXT, 7, 8]])
    without_head = trainer._flops.layers + 4 * trainer._flops.attention_per_position
    chats = trainer.floating_point_ops([{"labels": labels, "few_targets": True}])
    assert chats == 4 * without_head + 2 * trainer._flops.head


def test_held_out_metrics_begin_before_the_first_step(tmp_path):
    def evaluated(**changes) -> list[int]:
        trainer = trainer_for(tmp_path, max_steps=2, **changes)
        trainer.train()
        return [line["step"] for line in trainer.state.log_history if "eval_loss" in line]

    assert evaluated(eval_steps=2) == [0, 2]
    assert evaluated(eval_steps=2, eval_on_start=False) == [2]
    assert evaluated(eval_strategy="no") == []


def test_the_plot_has_a_line_for_each_depth(tmp_path, monkeypatch):
    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, x, y, *args, **kw: drawn.append(list(y)) or plot(self, x, y, *args, **kw),
    )
    log = [
        {"step": step, "loss": 1.0, "cosine": 0.5, "cosine_0": 0.1, "cosine_1": 0.9 / step}
        for step in (1, 2)
    ]
    plot_terms(log, tmp_path / "loss.png")
    assert [0.1, 0.1] in drawn
    assert [0.9, 0.45] in drawn
    assert len(drawn) == 4
    plot_terms([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    assert len(drawn) == 5

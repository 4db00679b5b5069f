"""Every flag of transformers' TrainingArguments changes something that can be seen, or is refused.

An observation runs with and without a flag and must differ.
"""

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
import transformers.training_args
from conftest import ROOT
from training_runs import teacher_of, trainer_for
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback

import train.evaluation
from train.flag_checks import check_installed, needs_held_out_rows
from train.fsdp_config import SETTINGS
from train.refused_flags import (
    IN_CONTEXT,
    LION,
    OPTIMIZERS,
    REFUSED,
    WITHOUT_MOMENTS,
    ignored_flags,
)
from train.run import check_acceleration
from train.speed import speed_up
from train.training_args import DistillationArguments

TEACHER = teacher_of("qwen3-tied")
QUIET = {"eval_strategy": "no", "max_steps": 2}


def trained(folder: Path, **changes: Any):
    trainer = trainer_for(folder, TEACHER, **QUIET | changes)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train()
    return trainer


def arguments(folder: Path, **changes: Any) -> DistillationArguments:
    return DistillationArguments(save_directory=str(folder), **changes)


# Observations. Each returns something to compare.


def weights(folder: Path, _, **changes: Any) -> str:
    digest = hashlib.sha256()
    for tensor in trained(folder, **changes).model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def num_steps(folder: Path, _, **changes: Any) -> int:
    return trained(folder, **changes).state.global_step


def log_steps(folder: Path, _, **changes: Any) -> list[int]:
    return [line["step"] for line in trained(folder, **changes).state.log_history if "loss" in line]


def evaluated_steps(folder: Path, _, **changes: Any) -> list[int]:
    history = trained(folder, **{"eval_strategy": "steps"} | changes).state.log_history
    return [line["step"] for line in history if "eval_loss" in line]


def last_line(folder: Path, _, **changes: Any) -> set[str]:
    return {*trained(folder, **changes).state.log_history[-1]}


def checkpoints(folder: Path, _, **changes: Any) -> list[str]:
    steps = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "max_steps": 3}
    trained(folder, **steps | changes)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def checkpointing(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> list[dict]:
    trainer, calls = trainer_for(folder, TEACHER, **QUIET | changes), []
    patch.setattr(trainer.model, "activation_checkpointing_enable", lambda **kw: calls.append(kw))
    trainer.train()
    return calls


def compiled(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> list[dict]:
    calls = []
    patch.setattr(torch, "compile", lambda forward, **kwargs: calls.append(kwargs) or forward)
    speed_up(teacher_of("qwen3-tied"), arguments(folder, **changes))
    return calls[:1]


def liger(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> list[dict]:
    calls = []
    patch.setattr("train.flag_checks.is_liger_kernel_available", lambda: True)
    patch.setattr("train.speed.apply_liger_kernel", lambda model, config: calls.append(config))
    with pytest.MonkeyPatch.context() as on_gpu:
        on_gpu.setattr(torch.cuda, "is_available", lambda: True)
        args = arguments(folder, use_cpu=True, **changes)
    speed_up(TEACHER, args)
    return calls


def devices(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> tuple:
    """What a machine with one GPU is asked for."""
    asked, settings = {}, []
    state = transformers.training_args.PartialState

    def noted(**kwargs: Any):
        asked.update(kwargs)
        return state()

    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("is_torch_tf32_available", "is_torch_bf16_gpu_available"):
        patch.setattr(transformers.training_args, name, lambda: True)
    patch.setattr(transformers.training_args, "enable_tf32", settings.append)
    patch.setattr(transformers.training_args, "PartialState", noted)
    args = arguments(folder, **changes)
    return args.n_gpu, asked, settings, args.mixed_precision, args.compute_dtype


def caches_emptied(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> int:
    calls = []
    patch.setattr(transformers.trainer, "clear_device_cache", lambda: calls.append(1))
    trained(folder, **changes)
    return len(calls)


def log_level_of(is_replica: bool) -> Callable:
    def observe(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> int:
        args = arguments(folder, **changes)
        patch.setattr(DistillationArguments, "process_index", int(is_replica))
        patch.setattr(DistillationArguments, "local_process_index", int(is_replica))
        return args.get_process_log_level()

    return observe


def second_node_logs(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> bool:
    args = arguments(folder, **changes)
    patch.setattr(DistillationArguments, "process_index", 8)
    patch.setattr(DistillationArguments, "local_process_index", 0)
    return args.should_log


def prints_lines(folder: Path, _, **changes: Any) -> bool:
    callbacks = trainer_for(folder, TEACHER, **changes).callback_handler.callbacks
    return any(isinstance(callback, PrinterCallback) for callback in callbacks)


def tracked(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> list:
    """What a run tells trackio, by a module that notes it."""
    calls: list = []
    module = types.ModuleType("trackio")
    module.__version__ = "1.0.0"
    module.init = lambda **kwargs: calls.append(sorted(kwargs.items(), key=str))
    module.freeze = lambda **kwargs: calls.append(kwargs["new_space_id"]) or "frozen"
    module.log, module.finish = (lambda *_, **__: None), (lambda: None)
    module.context_vars = types.SimpleNamespace(
        current_space_id=types.SimpleNamespace(get=lambda: "space"),
        current_project=types.SimpleNamespace(get=lambda: "project"),
    )
    module.config = type("Config", (dict,), {"update": lambda self, *_, **__: None})()
    patch.setitem(sys.modules, "trackio", module)
    patch.setattr(integration_utils, "is_trackio_available", lambda: True)
    patch.setattr(integration_utils.secrets, "token_hex", lambda _: "000000")
    trained(folder, **changes)
    return calls


def evaluation_batches(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> int:
    calls = []
    collate = train.evaluation.collate
    patch.setattr(
        train.evaluation, "collate", lambda rows: calls.append(len(rows)) or collate(rows)
    )
    trainer_for(folder, TEACHER, **changes).evaluate()
    return len(calls)


def deterministic(folder: Path, _, **changes: Any) -> bool:
    try:
        trainer_for(folder, TEACHER, **changes)
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def ddp(folder: Path, _, **changes: Any) -> dict:
    return trainer_for(folder, TEACHER, **changes).accelerator.ddp_handler.to_kwargs()


def gradient_state(folder: Path, _, **changes: Any) -> dict:
    return trainer_for(folder, TEACHER, **changes).accelerator.gradient_state.plugin_kwargs


EFFECTS: dict[str, tuple[Callable, dict, dict]] = {
    # flag: observation, flags with it, flags without it
    "learning_rate": (weights, {"learning_rate": 1e-3}, {}),
    "lr_scheduler_type": (weights, {"lr_scheduler_type": "constant"}, {}),
    "lr_scheduler_kwargs": (
        weights,
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "cosine"},
    ),
    "warmup_steps": (weights, {"warmup_steps": 2}, {}),
    "optim": (weights, {"optim": "sgd"}, {}),
    "optim_args": (weights, {"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "sgd"}),
    "weight_decay": (weights, {"weight_decay": 0.5}, {}),
    "adam_beta1": (weights, {"adam_beta1": 0.5}, {}),
    "adam_beta2": (weights, {"adam_beta2": 0.5}, {}),
    "adam_epsilon": (weights, {"adam_epsilon": 0.1}, {}),
    "max_grad_norm": (weights, {"max_grad_norm": 1e-9}, {}),
    "per_device_train_batch_size": (weights, {"per_device_train_batch_size": 4}, {}),
    "gradient_accumulation_steps": (weights, {"gradient_accumulation_steps": 2}, {}),
    "train_sampling_strategy": (weights, {"train_sampling_strategy": "group_by_length"}, {}),
    "seed": (weights, {"seed": 1}, {}),
    "data_seed": (weights, {"data_seed": 1}, {}),
    "bf16": (weights, {"bf16": True}, {}),
    "neftune_noise_alpha": (weights, {"neftune_noise_alpha": 5.0}, {}),
    "max_steps": (num_steps, {"max_steps": 3}, {}),
    "num_train_epochs": (num_steps, {"max_steps": -1, "num_train_epochs": 0.5}, {"max_steps": -1}),
    "logging_strategy": (
        log_steps,
        {"logging_strategy": "epoch", "logging_steps": 10, "max_steps": -1, "num_train_epochs": 1},
        {"logging_steps": 10, "max_steps": -1, "num_train_epochs": 1},
    ),
    "logging_steps": (log_steps, {"logging_steps": 2}, {}),
    "logging_first_step": (
        log_steps,
        {"logging_steps": 2, "logging_first_step": True},
        {"logging_steps": 2},
    ),
    "eval_strategy": (evaluated_steps, {"eval_strategy": "no"}, {}),
    "eval_steps": (evaluated_steps, {"eval_steps": 1}, {}),
    "eval_delay": (evaluated_steps, {"eval_steps": 1, "eval_delay": 2}, {"eval_steps": 1}),
    "eval_on_start": (evaluated_steps, {"eval_on_start": False}, {}),
    "per_device_eval_batch_size": (evaluation_batches, {"per_device_eval_batch_size": 1}, {}),
    "skip_memory_metrics": (last_line, {"skip_memory_metrics": False}, {}),
    "output_dir": (checkpoints, {"output_dir": "DIR/elsewhere"}, {}),
    "save_strategy": (
        checkpoints,
        {"save_strategy": "no", "save_steps": 100, "save_total_limit": 1},
        {"save_steps": 100, "save_total_limit": 1},
    ),
    "save_steps": (checkpoints, {"save_steps": 2}, {}),
    "save_total_limit": (checkpoints, {"save_total_limit": 1}, {}),
    "save_only_model": (checkpoints, {"save_only_model": True}, {}),
    "activation_checkpointing": (checkpointing, {"activation_checkpointing": True}, {}),
    "gradient_checkpointing": (checkpointing, {"gradient_checkpointing": True}, {}),
    "activation_checkpointing_kwargs": (
        checkpointing,
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
        {"activation_checkpointing": True},
    ),
    "gradient_checkpointing_kwargs": (
        checkpointing,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
        {"gradient_checkpointing": True},
    ),
    "torch_compile": (compiled, {"torch_compile": True}, {}),
    "torch_compile_backend": (compiled, {"torch_compile_backend": "eager"}, {}),
    "torch_compile_mode": (compiled, {"torch_compile_mode": "max-autotune"}, {}),
    "use_liger_kernel": (liger, {"use_liger_kernel": True}, {}),
    "liger_kernel_config": (
        liger,
        {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}},
        {"use_liger_kernel": True},
    ),
    "use_cpu": (devices, {"use_cpu": True}, {}),
    "fp16": (devices, {"fp16": True, "bf16": False}, {"bf16": False}),
    "tf32": (devices, {"tf32": True}, {}),
    "ddp_backend": (devices, {"ddp_backend": "ucc"}, {}),
    "ddp_timeout": (devices, {"ddp_timeout": 60}, {}),
    "ddp_find_unused_parameters": (ddp, {"ddp_find_unused_parameters": True}, {}),
    "ddp_bucket_cap_mb": (ddp, {"ddp_bucket_cap_mb": 7}, {}),
    "ddp_broadcast_buffers": (ddp, {"ddp_broadcast_buffers": False}, {}),
    "ddp_static_graph": (ddp, {"ddp_static_graph": True}, {}),
    "accelerator_config": (
        gradient_state,
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        {},
    ),
    "torch_empty_cache_steps": (caches_emptied, {"torch_empty_cache_steps": 1}, {}),
    "log_level": (log_level_of(is_replica=False), {"log_level": "error"}, {}),
    "log_level_replica": (log_level_of(is_replica=True), {"log_level_replica": "debug"}, {}),
    "log_on_each_node": (second_node_logs, {"log_on_each_node": False}, {}),
    "disable_tqdm": (prints_lines, {"disable_tqdm": False}, {}),
    "report_to": (tracked, {"report_to": "trackio"}, {}),
    **{
        name: (tracked, {"report_to": "trackio", name: "other"}, {"report_to": "trackio"})
        for name in (
            "run_name", "project", "trackio_space_id", "trackio_bucket_id",
            "trackio_static_space_id",
        )
    },
    "full_determinism": (deterministic, {"full_determinism": True}, {}),
}  # fmt: skip

ELSEWHERE = {
    "push_to_hub": "test_upload_student.py",
    "hub_model_id": "test_upload_student.py",
    "load_best_model_at_end": "test_best_checkpoint.py",
    "metric_for_best_model": "test_best_checkpoint.py",
    "resume_from_checkpoint": "test_resume.py",
    "fsdp": "test_fsdp.py",
    "fsdp_config": "test_fsdp.py",
}
"""Flags whose effect needs files or several ranks."""


def test_every_flag_is_in_exactly_one_table():
    tables = (EFFECTS, REFUSED, ELSEWHERE)
    names = list(itertools.chain.from_iterable(tables))
    assert sorted(names) == sorted(field.name for field in fields(TrainingArguments))
    for name, file in ELSEWHERE.items():
        text = (ROOT / "tests" / file).read_text()
        assert f'"--{name}"' in text or f'"{name}": ' in text, name


def test_an_observation_differs_by_its_flag_alone():
    for name, (_, changed, unchanged) in EFFECTS.items():
        companions = {flag: value for flag, value in changed.items() if flag != name}
        assert companions == {flag: value for flag, value in unchanged.items() if flag != name}
        assert name in changed and changed[name] != unchanged.get(name), name


@functools.cache
def without_flag(observe: Callable, flags: tuple) -> Any:
    """What is observed without a flag: the same for many of them."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return observe(Path(folder), patch, **dict(flags))


TRAINS = (
    weights,
    num_steps,
    log_steps,
    evaluated_steps,
    last_line,
    checkpoints,
    checkpointing,
    caches_emptied,
    tracked,
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if observe in TRAINS else [])
        for name, (observe, *_) in EFFECTS.items()
    ],
)
def test_a_flag_that_acts_changes_what_is_observed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # takes as long as a run
    observe, changed, unchanged = EFFECTS[name]
    flags = {
        key: value.replace("DIR", str(tmp_path)) if isinstance(value, str) else value
        for key, value in changed.items()
    }
    with monkeypatch.context() as patch:
        assert observe(tmp_path, patch, **flags) != without_flag(observe, (*unchanged.items(),))


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_would_not_act_is_refused_by_name(name, tmp_path):
    (default,) = (field.default for field in fields(DistillationArguments) if field.name == name)
    value = (
        not default if isinstance(default, bool) else {"debug": "underflow_overflow"}.get(name, 7)
    )
    if name == "greater_is_better":
        value = True
    with pytest.raises(ValueError, match=f"{name} is not available: "):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_steps": 5, "num_train_epochs": 2}, "both set the length: give one"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw: choose one of adamw_torch, "),
        ({"optim_args": "momentum=0.9"}, "optim_args has no effect with --optim adamw_torch"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, weight_decay=1"},
            "optim_args: weight_decay has no effect with --optim sgd, choose from momentum, ",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum,dampening=abc"},
            "`momentum` is not momentum=VALUE with a number.*`dampening=abc` is not dampening=VAL",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "choose random, sequential or group_by"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches is not available: rows"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "num_steps is not available in gradient_accumulation_kwargs, choose sync_each_batch",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": "yes"}}},
            "accelerator_config: sync_each_batch=yes: choose true or false",
        ),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {
                    "bogus": 1, "every_n_layers": 0, "offload": 3, "debug": True,
                },
            },
            "_kwargs: bogus is not a setting here, choose from every_n_layers, .*every_n_layers=0: "
            'choose 1 or more.*offload=3: choose true or false.*debug only applies with "use_re',
        ),
        ({"torch_compile_backend": "magic"}, "torch_compile_backend=magic: choose one of .*induct"),
        ({"torch_compile_mode": "magic"}, "torch_compile_mode=magic: choose one of .*max-autotune"),
        ({"fsdp": "hybrid_shard"}, "fsdp=hybrid_shard: choose True, or .*--fsdp_replicas"),
        ({"fsdp": "False", "fsdp_config": {"version": 2}}, "--fsdp False has no effect with"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: choose a number above 0"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf: choose a number above 0"),
        ({"ddp_timeout": 5}, "ddp_timeout has no effect on CPUs"),
        ({"fp16": True, "bf16": False}, "fp16 needs a GPU"),
        (
            {"fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}},
            "sharding_strategy is not a setting of FSDP2 here, choose from version, ",
        ),
        (
            {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5}},
            "auto_wrap_policy=SIZE_BASED_WRAP: choose TRANSFORMER_BASED_WRAP",
        ),
        ({"fsdp_config": {"reshard_after_forward": "hybrid"}}, "choose true or false"),
    ],
)  # fmt: skip
def test_flags_without_effect_together_with_others_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **flags)


def test_fsdp_is_a_switch(tmp_path):
    assert arguments(tmp_path, fsdp="True").fsdp is True
    assert not arguments(tmp_path, fsdp="False").fsdp
    words = arguments(tmp_path, fsdp="shard_grad_op auto_wrap")
    assert words.fsdp is True and words.fsdp_config["reshard_after_forward"] is False


@pytest.mark.slow
def test_the_best_checkpoint_is_by_loss_unless_a_metric_is_named(tmp_path):
    trainer = trained(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=1)
    assert trainer.args.metric_for_best_model == "loss"
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min((step for step in losses if step), key=losses.get)
    assert (tmp_path / f"checkpoints/checkpoint-{best}").is_dir()


FSDP = {"fsdp": True}
IN_CONTEXT_CASES: list[tuple[str, Any, dict, dict | None]] = [
    # flag, value, flags with which it is silent, flags with which it acts (None: not on a CPU)
    ("activation_checkpointing_kwargs", {}, {}, {"activation_checkpointing": True}),
    ("gradient_checkpointing_kwargs", {}, {}, {"gradient_checkpointing": True}),
    ("gradient_checkpointing_kwargs", {}, FSDP | {"gradient_checkpointing": True}, None),
    ("ddp_bucket_cap_mb", 3, FSDP, {}),
    ("ddp_broadcast_buffers", True, FSDP, {}),
    ("ddp_static_graph", True, FSDP, {}),
    ("ddp_find_unused_parameters", True, FSDP, {}),
    ("liger_kernel_config", {}, {}, None),
    ("hub_model_id", "a", {}, {"push_to_hub": True}),
    ("public", True, {}, {"push_to_hub": True}),
    ("dry_run_ranks", 2, {}, {"dry_run": True}),
    ("torch_compile_backend", "eager", {"torch_compile": False}, {}),
    ("torch_compile_mode", "default", {"torch_compile": False}, {}),
    (
        "torch_compile_mode",
        "default",
        {"torch_compile_backend": "eager"},
        {"torch_compile_backend": "inductor"},
    ),
    ("adam_beta1", 0.5, {"optim": "sgd"}, {"optim": "lion_32bit"}),
    ("adam_beta2", 0.5, {"optim": "adafactor"}, {}),
    ("adam_epsilon", 0.5, {"optim": "rmsprop"}, {}),
    ("adam_epsilon", 0.5, {"optim": "lion_8bit"}, {"optim": "adamw_torch"}),
    ("warmup_steps", 5, {"lr_scheduler_type": "constant"}, {}),
    ("lr_scheduler_kwargs", {"a": 1}, {"lr_scheduler_type": "constant_with_warmup"}, {}),
    ("logging_steps", 3, {"logging_strategy": "epoch"}, {}),
    ("eval_steps", 3, {"eval_strategy": "epoch"}, {}),
    ("eval_delay", 3, {"eval_strategy": "no"}, {}),
    ("metric_for_best_model", "kl", {"eval_strategy": "no"}, {}),
    (
        "metric_for_best_model",
        "kl",
        {"save_strategy": "no"},
        {"save_strategy": "no", "lr_scheduler_type": "reduce_lr_on_plateau"},
    ),
    ("load_best_model_at_end", True, {"eval_strategy": "no", "save_strategy": "no"}, {}),
    ("save_strategy", "best", {"eval_strategy": "no"}, {"metric_for_best_model": "kl"}),
    ("save_steps", 3, {"save_strategy": "epoch"}, {}),
    ("save_total_limit", 3, {"save_strategy": "no"}, {}),
    ("run_name", "a", {}, {"report_to": "wandb"}),
    ("run_name", "a", {"report_to": "tensorboard"}, {"report_to": ["tensorboard", "mlflow"]}),
    ("project", "a", {"report_to": "wandb"}, {"report_to": "trackio"}),
    ("trackio_space_id", "a", {"report_to": "none"}, {"report_to": "all"}),
    ("trackio_bucket_id", "a", {}, {"report_to": ["wandb", "trackio"]}),
    ("trackio_static_space_id", "a", {}, {"report_to": "trackio"}),
]


@pytest.mark.parametrize(
    ("name", "value", "silent", "acting"), IN_CONTEXT_CASES, ids=[of[0] for of in IN_CONTEXT_CASES]
)
def test_a_flag_that_other_flags_silence_is_refused_by_name(name, value, silent, acting, tmp_path):
    with pytest.raises(ValueError, match=rf"(^|; ){name} (has no effect|(best )?only applies) "):
        arguments(tmp_path, **silent, **{name: value})
    if acting is not None:
        arguments(tmp_path, **acting, **{name: value})


def test_every_flag_that_others_silence_has_a_case():
    silenced = {name for row in IN_CONTEXT for name in row.flags}
    assert silenced == {name for name, *_ in IN_CONTEXT_CASES}
    assert {*WITHOUT_MOMENTS, *LION} <= {*OPTIMIZERS}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "lr_scheduler_kwargs={'min_lr': 1e-05}: --lr_"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr needs others"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_installed(arguments(tmp_path, **flags))


def test_flags_that_a_launch_has_no_use_for_warn_by_name(tmp_path):
    """One command serves any number of processes, so these are no errors."""
    given = {"ddp_bucket_cap_mb": 3, "log_on_each_node": False, "torch_empty_cache_steps": 1}
    in_each = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    args = arguments(tmp_path, **given, accelerator_config=in_each)
    of_process = [
        "--ddp_bucket_cap_mb has no effect on a single process",
        "--log_on_each_node has no effect on a single process",
        "--accelerator_config has no effect on a single process",
    ]
    of_machine = ["--torch_empty_cache_steps has no effect on CPUs"]
    assert ignored_flags(args, is_single=True) == of_process + of_machine
    assert ignored_flags(args, is_single=False) == of_machine
    assert ignored_flags(arguments(tmp_path), is_single=True) == []
    with pytest.warns(UserWarning, match="--ddp_bucket_cap_mb has no effect on a single process"):
        check_acceleration(args, TEACHER.config)


def test_every_setting_of_fsdp_acts(tmp_path, monkeypatch):
    """Those with a single value are checked for it. A switch may be text, as in transformers."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")  # transformers sets it
    changes = {
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": "False",
        "activation_checkpointing": "true",
        "cpu_offload": True,
        "cpu_ram_efficient_loading": "false",
    }
    assert changes.keys() == {name for name, values in SETTINGS.items() if len(values) != 1}

    def plugin(**settings) -> dict:
        return arguments(tmp_path, fsdp_config={"version": 2} | settings).fsdp_plugin_args

    for name, value in changes.items():
        assert plugin(**{name: value}) != plugin(), name
    off = {"cpu_offload": "false", "activation_checkpointing": "False"}
    assert plugin(**off) == plugin() | {"activation_checkpointing": False}


def test_flags_that_need_held_out_rows(tmp_path):
    assert needs_held_out_rows(arguments(tmp_path)) == []
    given = {"eval_strategy": "epoch", "per_device_eval_batch_size": 1, "eval_delay": 2}
    assert needs_held_out_rows(arguments(tmp_path, **given)) == [
        "eval_delay", "per_device_eval_batch_size", "eval_strategy epoch",
    ]  # fmt: skip


def test_epochs_count_if_steps_are_not_given(tmp_path):
    for flags, steps, epochs in (
        ({}, 500, 0),
        ({"max_steps": 7}, 7, 0),
        ({"num_train_epochs": 2}, -1, 2),
        ({"max_steps": -1}, -1, 3),
        ({"max_steps": -1, "num_train_epochs": 4}, -1, 4),
    ):
        args = arguments(tmp_path, **flags)
        assert (args.max_steps, args.num_train_epochs) == (steps, epochs)

"""When sharded ranks reduce their gradients."""

from types import SimpleNamespace

import pytest
import torch
from test_dry_run import QWEN3_4B

from patching.blocks import LayerMap, default_kept_layers
from train import gradient_reduction
from train.gradient_reduction import choose_reduction, whole_gradients_fit
from train.training_args import DistillationArguments

LAYER_MAP = LayerMap(default_kept_layers(36, 2, 1, 2), 36)


def sharded_arguments(tmp_path, **more) -> DistillationArguments:
    args = DistillationArguments(save_directory=str(tmp_path), **more)
    args.fsdp, args.fsdp_config = [True], {"activation_checkpointing": True}
    return args


@pytest.mark.parametrize("gpu_gb, fits", [(16, False), (80, True)])
def test_gradients_are_reduced_once_per_step_where_they_fit(tmp_path, gpu_gb, fits, monkeypatch):
    args = sharded_arguments(tmp_path)
    monkeypatch.setattr(DistillationArguments, "world_size", 4)
    assert whole_gradients_fit(args, QWEN3_4B, LAYER_MAP, 2048, gpu_gb * 10**9) == fits


@pytest.mark.parametrize("replicas, fits", [(1, True), (8, False)])
def test_each_replica_shards_over_its_own_ranks(tmp_path, replicas, fits, monkeypatch):
    args = sharded_arguments(tmp_path, fsdp_replicas=replicas)
    monkeypatch.setattr(DistillationArguments, "world_size", 16)
    assert whole_gradients_fit(args, QWEN3_4B, LAYER_MAP, 2048, 36 * 10**9) == fits


@pytest.mark.parametrize("others_gb, fits", [(80, True), (16, False)])
def test_ranks_with_different_gpus_decide_by_the_smallest(tmp_path, others_gb, fits, monkeypatch):
    args = sharded_arguments(tmp_path)
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(DistillationArguments, "world_size", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    others_bytes = torch.tensor([others_gb * 10**9] * 3)
    monkeypatch.setattr(
        gradient_reduction, "gather", lambda own: torch.cat([own.cpu(), others_bytes])
    )
    choose_reduction(args, QWEN3_4B, LAYER_MAP, 2048)
    chosen = args.accelerator_config.gradient_accumulation_kwargs["sync_each_batch"]
    assert chosen is not fits


def test_when_to_reduce_gradients_may_be_given(tmp_path):
    for given, expected in ((None, True), (False, False), (True, True)):
        kwargs = {} if given is None else {"sync_each_batch": given}
        config = {"gradient_accumulation_kwargs": kwargs}
        args = sharded_arguments(tmp_path, accelerator_config=config)
        choose_reduction(args, QWEN3_4B, LAYER_MAP, 2048)
        chosen = args.accelerator_config.gradient_accumulation_kwargs["sync_each_batch"]
        assert chosen == (expected if given is not None else not torch.cuda.is_available())

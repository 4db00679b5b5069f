"""`torchrun ... tests/shard_on_cpu.py ...`: train.train with real FSDP2 sharding on CPU ranks.

accelerate only shards on accelerators. Here its state reports MULTI_GPU instead of MULTI_CPU, and
nothing else changes. What each rank holds is written next to the checkpoints, and how often it
gathered the head of the student to train it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from train import run
from train.train import main
from train.trainer import DistillationTrainer

initialize = PartialState.__init__


def initialize_as_if_on_gpus(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def held(model) -> dict[str, dict[str, list[int]]]:
    """Return the whole shape of each parameter, and the shape of this rank's share of it."""
    return {
        name: {"whole": [*parameter.shape], "share": [*parameter.to_local().shape]}
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    } | {
        name: {"whole": [*parameter.shape], "share": [*parameter.shape]}
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, DTensor)
    }


head_gathers = []


def noting_gathers_of_heads(fsdp_params, *args, **kwargs):
    # The teacher runs without gradients, and so does evaluation.
    if torch.is_grad_enabled() and any("lm_head" in p._param_fqn for p in fsdp_params):
        head_gathers.append(1)
    return all_gather(fsdp_params, *args, **kwargs)


all_gather = _fsdp_param_group.foreach_all_gather


class RecordingTrainer(DistillationTrainer):
    def __init__(self, student, teacher, *args, **kwargs):
        self.read_weights = not any(parameter.is_meta for parameter in teacher.parameters())
        super().__init__(student, teacher, *args, **kwargs)
        self.teacher = teacher

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        report = {
            "read_weights": self.read_weights,
            "student": held(self.model_wrapped),
            "teacher": held(self.teacher),
            "head_gathers": len(head_gathers),
        }
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"held_{os.environ['RANK']}.json").write_text(json.dumps(report))
        return output


def shard_on_cpu() -> None:
    PartialState.__init__ = initialize_as_if_on_gpus
    run.DistillationTrainer = RecordingTrainer
    _fsdp_param_group.foreach_all_gather = noting_gathers_of_heads


if __name__ == "__main__":
    shard_on_cpu()
    main(sys.argv[1:])

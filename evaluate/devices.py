"""Where a sweep runs: its device, and its ranks under torchrun."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.files.outputs import num_ranks


def ranks_of(device: torch.device) -> Accelerator | None:
    """torchrun's ranks, None for a single process. Each rank has the device of its number.

    Raises ValueError where one device is named for all of them.
    """
    if num_ranks() == 1:
        return None
    if device.index not in (None, 0):
        raise ValueError(
            f"device={device}: under torchrun each rank takes a device of its own, give "
            f"--device {device.type}"
        )
    # One rank measures and writes while the others wait, for as long as it takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])


def stock_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    ranks: Accelerator | None,
) -> HFLM:
    """One model as lm-eval has it; the harness shares out the requests among the ranks."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    share_out(lm, ranks)
    return lm


def share_out(lm: LM, ranks: Accelerator | None) -> None:
    """Let the harness share out a model's requests among the ranks, if there are any."""
    if ranks is not None:
        lm.accelerator = ranks
        lm._rank, lm._world_size = ranks.process_index, ranks.num_processes

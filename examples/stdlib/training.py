"""The training loop of the small models made in this folder and in `examples/studies`.

Muon updates the weight matrices of the transformer layers, AdamW everything else. The learning
rates warm up, then fall linearly to zero. The loss is compiled. The number of steps is fixed in
advance, so a seed determines the run.

Shapes: B rows, T positions, V vocabulary.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.lookup import architecture_of
from patching.devices import has_no_avx512
from train.loss import IGNORED_LABEL

LOG_EVERY_STEPS = 25
HELD_OUT_EVERY_STEPS = 500

Batch = tuple[Tensor, ...]
"""The tensors that a loss function takes after the model. The last one holds a token id for each
real token and IGNORED_LABEL for padding.
"""
Loss = Callable[..., Tensor]
"""Maps a model and the tensors of a batch to the mean loss per target, in nats."""


class Run(NamedTuple):
    """What training records about itself."""

    steps: int
    trained_tokens: int
    seconds: int
    log: list[dict[str, float]]


def train(
    model: PreTrainedModel,
    loss_of: Loss,
    batches: Iterator[Batch],
    *,
    steps: int,
    warmup_steps: int,
    muon_lr: float,
    adam_lr: float,
    held_out: Sequence[Batch] = (),
) -> Run:
    """Train for `steps` batches, all of one shape or a few, and print the progress.

    The loss on the `held_out` batches, if any, is printed now and then. The model ends up in bf16.
    """
    layers = model.get_submodule(architecture_of(model.config).layers)
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    in_muon = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_muon]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup_steps, 1 - step / steps)
        )
        for optimizer in optimizers
    ]
    compiled_loss = torch.compile(partial(loss_of, model), dynamic=False)
    log, trained_tokens, started = [], 0, time.time()
    for step, batch in enumerate(islice(batches, steps)):
        loss = compiled_loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        trained_tokens += int((batch[-1] != IGNORED_LABEL).sum())
        if step % LOG_EVERY_STEPS == 0:
            speed = trained_tokens / (time.time() - started)
            log.append({"step": step, "loss": round(loss.item(), 4)})
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if held_out and (step + 1) % HELD_OUT_EVERY_STEPS == 0:
            print(f"held-out {held_out_loss(model, loss_of, held_out):.4f}", flush=True)
    model.to(torch.bfloat16)
    return Run(steps, trained_tokens, round(time.time() - started), log)


def autocast() -> torch.autocast:
    """Compute in bf16, except on a CPU that takes many times as long in it as in fp32."""
    device = torch.device("cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=not has_no_avx512(device))


def next_token_loss(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Mean cross entropy of each next token, in nats."""
    with autocast():
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), tokens_BT[:, 1:].flatten()
    )


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, loss_of: Loss, batches: Iterable[Batch]) -> float:
    """The mean of the batches' losses, each weighted by its number of rows."""
    total = num_rows = 0
    for batch in batches:
        total += loss_of(model, *batch).item() * len(batch[0])
        num_rows += len(batch[0])
    return total / num_rows


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    run: Run,
    **measured: float,
) -> None:
    """Save the model, its tokenizer and training.json, which records settings, run and results."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    settings = {name: value for name, value in settings.items() if name != "save_directory"}
    record = {"arguments": settings, "torch": torch.__version__, **measured, **run._asdict()}
    (folder / "training.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under a class name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(values, indent=2) + "\n")

"""What a model does to the output of its head: scale it, cap it, or nothing.

Logits are computed here and in training chunk by chunk, from the last hidden states and the head,
without the model's own forward pass. So they must be changed as the model changes them, and whether
they are is shown before a run begins, on the model's own code with nothing in its body.

Shapes: N tokens, T positions, D input size of the head, V vocabulary.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.running.hidden_states import before_output_embeddings

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields that logits are multiplied by in some architectures and divided by in others."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields for the c of c * tanh(logits / c)."""

PROBED_LOGITS = 16
PROBED_MAGNITUDES = (0.1, 1.0, 10.0, 100.0)
"""Sizes of the logits that are compared, so that a cap shows."""


class LogitChange(NamedTuple):
    """How logits follow from the head's output: cap * tanh(scale * output / cap)."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply_(self, logits_NV: Tensor) -> Tensor:
        """Change the head's output in place, with the model's own steps of rounding."""
        if self.scale != 1:
            logits_NV.mul_(self.scale)
        if self.soft_cap is not None:
            logits_NV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_NV

    def backward_(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Turn the gradient with respect to the changed logits, in place, into that with respect
        to the head's output. `logits_NV` are the changed ones.
        """
        if self.soft_cap is not None:
            ratio_NV = logits_NV.to(gradient_NV.dtype) / self.soft_cap
            gradient_NV.mul_(ratio_NV.square_().neg_().add_(1))
        if self.scale != 1:
            gradient_NV.mul_(self.scale)
        return gradient_NV


UNCHANGED = LogitChange()


def logit_change(model: PreTrainedModel) -> LogitChange:
    """Return how a model changes the output of its head. `model` may be empty and is not changed.

    Raises ValueError unless one of the changes that the config names gives the model's own logits.
    """
    output_TV, own_TV = _probe(model)
    for change in _candidates(model.config):
        if torch.allclose(change.apply_(output_TV.clone()), own_TV, rtol=1e-5, atol=1e-6):
            return change
    stated = [f"{name}={value}" for name, value in _stated(model.config, SCALES + SOFT_CAPS)]
    raise ValueError(
        f"model_type={model.config.model_type}: its logits are not those of its head, scaled or "
        f"capped as the config says ({', '.join(stated) or 'which names no change'}), so this "
        "architecture cannot be distilled, nor its KL be measured"
    )


def _stated(config: PreTrainedConfig, names: tuple[str, ...]) -> list[tuple[str, float]]:
    values = config.to_dict()
    return [(name, values[name]) for name in names if values.get(name) is not None]


def _candidates(config: PreTrainedConfig) -> Iterator[LogitChange]:
    scales = [1.0]
    for _, value in _stated(config, SCALES):
        scales += [value, 1 / value]
    for soft_cap in (None, *(value for _, value in _stated(config, SOFT_CAPS))):
        for scale in scales:
            yield LogitChange(scale, soft_cap)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return some outputs of a small random head, and the logits that the model's own forward pass
    makes of them, both of shape (T, V) in fp32. The model's body is replaced by random states.

    Raises ValueError if its code fails on them.
    """
    architecture = architecture_of(model.config)
    with torch.device("meta"):
        probe = type(model)(copy.deepcopy(model.config)).float().eval()
    generator = torch.Generator().manual_seed(0)
    whole = probe.get_output_embeddings()
    head = nn.Linear(whole.in_features, PROBED_LOGITS, bias=whole.bias is not None)
    probe.set_output_embeddings(head)
    head_module = probe.get_submodule(architecture.head)
    if head_module is not head:  # an encoder's head also transforms the states
        head_module.to_empty(device="cpu")
    for parameter in head_module.parameters():
        parameter.normal_(std=whole.in_features**-0.5, generator=generator)
    magnitudes_T1 = torch.tensor(PROBED_MAGNITUDES)[:, None]
    states_TD = magnitudes_T1 * torch.randn(
        len(PROBED_MAGNITUDES), whole.in_features, generator=generator
    )
    path = architecture.layers
    while "." in path:
        path = path.rpartition(".")[0]
        probe.get_submodule(path).forward = lambda *_, **__: _BodyOutput([states_TD[None]])
    input_ids = torch.zeros(1, len(states_TD), dtype=torch.long)
    try:
        own_TV = probe(input_ids=input_ids, use_cache=False).logits[0]
    except Exception as error:  # the code of a model may raise anything
        raise ValueError(
            f"model_type={model.config.model_type}: how this architecture computes its logits "
            f"could not be checked ({error})"
        ) from error
    return head(before_output_embeddings(probe, states_TD)), own_TV.float()


class _BodyOutput(tuple):
    """The output of a model without its head: the last hidden state, and no other field."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None

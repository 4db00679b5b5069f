"""How similar hidden states are: at different depths of one model, and in a model and its teacher.

Similarity is the cosine between two states of the same token, averaged over all tokens that are not
padding. It is computed in fp32 and summed in float64. A batch holds `input_ids` and
`attention_mask`, both of shape (B, T).

Shapes: J depths, B rows, T positions, D hidden size, X all entries of one hidden state.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.running.hidden_states import hidden_states_at

NO_TEXT = "there is no text to compare hidden states on"


@torch.no_grad()
def last_states(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the hidden states after the final norm, one tensor of shape (B, T, D) per batch."""
    return [
        hidden_states_at(
            model,
            [model.config.get_text_config().num_hidden_layers],
            batch["input_ids"].to(model.device),
            batch["attention_mask"].to(model.device),
        )[0]
        for batch in batches
    ]


def mean_cosine(
    states: Iterable[Tensor],
    other_states: Iterable[Tensor],
    batches: Iterable[Mapping[str, Tensor]],
) -> float:
    """Return the similarity of two models' hidden states on the same batches, each given as one
    tensor of shape (B, T, D) per batch.

    Raises ValueError if the batches contain no token.
    """
    total, num_tokens = 0.0, 0
    for state_BTD, other_BTD, batch in zip(states, other_states, batches):
        mask_BT = batch["attention_mask"].bool().to(state_BTD.device)
        total += _cosine_sum(state_BTD, other_BTD, mask_BT)
        num_tokens += int(mask_BT.sum())
    if num_tokens == 0:
        raise ValueError(NO_TEXT)
    return total / num_tokens


@torch.no_grad()
def similarity_to_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[tuple[int, int]],
    batches: Iterable[Mapping[str, Tensor]],
) -> list[float]:
    """Return the similarity of each pair (student hidden state, teacher hidden state).

    Pairs are indices as in `LayerMap.alignment_pairs`: the last hidden state of each model is taken
    after its final norm, as in the distillation loss. Raises ValueError if the batches contain no
    token.
    """
    student_depths, teacher_depths = zip(*pairs)
    totals = [0.0] * len(pairs)
    num_tokens = 0
    for batch in batches:
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        inputs = (batch["input_ids"], batch["attention_mask"])
        mask_BT = batch["attention_mask"].bool()
        num_tokens += int(mask_BT.sum())
        both = zip(
            hidden_states_at(student, student_depths, *inputs),
            hidden_states_at(teacher, teacher_depths, *inputs),
        )
        for i, (student_BTD, teacher_BTD) in enumerate(both):
            totals[i] += _cosine_sum(student_BTD, teacher_BTD, mask_BT)
    if num_tokens == 0:
        raise ValueError(NO_TEXT)
    return [total / num_tokens for total in totals]


def _cosine_sum(state_BTD: Tensor, other_BTD: Tensor, mask_BT: Tensor) -> float:
    cosine_BT = cosine_similarity(state_BTD.float(), other_BTD.float(), dim=-1)
    return cosine_BT[mask_BT].double().sum().item()


@torch.no_grad()
def similarity_by_depth(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Return the similarity between a model's hidden states i and j for all pairs (i, j), as a
    float64 tensor of shape (J, J) with J = number of layers + 1.

    Runs the model once per batch. Here the last hidden state is taken before the final norm. Raises
    ValueError if the batches contain no token, and FloatingPointError if hidden states overflow.
    """
    layers = model.get_submodule(architecture_of(model.config).layers)
    num_depths = len(layers) + 1
    totals_JJ = torch.zeros(num_depths, num_depths, dtype=torch.float64)
    num_tokens = 0
    states: list[Tensor] = []
    mask_BT = torch.empty(0)

    def add(state_BTD: Tensor) -> None:
        states.append(normalize(state_BTD[mask_BT].float(), dim=-1).flatten())

    def add_input(_layer, args, kwargs) -> None:
        add(args[0] if args else kwargs["hidden_states"])

    def add_output(_layer, _args, output) -> None:
        add(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(add_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(add_output) for layer in layers]
    try:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask_BT = batch["attention_mask"].bool()
            num_tokens += int(mask_BT.sum())
            model.base_model(**batch, use_cache=False)
            states_JX = torch.stack(states)
            states.clear()
            # One product of normalized states gives the sums of all pairs' cosines.
            totals_JJ += (states_JX @ states_JX.T).double().cpu()
    finally:
        for handle in handles:
            handle.remove()
    if num_tokens == 0:
        raise ValueError(NO_TEXT)
    if not totals_JJ.isfinite().all():  # nothing can be chosen by comparing with NaN
        raise FloatingPointError(
            f"hidden states are not numbers in {str(model.dtype).removeprefix('torch.')}, in which "
            "they overflow: use --dtype float32, or a model stored in it"
        )
    return totals_JJ / num_tokens

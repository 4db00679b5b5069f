"""How alike hidden states are: of one model at different depths, and of a student and its teacher.

Similarity is the cosine between two states of a token, mean over tokens that are no padding.

Shapes: J depths, B rows, T positions, N tokens that are no padding, D hidden size.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.running.hidden_states import hidden_states_at


@torch.no_grad()
def similarity_by_depth(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Similarity of a model's states after i and after j layers, float64 of shape (J, J) with
    J = number of layers + 1, in one pass over some text.

    A batch has `input_ids` and `attention_mask`, both (B, T). The states behind the last layer are
    taken before the final norm. Raises ValueError where there is no token.
    """
    layers = model.get_submodule(architecture_of(model.config).layers)
    num_depths = len(layers) + 1
    totals_JJ = torch.zeros(num_depths, num_depths, dtype=torch.float64)
    num_tokens = 0
    states: list[Tensor] = []
    is_real_BT = torch.empty(0)

    def add(state_BTD: Tensor) -> None:
        states.append(normalize(state_BTD[is_real_BT].float(), dim=-1).flatten())

    def when_read(_layer, args, kwargs) -> None:
        add(args[0] if args else kwargs["hidden_states"])

    def when_written(_layer, _args, output) -> None:
        add(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(when_read, with_kwargs=True)]
    handles += [layer.register_forward_hook(when_written) for layer in layers]
    try:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            is_real_BT = batch["attention_mask"].bool()
            num_tokens += int(is_real_BT.sum())
            model.base_model(**batch, use_cache=False)
            states_JX = torch.stack(states)
            states.clear()
            totals_JJ += (states_JX @ states_JX.T).double().cpu()
    finally:
        for handle in handles:
            handle.remove()
    if num_tokens == 0:
        raise ValueError("there is no text to compare hidden states on")
    return totals_JJ / num_tokens


@torch.no_grad()
def similarity_to_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[tuple[int, int]],
    batches: Iterable[Mapping[str, Tensor]],
) -> list[float]:
    """Similarity of each pair of (student hidden state, teacher hidden state), the last ones behind
    the final norms, as distillation compares them.

    Raises ValueError where there is no token.
    """
    student_depths, teacher_depths = zip(*pairs)
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    num_tokens = 0
    for batch in batches:
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        inputs = (batch["input_ids"], batch["attention_mask"])
        is_real_BT = batch["attention_mask"].bool()
        num_tokens += int(is_real_BT.sum())
        both = zip(
            hidden_states_at(student, student_depths, *inputs),
            hidden_states_at(teacher, teacher_depths, *inputs),
        )
        for i, (student_BTD, teacher_BTD) in enumerate(both):
            cosine_BT = cosine_similarity(student_BTD.float(), teacher_BTD.float(), dim=-1)
            totals[i] += cosine_BT[is_real_BT].double().sum().cpu()
    if num_tokens == 0:
        raise ValueError("there is no text to compare hidden states on")
    return (totals / num_tokens).tolist()

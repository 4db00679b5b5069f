"""How long the residual stream of a teacher is next to its student's, where their layers meet.

Some tokens and dimensions have values hundreds of times larger than all others (massive
activations). They decide every mean and every least-squares fit, so ratios are medians over tokens.

Shapes: B rows, T positions, N tokens that are not padding, D hidden size.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patching.blocks import LayerMap
from patching.running.hidden_states import visit_hidden_states


@torch.no_grad()
def length_ratios(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layer_map: LayerMap,
    batches: Sequence[Mapping[str, Tensor]],
) -> list[float]:
    """Return for each student layer the median over tokens of how many times longer the teacher's
    hidden state before its block is than the student's before the layer.

    Batches hold `input_ids` and `attention_mask`, both of shape (B, T).
    """
    pairs = layer_map.alignment_pairs[:-1]  # the last one is after the final norms
    ratios: list[list[Tensor]] = [[] for _ in pairs]
    for batch in batches:
        lengths = {}
        is_real_BT = batch["attention_mask"].bool()
        for model, indices in ((student, [i for i, _ in pairs]), (teacher, [j for _, j in pairs])):
            own: dict[int, Tensor] = {}
            visit_hidden_states(
                model,
                indices,
                partial(_keep_lengths, own, is_real_BT),
                batch["input_ids"].to(model.device),
                batch["attention_mask"].to(model.device),
            )
            lengths[model is teacher] = own
        for of_pair, (i, j) in zip(ratios, pairs):
            of_pair.append(lengths[True][j] / lengths[False][i])
    return [torch.cat(of_pair).median().item() for of_pair in ratios]


def _keep_lengths(kept: dict[int, Tensor], is_real_BT: Tensor, j: int, state_BTD: Tensor) -> None:
    lengths_BT = torch.linalg.vector_norm(state_BTD, dim=-1, dtype=torch.float32).cpu()
    kept[j] = lengths_BT[is_real_BT.cpu()]

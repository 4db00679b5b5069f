"""How far models are from their teacher: KL(teacher || model), the mean over tokens of some text.

Models that are measured together share their common prefixes of layers. They can also reuse states
kept from the call before. Only the last hidden states of the teacher are kept, and its
probabilities are computed once per chunk of tokens for all models.

Shapes: B rows, T positions, N tokens that are not padding, D hidden size, V vocabulary, K models.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import PreTrainedModel

from patching.recipe import Recipe, whole_model
from patching.running.chunks import CHUNK_LOGITS, CPU_SOFTMAX_LOGITS, slices
from patching.running.logits import UNCHANGED, LogitChange, logit_change
from patching.running.prefix_tree import LayerPath, PrefixTree

MOST_KNOWN_BYTES = 2**32
"""Most bytes of hidden states that are kept from one call to the next, over all batches."""


class KnownStates(dict[LayerPath, Any]):
    """States of one batch by the path that leads to them, as many as fit in `room_bytes`."""

    def __init__(self, room_bytes: int) -> None:
        super().__init__()
        self.room_bytes = room_bytes

    def __setitem__(self, path: LayerPath, output: Any) -> None:
        num_bytes = sum(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))
        if path not in self and num_bytes <= self.room_bytes:
            self.room_bytes -= num_bytes
            super().__setitem__(path, output)

    def __delitem__(self, path: LayerPath) -> None:
        self.room_bytes += sum(t.nbytes for t in tree_leaves(self[path]) if isinstance(t, Tensor))
        super().__delitem__(path)

    def only_for(self, paths: Sequence[LayerPath]) -> None:
        """Forget the states that are not on the way to any of these paths."""
        beginnings = {path[:length] for path in paths for length in range(len(path) + 1)}
        for path in self.keys() - beginnings:
            del self[path]


class TeacherKL:
    """Measures recipes of one teacher and student on batches of text.

    A batch holds `input_ids` and `attention_mask`, both of shape (B, T). Raises ValueError if the
    batches contain no token, or if it is not known how the teacher's logits follow from its head.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self.teacher, self.student = teacher, student
        self.logit_change = logit_change(teacher)
        self.batches = [
            {name: tensor.to(teacher.device) for name, tensor in batch.items()} for batch in batches
        ]
        self.positions = [
            batch["attention_mask"].flatten().nonzero().squeeze(1) for batch in self.batches
        ]
        self.num_tokens = sum(map(len, self.positions))
        if self.num_tokens == 0:
            raise ValueError("there is no text to measure models on")
        self._known = [KnownStates(MOST_KNOWN_BYTES // len(self.batches)) for _ in self.batches]
        self.num_layer_forwards = 0
        """Layers run so far, counted once per batch."""
        whole = whole_model(teacher.config.get_text_config().num_hidden_layers)
        tree = PrefixTree({"teacher": whole}, teacher=teacher)
        self._teacher_states = [
            next(tree.head_inputs(batch, positions_N))[1]
            for batch, positions_N in zip(self.batches, self.positions)
        ]

    def of(self, recipes: Mapping[str, Recipe], remember: bool = False) -> dict[str, float]:
        """Return the KL of each recipe's model by name, in nats per token, infinity for a model
        whose logits overflow.

        `remember` keeps states for a next call with models that have more patched layers, as in the
        next step of a search.
        """
        return {
            name: sum(rows) / self.num_tokens if math.isfinite(sum(rows)) else math.inf
            for name, rows in self.sums_of_rows(recipes, remember).items()
        }

    def sums_of_rows(
        self, recipes: Mapping[str, Recipe], remember: bool = False
    ) -> dict[str, list[float]]:
        """Return the KL of each recipe's model by name, in nats, summed over the tokens of each row
        of text. The arguments are those of `of`.
        """
        tree = PrefixTree(recipes, teacher=self.teacher, student=self.student)
        heads = {name: model.get_output_embeddings() for name, model in tree.models.items()}
        found: dict[str, list[float]] = {name: [] for name in recipes}
        parts = list(zip(self.batches, self.positions, self._teacher_states, self._known))
        for batch, positions_N, teacher_ND, known in tqdm(
            parts, desc=f"KL of {len(recipes)} models", leave=False
        ):
            known.only_for(tree.paths)
            states = dict(tree.head_inputs(batch, positions_N, known if remember else None))
            kl_KN = kl_of_tokens(
                teacher_ND,
                self.teacher.get_output_embeddings(),
                [(states[name], heads[name]) for name in recipes],
                self.logit_change,
            )
            num_rows, row_length = batch["input_ids"].shape
            sums_KB = kl_KN.new_zeros(len(kl_KN), num_rows)
            sums_KB.index_add_(1, (positions_N // row_length).to(kl_KN.device), kl_KN)
            for name, sums in zip(recipes, sums_KB.tolist()):
                found[name] += sums
        self.num_layer_forwards += tree.num_layers_run
        return found


@torch.no_grad()
def kl_of_tokens(
    teacher_hidden_ND: Tensor,
    teacher_head: nn.Linear,
    models: Sequence[tuple[Tensor, nn.Linear]],
    change: LogitChange = UNCHANGED,
) -> Tensor:
    """Return KL(teacher || model) of each model at each token, in nats.

    A model is given as the input of its head, of shape (N, D), and the head. `change` is what all
    models do to the output of their heads. The result is float64 of shape (K, N). Softmaxes are
    computed in fp32, those of the teacher only once.
    """
    num_tokens, device = teacher_hidden_ND.shape[0], teacher_hidden_ND.device
    vocab_size = len(teacher_head.weight)
    at_once = CPU_SOFTMAX_LOGITS if device.type == "cpu" else CHUNK_LOGITS
    kl_KN = torch.empty(len(models), num_tokens, dtype=torch.float64, device=device)
    for chunk in slices(num_tokens, CHUNK_LOGITS // vocab_size):
        teacher_logits_NV = change.apply_(teacher_head(teacher_hidden_ND[chunk]))
        log_q_NV = teacher_logits_NV.log_softmax(-1, dtype=torch.float32)
        q_NV = log_q_NV.exp()
        for i, (hidden_ND, head) in enumerate(models):
            logits_NV = change.apply_(head(hidden_ND[chunk]))
            for part in slices(len(logits_NV), at_once // vocab_size):
                log_p_NV = logits_NV[part].log_softmax(-1, dtype=torch.float32)
                difference_NV = torch.sub(log_q_NV[part], log_p_NV, out=log_p_NV)
                kl_KN[i, chunk][part] = difference_NV.mul_(q_NV[part]).sum(-1)
    return kl_KN

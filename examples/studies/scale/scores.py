"""Score models that are changed in memory: KL from the teacher and cross entropy of each text.

Shapes: B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from examples.studies.scale.stream import Batches, Change, changed
from patching.assemble import assemble
from patching.family import Family
from patching.recipe import Recipe


class Variant(NamedTuple):
    """A recipe's model, and what is done to its stream before some layers, by their depth."""

    recipe: Recipe
    changes: Mapping[int, Change] = {}


class Score(NamedTuple):
    """Sums over the tokens of each row of text, in nats."""

    kl: list[float]
    """KL from the teacher, over all tokens."""
    cross_entropy: list[float]
    """Over all tokens but the first."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.kl) + sum(self.cross_entropy))


class Scorer:
    """Scores variants of one family on batches of text."""

    def __init__(self, family: Family, batches: Batches) -> None:
        self.parents = family.parents.load(("teacher", "student"))
        self.batches = batches
        self.teacher_BTV = [log_probabilities(self.parents["teacher"], b) for b in batches]

    @torch.no_grad()
    def of(self, variant: Variant) -> Score:
        model = assemble(variant.recipe, **self.parents)
        score = Score([], [])
        for i, (batch, teacher_BTV) in enumerate(zip(self.batches, self.teacher_BTV)):
            with changed(model, variant.changes, i):
                log_p_BTV = log_probabilities(model, batch)
            mask_BT = batch["attention_mask"].bool()
            kl_BT = (teacher_BTV.exp() * (teacher_BTV - log_p_BTV)).sum(-1)
            next_BT1 = batch["input_ids"][:, 1:, None]
            nats_BT = -log_p_BTV[:, :-1].gather(-1, next_BT1).squeeze(-1)
            score.kl.extend(kl_BT.double().where(mask_BT, 0).sum(-1).tolist())
            score.cross_entropy.extend(nats_BT.double().where(mask_BT[:, 1:], 0).sum(-1).tolist())
        return score


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probabilities of the next token, of shape (B, T, V), in fp32."""
    return model(**batch, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)


def text_sizes(family: Family, batches: Batches) -> dict[str, Any]:
    """Return the tokens of each row, and the bytes of its tokens after the first."""
    rows = [
        ids_T[mask_T.bool()].tolist()
        for batch in batches
        for ids_T, mask_T in zip(batch["input_ids"], batch["attention_mask"])
    ]
    texts = [family.tokenizer.decode(row[1:]) for row in rows]
    return {"tokens": [*map(len, rows)], "bytes": [len(text.encode()) for text in texts]}

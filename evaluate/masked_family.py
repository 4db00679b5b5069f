"""A family of masked language models as one lm-eval model, which scores whole texts."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluate.pseudo_perplexity import TOKENS_PER_BATCH, encode, score_texts
from patching.assemble import assemble
from patching.recipe import Recipe

REMEDY = "evaluate it on text, with --dataset or a task of type loglikelihood_rolling"


class MaskedFamilyLM(LM):
    """Answers rolling log-likelihoods, and only those, with pseudo-log-likelihoods: the sum of each
    token's log-probability where that token alone is masked.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        *,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        super().__init__()
        self.recipes, self.tokenizer = recipes, tokenizer
        self.tokens_per_batch = tokens_per_batch
        self._parents = {"teacher": teacher, "student": student}
        self.activate(next(iter(recipes)))

    def activate(self, name: str) -> None:
        """Let the member of this name answer from here on."""
        self.name = name
        self.model = assemble(self.recipes[name], **self._parents)

    def forget(self) -> None:
        """Nothing is kept between members."""

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        strings = [request.args[0] for request in requests]
        texts = encode(strings, self.tokenizer, self.model.config)
        scores = score_texts(
            self.model, self.tokenizer, texts, self.tokens_per_batch, not disable_tqdm
        )
        return [score.log_likelihood for score in scores]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model has no likelihood of an answer: {REMEDY}")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model does not generate: {REMEDY}")

"""A family of masked language models as one lm-eval model, which scores whole texts."""

from collections.abc import Sequence
from typing import NoReturn

from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from evaluate.devices import share_out
from evaluate.family import SingleModel
from evaluate.pseudo_perplexity import encode, score_members
from patching.running.prefix_tree import PrefixTree

REMEDY = "evaluate it on text, with --dataset or a task of type loglikelihood_rolling"


class MaskedFamilyLM(LM):
    """The members of a tree as one lm-eval model, with the interface of a `FamilyLM`.

    It answers rolling log-likelihoods only, and answers them with pseudo-log-likelihoods: the sum
    over tokens of the log-probability of a token when only that token is masked.
    """

    # Ranks exchange results in the same way as those of lm-eval's own models.
    all_gather, gather_object, barrier = HFLM.all_gather, HFLM.gather_object, HFLM.barrier

    def __init__(
        self,
        tree: PrefixTree | SingleModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__()
        share_out(self, accelerator)
        self.tree, self.tokenizer, self.tokens_per_batch = tree, tokenizer, tokens_per_batch
        self._scores: dict[str, dict[str, float]] = {}
        self.activate(tree.names[0])
        self._device = self.model.device  # where lm-eval puts what ranks exchange

    def activate(self, name: str) -> None:
        """Answer for this member from now on."""
        self.name, self.model = name, self.tree.models[name]

    def forget(self) -> None:
        """Drop the pseudo-log-likelihoods computed so far."""
        self._scores.clear()

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        strings = [request.args[0] for request in requests]
        missing = list(dict.fromkeys(text for text in strings if text not in self._scores))
        if missing:
            texts = encode(missing, self.tokenizer, self.model.config)
            scores = score_members(
                self.tree, self.tokenizer, texts, self.tokens_per_batch, not disable_tqdm
            )
            for name, of_name in scores.items():
                for text, score in zip(missing, of_name):
                    self._scores.setdefault(text, {})[name] = score.log_likelihood
        return [self._scores[text][self.name] for text in strings]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model gives no likelihood of a continuation: {REMEDY}")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model does not generate: {REMEDY}")

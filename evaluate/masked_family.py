"""A family of masked language models as one lm-eval model, which scores whole texts."""

from collections.abc import Sequence
from typing import NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from evaluate.family import SeparateModels
from evaluate.pseudo_perplexity import WITHIN_WORDS, both_scores, encode
from evaluate.ranks import Ranks
from patching.running.prefix_tree import PrefixTree

REMEDY = "evaluate it on text, with --dataset or a task of type loglikelihood_rolling"


class MaskedFamilyLM(LM):
    """The members of a tree as one lm-eval model, with the interface of a `FamilyLM`.

    It answers rolling log-likelihoods only, and answers them with pseudo-log-likelihoods: the sum
    over tokens of the log-probability of a token when only that token is masked.
    """

    def __init__(
        self,
        tree: PrefixTree | SeparateModels,
        *,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
        self.tree, self.tokenizer, self.tokens_per_batch = tree, tokenizer, tokens_per_batch
        self._scores: dict[str, dict[str, tuple[float, float]]] = {}
        self.activate(tree.names[0])

    def activate(self, name: str) -> None:
        """Answer for this member from now on."""
        self.name, self.model = name, self.tree.models[name]

    def forget(self) -> None:
        """Drop the pseudo-log-likelihoods computed so far."""
        self._scores.clear()

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """A request's arguments are the string, and `WITHIN_WORDS` for the score in which the later
        tokens of a word are masked too.
        """
        missing = {r.args[0]: r for r in requests if r.args[0] not in self._scores}
        scores = self.ranks.share(self, "score_texts", [*missing.values()]) if missing else []
        self._scores.update(zip(missing, scores))
        return [self._scores[r.args[0]][self.name][WITHIN_WORDS in r.args] for r in requests]

    def score_texts(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[dict[str, tuple[float, float]]]:
        """Every member's two pseudo-log-likelihoods of each text, by its name."""
        strings = [request.args[0] for request in requests]
        texts = encode(strings, self.tokenizer, self.model.config, self.tokenizer.is_fast)
        scores = both_scores(
            self.tree, self.tokenizer, texts, self.tokens_per_batch, not disable_tqdm
        )
        return [{name: of_name[i] for name, of_name in scores.items()} for i in range(len(texts))]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model gives no likelihood of a continuation: {REMEDY}")

    def take_failures(self) -> dict[str, dict[str, int]]:
        """No answers, since there are none."""
        return {}

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(f"a masked language model does not generate: {REMEDY}")

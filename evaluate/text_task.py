"""Text as an lm-eval task: perplexity of a causal model, pseudo-perplexity of a masked one."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.pseudo_perplexity import (
    METRIC,
    WITHIN_WORDS,
    encode,
    stderr_of_perplexity,
    what_was_cut,
)
from patching.architectures.models import predicts_masked_tokens


def task_of_texts(
    name: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> tuple[ConfigurableTask, str | None]:
    """A task that measures the perplexity of a causal model or the pseudo-perplexity of a masked
    one, and a line for the user if texts had to be cut.
    """
    if not predicts_masked_tokens(config):
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return text_task(name, texts, map(len, ids), ["perplexity"]), None
    encoded = encode(texts, tokenizer, config)
    metrics = [METRIC, WITHIN_WORDS] if tokenizer.is_fast else [METRIC]
    task = text_task(name, texts, (len(text.positions) for text in encoded), metrics)
    line = what_was_cut(encoded)
    return task, line and f"{name}: {line}"


class TextTask(ConfigurableTask):
    """Asks for the log-likelihood of each text's own tokens. Those that the tokenizer adds around a
    text are context, not text.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        # The string, and whether to add special tokens.
        arguments = [(doc["text"], False)]
        if WITHIN_WORDS in self.aggregation():
            arguments.append((doc["text"], WITHIN_WORDS))
        return [
            Instance(self.OUTPUT_TYPE, doc, of_one, i, metadata=kwargs["metadata"])
            for i, of_one in enumerate(arguments)
        ]


def text_task(
    name: str, texts: Sequence[str], num_tokens: Iterable[int], metrics: Sequence[str]
) -> TextTask:
    """A task that asks for each text's log-likelihood, one for each metric. Metrics are exp(mean
    loss per token), with the standard errors of that over texts.

    `num_tokens` is the number of tokens in each text's log-likelihood. Texts without tokens are
    left out. Raises ValueError if no text has any.
    """
    documents = [
        {"text": text, "num_tokens": count} for text, count in zip(texts, num_tokens) if count
    ]
    if not documents:
        raise ValueError(f"{name}: there is no text in it")

    aggregations = {}
    for metric in metrics:
        aggregations |= {metric: weighted_perplexity, f"{metric}_stderr": stderr_of_perplexity}

    def process_results(doc: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
        # lm-eval has no standard error for this mean, so the task adds it under lm-eval's own key.
        found = {}
        for metric, log_likelihood in zip(metrics, results, strict=True):
            pair = (log_likelihood, doc["num_tokens"])
            found |= {metric: pair, f"{metric}_stderr": pair}
        return found

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # no advice on task files
    return TextTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["text"],
            "process_results": process_results,
            "metric_list": [
                {"metric": name, "aggregation": aggregation, "higher_is_better": False}
                for name, aggregation in aggregations.items()
            ],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )

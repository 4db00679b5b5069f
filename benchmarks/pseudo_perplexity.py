"""Time of pseudo-perplexity on many texts at once, relative to one text at a time.

One text at a time is the straightforward way: all masked copies of a text are a batch, and the head
runs at every position. Both sides take turns on the same texts: lines of WikiText-2 if
BOOMERANG_DATA names a folder that has it, else of the standard library. The default model is the
small BERT that comes with the examples.

    python -m benchmarks.pseudo_perplexity
    python -m benchmarks.pseudo_perplexity --model google-bert/bert-base-uncased --num_texts 10
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from benchmarks.ratios import ratio_of_pairs
from evaluate.pseudo_perplexity import MaskedText, encode, score_members
from examples.stdlib.corpus import is_held_out, iter_modules
from patching.recipe import whole_model
from patching.running.prefix_tree import PrefixTree

SMALL_BERT = Path(__file__).parents[1] / "examples" / "stdlib" / "standins" / "bert"


def read_texts(num_texts: int) -> list[str]:
    folder = os.environ.get("BOOMERANG_DATA")
    if folder:
        lines = Path(folder, "wikitext-2", "test.txt").read_text(encoding="utf-8").splitlines()
    else:
        held_out = (module for module in iter_modules() if is_held_out(module.name))
        lines = [line for module in held_out for line in module.text.splitlines()]
    lines = [line for line in lines if line.strip()]
    return random.Random(0).sample(lines, num_texts)


@torch.inference_mode()
def one_text_at_a_time(model, mask_token_id: int, texts: list[MaskedText]) -> list[float]:
    """The sum of each text's log-probabilities."""
    sums = []
    for text in texts:
        ids_RT = torch.tensor([text.input_ids] * len(text.positions))
        each_R, positions_R = torch.arange(len(ids_RT)), torch.tensor(text.positions)
        targets_R = ids_RT[each_R, positions_R]
        ids_RT[each_R, positions_R] = mask_token_id
        log_p_RTV = model(input_ids=ids_RT).logits.log_softmax(-1)
        sums.append(log_p_RTV[each_R, positions_R, targets_R].sum().item())
    return sums


def main(model: str, num_texts: int, repeats: int, tokens_per_batch: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    bert = AutoModelForMaskedLM.from_pretrained(model, dtype=torch.float32).eval()
    encoded = encode(read_texts(num_texts), tokenizer, bert.config)
    texts = [text for text in encoded if text.positions]
    num_tokens = sum(len(text.positions) for text in texts)
    lengths = sorted(len(text.input_ids) for text in texts)
    print(
        f"{len(texts)} texts, {num_tokens} tokens, lengths {lengths[0]} to {lengths[-1]}, "
        f"median {lengths[len(lengths) // 2]}"
    )
    tree = PrefixTree({"model": whole_model(bert.config.num_hidden_layers)}, teacher=bert)
    seconds: dict[str, list[float]] = {"ours": [], "one text at a time": []}
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        ours = score_members(tree, tokenizer, texts, tokens_per_batch, False)["model"]
        middle = time.perf_counter()
        theirs = one_text_at_a_time(bert, tokenizer.mask_token_id, texts)
        if repeat:  # the first round warms up
            seconds["ours"].append(middle - start)
            seconds["one text at a time"].append(time.perf_counter() - middle)
    for ours_of_text, expected in zip(ours, theirs):
        assert abs(ours_of_text.log_likelihood - expected) < 1e-3 * abs(expected)
    for name, values in seconds.items():
        print(f"{name}: {num_tokens / statistics.median(values):,.0f} masked tokens/s")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    print(ratio_of_pairs(ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMALL_BERT, help="a masked language model")
    parser.add_argument("--num_texts", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens_per_batch", type=int, help="default: that of evaluate.evaluate")
    main(**vars(parser.parse_args()))

"""Pseudo-perplexity against masking one token of one text at a time."""

import math
import random
import statistics

import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import weighted_perplexity
from masked_models import (
    NUM_POSITIONS,
    SPECIAL_TOKENS,
    encoder_config,
    texts_of,
    word_tokenizer,
)
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from evaluate.family import SeparateModels
from evaluate.harness import Harness
from evaluate.masked_family import MaskedFamilyLM
from evaluate.pseudo_perplexity import (
    MaskedText,
    TextScore,
    batches_of,
    encode,
    score_members,
    stderr_of_perplexity,
    what_was_cut,
)
from evaluate.text_task import task_of_texts

TOKENIZER = word_tokenizer()
MASK, PADDING = TOKENIZER.mask_token_id, TOKENIZER.pad_token_id


TEXTS = [
    *texts_of([5, 1, 9, 0, 3, 9]),
    "",
    "   \n",
    "w1 unknown w2 [SEP] w3",  # a special token inside is not scored
    *texts_of([NUM_POSITIONS + 10, NUM_POSITIONS - 2], seed=1),
]


@torch.no_grad()
def one_at_a_time(model, text) -> tuple[float, int]:
    """Sum of log-probabilities and number of tokens of one text, cut to the model's positions."""
    ids = TOKENIZER(text, truncation=True, max_length=NUM_POSITIONS)["input_ids"]
    total, num_tokens = 0.0, 0
    for position, token in enumerate(ids):
        if token in TOKENIZER.all_special_ids and token != TOKENIZER.unk_token_id:
            continue
        masked = torch.tensor([ids])
        masked[0, position] = MASK
        logits = model(input_ids=masked).logits[0, position].double()
        total += logits.log_softmax(-1)[token].item()
        num_tokens += 1
    return total, num_tokens


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10**6])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_it_is_that_of_masking_one_token_at_a_time(model_type, tokens_per_batch):
    model = tiny_model(encoder_config(model_type, 3))
    tree = SeparateModels({"model": model})
    encoded = encode(TEXTS, TOKENIZER, model.config)
    scores = score_members(tree, TOKENIZER, encoded, tokens_per_batch, False)["model"]
    oracle = [one_at_a_time(model, text) for text in TEXTS]
    assert [score.num_tokens for score in scores] == [num_tokens for _, num_tokens in oracle]
    for score, (expected, _) in zip(scores, oracle):
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
    task, line = task_of_texts("t", TEXTS, TOKENIZER, model.config)
    lm = MaskedFamilyLM(tree, tokenizer=TOKENIZER, tokens_per_batch=tokens_per_batch)
    found = Harness().score(lm, {"tasks": {"t": task}, "groups": {}, "group_map": {}})
    total, num_tokens = (sum(values) for values in zip(*oracle))
    value = found["results"]["t"]["pseudo_perplexity,none"]
    assert value == pytest.approx(math.exp(-total / num_tokens), rel=1e-5)
    assert found["n-samples"]["t"]["effective"] == sum(n > 0 for _, n in oracle)
    assert sum(document["num_tokens"] for document in task.eval_docs) == num_tokens
    assert f"t: 1 of {len(TEXTS)} texts are longer" in line and "12 tokens" in line


def test_what_is_cut_is_reported():
    config = encoder_config("bert", 1)
    encoded = encode(TEXTS, TOKENIZER, config)
    assert what_was_cut(encoded) == (
        f"1 of {len(TEXTS)} texts are longer than the model can read: 12 tokens at their ends are "
        "left out"
    )
    assert what_was_cut(encode(TEXTS[:5], TOKENIZER, config)) is None


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that reads `w17` as `w`, `##1`, `##7`."""
    pieces = [*SPECIAL_TOKENS, "w", *(f"##{digit}" for digit in range(10))]
    tokenizer = word_tokenizer().backend_tokenizer
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL_TOKENS)), model_max_length=100
    )


@torch.no_grad()
@pytest.mark.parametrize("tokens_per_batch", [1, 10**6])
def test_within_words_later_tokens_of_a_word_are_masked_too(tokens_per_batch):
    tokenizer, model = piece_tokenizer(), tiny_model(encoder_config("bert", 3))
    texts = ["w17 w2 w w345", "w", "unknown w12", "", "w1 " * 20 + "w99"]
    expected = {text: [0.0, 0.0] for text in texts}
    num_tokens = 0
    for text in texts:
        encoding = tokenizer(text, truncation=True, max_length=NUM_POSITIONS)
        ids, words = encoding["input_ids"], encoding.word_ids()
        for position, word in enumerate(words):
            if word is None:
                continue
            num_tokens += 1
            for i, later in enumerate((set(), {p for p, w in enumerate(words) if w == word})):
                masked = torch.tensor([ids])
                masked[0, [position, *(p for p in later if p > position)]] = MASK
                log_p = model(input_ids=masked).logits[0, position].double().log_softmax(-1)
                expected[text][i] += log_p[ids[position]].item()
    tree = SeparateModels({"m": model})
    lm = MaskedFamilyLM(tree, tokenizer=tokenizer, tokens_per_batch=tokens_per_batch)
    task, _ = task_of_texts("t", texts, tokenizer, model.config)
    found = Harness().score(lm, {"tasks": {"t": task}, "groups": {}, "group_map": {}})
    for i, metric in enumerate(("pseudo_perplexity", "pseudo_perplexity_within_words")):
        loss = -sum(of_text[i] for of_text in expected.values()) / num_tokens
        value = found["results"]["t"][f"{metric},none"]
        assert value == pytest.approx(math.exp(loss), rel=1e-5)
        assert found["results"]["t"][f"{metric}_stderr,none"] > 0
    assert abs(expected[texts[0]][0] - expected[texts[0]][1]) > 0.01
    assert expected["w"][0] == expected["w"][1]


texts_strategy = st.lists(st.integers(0, 6), max_size=8).map(
    lambda lengths: [
        MaskedText([2, *range(5, 5 + n), 3], list(range(1, 1 + n)), 0) for n in lengths
    ]
)


@settings(deadline=None)
@given(texts_strategy, st.integers(1, 50))
def test_every_token_is_masked_once_and_batches_keep_their_budget(texts, tokens_per_batch):
    seen = []
    for copies in batches_of(texts, MASK, PADDING, tokens_per_batch):
        num_rows, length = copies.input_ids_RT.shape
        assert num_rows * length <= max(tokens_per_batch, length)
        for row in range(num_rows):
            i, position = int(copies.text_indices_R[row]), int(copies.positions_R[row])
            ids = texts[i].input_ids
            restored = copies.input_ids_RT[row].tolist()
            assert restored[position] == MASK
            restored[position] = int(copies.targets_R[row])
            assert restored == ids + [PADDING] * (length - len(ids))
            mask = copies.attention_mask_RT
            assert len(ids) == (length if mask is None else int(mask[row].sum()))
            seen.append((i, position))
    assert sorted(seen) == [(i, p) for i, text in enumerate(texts) for p in text.positions]


def test_the_standard_error_is_that_of_resampled_texts():
    draw = random.Random(0)
    scores = []
    for _ in range(200):
        num_tokens = draw.randint(5, 60)
        scores.append(TextScore(-num_tokens * draw.gauss(2.0, 0.5), num_tokens))
    resampled = [weighted_perplexity(draw.choices(scores, k=len(scores))) for _ in range(2000)]
    assert stderr_of_perplexity(scores) == pytest.approx(statistics.stdev(resampled), rel=0.05)
    without_each = [weighted_perplexity(scores[:i] + scores[i + 1 :]) for i in range(len(scores))]
    jackknife = statistics.pstdev(without_each) * (len(scores) - 1) ** 0.5
    assert stderr_of_perplexity(scores) == pytest.approx(jackknife, rel=0.01)
    assert stderr_of_perplexity(scores[:1]) == "N/A"


def test_models_and_texts_without_pseudo_perplexity_are_rejected():
    model = tiny_model(encoder_config("bert", 1))
    with pytest.raises(ValueError, match="t: there is no text in it"):
        task_of_texts("t", ["", " "], TOKENIZER, model.config)
    with pytest.raises(ValueError, match="model_type=qwen3: pseudo-perplexity is for masked"):
        encode(["w1"], TOKENIZER, tiny_config("qwen3-tied", 2))

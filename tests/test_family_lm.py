"""The family as one lm-eval model: HFLM's numbers, from one pass over the tree of layers."""

import random

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from patching_models import ENCODERS, LAYER_MAP, SETTINGS, family_pair, save_models
from transformers import BloomConfig

from evaluate.family import FamilyLM, SeparateModels, longest_to_share
from evaluate.request_rows import batch_of, rows_of
from patching.architectures.lookup import architecture_of
from patching.patch import build_intermediate_model
from patching.recipe import Recipe, intermediate_model, naively_pruned
from patching.running.prefix_tree import PrefixTree

RECIPES: dict[str, Recipe] = {
    f"family_k{k}": intermediate_model(LAYER_MAP, k, "last") for k in range(3)
}
RECIPES["naive_k1"] = naively_pruned(LAYER_MAP, RECIPES["family_k1"])

PAIRS = [
    ("two choices of", " one"),
    ("two choices of", " some length"),
    ("two choices of", " one and a half"),
    ("two choices of", " one"),  # asked twice
    ("of one token each", " "),
    ("of one token each", "."),
    ("of one token each", "!"),
    ("ends in spaces  ", "and goes on"),
    ("", "begins with nothing"),
    ("", "\n"),
    ("much " * 20, "too long to be read as a whole"),
    ("much " * 20, "too long"),
    ("a", "b"),
]
TEXTS = ["", "a short text", "a text of several windows " * 3, "12 34 " * 10]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arg, i) for i, arg in enumerate(arguments)]


def family_model(model_type: str, batch_size: int | str = 3, tied: bool = False) -> FamilyLM:
    teacher, student = family_pair(model_type, tied)
    tree = PrefixTree(RECIPES, teacher=teacher, student=student)
    return FamilyLM(tree, tokenizer=byte_tokenizer(), batch_size=batch_size, max_length=60)


def reference_lm(model, **options) -> HFLM:
    return HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=60, **options)


def assert_same_scores(found: list, expected: list) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() - ENCODERS))
def test_log_likelihoods_are_those_of_hflm(model_type):
    lm = family_model(model_type)
    requests = instances("loglikelihood", PAIRS)
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    for name in RECIPES:
        lm.activate(name)
        reference = reference_lm(lm.tree.models[name], batch_size=2)
        assert_same_scores(
            lm.loglikelihood(requests, disable_tqdm=True),
            reference.loglikelihood(requests, disable_tqdm=True),
        )
        found = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
        assert found == pytest.approx(reference.loglikelihood_rolling(rolling, True), abs=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_a_shared_row_may_be_longer_than_the_model_can_read(model_type):
    """Its continuations stand one after the other, but each follows the context alone."""
    teacher, student = family_pair(model_type, True)
    tree = PrefixTree(RECIPES, teacher=teacher, student=student)
    lm = FamilyLM(tree, tokenizer=byte_tokenizer(), batch_size=2)
    length = teacher.config.max_position_embeddings
    context, choice = "c" * (length * 3 // 5), length // 4
    pairs = [(context, letter * choice) for letter in "abdefgh"]
    longest = max(map(len, rows_of(_encoded(pairs), lm.max_length, lm.max_length)))
    assert lm.max_length == length < longest
    requests = instances("loglikelihood", pairs)
    for name in RECIPES:
        lm.activate(name)
        reference = HFLM(pretrained=lm.tree.models[name], tokenizer=byte_tokenizer(), batch_size=2)
        assert_same_scores(
            lm.loglikelihood(requests, disable_tqdm=True),
            reference.loglikelihood(requests, disable_tqdm=True),
        )


def _encoded(pairs: list[tuple[str, str]]) -> list[tuple[None, list[int], list[int]]]:
    encode = byte_tokenizer().encode
    return [(None, encode(context), encode(continuation)) for context, continuation in pairs]


@pytest.mark.parametrize(
    "model_type",
    [
        *("llama", "gemma3_text"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt_neox", "gpt2")),
    ],
)
def test_every_members_numbers_are_those_of_its_saved_checkpoint(model_type, tmp_path):
    names = save_models(tmp_path, *family_pair(model_type, tied=True))
    teacher, student = (build_intermediate_model(*names, k)[0] for k in (2, 0))
    tree = PrefixTree(RECIPES, teacher=teacher, student=student)
    lm = FamilyLM(tree, tokenizer=byte_tokenizer())
    lm._max_length = 60
    pairs = instances("loglikelihood", PAIRS)
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    generation = instances(
        "generate_until", [(text, {"until": ["\n"], "max_gen_toks": 5}) for text in ("a", "bc d")]
    )
    for name in RECIPES:
        lm.activate(name)
        lm.model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        reference = HFLM(
            pretrained=str(tmp_path / name), device="cpu", dtype="float32", max_length=60
        )
        assert_same_scores(lm.loglikelihood(pairs, True), reference.loglikelihood(pairs, True))
        assert lm.loglikelihood_rolling(rolling, True) == pytest.approx(
            reference.loglikelihood_rolling(rolling, True), abs=1e-4
        )
        assert lm.generate_until(generation, True) == reference.generate_until(generation, True)


def test_the_tree_is_run_for_the_first_member_only(monkeypatch):
    lm = family_model("llama")
    runs = []
    logits = PrefixTree.logits
    monkeypatch.setattr(PrefixTree, "logits", lambda *args: runs.append(args) or logits(*args))
    tokenized = []
    tok_encode = lm.tok_encode
    monkeypatch.setattr(
        lm, "tok_encode", lambda text, **kw: tokenized.append(text) or tok_encode(text, **kw)
    )
    requests = instances("loglikelihood", PAIRS)
    by_member = {}
    for name in RECIPES:
        lm.activate(name)
        by_member[name] = lm.loglikelihood(requests, disable_tqdm=True)
        if name == "family_k0":
            counts = len(runs), len(tokenized)
    assert (len(runs), len(tokenized)) == counts
    assert len({str(scores) for scores in by_member.values()}) == len(RECIPES)
    lm.forget()
    assert lm.loglikelihood(requests, disable_tqdm=True) == by_member["naive_k1"]
    assert len(runs) == 2 * counts[0]


@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
def test_batches_change_nothing(batch_size):
    lm = family_model("qwen3", batch_size)
    reference = reference_lm(lm.model, batch_size=1)
    requests = instances("loglikelihood", PAIRS)
    assert_same_scores(lm.loglikelihood(requests, True), reference.loglikelihood(requests, True))


@pytest.mark.slow
def test_batches_are_halved_when_memory_runs_out(monkeypatch):
    lm = family_model("qwen3", "auto")
    expected = lm.loglikelihood(instances("loglikelihood", PAIRS), True)
    lm.forget()
    sizes = []
    logits = PrefixTree.logits

    def scarce(self, inputs, positions):
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 200:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return logits(self, inputs, positions)

    monkeypatch.setattr(PrefixTree, "logits", scarce)
    found = lm.loglikelihood(instances("loglikelihood", PAIRS), True)
    assert_same_scores(found, expected)
    assert max(sizes) > 200 > min(sizes)


def rows_for(lm: FamilyLM, pairs: list[tuple[list[int], list[int]]]) -> list:
    requests = [(None, *pair) for pair in pairs]
    return rows_of(requests, lm.max_length, longest_to_share(lm.config, lm.max_length))


def test_a_context_is_run_once_for_its_continuations():
    lm = family_model("llama")
    context = list(range(32))
    choices = [[40, 41, 42], [50, 51, 52, 53], [60, 61], [70]]
    (row,) = rows_for(lm, [(context, choice) for choice in choices])
    assert len(row) == 32 + 2 + 3 + 1 + 0
    assert row.num_requests == 4
    batch = batch_of([row], lm.device, torch.float32)
    assert batch.inputs["position_ids"][0, 32:].tolist() == [32, 32, 33, 32, 33, 34]
    sees = batch.inputs["attention_mask"][0, 0] == 0
    assert sees[-1].tolist() == [True] * 32 + [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "pairs",
    [
        [([1], list(range(40))), ([1], list(range(40, 80)))],  # rolling windows of many texts
        [([1, 2], [3, 4, 5]), ([1, 3], [3, 4, 5])],
    ],
)
def test_rows_are_separate_if_sharing_saves_nothing(pairs):
    assert len(rows_for(family_model("llama"), pairs)) == 2


def test_rows_are_separate_beyond_a_sliding_window():
    context, choices = list(range(20)), [[1, 2, 3], [4, 5, 6]]
    assert SETTINGS["gemma3_text"]["sliding_window"] < 20
    assert len(rows_for(family_model("gemma3_text"), [(context, c) for c in choices])) == 2
    short = [(context[:1], [1, 2]), (context[:1], [3])]
    assert len(rows_for(family_model("gemma3_text"), short)) == 1


def test_little_padding():
    random.seed(0)
    lm = family_model("llama", batch_size=8)
    lengths = [random.randint(2, 58) for _ in range(300)]
    requests = [(None, [i % 250] * length, [1]) for i, length in enumerate(lengths)]
    slots = 0
    logits = PrefixTree.logits

    def counted(self, inputs, positions):
        nonlocal slots
        slots += inputs["input_ids"].numel()
        return logits(self, inputs, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixTree, "logits", counted)
        lm._loglikelihood_tokens(requests, True)
    distinct = {(i % 250, length) for i, length in enumerate(lengths)}
    assert sum(length for _, length in distinct) / slots > 0.9


def test_an_empty_continuation_is_rejected():
    with pytest.raises(ValueError, match="a continuation has 0 tokens"):
        rows_for(family_model("llama"), [([1, 2], [])])


@pytest.mark.parametrize("context", [" ", "\n", " \n "])
def test_a_context_of_white_space_is_rejected_as_by_hflm(context):
    lm = family_model("llama")
    requests = instances("loglikelihood", [("other", " row"), (context, "text")])
    with pytest.raises(AssertionError):
        reference_lm(lm.model).loglikelihood(requests, True)
    with pytest.raises(ValueError, match="a context has no tokens"):
        lm.loglikelihood(requests, True)


@pytest.mark.parametrize("model_type", ["bloom", "qwen3"])
def test_a_single_model_may_be_of_any_architecture(model_type):
    if model_type == "bloom":
        config = BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4, eos_token_id=256)
        with pytest.raises(ValueError, match="not supported"):
            architecture_of(config)
        model = tiny_model(config)
    else:
        model, _ = family_pair(model_type)
    tree = SeparateModels({"model": model})
    lm = FamilyLM(tree, tokenizer=byte_tokenizer(), batch_size=3, max_length=60)
    reference = reference_lm(model, batch_size=2)
    requests = instances("loglikelihood", PAIRS)
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert_same_scores(lm.loglikelihood(requests, True), reference.loglikelihood(requests, True))
    found = lm.loglikelihood_rolling(rolling, True)
    assert found == pytest.approx(reference.loglikelihood_rolling(rolling, True), abs=1e-4)


def test_members_share_their_parents_tensors():
    teacher, student = family_pair("llama")
    tree = PrefixTree(RECIPES, teacher=teacher, student=student)
    owned = {p.data_ptr() for model in (teacher, student) for p in model.parameters()}
    for model in tree.models.values():
        assert {p.data_ptr() for p in model.parameters()} <= owned

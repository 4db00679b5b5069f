"""Families on plain text: pseudo-perplexity of masked models, perplexity of causal ones."""

import csv
import json
import math

import pytest
import torch
from conftest import byte_tokenizer, run_module, save_pair, tiny_model
from lm_eval.api.metrics import weighted_perplexity
from masked_models import NUM_POSITIONS, encoder_config, texts_of, tiny_distilbert, word_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM

from evaluate.arguments import TextArguments
from evaluate.evaluate import main
from evaluate.family import SeparateModels
from evaluate.masked_family import MaskedFamilyLM
from evaluate.pseudo_perplexity import encode, score_members, stderr_of_perplexity
from evaluate.result import read_results
from evaluate.text_task import text_task
from patching.architectures.distilbert import as_bert
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import intermediate_model, naively_pruned

LAYER_MAP = LayerMap((0, 2, 4), 6)
TEXTS = [*texts_of([4, 9, 2]), texts_of([4])[0], *texts_of([NUM_POSITIONS + 6], seed=2)]


@pytest.fixture(scope="module")
def masked_pair(tmp_path_factory):
    """A BERT, a DistilBERT and a text file, which has one text twice."""
    folder = tmp_path_factory.mktemp("masked")
    models = (tiny_model(encoder_config("bert", 6), seed=1), tiny_distilbert(3))
    for name, model in zip(("teacher", "student"), models):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "words.txt").write_text("\n\n".join([*TEXTS, "  ", ""]))
    return folder, *models


def command(folder, save_directory, *flags: str) -> list[str]:
    return [
        *("--teacher_model_name_or_path", str(folder / "teacher")),
        *("--student_model_name_or_path", str(folder / "student")),
        *("--save_directory", str(save_directory), "--dtype", "float32", *flags),
    ]


def scores_in(folder, metric: str, column: str = "value") -> dict[tuple[str, int], float]:
    with (folder / "summary.csv").open() as file:
        return {
            (row["series"], int(row["num_layers_to_patch"])): float(row[column])
            for row in csv.DictReader(file)
            if row["metric"] == metric
        }


def test_a_masked_family_is_swept_like_any_other(masked_pair, tmp_path, capsys):
    folder, teacher, student = masked_pair
    flags = ["--kept_layers", "0,2,4", "--baselines", "naive"]
    main(command(folder, tmp_path, *flags, "--dataset", str(folder / "words.txt")))
    assert (
        "words: 1 of 5 texts are longer than the model can read: 8 tokens"
        in capsys.readouterr().out
    )
    scores = scores_in(tmp_path, "pseudo_perplexity")
    errors = scores_in(tmp_path, "pseudo_perplexity", "stderr")
    bert, tokenizer = as_bert(student), word_tokenizer()
    expected = {}
    for k in range(4):
        recipe = intermediate_model(LAYER_MAP, k, "last")
        expected["family", k] = assemble(recipe, teacher=teacher, student=bert)
        if k < 3:
            expected["naive", k] = assemble(naively_pruned(LAYER_MAP, recipe), teacher=teacher)
    assert scores.keys() == expected.keys()
    for name, model in expected.items():
        encoded = encode(TEXTS, tokenizer, model.config)
        of_texts = score_members(SeparateModels({"m": model}), tokenizer, encoded, None, False)["m"]
        assert scores[name] == pytest.approx(weighted_perplexity(of_texts), rel=1e-5), name
        assert errors[name] == pytest.approx(stderr_of_perplexity(of_texts), rel=1e-4), name
    for suffix in ("md", "png", "svg"):
        assert (tmp_path / f"summary.{suffix}").stat().st_size > 0
    assert "\n| words | pseudo_perplexity ↓ |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_two_ranks_give_one_ranks_numbers(masked_pair, tmp_path):
    folder, *_ = masked_pair
    flags = ["--kept_layers", "0,2,4", "--baselines", "naive", "--device", "cpu"]
    flags += ["--dataset", str(folder / "words.txt")]
    main(command(folder, tmp_path / "one", *flags))
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "evaluate.evaluate", *command(folder, tmp_path / "two", *flags)),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 texts are longer than the model can read") == 1
    for column in ("value", "stderr"):
        one, two = (
            scores_in(tmp_path / run, "pseudo_perplexity", column) for run in ("one", "two")
        )
        assert len(one) == 7
        assert two == pytest.approx(one, rel=1e-5)


def test_a_masked_pair_needs_text(masked_pair, tmp_path, capsys):
    folder, *_ = masked_pair
    for flags, message in (
        ([], "a bert predicts masked tokens: name text to evaluate it on with --dataset"),
        (["--dataset", str(folder / "no.txt")], "no.txt"),
    ):
        with pytest.raises(SystemExit) as exited:
            main(command(folder, tmp_path, "--kept_layers", "0,2,4", *flags))
        assert exited.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_masked_model_scores_only_whole_texts(masked_pair):
    _, teacher, _ = masked_pair
    lm = MaskedFamilyLM(SeparateModels({"teacher": teacher}), tokenizer=word_tokenizer())
    for ask in (lm.loglikelihood, lm.generate_until):
        with pytest.raises(ValueError, match="evaluate it on text, with --dataset"):
            ask([])


@torch.no_grad()
def test_a_causal_familys_perplexity_is_that_of_each_next_token(tmp_path):
    save_pair(tmp_path, "gpt2")
    texts = ["first text", "a second one, longer", "first text"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "t.jsonl").write_text(lines)
    flags = ["--dataset", str(tmp_path / "t.jsonl"), "--num_layers_to_patch", "0,2"]
    main(command(tmp_path, tmp_path / "out", *flags))
    scores = scores_in(tmp_path / "out", "perplexity")
    tokenizer = byte_tokenizer()
    for k, name in ((0, "student"), (2, "teacher")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        total, num_tokens = 0.0, 0
        for text in texts:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
            log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
            total += log_p.gather(-1, ids[0, 1:, None]).sum().item()
            num_tokens += ids.shape[1] - 1
        assert scores["family", k] == pytest.approx(math.exp(-total / num_tokens), rel=1e-4)


@torch.no_grad()
def test_tokens_that_a_tokenizer_adds_do_not_count(tmp_path):
    """Perplexity is that of the text, also where the tokenizer puts a token before it."""
    save_pair(tmp_path, "gpt2")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(tmp_path / name)
    texts = ["first text", "a second one, longer " * 12]  # more than the model reads at once
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    flags = ["--dataset", str(tmp_path / "t.txt"), "--num_layers_to_patch", "2"]
    main(command(tmp_path, tmp_path / "out", *flags))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    total, num_tokens = 0.0, 0
    for text in map(str.strip, texts):
        ids = [tokenizer.bos_token_id, *byte_tokenizer()(text)["input_ids"]]
        for start in range(0, len(ids) - 1, 128):
            # A window is as long as the model reads. Its last token is predicted, but not read.
            stop = min(start + 128, len(ids) - 1)
            first = max(0, stop - 128)
            log_p = model(torch.tensor([ids[first:stop]])).logits.double().log_softmax(-1)[0]
            targets = torch.tensor(ids[start + 1 : stop + 1])
            total += log_p[start - first :].gather(-1, targets[:, None]).sum().item()
        num_tokens += len(ids) - 1
    (score,) = scores_in(tmp_path / "out", "perplexity").values()
    assert score == pytest.approx(math.exp(-total / num_tokens), rel=1e-4)
    (result,) = read_results(tmp_path / "out").values()
    assert {key for key in result.results["t"] if "," in key} == {
        "perplexity,none", "perplexity_stderr,none",
    }  # fmt: skip


def test_a_limit_takes_the_first_documents(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"text {i}" for i in range(10)))
    arguments = TextArguments(dataset=str(tmp_path / "t.txt"), dataset_config="")
    assert arguments.read_texts(None) == [f"text {i}" for i in range(10)]
    assert arguments.read_texts(3) == ["text 0", "text 1", "text 2"]
    assert arguments.read_texts(0.2) == arguments.read_texts(None)  # lm-eval takes the share
    assert arguments.text_name == "t"
    with pytest.raises(ValueError, match="t: there is no text in it"):
        text_task("t", ["x"], [0], ["perplexity"])

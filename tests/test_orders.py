"""Orders from the command line: measured, stored, resumed, used."""

import json
import re
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, byte_tokenizer, run_module, save_pair, tiny_model, trained_student
from local_tasks import ROLLING, TEXTS, write_task
from patching_models import family_config, save_models
from transformers import AutoModelForCausalLM

from evaluate.evaluate import EvaluationArguments
from evaluate.evaluate import main as evaluate_main
from evaluate.plan import second_family
from patching.blocks import LayerMap
from patching.family import Family
from patching.orders import __main__ as orders
from patching.orders import findings, measurements
from patching.orders.findings import most_restored_first
from patching.orders.measured import Measured
from patching.orders.measurements import Measurements
from patching.parents import Parents
from patching.patch import build_intermediate_model
from patching.patch import main as patch_main
from patching.recipe import patched_model
from patching.running import teacher_kl
from patching.running.calibration import Calibration
from patching.running.teacher_kl import TeacherKL

LAYERS = LayerMap((0, 2, 4, 6, 7), 8)  # patchable 0, 1 and 2, single 3 and 4


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("orders"), "llama", LAYERS.kept, 8)


@pytest.fixture(scope="module")
def flags(pair_folders, text_file) -> list[str]:
    teacher, student = map(str, pair_folders)
    return [
        *("--teacher_model_name_or_path", teacher, "--student_model_name_or_path", student),
        *("--calibration", str(text_file), "--calibration_texts", "6"),
        *("--calibration_length", "12"),
    ]


@pytest.fixture(scope="module")
def exact(flags, tmp_path_factory):
    """The folder that an exhaustive search writes."""
    folder = tmp_path_factory.mktemp("exact")
    orders.main([*flags, "--save_directory", str(folder), "--exact", "--beam", "2"])
    return folder


def read(folder) -> dict:
    return json.loads((folder / "order.json").read_text())


def test_every_order_is_measured_and_compared(exact, pair_folders, text_file):
    found = read(exact)
    names = ["last", "first", "block_influence", "klpatch", "beam 2", "exact"]
    assert list(found["orders"]) == names
    assert (exact / "kl.png").stat().st_size > 10_000
    kl = {}
    for order in found["orders"].values():
        members = order["members"]
        assert [m["num_layers_to_patch"] for m in members] == [0, 1, 2, 3]
        for member in members:
            patched = LAYERS.patched_layers(member["num_layers_to_patch"], tuple(order["order"]))
            assert member["patched_layers"] == sorted(patched)
            kl[patched] = member["kl"]
        assert members[-1]["kl"] == 0 and members[0]["layers"] == 5
        assert order["mean_kl"] == pytest.approx((members[1]["kl"] + members[2]["kl"]) / 2)
        assert order["regret_of_best_sets"] >= order["regret"] >= 0
    best = found["orders"]["exact"]
    assert best["regret"] == 0
    assert found["order"] == found["orders"][found["name"]]["order"]
    matched = {name: order["mean_kl_matched"] for name, order in found["orders"].items()}
    assert matched[found["name"]] == min(matched.values())
    for k, member in enumerate(found["best_sets"], start=1):
        assert member["kl"] <= min(order["members"][k]["kl"] for order in found["orders"].values())
    first = [sorted(LAYERS.patched_layers(k, "first")) for k in range(4)]
    assert [m["patched_layers"] for m in found["orders"]["first"]["members"]] == first

    # The same numbers from a tree of its own.
    family = Family.from_pretrained(*map(str, pair_folders), dtype=torch.float32)
    text = Calibration.read(str(text_file), num_texts=6, length=12)
    measure = TeacherKL(
        **family.parents.load(("teacher", "student")),
        batches=text.batches(family.tokenizer, family.configs["teacher"]),
    )
    patched = LAYERS.patched_layers(2, "last")
    assert measure.of({"it": patched_model(LAYERS, patched)})["it"] == kl[patched]


def test_every_size_of_every_order_gets_its_scale(exact, pair_folders, text_file):
    found = read(exact)
    assert found["scales"]["found_on"] | {"text_sha256": ""} == {
        "text": "the first 6 texts of text.jsonl",
        "text_sha256": "",
        "dtype": "float32",
        "documents": 6,
        "tokens": 72,
    }
    family = Family.from_pretrained(*map(str, pair_folders), exact / "order.json", dtype="float32")
    text = Calibration.read(str(text_file), num_texts=6, length=12)
    measure = TeacherKL(
        **family.parents.load(("teacher", "student")),
        batches=text.batches(family.tokenizer, family.configs["teacher"]),
    )
    num_gains, recipes, expected = 0, {}, {}
    for name, order in found["orders"].items():
        means = []
        for member in order["members"]:
            patched = frozenset(member["patched_layers"])
            is_between = 0 < member["num_layers_to_patch"] < 3
            assert (patched in family.scales.sets) == is_between
            factors = {int(run): factor for run, factor in member["factors"].items()}
            assert factors == family.scales.factors(patched)
            assert member["kl_matched"] <= member["kl"]
            assert (member["kl_matched"] < member["kl"]) == bool(factors)
            means += [member["kl_matched"]] * is_between
            num_gains += bool(factors)
            label = str(sorted(patched))
            recipes[label] = family.recipe(patched_layers=patched)
            expected[label] = member["kl_matched"]
        assert order["mean_kl_matched"] == pytest.approx(sum(means) / 2), name
    assert num_gains
    assert measure.of(recipes) == pytest.approx(expected, abs=1e-6)


def test_without_matched_scale(exact, flags, tmp_path, capsys):
    shutil.copy(exact / "order_kl.json", tmp_path)
    orders.main([*flags, "--save_directory", str(tmp_path), "--match_scale", "False"])
    found, whole = read(tmp_path), read(exact)
    assert "scales" not in found
    for name, order in found["orders"].items():
        assert "mean_kl_matched" not in order
        assert order["mean_kl"] == whole["orders"][name]["mean_kl"]
    assert found["name"] == min(found["orders"], key=lambda name: found["orders"][name]["mean_kl"])


def test_an_architecture_that_cannot_be_rescaled_gets_an_order_alone(text_file, tmp_path, capsys):
    teacher = tiny_model(family_config("opt", do_layer_norm_before=False, num_hidden_layers=8))
    names = save_models(tmp_path, teacher, trained_student(teacher, LAYERS), LAYERS)
    orders.main(
        [
            *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
            *("--calibration", str(text_file), "--calibration_texts", "2"),
            *("--calibration_length", "8", "--save_directory", str(tmp_path / "out")),
        ]
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no matched scale" in line]
    assert line.startswith("no matched scale: model_type=opt: the scale of its layers cannot be")
    assert "scales" not in read(tmp_path / "out")


def test_the_area_is_the_mean_along_parameters():
    points = [(0, 4.0), (10, 2.0), (40, 0.0)]
    members = [{"parameters": {"both_counted": p}, "kl": kl} for p, kl in points]
    assert findings._area(members) == pytest.approx((30 + 30) / 40)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_stopped_and_started_again(exact, flags, tmp_path, monkeypatch, stop_after):
    """After 9 trees, it is stopped in the search for scales."""
    of, num_trees = TeacherKL.sums_of_rows, 0

    def stopping(self, recipes, *settings):
        nonlocal num_trees
        num_trees += 1
        if num_trees > stop_after:
            raise KeyboardInterrupt
        return of(self, recipes, *settings)

    monkeypatch.setattr(measurements, "SETS_PER_TREE", 5)
    asked = [*flags, "--save_directory", str(tmp_path), "--exact", "--beam", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TeacherKL, "sums_of_rows", stopping)
        orders.main(asked)
    assert not (tmp_path / "order.json").exists()
    stored = json.loads((tmp_path / "order_kl.json").read_text())
    kept = {**stored["kl"], **stored["rows"]}
    assert 0 < len(kept) <= 5 * stop_after
    assert bool(stored["rows"]) == (stop_after == 9)
    measured = []
    monkeypatch.setattr(
        TeacherKL,
        "sums_of_rows",
        lambda self, recipes, *settings: measured.extend(recipes) or of(self, recipes, *settings),
    )
    orders.main(asked)
    assert measured and not set(measured) & set(kept)
    again, whole = read(tmp_path), read(exact)
    for name in ("order", "orders", "best_sets", "settings", "scales"):
        assert again[name] == whole[name]

    monkeypatch.setattr(Parents, "load", lambda *_: pytest.fail("everything is measured"))
    orders.main(asked)


KILLED_IN_A_SEARCH = """
import os, signal, sys
from patching.orders import __main__, measurements

of, num_trees = measurements.TeacherKL.sums_of_rows, 0

def killing(*arguments, **settings):
    global num_trees
    num_trees += 1
    if num_trees == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return of(*arguments, **settings)

measurements.TeacherKL.sums_of_rows = killing
measurements.SETS_PER_TREE = 5
__main__.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_rerun_it_finds_the_same(exact, flags, tmp_path):
    asked = [*flags, "--save_directory", str(tmp_path), "--exact", "--beam", "2"]
    words = [sys.executable, "-c", KILLED_IN_A_SEARCH, *asked]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["order_kl.json"]
    assert 5 < len(json.loads((tmp_path / "order_kl.json").read_text())["kl"]) <= 10
    orders.main(asked)
    again, whole = read(tmp_path), read(exact)
    for name in ("order", "name", "orders", "best_sets", "settings"):
        assert again[name] == whole[name]


def test_other_settings_are_refused(exact, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        orders.main([*flags, "--save_directory", str(exact), "--calibration_skip", "1"])
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: .*order_kl.json was measured with text=.*\n", line)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--beam", "0"], "beam=0: choose 1 or more"),
        (["--order", "klpatch"], "is always searched here"),
        (["--calibration_skip", "40"], "no text in it after its first 40"),
        (["--order", "middle"], "choose last, first, whole_periods, or an existing JSON file"),
    ],
)
def test_bad_flags_end_in_one_line(flags, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit, match="2"):
        orders.main([*flags, "--save_directory", str(tmp_path), *extra])
    assert message in capsys.readouterr().err


def test_patch_takes_the_file_and_searches_alike(exact, flags, tmp_path):
    size = ["--num_layers_to_patch", "1", "--dtype", "float32"]
    path = exact / "order.json"
    pair = flags[:4]
    patch_main([*pair, *size, "--order", str(path), "--save_directory", str(tmp_path / "file")])
    patch_main([*flags, *size, "--order", "klpatch", "--save_directory", str(tmp_path / "search")])
    found = read(exact)
    for name, order in (("file", found["order"]), ("search", found["orders"]["klpatch"]["order"])):
        made = json.loads((tmp_path / name / "provenance.json").read_text())
        assert made["order"] == order
        assert made["patched_layers"] == sorted(LAYERS.patched_layers(1, tuple(order)))


def test_evaluate_searches_once(exact, flags, tmp_path, monkeypatch):
    write_task(tmp_path, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    out = tmp_path / "out"
    asked = [
        *(*flags, "--order", "klpatch", "--save_directory", str(out), "--tasks", "rolling"),
        *("--include_path", str(tmp_path), "--dtype", "float32", "--num_layers_to_patch", "1,2"),
    ]
    evaluate_main(asked)
    found = read(exact)["orders"]["klpatch"]
    for k in (1, 2):
        result = json.loads((out / f"family_k{k}.json").read_text())
        assert result["order"] == found["order"]
    monkeypatch.setattr(TeacherKL, "sums_of_rows", lambda *_, **__: pytest.fail("measured before"))
    evaluate_main(asked)


@pytest.mark.parametrize("command", [patch_main, evaluate_main])
@pytest.mark.parametrize(
    ("kind", "kept", "num_layers", "message"),
    [
        (
            "llama",
            (0, 1, 3, 5, 7),
            8,
            "kept_layers=[0, 2, 4, 6, 7] and this family has [0, 1, 3, 5",
        ),
        ("llama", (0, 2, 4, 6, 7), 9, "num_teacher_layers=8 and this family has 9"),
        ("mistral", LAYERS.kept, 8, "model_type=llama and this family has mistral"),
    ],
)
def test_an_order_of_other_layers_is_refused(
    exact, tmp_path, capsys, monkeypatch, command, kind, kept, num_layers, message
):
    teacher, student = save_pair(tmp_path, kind, kept, num_layers)
    monkeypatch.setattr(Parents, "load", lambda *_: pytest.fail("weights load"))
    with pytest.raises(SystemExit, match="2"):
        command(
            [
                *("--teacher_model_name_or_path", str(teacher)),
                *("--student_model_name_or_path", str(student), "--num_layers_to_patch", "1"),
                *("--save_directory", str(tmp_path / "out")),
                *("--order", str(exact / "order.json")),
            ]
        )
    found = f"error: order={exact / 'order.json'} was found for {message}"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(found) and line.endswith("search one for it with patching.orders")


def test_an_order_of_other_weights_is_taken_with_a_warning(exact, pair_folders, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(pair_folders[1], renamed)
    names = str(pair_folders[0]), str(renamed)
    with warnings.catch_warnings(action="error"):
        order = Family.from_pretrained(*names, exact / "order.json").order
    assert list(order) == read(exact)["order"]
    values = read(exact)
    values["settings"]["student"] = "student 0123456789abcdef"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="was found for student=student 0123456789abcdef, and"):
        assert Family.from_pretrained(*names, other).order == order


@pytest.mark.parametrize(("kept", "is_taken"), [(LAYERS.kept, True), ((0, 1, 3, 5, 7), False)])
def test_a_random_student_takes_the_order_where_its_layers_are_the_same(
    exact, pair_folders, tmp_path, kept, is_taken
):
    arguments = EvaluationArguments(
        *map(str, pair_folders),
        order=str(exact / "order.json"),
        random_student=str(save_pair(tmp_path, "llama", kept, 8)[1]),
        save_directory=tmp_path,
    )
    family = arguments.open_family()
    second = second_family(family, arguments)
    assert second.order == (family.order if is_taken else "first")  # else what suits a llama


@pytest.mark.slow
def test_two_ranks_search_once_and_agree(exact, flags, tmp_path):
    write_task(tmp_path, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    out = tmp_path / "out"
    done = run_module(
        *(*launcher, "evaluate.evaluate", *flags, "--order", "klpatch", "--save_directory", out),
        *("--tasks", "rolling", "--include_path", tmp_path, "--dtype", "float32"),
        *("--num_layers_to_patch", "0-1", "--device", "cpu"),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("klpatch, k = 1: patched") == 1
    for k in (0, 1):
        result = json.loads((out / f"family_k{k}.json").read_text())
        assert result["order"] == read(exact)["orders"]["klpatch"]["order"]
    done = run_module(*launcher, "patching.orders", *flags, "--save_directory", tmp_path / "two")
    assert done.returncode != 0 and not (tmp_path / "two").exists()
    assert "2 processes were started, and this command runs as one" in done.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_layers_to_patch", "1"], "--calibration belongs to --order klpatch or block_infl"),
        (["--patched_layers", "1", "--order", "klpatch"], "leave out --order klpatch"),
    ],
)
def test_patch_refuses_text_and_searches_for_nothing(flags, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit, match="2"):
        patch_main([*flags, *extra, "--save_directory", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_calibration_text_that_is_evaluated_on_is_told(flags, tmp_path):
    calibration = tmp_path / "calibration.jsonl"
    texts = ["another text", *TEXTS[:2]]
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_task(tmp_path, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(tmp_path, "others", [{"text": text} for text in TEXTS[2:]], **ROLLING)
    with pytest.warns(UserWarning, match="calibration texts also appear in") as told:
        evaluate_main(
            [
                *(*flags, "--calibration", str(calibration), "--order", "klpatch"),
                *("--save_directory", str(tmp_path / "out"), "--tasks", "rolling,others"),
                *("--include_path", str(tmp_path), "--dtype", "float32"),
                *("--num_layers_to_patch", "1", "--dataset", str(calibration)),
            ]
        )
    found = [re.match(r"(\d of the 3) .* appear in (\w+)", str(w.message)) for w in told]
    assert {match[2]: match[1] for match in found if match} == {
        "rolling": "2 of the 3",
        "calibration": "3 of the 3",
    }


def test_a_search_needs_text(pair_folders, tmp_path, capsys):
    teacher, student = map(str, pair_folders)
    with pytest.raises(SystemExit, match="2"):
        patch_main(
            [
                *("--teacher_model_name_or_path", teacher),
                *("--student_model_name_or_path", student, "--order", "block_influence"),
                *("--num_layers_to_patch", "1", "--save_directory", str(tmp_path / "out")),
            ]
        )
    assert "measured on text: name some with --calibration" in capsys.readouterr().err


def test_an_order_of_ones_own_is_measured_too(exact, flags, tmp_path):
    own = tmp_path / "own.json"
    own.write_text("[1, 0, 2]")
    shutil.copy(exact / "order_kl.json", tmp_path)
    orders.main([*flags, "--save_directory", str(tmp_path), "--order", str(own)])
    found = read(tmp_path)["orders"]["given"]
    assert found["order"] == [1, 0, 3, 4, 2]
    assert found["members"][2]["patched_layers"] == [0, 1]
    assert "regret" not in found


def test_in_python_an_order_is_searched_beforehand(pair_folders):
    message = "order=klpatch: choose last, first, whole_periods, or an existing"
    with pytest.raises(ValueError, match=message):
        build_intermediate_model(*map(str, pair_folders), 1, order="klpatch")


def test_a_model_that_overflows_never_wins(flags, tmp_path, monkeypatch):
    kl_of_tokens = teacher_kl.kl_of_tokens

    def overflowing(teacher_ND, head, models, change):
        """NaN for the models whose head is the student's: some sets of each size."""
        kl_KN = kl_of_tokens(teacher_ND, head, models, change)
        kl_KN[[o.weight.data_ptr() != head.weight.data_ptr() for _, o in models]] = torch.nan
        return kl_KN

    monkeypatch.setattr(teacher_kl, "kl_of_tokens", overflowing)
    asked = [*flags, "--save_directory", str(tmp_path), "--exact", "--beam", "2"]
    asked += ["--match_scale", "False"]
    with pytest.warns(UserWarning, match="KL of models in float32: .* rank last"):
        orders.main(asked)

    def refuse(constant):
        pytest.fail(f"{constant} in JSON")

    found = json.loads((tmp_path / "order.json").read_text(), parse_constant=refuse)
    json.loads((tmp_path / "order_kl.json").read_text(), parse_constant=refuse)
    for name in ("klpatch", "beam 2", "exact"):
        order = found["orders"][name]
        assert all(4 in member["patched_layers"] for member in order["members"][1:])
        assert order["mean_kl"] == pytest.approx(sum(m["kl"] for m in order["members"][1:3]) / 2)
    assert all(4 in member["patched_layers"] for member in found["best_sets"])
    assert found["orders"]["first"]["mean_kl"] is None
    orders.main(asked)  # from the file
    assert json.loads((tmp_path / "order.json").read_text())["orders"] == found["orders"]


@pytest.mark.parametrize("command", [orders.main, patch_main])
def test_overflow_ends_in_one_line(pair_folders, text_file, tmp_path, capsys, command):
    teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0])
    with torch.no_grad():
        teacher.model.layers[3].mlp.down_proj.weight.mul_(1e6)
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    extra = ["--order", "klpatch", "--num_layers_to_patch", "1"] if command is patch_main else []
    with pytest.raises(SystemExit, match="2"):
        command(
            [
                *("--teacher_model_name_or_path", str(tmp_path / "teacher")),
                *("--student_model_name_or_path", str(pair_folders[1]), "--dtype", "float16"),
                *("--calibration", str(text_file), "--calibration_texts", "3", *extra),
                *("--save_directory", str(tmp_path / "out")),
            ]
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch("error: .* are not numbers .*use --dtype float32.*", line)
    assert not (tmp_path / "out" / "order.json").exists()


def test_influence_of_what_is_put_back():
    influences = [9.0, 0.1, 9.0, 0.3, 9.0, 0.2, 9.0, 9.0]
    assert most_restored_first(LAYERS, influences) == [1, 2, 0]


def test_a_damaged_file_is_named(exact, pair_folders, text_file, tmp_path):
    (tmp_path / "order_kl.json").write_text('{"settings": 1}')
    family = Family.from_pretrained(*map(str, pair_folders))
    text = Calibration("x", ["abc"], 8)
    with pytest.raises(ValueError, match="order_kl.json is damaged"):
        Measurements(family, text, tmp_path / "order_kl.json")


@pytest.mark.slow
def test_as_a_user_runs_it(flags, tmp_path):
    done = run_module("patching.orders", *flags, "--save_directory", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "klpatch" in done.stdout and (tmp_path / "order.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_influence": [0.1]}, "1 numbers in block_influence for 3 layers"),
        ({"length_ratios": []}, "0 numbers in length_ratios for 2 layers"),
        ({"rows": {"0 x 1.1": [1.0, 2.0], "0 x 1.2": [1.0]}}, "rows have different numbers"),
        ({"rows": {"0 x 1.1": []}}, "rows have different numbers"),
    ],
)
def test_measured_numbers_of_other_counts_are_refused(changes, message, tmp_path):
    settings = {"num_teacher_layers": 3, "kept_layers": [0, 2]}
    good = {
        "settings": settings,
        "block_influence": [0.1, 0.2, 0.3],
        "length_ratios": [1.0, 1.1],
        "kl": {"": 0.5, "0": 0.1},
        "rows": {"0 x 1.1": [1.0, 2.0]},
    }
    path = tmp_path / "order_kl.json"
    path.write_text(json.dumps(good))
    assert Measured.open(settings, path).influences == [0.1, 0.2, 0.3]
    path.write_text(json.dumps(good | changes))
    with pytest.raises(ValueError, match=f"order_kl.json is damaged .{message}.*remove it"):
        Measured.open(settings, path)

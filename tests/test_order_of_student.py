"""`--measure_order`: what training measures once the student is saved, on text of its own."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, run_module
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from patching.family import Family
from patching.orders.findings import best_order
from patching.orders.measurements import Measurements
from patching.parents import Parents
from patching.patch import main as patch_main
from patching.student_config import read_student_config
from train import order_of_student
from train.data import documents_set_aside, load_rows
from train.data_args import DataArguments
from train.order_of_student import MOST_MODELS, Cost, last_logged
from train.saving import upload
from train.train import main
from train.training_args import DistillationArguments

TOKENIZER = byte_tokenizer()


def command(teacher, folder, dataset, *flags) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False,
        "gradient_accumulation_steps": 2, "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "resume_from_checkpoint": "last",
    }  # fmt: skip
    words = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return [*words, *map(str, flags)]


@pytest.fixture(scope="module")
def run(pair_folders, text_file, tmp_path_factory):
    """The folder of a student with a measured order, and what the run printed."""
    folder = tmp_path_factory.mktemp("run") / "student"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(command(pair_folders[0], folder, text_file))
    return folder, printed.getvalue()


def test_the_student_carries_the_best_order_and_its_scales(run, pair_folders, text_file, tmp_path):
    folder, printed = run
    assert {path.name for path in folder.iterdir()} >= {"order.json", "order_kl.json", "run.json"}
    found = json.loads((folder / "order.json").read_text())
    assert [*found["orders"]] == ["last", "first", "klpatch"]
    config = read_student_config(str(folder))
    best = best_order(found)
    expected = best if best in ("last", "first") else tuple(found["orders"][best]["order"])
    assert config.patch_order == expected
    assert config.scales.to_dict() == found["scales"]
    between = {
        frozenset(member["patched_layers"])
        for order in found["orders"].values()
        for member in order["members"][1:-1]
    }
    assert config.scales.sets.keys() == between
    stored = json.loads((folder / "run.json").read_text())
    assert stored["student"] == json.loads(json.dumps(config.to_dict()))
    assert stored["log"] and stored["held_out"]

    # Said before, with what it costs; and after, with what was found.
    before, after = printed.index("measuring the order of patching"), printed.index("| order |")
    assert printed.index("student saved in") < before < after
    line = printed[before : printed.index("\n", before)]
    assert "on 3 documents of text.jsonl set aside from training: about " in line
    assert "models on 96 tokens, " in line and " FLOPs, " in line and " s (--measure_order" in line
    assert "order of patching saved with the student: " in printed[after:]

    # The same numbers with patching.orders' own tools, in the teacher's dtype.
    arguments = DataArguments(dataset=str(text_file), max_length=32)
    documents = documents_set_aside(arguments, 0, 64)
    text = order_of_student._calibration(arguments, documents)
    family = Family.from_pretrained(str(pair_folders[0]), str(folder), match_scale=False)
    measure = Measurements(family, text)
    assert found["settings"] == measure.settings
    patched = family.layer_map.patched_layers(1, "last")
    (last,) = (m for m in found["orders"]["last"]["members"] if m["num_layers_to_patch"] == 1)
    assert measure([patched])[patched] == pytest.approx(last["kl"])

    # It is the default, and the paper's way is a flag away.
    own = Family.from_pretrained(str(pair_folders[0]), str(folder))
    assert own.order == config.patch_order and own.scales == config.scales
    flags = ["--teacher_model_name_or_path", pair_folders[0], "--student_model_name_or_path"]
    flags = [*map(str, flags), str(folder), "--num_layers_to_patch", "1"]
    for name, more in (("own", []), ("paper", ["--order", "last", "--match_scale", "False"])):
        patch_main([*flags, "--save_directory", str(tmp_path / name), *more])
    own_record, paper_record = (
        json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("own", "paper")
    )
    assert own_record["recipe"] == own.recipe(1).to_dict()
    assert paper_record["order"] == "last" and "matched_scale" not in paper_record
    assert not any(" x " in layer for layer in paper_record["recipe"]["layers"])


def test_the_card_names_the_measured_order(run):
    folder, _ = run
    card = (folder / "README.md").read_text()
    order = read_student_config(str(folder)).patch_order
    words = (
        f"{order} layer first" if isinstance(order, str) else "in the sequence of student layers"
    )
    assert f"patched {words}" in card and "| optimizer steps | 4 |" in card
    assert "| kl, held out | " in card


def test_what_names_the_machine_is_not_uploaded(run, monkeypatch):
    folder, _ = run
    uploaded = []
    monkeypatch.setattr("train.saving.push", lambda *arguments: uploaded.append(arguments) or "")
    upload(DistillationArguments(save_directory=str(folder)))
    names = {*uploaded[0][-1]}
    assert {"config.json", "model.safetensors", "student_config.json", "README.md"} <= names
    assert not names & {"order.json", "order_kl.json", "run.json", "loss.png"}
    text = (folder / "student_config.json").read_text()
    assert str(folder.parent) not in text and "set aside" in text
    assert HfApi  # the hub is never asked


def test_training_in_fp32_measures_the_order_in_fp32(pair_folders, text_file, tmp_path):
    """Also of a teacher stored in bf16, which a CPU without AVX-512 runs 100 times slower."""
    teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0], dtype=torch.bfloat16)
    for part in (teacher, TOKENIZER):
        part.save_pretrained(tmp_path / "teacher")
    main(command(tmp_path / "teacher", tmp_path / "student", text_file))
    found = json.loads((tmp_path / "student" / "order.json").read_text())
    assert found["settings"]["dtype"] == "float32"


@pytest.mark.slow
def test_a_requeued_run_measures_what_is_missing_and_nothing_else(
    run, pair_folders, text_file, monkeypatch, capsys
):
    folder, _ = run
    whole = json.loads((folder / "order.json").read_text())
    words = command(pair_folders[0], folder, text_file)
    monkeypatch.setattr("train.run.load_teacher", lambda *_: pytest.fail("it trains again"))
    with monkeypatch.context() as patch:
        patch.setattr(Parents, "load", lambda *_: pytest.fail("everything is measured"))
        main(words)  # finished
        assert "measuring" not in capsys.readouterr().out
        (folder / "order.json").unlink()  # stopped after the last measurement
        main(words)
    assert "already holds the finished student" in capsys.readouterr().out
    again = json.loads((folder / "order.json").read_text())
    assert {**again, "environment": 0} == {**whole, "environment": 0}


@pytest.fixture
def student(pair_folders, text_file, tmp_path, capsys):
    """Train in this process. Return the folder and what was printed."""

    def trained(*flags, dataset=text_file, teacher=pair_folders[0]):
        folder = tmp_path / "student"
        main(command(teacher, folder, dataset, *flags))
        return folder, capsys.readouterr().out

    return trained


def test_it_can_be_turned_off(student, monkeypatch):
    monkeypatch.setattr(Measurements, "__init__", lambda *_: pytest.fail("it was measured"))
    folder, printed = student("--measure_order", "False")
    assert "order of" not in printed and not (folder / "order.json").exists()
    config = read_student_config(str(folder))
    assert (config.patch_order, config.scales) == ("last", None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--order_budget", "2"],
            "models more than the 2 allowed, which --order_budget changes): the student is",
        ),
        pytest.param(
            ["--kept_layers", "0,2-5"],
            "not measured: there is no size between student and teacher",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_measured_is_said_and_the_student_is_complete(student, flags, message):
    folder, printed = student(*flags)
    assert message in printed
    assert not (folder / "order.json").exists()
    assert read_student_config(str(folder)).patch_order == "last"


@pytest.mark.slow
def test_a_small_budget_leaves_out_what_it_does_not_pay_for(student):
    folder, printed = student("--order_budget", "3")  # the student, and one size of last and first
    found = json.loads((folder / "order.json").read_text())
    assert set(found["orders"]) >= {"last", "first"}
    assert found["scales"]["sets"] == []
    assert len(json.loads((folder / "order_kl.json").read_text())["kl"]) <= 3
    assert "order of patching saved with the student" in printed


@pytest.mark.slow
def test_an_error_while_measuring_does_not_fail_the_run(student, monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("KL of models: all are not numbers\nmore")

    monkeypatch.setattr(order_of_student, "tried_orders", broken)
    folder, printed = student()
    assert (
        "the order could not be measured (KL of models: all are not numbers): the student is "
        "complete, and python -m patching.orders can measure it" in printed
    )
    assert read_student_config(str(folder)).patch_order == "last"


@pytest.mark.slow
def test_only_the_first_of_two_ranks_measures(pair_folders, text_file, tmp_path):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "train.train")
    words = command(pair_folders[0], tmp_path / "student", text_file)
    done = run_module(*launcher, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measuring the order of patching") == 1
    assert (tmp_path / "student" / "order.json").is_file()


def texts_of(rows) -> str:
    return "".join(TOKENIZER.decode(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_documents_set_aside_are_neither_trained_on_nor_held_out(text_file, streaming):
    arguments = DataArguments(
        dataset=str(text_file), max_length=64, heldout_documents=3, streaming=streaming
    )
    plain = load_rows(arguments, TOKENIZER, 0)
    rows = load_rows(arguments, TOKENIZER, 0, num_set_aside=3)
    set_aside = documents_set_aside(arguments, 0, 3)
    assert len(set_aside) == 3
    assert [*rows.held_out] == [*plain.held_out]
    all_texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    if streaming:
        assert set_aside == all_texts[3:6]
        rows_read = []
        for row in rows.train:
            rows_read.append(row)
            if sum(len(r["input_ids"]) for r in rows_read) > 2000:
                break
        train = texts_of(rows_read)
    else:
        train = texts_of(rows.train)
    held_out = texts_of(rows.held_out)
    for text in set_aside:
        assert text[:40] not in held_out
    num_tokens = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in set_aside)
    if not streaming:
        lengths = [sum(len(row["input_ids"]) for row in of.train) for of in (plain, rows)]
        assert lengths[0] - lengths[1] == num_tokens
        for i in range(40):
            where = [f"Document {i} says" in text for text in (train, held_out)]
            assert sum(where) == (0 if any(f"Document {i} says" in t for t in set_aside) else 1)
    else:
        assert all(f"Document {i} says" not in train for i in range(6))


def test_a_mixture_and_texts_of_tokens_and_a_single_document(tmp_path):
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(30))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    mixed = f"{tmp_path / 'a.jsonl'}=2,{tmp_path / 'b.jsonl'}=1"
    arguments = DataArguments(dataset=mixed, heldout_documents=3)
    found = documents_set_aside(arguments, 0, 6)
    assert [text[:4].strip() for text in found] == ["a 2", "a 3", "a 4", "a 5", "b 1", "b 2"]
    assert order_of_student._calibration(arguments, found).name == (
        "6 documents of a.jsonl and b.jsonl set aside from training"
    )

    ids = [[i, i + 1, i + 2] for i in range(20)]
    Dataset.from_dict({"ids": ids}).to_parquet(tmp_path / "tokens.parquet")
    tokens = DataArguments(dataset=str(tmp_path / "tokens.parquet"), tokens_column="ids")
    found = documents_set_aside(tokens, 0, 64)
    assert len(found) == 1 and found[0] in ids
    text = order_of_student._calibration(tokens, found)
    (batch,) = text.batches(TOKENIZER, torch.nn.Module())
    assert batch["input_ids"].tolist() == found
    assert (
        text.sha256
        != order_of_student._calibration(tokens, [ids[(ids.index(found[0]) + 1) % 20]]).sha256
    )

    Path(tmp_path / "one.txt").write_text("one document alone")
    one = DataArguments(dataset=str(tmp_path / "one.txt"), heldout_documents=0)
    assert documents_set_aside(one, 0, 64) == []
    assert len(load_rows(one, TOKENIZER, 0, 64).train) == 1


def test_costs_are_told_as_far_as_they_are_known():
    assert Cost(300, 16384, None).text(1e9) == "about 300 models on 16,384 tokens"
    cost = Cost(300, 1000, 10**6)
    assert cost.text(1e10) == "about 300 models on 1,000 tokens, 3e+11 FLOPs, 30 s"
    # As many as take what the training took, unless a number is given.
    assert cost.budget(None, 2.5e10) == 25 and cost.within(None, 2.5e10).num_models == 25
    assert cost.budget(None, 1e15) == cost.budget(None, None) == MOST_MODELS
    assert cost.within(None, 1e15) == cost
    assert cost.budget(7, 2.5e10) == 7
    assert last_logged([{"a": 1.0}, {"a": 2.0, "b": 0.0}, {}], "a") == 2.0
    assert last_logged([{"a": 1.0}], "b") is None


def test_the_plan_says_what_comes_after_training(pair_folders, text_file, tmp_path, capsys):
    words = command(pair_folders[0], tmp_path / "student", text_file, "--dry_run")
    main(words)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "order of patching" in x]
    assert line.startswith("then the order of patching on 64 documents set aside: about ")
    assert " models on 2,048 tokens, " in line
    for more in (["--measure_order", "False"], ["--kept_layers", "0,2-5"]):
        main([*words, *more])
        assert "order of patching" not in capsys.readouterr().out

"""Columns that hold no text, or no token ids, in the first document or in any other."""

import json

import pyarrow
import pytest
from conftest import run_module
from datasets import Dataset, Features, LargeList, List, Value
from pyarrow import parquet

from patching.files.columns import UnusableText
from patching.files.texts import load_documents
from patching.running.calibration import Calibration
from train import cache_teacher
from train.train import main


def jsonl(path, values, column="text"):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "holds_tokens", "message"),
    [
        ([None, ["a"], ["a"]], False, "holds lists of string values in .* and no text"),
        ([None, 5], False, "holds int64 values"),
        (["a", 5], False, "holds mixed values"),
        (["a", None, {"b": "c"}], False, "holds mixed values"),
        ([None, {"b": "c"}], False, "holds dict values"),
        ([["a", "b"]], True, "holds lists of string values in .* and no lists of token ids"),
        ([[1, 2], [1.5]], True, "holds lists of float64 values"),
        ([[[1, 2], [3]]], True, "holds lists of lists of int64 values"),
        ([[True, False]], True, "holds lists of bool values"),
        ([None, "a b"], True, "holds string values"),
        ([[1, 2], None, [], [3, None]], True, "document 4 of .*a.jsonl holds None"),
    ],
)
def test_other_values_are_refused(tmp_path, values, holds_tokens, message, streaming):
    path = jsonl(tmp_path / "a.jsonl", values)
    flag = "tokens_column" if holds_tokens else "text_column"
    with pytest.raises(UnusableText, match=f"^{flag}=text: .*{message}.*; correct it"):
        list(load_documents(path, streaming=streaming, holds_tokens=holds_tokens))


@pytest.mark.parametrize("streaming", [False, True])
def test_all_types_of_text_and_of_token_ids_are_taken(tmp_path, streaming):
    ids = [[1, 2], None, [], [3]]
    features = {f"list of {kind}": List(Value(kind)) for kind in ("uint16", "int32", "int64")}
    features["large list"] = LargeList(Value("int64"))
    data = Dataset.from_dict(dict.fromkeys(features, ids), features=Features(features))
    data.to_parquet(tmp_path / "ids.parquet")
    for name in features:
        path, settings = str(tmp_path / "ids.parquet"), {"streaming": streaming}
        documents = load_documents(path, text_column=name, holds_tokens=True, **settings)
        assert [document["text"] for document in documents] == ids
    texts = pyarrow.array(["a", None, "b"], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet")
    documents = load_documents(str(tmp_path / "texts.parquet"), streaming=streaming)
    assert [document["text"] for document in documents] == ["a", None, "b"]
    nothing = jsonl(tmp_path / "nothing.jsonl", [[], []])
    assert len(list(load_documents(nothing, streaming=streaming, holds_tokens=True))) == 2


def test_the_other_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,number\na,1\nb,2\n")
    with pytest.raises(UnusableText, match="int64 values in .*; correct it, or choose one of text"):
        load_documents(str(path), text_column="number")


def test_a_stream_without_types_is_checked_as_it_is_read(tmp_path):
    """CSV is read in parts of 10,000 lines, and the second part holds numbers alone."""
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a\n" * 10_000 + "5\n" * 3)
    documents = load_documents(str(path), streaming=True)
    assert documents.features is None
    with pytest.raises(UnusableText, match="document 10,001 of .* is 5, which is no text"):
        list(documents)
    reader = iter(documents)
    for _ in range(7):
        next(reader)
    documents.load_state_dict(documents.state_dict())
    with pytest.raises(UnusableText, match="document 10,001 of"):
        list(documents)


def test_calibration_text_is_checked_too(tmp_path):
    with pytest.raises(UnusableText, match="text_column=text: it holds lists of string values"):
        Calibration.read(jsonl(tmp_path / "a.jsonl", [None, ["a"]]))


GOOD = 1100
"""Documents before the bad one, more than are read at the start."""
COMMAND = ["--tokens_column", "ids", "--streaming", "True", "--heldout_documents", "0",
           "--measure_order", "False", "--max_length", "8", "--bf16", "False",
           "--shuffle_buffer", "10"]  # fmt: skip
STEPS = ["--max_steps", "9", "--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "True",
         "--gradient_accumulation_steps", "1"]  # fmt: skip
BAD_LATER = {
    "a gap": ([5, None], "tokens_column=ids: document 1,101 of", "holds None"),
    "beyond the tokenizer": ([5, 999], "tokens_column", "0 to 256"),
}


@pytest.mark.parametrize("bad", BAD_LATER)
def test_a_document_that_is_bad_later_in_a_stream_ends_a_run_in_one_line(
    bad, pair_folders, tmp_path, capsys
):
    last, *words = BAD_LATER[bad]
    text = jsonl(tmp_path / "a.jsonl", [[1, 2, 3, 4]] * GOOD + [last], "ids")
    flags = ["--teacher_model_name_or_path", str(pair_folders[0]), "--dataset", text, *COMMAND]
    with pytest.raises(SystemExit) as ended:
        out = ["--save_directory", str(tmp_path / "out"), "--per_device_train_batch_size", "200"]
        main([*flags, *STEPS, *out])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in ("error: ", *words, "--resume_from_checkpoint last"))
    with pytest.raises(SystemExit) as ended:
        cache_teacher.main([*flags, "--max_rows", "600", "--teacher_cache", str(tmp_path / "c")])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in ("error: ", *words))


def test_a_part_of_a_stream_that_cannot_be_read_ends_a_run_in_one_line(
    pair_folders, tmp_path, capsys
):
    """JSON is read in parts of 10 MB, and later parts must have the types of the first."""
    text = jsonl(tmp_path / "a.jsonl", [[1, 2, 3, 4] * 200] * 5000 + [["a"]], "ids")
    flags = ["--teacher_model_name_or_path", str(pair_folders[0]), "--dataset", text, *COMMAND]
    flags += ["--packing", "False", "--per_device_train_batch_size", "900", *STEPS]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--save_directory", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: dataset={text} cannot be read any further: ")


@pytest.mark.slow
def test_two_ranks_end_where_a_document_is_bad(pair_folders, tmp_path):
    text = jsonl(tmp_path / "a.jsonl", [[1, 2, 3, 4]] * GOOD + [[5, None]], "ids")
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.train"),
        *("--teacher_model_name_or_path", pair_folders[0], "--dataset", text, *COMMAND, *STEPS),
        *("--save_directory", tmp_path / "out", "--per_device_train_batch_size", "100"),
        timeout=120,
    )
    assert done.returncode != 0
    assert "error: tokens_column=ids: document 1,101 of" in done.stderr
    assert "error: the first rank cannot read the stream any further" in done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own

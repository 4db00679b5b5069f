"""Streams: their rows depend on the seed alone, and reading can stop and resume anywhere."""

import gzip
import json
import operator
import threading
from functools import partial
from itertools import islice, pairwise, takewhile
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import byte_tokenizer, run_module
from safetensors.torch import load_file

from train import batches as batches_module
from train import dealing
from train import stream as stream_module
from train.batches import StepPrefetcher, StreamBatches, collate, to_device
from train.data import Share, load_rows
from train.data_args import DataArguments
from train.stream import Mixture, Stream

TOKENIZER = byte_tokenizer()
NUM_DOCUMENTS = 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream_module, "DOCUMENTS_PER_CHUNK", 7)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Files with documents of different lengths that say where they come from."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {name: folder / f"{name}.jsonl" for name in ("a", "b")}
    for name, path in paths.items():
        lines = ({"text": f"{name}{i} " * (1 + i % 5)} for i in range(NUM_DOCUMENTS))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def stream_of(dataset: object, **changes) -> Stream:
    settings = {"max_length": 16, "heldout_documents": 0, "streaming": True} | changes
    arguments = DataArguments(dataset=str(dataset), **{"shuffle_buffer": 10} | settings)
    return load_rows(arguments, TOKENIZER, seed=0).train


def take(stream: Stream, num_rows: int) -> list[dict]:
    return list(islice(stream, num_rows))


def text_in(rows: list[dict]) -> str:
    return TOKENIZER.decode([token for row in rows for token in row["input_ids"]])


def documents_in(rows: list[dict]) -> list[str]:
    return [text.strip() for text in text_in(rows).split("<eos>") if text.strip()]


def mixture_of(texts: dict[str, Path], shares: str = "a=3,b=1", **changes) -> Stream:
    for name, path in texts.items():
        shares = shares.replace(f"{name}=", f"{path}=")
    return stream_of(shares, streaming=False, **changes)


@pytest.mark.parametrize("kind", ["text", "mixture"])
@pytest.mark.parametrize("stop", [0, 1, 4, 13, 50, 65, 90])
def test_a_stream_resumes_where_it_stopped(texts, kind, stop):
    """A hundred rows are several passes, with short rows at the ends of chunks."""
    new = partial(stream_of, texts["a"]) if kind == "text" else partial(mixture_of, texts)
    expected = take(new(), 100)
    first, second = new(), new()
    assert take(first, stop) == expected[:stop]
    if stop:
        second.resume(json.loads(json.dumps(first.position)))
    assert take(second, 100 - stop) == expected[stop:]


def test_each_pass_holds_every_document_once_in_its_own_order(texts):
    everything = sorted((f"a{i} " * (1 + i % 5)).strip() for i in range(NUM_DOCUMENTS))
    stream, passes = iter(stream_of(texts["a"], max_length=400)), []
    row = next(stream)
    for _ in range(2):
        documents, rows = [], []
        while len(documents) < NUM_DOCUMENTS:
            rows.append(row)
            documents = text_in(rows).split("<eos>")[:-1]
            row = next(stream)
        passes.append([text.strip() for text in documents])
    assert sorted(passes[0]) == sorted(passes[1]) == everything
    assert passes[0] != passes[1]


def test_documents_are_shuffled_within_the_buffer(texts):
    def places(buffer: int) -> list[int]:
        stream = stream_of(texts["a"], shuffle_buffer=buffer, max_length=400)
        documents = documents_in(take(stream, 30))
        return [int(text.split()[0][1:]) for text in documents[:20]]

    assert places(1) == list(range(20))
    assert places(10) != list(range(20))
    assert sorted(places(10)) == list(range(20))  # two whole blocks
    assert max(places(40)) > 30


def test_a_mixture_keeps_its_shares_at_any_time(texts):
    rows = take(mixture_of(texts), 200)
    for end in (20, 50, 200):
        text = text_in(rows[:end])
        assert text.count("a") == pytest.approx(3 * text.count("b"), abs=3 * 8)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("a.jsonl=1", "a single text needs no weight, give a.jsonl"),
        ("a.jsonl=1,b.jsonl", "`b.jsonl` is not NAME=WEIGHT"),
        ("a.jsonl=1,b.jsonl=0", "`b.jsonl=0` is not NAME=WEIGHT with a weight above 0"),
        ("a.jsonl=1,b.jsonl=x", "`b.jsonl=x` is not NAME=WEIGHT"),
    ],
)
def test_mixtures_without_weights_are_rejected(dataset, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset=dataset)


def test_held_out_documents_of_a_mixture_come_from_all_its_texts(texts):
    shares = f"{texts['a']}=3,{texts['b']}=1"
    arguments = DataArguments(dataset=shares, max_length=400, heldout_documents=8)
    rows = load_rows(arguments, TOKENIZER, seed=0)
    held_out = documents_in([*rows.held_out])
    assert [text.split()[0] for text in held_out] == [
        "a0",
        "a1",
        "a2",
        "a3",
        "a4",
        "a5",
        "b0",
        "b1",
    ]
    assert not set(held_out) & set(documents_in(take(rows.train, 60)))


@pytest.mark.slow
def test_more_processes_make_the_same_rows(texts):
    assert take(stream_of(texts["a"], tokenizer_processes=2), 60) == take(stream_of(texts["a"]), 60)
    local = [
        load_rows(
            DataArguments(dataset=str(texts["a"]), max_length=16, tokenizer_processes=processes),
            TOKENIZER,
            seed=0,
        )
        for processes in (1, 2)
    ]
    assert local[0].train[:] == local[1].train[:]


def test_token_ids_are_used_as_they_are(tmp_path):
    documents = [[5, 6, 7], [8, 9], [], [10, 11, 12, 13]]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in documents))
    flags = {"tokens_column": "ids", "max_length": 5, "heldout_documents": 0}
    arguments = DataArguments(dataset=str(path), **flags)
    rows = load_rows(arguments, TOKENIZER, seed=0).train
    assert rows["input_ids"] == [[5, 6, 7, 8, 9], [10, 11, 12, 13]]
    assert rows["document_lengths"] == [[3, 2], [4]]
    streamed = take(stream_of(path, tokens_column="ids", max_length=5, shuffle_buffer=1), 3)
    assert [row["input_ids"] for row in streamed] == [*rows["input_ids"], rows["input_ids"][0]]
    path.write_text(json.dumps({"ids": [5, 300]}) + "\n")
    with pytest.raises(
        ValueError, match="token ids 5 to 300, and the teacher's tokenizer has 0 to"
    ):
        load_rows(arguments, TOKENIZER, seed=0)
    path.write_text(json.dumps({"ids": "text"}) + "\n")
    with pytest.raises(ValueError, match="tokens_column=ids: it holds string values"):
        load_rows(arguments, TOKENIZER, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.txt.gz"])
def test_compressed_files_and_tables(tmp_path, name, streaming):
    texts = [f"text, number {i}" for i in range(12)]
    content = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        ".csv": "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)),
        ".txt": "\n\n".join(texts),
    }[Path(name.removesuffix(".gz").removesuffix(".zst")).suffix].encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(content))
    arguments = DataArguments(
        dataset=str(tmp_path / name), streaming=streaming, max_length=300, heldout_documents=0
    )
    rows = load_rows(arguments, TOKENIZER, seed=0).train
    assert sorted(documents_in(take(rows, 2) if streaming else rows)[:12]) == sorted(texts)


def test_a_tokenizer_that_adds_a_first_token_adds_it_to_every_document():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    from train.data import rows_of_documents

    columns = rows_of_documents(["ab", "c"], tokenizer, 20, "documents")
    a, b, c = (tokenizer(text)["input_ids"][1] for text in "abc")
    eos = tokenizer.eos_token_id
    assert columns == {"input_ids": [[eos, a, b, eos, eos, c, eos]], "document_lengths": [[4, 3]]}


def test_micro_batches_survive_being_sent(texts):
    batches = [[row] * (1 + i % 2) for i, row in enumerate(take(stream_of(texts["a"]), 9))]
    crossed = [[{"input_ids": [1, 2, 3], "labels": [-1, 2, 3]}, {"input_ids": [4], "labels": [4]}]]
    for sent in (batches, crossed):
        for num_ranks in (1, 2, 4):
            parts = dealing.encode(sent, num_ranks)
            assert parts.ends[-1] == len(parts.numbers)
            starts = [0, *parts.ends]
            for rank, (start, stop) in enumerate(pairwise(starts)):
                received = dealing.decode(parts.numbers[start:stop].numpy())
                as_lists = [
                    [{name: of_name.tolist() for name, of_name in row.items()} for row in rows]
                    for rows in received
                ]
                expected = sent[rank::num_ranks]
                assert as_lists == expected + [[]] * (-(-len(sent) // num_ranks) - len(expected))


def test_micro_batches_of_sent_rows_are_those_of_rows_that_were_read():
    rows = [
        {"input_ids": [1, 2, 3, 4], "document_lengths": [3, 1], "labels": [-1, 2, -1, 4]},
        {"input_ids": [5, 6], "document_lengths": [2], "labels": [-1, 6]},
    ]
    for names in (["input_ids"], ["input_ids", "document_lengths"], list(rows[0])):
        read = [{name: row[name] for name in names} for row in rows]
        (received,) = dealing.decode(dealing.encode([read], 1).numbers.numpy())
        found, expected = collate(received), collate(read)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            same = torch.equal if isinstance(values, torch.Tensor) else operator.eq
            assert same(found[name], values), name


def test_an_empty_stream_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(ValueError, match="a.jsonl: there is no text in it to train on"):
        stream_of(path).check(1)


def test_checking_a_stream_reads_nothing_from_it(texts):
    for new in (partial(stream_of, texts["a"]), partial(mixture_of, texts)):
        checked = new()
        checked.check(30)
        assert checked.position is None
        assert take(checked, 20) == take(new(), 20)


def test_text_that_is_smaller_than_a_step_is_said(texts):
    stream = stream_of(texts["a"])
    num_rows = sum(1 for _ in takewhile(lambda _: stream.position["pass"] == 0, stream))
    assert {*documents_in(take(stream_of(texts["a"]), num_rows))} >= {"a0", "a5", "a35"}
    assert stream_of(texts["a"]).check(num_rows) is None
    found = stream_of(texts["a"]).check(num_rows + 1)
    assert f"a.jsonl: a pass over it makes {num_rows} rows, a step takes {num_rows + 1}, " in found
    assert mixture_of(texts).check(num_rows) is None
    of_each = mixture_of(texts).check(8 * num_rows).splitlines()
    assert [f"takes {n * num_rows}, " in line for n, line in zip((6, 2), of_each)] == [True, True]


def test_the_position_of_a_step_is_where_its_rows_begin(texts, tmp_path):
    stream = stream_of(texts["a"])
    prefetcher = StepPrefetcher(Share(), torch.device("cpu"))
    batches = StreamBatches(stream, 3, 2, Share())
    prefetcher.read(batches, None)
    iterator = iter(batches)
    prefetcher.batches(0, iterator, 2)
    prefetcher.save_position(tmp_path, 1)
    again = stream_of(texts["a"])
    again.resume(json.loads((tmp_path / "stream.json").read_text()))
    assert take(again, 10) == take(stream_of(texts["a"]), 16)[6:]


def test_all_ranks_get_the_micro_batches_that_the_first_reads(texts, monkeypatch):
    sent = {"numbers": [], "read": [0, 0]}

    def broadcast(tensor, src):
        if threading.current_thread().name == "0":
            sent["numbers"].append(tensor)
        else:
            tensor.copy_(sent["numbers"][sent["read"][1]])
            sent["read"][1] += 1

    monkeypatch.setattr(dealing, "broadcast", broadcast)
    encoded_in, decoded = threads_that_call(monkeypatch, "encode"), []
    decode = dealing.decode
    monkeypatch.setattr(dealing, "decode", lambda part: decoded.append(len(part)) or decode(part))
    cache, found = PretendedCache(), {}

    def run(rank: int) -> None:
        share = Share(rank, 2)
        prefetcher = StepPrefetcher(share, torch.device("cpu"), cache)
        batches = StreamBatches(stream_of(texts["a"]), 3, 4, share)
        prefetcher.read(batches, None)
        iterator = iter(batches)
        found[rank] = [prefetcher.batches(step, iterator, 2) for step in range(3)]

    for rank in range(2):
        thread = threading.Thread(target=run, args=(rank,), name=str(rank))
        thread.start()
        thread.join()
    rows = take(stream_of(texts["a"]), 3 * 2 * 2 * 3)
    whole = [collate(rows[first : first + 3]) for first in range(0, len(rows), 3)]
    for step in range(3):
        for i in range(2):
            for rank in range(2):
                expected = whole[(step * 2 + i) * 2 + rank]
                batch = to_device(found[rank][step][i], torch.device("cpu"))
                assert torch.equal(batch["input_ids"], expected["input_ids"])
                assert torch.equal(batch["position_ids"], expected["position_ids"])
                assert torch.equal(batch["teacher_top"], expected["input_ids"] + 1)
    # What takes long is not done while a rank waits for its rows.
    assert is_in_the_background(encoded_in)
    assert is_in_the_background(cache.threads)
    num_sent = sum(len(numbers) for numbers in sent["numbers"][1::2])
    assert sum(decoded) == num_sent  # each rank decodes its own rows alone


def test_one_rank_makes_its_micro_batches_in_the_background(texts, monkeypatch):
    collated_in, cache = threads_that_call(monkeypatch, "collate"), PretendedCache()
    prefetcher = StepPrefetcher(Share(), torch.device("cpu"), cache)
    stream = StreamBatches(stream_of(texts["a"]), 3, 2, Share())
    prefetcher.read(stream, None)
    iterator = iter(stream)
    batches = [batch for step in range(3) for batch in prefetcher.batches(step, iterator, 2)]
    rows = take(stream_of(texts["a"]), 3 * 2 * 3)
    assert len(batches) == 6
    for batch, first in zip(batches, range(0, len(rows), 3)):
        expected = collate(rows[first : first + 3])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["teacher_top"], expected["input_ids"] + 1)
    assert is_in_the_background(collated_in)
    assert is_in_the_background(cache.threads)


class PretendedCache:
    """Predicts, as it were, the next number after each token."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def check_holds(self, rows) -> None:
        self.threads.append(threading.current_thread().name)

    def add_to(self, batch: dict) -> dict:
        self.threads.append(threading.current_thread().name)
        return batch | {"teacher_top": batch["input_ids"] + 1}


def threads_that_call(monkeypatch, name: str) -> list[str]:
    """Return a list that the threads come into in which train.batches calls a function."""
    function, threads = getattr(batches_module, name), []

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return function(*arguments)

    monkeypatch.setattr(batches_module, name, noted)
    return threads


def is_in_the_background(threads: list[str]) -> bool:
    return bool(threads) and all(thread.startswith("micro-batches") for thread in threads)


def test_ranks_hear_that_the_first_cannot_read_on(texts, monkeypatch):
    monkeypatch.setattr(dealing, "broadcast", lambda tensor, src: tensor.fill_(dealing.FAILED))
    with pytest.raises(RuntimeError, match="the first rank cannot read the stream any further"):
        dealing.deal(None, Share(1, 2), torch.device("cpu"))
    assert dealing.deal(None, Share(0, 2), torch.device("cpu")) == []


def test_the_first_rank_tells_the_others_that_it_cannot_read_on(texts, monkeypatch):
    sent = []
    monkeypatch.setattr(dealing, "broadcast", lambda tensor, src: sent.append(tensor))
    prefetcher = StepPrefetcher(Share(0, 2), torch.device("cpu"))
    prefetcher.read(StreamBatches(stream_of(texts["a"]), 3, 4, Share(0, 2)), None)

    def fails():
        raise OSError("the text is gone")
        yield

    with pytest.raises(OSError, match="the text is gone"):
        prefetcher.batches(0, fails(), 2)
    assert [tensor.tolist() for tensor in sent] == [[dealing.FAILED] * 2]


@pytest.mark.slow
def test_ranks_train_on_the_same_rows_of_a_stream_as_one_process(pair_folders, texts, tmp_path):
    flags = [
        *("--teacher_model_name_or_path", pair_folders[0], "--dataset"),
        *(f"{texts['a']}=2,{texts['b']}=1", "--max_length", "16", "--bf16", "False"),
        *("--max_steps", "3", "--save_steps", "2", "--heldout_documents", "3"),
        *("--measure_order", "False"),
    ]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    for name, launcher, accumulation in (("one", [], "4"), ("two", two, "2")):
        done = run_module(
            *(*launcher, "train.train", *flags, "--save_directory", tmp_path / name),
            *("--gradient_accumulation_steps", accumulation),
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stderr
    one, of_two = (tmp_path / name / "checkpoints" / "checkpoint-3" for name in ("one", "two"))
    position = json.loads((one / "stream.json").read_text())
    assert position == json.loads((of_two / "stream.json").read_text())
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_mixture_type_is_not_local_text(texts):
    assert isinstance(mixture_of(texts), Mixture)
    with pytest.raises(ValueError, match="--shuffle_buffer is for streams"):
        stream_of(texts["a"], streaming=False)

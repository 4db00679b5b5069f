"""Training from a teacher's predictions on disk: the loss, the files, and whole runs."""

import json
import shutil
import weakref

import pytest
import torch
from conftest import byte_tokenizer, run_module, tiny_model
from datasets import Dataset
from masked_models import encoder_config, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import copy_with_nan
from transformers import AutoModelForCausalLM

import train.run
import train.train
from train import cache_teacher, teacher_cache
from train.batches import collate
from train.teacher_cache import (
    TOP_K,
    CacheWriter,
    TeacherCache,
    key_of_row,
    keys_of_batch,
    top_tokens,
)
from train.trainer import DistillationTrainer
from train.vocabulary_loss import UNCHANGED, vocabulary_loss

N, V, D = 23, 50, 8


def heads_and_states():
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    with torch.no_grad():
        teacher_head.weight.mul_(6)
    hidden_ND = torch.randn(N, D, requires_grad=True)
    return hidden_ND, student_head, torch.randint(0, V, (N,)), torch.randn(N, D), teacher_head


@pytest.mark.parametrize("top_k", [1, 7, V])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_loss_is_between_the_top_tokens_and_all_others(top_k, temperature, compile_backend):
    hidden_ND, head, targets_N, teacher_ND, teacher_head = heads_and_states()
    top = top_tokens(teacher_ND, teacher_head, UNCHANGED, top_k, temperature)
    terms = vocabulary_loss(
        hidden_ND,
        head,
        targets_N,
        teacher_top=top,
        cross_entropy_weight=0.3,
        kl_weight=0.7,
        temperature=temperature,
        compile_backend=compile_backend,
    )
    gradients = torch.autograd.grad(terms.loss, [hidden_ND, head.weight])

    z_NV = hidden_ND.double() @ head.weight.double().T
    q_NV = (teacher_ND.double() @ teacher_head.weight.double().T / temperature).softmax(-1)
    p_NV = (z_NV / temperature).softmax(-1)
    kl = 0.0
    for q_V, p_V in zip(q_NV, p_NV):
        order = q_V.argsort(descending=True)
        events = [q_V[order[:top_k]], p_V[order[:top_k]]]
        if top_k < V:
            rest = (values[order[top_k:]].sum()[None] for values in (q_V, p_V))
            events = [torch.cat(parts) for parts in zip(events, rest)]
        kl = kl + (events[0] * (events[0] / events[1]).log()).sum()
    cross_entropy = nn.functional.cross_entropy(z_NV, targets_N, reduction="sum")
    expected = torch.autograd.grad(0.3 * cross_entropy + 0.7 * kl, [hidden_ND, head.weight])
    torch.testing.assert_close(terms.kl.double(), kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_a_row_and_its_batch_have_the_same_key():
    rows = [
        {"input_ids": [3, 1, 4, 1, 5], "document_lengths": [2, 3]},
        {"input_ids": [3, 1, 4], "document_lengths": [3]},
        {"input_ids": [3, 1, 4], "document_lengths": [1, 2]},
    ]
    keys = [key for key, _ in keys_of_batch(collate(rows))]
    assert keys == [key_of_row(row) for row in rows]
    assert len({*keys}) == 3
    padded = [{"input_ids": [3, 1, 4, 1, 5]}, {"input_ids": [3, 1]}]
    assert [key for key, _ in keys_of_batch(collate(padded))] == [*map(key_of_row, padded)]
    assert key_of_row({"input_ids": [3, 1, 4]}) not in keys


def test_predictions_come_back_at_their_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "TOKENS_PER_FILE", 4)
    _, _, _, teacher_ND, teacher_head = heads_and_states()
    top = top_tokens(teacher_ND, teacher_head, UNCHANGED, 5, 1.0)
    writer = CacheWriter(tmp_path, {"top_k": 5, "vocab_size": V})
    writer.begin()
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}, {"input_ids": [7, 8]}]
    for row, part in zip(rows, (slice(0, 3), slice(3, 6), slice(6, 8))):
        writer.add(key_of_row(row), top.at(part))
    writer.finish(None)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    batch = TeacherCache(tmp_path).add_to(collate([rows[2], rows[0]]))
    ids, log_q, log_rest = teacher_cache.TopTokens.unpacked(batch["teacher_top"])
    assert torch.equal(ids[0, :2], top.ids[6:8].int())
    assert torch.equal(log_q[1], top.log_q[:3].half())
    assert torch.equal(log_rest[1], top.log_rest[:3])
    with pytest.raises(ValueError, match="a row of the text is not in it"):
        TeacherCache(tmp_path).add_to(collate([{"input_ids": [1, 2]}]))
    smaller = TeacherCache(tmp_path)
    smaller.made_by["vocab_size"] = int(top.ids[:8].max())
    with pytest.raises(ValueError, match="is damaged .a token that the vocabulary lacks"):
        smaller.add_to(collate(rows))
    TeacherCache(tmp_path).check_holds(Dataset.from_list(rows))
    with pytest.raises(ValueError, match="1 of 2 rows are not in it"):
        TeacherCache(tmp_path).check_holds(Dataset.from_list([rows[0], {"input_ids": [1, 2]}]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows | {"ids": rows["ids"][:, :2]},
        lambda rows: rows | {"ids": rows["ids"][:, 0]},
        lambda rows: rows | {"log_q": rows["log_q"][:3]},
        lambda rows: rows | {"log_rest": rows["log_rest"][:, None]},
        lambda rows: rows | {"stops": rows["stops"].float()},
        lambda rows: rows | {"stops": rows["stops"][:, None]},
        lambda rows: {name: tensor[:0] for name, tensor in rows.items()},
    ],
)
def test_rows_of_another_form_are_refused(damage, tmp_path):
    writer = CacheWriter(tmp_path, {"top_k": 5, "vocab_size": V})
    writer.begin()
    _, _, _, teacher_ND, teacher_head = heads_and_states()
    top = top_tokens(teacher_ND, teacher_head, UNCHANGED, 5, 1.0)
    writer.add(key_of_row({"input_ids": [1, 2, 3]}), top.at(slice(0, 3)))
    writer.add(key_of_row({"input_ids": [4]}), top.at(slice(3, 4)))
    writer.finish(None)
    assert len(TeacherCache(tmp_path).rows) == 2
    (path,) = tmp_path.glob("*.safetensors")
    damaged = damage(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in damaged.items()}, path)
    with pytest.raises(ValueError, match=r"rows-00000.safetensors is damaged .*: remove it"):
        TeacherCache(tmp_path)


def text_flags(teacher, text):
    return ["--teacher_model_name_or_path", str(teacher), "--dataset", str(text),
            "--max_length", "32", "--heldout_documents", "4", "--bf16", "False"]  # fmt: skip


def cache_flags(teacher, text, folder, *more):
    return [*text_flags(teacher, text), "--teacher_cache", str(folder), *more]


def train_flags(teacher, text, folder, *more):
    return [
        *text_flags(teacher, text), "--save_directory", str(folder), "--max_steps", "3",
        "--gradient_accumulation_steps", "2", "--kl_loss_weight", "0.5", "--use_cosine_loss",
        "False", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_cache(pair_folders, text_file, tmp_path_factory):
    """A cache of every token of the vocabulary, so nothing is lost but fp16 rounding."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    cache_teacher.main(cache_flags(pair_folders[0], text_file, folder, "--top_k", "257"))
    return folder


def test_a_cache_in_fp32_does_not_depend_on_the_dtype_of_the_file(
    pair_folders, text_file, tmp_path
):
    caches = []
    for dtype in (torch.bfloat16, torch.float32):
        teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0], dtype=torch.bfloat16)
        folder = tmp_path / str(dtype)
        for part in (teacher.to(dtype), byte_tokenizer()):
            part.save_pretrained(folder)
        cache_teacher.main(cache_flags(folder, text_file, folder / "cache", "--max_rows", "2"))
        (path,) = (folder / "cache").glob("*.safetensors")
        caches.append(path.read_bytes())
    assert caches[0] == caches[1]


@pytest.mark.slow
def test_a_run_from_the_cache_is_the_run_with_the_teacher(
    pair_folders, text_file, whole_cache, tmp_path, monkeypatch
):
    teachers, alive = [], []

    def load(*args):
        teacher = load_teacher(*args)
        teachers.append(weakref.ref(next(teacher.parameters())))
        return teacher

    def compute_loss(self, *args, **kwargs):
        alive.append(teachers[-1]() is not None)
        return of_trainer(self, *args, **kwargs)

    load_teacher, of_trainer = train.run.load_teacher, DistillationTrainer.compute_loss
    monkeypatch.setattr(train.run, "load_teacher", load)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    flags = (pair_folders[0], text_file)
    train.train.main(train_flags(*flags, tmp_path / "with"))
    assert all(alive)
    alive.clear()
    cache = ["--teacher_cache", str(whole_cache)]
    train.train.main(train_flags(*flags, tmp_path / "from_cache", *cache))
    assert alive
    assert not any(alive)
    runs = [
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("with", "from_cache")
    ]
    for name, value in runs[0]["held_out"].items():
        assert runs[1]["held_out"][name] == pytest.approx(value, rel=2e-3), name
    steps = [[line for line in run["log"] if "loss" in line] for run in runs]
    assert len(steps[0]) == 3
    for expected, line in zip(*steps, strict=True):
        for name in ("loss", "kl", "cross_entropy", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=2e-3), name


def test_a_stopped_command_continues(pair_folders, text_file, tmp_path, monkeypatch, capsys):
    flags = cache_flags(pair_folders[0], text_file, tmp_path / "c", "--top_k", "3")
    flags += ["--batch_size", "2", "--bf16", "True"]
    monkeypatch.setattr(teacher_cache, "TOKENS_PER_FILE", 128)
    add, num_added = CacheWriter.add, []

    def stop_at_the_tenth(self, key, top):
        num_added.append(key)
        if len(num_added) == 10:
            raise KeyboardInterrupt
        add(self, key, top)

    monkeypatch.setattr(CacheWriter, "add", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher.main(flags)
    files = {path: path.read_bytes() for path in (tmp_path / "c").glob("*.safetensors")}
    num_kept = len(TeacherCache(tmp_path / "c").rows)
    assert 0 < num_kept < 10
    monkeypatch.setattr(CacheWriter, "add", add)
    cache_teacher.main(flags)
    assert all(path.read_bytes() == content for path, content in files.items())
    cache = TeacherCache(tmp_path / "c")
    assert f"{len(cache.rows) - num_kept} of them new" in capsys.readouterr().out
    assert cache.made_by["complete"]
    cache_teacher.main(flags)
    assert " 0 of them new" in capsys.readouterr().out


def test_a_lost_file_is_written_again_and_no_other(pair_folders, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "TOKENS_PER_FILE", 128)
    flags = cache_flags(pair_folders[0], text_file, tmp_path / "c", "--top_k", "3")
    cache_teacher.main(flags)
    whole = TeacherCache(tmp_path / "c").rows.keys()
    files = {path: path.read_bytes() for path in (tmp_path / "c").glob("*.safetensors")}
    assert len(files) > 2
    lost = tmp_path / "c" / "rows-00000.safetensors"
    lost.unlink()
    cache_teacher.main(flags)
    assert TeacherCache(tmp_path / "c").rows.keys() == whole
    del files[lost]
    assert all(path.read_bytes() == content for path, content in files.items())


def test_predictions_that_are_not_finite_are_not_kept(pair_folders, text_file, tmp_path, capsys):
    copy_with_nan(pair_folders[0], tmp_path / "teacher")
    with pytest.raises(SystemExit) as ended:
        cache_teacher.main(cache_flags(tmp_path / "teacher", text_file, tmp_path / "c"))
    assert ended.value.code == 2
    assert "the teacher's predictions are not finite" in capsys.readouterr().err
    assert not [*(tmp_path / "c").glob("*.safetensors")]


def test_a_card_says_what_its_kl_is_between(pair_folders, text_file, whole_cache, tmp_path):
    cache = ["--teacher_cache", str(whole_cache)]
    train.train.main(train_flags(pair_folders[0], text_file, tmp_path / "s", *cache))
    card = (tmp_path / "s" / "README.md").read_text()
    assert "| predictions of the teacher | its 257 most probable tokens and all others" in card
    assert str(whole_cache) not in card
    assert json.loads((tmp_path / "s" / "run.json").read_text())["settings"][TOP_K] == 257


@pytest.mark.parametrize(
    "change, message",
    [
        (["--use_cosine_loss", "True"], "no hidden states, which the cosine term compares"),
        (["--use_kl_loss", "False"], "only the KL term reads it"),
        (["--temperature", "2"], "its temperature is 1.0, not 2.0"),
        (["--max_length", "16"], "rows are not in it"),
        (["--packing", "cross"], "rows are not in it"),
        (["--teacher_cache", "nowhere"], "no cache.json there"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused(
    change, message, pair_folders, text_file, whole_cache, tmp_path, capsys
):
    flags = train_flags(pair_folders[0], text_file, tmp_path / "s")
    with pytest.raises(SystemExit) as raised:
        train.train.main([*flags, "--teacher_cache", str(whole_cache), *change])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_stream_may_be_read_several_times(pair_folders, text_file, tmp_path, capsys):
    """One document per row, so each pass has the same 36 rows. A step takes 16."""
    stream = ["--streaming", "True", "--packing", "False", "--measure_order", "False"]
    flags = cache_flags(pair_folders[0], text_file, tmp_path / "c", *stream, "--top_k", "3")
    cache_teacher.main([*flags, "--max_rows", "16"])
    of_run = [*stream, "--teacher_cache", str(tmp_path / "c")]
    of_run += ["--per_device_train_batch_size", "8"]
    words = train_flags(pair_folders[0], text_file, tmp_path / "s", *of_run)
    with pytest.raises(SystemExit):
        train.train.main(words)
    assert "first 16 rows of its text and this run reads 48" in capsys.readouterr().err
    cache_teacher.main([*flags, "--max_rows", "48"])
    assert len(TeacherCache(tmp_path / "c").rows) == 36 + 4
    cache_teacher.main([*flags, "--max_rows", "10"])  # which it has already
    train.train.main(words)
    assert (tmp_path / "s" / "model.safetensors").is_file()


@pytest.mark.slow
def test_ranks_read_the_cache_of_a_stream_as_one_process_does(pair_folders, text_file, tmp_path):
    stream = ["--streaming", "True", "--measure_order", "False"]
    flags = cache_flags(pair_folders[0], text_file, tmp_path / "c", *stream, "--top_k", "3")
    cache_teacher.main([*flags, "--max_rows", "48"])
    of_run = [*stream, "--teacher_cache", str(tmp_path / "c"), "--per_device_train_batch_size", "4"]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    for name, launcher, accumulation in (("one", [], "4"), ("two", two, "2")):
        words = train_flags(pair_folders[0], text_file, tmp_path / name, *of_run)
        words += ["--gradient_accumulation_steps", accumulation]
        done = run_module(*launcher, "train.train", *words, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


STREAM = ["--streaming", "True", "--measure_order", "False"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shuffle_buffer", "2"], "(its shuffle_buffer is 1000, not 2)"),
        (["--seed", "5"], "(its seed is 0, not 5)"),
        (["--max_length", "16"], "(its max_length is 32, not 16)"),
        (["--packing", "cross"], "(its packing is documents, not cross)"),
        (["--heldout_documents", "5"], "(its heldout_documents is 4, not 5)"),
    ],
)
def test_other_rows_of_a_stream_are_refused_before_weights_load(
    change, message, pair_folders, text_file, tmp_path, monkeypatch, capsys
):
    cache = tmp_path / "c"
    flags = cache_flags(pair_folders[0], text_file, cache, *STREAM, "--max_rows", "48")
    cache_teacher.main(flags)
    monkeypatch.setattr(train.run, "load_teacher", None)
    capsys.readouterr()
    of_run = [*STREAM, "--teacher_cache", str(cache), *change]
    with pytest.raises(SystemExit) as raised:
        train.train.main(train_flags(pair_folders[0], text_file, tmp_path / "s", *of_run))
    assert raised.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "rows are not in it" in error
    assert message in error
    assert "run train.cache_teacher with the same --dataset" in error


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_row_that_is_missing_later_in_a_stream_ends_the_run_in_one_line(
    is_mixed, pair_folders, text_file, tmp_path, capsys
):
    """One document is a row, so a text that goes on otherwise has the same rows at first."""
    lines = text_file.read_text().splitlines()
    other, second = tmp_path / "other.jsonl", tmp_path / "second.jsonl"
    other.write_text("\n".join([*lines[:30], json.dumps({"text": "Nobody read this."})]) + "\n")
    second.write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines))
    texts = [f"{text}=1,{second}=1" if is_mixed else text for text in (text_file, other)]
    stream = [*STREAM, "--packing", "False", "--shuffle_buffer", "1"]
    flags = cache_flags(pair_folders[0], texts[0], tmp_path / "c", *stream, "--max_rows", "80")
    cache_teacher.main(flags)
    of_run = [*stream, "--teacher_cache", str(tmp_path / "c"), "--save_strategy", "steps"]
    of_run += ["--save_steps", "1", "--per_device_train_batch_size", "8", "--max_steps", "5"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        train.train.main(train_flags(pair_folders[0], texts[1], tmp_path / "s", *of_run))
    assert raised.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: teacher_cache=")
    assert "of 16 rows are not in it (its dataset is" in error
    assert "--resume_from_checkpoint last continues from" in error


def test_another_teacher_is_refused(pair_folders, text_file, whole_cache, tmp_path, capsys):
    shutil.copytree(pair_folders[0], tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    flags = train_flags(tmp_path / "other", text_file, tmp_path / "s")
    with pytest.raises(SystemExit):
        train.train.main([*flags, "--teacher_cache", str(whole_cache)])
    assert "its teacher is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cache_teacher.main(cache_flags(tmp_path / "other", text_file, whole_cache))
    assert "its teacher is" in capsys.readouterr().err


def test_what_cannot_be_cached_is_refused(pair_folders, text_file, tmp_path, capsys):
    tiny_model(encoder_config("bert", 3)).save_pretrained(tmp_path / "encoder")
    word_tokenizer().save_pretrained(tmp_path / "encoder")
    for teacher, more, message in (
        (tmp_path / "encoder", [], "hides other tokens at every step"),
        (pair_folders[0], ["--top_k", "258"], "the vocabulary has 257 tokens"),
    ):
        flags = cache_flags(teacher, text_file, tmp_path / "c", *more, "--max_length", "8")
        with pytest.raises(SystemExit) as raised:
            cache_teacher.main(flags)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

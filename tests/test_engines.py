"""The comparison of other people's software with ours, with this transformers in an engine's place.

The engines themselves run in `make test-engines`.
"""

import io
import sys
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_pair
from patching_models import change_config
from torch.nn.functional import kl_div

from examples.engines import __main__ as command
from examples.engines import check, environments, records
from examples.engines import table as table_module
from examples.engines.agreement import Agreement, Predictions, Reference, agreement, top_two_gap
from examples.engines.check import Outcome, SavedMember
from examples.engines.engines import ENGINES, Limit
from examples.engines.environments import Environment, Unavailable, python_of
from examples.engines.runners import protocol
from examples.engines.table import engines_table, reasons
from patching.checkpoints.save import plan_save
from patching.family import Family


def reference_of(logits_RTV: np.ndarray, greedy_PN=None, greedy_gaps_PN=None) -> Reference:
    return Reference(
        top1_RT=logits_RTV.argmax(-1),
        greedy_PN=np.zeros((1, 1), int) if greedy_PN is None else np.array(greedy_PN),
        logits_RTV=logits_RTV,
        gaps_RT=top_two_gap(logits_RTV),
        greedy_gaps_PN=np.ones((1, 1)) if greedy_gaps_PN is None else np.array(greedy_gaps_PN),
    )


def predictions_of(logits_RTV: np.ndarray) -> Predictions:
    return Predictions(
        top1_RT=logits_RTV.argmax(-1), greedy_PN=np.zeros((1, 1), int), logits_RTV=logits_RTV
    )


def test_near_ties_are_counted_apart():
    ours = np.zeros((1, 4, 3))
    ours[0, :, 0] = (1.0, 1.0, 5e-4, 1.0)
    theirs = ours.copy()
    theirs[0, 2, 1] = 1.0  # another token, at a near-tie
    theirs[0, 3, 2] = 2.0  # another token, and no near-tie
    found = agreement(reference_of(ours), predictions_of(theirs))
    assert (found.positions, found.near_ties) == (3, 1)
    assert found.top1 == 2 / 3
    assert not found.is_enough


def test_greedy_text_is_compared_up_to_the_first_near_tie():
    ours = reference_of(
        np.eye(3)[None], [[1, 2, 1], [1, 1, 1]], [[1.0, 9e-4, 1.0], [1.0, 1.0, 1.0]]
    )
    theirs = Predictions(top1_RT=ours.top1_RT, greedy_PN=np.array([[1, 0, 0], [1, 1, 0]]))
    found = agreement(ours, theirs)
    assert (found.greedy_tokens, found.greedy_differences) == (4, 1)
    assert found.top1 == 1
    assert not found.is_enough
    assert found.kl is None


def test_kl_is_that_of_torch():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 6, 5, 7))
    found = agreement(reference_of(ours), predictions_of(theirs))
    logs = [torch.from_numpy(logits).log_softmax(-1).flatten(0, 1) for logits in (ours, theirs)]
    expected = kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(expected.item())


@pytest.mark.slow
def test_a_runner_agrees_with_us_and_a_wrong_config_does_not(tmp_path, monkeypatch):
    """The real runner on members saved by the toolkit, the last two damaged afterwards."""
    teacher, student = save_pair(tmp_path)
    family = Family.from_pretrained(teacher, student)
    members = []
    for name in ("good", "wrong", "broken"):
        folder = tmp_path / name
        plan_save(family, family.patched_layers(1), folder).save(folder, name, {})
        members.append(SavedMember("qwen3", 1, 5, False, folder))
    tokens, prompts = tmp_path / "tokens.npy", tmp_path / "prompts.npy"
    rows_RT = np.random.default_rng(0).integers(0, 256, (6, 24))
    np.save(tokens, rows_RT)
    np.save(prompts, rows_RT[:2, :8])
    ours = check.reference(members[0], tokens, prompts)
    change_config(members[1].folder, rms_norm_eps=1e-1)
    change_config(members[2].folder, num_attention_heads=5)

    monkeypatch.setattr(check, "python_of", lambda name: Path(sys.executable))
    engine = ENGINES["transformers4"]
    found = [*check.predict(engine, members, tokens, prompts)]
    good, wrong, broken = (check.compare(ours, theirs) for theirs in found)
    assert good.agreement.is_enough
    assert good.agreement.positions + good.agreement.near_ties == rows_RT.size
    assert good.agreement.greedy_tokens > 0
    assert good.agreement.kl == pytest.approx(0, abs=1e-6)
    assert not wrong.agreement.is_enough
    assert broken.agreement is None and "Error" in broken.refusal
    assert not any((member.folder / "predictions").exists() for member in members)


class OnlyModel:
    """A stand-in for an engine whose process has room for one model, such as vLLM's."""

    alive: "weakref.WeakSet[OnlyModel]" = weakref.WeakSet()

    def __init__(self, folder: Path) -> None:
        assert not self.alive, "another model is loaded"
        self.alive.add(self)

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        return {"top1": tokens_RT}

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        return prompts_PT[:, :new_tokens]


def test_a_runner_frees_a_model_before_it_loads_the_next(tmp_path):
    np.save(tmp_path / "tokens.npy", np.ones((2, 6), int))
    outputs = [tmp_path / name for name in ("one", "two", "three")]
    words = ["--tokens", str(tmp_path / "tokens.npy"), "--prompts", str(tmp_path / "tokens.npy")]
    words += ["--new_tokens", "3", *(f"{output.name}={output}" for output in outputs)]
    protocol.run(protocol.parser().parse_args(words), OnlyModel)
    for output in outputs:
        assert {file.name for file in output.iterdir()} == {"top1.npy", "greedy.npy"}


CONVERTER = """
import logging, sys
from pathlib import Path
folder, kind, outfile = sys.argv[1], sys.argv[3], sys.argv[5]
Path(outfile).write_text(kind)
if "unsupported" in folder:
    logging.getLogger("hf-to-gguf").error("Model Mamba9 is not supported")
    sys.exit(1)
if "broken" in folder:
    raise ValueError("no head")
"""


def test_what_the_converter_rejects_is_a_refusal_and_leaves_no_file(tmp_path, monkeypatch):
    """The real script around a converter that takes one of three members."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel: get_vocab_base_pre = None")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setattr(check, "converter", lambda: tmp_path / "convert_hf_to_gguf.py")
    monkeypatch.setattr(check, "python_of", lambda name: Path(sys.executable))
    members = []
    for name in ("unsupported", "good", "broken"):
        folder = tmp_path / "members" / name
        folder.mkdir(parents=True)
        members.append(SavedMember("gpt2", 0, 4, True, folder))
    for _ in range(2):
        assert check.convert_to_gguf(members, "f16") == {
            members[0]: "the converter fails: Model Mamba9 is not supported",
            members[2]: "the converter fails: ValueError: no head",
        }
        assert [file.parent.name for file in tmp_path.rglob("f16.*f")] == ["good"]
    assert (tmp_path / "members" / "good" / "f16.gguf").read_text() == "f16"
    assert not [*tmp_path.rglob("*.part")]


AGREES = Outcome(Agreement(100, 0, 1.0, 0.0, 10, 0), None)
DIFFERS = Outcome(Agreement(100, 0, 0.9, 0.5, 10, 1), None)
REFUSED = Outcome(None, "ValueError: unknown")


def member(tied: bool) -> SavedMember:
    return SavedMember("gpt2", 0, 4, tied, Path())


@pytest.mark.parametrize("outcome", [DIFFERS, REFUSED])
def test_only_engines_that_must_pass_fail_the_run(outcome, monkeypatch):
    monkeypatch.setattr(command, "LIMITS", {})
    members = {"gpt2": [member(tied=True)]}
    (problem,) = command.failures(members, {"mlx_lm": {"gpt2": [outcome]}}, {})
    assert problem.startswith("does not agree")
    assert command.failures(members, {"vllm": {"gpt2": [outcome]}}, {}) == []
    assert command.failures(members, {"mlx_lm": {"gpt2": [AGREES]}}, {}) == []
    assert command.failures(members, {}, {"vllm": "no wheel"}) == []
    assert command.failures(members, {}, {"llama_cpp": "no compiler"}) == [
        "llama.cpp, fp32: no compiler"
    ]


def test_a_limit_excuses_what_it_says_and_must_still_be_there(monkeypatch):
    monkeypatch.setattr(
        command, "LIMITS", {("mlx_lm", "gpt2"): Limit("the head is tied", untied_only=True)}
    )
    members = {"gpt2": [member(tied=True), member(tied=False)]}
    assert command.failures(members, {"mlx_lm": {"gpt2": [AGREES, REFUSED]}}, {}) == []
    (problem,) = command.failures(members, {"mlx_lm": {"gpt2": [AGREES, AGREES]}}, {})
    assert problem.startswith("no longer a limit")
    (problem,) = command.failures(members, {"mlx_lm": {"gpt2": [DIFFERS, REFUSED]}}, {})
    assert problem.startswith("does not agree")


def test_outcomes_of_the_same_members_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    folder, tokens = tmp_path / "k0", tmp_path / "tokens.npy"
    folder.mkdir()
    tokens.write_bytes(b"1 2 3")
    (folder / "config.json").write_text("{}")
    members = [SavedMember("gpt2", 0, 4, True, folder)]

    def record(name: str = "llama_cpp") -> records.Record:
        return records.Record(name, ENGINES[name], members, [tokens])

    assert record().read() is None
    record().write([REFUSED])
    assert record().read() is None
    record().write([DIFFERS])
    assert record().read() == [DIFFERS]
    assert record("mlx_lm").read() is None
    (folder / "f32.gguf").write_bytes(b"made from it")
    (folder / "provenance.json").write_text("{}")
    assert record().read() == [DIFFERS]
    (folder / "config.json").write_text('{"rope_theta": 7}')
    assert record().read() is None
    (folder / "config.json").write_text("{}")
    tokens.write_bytes(b"1 2 4")
    assert record().read() is None


def test_the_table_shows_the_worst_size(monkeypatch):
    monkeypatch.setattr(table_module, "LIMITS", {})
    table = engines_table(
        {"gpt2": [member(True), member(False), member(True)]},
        {"mlx_lm": {"gpt2": [AGREES, DIFFERS, REFUSED]}},
        {"vllm": "no wheel"},
    )
    assert "| 90.00%, greedy text differs (2 of 3 sizes) | 200 | 0 | 20 |" in table
    assert "| vLLM on CPU, fp32 | no wheel |" in table


def test_known_differences_are_sizes_that_an_engine_does_not_take(monkeypatch):
    limit = Limit("The head is tied.", untied_only=True)
    monkeypatch.setitem(table_module.LIMITS, ("llama_cpp", "gpt2"), limit)
    members = {"gpt2": [member(True), member(False), member(True)]}
    outcomes = {"llama_cpp": {"gpt2": [AGREES, DIFFERS, AGREES]}}
    table = engines_table(members, outcomes, {})
    assert "| llama.cpp, fp32 | 100.00% (2 of 3 sizes) | 200 | 0 | 20 |" in table
    assert reasons(members, outcomes) == (
        "- llama.cpp, fp32, gpt2, 4 layers, untied: agreement 90.00%. The head is tied."
    )
    outcomes["llama_cpp"]["gpt2"][0] = DIFFERS  # a tied size, which the limit does not excuse
    assert "90.00%, greedy text differs (2 of 3 sizes)" in engines_table(members, outcomes, {})


def test_tables_are_written_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Above\n<!-- a -->\nold\n<!-- end of a -->\nBelow\n")
    for _ in range(2):
        command.write_tables(page, {"a": "new \\1"})
        assert page.read_text() == "Above\n<!-- a -->\n\nnew \\1\n\n<!-- end of a -->\nBelow\n"


def test_an_environment_is_made_once_and_says_why_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.ENVIRONMENTS, "new", Environment(("package==1",)))
    python = tmp_path / "new" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ERROR: no package 1' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(Unavailable, match="pip install failed: ERROR: no package 1"):
        python_of("new")
    python.write_text("#!/bin/sh\necho $@ >> $0.log\n")
    assert python_of("new") == python_of("new") == python
    assert (tmp_path / "new" / "bin" / "python.log").read_text() == "-m pip install -q package==1\n"
    monkeypatch.setitem(environments.ENVIRONMENTS, "new", Environment(("package==2",)))
    python_of("new")
    assert "package==2" in (tmp_path / "new" / "bin" / "python.log").read_text()


def test_only_the_converter_is_unpacked(tmp_path):
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        for name in ("convert_hf_to_gguf.py", "gguf-py/gguf/gguf.py", "src/llama.cpp"):
            info = tarfile.TarInfo(f"llama_cpp_python-1/vendor/llama.cpp/{name}")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"#"))
    environments._unpack_converter(tmp_path / "package.tar.gz", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.py")}
    assert found == {"convert_hf_to_gguf.py", "gguf-py/gguf/gguf.py"}

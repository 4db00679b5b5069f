"""Similarity of student and teacher against hidden states as transformers returns them."""

import json

import pytest
import torch
from conftest import save_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from patching import similarity
from patching.blocks import LayerMap
from patching.files.plot import plot_lines

KEPT = LayerMap((0, 2, 4, 5), 6)


@torch.no_grad()
def test_table_and_plot(tmp_path, text_file, capsys):
    teacher_folder, student_folder = map(str, save_pair(tmp_path, "qwen3-tied", KEPT.kept, 6))
    out = tmp_path / "out"
    similarity.main(
        [
            *("--teacher_model_name_or_path", teacher_folder),
            *("--student_model_name_or_path", student_folder, "--save_directory", str(out)),
            *("--calibration", str(text_file), "--calibration_texts", "5"),
        ]
    )
    found = json.loads((out / "similarity.json").read_text())["layers"]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    student = AutoModelForCausalLM.from_pretrained(student_folder).eval()
    kept = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    kept.model.layers = torch.nn.ModuleList(kept.model.layers[i] for i in KEPT.kept)
    kept.config.num_hidden_layers = 4
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()[:5]]
    sums = {"before": [0.0] * 5, "after": [0.0] * 5}
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    rows = [tokenizer(text)["input_ids"][:128] for text in texts]
    for row in rows:
        ids = torch.tensor([row])
        of_teacher = teacher(ids, output_hidden_states=True, use_cache=False).hidden_states
        for name, model in (("before", kept), ("after", student)):
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for i, (own, theirs) in enumerate(KEPT.alignment_pairs):
                a, b = states[own][0].double(), of_teacher[theirs][0].double()
                cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                sums[name][i] += cosine.sum().item()
    num_tokens = sum(map(len, rows))
    for name, of_name in sums.items():
        expected = [total / num_tokens for total in of_name]
        assert [row[name] for row in found] == pytest.approx(expected, abs=1e-5)
    assert [row["teacher_block"] for row in found] == [None, [0, 1], [2, 3], [4, 4], [5, 5]]
    assert found[0]["before"] == pytest.approx(1, abs=1e-6)
    assert "| 1 | 2-3 |" in capsys.readouterr().out
    assert (out / "similarity.md").is_file() and (out / "similarity.png").stat().st_size > 5000


def test_lines_that_coincide_are_one_with_both_names():
    points = [(0, 1.0), (1, 0.5)]
    lines = {"first": points, "last": [(0, 1.0), (1, 0.7)], "searched": list(points)}
    (axes,) = plot_lines(lines, "x", "y").axes
    assert [line.get_label() for line in axes.lines] == ["first = searched", "last"]
    assert [[*line.get_ydata()] for line in axes.lines] == [[1.0, 0.5], [1.0, 0.7]]


def test_text_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        similarity.main(
            [
                *("--teacher_model_name_or_path", "a", "--student_model_name_or_path", "b"),
                *("--save_directory", str(tmp_path)),
            ]
        )
    assert "name some with --calibration" in capsys.readouterr().err

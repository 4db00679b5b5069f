"""Students of the published teachers have the sizes their names say, from configs alone."""

import itertools

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

from patching.architectures.config import config_for
from patching.assemble import count_parameters
from patching.recipe import initial_student, intermediate_model
from train.model_args import ModelArguments

QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
CONFIGS = {
    "Qwen3-4B": Qwen3Config(
        **QWEN3, hidden_size=2560, intermediate_size=9728, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen3-8B": Qwen3Config(
        **QWEN3, hidden_size=4096, intermediate_size=12288, head_dim=128, tie_word_embeddings=False
    ),
    "Pythia-2.8B": GPTNeoXConfig(
        num_hidden_layers=32,
        hidden_size=2560,
        intermediate_size=10240,
        num_attention_heads=32,
        vocab_size=50304,
    ),
    "Pythia-6.9B": GPTNeoXConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=16384,
        num_attention_heads=32,
        vocab_size=50432,
    ),
    "Llama-3.2-3B": LlamaConfig(
        num_hidden_layers=28,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize(
    ("name", "teacher_billions", "student_billions", "k_max"),
    [
        ("Qwen3-4B", 4.02, 2.3, 17),
        ("Qwen3-8B", 8.19, 4.9, 17),
        ("Pythia-2.8B", 2.78, 1.6, 15),
        ("Pythia-6.9B", 6.86, 3.8, 15),
        ("Llama-3.2-3B", 3.21, 1.9, 13),
    ],
)
def test_published_sizes(name, teacher_billions, student_billions, k_max):
    teacher = CONFIGS[name]
    layer_map = ModelArguments("teacher").layer_map(teacher)
    student = config_for(initial_student(layer_map), {"teacher": teacher})
    assert layer_map.max_layers_to_patch == k_max
    assert round(count_parameters(teacher).stored / 1e9, 2) == teacher_billions
    assert round(count_parameters(student).stored / 1e9, 1) == student_billions


def test_stored_parameters_of_a_tied_family_shrink_at_the_teacher():
    teacher = CONFIGS["Qwen3-4B"]
    layer_map = ModelArguments("teacher").layer_map(teacher)
    parents = {
        "teacher": teacher,
        "student": config_for(initial_student(layer_map), {"teacher": teacher}),
    }
    counts = [
        count_parameters(config_for(intermediate_model(layer_map, k, "last"), parents))
        for k in range(18)
    ]
    both = [count.both_counted for count in counts]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(both))
    assert [round(counts[k].stored / 1e9, 2) for k in (16, 17)] == [4.31, 4.02]

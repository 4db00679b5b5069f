"""Let several sizes answer the same chat prompts."""

from pathlib import Path

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from patching.family import Family
from patching.files.outputs import write_text

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
NUM_SIZES = 5
NEW_TOKENS = 48


def answering_sizes(family: Family) -> list[int]:
    """Return sizes spread evenly from the student to the teacher."""
    largest = family.max_layers_to_patch
    return sorted({round(i * largest / (NUM_SIZES - 1)) for i in range(NUM_SIZES)})


def write_answers(teacher: Path, student: Path, order: Path, path: Path) -> None:
    """Write and print the answers of some sizes."""
    family = Family.from_pretrained(str(teacher), str(student), order=str(order))
    lines = ["# The same chat prompts, answered by several sizes", ""]
    lines.append(f"Greedy decoding, at most {NEW_TOKENS} tokens.")
    for prompt in PROMPTS:
        lines += ["", f"**{prompt}**", "", "| k | layers | answer |", "| ---: | ---: | --- |"]
        for k in answering_sizes(family):
            text = answer(family.model(k), family.tokenizer, prompt)
            lines.append(f"| {k} | {family.recipe(k).depth} | {' '.join(text.split())} |")
    write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The model's answer to one message of a user, by greedy decoding."""
    inputs = inputs_of(tokenizer, prompt)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def inputs_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """The conversation that the model is to continue, through the chat template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

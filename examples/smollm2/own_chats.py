"""Chats that the teacher writes itself, to distill its students on.

    python -m examples.smollm2.own_chats --save_directory smollm2_output --num_chats 256

A chat model that is given the beginning of a user's turn continues it with a prompt (Magpie, arXiv
2406.08464). Prompts are sampled, and replies are greedy. A chat is left out if its prompt or its
reply does not end in time. `smollm2_output/own_chats.jsonl` is what `train.train --sft_dataset`
takes, and a file that is already there is left as it is.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import write_text

FILE_NAME = "own_chats.jsonl"
PROMPT_TOKENS, REPLY_TOKENS = 64, 160
BATCH_SIZE = 16
MARKER = "\ue000"


def write_own_chats(folder: Path, num_chats: int, seed: int = 0) -> Path:
    """Write chats of `folder/teacher` to a file in `folder`, unless it is there, and return it.

    Raises ValueError if the teacher hardly ever ends a prompt or a reply.
    """
    path, teacher = folder / FILE_NAME, folder / "teacher"
    if path.is_file():
        print(f"{path} is already there")
        return path
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    chats: dict[str, str] = {}
    num_tries = 0
    while len(chats) < num_chats:
        if num_tries >= 20 * num_chats:
            raise ValueError(
                f"num_chats={num_chats}: only {len(chats)} of {num_tries} chats ended in time"
            )
        num_tries += BATCH_SIZE
        prompts = own_prompts(model, tokenizer, BATCH_SIZE)
        chats |= zip(prompts, replies(model, tokenizer, prompts))
        chats = {prompt: reply for prompt, reply in chats.items() if reply}
        print(f"{len(chats)} of {num_chats} chats", flush=True)
    lines = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}
        for prompt, reply in list(chats.items())[:num_chats]
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def own_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_prompts: int
) -> list[str]:
    """Sample what a user might ask, as the model would have it. Those that do not end are left
    out.
    """
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": MARKER}], tokenize=False)
    beginning = rendered[: rendered.index(MARKER)]
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    prompts = continuations(model, tokenizer, [beginning] * num_prompts, PROMPT_TOKENS, **sampling)
    return [prompt for prompt in prompts if prompt]


def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str | None]:
    """Return the greedy reply to each prompt, None for one that does not end."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    return continuations(model, tokenizer, texts, REPLY_TOKENS, do_sample=False)


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    num_tokens: int,
    **sampling: object,
) -> list[str | None]:
    """Continue texts up to the end-of-text token. One that takes more than `num_tokens` is None."""
    if not texts:
        return []
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=num_tokens, **sampling)
    end, found = tokenizer.eos_token_id, []
    for row in tokens[:, inputs["input_ids"].shape[1] :].tolist():
        text = tokenizer.decode(row[: row.index(end)]).strip() if end in row else None
        found.append(text)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, default=Path("smollm2_output"))
    parser.add_argument("--num_chats", type=int, default=256)
    arguments = parser.parse_args(argv)
    with user_errors():
        print(write_own_chats(arguments.save_directory.resolve(), arguments.num_chats))


if __name__ == "__main__":
    run_command(main, "the same command starts again")

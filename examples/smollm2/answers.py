"""Check that a saved size answers chat prompts alike in transformers and in two harnesses.

    python -m examples.smollm2.answers --save_directory smollm2_output --num_layers_to_patch 10

saves that size with `patching.patch` and lets transformers answer the prompts through the chat
template, greedily. Then the same prompts are a task whose right answers are these: `evaluate` and
lm-eval itself must get all of them right. Everything is in fp32. The answers are written to
`smollm2_output/results/answers.md`, and the command fails if any differs.
"""

import argparse
import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.commands import run
from examples.smollm2.chat import NEW_TOKENS, PROMPTS, answer
from examples.stdlib.tasks import write_task
from patching.cli.command_line import run_command
from patching.files.outputs import write_text

TASK = "smollm2_answers"
METRIC = "exact_match,strip"
MORE_PROMPTS = (
    "How many days are in a week?",
    "Write a short poem about rain.",
    "What is Python?",
    "Translate 'good morning' to French.",
    "Name three colors.",
    "Why is the sky blue?",
)


def compare(folder: Path, num_layers_to_patch: int) -> dict[str, float]:
    """Return the share of prompts that each harness answers as transformers does, and write the
    answers.
    """
    member = folder / f"member_k{num_layers_to_patch}"
    family = [
        *("--teacher_model_name_or_path", folder / "teacher"),
        *("--student_model_name_or_path", folder / "student"),
        *("--num_layers_to_patch", num_layers_to_patch, "--dtype", "float32"),
    ]
    if not member.exists():
        run("patching.patch", *family, "--save_directory", member)
    model = AutoModelForCausalLM.from_pretrained(member)
    tokenizer = AutoTokenizer.from_pretrained(member)
    prompts = (*PROMPTS, *MORE_PROMPTS)
    answers = [answer(model, tokenizer, prompt).strip() for prompt in prompts]
    tasks = folder / "tasks_of_answers"
    write_answers_task(tasks, prompts, answers, tokenizer.eos_token)
    results = folder / "results" / f"answers_k{num_layers_to_patch}"
    run(
        *("evaluate.evaluate", *family, "--save_directory", results, "--tasks", TASK),
        *("--include_path", tasks, "--apply_chat_template"),
    )
    of_family = json.loads((results / f"family_k{num_layers_to_patch}.json").read_text())
    of_harness = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
    )
    lines = [
        f"# Answers of {model.config.num_hidden_layers} layers, by transformers",
        "",
        *(f"- **{prompt}** {' '.join(of.split())}" for prompt, of in zip(prompts, answers)),
    ]
    write_text(folder / "results" / "answers.md", "\n".join(lines) + "\n")
    return {
        "evaluate.evaluate": of_family["results"][TASK][METRIC],
        "lm-eval": of_harness["results"][TASK][METRIC],
    }


def write_answers_task(
    folder: Path, prompts: tuple[str, ...], answers: list[str], end_of_turn: str
) -> None:
    documents = [{"prompt": prompt, "answer": of} for prompt, of in zip(prompts, answers)]
    strip = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [end_of_turn], "max_gen_toks": NEW_TOKENS, "do_sample": False,
        },
        "filter_list": [{"name": "strip", "filter": strip}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write_task(folder, TASK, documents, settings)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, default=Path("smollm2_output"))
    parser.add_argument("--num_layers_to_patch", type=int, default=10)
    arguments = parser.parse_args(argv)
    shares = compare(arguments.save_directory.resolve(), arguments.num_layers_to_patch)
    for harness, share in shares.items():
        print(f"{harness}: {share:.0%} of the answers are those of transformers")
    if any(share < 1 for share in shares.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, "the same command starts again, with the size that is saved")

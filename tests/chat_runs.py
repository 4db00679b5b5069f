"""A small teacher with a chat template, some chats, and runs of train.train on them."""

import json
from pathlib import Path

from conftest import byte_tokenizer, save_pair

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}a: {{ message.content }}"
    "{{ eos_token }}\n{% else %}{{ message.role[:1] }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_chat_teacher(folder: Path, kind: str = "qwen3-tied") -> Path:
    teacher = save_pair(folder, kind)[0]
    chat_tokenizer().save_pretrained(teacher)
    return teacher


def write_chats(path: Path, num_chats: int = 60) -> Path:
    """Chats of one or two turns whose replies are of different lengths."""
    lines = []
    for i in range(num_chats):
        messages = [
            {"role": "user", "content": f"Count to {i % 9}."},
            {"role": "assistant", "content": " ".join(map(str, range(i % 9 + 1)))},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": f"No, {i}."},
            ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def command(teacher: Path, folder: Path, text: Path, chats: Path, **changes) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": text,
        "sft_dataset": chats, "max_length": 48, "max_steps": 6, "logging_steps": 1,
        "save_steps": 1, "save_total_limit": 10, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "disable_tqdm": True, "eval_strategy": "no",
        "bf16": False, "learning_rate": 1e-2, "heldout_documents": 2, "measure_order": False,
    } | changes  # fmt: skip
    return [str(x) for name, value in settings.items() for x in (f"--{name}", value)]

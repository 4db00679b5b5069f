"""Let members, converted to GGUF, answer chat prompts in llama.cpp, as a user of its Python binding
does: through the chat template, the tokenizer and the end of text that the file itself states.

    python chat_llama_cpp.py --prompts prompts.json --new_tokens 48 GGUF=OUTPUT.json ...

`prompts.json` is a list of texts. An output is the name of the pre-tokenizer, and for each prompt
the token ids of the conversation, those of the answer with the end of text, and the answer's text.
"""

import argparse
import json
from pathlib import Path

from run_llama_cpp import CACHE_TYPES, LlamaCppModel

NUM_POSITIONS = 512


def answer(model: LlamaCppModel, prompt: str, new_tokens: int) -> dict:
    completion = model.model.create_chat_completion(
        [{"role": "user", "content": prompt}], temperature=0, max_tokens=new_tokens
    )
    start, end = completion["usage"]["prompt_tokens"], model.model.n_tokens
    tokens = model.model.input_ids[:end].tolist()
    # The last token was chosen, but not read again.
    last = int(model.model.scores[end - 1].argmax())
    return {
        "conversation": tokens[:start],
        "tokens": [*tokens[start:], last],
        "text": completion["choices"][0]["message"]["content"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("files", nargs="+", metavar="GGUF=OUTPUT.json")
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text())
    for pair in arguments.files:
        file, output = map(Path, pair.split("=", 1))
        model = LlamaCppModel(file, NUM_POSITIONS, CACHE_TYPES["float32"])
        answers = [answer(model, prompt, arguments.new_tokens) for prompt in prompts]
        pre_tokenizer = model.model.metadata["tokenizer.ggml.pre"]
        output.write_text(json.dumps({"pre_tokenizer": pre_tokenizer, "answers": answers}))

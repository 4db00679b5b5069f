"""Run llama.cpp's converter on a member, also if its tokenizer is unknown to llama.cpp.

    python convert_to_gguf.py CONVERT_HF_TO_GGUF.PY MEMBER --outtype f16 --outfile FILE

llama.cpp identifies the pre-tokenizer of a BPE tokenizer by a hash of what it does to a test
string, and knows the hashes of published models only. Such a tokenizer is declared as GPT-2's here.
Engines are compared on token ids, so this affects no result. SentencePiece tokenizers are converted
as they are.
"""

import runpy
import sys
from pathlib import Path

converter = Path(sys.argv[1])
sys.path.insert(0, str(converter.parent))
sys.path.insert(1, str(converter.parent / "gguf-py"))

from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def get_vocab_base_pre(self: TextModel, tokenizer: object) -> str:
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"


TextModel.get_vocab_base_pre = get_vocab_base_pre
sys.argv = [str(converter), *sys.argv[2:]]
runpy.run_path(str(converter), run_name="__main__")

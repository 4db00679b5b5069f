"""Run llama.cpp's converter on members, also if their tokenizer is unknown to llama.cpp.

    python convert_to_gguf.py CONVERT_HF_TO_GGUF.PY MEMBER/f16.gguf ...

A file is named after its number type and lies in its member's folder. It appears when it is
complete. If the converter rejects the member, the reason is in `f16.refusal`.

llama.cpp identifies the pre-tokenizer of a BPE tokenizer by a hash of what it does to a test
string, and knows the hashes of published models only. Such a tokenizer is declared as GPT-2's here.
Engines are compared on token ids, so this affects no result. SentencePiece tokenizers are converted
as they are.
"""

import logging
import runpy
import sys
import traceback
from pathlib import Path

converter = Path(sys.argv[1])
targets = [Path(word) for word in sys.argv[2:]]
sys.path.insert(0, str(converter.parent))
sys.path.insert(1, str(converter.parent / "gguf-py"))

from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def get_vocab_base_pre(self: TextModel, tokenizer: object) -> str:
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"


class LastError(logging.Handler):
    """Keeps what the converter says before it exits."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def convert(target: Path) -> None:
    """Convert the member in whose folder `target` is to lie."""
    said, part = LastError(logging.ERROR), target.with_suffix(".part")
    logging.getLogger().addHandler(said)
    sys.argv = [
        str(converter),
        str(target.parent),
        "--outtype",
        target.stem,
        "--outfile",
        str(part),
    ]
    try:
        runpy.run_path(str(converter), run_name="__main__")
    except (Exception, SystemExit) as error:  # any exception is the converter's answer
        traceback.print_exc()
        part.unlink(missing_ok=True)
        reason = said.text or f"{type(error).__name__}: {error}"
        target.with_suffix(".refusal").write_text(" ".join(reason.split()) + "\n")
    else:
        part.rename(target)
    finally:
        logging.getLogger().removeHandler(said)


logging.basicConfig(level=logging.INFO)
TextModel.get_vocab_base_pre = get_vocab_base_pre
for path in targets:
    convert(path)

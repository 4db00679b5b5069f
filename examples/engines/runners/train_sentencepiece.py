"""Train a SentencePiece tokenizer and save it as transformers 4 saves Llama's, Mistral's and
Gemma's.

    python train_sentencepiece.py TEXT FOLDER VOCAB_SIZE
"""

import sys
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from transformers import LlamaTokenizerFast

text, folder, vocab_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True)
SentencePieceTrainer.train(
    input=str(text),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=vocab_size,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    max_sentence_length=10000,
    num_threads=1,
    minloglevel=2,
)
(folder / "tokenizer.vocab").unlink()
tokenizer = LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), legacy=False)
tokenizer.save_pretrained(folder)

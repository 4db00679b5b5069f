"""Small trained stand-ins for BERT and DistilBERT, and for GPT-2 and DistilGPT2, from the standard
library: what made the four folders of `examples/stdlib/standins`.

    python -m examples.stdlib.train_standins teacher --kind bert --save_directory BERT
    python -m examples.stdlib.train_standins student --teacher BERT --save_directory DISTILBERT

The notebooks run on them in the tests, where there is no network. Teachers have 12 layers. Their
matrices learn by Muon, the rest by AdamW, the learning rate falls linearly to zero. Students come
from `train.train`, with the layers that the public ones keep; BERT's is saved as a DistilBERT.
Some minutes each on two CPU cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.train_teacher import train_tokenizer
from patching.architectures.distilbert import (
    CONFIG_FIELDS,
    TOKEN_TYPES,
    UNUSED_BIAS,
    distilbert_name,
)
from patching.architectures.models import auto_class
from train.batches import collate
from train.data import load_rows
from train.data_args import DataArguments
from train.loss import IGNORED_LABEL
from train.masking import Masking

ROW_TOKENS = 128
DISTILLATION = {
    "kept_layers": "0,2,4,7,9,11",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 10,
    "per_device_eval_batch_size": 32,
    "save_dtype": "bfloat16",
}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SHARE_OF_TARGETS = 0.3
"""More than a student is trained with: a teacher from nothing learns more of each row so."""


def train_wordpiece(modules: list[Module], vocab_size: int) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer over the training modules: lower case, words, punctuation apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=ROW_TOKENS,
        clean_up_tokenization_spaces=False,
        **dict(zip(names, SPECIAL_TOKENS)),
    )


def pieces(module: Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Lines of a module, as many together as a row holds with a special token at each end.

    Where those are not BERT's, the first is written out: end of text, which scoring puts there too.
    """
    front = tokenizer.eos_token or ""
    lines = module.text.splitlines(keepends=True)
    ids = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    piece, room = [], ROW_TOKENS - 2
    for line, length in zip(lines, map(len, ids)):
        if length > room and piece:
            yield front + "".join(piece)
            piece, room = [], ROW_TOKENS - 2
        piece.append(line)
        room -= length
    yield front + "".join(piece)


def write_pieces(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Write a document for each piece; return the flags of `train.train` for them."""
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for module in iter_modules():
        part = parts["heldout" if is_held_out(module.name) else "train"]
        part.extend(text for text in pieces(module, tokenizer) if text.strip())
    for name, texts in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {
        "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "heldout.jsonl"),
        "max_length": ROW_TOKENS,
        "packing": False,
    }


def new_teacher(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=96,
                n_layer=12,
                n_head=3,
                n_positions=ROW_TOKENS,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                initializer_range=0.06,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=384,
            max_position_embeddings=ROW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.06,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


NUM_RATES = 16
FIRST_LOOKS = ((-1, 1), (-2, 2))
"""Tokens that the heads of the first layers look at in the beginning, counted from their own."""
SHARPNESS = 2.0


@torch.no_grad()
def look_at_neighbours(model: BertForMaskedLM) -> None:
    """Start from positions as sines and cosines, and from heads that find the tokens next to each.

    A masked model learns nothing beyond how frequent tokens are until its heads look at neighbours,
    which from random weights and small text takes hours. What they look at is learned on from here.
    """
    table_TD = model.bert.embeddings.position_embeddings.weight
    num_positions, width = table_TD.shape
    fast_F = torch.linspace(0.1, 3.0, NUM_RATES)  # tell neighbours apart, the slow ones regions
    slow_F = 0.1 * 100.0 ** -torch.linspace(0, 1, width // 2 - NUM_RATES)
    angles_TF = torch.arange(num_positions)[:, None] * torch.cat((fast_F, slow_F))
    words_std = model.bert.embeddings.word_embeddings.weight.std()
    table_TD[:, 0::2], table_TD[:, 1::2] = angles_TF.sin(), angles_TF.cos()
    table_TD.mul_(words_std * 2**0.5)
    for layer, looks in zip(model.bert.encoder.layer, FIRST_LOOKS):
        attention = layer.attention.self
        size = attention.attention_head_size
        for head, offset in enumerate(looks):
            query_HD, key_HD = (
                linear.weight[head * size : (head + 1) * size]
                for linear in (attention.query, attention.key)
            )
            query_HD.zero_(), key_HD.zero_()
            for i, angle in enumerate(offset * fast_F):
                pair = slice(2 * i, 2 * i + 2)
                turn = [[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]]
                query_HD[pair, pair] = SHARPNESS * torch.tensor(turn)
                key_HD[pair, pair] = SHARPNESS * torch.eye(2)


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over the targets, in nats."""
    mask_BT = (batch["labels"] != IGNORED_LABEL).long()
    states_BTD = model.base_model(batch["input_ids"], attention_mask=mask_BT).last_hidden_state
    labels_BT = batch["labels"]
    if isinstance(model, BertForMaskedLM):
        is_target_BT, head = labels_BT >= 0, model.cls
        logits_NV, labels_N = head(states_BTD[is_target_BT]), labels_BT[is_target_BT]
    else:
        is_target_BT = labels_BT[:, 1:] >= 0
        logits_NV = model.lm_head(states_BTD[:, :-1][is_target_BT])
        labels_N = labels_BT[:, 1:][is_target_BT]
    return nn.functional.cross_entropy(logits_NV.float(), labels_N)


@torch.no_grad()
def held_out_nats(model: PreTrainedModel, rows: list[list[int]], masking: Masking | None) -> float:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for first in range(0, len(rows), 32):
        batch = collate([{"input_ids": ids} for ids in rows[first : first + 32]])
        if masking is not None:
            batch = masking.hide(batch, generator)
        losses.append(loss_of(model, batch).item())
    return sum(losses) / len(losses)


def train_teacher(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    modules = [module for module in iter_modules() if not is_held_out(module.name)]
    make_tokenizer = train_tokenizer if arguments.kind == "gpt2" else train_wordpiece
    tokenizer = make_tokenizer(modules, vocab_size=2048)
    tokenizer.model_max_length = ROW_TOKENS
    masking = None if arguments.kind == "gpt2" else Masking.of(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        text = DataArguments(**write_pieces(Path(folder), tokenizer))
        train, held_out = load_rows(text, tokenizer, arguments.seed)
        rows, held_out = train["input_ids"][:], held_out["input_ids"][:512]
    num_tokens = sum(map(len, rows))
    print(f"{len(rows)} rows, {num_tokens} tokens", flush=True)

    model = new_teacher(arguments.kind, tokenizer)
    if arguments.kind == "bert":
        look_at_neighbours(model)
    model.base_model.forward = torch.compile(model.base_model.forward, dynamic=False)
    matrices = [
        parameter
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and "embeddings" not in name and not name.startswith(("wte", "wpe"))
    ]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rows_per_step = arguments.rows_per_step
    log, started, step = [], time.time(), 0

    def factor() -> float:
        """Warm-up, then linearly to zero at the end of the allotted time."""
        passed = (time.time() - started) / arguments.seconds
        return min((step + 1) / arguments.warmup_steps, max(0.0, 1 - passed))

    order: list[int] = []
    trained_tokens = 0
    while time.time() - started < arguments.seconds:
        if len(order) < rows_per_step:
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen_rows, order = order[:rows_per_step], order[rows_per_step:]
        # One shape for every step: the model is compiled once.
        batch = collate([{"input_ids": rows[i]} for i in chosen_rows])
        batch = {name: _widened(name, batch[name]) for name in ("input_ids", "labels")}
        if masking is not None:
            batch = masking.hide(batch, generator, SHARE_OF_TARGETS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, (arguments.muon_lr, arguments.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor()
            optimizer.step()
            optimizer.zero_grad()
        trained_tokens += int((batch["labels"] != IGNORED_LABEL).sum())
        if step % 25 == 0:
            seconds = time.time() - started
            log.append({"step": step, "loss": round(loss.item(), 4)})
            print(
                f"step {step} loss {loss.item():.3f} {trained_tokens / seconds:.0f} tokens/s "
                f"{seconds:.0f} s",
                flush=True,
            )
        step += 1

    del model.base_model.forward
    model = model.to(torch.bfloat16)
    nats = held_out_nats(model, held_out, masking)
    print(f"{step} steps, held-out {nats:.4f} nats per target", flush=True)
    model.save_pretrained(arguments.save_directory)
    tokenizer.save_pretrained(arguments.save_directory)
    record = {
        "arguments": {
            k: str(v) for k, v in vars(arguments).items() if k not in ("save_directory", "run")
        },
        "torch": torch.__version__,
        "steps": step,
        "trained_tokens": trained_tokens,
        "held_out_nats_per_target": nats,
        "log": log,
    }
    (arguments.save_directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _widened(name: str, tensor_BT: torch.Tensor) -> torch.Tensor:
    padding = IGNORED_LABEL if name == "labels" else 0
    return nn.functional.pad(tensor_BT, (0, ROW_TOKENS - tensor_BT.shape[1]), value=padding)


def train_student(arguments: argparse.Namespace) -> None:
    """Distil with `train.train`; a BERT's student is saved as a DistilBERT, and none says which
    layers it kept, as the public ones do not.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = {"max_steps": arguments.steps, "cosine_loss_weight": arguments.cosine_loss_weight}
        settings = {
            **DISTILLATION,
            **chosen,
            **write_pieces(folder, tokenizer),
            "teacher_model_name_or_path": arguments.teacher,
            "save_directory": folder / "student",
        }
        words = [str(word) for flag, value in settings.items() for word in (f"--{flag}", value)]
        subprocess.run([sys.executable, "-m", "train.train", *words], check=True)
        run = json.loads((folder / "student" / "run.json").read_text())
        config = AutoConfig.from_pretrained(folder / "student")
        student = auto_class(config).from_pretrained(folder / "student")
    if isinstance(student, BertForMaskedLM):
        student = as_distilbert(student)
    student.save_pretrained(arguments.save_directory)
    tokenizer.save_pretrained(arguments.save_directory)
    record = {
        "arguments": {**DISTILLATION, **chosen},
        "held_out": run["held_out"],
        "log": [
            {name: line[name] for name in ("step", "loss", "cross_entropy", "kl", "cosine")}
            for line in run["log"]
            if "loss" in line
        ],
    }
    (arguments.save_directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def as_distilbert(bert: BertForMaskedLM) -> DistilBertForMaskedLM:
    """The same model as a DistilBERT: what its first token type adds goes into the positions."""
    fields = {ours: getattr(bert.config, theirs) for theirs, ours in CONFIG_FIELDS.items()}
    model = DistilBertForMaskedLM(DistilBertConfig(**fields)).to(bert.dtype)
    tensors = bert.state_dict()
    positions = "bert.embeddings.position_embeddings.weight"
    tensors[positions] = tensors[positions] + tensors.pop(TOKEN_TYPES)[0]
    del tensors[UNUSED_BIAS]
    model.load_state_dict({distilbert_name(name): tensor for name, tensor in tensors.items()})
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    teacher = commands.add_parser("teacher")
    teacher.add_argument("--kind", choices=("bert", "gpt2"), required=True)
    teacher.add_argument("--save_directory", type=Path, required=True)
    teacher.add_argument("--seconds", type=float, default=430.0)
    teacher.add_argument("--rows_per_step", type=int, default=16)
    teacher.add_argument("--muon_lr", type=float, default=0.02)
    teacher.add_argument("--adam_lr", type=float, default=2e-3)
    teacher.add_argument("--warmup_steps", type=int, default=100)
    teacher.add_argument("--seed", type=int, default=0)
    teacher.set_defaults(run=train_teacher)
    student = commands.add_parser("student")
    student.add_argument("--teacher", type=Path, required=True)
    student.add_argument("--save_directory", type=Path, required=True)
    student.add_argument("--steps", type=int, default=700)
    student.add_argument("--cosine_loss_weight", type=float, default=10.0)
    student.set_defaults(run=train_student)
    parsed = parser.parse_args()
    parsed.run(parsed)

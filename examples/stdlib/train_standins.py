"""Train small stand-ins for BERT, DistilBERT, GPT-2 and DistilGPT2 on the standard library.

    python -m examples.stdlib.train_standins teacher --kind bert --save_directory BERT
    python -m examples.stdlib.train_standins student --teacher BERT --save_directory DISTILBERT

This is how the four folders of `examples/stdlib/standins` were made. The tests run the notebooks
on them, because tests have no network. Teachers have 12 layers. Students are distilled by
`train.train` and keep the same layers as the public ones. BERT's student is saved as a DistilBERT.
Each takes some minutes on two CPU cores.

Shapes: B rows, T positions, V vocabulary. While starting weights are made: D hidden size, H size of
a head, F frequencies.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor, nn
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

from examples.commands import run
from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.demo import as_flags
from examples.stdlib.train_teacher import train_tokenizer
from examples.stdlib.training import Batch, autocast, held_out_loss, save, save_tokenizer, train
from patching.architectures.distilbert import (
    CONFIG_FIELDS,
    TOKEN_TYPES,
    UNUSED_BIAS,
    distilbert_name,
)
from patching.architectures.models import auto_class
from patching.cli.command_line import run_command
from train.batches import collate
from train.data import load_rows
from train.data_args import DataArguments
from train.loss import IGNORED_LABEL
from train.masking import SHARE_OF_TARGETS, Masking

ROW_TOKENS = 128
STEPS = {"bert": 1602, "gpt2": 2081}
"""The steps that the shipped teachers were trained for."""
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
TEACHER_SHARE_OF_TARGETS = 0.3
"""Share of masked tokens. It is higher than in distillation, because a teacher trained from scratch
then learns more from each row.
"""


def train_wordpiece(modules: list[Module], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer like BERT's on the modules: lower case, punctuation split off."""
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
    """Cut a module at line ends into pieces that fit a row with a special token at each end.

    Scoring puts the end-of-text token in front of a text, so pieces for tokenizers that have one
    start with it.
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
    """Write each piece as a document. Return the flags with which `train.train` reads them."""
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
        "packing": "False",
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
"""Where each head of the first layers attends to at the start, relative to its own position."""
SHARPNESS = 2.0


@torch.no_grad()
def look_at_neighbors(model: BertForMaskedLM) -> None:
    """Start with sinusoidal positions, and with heads that attend to the neighboring tokens.

    Until its heads attend to neighbors, a masked model learns only how frequent tokens are. From
    random weights and on a small corpus, getting past that takes hours. Training continues from
    these weights like from any others.
    """
    table_TD = model.bert.embeddings.position_embeddings.weight
    num_positions, width = table_TD.shape
    fast_F = torch.linspace(0.1, 3.0, NUM_RATES)  # for neighbors; the slow ones, for regions
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


def loss_of(model: PreTrainedModel, input_ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy over the targets, in nats."""
    with autocast():
        mask_BT = (labels_BT != IGNORED_LABEL).long()
        logits_BTV = model(input_ids=input_ids_BT, attention_mask=mask_BT).logits
    if not isinstance(model, BertForMaskedLM):
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    targets_BT = labels_BT.where(labels_BT >= 0, IGNORED_LABEL)
    return nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED_LABEL
    )


def batch_of(
    rows: list[list[int]],
    masking: Masking | None,
    generator: torch.Generator,
    share: float = SHARE_OF_TARGETS,
) -> Batch:
    """Token ids and labels, each of shape (B, T). T is always ROW_TOKENS, as the loss is compiled
    for one shape.
    """
    batch = collate([{"input_ids": ids} for ids in rows])
    padding = (0, ROW_TOKENS - batch["labels"].shape[1])
    batch = {
        "input_ids": nn.functional.pad(batch["input_ids"], padding),
        "labels": nn.functional.pad(batch["labels"], padding, value=IGNORED_LABEL),
    }
    if masking is not None:
        batch = masking.hide(batch, generator, share)
    return batch["input_ids"], batch["labels"]


def training_batches(
    rows: list[list[int]], rows_per_step: int, masking: Masking | None, generator: torch.Generator
) -> Iterator[Batch]:
    """Full batches of rows in random order, epoch after epoch, with new masks every time."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - rows_per_step + 1, rows_per_step):
            chosen = [rows[i] for i in order[start : start + rows_per_step]]
            yield batch_of(chosen, masking, generator, TEACHER_SHARE_OF_TARGETS)


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
        train_rows, held_out_rows = load_rows(text, tokenizer, arguments.seed)
        rows, held_out_rows = train_rows["input_ids"][:], held_out_rows["input_ids"][:512]
    print(f"{len(rows)} rows, {sum(map(len, rows))} tokens", flush=True)
    masks = torch.Generator().manual_seed(0)
    held_out = [
        batch_of(held_out_rows[start : start + 32], masking, masks)
        for start in range(0, len(held_out_rows), 32)
    ]
    model = new_teacher(arguments.kind, tokenizer)
    if arguments.kind == "bert":
        look_at_neighbors(model)
    trained = train(
        model,
        loss_of,
        training_batches(rows, arguments.rows_per_step, masking, generator),
        steps=arguments.steps or STEPS[arguments.kind],
        warmup_steps=arguments.warmup_steps,
        muon_lr=arguments.muon_lr,
        adam_lr=arguments.adam_lr,
        held_out=held_out,
    )
    nats = held_out_loss(model, loss_of, held_out)
    print(f"{trained.steps} steps, held-out {nats:.4f} nats per target", flush=True)
    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    save(
        arguments.save_directory, model, tokenizer, settings, trained, held_out_nats_per_target=nats
    )


def train_student(arguments: argparse.Namespace) -> None:
    """Distill with `train.train` and save the student as the public ones are: a BERT's student as a
    DistilBERT, and without a record of the layers it kept.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = {"max_steps": arguments.steps, "cosine_loss_weight": arguments.cosine_loss_weight}
        settings = {
            **DISTILLATION,
            **chosen,
            **write_pieces(folder, tokenizer),
            "teacher_model_name_or_path": arguments.teacher.resolve(),
            "save_directory": folder / "student",
            "measure_order": False,
        }
        run("train.train", *as_flags(settings))
        of_student = json.loads((folder / "student" / "run.json").read_text())
        config = AutoConfig.from_pretrained(folder / "student")
        student = auto_class(config).from_pretrained(folder / "student")
    if isinstance(student, BertForMaskedLM):
        student = as_distilbert(student)
    student.save_pretrained(arguments.save_directory)
    save_tokenizer(tokenizer, arguments.save_directory)
    record = {
        "arguments": {**DISTILLATION, **chosen},
        "held_out": of_student["held_out"],
        "log": [
            {name: line[name] for name in ("step", "loss", "cross_entropy", "kl", "cosine")}
            for line in of_student["log"]
            if "loss" in line
        ],
    }
    (arguments.save_directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def as_distilbert(bert: BertForMaskedLM) -> DistilBertForMaskedLM:
    """The same model as a DistilBERT. Its positions include the embedding of BERT's first token
    type, because DistilBERT has no token types.
    """
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
    teacher.add_argument("--steps", type=int, help=f"default: {STEPS}, as the shipped ones")
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
    run_command(lambda: parsed.run(parsed), "the same command starts again")

"""Documents in one row do not see each other: a row's logits and loss are those of its documents
alone, in every architecture and with every attention implementation that transformers offers.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from masked_models import encoder_config
from patching_models import ENCODERS, LAYER_MAP, NUM_LAYERS, SETTINGS, family_config, family_pair
from test_architectures import DECLARED
from test_fsdp import command, read
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import MASKING
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention

from patching.running import varlen
from patching.running.documents import separate_documents
from patching.running.hidden_states import before_output_embeddings, hidden_states_at
from train import packing
from train.batches import collate, to_device
from train.data import lengths_in_rows
from train.distillation import install_distillation_forward
from train.loss import NO_TARGET, LossWeights, count
from train.masking import generator_for
from train.packing import check_flex, check_separates_documents, check_varlen
from train.train import main

LENGTHS = (7, 11, 1, 5, 9, 2, 13)
ROW_LENGTH = 24  # the third row is padded, and the fifth document is cut
CPU = torch.device("cpu")
WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.3, cosine=2.0, temperature=2.0)


def packed_and_alone() -> tuple[list[dict], list[dict]]:
    """Return rows that hold several documents, and the same parts of documents as single rows."""
    generator = torch.Generator().manual_seed(0)
    parts_of_rows = lengths_in_rows(LENGTHS, ROW_LENGTH)
    packed, alone = [], []
    for lengths in parts_of_rows:
        parts = [torch.randint(5, 250, (n,), generator=generator).tolist() for n in lengths]
        ids = [token for part in parts for token in part]
        packed.append({"input_ids": ids, "document_lengths": lengths})
        alone += [{"input_ids": part} for part in parts]
    return packed, alone


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    batch = to_device(batch, CPU)
    names = ("input_ids", "attention_mask", "position_ids", "num_documents")
    (states_BTD,) = hidden_states_at(model, [NUM_LAYERS], *map(batch.get, names))
    return model.get_output_embeddings()(before_output_embeddings(model, states_BTD))


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    packed, alone = packed_and_alone()
    logits_BTV, remaining = logits_of(model, collate(packed)), iter(alone)
    for row, of_row_TV in zip(packed, logits_BTV):
        for of_part_TV in of_row_TV[: len(row["input_ids"])].split(row["document_lengths"]):
            expected_TV = logits_of(model, collate([next(remaining)]))[0]
            torch.testing.assert_close(of_part_TV, expected_TV, rtol=0, atol=2e-5)
    crossed = [{"input_ids": row["input_ids"]} for row in packed[:2]]
    difference = logits_of(model, collate(crossed)) - logits_BTV[:2]
    assert difference.abs().max() > 0.05  # where they do see each other


def variants(model_type: str) -> list[str]:
    cls = CONFIG_MAPPING[model_type]
    has_sdpa = model_type in ENCODERS or AutoModelForCausalLM._model_mapping[cls]._supports_sdpa
    return ["eager", "sdpa"] if has_sdpa else ["eager"]


@pytest.mark.parametrize("model_type", SETTINGS)
def test_logits_of_a_packed_row_are_those_of_its_documents_alone(model_type):
    model = tiny_model(family_config(model_type))
    for implementation in variants(model_type):
        model.set_attn_implementation(implementation)
        check_logits(model)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "opt", "bert"])
def test_loss_and_gradients_of_packed_rows_are_those_of_documents_alone(model_type):
    found = []
    for rows in packed_and_alone():
        teacher, student = family_pair(model_type)
        batch = collate(rows)
        if model_type == "bert":  # both have the same real tokens in the same sequence
            masking = MASKING._replace(vocab_size=257)
            batch = masking.hide(batch, generator_for(0), share_of_targets=0.4)
        install_distillation_forward(student, teacher, LAYER_MAP, WEIGHTS)
        counts = count(batch["labels"], model_type == "bert")
        terms = student.train(False)(**batch, counts=counts)
        terms.loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((counts, terms, gradients))
    (counts, terms, gradients), (expected_counts, expected_terms, expected_gradients) = found
    assert counts == expected_counts
    assert counts.positions == sum(LENGTHS)
    torch.testing.assert_close(tuple(terms), tuple(expected_terms))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


class HostWaits(TorchDispatchMode):
    """Counts what a host has to wait for on an accelerator: values, and numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        is_masked = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += is_masked or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])  # the second has windows
@pytest.mark.parametrize("lengths", [{}, {"document_lengths": [1, 3]}], ids=["cross", "documents"])
def test_a_micro_batch_of_full_rows_never_waits_for_the_device(lengths, model_type):
    teacher, student = family_pair(model_type)
    install_distillation_forward(student, teacher, LAYER_MAP, WEIGHTS)
    batch = to_device(collate([{"input_ids": [7, 8, 9, 7]} | lengths] * 2), CPU)
    counts, found = count(batch["labels"]), []
    for few_targets in (False, True):
        with HostWaits() as waits:
            student(**batch, counts=counts, few_targets=few_targets).loss.backward()
        found.append(waits.count)
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("lengths", [[4], [1, 3]])
def test_kernels_are_told_the_boundaries_without_waiting_for_the_device(lengths):
    model = family_pair("qwen3")[0]
    model.config._attn_implementation = varlen.VARLEN
    rows = [{"input_ids": [7, 8, 9, 7], "document_lengths": lengths}] * 2
    batch = to_device(collate(rows), CPU)
    with HostWaits() as waits:
        told = separate_documents(model, batch["position_ids"], batch["num_documents"])
    assert waits.count == 0
    ends = torch.tensor([0, *lengths, *lengths]).cumsum(0)
    for found in (told, separate_documents(model, batch["position_ids"])):
        torch.testing.assert_close(found["cu_seq_lens_q"], ends.int(), rtol=0, atol=0)


def test_masked_models_predict_hidden_first_tokens_too():
    batch = collate([{"input_ids": [9, 8, 7, 6], "document_lengths": [2, 2]}])
    assert batch["labels"].tolist() == [[NO_TARGET, 8, NO_TARGET, 6]]
    hidden = MASKING.hide(batch, generator_for(0), share_of_targets=1.1)
    assert hidden["labels"].tolist() == [[9, 8, 7, 6]]
    assert (hidden["input_ids"] == MASKING.mask_token_id).any()
    assert hidden["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_wrong_flex_kernels_are_refused(monkeypatch):
    capability = "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with pytest.raises(ValueError, match="wrong numbers on a CPU without AVX-512; choose sdpa"):
        check_flex(CPU)
    check_flex(torch.device("cuda"))
    capability = "AVX512"
    check_flex(CPU)


def varlen_attention(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal,
    softmax_scale=None, window_size=(-1, -1), softcap=None, **_,
):  # fmt: skip
    """Compute what `flash_attn_varlen_func` does, with shapes (tokens, heads, head size)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    pieces = []
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        assert 0 < stop - start <= max_seqlen_q
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(tensor), 0) for tensor in (k, v))
        scores = q @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        is_hidden = (distance < 0) & causal
        if window_size[0] >= 0:
            is_hidden |= distance > window_size[0]
        scores = scores.masked_fill(is_hidden, -torch.inf)
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


def dense_attention(query, key, value, **settings):
    """Compute what `flash_attn_func` does, with shapes (rows, tokens, heads, head size)."""
    num_rows, length = query.shape[:2]
    ends = torch.arange(num_rows + 1) * length
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return varlen_attention(*flat, ends, ends, length, **settings).view(query.shape)


@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() - {"stablelm"}))
def test_flash_attention_gets_the_boundaries(model_type, monkeypatch):
    """transformers' own code for flash attention runs, with its kernels replaced by formulas."""
    has = ("dropout_p", "window_size", "softcap", "max_seqlen_q", "max_seqlen_k")
    lacks = ("deterministic", "s_aux", "learnable_sink", "cache_seqlens", "block_table")
    features = dict.fromkeys(has, True) | dict.fromkeys((*lacks, "page_table"), False)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=features)
    kernels = (dense_attention, varlen_attention, None, None, None)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_, **__: (kernels, (process, None))
    )
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    model = tiny_model(family_config(model_type))
    model.config._attn_implementation = "flash_attention_2"
    check_logits(model)
    check_separates_documents(model.config, "flash_attention_2", 24)


def torch_varlen(query, key, value, starts, ends, longest, _, *, scale, window_size, enable_gqa):
    """Compute what PyTorch's `varlen_attn` does: a window with nothing after it is causal."""
    assert enable_gqa
    settings = {"softmax_scale": scale, "window_size": window_size, "causal": window_size[1] == 0}
    return varlen_attention(query, key, value, starts, ends, longest, **settings)


@pytest.mark.parametrize("has_kernels", [False, True], ids=["one by one", "kernels"])
@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() - {"stablelm"}))
def test_varlen_attention_gets_the_boundaries(model_type, has_kernels, monkeypatch):
    """With a formula in place of the kernels for GPUs."""
    monkeypatch.setattr(varlen, "varlen_attn", torch_varlen)
    monkeypatch.setattr(varlen, "has_kernels", lambda *_: has_kernels)
    model = tiny_model(family_config(model_type))
    model.config._attn_implementation = varlen.VARLEN
    if model_type == "gemma2":
        with pytest.raises(ValueError, match="attention has more to it"):
            check_logits(model)
        return
    check_logits(model)
    check_separates_documents(model.config, varlen.VARLEN, 24)


def test_varlen_attention_without_documents_is_that_of_whole_rows():
    model, batch = tiny_model(family_config("qwen3")), collate([{"input_ids": [7, 8, 9]}] * 2)
    with torch.no_grad():
        expected = logits_of(model, batch)
        model.config._attn_implementation = varlen.VARLEN
        torch.testing.assert_close(logits_of(model, batch), expected)
        padded = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
        with pytest.raises(ValueError, match="takes documents, no mask and no cache"):
            logits_of(model, padded)
        cache = model(batch["input_ids"], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="takes documents, no mask and no cache"):
            model(batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "expected"),
    [
        ("cuda", torch.bfloat16, 256, True),
        ("cuda", torch.float16, 8, True),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.bfloat16, 12, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_kernels_are_used_for_what_they_take(device, dtype, size, expected, monkeypatch):
    states = [
        SimpleNamespace(is_cuda=device == "cuda", device=device, dtype=dtype, shape=(5, 2, size))
    ] * 3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert varlen.has_kernels(*states) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not varlen.has_kernels(*states)


@pytest.mark.parametrize(
    ("model_type", "changes", "packing", "message"),
    [
        ("qwen3", {}, "documents", None),
        ("gemma3_text", {}, "documents", None),
        ("bert", {"attention_probs_dropout_prob": 0.0}, "documents", None),
        ("bert", {}, "documents", "all of the attention of a bert model"),
        ("qwen3", {"attention_dropout": 0.1}, "documents", "of a qwen3 model"),
        ("gemma2", {}, "documents", "of a gemma2 model; choose sdpa"),
        ("stablelm", {}, "documents", "of a stablelm model"),
        ("qwen3", {}, "cross", "it is for --packing documents; choose sdpa, or leave"),
    ],
)
def test_varlen_is_refused_by_name_where_it_cannot_be(model_type, changes, packing, message):
    arguments = (family_config(model_type, **changes), packing)
    if message is None:
        check_varlen(*arguments)
        return
    with pytest.raises(ValueError, match=f"attn_implementation=varlen: .*{message}"):
        check_varlen(*arguments)


@pytest.mark.slow
def test_compiled_layers_call_it_document_by_document():
    model = tiny_model(family_config("qwen3"))
    model.config._attn_implementation = varlen.VARLEN
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    check_logits(model)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="PyTorch's flex attention is wrong at such lengths on a CPU without AVX-512",
)
@pytest.mark.parametrize("model_type", ["qwen3", "bert"])
def test_flex_attention_stops_at_boundaries(model_type):
    settings = {"head_dim": 16} if model_type == "qwen3" else {}
    model = tiny_model(family_config(model_type, **settings))
    model.set_attn_implementation("flex_attention")
    check_logits(model)


@pytest.mark.parametrize("model_type", DECLARED)
def test_architectures_without_a_row_are_tried(model_type):
    config = CONFIG_MAPPING[model_type](num_hidden_layers=NUM_LAYERS, **DECLARED[model_type])
    check_separates_documents(config, None, 24)
    check_logits(tiny_model(config))


RECURRENT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("config", "attention", "message"),
    [
        (
            CONFIG_MAPPING["mamba"](**RECURRENT, vocab_size=64, state_size=4),
            None,
            "packing=documents: a mamba model lets a document of a row affect the next one; "
            "use --packing False, or --packing cross",
        ),
        (
            CONFIG_MAPPING["mpt"](d_model=32, n_layers=4, n_heads=4, vocab_size=64),
            None,
            "a mpt model lets a document of a row affect the next one",
        ),
        (family_config("stablelm"), "flash_attention_2", "does not tell flash_attention_2 where"),
        (
            family_config("llama", max_position_embeddings=16),
            None,
            "beyond 16 tokens; .*, or --max_length 16",
        ),
    ],
    ids=["recurrent", "alibi", "flash", "dynamic rotary"],
)
def test_what_cannot_separate_documents_is_rejected_by_name(config, attention, message):
    with pytest.raises(ValueError, match=message):
        check_separates_documents(config, attention, 24)


def test_every_weight_that_the_check_reads_is_drawn():
    """Also of a model whose other weights have as many rows as its vocabulary."""
    config = CONFIG_MAPPING["mamba"](**RECURRENT, vocab_size=64, state_size=4)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        states = packing._read_both(packing._small_instance(config))
    finally:
        torch.use_deterministic_algorithms(False)
    assert states.isfinite().all()


def test_the_command_line_rejects_it_before_weights_load(tmp_path, capsys):
    config = CONFIG_MAPPING["mamba"](**RECURRENT, vocab_size=64, state_size=4)
    config.save_pretrained(tmp_path / "teacher")
    command = ["--teacher_model_name_or_path", str(tmp_path / "teacher")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--save_directory", str(tmp_path / "student")])
    assert ended.value.code == 2
    assert "a mamba model lets a document" in capsys.readouterr().err.splitlines()[-1]


def test_a_roberta_counts_positions_from_after_its_padding_token():
    model = tiny_model(encoder_config("roberta", 2))
    row = {"input_ids": [9, 8, 7, 6], "document_lengths": [4]}
    packed, alone = (collate([values]) for values in (row, {"input_ids": row["input_ids"]}))
    (ours,) = hidden_states_at(model, [2], packed["input_ids"], None, packed["position_ids"])
    (theirs,) = hidden_states_at(model, [2], alone["input_ids"])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_training_with_varlen_gives_the_losses_of_the_mask(pair_folders, text_file, tmp_path):
    found = []
    for attention in ("sdpa", varlen.VARLEN):
        folder = tmp_path / attention
        main(command(pair_folders[0], folder, text_file, "--attn_implementation", attention))
        found.append([line["loss"] for line in read(folder)[0]])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)

"""Greedy generation by all members of a family.

Prompts are sorted by length and run in batches. A batch's prompts run once through the tree of
layers, those of similar length together, and members keep one copy of the keys and values of the
layers that they share. All members then write together: each layer runs once for the rows of all
members that have it, and rows leave the batch when they stop. Text is the same as `model.generate`
gives for each prompt, because stopping and the processing of logits are prepared by transformers'
own `generate`.

Shapes: B rows, those of one member, R rows of all members, T positions, V vocabulary.
"""

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from evaluate.answers import Answer, Failures
from patching.running.joint import Rows

CPU_TOKENS_PER_BATCH = 2**14
TOKENS_PER_BATCH = 2**16
"""Prompts and new tokens in one batch, including padding, for all members that write together, if
no number of rows is given.
"""
LEAVING = 8
"""Rows leave when one in so many has stopped, because the others' keys and values are copied."""
PADDING = 0.25
"""The largest share of a row that is padding where prompts are read."""


class Settings(NamedTuple):
    """How to answer some requests, read from lm-eval's generation arguments."""

    until: list[str]
    """Texts that end an answer and are not part of it, end-of-text among them."""
    max_new_tokens: int
    others: dict[str, Any]
    """Arguments for `model.generate`."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], end_of_text: str, default_length: int) -> "Settings":
        """Arguments are read as lm-eval's own models read them."""
        kwargs = dict(normalize_gen_kwargs(dict(arguments), default_length))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=end_of_text)
        max_new_tokens = kwargs.pop("max_gen_toks")
        if not kwargs.get("do_sample") and kwargs.get("temperature") == 0:
            del kwargs["temperature"]  # transformers warns of one that has no effect
        return cls(until, max_new_tokens, kwargs | {"do_sample": bool(kwargs.get("do_sample"))})

    def reaches_limit(self, text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether an answer has as many tokens as it may have."""
        return len(tokenizer.encode(text, add_special_tokens=False)) >= self.max_new_tokens

    def is_greedy(self, model: PreTrainedModel) -> bool:
        """Whether this model then takes the most likely token each time."""
        config = GenerationConfig(**model.generation_config.to_dict() | self.others)
        return config.get_generation_mode() == GenerationMode.GREEDY_SEARCH


def key_of(request: Instance) -> tuple[str, str]:
    """A request's context and generation arguments as a key."""
    context, arguments = request.args
    return context, json.dumps(arguments, sort_keys=True, default=str)


def can_share(lm: HFLM, models: Iterable[PreTrainedModel], arguments: Mapping[str, Any]) -> bool:
    """Whether all of these models generate greedily and have caches that they can share."""
    how = Settings.of(arguments, "", lm.max_gen_toks)
    return all(has_plain_cache(model) and how.is_greedy(model) for model in models)


def answers_of_members(
    lm: HFLM,
    tree: Any,
    requests: Sequence[Instance],
    num_rows: int | None = None,
    disable_tqdm: bool = False,
) -> list[dict[str, Answer]]:
    """Every member's answer to each request, by its name.

    `lm` tokenizes. `tree` is a `PrefixTree`, or separate models with its interface. `num_rows` are
    the prompts in one batch, as many as fit if it is None. Raises ValueError if the models cannot
    read a prompt and write that many tokens.
    """
    end_of_text = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    answers: list[dict[str, Answer]] = [{} for _ in requests]
    by_arguments: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        by_arguments.setdefault(key_of(request)[1], []).append(i)
    with tqdm(
        total=len(requests) * len(tree.names), desc="generating", disable=disable_tqdm
    ) as progress:
        for indices in by_arguments.values():
            how = Settings.of(requests[indices[0]].args[1], end_of_text, lm.max_gen_toks)
            room = lm.max_length - how.max_new_tokens
            if room <= 0:
                raise ValueError(
                    f"max_gen_toks={how.max_new_tokens}: the model reads {lm.max_length} tokens at "
                    "once, choose fewer with --gen_kwargs max_gen_toks=N"
                )
            lengths = [min(room, len(lm.tok_encode(requests[i].args[0]))) for i in indices]
            together = max(len(joint.places) for joint in tree.joint_models)
            budget = (
                CPU_TOKENS_PER_BATCH if lm.device.type == "cpu" else TOKENS_PER_BATCH
            ) // together
            waiting = [*batches_of(lengths, how.max_new_tokens, num_rows, budget)][::-1]
            while waiting:
                numbers = waiting.pop()
                batch = [indices[i] for i in numbers]
                contexts = [requests[i].args[0] for i in batch]
                ids_BT, mask_BT = lm.tok_batch_encode(contexts, left_truncate_len=room)
                inputs = ids_BT.to(lm.device), mask_BT.to(lm.device)
                try:
                    found = dict(greedy_answers(tree, lm.tokenizer, *inputs, how))
                except Exception as error:
                    if not should_reduce_batch_size(error) or len(batch) == 1:
                        raise
                    half = len(numbers) // 2
                    waiting += [numbers[half:], numbers[:half]]
                    clear_device_cache(garbage_collection=True)
                    continue
                for name, of_member in found.items():
                    for i, answer in zip(batch, of_member):
                        answers[i][name] = answer
                progress.update(len(batch) * len(found))
    return answers


Generator = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Sequence[Instance]], Sequence[str]]
"""Called with a member, its tokenizer and requests. Returns the member's answers."""


class GeneratingLM(HFLM):
    """The part of a `FamilyLM` that generates. Greedy answers of all members are computed when the
    first of them is asked.
    """

    name: str
    """The member that answers."""
    tree: Any
    ranks: Any
    generator: Generator | None
    """Generates instead of the members themselves."""
    generation_batch_size: int | None
    _answers: dict[tuple[str, str], dict[str, Answer]]
    _given: dict[str, list[Answer]]
    """The active member's answers, by task."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = self._generate(requests)
        for request, answer in zip(requests, answers):
            self._given.setdefault(request.task_name, []).append(answer)
        return [answer.text for answer in answers]

    def take_failures(self) -> dict[str, dict[str, int]]:
        """How many of the active member's answers since the last call failed, by task."""
        found = {task: Failures.of(answers)._asdict() for task, answers in self._given.items()}
        self._given.clear()
        return found

    def _generate(self, requests: list[Instance]) -> list[Answer]:
        if self.generator is not None:
            return self._judged(requests, self.generator(self.model, self.tokenizer, requests))
        members = self.tree.models.values()
        by_arguments = {key_of(request)[1]: request.args[1] for request in requests}
        can = {key: can_share(self, members, it) for key, it in by_arguments.items()}
        shared = [can[key_of(request)[1]] for request in requests]
        missing = {
            key: request
            for request, is_shared in zip(requests, shared)
            if is_shared and (key := key_of(request)) not in self._answers
        }
        if missing:
            answers = self.ranks.share(self, "answer_for_members", list(missing.values()))
            self._answers.update(zip(missing, answers))
        alone = [request for request, is_shared in zip(requests, shared) if not is_shared]
        texts = self.ranks.share(self, "answer_alone", alone) if alone else []
        of_one = iter(self._judged(alone, texts))
        return [
            self._answers[key_of(request)][self.name] if is_shared else next(of_one)
            for request, is_shared in zip(requests, shared)
        ]

    def _judged(self, requests: Sequence[Instance], texts: Sequence[str]) -> list[Answer]:
        """Texts of which nobody says how they ended, with a guess from their length."""
        end_of_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        answers = []
        for request, text in zip(requests, texts):
            how = Settings.of(request.args[1], end_of_text, self.max_gen_toks)
            answers.append(Answer(text, how.reaches_limit(text, self.tokenizer)))
        return answers

    def answer_alone(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The active member's answer to each request."""
        return super().generate_until(requests, disable_tqdm)

    def answer_for_members(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[dict[str, Answer]]:
        """Every member's answer to each request, by its name."""
        return answers_of_members(
            self, self.tree, requests, self.generation_batch_size, disable_tqdm
        )


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model's cache holds nothing but keys and values, so that members can share it."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return model._supports_default_dynamic_cache() and all(
        type(layer) in plain for layer in DynamicCache(config=model.config).layers
    )


def batches_of(
    lengths: Sequence[int], max_new_tokens: int, num_rows: int | None, budget: int
) -> Iterator[list[int]]:
    """Indices of prompts, longest first, in batches of `num_rows`. Without a number, a batch has as
    many rows as `budget` tokens allow.
    """
    waiting = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while waiting:
        rows = num_rows or max(1, budget // (lengths[waiting[0]] + max_new_tokens))
        yield waiting[:rows]
        del waiting[:rows]


class StopStrings(StoppingCriteria):
    """Ends each row whose last tokens contain one of some texts.

    As many tokens are looked at as the text has, and two more, because a model may write it in
    other tokens. lm-eval does the same, but ends a batch only as a whole.
    """

    def __init__(
        self, until: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.by_length: dict[int, list[str]] = {}
        for text in until:
            length = len(tokenizer.encode(text, add_special_tokens=False)) + 2
            self.by_length.setdefault(length, []).append(text)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new_BT = input_ids[:, self.prompt_length :]
        done_B = torch.zeros(len(new_BT), dtype=torch.bool, device=new_BT.device)
        for length, texts in self.by_length.items():
            for row, end in enumerate(self.tokenizer.batch_decode(new_BT[:, -length:])):
                if any(text in end for text in texts):
                    done_B[row] = True
        return done_B


class Writing(NamedTuple):
    """How a model's logits are processed, and when its rows stop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList

    @classmethod
    def by_transformers(
        cls, model: PreTrainedModel, inputs: Mapping[str, Any], how: Settings, stop: StopStrings
    ) -> "Writing":
        """What transformers' own `generate` prepares for this model and these prompts."""
        prepared = []

        def keep(
            _: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            **__: Any,
        ) -> Tensor:
            prepared.append(cls(logits_processor, stopping_criteria))
            return input_ids

        length = inputs["input_ids"].shape[1]
        model.generate(
            **inputs,
            custom_generate=keep,
            stopping_criteria=StoppingCriteriaList([stop]),
            **{"max_length": length + how.max_new_tokens} | how.others,
        )
        return prepared[0]


def decode(
    rows: Rows,
    logits_RV: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor,
    writings: Sequence[Writing],
) -> list[list[list[int]]]:
    """The new tokens of each member's answers to some prompts, padded on the left.

    `logits_RV` are those after the prompts, and `writings` those of each member.
    """
    model, num_prompts, length = rows.joint.model, *ids_BT.shape
    answers: list[list[list[int]]] = [[[] for _ in ids_BT] for _ in writings]
    ids_RT, mask_RT = (of_one.repeat(len(writings), 1) for of_one in (ids_BT, mask_BT))
    prompts_R = torch.arange(num_prompts, device=ids_BT.device).repeat(len(writings))
    done_R = torch.zeros_like(prompts_R, dtype=torch.bool)
    may_leave = not any(writing.processors for writing in writings)  # processors may know the rows
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    while True:
        members = [*zip(writings, ids_RT.split(rows.sizes), logits_RV.split(rows.sizes))]
        tokens_R = torch.cat(
            [
                writing.processors(ids_BT, logits_BV.to(ids_BT.device, torch.float32)).argmax(-1)
                for writing, ids_BT, logits_BV in members
                if len(ids_BT)
            ]
        )
        ids_RT = torch.cat([ids_RT, tokens_R[:, None]], dim=-1)
        stops_R = torch.cat(
            [
                writing.criteria(ids_BT, None)
                for writing, ids_BT in zip(writings, ids_RT.split(rows.sizes))
                if len(ids_BT)
            ]
        )
        for row in (stops_R & ~done_R).nonzero()[:, 0].tolist():
            answers[rows.members_R[row]][prompts_R[row]] = ids_RT[row, length:].tolist()
        done_R = done_R | stops_R
        if done_R.all():
            return answers
        if may_leave and done_R.sum() * LEAVING >= len(done_R):
            rows.keep(~done_R)
            ids_RT, mask_RT, prompts_R = ids_RT[~done_R], mask_RT[~done_R], prompts_R[~done_R]
            done_R = done_R[~done_R]
        mask_RT = torch.nn.functional.pad(mask_RT, (0, 1), value=1)
        positions_R1 = {"position_ids": mask_RT.sum(-1, keepdim=True) - 1}
        logits_RV = rows.step(
            input_ids=ids_RT[:, -1:],
            attention_mask=None if mask_RT.all() else mask_RT,
            **(positions_R1 if takes_positions else {}),
        )


def prompt_inputs(tree: Any, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """The arguments with which a tree's models read prompts that are padded on the left."""
    model = tree.models[tree.names[0]]
    inputs = {"input_ids": ids_BT}
    if not mask_BT.all():
        inputs["attention_mask"] = mask_BT
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    return inputs


def parts_of_similar_length(mask_BT: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a batch, the longest prompts first, where padding would fill more than `PADDING` of a
    row. Yield the rows of each part and the columns that they need.
    """
    lengths, start = mask_BT.sum(-1).tolist(), 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or lengths[row] < (1 - PADDING) * lengths[start]:
            yield slice(start, row), slice(mask_BT.shape[1] - lengths[start], None)
            start = row


@torch.no_grad()
def greedy_answers(
    tree: Any, tokenizer: PreTrainedTokenizerBase, ids_BT: Tensor, mask_BT: Tensor, how: Settings
) -> Iterator[tuple[str, list[Answer]]]:
    """Yield each member's name and its answers to a batch of prompts, padded on the left.

    `tree` is a `PrefixTree`, or separate models with its interface.
    """
    logits: dict[str, list[Tensor]] = defaultdict(list)
    caches: dict[str, list[Cache]] = defaultdict(list)
    for rows, columns in parts_of_similar_length(mask_BT):
        prompts = prompt_inputs(tree, ids_BT[rows, columns], mask_BT[rows, columns])
        for name, logits_BV, cache in tree.prefill(prompts):
            logits[name].append(logits_BV)
            caches[name].append(cache)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    inputs["pad_token_id"] = tokenizer.pad_token_id
    stop = StopStrings(how.until, tokenizer, ids_BT.shape[1])
    for joint in tree.joint_models:
        models = [tree.models[name] for name in joint.places]
        writings = [Writing.by_transformers(model, inputs, how, stop) for model in models]
        logits_RV = torch.cat([part for name in joint.places for part in logits[name]])
        cache = joint.cache({name: caches.pop(name) for name in joint.places}, how.max_new_tokens)
        rows = Rows(joint, len(ids_BT), cache)
        answers = decode(rows, logits_RV, ids_BT, mask_BT, writings)
        for name, model, of_member in zip(joint.places, models, answers):
            yield name, [*judged(of_member, model, tokenizer, how)]


def judged(
    answers: Iterable[Sequence[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    how: Settings,
) -> Iterator[Answer]:
    """The texts of answers, given as tokens, and whether they were cut off."""
    answers, ends = [*answers], end_tokens(model, tokenizer)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    for tokens, whole in zip(answers, texts):
        text = postprocess_generated_text(whole, how.until, None)
        ended = tokens[-1] in ends or text != whole
        yield Answer(text, len(tokens) >= how.max_new_tokens and not ended)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

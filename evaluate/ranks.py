"""The processes of a sweep under torchrun. The first one runs the sweep: it loads tasks, builds
prompts, computes metrics and writes files. The others hold the same weights and answer the requests
that the first one deals to them, so prompts are those of a single process, an error of any rank is
the first one's to handle, and only the first needs the results folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from lm_eval.api.instance import Instance

from patching.files.outputs import num_ranks

if TYPE_CHECKING:
    from evaluate.series import MemberLM

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long ranks wait for each other: the first may search an order for long."""


class Ranks:
    """The ranks, or a single process. Everything they exchange is on the CPU."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count

    @classmethod
    def connect(cls) -> Ranks:
        """All ranks that torchrun started. Raises ValueError if WORLD_SIZE tells of others, but
        torchrun did not start this process: they would be waited for in vain.
        """
        if num_ranks() == 1:
            return cls()
        if not torch.distributed.is_torchelastic_launched():
            raise ValueError(
                f"WORLD_SIZE={num_ranks()} is set, but torchrun did not start this process: unset "
                "WORLD_SIZE for a single process, or start the ranks with torchrun"
            )
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def end(self) -> None:
        """Disconnect. A group that is still open can abort a rank as it exits."""
        if self.count > 1:
            torch.distributed.destroy_process_group()

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.count > 1:
            values = [value]
            torch.distributed.broadcast_object_list(values)
            (value,) = values
        return value

    def together(self, make: Callable[[], T], only_first: bool = False) -> T | None:
        """What `make` returns on this rank, None on the others with `only_first`.

        What a user can mend on any rank ends all of them: the first raises it as a ValueError that
        names the rank, and the others exit.
        """
        made, problem = None, None
        try:
            if self.is_first or not only_first:
                made = make()
        except (ValueError, OSError, ImportError) as error:
            if self.count == 1:
                raise
            problem = str(error)
        if self.count == 1:
            return made
        problems: list[str | None] = [None] * self.count
        torch.distributed.all_gather_object(problems, problem)
        for index, of_rank in enumerate(problems):
            if of_rank is not None:
                self.end()
                if not self.is_first:
                    raise SystemExit(2)
                raise ValueError(f"rank {index}: {of_rank}" if index else of_rank)
        return made

    def share(self, lm: MemberLM, method: str, requests: Sequence[Instance]) -> list[Any]:
        """What `lm.method(requests, disable_tqdm=...)` returns, one answer per request, computed by
        all ranks. Only the first may call this, and the others must be in `answer`.

        Requests with the same context stay together. Raises the error of a rank that fails.
        """
        if self.count == 1:
            return getattr(lm, method)(requests, disable_tqdm=False)
        shares = deal([request.args for request in requests], self.count)
        messages = [
            (lm.name, method, [(requests[i].request_type, requests[i].args) for i in share])
            for share in shares
        ]
        torch.distributed.scatter_object_list([None], messages)
        answers = self._answer(lm, *messages[0])
        found: list[Any] = [None] * len(requests)
        for share, of_rank in zip(shares, answers):
            if isinstance(of_rank, Exception):
                raise of_rank
            for i, answer in zip(share, of_rank):
                found[i] = answer
        return found

    def answer(self, lm: MemberLM) -> None:
        """Answer what the first rank asks of a model, until it calls `release`."""
        while True:
            received: list[Any] = [None]
            torch.distributed.scatter_object_list(received, None)
            if received[0] is None:
                return
            self._answer(lm, *received[0])

    def release(self) -> None:
        """End the other ranks' `answer`."""
        if self.count > 1:
            torch.distributed.scatter_object_list([None], [None] * self.count)

    def _answer(self, lm: MemberLM, name: str, method: str, questions: list) -> list[Any] | None:
        """Answer this rank's share. The first gets every rank's answers, or the error instead."""
        try:
            lm.activate(name)
            requests = [
                Instance(request_type=kind, doc={}, arguments=args, idx=0)
                for kind, args in questions
            ]
            ask = getattr(lm, method)
            found: Any = ask(requests, disable_tqdm=not self.is_first) if requests else []
        except Exception as error:  # models are code, and memory is limited: anything may happen
            found = error
        gathered: list[Any] | None = [None] * self.count if self.is_first else None
        torch.distributed.gather_object(_sendable(found), gathered)
        return gathered


def deal(requests: Sequence[tuple], num_ranks: int) -> list[list[int]]:
    """Indices of requests for each rank. Requests with the same first argument, their context, go
    to one rank, and long contexts are dealt first, so that ranks have about as much to do.
    """
    by_context: dict[str, list[int]] = {}
    for i, (context, *_) in enumerate(requests):
        by_context.setdefault(context, []).append(i)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for number, context in enumerate(sorted(by_context, key=len, reverse=True)):
        shares[number % num_ranks] += by_context[context]
    return shares


def _sendable(found: Any) -> Any:
    """An error without its traceback, as one that every rank can read."""
    if isinstance(found, Exception):
        return RuntimeError(f"{type(found).__name__}: {found}")
    return found

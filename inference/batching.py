"""Many requests at once over one model: step by step, each step one forward pass over the rows of all of them.

Every request has its own settings, generator and blocks of the cache: what else is served decides when its tokens are
made, not which (up to the rounding of products of another shape).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from inference.answers import Answer
from inference.blocks import BlockPool
from inference.errors import InferenceError, RequestError
from inference.limits import MAX_ROWS, MAX_SEQUENCES, Limits
from inference.model import Forward
from inference.requests import Output, Request
from inference.rows import Rows, Span
from inference.sampling import Chosen, choose
from inference.scheduler import Chunk, Scheduler
from inference.stats import EngineCounts, Load
from inference.text import Decode

_log = logging.getLogger(__name__)
_NOT_FINITE = "the model's logits are not finite; its weights are damaged, or its precision is too low for this prompt"


@dataclass(frozen=True)
class Pass:
    """One forward pass, as the engine's ``watch`` sees it before it is made.

    Attributes:
        chunks: which tokens of which sequences, in the order of the rows.
        shares: how many rows each adapter has, one after another; None names the base model.
    """

    chunks: tuple[Chunk, ...]
    shares: tuple[tuple[str | None, int], ...]

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Pass:
        """Chunks of one adapter stand together, in the order in which adapters come up."""
        by_adapter: dict[str | None, list[Chunk]] = {}
        for chunk in chunks:
            by_adapter.setdefault(chunk.sequence.adapter, []).append(chunk)
        rows = ((name, sum(chunk.rows for chunk in its)) for name, its in by_adapter.items())
        return cls(tuple(chain.from_iterable(by_adapter.values())), tuple(rows))


@dataclass(frozen=True)
class Joint:
    """A model whose passes serve several adapters at once, and which ones."""

    model: Forward
    names: frozenset[str | None]


class Engine:
    """Continuous batching over one model and its adapters.

    ``submit``, ``cancel``, ``has_work`` and ``load`` may be called from any thread, ``step`` from one at a time.

    Args:
        models: by the adapter that a request names; None stands for no name. All of them share one paged cache.
        joint: computes steps with several adapters; those that it does not serve have passes of their own.
        decode: ids to text; None: there is no tokenizer, and answers have no text.
        special: ids by name of the tokens that ``decode`` leaves out.
        eos: the tokens that end a text.
        max_rows: tokens of one step, at most.
        max_sequences: requests that are computed at once, at most; others wait.
        reuse: whether prompts that begin alike share what was computed.
        joined: called when a request is taken in.

    Attributes:
        watch: called with each :class:`Pass` before it is made.
        failure: the last exception that ended requests with finish ``error``.
    """

    def __init__(
        self,
        models: Mapping[str | None, Forward],
        *,
        joint: Joint | None = None,
        decode: Decode | None = None,
        special: Mapping[str, int] | None = None,
        eos: frozenset[int] = frozenset(),
        max_rows: int = MAX_ROWS,
        max_sequences: int = MAX_SEQUENCES,
        reuse: bool = True,
        joined: Callable[[], object] | None = None,
    ) -> None:
        if not max_rows >= max_sequences >= 1:
            raise InferenceError(
                f"max_rows={max_rows} must be at least max_sequences={max_sequences}, and that at least 1: each "
                "sequence that generates takes one row of a step"
            )
        model = next(iter(models.values()))
        config, kv = model.config, model.kv
        self._kv = kv
        self.models, self.joint, self.eos = dict(models), joint, eos
        self.pool = BlockPool(kv.num_blocks, kv.block_size, reuse=reuse)
        positions = getattr(config, "max_position_embeddings", None)
        kv_bytes = kv.num_blocks * kv.shape.bytes_per_block(kv.block_size, kv.dtype)
        names = tuple(self.models)
        self.limits = Limits(config.vocab_size, positions, self.pool.tokens, kv_bytes, names, decode is not None)
        self.counts = EngineCounts()
        self.watch: Callable[[Pass], None] | None = None
        self.failure: Exception | None = None
        self._decode, self._special, self._joined = decode, special or {}, joined
        self._scheduler = Scheduler(self.pool, max_rows=max_rows, max_sequences=max_sequences)
        self._answers: dict[str, Answer] = {}
        self._closed = False
        self._lock = threading.Lock()  # of the three below
        self._arrived: deque[Request] = deque()
        self._cancelled: set[str] = set()
        self._ids: set[str] = set()

    def submit(self, request: Request) -> None:
        """Takes a request; its outputs come from ``step``. Raises RequestError if it can never be served."""
        self._refuse_closed()
        self.limits.check(request)
        with self._lock:
            if request.id in self._ids:
                raise RequestError("id", f"a request {request.id!r} is being served already; give another id")
            self._ids.add(request.id)
            self._arrived.append(request)

    def close(self) -> None:
        """What the models read from is gone: nothing is served any more."""
        self._closed = True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InferenceError("the model was closed; open it again")

    def cancel(self, request_id: str) -> None:
        """Ends a request in the next step, which gives its last output. Nothing happens if it has ended."""
        with self._lock:
            if request_id in self._ids:
                self._cancelled.add(request_id)

    def has_work(self) -> bool:
        with self._lock:
            return bool(self._ids)

    def load(self) -> Load:
        with self._lock:
            running = len(self._scheduler.running)
            blocks = self.pool.num_blocks
            return Load(max(len(self._ids) - running, 0), running, blocks, blocks - self.pool.free)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One step: what it adds to the answers. A request whose computation fails ends with finish ``error``, if it
        fails by itself, too.
        """
        self._refuse_closed()
        started = time.perf_counter()
        outputs = self._take_in()
        for chunks in self._passes(self._scheduler.schedule()):
            outputs += self._pass(chunks)
        self._forget(output.id for output in outputs if output.finish is not None)
        self.counts.steps += 1
        self.counts.seconds += time.perf_counter() - started
        return outputs

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """Scores [S, V] of every position of one sequence, in one pass. Not to be called during a step."""
        self._refuse_closed()
        self.limits.check_adapter(adapter)
        if len(token_ids) < 1:
            raise RequestError("token_ids", "no tokens; give at least one")
        self.limits.check_tokens("token_ids", token_ids)
        self.limits.check_length(len(token_ids), 0)
        table = self.pool.begin(adapter, token_ids, share=False)
        if table is None:
            raise InferenceError(
                f"{len(token_ids)} tokens need {self.pool.blocks_for(len(token_ids))} blocks of the key-value cache, "
                f"and requests that are being served leave {self.pool.free}; ask when they have ended"
            )
        try:
            span = Span(tuple(table.blocks), 0, len(token_ids))
            return self.models[adapter].forward(Rows.of([(token_ids, span)], every=True))
        finally:
            self.pool.end(table)

    def _take_in(self) -> list[Output]:
        """New requests to the scheduler; the last outputs of those that are not wanted any more."""
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, set()
        for request in arrived:
            answer = self._answers[request.id] = Answer(request, self._decode, self._special)
            self._scheduler.add(answer.sequence)
            if self._joined is not None:
                self._joined()
        return [self._remove(name).output(finish="cancelled") for name in sorted(cancelled)]

    def _passes(self, chunks: Iterable[Chunk]) -> list[list[Chunk]]:
        """The chunks of each pass: of all adapters that can share one, and of each other."""
        together: dict[tuple[str | None, bool], list[Chunk]] = {}
        for chunk in chunks:
            name = chunk.sequence.adapter
            shared = self.joint is not None and name in self.joint.names
            together.setdefault((None if shared else name, shared), []).append(chunk)
        return list(together.values())

    def _pass(self, chunks: Sequence[Chunk]) -> list[Output]:
        """Computes chunks together. If that fails, each by itself: what is wrong with one must not end others."""
        made = Pass.of(chunks)
        try:
            chosen = self._choose(made)
        except Exception as error:
            if len(chunks) == 1:
                return self._fail(chunks, error)
            _log.warning("a pass of %d requests failed, each is computed by itself: %s", len(chunks), error)
            return [output for chunk in made.chunks for output in self._pass([chunk])]
        return self._advance(made.chunks, chosen)

    def _choose(self, made: Pass) -> dict[str, Chosen | None]:
        """One forward pass; the next token of each sequence that has all of its tokens computed, by id."""
        if self.watch is not None:
            self.watch(made)
        tokens: list[int] = []
        positions: list[int] = []
        spans, wanted = [], []
        for chunk in made.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.rows
            assert sequence.table is not None
            tokens += sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            spans.append(Span(tuple(sequence.table.blocks), chunk.start, chunk.rows))
            if chunk.last:
                wanted.append(len(tokens) - 1)
        rows = Rows(torch.tensor(tokens), torch.tensor(positions), tuple(spans), tuple(wanted), made.shares)
        if len(made.shares) == 1:
            model = self.models[made.shares[0][0]]
        else:
            assert self.joint is not None
            model = self.joint.model
        logits_LV = model.forward(rows)
        self.counts.passes += 1
        self.counts.rows += len(tokens)
        last = [chunk.sequence.id for chunk in made.chunks if chunk.last]
        if not last:
            return {}
        choosers = [self._answers[name].chooser for name in last]
        return dict(zip(last, choose(logits_LV, choosers), strict=True))

    def _advance(self, chunks: Sequence[Chunk], chosen: Mapping[str, Chosen | None]) -> list[Output]:
        """Notes what was computed, and what it adds to the answers."""
        outputs, damaged = [], []
        for chunk in chunks:
            sequence = chunk.sequence
            if not chunk.last:
                self._scheduler.computed(chunk)
            elif (new := chosen[sequence.id]) is None:
                damaged.append(chunk)
            else:
                self._scheduler.computed(chunk)
                if len(sequence.tokens) == sequence.prompt:
                    self.counts.reused += sequence.reused
                self.counts.new_tokens += 1
                try:
                    outputs.append(self._answers[sequence.id].add(new, self.eos))
                except Exception as error:  # of the tokenizer, which may not know all tokens of its model
                    outputs += self._fail([chunk], error)
                else:
                    if outputs[-1].finish is not None:
                        self._remove(sequence.id)
        return outputs + self._fail(damaged, InferenceError(_NOT_FINITE)) if damaged else outputs

    def _remove(self, name: str) -> Answer:
        answer = self._answers.pop(name)
        self._scheduler.remove(answer.sequence)
        return answer

    def _fail(self, chunks: Sequence[Chunk], error: Exception) -> list[Output]:
        """Ends sequences that could not be computed."""
        told = isinstance(error, InferenceError)  # such a sentence says all there is
        _log.error("%d requests end: %s", len(chunks), error, exc_info=None if told else error)
        self.failure = error
        reason = f"{type(error).__name__}: {error}"
        outputs = []
        for chunk in chunks:
            answer = self._answers.pop(chunk.sequence.id)
            freed = self._scheduler.remove(answer.sequence, forget=True)
            # Places that are masked out are multiplied by 0 all the same, so what is not finite must not stay.
            self._kv.pool_LNSCD[:, freed] = 0
            outputs.append(answer.output(finish="error", error=reason))
        return outputs

    def _forget(self, ended: Iterable[str]) -> None:
        with self._lock:
            for name in ended:
                self._ids.discard(name)
                self._cancelled.discard(name)

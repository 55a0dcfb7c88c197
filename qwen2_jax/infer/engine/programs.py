# SPDX-License-Identifier: Apache-2.0
"""Generation over token ids: a prefill in chunks, then a loop on the device that makes several tokens per call.

Text, stop strings and chat are layers above (lm.py). What is fixed here is the set of compiled programs: batches are
padded to a few numbers of rows, caches to a few lengths, prompts are cut into a few sizes of chunk, and everything that
differs between requests (settings, seeds, limits, rotary frequencies) is a run-time array.

The last prompt token is not prefilled. It is the first token that the decode loop feeds, so the loop is the only place
that computes logits, draws tokens and decides when a row is done, and a prefill is nothing but cache writes.

Rows of padding have position -1, are done from the start, and are never looked at.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.engine.buckets import Buckets, context_limit
from qwen2_jax.infer.engine.sampling import Sampling, sample
from qwen2_jax.infer.engine.sampling_params import Settings
from qwen2_jax.infer.engine.shardings import Places, Programs
from qwen2_jax.model import cross_entropy, rope
from qwen2_jax.model.decoder import check_head
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.weights.params import Tree

# B rows  C tokens of a prefill chunk  S cache slots  E end-of-sequence ids  K tokens per call  V vocabulary
STEPS = 16  # K: at most so many tokens per call of the decode loop
EOS_WIDTH = 8
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (at least one token id) and what is asked for. Generation here ignores settings.stop."""

    tokens: tuple[int, ...]
    settings: Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch between two calls of the decode loop. Donated to each call.

    token_B: the next token to feed. position_B: its position. count_B: tokens drawn so far. done_B: bool.
    seen_BV: bool, ids in prompt and answer, for the repetition penalty; None where no row can have one.
    """

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orders:
    """What the rows asked for. sampling: None where all are greedy. eos_BE: ids that end a row, padded with -1.
    limit_B: tokens to draw at most."""

    rope: rope.Rope
    sampling: Sampling | None
    eos_BE: jax.Array
    limit_B: jax.Array


class Generator:
    """Runs one model on batches of token ids. Knows no text.

    graphdef, params: from model.declare or model.split, `unroll` as they were made. vocab_size: ids from here on are
    never drawn (the embedding may be padded). dtype: of the cache. mesh: where the parameters are sharded, or None.
    buckets: the shapes to compile for. implementation: of the kernels, see ops.
    `programs` lists what has been compiled; its length is the metric to watch: in steady state it does not grow.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Tree,
        config: ModelConfig,
        *,
        vocab_size: int | None = None,
        dtype=jnp.bfloat16,
        unroll: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        buckets: Buckets | None = None,
        implementation: str | None = None,
    ):
        self.graphdef, self.params, self.config = graphdef, params, config
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.dtype, self.unroll, self.implementation = dtype, unroll, implementation
        self.places = Places.of(params, mesh)
        self.buckets = buckets or Buckets.of(config)
        self.programs: list[str] = []
        self._by_cache: dict[tuple[int, int], Programs] = {}
        self._forward = jax.jit(self.places.on(self._all_logits))

    @property
    def compiles(self) -> int:
        """Programs compiled (or read from jax's compilation cache) so far."""
        return len(self.programs)

    def start(
        self, requests: Sequence[Request], long_context: rope.LongContext = "auto", progress: Progress | None = None
    ) -> "Decoding":
        """Prefills the prompts and returns the batch, ready to be advanced.

        progress is called with (prompt tokens done, prompt tokens in all) after each chunk.
        Raises UserError for ids outside the vocabulary, a prompt beyond the limit, or a cache that does not fit.
        """
        limit = context_limit(self.config, long_context)
        requests = [self._clipped(request, limit, long_context) for request in requests]
        totals = [len(r.tokens) + r.settings.max_new_tokens for r in requests]
        rows, length = self.buckets.batch(len(requests)), self.buckets.length(max(totals))
        prompts = [r.tokens for r in requests]
        cache = self._prefilled([p[:-1] for p in prompts], rows, length, totals, long_context, progress)
        asked = [*(r.settings for r in requests), *[Settings()] * (rows - len(requests))]
        turns = self._rope(totals, rows, length, long_context)
        orders = self._orders(asked, turns, Sampling.of(asked))
        return Decoding(self, requests, self._state(cache, prompts, rows, orders.sampling is None), orders)

    def check(self, request: Request, long_context: rope.LongContext = "auto", what: str = "the prompt") -> None:
        """Raises UserError, which calls the prompt `what`, for a request that `start` would refuse."""
        self._clipped(request, context_limit(self.config, long_context), long_context, what)

    def run(self, requests: Sequence[Request], long_context: rope.LongContext = "auto") -> list[tuple[list, list, str]]:
        """Runs one batch to its end: (tokens, logprobs, "stop" or "length") per request."""
        decoding = self.start(requests, long_context)
        answers: list[tuple[list, list]] = [([], []) for _ in requests]
        while not decoding.finished.all():
            for (tokens, logprobs), new in zip(answers, decoding.advance(), strict=True):
                tokens.extend(token for token, _ in new)
                logprobs.extend(value for _, value in new)
        return [(*a, reason(r.settings, a[0])) for a, r in zip(answers, requests, strict=True)]

    def logprobs(self, sequences: Sequence[Sequence[int]], long_context: rope.LongContext = "auto") -> list[np.ndarray]:
        """log p(token t+1 | tokens up to t) of each sequence, float32 [len - 1], prefilled in chunks."""
        check_head(self.config, scores=False)
        return self._values(sequences, [s[:-1] for s in sequences], [s[1:] for s in sequences], long_context)

    def scores(self, sequences: Sequence[Sequence[int]], long_context: rope.LongContext = "auto") -> np.ndarray:
        """A reward model's score of each sequence, float32 [n]: that of its last token."""
        check_head(self.config, scores=True)
        return np.array([values[-1] for values in self._values(sequences, sequences, None, long_context)], np.float32)

    def _values(
        self, sequences: Sequence[Sequence[int]], read: Sequence[Sequence[int]], targets, long_context: rope.LongContext
    ) -> list[np.ndarray]:
        """What _score_chunk says of each token of `read`, the sequences or parts of them, in chunks."""
        limit = context_limit(self.config, long_context)
        for tokens in sequences:
            self._check(tokens, limit, long_context)
        lengths = [len(tokens) for tokens in sequences]
        rows, length = self.buckets.batch(len(sequences)), self.buckets.length(max(lengths))
        cache = self._empty(rows, length)
        turns = self._rope(lengths, rows, length, long_context)
        found: list[list[np.ndarray]] = [[] for _ in sequences]
        for tokens_BC, positions_BC, targets_BC in self.buckets.side_by_side(read, rows, targets):
            cache, array_BC = self.for_cache(rows, length).score(
                self.params, cache, tokens_BC, positions_BC, targets_BC, _rows(lengths, rows), turns
            )
            values_BC = np.asarray(array_BC)
            for row, parts in enumerate(found):
                parts.append(values_BC[row][positions_BC[row] >= 0])
        return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in found]

    def logits(self, tokens_BT: np.ndarray, long_context: rope.LongContext = "auto") -> np.ndarray:
        """Logits at every position, float32 [B, T, V], from one forward pass without a cache."""
        check_head(self.config, scores=False)
        B, T = tokens_BT.shape
        limit = context_limit(self.config, long_context)
        for tokens in tokens_BT.tolist():
            self._check(tokens, limit, long_context)
        rows, width = 2 ** math.ceil(math.log2(B)), 16 * 2 ** max(0, math.ceil(math.log2(T / 16)))
        padded = np.zeros((rows, width), np.int32)
        padded[:B, :T] = tokens_BT
        positions = np.full((rows, width), -1, np.int32)
        positions[:B, :T] = np.arange(T)
        turns = self._rope([T] * B, rows, width, long_context)
        return np.asarray(self._forward(self.params, padded, positions, _rows([T] * B, rows), turns))[:B, :T]

    def describe(self) -> str:
        """The buckets, and what has been compiled so far."""
        return "\n".join([str(self.buckets), f"{self.compiles} programs compiled", *self.programs])

    # Programs. Their Python bodies run once per compilation, which is how compilations are counted.

    def for_cache(self, rows: int, length: int) -> Programs:
        """The programs for caches of this shape.

        Everything a program returns is fed to the next call. Were it born elsewhere than it is returned, the second
        call would compile again; and where it lives depends on the shape, whose dimensions may divide or not.
        """
        if (rows, length) not in self._by_cache:
            cache, small = self.places.cache(self.config, rows, length), self.places.everywhere
            state: Any = State(*cast(Any, [cache, *[small] * 5]))
            on, jit = self.places.on, functools.partial(jax.jit, donate_argnums=1)
            self._by_cache[rows, length] = Programs(
                prefill=jit(on(self._prefill_chunk), out_shardings=cache),
                score=jit(on(self._score_chunk), out_shardings=(cache, small)),
                decode=jit(on(self._decode_steps), out_shardings=(state, small, small)),
            )
        return self._by_cache[rows, length]

    def _compiling(self, name: str, **sizes: int) -> None:
        self.programs.append(" ".join([name, *(f"{k}={v}" for k, v in sizes.items())]))

    def _decode_steps(self, params: Tree, state: State, orders: Orders, cancel_B, steps):
        """Up to `steps` tokens (at most K) for the rows that are not done. Returns (state, tokens, logprobs) [K, B]."""
        B = state.token_B.shape[0]
        self._compiling("greedy" if orders.sampling is None else "sample", rows=B, cache=state.cache.length)
        model = nnx.merge(self.graphdef, params)
        state = dataclasses.replace(state, done_B=state.done_B | cancel_B)

        def going(carry):
            step, state, _, _ = carry
            return (step < steps) & ~jnp.all(state.done_B)

        def one(carry):
            step, state, tokens_KB, logprobs_KB = carry
            live_B = ~state.done_B
            positions_B1 = jnp.where(live_B, state.position_B, -1)[:, None]
            out = model(
                state.token_B[:, None],
                rope=orders.rope,
                positions_BT=positions_B1,
                cache=state.cache,
                implementation=self.implementation,
            )
            logits_BV = model.logits(out.hidden_BTD[:, 0])
            token_B, logprob_B = sample(
                logits_BV, state.seen_BV, state.count_B, orders.sampling, vocab_size=self.vocab_size
            )
            ended_B = jnp.any(token_B[:, None] == orders.eos_BE, axis=1) | (state.count_B + 1 >= orders.limit_B)
            state = State(
                cache=out.cache,
                token_B=jnp.where(live_B, token_B, state.token_B),
                position_B=state.position_B + live_B,
                count_B=state.count_B + live_B,
                done_B=state.done_B | ended_B,
                seen_BV=None if state.seen_BV is None else state.seen_BV.at[jnp.arange(B), token_B].max(live_B),
            )
            tokens_KB = tokens_KB.at[step].set(jnp.where(live_B, token_B, -1))
            return step + 1, state, tokens_KB, logprobs_KB.at[step].set(logprob_B)

        empty = (jnp.full((STEPS, B), -1, jnp.int32), jnp.zeros((STEPS, B), jnp.float32))
        _, state, tokens_KB, logprobs_KB = jax.lax.while_loop(going, one, (jnp.int32(0), state, *empty))
        return state, tokens_KB, logprobs_KB

    def _prefill_chunk(self, params: Tree, cache: Cache, tokens_BC, positions_BC, context_B, turns: rope.Rope) -> Cache:
        self._compiling("prefill", rows=tokens_BC.shape[0], chunk=tokens_BC.shape[1], cache=cache.length)
        model = nnx.merge(self.graphdef, params)
        about = {"context_B": context_B, "implementation": self.implementation}
        return model(tokens_BC, rope=turns, positions_BT=positions_BC, cache=cache, **about).cache

    def _score_chunk(
        self, params: Tree, cache: Cache, tokens_BC, positions_BC, targets_BC, context_B, turns: rope.Rope
    ):
        """(cache, [B, C]): log-probabilities of the targets, or a reward model's scores at every token."""
        self._compiling("score", rows=tokens_BC.shape[0], chunk=tokens_BC.shape[1], cache=cache.length)
        model = nnx.merge(self.graphdef, params)
        about = {"context_B": context_B, "implementation": self.implementation}
        out = model(tokens_BC, rope=turns, positions_BT=positions_BC, cache=cache, **about)
        if self.config.scores:
            return out.cache, model.score(out.hidden_BTD)
        return out.cache, cross_entropy.token_logprobs(out.hidden_BTD, model.head_weight(), targets_BC)

    def _all_logits(self, params: Tree, tokens_BT, positions_BT, context_B, turns: rope.Rope):
        self._compiling("logits", rows=tokens_BT.shape[0], tokens=tokens_BT.shape[1])
        model = nnx.merge(self.graphdef, params)
        about = {"context_B": context_B, "implementation": self.implementation}
        return model.logits(model(tokens_BT, rope=turns, positions_BT=positions_BT, **about).hidden_BTD)

    # From requests to arrays.

    def _check(
        self, tokens: Sequence[int], limit: int, long_context: rope.LongContext, what: str = "the input"
    ) -> None:
        if not len(tokens):
            raise UserError(f"{what} is empty; give at least one token")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"{what} has token id {wrong}; this model's ids are 0 to {self.config.vocab_size - 1}")
        if len(tokens) > limit:
            longest = context_limit(self.config, "auto") - context_limit(self.config, long_context) + limit
            hint = f" ({longest} with long_context='auto')" if long_context == "off" and longest > limit else ""
            raise UserError(f"{what} has {len(tokens)} tokens; this model takes at most {limit}{hint}: shorten it")

    def _clipped(
        self, request: Request, limit: int, long_context: rope.LongContext, what: str = "the prompt"
    ) -> Request:
        """The request, checked, with no more new tokens than the limit leaves room for (at least one)."""
        check_head(self.config, scores=False)
        self._check(request.tokens, limit - 1, long_context, what)
        settings = request.settings
        if len(settings.eos_ids) > EOS_WIDTH:
            raise UserError(f"{len(settings.eos_ids)} end-of-sequence ids; at most {EOS_WIDTH} are supported")
        room = limit - len(request.tokens)
        if settings.max_new_tokens > room:
            settings = dataclasses.replace(settings, max_new_tokens=room)
        return Request(tuple(request.tokens), settings)

    def _rope(self, totals: Sequence[int], rows: int, length: int, long_context: rope.LongContext) -> rope.Rope:
        turns = rope.choose(self.config, [*totals, *[1] * (rows - len(totals))], long_context)
        chunk = self.config.dual_chunk_attention_config or rope.dual_chunk_defaults(self.config.trained_length)
        if length <= chunk.chunk_size:  # no row can leave its first chunk: two of three query rotations need not exist
            turns = dataclasses.replace(turns, chunk_len_B=None)
        return turns

    def _empty(self, rows: int, length: int) -> Cache:
        memory.check_cache(self.config, rows, length, self.dtype)
        place = self.places.cache(self.config, rows, length)
        return Cache.zeros(self.config, rows, length, self.dtype, unroll=self.unroll, place=place)

    def _prefilled(
        self, prompts: Sequence[Sequence[int]], rows: int, length: int, totals, long_context, progress: Progress | None
    ) -> Cache:
        cache = self._empty(rows, length)
        turns = self._rope(totals, rows, length, long_context)
        context_B = _rows([len(p) + 1 for p in prompts], rows)
        done, total = 0, sum(map(len, prompts))
        for tokens_BC, positions_BC, _ in self.buckets.side_by_side(prompts, rows):
            cache = self.for_cache(rows, length).prefill(self.params, cache, tokens_BC, positions_BC, context_B, turns)
            if progress is not None:
                jax.block_until_ready(cache)
                done += int((positions_BC >= 0).sum())
                progress(done, total)
        return cache

    def _state(self, cache: Cache, prompts: Sequence[Sequence[int]], rows: int, greedy: bool) -> State:
        seen_BV = None if greedy else np.zeros((rows, self.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            if seen_BV is not None:
                seen_BV[row, list(prompt)] = True
        token_B, position_B = _rows([p[-1] for p in prompts], rows), _rows([len(p) - 1 for p in prompts], rows)
        done_B = np.arange(rows) >= len(prompts)
        return State(
            cache, *jax.device_put((token_B, position_B, _rows([0], rows), done_B, seen_BV), self.places.everywhere)
        )

    def _orders(self, asked: Sequence[Settings], turns: rope.Rope, sampling: Sampling | None) -> Orders:
        eos_BE = np.full((len(asked), EOS_WIDTH), -1, np.int32)
        for row, settings in enumerate(asked):
            if not settings.ignore_eos:
                eos_BE[row, : len(settings.eos_ids)] = settings.eos_ids
        limit_B = np.asarray([s.max_new_tokens for s in asked], np.int32)
        return Orders(*jax.device_put((turns, sampling, eos_BE, limit_B), self.places.everywhere))


class Decoding:
    """A prefilled batch. `finished`: bool [requests]. `requests`: as checked, their limits cut to the context's."""

    def __init__(self, generator: Generator, requests: Sequence[Request], state: State, orders: Orders):
        self._generator, self.requests, self._state, self._orders = generator, requests, state, orders
        self.finished = np.zeros(len(requests), bool)

    def advance(self, steps: int = STEPS, cancel: Sequence[int] = ()) -> list[list[tuple[int, float]]]:
        """Makes up to `steps` more tokens for every unfinished row; `cancel` ends those rows first.

        Returns the new (token, logprob) pairs of each request. Clips `steps` to STEPS.
        """
        generator, count = self._generator, len(self.requests)
        cancel_B = np.zeros(self._state.token_B.shape, bool)
        cancel_B[list(cancel)] = True
        programs = generator.for_cache(len(cancel_B), self._state.cache.length)
        self._state, *out = programs.decode(
            generator.params, self._state, self._orders, cancel_B, np.int32(min(steps, STEPS))
        )
        tokens_KB, logprobs_KB = jax.device_get(out)
        self.finished = np.array(self._state.done_B)[:count]  # a copy: the next call reuses the array's memory
        live_BK = tokens_KB.T >= 0
        pairs = zip(tokens_KB.T, logprobs_KB.T, live_BK, strict=True)
        return [list(zip(t[ok].tolist(), p[ok].tolist(), strict=True)) for t, p, ok in pairs][:count]


def reason(settings: Settings, tokens: Sequence[int]) -> str:
    """Why a finished row ended: "stop" at an end-of-sequence id, else "length"."""
    ended = bool(tokens) and not settings.ignore_eos and tokens[-1] in settings.eos_ids
    return "stop" if ended else "length"


def _rows(values: Sequence[int], rows: int) -> np.ndarray:
    """int32 [rows], zeros for padding."""
    return np.asarray([*values, *[0] * (rows - len(values))], np.int32)

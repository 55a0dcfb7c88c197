# SPDX-License-Identifier: Apache-2.0
"""Generation over token ids: a prefill in chunks, then a loop on the device that makes several tokens per call.

Text, stop strings and chat are layers above (lm.py). The set of compiled programs is fixed: batches are padded to a few
numbers of rows, caches to a few lengths, prompts are cut into a few sizes of chunk, and everything that differs between
requests (sampling parameters, seeds, limits, rotary frequencies) is a run-time array. Only a few kinds of batch have a
decode loop of their own: all rows greedy, some sampled, some with a repetition penalty, and these with constraints of a
generation_config.json (constraints.py).

The last prompt token is not prefilled. It is the first token that the decode loop feeds, so the loop is the only place
that computes logits, samples tokens and decides when a row is done, and a prefill only writes the cache.

Rows of padding have position -1, are done from the start, and their tokens are never read.
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
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.engine.buckets import Buckets, context_limit
from qwen2_jax.infer.engine.decode_batch import STEPS, DecodeBatch, DecodeState
from qwen2_jax.infer.engine.requests import CheckedRequest, Request, check_request, check_tokens
from qwen2_jax.infer.engine.sampling import RowParams, sample
from qwen2_jax.infer.engine.sampling_params import SamplingParams, finish_reason
from qwen2_jax.infer.engine.shardings import Programs, Shardings
from qwen2_jax.model import cross_entropy, rope
from qwen2_jax.model.decoder import check_head
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.weights.params import Tree

# B rows  T tokens of a prefill chunk  S cache slots  V vocabulary
PADDING = SamplingParams()  # of rows without a request
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


class Generator:
    """Runs one model on batches of token ids. Knows no text.

    graphdef, params: from model.declare or model.split, `unroll` as they were made. vocab_size: ids from here on are
    never sampled (the embedding may be padded). dtype: of the cache. mesh: where the parameters are sharded, or None.
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
        self.shardings = Shardings.of(params, mesh)
        self.buckets = buckets or Buckets.of(config)
        self.programs: list[str] = []
        self._by_cache: dict[tuple[int, int], Programs] = {}
        self._forward = jax.jit(self.shardings.traced(self._all_logits))

    @property
    def compiles(self) -> int:
        """Programs compiled (or read from jax's compilation cache) so far."""
        return len(self.programs)

    def check(
        self, request: Request, long_context: rope.LongContext = "auto", what: str = "the prompt"
    ) -> CheckedRequest:
        """The request, with no more new tokens than the context limit and its own max_length leave room for.

        Raises UserError, which calls the prompt `what`, for an empty prompt, ids outside the vocabulary, or a prompt
        that leaves no room for a token.
        """
        return check_request(self.config, request, long_context, what)

    def start(
        self,
        requests: Sequence[CheckedRequest],
        long_context: rope.LongContext = "auto",
        progress: Progress | None = None,
    ) -> DecodeBatch:
        """Prefills the prompts and returns the batch, ready to be advanced.

        requests: from `check`, with the same long_context. progress is called with (prompt tokens done, prompt tokens
        in all) after each chunk. Raises UserError for a cache that does not fit.
        """
        totals = [len(r.tokens) + r.sampling_params.max_new_tokens for r in requests]
        rows, length = self.buckets.batch(len(requests)), self.buckets.length(max(totals))
        prompts = [r.tokens for r in requests]
        row_params = RowParams.stacked(
            [*(r.sampling_params for r in requests), *[PADDING] * (rows - len(requests))],
            vocabulary=self.config.vocab_size,
        )
        rotary = self.rotary_tables(totals, rows, length, long_context)
        rotary, row_params = jax.device_put((rotary, row_params), self.shardings.replicated)
        decode = self.for_cache(rows, length).decode
        cache = self.prefill([p[:-1] for p in prompts], rows, length, totals, long_context, progress)
        state = self._state(cache, prompts, rows, row_params)
        return DecodeBatch(
            lambda state, *call: decode(self.params, state, row_params, rotary, *call), len(requests), state
        )

    def run(self, requests: Sequence[Request], long_context: rope.LongContext = "auto") -> list[tuple[list, list, str]]:
        """Checks one batch and runs it to its end: (tokens, logprobs, finish_reason) per request.

        Raises UserError for what `check` refuses, and for a cache that does not fit.
        """
        checked = [self.check(request, long_context) for request in requests]
        batch = self.start(checked, long_context)
        answers: list[tuple[list, list]] = [([], []) for _ in requests]
        while not batch.finished.all():
            for (tokens, logprobs), new in zip(answers, batch.advance(), strict=True):
                tokens.extend(token for token, _ in new)
                logprobs.extend(value for _, value in new)
        return [(*a, finish_reason(r.sampling_params, a[0])) for a, r in zip(answers, checked, strict=True)]

    def logprobs(self, sequences: Sequence[Sequence[int]], long_context: rope.LongContext = "auto") -> list[np.ndarray]:
        """log p(token t+1 | tokens up to t) of each sequence, float32 [len - 1], prefilled in chunks."""
        check_head(self.config, scores=False)
        return self._values(sequences, [s[:-1] for s in sequences], [s[1:] for s in sequences], long_context)

    def scores(self, sequences: Sequence[Sequence[int]], long_context: rope.LongContext = "auto") -> np.ndarray:
        """A reward model's score of each sequence, float32 [n]: that of its last token."""
        check_head(self.config, scores=True)
        return np.array([values[-1] for values in self._values(sequences, sequences, None, long_context)], np.float32)

    def _values(
        self, sequences: Sequence[Sequence[int]], fed: Sequence[Sequence[int]], targets, long_context: rope.LongContext
    ) -> list[np.ndarray]:
        """The numbers that _score_chunk gives each token of `fed`, the sequences or parts of them, in chunks."""
        limit = context_limit(self.config, long_context)
        for tokens in sequences:
            check_tokens(self.config, tokens, limit, long_context)
        lengths = [len(tokens) for tokens in sequences]
        rows, length = self.buckets.batch(len(sequences)), self.buckets.length(max(lengths))
        cache = self.new_cache(rows, length)
        rotary = self.rotary_tables(lengths, rows, length, long_context)
        found: list[list[np.ndarray]] = [[] for _ in sequences]
        for tokens_BT, positions_BT, targets_BT in self.buckets.side_by_side(fed, rows, targets):
            cache, array_BT = self.for_cache(rows, length).score(
                self.params, cache, tokens_BT, positions_BT, targets_BT, _padded(lengths, rows), rotary
            )
            values_BT = np.asarray(array_BT)
            for row, parts in enumerate(found):
                parts.append(values_BT[row][positions_BT[row] >= 0])
        return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in found]

    def logits(self, tokens_BT: np.ndarray, long_context: rope.LongContext = "auto") -> np.ndarray:
        """Logits at every position, float32 [B, T, V], from one forward pass without a cache."""
        check_head(self.config, scores=False)
        B, T = tokens_BT.shape
        limit = context_limit(self.config, long_context)
        for tokens in tokens_BT.tolist():
            check_tokens(self.config, tokens, limit, long_context)
        rows, width = 2 ** math.ceil(math.log2(B)), 16 * 2 ** max(0, math.ceil(math.log2(T / 16)))
        padded = np.zeros((rows, width), np.int32)
        padded[:B, :T] = tokens_BT
        positions = np.full((rows, width), -1, np.int32)
        positions[:B, :T] = np.arange(T)
        rotary = self.rotary_tables([T] * B, rows, width, long_context)
        return np.asarray(self._forward(self.params, padded, positions, _padded([T] * B, rows), rotary))[:B, :T]

    def describe(self) -> str:
        """The buckets, and what has been compiled so far."""
        return "\n".join([str(self.buckets), f"{self.compiles} programs compiled", *self.programs])

    # Programs. Their Python bodies run once per compilation, which is how compilations are counted.

    def for_cache(self, rows: int, length: int) -> Programs:
        """The programs for caches of this shape.

        A program's result is an argument of the next call. Its sharding must be that of the first call's arguments, or
        the second call would compile again; and it depends on the shape, whose dimensions may divide or not.
        """
        if (rows, length) not in self._by_cache:
            cache, small = self.shardings.cache(self.config, rows, length), self.shardings.replicated
            state: Any = DecodeState(*cast(Any, [cache, *[small] * 6]))
            traced, jit = self.shardings.traced, functools.partial(jax.jit, donate_argnums=1)
            self._by_cache[rows, length] = Programs(
                prefill=jit(traced(self._prefill_chunk), out_shardings=cache),
                score=jit(traced(self._score_chunk), out_shardings=(cache, small)),
                decode=jit(traced(self._decode_steps), out_shardings=(state, small, small)),
            )
        return self._by_cache[rows, length]

    def cache_shapes(self, rows: int, length: int) -> Cache:
        """The shapes and shardings of `new_cache`."""
        zeros = jax.eval_shape(lambda: Cache.zeros(self.config, rows, length, self.dtype, unroll=self.unroll))
        place = self.shardings.cache(self.config, rows, length)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), zeros)

    def _compiling(self, name: str, **sizes: int) -> None:
        self.programs.append(" ".join([name, *(f"{k}={v}" for k, v in sizes.items())]))

    def _decode_steps(
        self, params: Tree, state: DecodeState, row_params: RowParams, rotary: rope.Rope, cancel_B, steps
    ):
        """Up to `steps` tokens, at most STEPS, for the rows that are not done.

        Returns (state, tokens, logprobs), both [STEPS, B]; the token is -1 where a row had none to make. A row whose
        log-probability is not finite ends without that token.
        """
        B = state.token_B.shape[0]
        self._compiling(row_params.kind, rows=B, cache=state.cache.length)
        model = nnx.merge(self.graphdef, params)
        state = dataclasses.replace(state, done_B=state.done_B | cancel_B)

        def unfinished(carry):
            step, state, _, _ = carry
            return (step < steps) & ~jnp.all(state.done_B)

        def one_step(carry):
            step, state, tokens, logprobs = carry
            live_B = ~state.done_B
            positions_B1 = jnp.where(live_B, state.position_B, -1)[:, None]
            out = model(
                state.token_B[:, None],
                rope=rotary,
                positions_BT=positions_B1,
                cache=state.cache,
                implementation=self.implementation,
            )
            logits_BV = model.logits(out.hidden_BTD[:, 0])
            constrain = row_params.constraints and functools.partial(
                row_params.constraints.apply,
                count_B=state.count_B,
                limit_B=row_params.limit_B,
                position_B=state.position_B,
                tokens_BS=state.tokens_BS,
            )
            token_B, logprob_B = sample(
                logits_BV,
                state.seen_BV,
                state.count_B,
                row_params.sampling,
                vocab_size=self.vocab_size,
                constrain=constrain,
            )
            good_B = live_B & jnp.isfinite(logprob_B)
            ends_B = jnp.any(token_B[:, None] == row_params.eos_ids, axis=1) | (state.count_B + 1 >= row_params.limit_B)
            rows_B = jnp.arange(B)
            state = DecodeState(
                cache=out.cache,
                token_B=jnp.where(live_B, token_B, state.token_B),
                position_B=state.position_B + live_B,
                count_B=state.count_B + live_B,
                done_B=state.done_B | ends_B | ~good_B,
                seen_BV=None if state.seen_BV is None else state.seen_BV.at[rows_B, token_B].max(live_B),
                tokens_BS=None
                if state.tokens_BS is None
                else state.tokens_BS.at[rows_B, state.position_B + live_B].set(
                    jnp.where(live_B, token_B, state.token_B), mode="drop"
                ),
            )
            tokens = tokens.at[step].set(jnp.where(good_B, token_B, -1))
            return step + 1, state, tokens, logprobs.at[step].set(logprob_B)

        empty = (jnp.full((STEPS, B), -1, jnp.int32), jnp.zeros((STEPS, B), jnp.float32))
        _, state, tokens, logprobs = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, *empty))
        return state, tokens, logprobs

    def _prefill_chunk(
        self, params: Tree, cache: Cache, tokens_BT, positions_BT, context_B, rotary: rope.Rope
    ) -> Cache:
        self._compiling("prefill", rows=tokens_BT.shape[0], chunk=tokens_BT.shape[1], cache=cache.length)
        model = nnx.merge(self.graphdef, params)
        options = {"context_B": context_B, "implementation": self.implementation}
        return model(tokens_BT, rope=rotary, positions_BT=positions_BT, cache=cache, **options).cache

    def _score_chunk(
        self, params: Tree, cache: Cache, tokens_BT, positions_BT, targets_BT, context_B, rotary: rope.Rope
    ):
        """(cache, [B, T]): log-probabilities of the targets, or a reward model's scores at every token."""
        self._compiling("score", rows=tokens_BT.shape[0], chunk=tokens_BT.shape[1], cache=cache.length)
        model = nnx.merge(self.graphdef, params)
        options = {"context_B": context_B, "implementation": self.implementation}
        out = model(tokens_BT, rope=rotary, positions_BT=positions_BT, cache=cache, **options)
        if self.config.scores:
            return out.cache, model.score(out.hidden_BTD)
        return out.cache, cross_entropy.token_logprobs(out.hidden_BTD, model.head_weight(), targets_BT)

    def _all_logits(self, params: Tree, tokens_BT, positions_BT, context_B, rotary: rope.Rope):
        self._compiling("logits", rows=tokens_BT.shape[0], tokens=tokens_BT.shape[1])
        model = nnx.merge(self.graphdef, params)
        options = {"context_B": context_B, "implementation": self.implementation}
        return model.logits(model(tokens_BT, rope=rotary, positions_BT=positions_BT, **options).hidden_BTD)

    # From requests to arrays.

    def rotary_tables(self, totals: Sequence[int], rows: int, length: int, long_context: rope.LongContext) -> rope.Rope:
        tables = rope.choose(self.config, [*totals, *[1] * (rows - len(totals))], long_context)
        chunk = self.config.dual_chunk_attention_config or rope.dual_chunk_defaults(self.config.trained_length)
        if length <= chunk.chunk_size:  # no row can leave its first chunk: two of three query rotations need not exist
            tables = dataclasses.replace(tables, chunk_len_B=None)
        return tables

    def new_cache(self, rows: int, length: int) -> Cache:
        memory.check_cache(self.config, rows, length, self.dtype)
        place = self.shardings.cache(self.config, rows, length)
        return Cache.zeros(self.config, rows, length, self.dtype, unroll=self.unroll, place=place)

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: int, length: int, totals, long_context, progress: Progress | None
    ) -> Cache:
        cache = self.new_cache(rows, length)
        rotary = self.rotary_tables(totals, rows, length, long_context)
        context_B = _padded([len(p) + 1 for p in prompts], rows)
        done, total = 0, sum(map(len, prompts))
        for tokens_BT, positions_BT, _ in self.buckets.side_by_side(prompts, rows):
            cache = self.for_cache(rows, length).prefill(self.params, cache, tokens_BT, positions_BT, context_B, rotary)
            if progress is not None:
                jax.block_until_ready(cache)
                done += int((positions_BT >= 0).sum())
                progress(done, total)
        return cache

    def _state(self, cache: Cache, prompts: Sequence[Sequence[int]], rows: int, row_params: RowParams) -> DecodeState:
        """The batch before its first token. Each prompt's last token is fed first."""
        seen_BV = np.zeros((rows, self.config.vocab_size), bool) if row_params.penalised else None
        tokens_BS = np.full((rows, cache.length), -1, np.int32) if row_params.reads_history else None
        for row, prompt in enumerate(prompts):
            if seen_BV is not None:
                seen_BV[row, list(prompt)] = True
            if tokens_BS is not None:
                tokens_BS[row, : len(prompt)] = prompt
        token_B, position_B = _padded([p[-1] for p in prompts], rows), _padded([len(p) - 1 for p in prompts], rows)
        done_B = np.arange(rows) >= len(prompts)
        small = (token_B, position_B, _padded([0], rows), done_B, seen_BV, tokens_BS)
        return DecodeState(cache, *jax.device_put(small, self.shardings.replicated))


def _padded(values: Sequence[int], rows: int) -> np.ndarray:
    """int32 [rows], zeros for padding."""
    return np.asarray([*values, *[0] * (rows - len(values))], np.int32)

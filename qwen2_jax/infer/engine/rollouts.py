# SPDX-License-Identifier: Apache-2.0
"""Completions of many prompts by parameters that change from call to call: the sampler of reinforcement learning.

The rows of one batch decode for as long as there are prompts. A row whose completion ends is given the next prompt, and
the loop goes on, so that no row waits for the longest completion (continuous batching).

    waiting prompts -> prefill, several at a time, into a staging cache
    a row ends      -> one row of the staging cache is copied over it

So a prefill needs no free row, whichever rows end, and each program has one shape. Samples of one prompt that are next
to each other in the requests share its prefill.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.infer.engine.buckets import context_limit
from qwen2_jax.infer.engine.decode_batch import STEPS, DecodeState
from qwen2_jax.infer.engine.programs import Generator, Progress, Request
from qwen2_jax.infer.engine.sampling import RowParams
from qwen2_jax.infer.engine.sampling_params import NOT_FINITE, SamplingParams, finish_reason
from qwen2_jax.model import decoder, head_padding, rope
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.parallel import sharding
from qwen2_jax.weights import weight
from qwen2_jax.weights.params import ParamSpec, Tree

# B rows
STEPS_WHILE_WAITING = 8  # tokens per call of the decode loop while prompts wait: ended rows are refilled between calls


class Completion(NamedTuple):
    """tokens: int32 [n], with the end-of-sequence id that ended it. logprobs: float32 [n], the log-softmax over the
    whole vocabulary of the logits divided by the request's temperature (greedy: by 1), without top-k, top-p and min-p.
    finish_reason: "stop" or "length"."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of one call. tokens: sampled. seconds: from the call to the last token. steps: of the decode loop.
    idle: share of rows * steps without a token. refills: prompts that followed another one in their row.
    prefilled: prompts prefilled, each once for the samples that share it."""

    tokens: int
    seconds: float
    steps: int
    idle: float
    refills: int
    prefilled: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Rollouts:
    """Samples completions with the given parameters: `completions, stats = rollouts(params, requests)`.

    A completion depends on parameters, prompt, seed and sampling parameters, not on its row or on the other requests.
    The generator's programs are compiled once for rows x length and serve every call.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        rows: int,
        length: int,
        long_context: rope.LongContext = "off",
        context: int | None = None,
    ):
        """rows: completions at a time. length: slots of the cache, prompt and completion together. The staging
        cache has an eighth of the rows, at least one for each part into which the mesh divides them.

        long_context: as in training (rope.choose). context: the length that its mode is chosen for (default: `length`);
        give the trainer's length of a packed row where the two must compute the same.
        """
        if rows < 1 or length < 2:
            raise UserError(f"rollouts need at least 1 row and a cache of 2 tokens; given rows={rows}, length={length}")
        self.generator, self.rows, self.length = generator, rows, length
        self.long_context, self.context = long_context, context or length
        shardings = generator.shardings
        mesh = shardings.mesh
        parts = 1 if mesh is None else sharding.parts(sharding.dividing("batch", rows, mesh), mesh)
        self.staging_rows = parts * max(1, rows // 8 // parts)
        tables = generator.rotary_tables([self.context] * rows, rows, length, long_context)
        self._rotary = jax.device_put(tables, shardings.replicated)
        self._widening: tuple[head_padding.Heads, Tree] | None = None
        self._where = jax.tree.map(lambda leaf: leaf.sharding, generator.params)
        self._admit = jax.jit(
            shardings.traced(self._admitted),
            donate_argnums=0,
            out_shardings=shardings.cache(generator.config, rows, length),
        )

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        rows: int,
        length: int,
        mesh: jax.sharding.Mesh | None = None,
        dtype="bfloat16",
        vocab_size: int | None = None,
        unroll: bool = False,
        long_context: rope.LongContext = "off",
        context: int | None = None,
        implementation: str | None = None,
    ) -> "Rollouts":
        """Rollouts by a model whose parameters come with each call. dtype: of the cache. The rest as in Generator.

        unroll: whether the parameters come as model.unroll makes them, faster on CPU. Where tensor does not divide the
        heads (head_padding.py), a call holds a second, wider copy of the attention's weights, and of nothing else.
        """
        specs = decoder.declare(config, unroll=unroll)[1]
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def shape(spec: ParamSpec) -> jax.ShapeDtypeStruct:
            place = one if mesh is None else sharding.sharding(spec.axes, spec.shape, mesh, sharding.SERVING)
            return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=place)

        wider = head_padding.spread(config, mesh)
        served = config if wider is None else wider.config
        generator = Generator(
            decoder.declare(served, unroll=unroll)[0],
            jax.tree.map(shape, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec)),
            served,
            vocab_size=vocab_size,
            dtype=jnp.dtype(dtype),
            unroll=unroll,
            mesh=mesh,
            implementation=implementation,
        )
        rollouts = cls(generator, rows=rows, length=length, long_context=long_context, context=context)
        rollouts._widening = None if wider is None else (wider, specs)
        return rollouts

    def __call__(
        self, params: Tree, requests: Sequence[Request], progress: Progress | None = None
    ) -> tuple[list[Completion], Stats]:
        """Completions in the order of the requests.

        params: copied only where their sharding is not that of generation, which may be on another mesh of the same
        devices. None is donated, and none is kept after the call. progress is called with (completions done, requests)
        as they end.
        Raises UserError, which names the prompt by its number from 1, for a request that does not fit the cache or the
        context, has ids outside the vocabulary, a repetition penalty or constraints (the log-probabilities would not be
        those of the distribution that was sampled), and where its logits are not finite numbers.
        """
        for number, request in enumerate(requests, start=1):
            self._check(f"prompt {number} of {len(requests)}", request)
        generator = self.generator
        kept, generator.params = generator.params, self._placed(params)
        try:
            return _Call(self, requests).run(progress)
        finally:
            generator.params = kept

    def _check(self, what: str, request: Request) -> None:
        self.generator.check(request, self.long_context, what)
        params, prompt = request.sampling_params, len(request.tokens)
        limit = min(self.length, context_limit(self.generator.config, self.long_context))
        if prompt + params.max_new_tokens > limit:
            raise UserError(
                f"{what} has {prompt} tokens, which leaves {limit - prompt} of {limit} in the cache; max_new_tokens is "
                f"{params.max_new_tokens}: shorten the prompt, lower max_new_tokens or give rollouts a larger length"
            )
        if params.repetition_penalty != 1:
            raise UserError(f"{what} has repetition_penalty={params.repetition_penalty}; rollouts have none: give 1")
        if params.constraints.on_logits:
            raise UserError(f"{what} has constraints of a generation_config.json; rollouts have none: leave them out")

    def _placed(self, params: Tree) -> Tree:
        if self._widening is not None and weight.stored_forms(params):
            raise UserError(
                "rollouts with adapters or int8 weights need a mesh whose tensor axis divides the heads: lower its "
                "tensor"
            )
        params = weight.put(params, self._where)
        if self._widening is None or self.generator.shardings.mesh is None:
            return params
        return head_padding.place(params, self._widening[1], self._widening[0], self.generator.shardings.mesh)

    def _admitted(self, cache: Cache, staging: Cache, source, row) -> Cache:
        """The cache with row `source` of the staging cache copied over its `row`."""
        self.generator._compiling("admit", rows=self.rows, cache=self.length)

        def copied(to, staged):  # [R, B, K, S, H]
            # A sum of one row: on a mesh only it is exchanged. A slice would gather the whole staging cache.
            chosen = (jnp.arange(staged.shape[1]) == source)[:, None, None, None]
            picked = jnp.sum(jnp.where(chosen, staged, 0), axis=1, keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(to, picked, row, axis=1)

        return jax.tree.map(copied, cache, staging)


class _Call:
    """The rows of one call and the requests that wait for them."""

    def __init__(self, rollouts: Rollouts, requests: Sequence[Request]):
        self.rollouts, self.requests, self.generator = rollouts, requests, rollouts.generator
        self.programs = self.generator.for_cache(rollouts.rows, rollouts.length)
        self.waiting = collections.deque(range(len(requests)))
        self.request_of: dict[int, int] = {}  # row -> number of the request that it completes
        self.sampled: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in requests]
        self.staged: dict[tuple[int, ...], int] = {}  # prompt -> its row in the staging cache
        self.sampling_params = [SamplingParams()] * rollouts.rows
        self.tokens = self.steps = self.prefilled = 0

    def run(self, progress: Progress | None) -> tuple[list[Completion], Stats]:
        begin = time.perf_counter()
        rows = self.rollouts.rows
        zeros_B = np.zeros(rows, np.int32)
        cache = self.generator.new_cache(rows, self.rollouts.length)
        state = DecodeState(cache, zeros_B, zeros_B, zeros_B, np.ones(rows, bool), None)  # type: ignore[arg-type]
        keep_B = np.zeros(rows, bool)
        while self.waiting or self.request_of:
            if self.waiting and len(self.request_of) < rows:
                state, row_params = self._refill(state)
            steps = np.int32(STEPS_WHILE_WAITING if self.waiting else STEPS)
            state, *out = self.programs.decode(
                self.generator.params, state, row_params, self.rollouts._rotary, keep_B, steps
            )
            ended = self._take(*jax.device_get((*out, state.done_B)))
            if progress is not None and ended:
                progress(len(self.requests) - len(self.waiting) - len(self.request_of), len(self.requests))
        seconds = time.perf_counter() - begin
        idle = 1 - self.tokens / max(1, rows * self.steps)
        refills = max(0, len(self.requests) - rows)
        stats = Stats(self.tokens, seconds, self.steps, idle, refills, self.prefilled)
        return [self._completion(n) for n in range(len(self.requests))], stats

    def _refill(self, state: DecodeState) -> tuple[DecodeState, RowParams]:
        """Gives waiting requests to the rows that have none."""
        cache = state.cache
        small = jax.device_get((state.token_B, state.position_B, state.count_B, state.done_B))
        token_B, position_B, count_B, done_B = map(np.array, small)  # copies: the next call reuses the arrays' memory
        for row in range(self.rollouts.rows):
            if row in self.request_of or not self.waiting:
                continue
            if self.requests[self.waiting[0]].tokens not in self.staged:
                self._stage()
            number = self.waiting.popleft()
            request = self.requests[number]
            prompt = request.tokens
            cache = self.rollouts._admit(cache, self.staging, np.int32(self.staged[prompt]), np.int32(row))
            token_B[row], position_B[row], count_B[row], done_B[row] = prompt[-1], len(prompt) - 1, 0, False
            self.request_of[row], self.sampling_params[row] = number, request.sampling_params
        small = (token_B, position_B, count_B, done_B, None)
        row_params = RowParams.stacked(self.sampling_params, tempered=True)
        small, row_params = jax.device_put((small, row_params), self.generator.shardings.replicated)
        return DecodeState(cache, *small), row_params

    def _stage(self) -> None:
        """Prefills the next prompts into the staging cache."""
        rollouts = self.rollouts
        prompts: dict[tuple[int, ...], int] = {}
        for number in self.waiting:
            prompts.setdefault(self.requests[number].tokens, len(prompts))
            if len(prompts) == rollouts.staging_rows:
                break
        totals = [rollouts.context] * len(prompts)
        self.staging = self.generator.prefill(
            [p[:-1] for p in prompts], rollouts.staging_rows, rollouts.length, totals, rollouts.long_context, None
        )
        self.staged = prompts
        self.prefilled += len(prompts)

    def _take(self, tokens: np.ndarray, logprobs: np.ndarray, done_B: np.ndarray) -> bool:
        """Records the tokens of one call of the decode loop, [STEPS, B]. Returns whether a completion has ended."""
        made = tokens >= 0
        self.tokens += int(made.sum())
        self.steps += int(made.any(axis=1).sum())
        for row, number in self.request_of.items():
            self.sampled[number].append((tokens[made[:, row], row], logprobs[made[:, row], row]))
        ended = [row for row in self.request_of if done_B[row]]
        for row in ended:
            del self.request_of[row]
        return bool(ended)

    def _completion(self, number: int) -> Completion:
        tokens, logprobs = (np.concatenate(parts) for parts in zip(*self.sampled[number], strict=True))
        reason = finish_reason(self.requests[number].sampling_params, tokens.tolist())
        if reason == NOT_FINITE:
            raise UserError(
                f"the model's logits are not finite numbers at token {len(tokens) + 1} of the completion of prompt "
                f"{number + 1} of {len(self.requests)}: NaN or infinity in the weights, or an overflow; go back to an "
                "earlier checkpoint, with a lower learning rate"
            )
        return Completion(tokens, logprobs, reason)

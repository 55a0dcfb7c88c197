# SPDX-License-Identifier: Apache-2.0
"""Completions of many prompts by weights that change from call to call: what reinforcement learning trains on.

The rows of one batch decode for as long as there are prompts. A row whose completion ends is given the next prompt, and
the loop goes on: lengths may differ a hundredfold without a row waiting for the longest.

    waiting prompts -> prefill, several at a time, into the antechamber, a small cache of its own
    a row ends      -> one row of the antechamber is copied over it

So a prefill has no row to spare, whichever rows end, and each program has one shape. Samples of one prompt that are
asked for one after the other share its prefill.
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
from qwen2_jax.infer.engine.programs import STEPS, Generator, Orders, Progress, Request, State, reason
from qwen2_jax.infer.engine.sampling import Sampling
from qwen2_jax.infer.engine.sampling_params import Settings
from qwen2_jax.model import decoder, head_padding, rope
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.parallel import sharding
from qwen2_jax.weights import weight
from qwen2_jax.weights.params import ParamSpec, Tree

# B rows  P rows of the antechamber  K tokens per call
STRIDE = 8  # tokens per call of the decode loop while prompts wait: rows that end are seen, and refilled, after a call


class Completion(NamedTuple):
    """tokens: int32 [n], with the end-of-sequence id that ended it. logprobs: float32 [n], of each token among all of
    the vocabulary, under the logits divided by the request's temperature (greedy: by 1), whatever top-k, top-p and
    min-p left out. finish_reason: "stop" or "length"."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """Of one call. tokens: drawn. seconds: from the call to the last token. steps: of the decode loop. idle: share of
    rows * steps in which a row had nothing to do. refills: prompts that followed another one in their row.
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
    """Draws completions with the weights of the day: `completions, stats = rollouts(params, requests)`.

    A completion depends on weights, prompt, seed and settings alone, not on its row or on what else is asked for.
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
        """rows: completions at a time. length: slots of the cache, prompt and completion together. A second cache has
        an eighth of the rows, or one for each part into which the mesh cuts them.

        long_context: as in training (rope.choose). context: the length that it is chosen for; the trainer's length of
        a packed row, where the two must compute the same. By default `length`.
        """
        if rows < 1 or length < 2:
            raise UserError(f"rollouts need at least 1 row and a cache of 2 tokens; given rows={rows}, length={length}")
        self.generator, self.rows, self.length = generator, rows, length
        self.long_context, self.context = long_context, context or length
        places = generator.places
        parts = 1 if places.mesh is None else sharding.parts(sharding.dividing("batch", rows, places.mesh), places.mesh)
        self.ahead = parts * max(1, rows // 8 // parts)  # P
        turns = generator._rope([self.context] * rows, rows, length, long_context)
        self._turns = jax.device_put(turns, places.everywhere)
        self._widening: tuple[head_padding.Heads, Tree] | None = None
        self._where = jax.tree.map(lambda leaf: leaf.sharding, generator.params)
        self._admit = jax.jit(
            places.on(self._admitted), donate_argnums=0, out_shardings=places.cache(generator.config, rows, length)
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
        """Rollouts by a model whose weights come with each call. dtype: of the cache. The rest as in Generator.

        unroll: whether the weights come as model.unroll makes them, faster on CPU. Where tensor does not divide the
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

        params: read where they are; copied only where they lie in another way than generation's, on its mesh or on
        another of the same devices. None is donated, and none is held after the call. progress is called with
        (completions done, requests) as they end.
        Raises UserError, which names the prompt by its number from 1, for a request that does not fit the cache or the
        context, has ids outside the vocabulary, or a repetition penalty (no log-probability would be of what is drawn).
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
        settings, prompt = request.settings, len(request.tokens)
        limit = min(self.length, context_limit(self.generator.config, self.long_context))
        if prompt + settings.max_new_tokens > limit:
            raise UserError(
                f"{what} has {prompt} tokens, which leaves {limit - prompt} of {limit} in the cache; max_new_tokens is "
                f"{settings.max_new_tokens}: shorten the prompt, lower max_new_tokens or give rollouts a larger length"
            )
        if settings.repetition_penalty != 1:
            raise UserError(f"{what} has repetition_penalty={settings.repetition_penalty}; rollouts have none: give 1")

    def _placed(self, params: Tree) -> Tree:
        if self._widening is not None and weight.stored_forms(params):
            raise UserError(
                "rollouts with adapters or int8 weights need a mesh whose tensor axis divides the heads: lower its "
                "tensor"
            )
        params = weight.put(params, self._where)
        if self._widening is None or self.generator.places.mesh is None:
            return params
        return head_padding.place(params, self._widening[1], self._widening[0], self.generator.places.mesh)

    def _admitted(self, cache: Cache, antechamber: Cache, source, row) -> Cache:
        """The cache, in whose `row` is now what row `source` of the antechamber holds."""
        self.generator._compiling("admit", rows=self.rows, cache=self.length)

        def one(to, of):  # [R, rows, K, S, H]
            # A sum of one row: on a mesh that is what the devices exchange. A slice would gather the whole antechamber.
            mine_P = (jnp.arange(of.shape[1]) == source)[:, None, None, None]
            picked = jnp.sum(jnp.where(mine_P, of, 0), axis=1, keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(to, picked, row, axis=1)

        return jax.tree.map(one, cache, antechamber)


class _Call:
    """One call's rows and what waits for them."""

    def __init__(self, rollouts: Rollouts, requests: Sequence[Request]):
        self.rollouts, self.requests, self.generator = rollouts, requests, rollouts.generator
        self.programs = self.generator.for_cache(rollouts.rows, rollouts.length)
        self.waiting = collections.deque(range(len(requests)))
        self.row_of: dict[int, int] = {}  # row -> the request whose completion it makes
        self.drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in requests]
        self.within: dict[tuple[int, ...], int] = {}  # prompt -> its row in the antechamber
        self.asked = [Settings()] * rollouts.rows
        self.tokens = self.steps = self.prefilled = 0

    def run(self, progress: Progress | None) -> tuple[list[Completion], Stats]:
        begin = time.perf_counter()
        rows = self.rollouts.rows
        zeros_B = np.zeros(rows, np.int32)
        cache = self.generator._empty(rows, self.rollouts.length)
        state = State(cache, zeros_B, zeros_B, zeros_B, np.ones(rows, bool), None)  # type: ignore[arg-type]
        keep_B = np.zeros(rows, bool)
        while self.waiting or self.row_of:
            if self.waiting and len(self.row_of) < rows:
                state, orders = self._refill(state)
            steps = np.int32(STRIDE if self.waiting else STEPS)
            state, *out = self.programs.decode(self.generator.params, state, orders, keep_B, steps)
            ended = self._take(*jax.device_get((*out, state.done_B)))
            if progress is not None and ended:
                progress(len(self.requests) - len(self.waiting) - len(self.row_of), len(self.requests))
        seconds = time.perf_counter() - begin
        idle = 1 - self.tokens / max(1, rows * self.steps)
        refills = max(0, len(self.requests) - rows)
        stats = Stats(self.tokens, seconds, self.steps, idle, refills, self.prefilled)
        return [self._completion(n) for n in range(len(self.requests))], stats

    def _refill(self, state: State) -> tuple[State, Orders]:
        """Gives waiting requests to the rows that have none."""
        cache = state.cache
        small = jax.device_get((state.token_B, state.position_B, state.count_B, state.done_B))
        token_B, position_B, count_B, done_B = map(np.array, small)  # copies: the next call reuses the arrays' memory
        for row in range(self.rollouts.rows):
            if row in self.row_of or not self.waiting:
                continue
            if self.requests[self.waiting[0]].tokens not in self.within:
                self._prefill()
            number = self.waiting.popleft()
            request = self.requests[number]
            prompt = request.tokens
            cache = self.rollouts._admit(cache, self.antechamber, np.int32(self.within[prompt]), np.int32(row))
            token_B[row], position_B[row], count_B[row], done_B[row] = prompt[-1], len(prompt) - 1, 0, False
            self.row_of[row], self.asked[row] = number, request.settings
        small = jax.device_put((token_B, position_B, count_B, done_B, None), self.generator.places.everywhere)
        sampling = Sampling.stacked(self.asked, tempered=True)
        return State(cache, *small), self.generator._orders(self.asked, self.rollouts._turns, sampling)

    def _prefill(self) -> None:
        """Fills the antechamber with the next prompts."""
        rollouts = self.rollouts
        prompts: dict[tuple[int, ...], int] = {}
        for number in self.waiting:
            prompts.setdefault(self.requests[number].tokens, len(prompts))
            if len(prompts) == rollouts.ahead:
                break
        totals = [rollouts.context] * len(prompts)
        self.antechamber = self.generator._prefilled(
            [p[:-1] for p in prompts], rollouts.ahead, rollouts.length, totals, rollouts.long_context, None
        )
        self.within = prompts
        self.prefilled += len(prompts)

    def _take(self, tokens_KB: np.ndarray, logprobs_KB: np.ndarray, done_B: np.ndarray) -> bool:
        """Books what a call of the decode loop has drawn. Returns whether a completion has ended."""
        live_KB = tokens_KB >= 0
        self.tokens += int(live_KB.sum())
        self.steps += int(live_KB.any(axis=1).sum())
        for row, number in self.row_of.items():
            mine = live_KB[:, row]
            self.drawn[number].append((tokens_KB[mine, row], logprobs_KB[mine, row]))
        ended = [row for row in self.row_of if done_B[row]]
        for row in ended:
            del self.row_of[row]
        return bool(ended)

    def _completion(self, number: int) -> Completion:
        tokens, logprobs = (np.concatenate(parts) for parts in zip(*self.drawn[number], strict=True))
        return Completion(tokens, logprobs, reason(self.requests[number].settings, tokens.tolist()))

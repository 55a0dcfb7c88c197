# SPDX-License-Identifier: Apache-2.0
"""The programs of the engine's step: the few shapes that it is compiled for, and arrays of these shapes from plans."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qwen2_jax.config.model_config import FULL, ModelConfig
from qwen2_jax.infer.engine import memory
from qwen2_jax.infer.engine.pages import PAGE
from qwen2_jax.infer.engine.requests import CheckedRequest
from qwen2_jax.infer.engine.sampling import RowParams
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.engine.scheduler import Answering, Chunk, StepPlan
from qwen2_jax.infer.engine.shardings import Shardings
from qwen2_jax.infer.engine.step import DecodeRows, EngineState, Made, PromptChunks, advance, copy_pages
from qwen2_jax.model import rope
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.weights.params import Tree

# B rows  P pages of a row  R prompts  C tokens of a chunk
# Rounds where the model says so. Else XLA keeps bfloat16 wider within what it fuses, which depends on the shapes: an
# answer would depend on what else runs.
OPTIONS = {"xla_allow_excess_precision": False}
PADDING = SamplingParams()  # of rows without a request
COPIES = 8  # pages that one program copies


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """What the step is compiled for.

    rows: numbers of rows, ascending. chunks: (prompts, tokens) of the array of chunks. pages: ascending numbers of
    pages, of which a call gathers the smallest that holds its prompts, and its rows' histories where it reads them. A
    row's own table always has the largest: the work of decoding follows the positions.
    """

    rows: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, limit: int) -> "StepShapes":
        """For the default backend: at most `rows` rows of at most `limit` tokens."""
        # One row is no number of rows for a CPU: its products are computed another way, with other last bits.
        counts, chunks = [2], [(1, 32), (1, 128), (1, 512)]
        if jax.default_backend() != "cpu":
            counts, chunks = [8, 64], [(1, 128), (16, 128), (1, 512), (4, 512), (1, 2048)]
        pages = [8]
        while pages[-1] * PAGE < limit:
            pages.append(min(4 * pages[-1], -(-limit // (2 * PAGE)) * 2))
        return cls((*(n for n in counts if n < rows), max(2, rows)), tuple(chunks), tuple(pages))


class StepPrograms:
    """Compiles the step for a model, once for each shape, and calls it.

    `programs` lists what has been compiled; in steady state it does not grow.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: ModelConfig,
        shapes: StepShapes,
        *,
        vocab_size: int,
        dtype,
        unroll: bool,
        shardings: Shardings,
        implementation: str | None,
    ):
        self.config, self.shapes, self.dtype, self.unroll, self.shardings = config, shapes, dtype, unroll, shardings
        self.vocab_size, self.implementation = vocab_size, implementation
        self.programs: list[str] = []
        self._model_of = functools.partial(nnx.merge, graphdef)
        self._by_pages: dict[int, tuple[Any, Any]] = {}
        self._settings: tuple[tuple, Any] = ((), None)

    def new_state(self, pages: int) -> EngineState:
        """The state before the first call, with an empty cache of `pages`. Raises UserError where that does not fit."""
        memory.check_cache(self.config, pages, PAGE, self.dtype)
        place, small = self.shardings.pages(self.config, pages), self.shardings.replicated
        cache = Cache.zeros(self.config, pages, PAGE, self.dtype, unroll=self.unroll, place=place)
        zeros_B = np.zeros(self.shapes.rows[-1], np.int32)
        arrays = (np.zeros((pages, PAGE), np.int32), zeros_B, zeros_B, zeros_B, np.ones(len(zeros_B), bool))
        return EngineState(cache, *jax.device_put(arrays, small))

    def rotary(self, request: CheckedRequest, long_context: rope.LongContext) -> tuple[rope.Row, bytes]:
        """The rotary numbers of a request, and what its cache depends on besides its tokens."""
        prompt, total = len(request.tokens), len(request.tokens) + request.sampling_params.max_new_tokens
        row = rope.row(self.config, total, long_context)
        if total <= row.chunk_len:  # it stays in its first chunk
            row = row._replace(chunk_len=FULL, chunk_size=FULL)
        length = prompt if 0 < row.original_length < prompt else 0  # the factor on the logits
        numbers = np.asarray([*row[1:], length], np.float64)
        return row, row.inv_freq_f.tobytes() + numbers.tobytes()

    def advance(
        self,
        params: Tree,
        state: EngineState,
        plan: StepPlan,
        source: Sequence[int],
        requests: Sequence[tuple[CheckedRequest, rope.Row]],
        prompts: Sequence[tuple[CheckedRequest, rope.Row]],
    ) -> tuple[EngineState, Made]:
        """One call. source, requests: of plan.rows; prompts: of plan.chunks."""
        B = next(n for n in self.shapes.rows if n >= min(plan.wanted, self.shapes.rows[-1]))
        chunked = any(row.chunk_len != FULL for _, row in [*requests, *prompts])
        # Without rows the programs for those that the prompts will be.
        rows = self._rows(plan.rows, source, requests or prompts[:B], B, chunked)
        chunks = self._prompts(plan.chunks, prompts, plan.shape, chunked) if plan.chunks else None
        program, _ = self._for_pages(state)
        return program(params, state, *jax.device_put((rows, chunks, np.int32(plan.steps)), self.shardings.replicated))

    def copy(self, state: EngineState, copies: Sequence[tuple[int, int]]) -> EngineState:
        """The state with pages copied over others: (page, the one that is written)."""
        for start in range(0, len(copies), COPIES):
            some = [*copies[start : start + COPIES], *[(0, 0)] * COPIES][:COPIES]
            state = self._for_pages(state)[1](state, *np.asarray(some, np.int32).T)
        return state

    def _rows(self, answering: Sequence[Answering], source, requests, B: int, chunked: bool) -> DecodeRows:
        key = (B, chunked, tuple(id(request) for request, _ in requests))
        if self._settings[0] != key:  # they change with the rows only
            padding = B - len(requests)
            params = RowParams.stacked(
                [*(request.sampling_params for request, _ in requests), *[PADDING] * padding],
                vocabulary=self.config.vocab_size,
            )
            plain = rope.row(self.config, 1, "off")
            rotary = _rotary([*(row for _, row in requests), *[plain] * padding], chunked)
            self._settings = key, (requests, jax.device_put((rotary, params), self.shardings.replicated))
        rotary, params = self._settings[1][1]
        token_B, position_B, source_B = np.zeros(B, np.int32), np.full(B, -1, np.int32), np.full(B, -1, np.int32)
        source_B[: len(source)] = source
        for n, (request, _) in enumerate(requests[: len(answering)]):
            token_B[n], position_B[n] = request.tokens[-1], len(request.tokens) - 1
        table_BP = _table([one.pages for one in answering], B, self.shapes.pages[-1])
        most = self._gathered(answering) if params.penalised or params.reads_history else 0
        history_BP = table_BP[:, :most] if most else None
        return DecodeRows(source_B, token_B, position_B, table_BP, history_BP, rotary, params)  # type: ignore[arg-type]

    def _prompts(self, chunks: Sequence[Chunk], prompts, shape: tuple[int, int], chunked: bool) -> PromptChunks:
        R, _ = shape
        tokens_RC, positions_RC = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        context_R = np.ones(R, np.int32)
        for n, chunk in enumerate(chunks):
            size, tokens = chunk.stop - chunk.start, chunk.answering.tokens
            tokens_RC[n, :size] = tokens[chunk.start : chunk.stop]
            positions_RC[n, :size] = np.arange(chunk.start, chunk.stop)
            context_R[n] = len(tokens)
        plain = rope.row(self.config, 1, "off")
        rotary = _rotary([*(row for _, row in prompts), *[plain] * (R - len(prompts))], chunked)
        some = [chunk.answering for chunk in chunks]
        table_RP = _table([one.pages for one in some], R, self._gathered(some))
        return PromptChunks(tokens_RC, positions_RC, context_R, table_RP, rotary)  # type: ignore[arg-type]

    def _gathered(self, answering: Sequence[Answering]) -> int:
        """The pages of the longest, rounded up to what there are programs for."""
        most = max((len(one.pages) for one in answering), default=0)
        return next(n for n in self.shapes.pages if n >= most)

    def _for_pages(self, state: EngineState) -> tuple[Any, Any]:
        """The programs for a cache of so many pages; see Generator.for_cache for why shardings are given."""
        pages = state.history.shape[0]
        if pages not in self._by_pages:
            small: Any = self.shardings.replicated
            where = EngineState(self.shardings.pages(self.config, pages), *[small] * 5)  # type: ignore[arg-type]
            traced = self.shardings.traced
            self._by_pages[pages] = (
                jax.jit(
                    traced(self._advance), donate_argnums=1, out_shardings=(where, small), compiler_options=OPTIONS
                ),
                jax.jit(traced(self._copy), donate_argnums=0, out_shardings=where),
            )
        return self._by_pages[pages]

    # Their bodies run once per compilation, which is how compilations are counted.

    def _advance(self, params: Tree, state: EngineState, rows: DecodeRows, prompts: PromptChunks | None, steps):
        name = f"{rows.params.kind} rows={len(rows.token_B)} of {state.history.shape[0]} pages"
        if rows.history_BP is not None:
            name += f" history={rows.history_BP.shape[1]}"
        if prompts is not None:
            name += " chunks={}x{} over {} pages".format(*prompts.tokens_RC.shape, prompts.table_RP.shape[1])
        self.programs.append(name if rows.rotary.chunk_len_B is None else f"dual chunk, {name}")
        return advance(
            self._model_of, params, state, rows, prompts, steps,
            vocab_size=self.vocab_size, implementation=self.implementation,
        )  # fmt: skip

    def _copy(self, state: EngineState, source_A, target_A):
        self.programs.append(f"copy pages of {state.history.shape[0]}")
        return copy_pages(state, source_A, target_A)


def _rotary(rows: Sequence[rope.Row], chunked: bool) -> rope.Rope:
    tables = rope.stacked(rows)
    return tables if chunked else dataclasses.replace(tables, chunk_len_B=None)


def _table(pages: Sequence[Sequence[int]], rows: int, P: int) -> Any:
    """int32 [rows, P], page 0 where a row has none."""
    table = np.zeros((rows, P), np.int32)
    for n, some in enumerate(pages):
        table[n, : len(some)] = some
    return table

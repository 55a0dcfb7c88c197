# SPDX-License-Identifier: Apache-2.0
"""The compiled step of the engine: rows that decode and chunks of prompts, over one paged cache.

A row of a call continues a row of the call before, or begins anew with a prompt whose cache is filled up to its last
token. That token is the first that the row feeds, so that tokens are sampled in one place, and a prompt only fills the
cache. What a row has sampled stays on the device from call to call: the host need not have seen it to make the next
call. Without prompts a call makes several tokens for each row; with prompts one, in one pass with their chunks.

DecodeRows of padding have position -1. Sizes: B rows, P pages of a row, chunks [R, C]; all else are run-time arrays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen2_jax import ops
from qwen2_jax.infer.engine.sampling import RowParams, sample
from qwen2_jax.model import rope
from qwen2_jax.model.decoder import Qwen2
from qwen2_jax.model.kv_cache import Cache
from qwen2_jax.weights.params import Tree

# B rows  P pages of a row  R prompts  C tokens of a chunk  M tokens of a pass: B + R * C  V vocabulary
STEPS = 16  # most tokens per row and call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """What is on the device between two calls. Donated to each call.

    cache: pages of keys and values. history: int32 [pages, slots], the token in each slot. token_B: the next token to
    feed. position_B: its position. count_B: tokens sampled so far. done_B: bool. As many rows as any call has; those
    behind the rows of the last call mean nothing.
    """

    cache: Cache
    history: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The rows of a call, int32 unless noted.

    source_B: the row of the call before that continues here; -1: a row that begins, with token_B at position_B
    (negative: none). table_BP: its pages. history_BP: the first of them, which hold all of its tokens; None where no
    row needs these. rotary, params: of its request.
    """

    source_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    table_BP: jax.Array
    history_BP: jax.Array | None
    rotary: rope.Rope
    params: RowParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptChunks:
    """Chunks of prompts, int32. positions_RC: -1 for padding. context_R: tokens of the whole prompts."""

    tokens_RC: jax.Array
    positions_RC: jax.Array
    context_R: jax.Array
    table_RP: jax.Array
    rotary: rope.Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """What a call returns to the host. tokens, logprobs: [STEPS, B], the token -1 where a row made none.

    done_B: bool, rows that have ended. A row whose log-probability is not finite ends without that token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    done_B: jax.Array


def advance(
    model_of,
    params: Tree,
    state: EngineState,
    rows: DecodeRows,
    prompts: PromptChunks | None,
    steps,
    *,
    vocab_size,
    implementation,
) -> tuple[EngineState, Made]:
    """One call. model_of(params): the module. steps: int32, tokens per row at most; with prompts it is 1."""
    model = model_of(params)
    begins_B, source_B = rows.source_B < 0, jnp.maximum(rows.source_B, 0)
    most = len(state.token_B)

    def joined(old, new_B):
        return jnp.where(begins_B, new_B, old[source_B])

    def padded(state: EngineState) -> EngineState:
        rest = most - len(begins_B)
        small = (jnp.pad(x, (0, rest)) for x in (state.token_B, state.position_B, state.count_B, state.done_B))
        return EngineState(state.cache, state.history, *small)

    position_B = joined(state.position_B, rows.position_B)
    state = EngineState(
        cache=state.cache,
        history=state.history,
        token_B=joined(state.token_B, rows.token_B),
        position_B=position_B,
        count_B=joined(state.count_B, 0),
        done_B=joined(state.done_B, rows.position_B < 0),
    )
    one_step = functools.partial(_one_step, model, rows, vocab_size=vocab_size, implementation=implementation)
    B = len(begins_B)
    tokens, logprobs = jnp.full((STEPS, B), -1, jnp.int32), jnp.zeros((STEPS, B), jnp.float32)

    def record(step, made, tokens, logprobs):
        return tokens.at[step].set(made[0]), logprobs.at[step].set(made[1])

    if prompts is not None:
        state, made = one_step(state, prompts)
        tokens, logprobs = record(0, made, tokens, logprobs)
        return padded(state), Made(tokens, logprobs, state.done_B)

    def unfinished(carry):
        step, state, *_ = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def body(carry):
        step, state, *out = carry
        state, made = one_step(state, None)
        return step + 1, state, *record(step, made, *out)

    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, tokens, logprobs))
    return padded(state), Made(tokens, logprobs, state.done_B)


def _one_step(
    model: Qwen2,
    rows: DecodeRows,
    state: EngineState,
    prompts: PromptChunks | None,
    *,
    vocab_size: int,
    implementation: str | None,
):
    """(state, (token_B, logprob_B)): one token for each row that is not done, and the chunks of prompts written."""
    params, live_B, B = rows.params, ~state.done_B, len(state.token_B)
    tokens_M, positions_M = state.token_B, jnp.where(live_B, state.position_B, -1)
    rotary, context_M = rows.rotary, positions_M + 1
    if prompts is not None:
        C = prompts.tokens_RC.shape[1]
        tokens_M = jnp.concatenate([tokens_M, prompts.tokens_RC.reshape(-1)])
        positions_M = jnp.concatenate([positions_M, prompts.positions_RC.reshape(-1)])
        context_M = jnp.concatenate([context_M, jnp.repeat(prompts.context_R, C)])
        rotary = jax.tree.map(
            lambda row, prompt: jnp.concatenate([row, jnp.repeat(prompt, C, axis=0)]), rotary, prompts.rotary
        )
    prompts_RP = None if prompts is None else prompts.table_RP
    pages = ops.PageLayout.of(positions_M, rows.table_BP, prompts_RP, state.history.shape[1])
    history = state.history.at[pages.page_M, pages.slot_M].set(tokens_M, mode="drop")
    out = model(
        tokens_M[:, None],
        rope=rotary,
        positions_BT=positions_M[:, None],
        cache=state.cache,
        context_B=context_M,
        pages=pages,
        implementation=implementation,
    )
    logits_BV = model.logits(out.hidden_BTD[:B, 0])
    tokens_BS = None if rows.history_BP is None else history[rows.history_BP].reshape(B, -1)
    constrain = (
        None
        if params.constraints is None
        else functools.partial(
            params.constraints.apply,
            count_B=state.count_B,
            limit_B=params.limit_B,
            position_B=state.position_B,
            tokens_BS=tokens_BS,
        )
    )
    seen_BV = None
    if params.penalised:
        assert tokens_BS is not None
        written_BS = jnp.arange(tokens_BS.shape[1]) <= state.position_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], tokens_BS].max(written_BS)
    token_B, logprob_B = sample(
        logits_BV, seen_BV, state.count_B, params.sampling, vocab_size=vocab_size, constrain=constrain
    )
    good_B = live_B & jnp.isfinite(logprob_B)
    ends_B = jnp.any(token_B[:, None] == params.eos_ids, axis=1) | (state.count_B + 1 >= params.limit_B)
    assert out.cache is not None
    state = EngineState(
        cache=out.cache,
        history=history,
        token_B=jnp.where(live_B, token_B, state.token_B),
        position_B=state.position_B + live_B,
        count_B=state.count_B + live_B,
        done_B=state.done_B | ends_B | ~good_B,
    )
    return state, (jnp.where(good_B, token_B, -1), logprob_B)


def copy_pages(state: EngineState, source_A: jax.Array, target_A: jax.Array) -> EngineState:
    """The state with pages source_A written over pages target_A."""

    def copied(pages):  # [R, pages, K, Y, H]
        return pages.at[:, target_A].set(pages[:, source_A])

    history = state.history.at[target_A].set(state.history[source_A])
    return dataclasses.replace(state, cache=jax.tree.map(copied, state.cache), history=history)

# SPDX-License-Identifier: Apache-2.0
"""LM.score: conversations to numbers, whatever the batch, and what is no reward model's business."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen2_jax
from qwen2_jax import model
from qwen2_jax.config import DualChunk
from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import main
from qwen2_jax.infer.lm import LM
from qwen2_jax.model import rope
from tiny import CONFIGS, random_params
from tolerance import close

TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def reward(lm, bytes_tokenizer):
    config = dataclasses.replace(lm.config, score_head="two_layers")
    weights = random_params(config, unroll=True)
    return LM(config, weights, tokenizer=bytes_tokenizer, dtype="float32", unroll=True, max_rows=4)


def directly(lm: LM, rows: list[list[int]]) -> np.ndarray:
    """One forward pass over whole rows, without a cache; the head in numpy."""
    graphdef = model.declare(lm.config, unroll=True)[0]
    width = max(map(len, rows))
    ids = np.asarray([row + [0] * (width - len(row)) for row in rows])
    positions = np.asarray([[*range(len(row)), *[-1] * (width - len(row))] for row in rows])
    forward = jax.jit(lambda params: nnx.merge(graphdef, params)(ids, positions_BT=positions).hidden_BTD)
    hidden_BTD = np.asarray(forward(lm.params), np.float64)
    head = {name: np.asarray(value, np.float64) for name, value in lm.params["score_head"].items()}
    up_FB = np.maximum(
        head["up_FD"] @ hidden_BTD[range(len(rows)), [len(r) - 1 for r in rows]].T + head["up_bias_F"][:, None], 0
    )
    return head["down_1F"][0] @ up_FB + head["down_bias_1"][0]


def test_a_row_scores_as_its_last_hidden_state_does(reward):
    """Lengths within a chunk, at its end, one beyond, over two chunks; more rows than a batch holds."""
    rows = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (1, 32, 33, 7, 150, 2)]
    scores = reward.score(rows)
    assert (scores.dtype, scores.shape) == (np.float32, (6,))
    want = directly(reward, rows)
    close(scores, want)
    assert np.ptp(want) > 1
    for row, value in zip(rows, scores, strict=True):
        close(reward.score([row]), [value])
    close(reward.score([np.asarray(rows[3])]), scores[3:4])


def test_a_conversation_ends_behind_its_last_turn(reward):
    """The template's text without a generation prompt: its last token is the newline behind <|im_end|>."""
    ids = reward.tokenizer.encode(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert ids[-1] == ord("\n")
    other = [TALK[0], {"role": "assistant", "content": "5"}]
    scores = reward.score([TALK, other, TALK])
    close(scores[[0, 2]], reward.score([ids]).repeat(2))
    assert abs(scores[0] - scores[1]) > 1e-3
    alone = reward.score(TALK)
    assert type(alone) is float
    close([alone], scores[:1])


@pytest.mark.parametrize(
    ("talks", "words"),
    [
        (["Is this good?"], "score needs conversations, each a list of messages or of token ids; given 'Is this"),
        (TALK[:1], "ends in an answer; the last role is 'user'"),
        ([TALK[:1]], "ends in an answer; the last role is 'user'"),
        ([[{"role": "assistant"}]], "content"),
        ([], "score needs a list, not empty"),
        ([[]], "not empty"),
        ([1, 2], r"put it in a list: \[\[1"),
        ([[1, 999]], "token id 999"),
        ([[1] * 5000], "at most"),
    ],
)
def test_mistakes_are_named(reward, talks, words):
    with pytest.raises(UserError, match=words):
        reward.score(talks)


def test_messages_need_a_tokenizer(reward):
    bare = LM(reward.config, reward.params, dtype="float32", unroll=True)
    with pytest.raises(UserError, match="no tokenizer; give token ids instead of messages"):
        bare.score([TALK])


@pytest.mark.parametrize("ask", [
    lambda lm: lm.generate(["a"]),
    lambda lm: lm.chat(TALK[:1]),
    lambda lm: next(lm.stream("a")),
    lambda lm: lm.logits([[1, 2]]),
    lambda lm: lm.logprobs([[1, 2]]),
])  # fmt: skip
def test_a_reward_model_writes_nothing(reward, ask):
    before = reward.generator.compiles
    with pytest.raises(UserError, match="this is a reward model"):
        ask(reward)
    assert reward.generator.compiles == before, "it is known before anything is computed"


def test_a_model_of_words_scores_nothing(lm):
    with pytest.raises(UserError, match="no score head"):
        lm.score([TALK])


@pytest.mark.slow
def test_long_conversations_are_read_with_dual_chunk_attention(lm):
    chunks = DualChunk(chunk_size=24, local_size=4, original_max_position_embeddings=16)
    config = dataclasses.replace(lm.config, score_head="two_layers", dual_chunk_attention_config=chunks)
    reading = LM(config, random_params(config, unroll=True), dtype="float32", unroll=True, long_context="dca")
    rows = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (90, 7)]
    graphdef = model.declare(config, unroll=True)[0]

    @functools.partial(jax.jit, static_argnums=2)
    def whole(params, ids, length):
        merged = nnx.merge(graphdef, params)
        return merged.score(merged(ids, rope=rope.choose(config, length, "dca")).hidden_BTD[0, -1])

    for row, value in zip(rows, reading.score(rows), strict=True):
        close(value, whole(reading.params, jnp.asarray([row]), len(row)))


def test_saved_and_loaded(reward, tmp_path):
    reward.save(tmp_path / "hf")
    again = qwen2_jax.load(tmp_path / "hf", dtype="float32")
    assert again.config == dataclasses.replace(reward.config, dtype="float32")
    rows = [[1, 2, 3]]
    np.testing.assert_array_equal(again.score(rows), reward.score(rows))


def test_the_command_line_says_what_to_do(reward, tmp_path, capsys):
    """Before it reads the weights, which here cannot be read."""
    reward.save(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"nothing")
    assert main.main(["--ckpt", str(tmp_path / "hf"), "Hello"]) == 2
    said = capsys.readouterr().err
    assert "is a reward model" in said
    assert f"qwen2_jax.load('{tmp_path / 'hf'}').score([" in said


@pytest.mark.slow
def test_a_scanned_mixture_of_experts_with_a_linear_head():
    config = dataclasses.replace(CONFIGS["moe_mixed"], score_head="linear")
    params = random_params(config)
    scores = LM(config, params, dtype="float32").score([[5, 6, 7], [8]])
    graphdef = model.declare(config)[0]

    @jax.jit
    def whole(params, ids, positions):
        merged = nnx.merge(graphdef, params)
        return merged.score(merged(ids, positions_BT=positions).hidden_BTD)

    want = np.asarray(whole(params, jnp.asarray([[5, 6, 7], [8, 0, 0]]), jnp.asarray([[0, 1, 2], [0, -1, -1]])))
    close(scores, [want[0, 2], want[1, 0]])

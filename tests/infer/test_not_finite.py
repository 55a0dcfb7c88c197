# SPDX-License-Identifier: Apache-2.0
"""Logits that are not finite numbers: said at the first such token, in every place, and never NaN in JSON."""

import io
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import qwen2_jax
from few import slow
from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import main
from qwen2_jax.infer.engine.generation_config import StoredParams
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.rollouts import Rollouts
from qwen2_jax.infer.engine.sampling_params import SamplingParams
from qwen2_jax.infer.lm import LM

SHARED = Path(__file__).parents[3] / "shared" / "data"
BROKEN = 35  # the byte "#": its embedding is NaN


@pytest.fixture(scope="module")
def broken(lm):
    """The tiny model with one embedding that is not a number; logits of other tokens are as they were."""
    params = lm.params | {"embed_VD": lm.params["embed_VD"].at[BROKEN].set(jnp.nan)}
    return LM(lm.config, params, tokenizer=lm.tokenizer, dtype="float32", unroll=True, max_rows=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_ends_and_the_others_do_not_change(lm, broken, temperature):
    given = {"max_new_tokens": 6, "temperature": temperature, "seed": [1, 2, 3]}
    with pytest.warns(UserWarning, match="prompt 2 of 3: the model's logits are not finite numbers at token 1 of"):
        answers = broken.generate(["ab", "a#b", "c"], **given)
    whole = lm.generate(["ab", "aab", "c"], **given)
    assert (answers[0], answers[2]) == (whole[0], whole[2])
    assert (answers[1].finish_reason, answers[1].token_ids, answers[1].text) == ("not_finite", [], "")


def test_every_way_to_ask_says_so(broken):
    for ask in (
        lambda: broken.generate(["#", "#a"]),
        lambda: broken.chat([{"role": "user", "content": "#"}]),
        lambda: list(broken.stream("#")),
    ):
        with pytest.raises(UserError, match="not finite numbers at token 1"):
            ask()
    rollouts = Rollouts(broken.generator, rows=2, length=128)
    with pytest.raises(UserError, match="not finite numbers at token 1 of the completion of prompt 2 of 2"):
        rollouts(broken.params, [Request((97,), SamplingParams()), Request((BROKEN,), SamplingParams())])


def test_no_token_left_is_not_an_answer(lm):
    stored = StoredParams.read({"suppress_tokens": list(range(272))}).resolve({})
    assert lm.generator.run([Request((1, 2), stored)]) == [([], [], "not_finite")]


def test_the_command_line_fails(broken, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, "_load", lambda args: broken)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for argv in (["--raw", "#"], ["--raw", "--json", "#"]):
        assert main.main(argv) == 2
        said = capsys.readouterr()
        assert said.out.strip() == ""
        assert said.err.splitlines()[-1].startswith("error: the model's logits are not finite numbers at token 1")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n{"prompt": "#"}\n{"prompt": "c"}\n')
    argv = ["--raw", "--input", str(source), "--output", str(output), "--max-new-tokens", "2"]
    for _ in range(2):  # the second run tries the failed line again
        assert main.main(argv) == 1
        assert f"error: line 2 of {source}: the model's logits are not finite" in capsys.readouterr().err
        assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 3]


@pytest.mark.skipif(not SHARED.exists(), reason="the recorded case lies outside the repository")
@pytest.mark.parametrize("dtype", [*slow("float32"), "bfloat16"])
def test_the_recorded_model(dtype):
    folder = SHARED / "reports" / "not-finite"
    prompt = json.loads((folder / "expected.json").read_text())["prompt_ids"]
    with pytest.raises(UserError, match="not finite numbers at token 1"):
        qwen2_jax.load(folder, dtype=dtype).generate([prompt], max_new_tokens=6, temperature=0)

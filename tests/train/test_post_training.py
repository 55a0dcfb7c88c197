# SPDX-License-Identifier: Apache-2.0
"""Reward models, DPO, online DPO and GRPO from their configuration to their result, on a model of seconds."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import qwen2_jax
from few import slow
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.errors import UserError
from qwen2_jax.observe import Logging
from qwen2_jax.observe.lines import read
from qwen2_jax.rewards import RewardFunction as Function
from qwen2_jax.train import (
    Checkpointing,
    Dpo,
    Evaluation,
    Grpo,
    Guard,
    Lora,
    Mesh,
    OnlineDpo,
    Optim,
    Policy,
    Pretrain,
    Reward,
    RewardModel,
    Sampling,
    Start,
    loop,
)
from qwen2_jax.train.online import prompt_selection, sampled_batches, sampler
from qwen2_jax.train.prepare import prepare
from qwen2_jax.train.stage import stage_of

MODEL = ModelConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)

ROWS = 9  # of every online step: an odd number is not halved where fewer have room, so all of them are one program
STEADY = Optim(lr=1e-2, schedule="constant", decay=0.0)


def reward(name, **settings):
    return Function(function=f"{Path(__file__).with_name('answer_rewards.py')}:{name}", **settings)


def run(config):
    screen = io.StringIO()
    return loop.run(config, Console(file=screen, width=200)), screen.getvalue()


def lines_of(out):
    return [line for line in read(out / "metrics.jsonl") if "loss" in line]


def held_out_of(out):
    return [next(iter(line["held_out"].values())) for line in read(out / "metrics.jsonl") if "held_out" in line]


def told(out):
    """What must not depend on interruptions."""
    names = ("step", "loss", "gradient_norm", "batches", "tokens")
    return [tuple(line[name] for name in names) for line in lines_of(out)]


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Runs whose steps and samplers are the same programs share them: tracing and compiling are most of the time."""
    trainers, samplers = {}, {}
    make, of = loop.Trainer, sampler.Rollouts.of
    read = ("implementation", "lora", "optim", "seed", "long_context", "moe", "ema", "dtype", "remat", "accumulate")

    def trainer(run, config, steps, *, mesh=None, objective=None):
        assert run.optim.schedule == "constant"  # or the number of steps would be part of the program
        key = (*(getattr(run, name) for name in read), run.guard.spike, run.z_loss, run.length, config, mesh)
        key += (type(objective), *vars(objective).values())
        if key not in trainers:
            trainers[key] = make(run, config, steps, mesh=mesh, objective=objective)
        return trainers[key]

    def rollouts(config, **settings):
        key = (config, *settings.items())
        if key not in samplers:
            samplers[key] = of(config, **settings)
        return samplers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", trainer)
        patch.setattr(sampler.Rollouts, "of", rollouts)
        yield


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A model to start from, and pairs and prompts in its tokenizer's words."""
    out = tmp_path_factory.mktemp("base")
    config = Pretrain(
        model=MODEL, tokenizer=str(corpus / "tokenizer"), data=Data(sources=(Source(path=str(corpus / "text.jsonl")),)),
        rows=4, length=32, steps=2, optim=STEADY, dtype="float32", remat=None, export_dtype="float32", out=out,
    )  # fmt: skip
    run(config)
    pairs = [{"prompt": f"after {i}", "chosen": str(i + 1), "rejected": f"before {i}"} for i in range(40)]
    ranked = [{"prompt": f"after {i}", "responses": [str(i + 1), f"{i} {i}", "no"][: 2 + i % 2]} for i in range(40)]
    prompts = [{"prompt": f"after {i}", "answer": str(i + 1)} for i in range(13)]
    for name, records in {"pairs": pairs, "ranked": ranked, "prompts": prompts}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return out


def shared(base, out, **changes):
    return {
        "start": Start(checkpoint=str(base / "hf")),
        "steps": 6,
        "optim": STEADY,
        "dtype": "float32",
        "remat": None,
        "export_dtype": "float32",
        "checkpoints": Checkpointing(every_steps=3),
        "log": Logging(every=1, batch_digest=True),
        "out": out,
    } | changes


def data_of(base, name):
    return Data(sources=(Source(path=str(base / f"{name}.jsonl")),), packing="best_fit")


def dpo(base, out, **changes):
    held_out = Evaluation(sources=(Source(path=str(base / "pairs.jsonl")),), first=True, every=100)
    settings = {"data": data_of(base, "pairs"), "rows": 2, "length": 256, "evaluation": held_out}
    return Dpo(**shared(base, out, **settings | changes))


def grpo(base, out, **changes):
    settings = {
        "data": PromptData(sources=(str(base / "prompts.jsonl"),), max_tokens=96),
        "rewards": (reward("early"),),
        "prompts": 4,
        "sampling": Sampling(samples=4, max_new_tokens=4, rows=8),
        "rows": ROWS,
        "length": 128,  # two answers
    }
    return Grpo(**shared(base, out, **settings | changes))


# DPO


@pytest.fixture(scope="module")
def dpo_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("dpo")
    return out, run(dpo(base, out))


def test_dpo_begins_at_ln_2_and_learns_the_pairs(dpo_run):
    out, (folder, _) = dpo_run
    before, after = held_out_of(out)
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-7)  # rounded to float32
    assert before["rewards/accuracies"] == 0  # equal is not better
    assert before["rewards/margins"] == 0
    assert after["loss"] < 0.5
    assert after["rewards/accuracies"] == 1
    difference = after["rewards/chosen"] - after["rewards/rejected"]
    assert after["rewards/margins"] == pytest.approx(difference, abs=1e-5)  # float32 means, taken separately
    assert qwen2_jax.load(folder, dtype="float32").chat([{"role": "user", "content": "after 3"}]).token_ids


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dtype": "bfloat16"}, id="bfloat16", marks=pytest.mark.slow),
        pytest.param({"reference": "live"}, id="live", marks=pytest.mark.slow),
        pytest.param({"lora": Lora(rank=2), "lora_base": "float32"}, id="lora", marks=pytest.mark.slow),
    ],
)
def test_the_first_step_is_at_ln_2_everywhere(base, tmp_path, changes):
    """The reference is computed as the policy is, to the bit: rounding and adapters do not come between them."""
    run(dpo(base, tmp_path, steps=1, **changes))
    assert held_out_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert lines_of(tmp_path)[0]["rewards/margins"] == 0


@pytest.mark.slow  # test_dpo.py has the loss of given log-probabilities
def test_a_cached_reference_is_the_live_one(base, dpo_run, tmp_path):
    run(dpo(base, tmp_path, reference="live"))
    numbers = [[line[name] for name in ("loss", "rewards/margins")] for line in lines_of(tmp_path)]
    cached = [[line[name] for name in ("loss", "rewards/margins")] for line in lines_of(dpo_run[0])]
    np.testing.assert_allclose(numbers, cached, rtol=0, atol=1e-6)  # float32 log-probabilities around 10


def test_dpo_goes_on_bit_for_bit_and_keeps_its_reference(base, dpo_run, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen2_jax.train.state.preemption.Preemption.requested", lambda self, done: done == 4)
    assert run(dpo(base, tmp_path))[0] is None
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "reference").rglob("*.f32")}
    run(dpo(base, tmp_path))
    assert told(tmp_path) == told(dpo_run[0])
    assert before and {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow  # test_grpo.py and test_dpo.py add up micro-batches of the losses
@pytest.mark.parametrize("make", [dpo, grpo])
def test_micro_batches_change_nothing(base, tmp_path, make):
    for accumulate in (1, 2):
        rows = {} if make is dpo else {"rows": ROWS + 1}
        run(make(base, tmp_path / str(accumulate), steps=2, accumulate=accumulate, **rows))
    one, two = ([line["gradient_norm"] for line in lines_of(tmp_path / str(n))] for n in (1, 2))
    assert one[0] > 0
    np.testing.assert_allclose(one, two, rtol=1e-4)  # float32 sums in another order, for two steps


# Reward models


def test_a_reward_model_learns_to_rank_and_scores_what_it_learned(base, tmp_path):
    ranked = Evaluation(sources=(Source(path=str(base / "ranked.jsonl")),), first=True, every=100, batches=40)
    config = Reward(
        **shared(base, tmp_path, data=data_of(base, "ranked"), rows=2, length=384, evaluation=ranked, steps=20)
    )
    folder, _ = run(config)
    before, after = held_out_of(tmp_path)
    assert before["loss"] == pytest.approx(math.log(2), abs=0.02)  # a new head scores near 0
    assert after["accuracy"] > 0.95
    # What training measured on packed rows is what the loaded model says of single conversations.
    lm = qwen2_jax.load(folder, dtype="float32")
    losses = []
    for line in (base / "ranked.jsonl").read_text().splitlines():
        record = json.loads(line)
        asked = {"role": "user", "content": record["prompt"]}
        scores = lm.score([[asked, {"role": "assistant", "content": text}] for text in record["responses"]])
        pairs = [np.log1p(np.exp(-(a - b))) for i, a in enumerate(scores) for b in scores[i + 1 :]]
        losses.append(np.mean(pairs))
    assert np.mean(losses) == pytest.approx(after["loss"], abs=1e-4)  # scores of single rows, through a float32 file


# Learning from one's own answers


@pytest.fixture(scope="module")
def grpo_run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo")
    return out, run(grpo(base, out, updates=2, iterations=2, steps=8))


def test_grpo_earns_more(base, tmp_path):
    run(grpo(base, tmp_path, steps=24))
    rewards = [line["reward"] for line in lines_of(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert all(line["sampling/max"] < sampled_batches.FLOAT32_BOUND for line in lines_of(tmp_path))
    assert all(abs(line["loss"]) < 1e-6 for line in lines_of(tmp_path))  # advantages of a group add up to 0


@pytest.mark.parametrize("stop", [*slow(4), 6], ids=["between", "in the middle"])
def test_grpo_goes_on_bit_for_bit(base, grpo_run, tmp_path, monkeypatch, stop):
    """Also in the middle of an episode, whose answers came from weights that are gone."""
    monkeypatch.setattr("qwen2_jax.train.state.preemption.Preemption.requested", lambda self, done: done == stop)
    config = grpo(base, tmp_path, updates=2, iterations=2, steps=8)
    assert run(config)[0] is None
    monkeypatch.undo()
    about = json.loads((tmp_path / f"checkpoints/{stop}/about/data.json").read_text())["about"]
    assert ("episode" in about["extras"]["feed"]) == (stop == 6)
    run(config)
    assert told(tmp_path) == told(grpo_run[0])


@pytest.mark.parametrize("lora_base", slow("float32", "int8"))  # quick: adapters in test_loop.py
def test_grpo_trains_adapters(base, tmp_path, lora_base):
    """Answers are drawn with the adapters in place, and what they are measured against has none."""
    dtype = {"int8": "bfloat16"}.get(lora_base, lora_base)
    settings = {"lora": Lora(rank=4), "lora_base": lora_base, "dtype": dtype, "policy": Policy(kl=0.01), "steps": 3}
    run(grpo(base, tmp_path, optim=dataclasses.replace(STEADY, lr=3e-2), **settings))
    lines = lines_of(tmp_path)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # of equal weights: with and without a product by zeros
    assert lines[-1]["kl"] > 1e-5
    if dtype == "float32":
        assert max(line["sampling/max"] for line in lines) < sampled_batches.FLOAT32_BOUND
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow  # what the coefficient does to the loss: test_policy.py
def test_grpo_stays_near_its_reference(base, tmp_path):
    """With a large coefficient the policy does not move away; without, the same steps take it far."""
    policies = {"free": Policy(), "held": Policy(kl=10.0)}
    for name, policy in policies.items():
        run(grpo(base, tmp_path / name, steps=8, policy=dataclasses.replace(policy, kl=max(policy.kl, 1e-9))))
    free, held = (lines_of(tmp_path / name)[-1]["kl"] for name in policies)
    assert 0 <= held < free / 2


@pytest.mark.slow  # quick: its loss and its sampling, each in another stage, and its groups below
def test_online_dpo_learns_from_its_best_and_worst(base, tmp_path):
    settings = shared(base, tmp_path, steps=24)
    config = OnlineDpo(
        data=PromptData(sources=(str(base / "prompts.jsonl"),), max_tokens=96),
        rewards=(reward("early"),),
        prompts=8,
        sampling=Sampling(samples=4, max_new_tokens=4, temperature=1.3, rows=8),
        rows=ROWS,
        **settings,
    )
    run(config)
    lines = lines_of(tmp_path)
    assert all(line["sampling/max"] < sampled_batches.FLOAT32_BOUND for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert np.mean([line["reward"] for line in lines[-3:]]) > np.mean([line["reward"] for line in lines[:3]]) + 0.15


def test_prompts_that_teach_most_come_first(base, tmp_path, monkeypatch):
    """And a run that goes on does not measure them again."""
    rewards = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [math.nan] * 4, [0, 0, 0, 0]], float)
    assert prompt_selection.chosen(rewards, "variance", None) == [1, 2, 0, 4]
    assert prompt_selection.chosen(rewards, "shuffled", (0.25, 0.625)) == [1, 2]
    config = grpo(base, tmp_path, steps=2, order="variance", keep=(0.01, 0.99))
    run(config)
    measured = json.loads((tmp_path / "difficulty.json").read_text())["rewards"]
    assert np.shape(measured) == (13, 4)
    monkeypatch.setattr(sampler.Sampler, "measure", lambda *_: pytest.fail("measured twice"))
    run(dataclasses.replace(config, steps=3))
    with pytest.raises(UserError, match="none has a mean reward from 2 to 3"):
        run(dataclasses.replace(config, steps=4, keep=(2.0, 3.0)))


def test_groups_of_both_stages(base, tmp_path):
    answers = [
        [sampled_batches.Answer([1], np.array([g]), np.zeros(1), truncated=g == 2) for g in range(3)] for _ in range(2)
    ]
    rewards = np.array([[0.5, math.nan, 2.0], [1.0, 1.0, 1.0]])
    found = stage_of(OnlineDpo(**online_settings(base, tmp_path))).groups(answers, rewards)
    assert [[a.completion[0] for a in group] for group in found[0]] == [[2, 0]]
    assert found[1] == []  # nothing to choose
    found = stage_of(Grpo(**online_settings(base, tmp_path), mask_truncated=True)).groups(answers, rewards)
    weighed = [[group[0].advantage for group in groups] for groups in found]
    np.testing.assert_allclose(weighed[0], [-1 / math.sqrt(2), 0, 1 / math.sqrt(2)], atol=1e-4)  # policy.eps
    assert weighed[1] == [0, 0, 0]
    assert [group[0].counts for group in found[0]] == [True, True, False]


def online_settings(base, out):
    return {
        "data": PromptData(sources=(str(base / "prompts.jsonl"),), max_tokens=96),
        "rewards": (reward("early"),),
        "prompts": 2,
        "sampling": Sampling(samples=3, max_new_tokens=2),
        "start": Start(checkpoint=str(base / "hf")),
        "steps": 1,
        "optim": STEADY,
        "out": out,
    }


# Mistakes


def test_a_run_without_any_reward_says_so_and_ends(base, tmp_path):
    """Its steps are skipped: without this the result would be the model it started from, without a word."""
    config = grpo(base, tmp_path, rewards=(reward("silent"),), guard=Guard(patience=3), steps=12)
    screen = io.StringIO()
    with pytest.raises(UserError, match=r"3 steps in a row were skipped, the last is step 3.*no answer got a reward"):
        loop.run(config, Console(file=screen, width=200))
    assert screen.getvalue().count("no answer got a reward: all functions returned None for the 16 answers") == 1
    assert [line["skipped"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_broken_reward_ends_the_run_and_names_the_prompt(base, tmp_path):
    with pytest.raises(UserError, match=r"reward broken on the prompt 'after \d+'.*not a finite number"):
        run(grpo(base, tmp_path / "stop", rewards=(reward("broken"),)))
    _, screen = run(grpo(base, tmp_path / "skip", steps=1, rewards=(reward("broken", on_error="skip"),)))
    assert "reward broken on the prompt" in screen
    assert lines_of(tmp_path / "skip")[0]["rewards/broken/failed"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ()}, "no reward for the answers"),
        ({"prompts": 4, "updates": 3}, "cannot be divided"),
        ({"steps": None, "epochs": 1.0}, "give steps, not epochs"),
        ({"length": 16}, "has no room"),
        (
            {"reward_model": RewardModel(checkpoint="x", shaped=True), "rewards": ()},
            "orders answers with equal verdicts",
        ),
        ({"start": None, "model": MODEL, "tokenizer": "demo"}, "starts from a checkpoint"),
    ],
)
def test_settings_that_contradict_each_other(base, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo(base, tmp_path, **changes)


def test_a_reward_model_takes_no_adapters(base, tmp_path):
    with pytest.raises(UserError, match="train it without lora"):
        Reward(**shared(base, tmp_path, data=data_of(base, "ranked"), rows=2, lora=Lora(rank=2), lora_base="float32"))


def test_online_stages_are_for_one_process(base, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="Grpo samples its answers in one process, and 2 are here"):
        prepare(grpo(base, tmp_path), Console(file=io.StringIO()))


def test_a_model_of_words_is_no_judge(base, tmp_path):
    with pytest.raises(UserError, match="is a language model"):
        run(grpo(base, tmp_path, rewards=(), reward_model=RewardModel(checkpoint=str(base / "hf"), dtype="float32")))


def test_pairs_are_asked_for(base, corpus, tmp_path):
    with pytest.raises(UserError, match="holds no rankings"):
        run(
            dpo(
                base, tmp_path / "a", data=Data(sources=(Source(path=str(corpus / "chats.jsonl")),), packing="best_fit")
            )
        )
    with pytest.raises(UserError, match="DPO learns from pairs"):
        run(dpo(base, tmp_path / "b", data=data_of(base, "ranked"), evaluation=Evaluation()))


def test_a_dry_run_shows_prompts(base, tmp_path):
    _, screen = run(grpo(base, tmp_path / "none", dry_run=True))
    assert "after" in screen
    assert not (tmp_path / "none" / "checkpoints").exists()
    assert jax.device_count() >= 1


def on_a_mesh(base, out, mesh):
    """Two steps of DPO and of GRPO, which samples on another mesh; post_training_mesh.py runs them, too."""
    settings = {"mesh": Mesh(**mesh), "steps": 2}
    sampling = Sampling(samples=4, max_new_tokens=4, rows=8, mesh=Mesh(data=4, fsdp=-1) if mesh else None)
    return {
        "dpo": dpo(base, out / "dpo", rows=8, **settings),
        "grpo": grpo(
            base,
            out / "grpo",
            prompts=8,
            rows=0,
            length=128,
            sampling=sampling,
            policy=Policy(kl=0.1),
            updates=2,
            **settings,
        ),
    }


@pytest.mark.slow
def test_eight_devices_do_what_one_does(base, tmp_path):
    """Rows, weights, heads and the tokens of a row are divided; the numbers stay."""
    script = Path(__file__).with_name("post_training_mesh.py")
    mesh = json.dumps({"fsdp": 2, "context": 2, "tensor": 2})
    done = subprocess.run(
        [sys.executable, str(script), str(base), str(tmp_path / "many"), mesh],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    many = json.loads(done.stdout.splitlines()[-1])
    for stage, config in on_a_mesh(base, tmp_path / "one", {}).items():
        run(config)
        for a, b in zip(lines_of(config.out), many[stage], strict=True):
            for name in {"loss", "gradient_norm", "rewards/margins", "reward", "kl"} & a.keys():
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-6), (stage, name)
            assert b.get("sampling/max", 0) < sampled_batches.FLOAT32_BOUND

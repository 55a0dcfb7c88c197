# SPDX-License-Identifier: Apache-2.0
"""A run from its command to its result: learns, resumes bit for bit, exports, and fails with a message of use."""

import dataclasses
import errno
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import qwen2_jax
import tiny
from few import slow
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.transfer import write
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.errors import UserError
from qwen2_jax.observe import Logging
from qwen2_jax.observe.lines import read
from qwen2_jax.train import Checkpointing, Evaluation, Guard, Lora, Optim, Pretrain, Sft, Start, loop, step
from qwen2_jax.train.batch_sharding import Placing
from qwen2_jax.train.prepare import prepare
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.state import lock
from qwen2_jax.train.state.checkpoints import Checkpoints
from qwen2_jax.train.state.lock import alone
from small_run import config_file

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def pretrain(corpus, out, **changes):
    return Pretrain(
        **{
            "model": MODEL,
            "tokenizer": str(corpus / "tokenizer"),
            "data": Data(sources=(Source(path=str(corpus / "text.jsonl")),)),
            "rows": 4,
            "length": 32,
            "steps": 8,
            "optim": Optim(lr=1e-2, schedule="wsd", warmup=2),
            "dtype": "float32",
            "remat": None,
            "ema": 0.5,
            "checkpoints": Checkpointing(every_steps=3),
            "evaluation": Evaluation(sources=(Source(path=str(corpus / "text.jsonl")),), every=4, batches=2),
            "log": Logging(every=1, batch_digest=True),
            "out": out,
        }
        | changes
    )


def run(config):
    screen = io.StringIO()
    return loop.run(config, Console(file=screen, width=200)), screen.getvalue()


def lines_of(out):
    return [line for line in read(out / "metrics.jsonl") if "loss" in line]


def told(out):
    """What must not depend on interruptions."""
    return [
        (line["step"], line["loss"], line["gradient_norm"], line["batches"], line["tokens"]) for line in lines_of(out)
    ]


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Runs that differ in their folder only share their compiled functions: seconds instead of minutes."""
    make = functools.cache(lambda run, config, steps: Trainer(run, config, steps))
    Trainer = loop.Trainer

    def shared(run, config, steps, *, mesh=None, objective=None):
        plain = {"out": Path("x"), "checkpoints": Checkpointing(), "evaluation": Evaluation(), "log": Logging()}
        plain |= {"data": Data(sources=(Source(path="x"),), packing="best_fit")}
        plain |= {} if run.start is None else {"start": Start(checkpoint="x")}
        same = dataclasses.replace(run, **plain, guard=Guard(spike=run.guard.spike), resume=True, tokenizer="x")
        return make(same, config, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", shared)
        yield


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    folder, screen = run(pretrain(corpus, out))
    return out, folder, screen


def test_a_run_learns_and_leaves_a_model(straight):
    out, folder, screen = straight
    losses = [line["loss"] for line in lines_of(out)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    held_out = [line["held_out"]["text"] for line in read(out / "metrics.jsonl") if "held_out" in line]
    assert held_out[1]["loss"] < held_out[0]["loss"]
    assert "8 steps of 4 x 32 tokens" in screen
    lm = qwen2_jax.load(folder, dtype="float32")
    assert lm.generate(["The number"], max_new_tokens=4)[0].token_ids
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_continues_bit_for_bit(straight, corpus, tmp_path, monkeypatch):
    """Killed in step 6, when the checkpoint of step 3 was the last: losses, batches and weights as without a stop."""
    calls = iter(range(100))
    step = loop.Recorder.step

    def until(self, done, *rest):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, done, *rest)

    monkeypatch.setattr(loop.Recorder, "step", until)
    with pytest.raises(KeyboardInterrupt):
        run(pretrain(corpus, tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(loop, "Trainer", loop.Trainer)
    folder, screen = run(pretrain(corpus, tmp_path))
    assert "continuing after step 3" in screen
    assert told(tmp_path) == told(straight[0])
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (straight[1] / name).read_bytes()


def test_another_model_or_order_of_data_is_refused(straight, corpus):
    out = straight[0]
    for changes, name in (({"seed": 1}, "run.seed: 0 -> 1"), ({"rows": 8}, "run.rows: 4 -> 8")):
        with pytest.raises(UserError, match=f"{name}.*another --out or --no-resume"):
            run(pretrain(corpus, out, **changes))
    wider = dataclasses.replace(MODEL, intermediate_size=64)
    with pytest.raises(UserError, match="intermediate_size: 48 -> 64"):
        run(pretrain(corpus, out, model=wider))


def test_changed_settings_are_told(straight, corpus, tmp_path):
    """A new learning rate goes on from the checkpoint, with a line that says so; a changed text does not go on."""
    shutil.copytree(straight[0], tmp_path / "out")
    optim = Optim(lr=2e-3, schedule="wsd", warmup=2)
    _, screen = run(pretrain(corpus, tmp_path / "out", optim=optim, ema=0.25, log=Logging(every=3)))
    said = [line for line in screen.splitlines() if "changed since the checkpoint" in line]
    assert said == [  # in the order of the fields; log is no matter of the training
        "warning: changed since the checkpoint: optim.lr 0.01 -> 0.002",
        "warning: changed since the checkpoint: ema 0.5 -> 0.25",
    ]
    about = json.loads((tmp_path / "out" / "checkpoints" / "8" / "about" / "data.json").read_text())["about"]
    assert about["settings"]["optim"]["lr"] == 1e-2
    assert about["settings"]["data"]["sources"][0]["path"] == str(corpus / "text.jsonl")

    longer = tmp_path / "text.jsonl"
    longer.write_text((corpus / "text.jsonl").read_text("utf-8") + json.dumps({"text": "One more."}) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"this run\): the data of {longer} has changed, or the tokenizer has\. Give"):
        run(pretrain(corpus, tmp_path / "out", data=Data(sources=(Source(path=str(longer)),))))


def test_a_finished_run_says_so(straight, corpus):
    """Its result is written again; a run that would have to go back is refused, and its result stays."""
    out, folder, _ = straight
    before = (folder / "model.safetensors").read_bytes()
    lines = lines_of(out)
    again, screen = run(pretrain(corpus, out))
    assert "this run is finished; nothing is trained: raise --steps, or start over with --no-resume" in screen
    assert again == folder and lines_of(out) == lines
    with pytest.raises(
        UserError, match=r"state after step 8, and this run has 5 steps: it cannot go back\. Raise --steps"
    ):
        run(pretrain(corpus, out, steps=5))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_export_leaves_the_old_one(straight, corpus, tmp_path, monkeypatch):
    shutil.copytree(straight[0], tmp_path / "out")
    before = (straight[1] / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_write_files", full)
    with pytest.raises(OSError, match="the disk became full"):
        run(pretrain(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == before


def test_starting_over_keeps_the_lines_with_their_checkpoints(straight, corpus, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    lines = (straight[0] / "metrics.jsonl").read_bytes()
    run(pretrain(corpus, tmp_path / "out", resume=False))
    assert (tmp_path / "out" / "checkpoints.old" / "metrics.jsonl").read_bytes() == lines
    assert told(tmp_path / "out") == told(straight[0])


def test_what_cannot_be_is_said_before_anything_is_computed(corpus, tmp_path):
    with pytest.raises(UserError, match="max_position_embeddings 64: shorten them"):
        run(pretrain(corpus, tmp_path, length=128))
    small = dataclasses.replace(MODEL, vocab_size=128)
    with pytest.raises(UserError, match="vocab_size 128; the tokenizer has ids up to 287"):
        run(pretrain(corpus, tmp_path, model=small))
    limited = Data(sources=(Source(path=str(corpus / "text.jsonl"), max_epochs=0.1),))
    with pytest.raises(UserError, match="max_epochs is 0.1"):
        run(pretrain(corpus, tmp_path, data=limited))


def test_a_run_tells_what_it_leaves_out(corpus, tmp_path):
    """An over-long row is dropped, and counted where the user sees it; sources of one name keep their scores apart."""
    (tmp_path / "a").mkdir()
    lines = [*(corpus / "text.jsonl").read_text("utf-8").splitlines()[:20], json.dumps({"text": "one two three " * 40})]
    (tmp_path / "a" / "text.jsonl").write_text("\n".join(lines), "utf-8")
    both = tuple(Source(path=str(folder / "text.jsonl")) for folder in (tmp_path / "a", corpus))
    config = pretrain(
        corpus, tmp_path / "out", data=Data(sources=both[:1], packing="best_fit"),
        evaluation=Evaluation(sources=both, batches=1),
    )  # fmt: skip
    _, screen = run(config)
    assert "of 21 records 1 dropped" in screen
    scores = [line["held_out"] for line in read(tmp_path / "out" / "metrics.jsonl") if "held_out" in line]
    assert set(scores[-1]) == {"text", str(corpus / "text.jsonl")}


def test_a_broken_line_is_named(corpus, tmp_path):
    good = (corpus / "chats.jsonl").read_text("utf-8").splitlines()
    good[6] = good[6][:-2]
    (tmp_path / "chats.jsonl").write_text("\n".join(good), "utf-8")
    with pytest.raises(UserError, match=r"chats.jsonl line 7: not valid JSON"):
        run(pretrain(corpus, tmp_path / "out", data=Data(sources=(Source(path=str(tmp_path / "chats.jsonl")),))))


def test_patience_ends_a_run_that_only_skips(corpus, tmp_path, straight):
    """Weights with a NaN: every step is skipped, and after three the run says so instead of going on."""
    source = checkpoint.locate(straight[1])
    params = checkpoint.load_params(source, dtype="float32")
    params["embed_VD"] = params["embed_VD"].at[5].set(np.nan)
    checkpoint.save_hf(tmp_path / "bad", MODEL, params, tokenizer_files_from=source)
    config = pretrain(
        corpus, tmp_path / "out", model=None, tokenizer=None, start=Start(checkpoint=str(tmp_path / "bad")),
        guard=Guard(patience=3),
    )  # fmt: skip
    with pytest.raises(UserError, match="3 steps in a row were skipped, the last is step 3.*No checkpoint was written"):
        run(config)
    assert {line["loss"] for line in lines_of(tmp_path / "out")} <= {None}


def sft(corpus, straight, out, **changes):
    return Sft(
        **{
            "start": Start(checkpoint=str(straight[1])),
            "data": Data(sources=(Source(path=str(corpus / "chats.jsonl")),), packing="best_fit"),
            "rows": 2,
            "length": 64,
            "epochs": 2,
            "optim": Optim(lr=1e-2, schedule="linear"),
            "dtype": "float32",
            "remat": None,
            "out": out,
        }
        | changes
    )


def test_fine_tuning_makes_a_chat_model(corpus, straight, tmp_path):
    """Steps follow from epochs and packed rows; the result ends its answers at <|im_end|>."""
    folder, screen = run(sft(corpus, straight, tmp_path))
    rows = int(screen.split(" steps of")[0].split()[-1])
    assert rows >= 2
    lm = qwen2_jax.load(folder, dtype="float32")
    assert lm.is_chat
    assert lm.config.eos_ids == (lm.tokenizer.token_id("<|im_end|>"),)
    assert 1 <= len(lm.chat([{"role": "user", "content": "after 3"}], max_new_tokens=4).token_ids) <= 4


@pytest.mark.parametrize("base", ["bfloat16", *slow("int8", "int4")])
def test_lora_leaves_the_weights_alone(base, corpus, straight, tmp_path):
    """The folder that is told and returned is one that was written. Other weights under the adapters are refused."""
    config = sft(
        corpus,
        straight,
        tmp_path,
        lora=Lora(rank=4, alpha=8.0),
        lora_base=base,
        dtype="bfloat16",
        export_dtype="float32",
    )
    folder, screen = run(config)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    losses = [line["loss"] for line in lines_of(tmp_path)]
    assert all(np.isfinite(losses))
    assert (tmp_path / "hf").exists() == (base == "bfloat16")
    assert folder == tmp_path / ("hf" if base == "bfloat16" else "adapter") and f"wrote {folder}" in screen
    if base == "bfloat16":  # what was trained is what is exported, beyond the base's own bits
        whole, low, before = (
            load_file(folder / file)
            for folder, file in (
                (tmp_path / "hf", "model.safetensors"),
                (tmp_path / "adapter", "adapter_model.safetensors"),
                (straight[1], "model.safetensors"),
            )
        )
        assert "rounded to" not in screen
        for name in (name for name in low if name.endswith("lora_A.weight")):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = low[name.replace("lora_A", "lora_B")].astype(np.float64) @ low[name] * (8 / 4)
            base_weight = before[f"{module}.weight"].astype(jnp.bfloat16).astype(np.float64)  # as it was trained on
            got = whole[f"{module}.weight"]
            assert got.dtype == np.float32 and np.abs(change).max() > 0
            np.testing.assert_allclose(got, base_weight + change, atol=1e-6)  # float32 of numbers below 2: 1.2e-7
    other = {"bfloat16": "float32", "int8": "bfloat16", "int4": "int8"}[base]
    with pytest.raises(UserError, match=r"weights below the adapters differ.*same start\.checkpoint and lora_base"):
        run(dataclasses.replace(config, lora_base=other, dtype="float32" if other == "float32" else "bfloat16"))
    if base != "bfloat16":
        (tmp_path / "hf").mkdir()
        assert f"warning: {tmp_path / 'hf'} is the result of an earlier run" in run(config)[1]


@pytest.mark.slow
def test_lora_goes_on_from_an_adapter(corpus, straight, tmp_path):
    """The second run's first loss is what the first one came to, and other settings than the folder's are refused."""
    lora = {"lora": Lora(rank=4, alpha=8.0), "lora_base": "float32"}
    first = sft(corpus, straight, tmp_path / "first", optim=Optim(lr=3e-2, schedule="constant"), **lora)
    screen = run(first)[1]
    assert re.search(r"rounded to bfloat16, \d+% of the adapted numbers are the base's own again", screen)
    start = dataclasses.replace(first.start, adapter=str(tmp_path / "first" / "adapter"))
    assert "was trained on" not in run(dataclasses.replace(first, start=start, out=tmp_path / "second"))[1]
    began, went_on = (lines_of(tmp_path / name)[0]["loss"] for name in ("first", "second"))
    assert went_on < began - 0.05
    other = dataclasses.replace(first, start=start, out=tmp_path / "third", lora=Lora(rank=8, alpha=8.0))
    with pytest.raises(UserError, match=r"adapter is of Lora\(rank=4.*asks for Lora\(rank=8"):
        run(other)
    with pytest.raises(UserError, match="together with lora"):
        dataclasses.replace(first, start=start, lora=None)


def test_weights_are_exported_on_the_way(corpus, tmp_path):
    """Folders of single steps, and an evaluation before the first step when asked for."""
    config = pretrain(corpus, tmp_path, checkpoints=Checkpointing(every_steps=None, export_every=4))
    run(dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, first=True)))
    assert sorted(path.name for path in tmp_path.glob("hf*")) == ["hf", "hf-4"]
    halfway, end = (qwen2_jax.load(tmp_path / name, dtype="float32") for name in ("hf-4", "hf"))
    ids = np.arange(16)[None]
    assert np.abs(halfway.logits(ids) - end.logits(ids)).max() > 1e-3
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl") if "held_out" in line] == [0, 4, 8]


@pytest.mark.slow
def test_evaluation_takes_no_more_rows_at_once_than_training(straight, corpus, tmp_path, monkeypatch):
    """The same scores, in micro-batches."""
    shapes, place = set(), Placing.__call__
    monkeypatch.setattr(
        Placing, "__call__", lambda self, batch: shapes.add(batch.tokens_BT.shape) or place(self, batch)
    )
    run(pretrain(corpus, tmp_path, accumulate=2))
    assert shapes == {(4, 32), (2, 32)}
    held_out = lambda out: next(line["held_out"]["text"] for line in read(out / "metrics.jsonl") if "held_out" in line)
    # After four steps whose gradients were float32 sums in another order.
    assert held_out(tmp_path)["loss"] == pytest.approx(held_out(straight[0])["loss"], rel=1e-5)


def test_who_asks_to_stop_waits_for_the_save_only(corpus, tmp_path, monkeypatch):
    """The request comes in step 4, in which an evaluation is due."""
    monkeypatch.setattr(loop.Preemption, "requested", lambda self, step: step == 4)
    folder, screen = run(pretrain(corpus, tmp_path))
    assert folder is None
    assert "stopped after step 4" in screen
    assert (tmp_path / "checkpoints" / "4").exists()
    assert not [line for line in read(tmp_path / "metrics.jsonl") if "held_out" in line]


def under_yarn(corpus, out):
    """64 tokens of a model for 32."""
    model = dataclasses.replace(MODEL, max_position_embeddings=32)
    bare = {"evaluation": Evaluation(), "ema": None}  # there is less to compile
    return pretrain(corpus, out, model=model, length=64, steps=1, long_context="yarn", **bare)


def assert_says_so(config):
    """It has the factor 2 that the weights got used to."""
    scaling = config.rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", 2.0, 32)


def test_the_config_of_a_model_trained_under_yarn_says_so(corpus, tmp_path):
    """It is what the export writes beside the weights."""
    config = under_yarn(corpus, tmp_path)
    assert_says_so(stage_of(config).result_config(prepare(config, Console(file=io.StringIO()))))


@pytest.mark.slow  # quick: the positions, test_rope.py
def test_a_model_trained_under_yarn_says_so(corpus, tmp_path):
    folder, _ = run(under_yarn(corpus, tmp_path))
    assert_says_so(checkpoint.read_config(checkpoint.locate(folder)))


def test_an_export_that_a_kill_prevented_is_made_up_for(corpus, tmp_path, monkeypatch):
    """Saved after step 4, and killed before the weights of step 4 were exported: the next start does it."""
    config = pretrain(corpus, tmp_path, checkpoints=Checkpointing(every_steps=4, export_every=4))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (tmp_path / "hf-4").exists()
    _, screen = run(config)
    assert "continuing after step 4" in screen
    assert sorted(path.name for path in tmp_path.glob("hf*")) == ["hf", "hf-4"]


def test_the_state_of_a_run_is_no_start(straight, corpus, tmp_path):
    state = straight[0] / "checkpoints" / "8"
    for given in (state, state / "state"):
        told = rf"{given} is the state of a training run.*give the model that it wrote: {straight[1]}"
        with pytest.raises(checkpoint.CheckpointError, match=told):
            run(sft(corpus, straight, tmp_path, start=Start(checkpoint=str(given))))


def test_the_same_command_is_not_one_that_starts_over(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Preemption, "requested", lambda self, step: True)
    assert "resume with the same command\n" in run(pretrain(corpus, tmp_path))[1]
    assert "resume with the same command without --no-resume\n" in run(pretrain(corpus, tmp_path, resume=False))[1]


def test_a_folder_serves_one_run_at_a_time(corpus, tmp_path):
    with (
        alone(tmp_path),
        pytest.raises(UserError, match=rf"{tmp_path.name} is in use by another run, process {os.getpid()} on .*--out"),
    ):
        run(pretrain(corpus, tmp_path))
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "tokenizer").exists()  # what the other run will put into its result
    with alone(tmp_path):  # free again
        pass
    with pytest.MonkeyPatch.context() as patch:  # as on Windows
        patch.setattr(lock, "fcntl", None)
        with alone(tmp_path), alone(tmp_path):
            pass


def test_a_dry_run_prints_and_writes_nothing(corpus, tmp_path):
    folder, screen = run(pretrain(corpus, tmp_path / "out", dry_run=True))
    assert folder is None
    assert "parameters" in screen
    assert "tokens in all" in screen
    assert "number" in screen.split("first row of the first batch")[1]
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow  # test_preemption.py hears the signals, and a stopped run goes on above
def test_ctrl_c_saves_and_the_same_command_goes_on(corpus, tmp_path):
    """The whole program, in a process of its own: exit code 0, a word of advice, and a run that ends as one piece.

    Ctrl-C raises SIGTERM inside it (test_preemption.py), so that both are seen to arrive.
    """
    file = config_file(corpus, tmp_path, "steps=100000")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # Where these tests run in the background, Ctrl-C is ignored, and so it would be in the process.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", heard + "runpy.run_path('train.py', run_name='__main__')", str(file)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 0, rest
    assert "resume with the same command" in rest
    done = max(line["step"] for line in lines_of(tmp_path / "out"))
    more = subprocess.run(
        [*command, "--steps", str(done + 2)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert more.returncode == 0, more.stderr
    assert f"continuing after step {done}" in more.stderr
    steps = [line["step"] for line in lines_of(tmp_path / "out")]
    assert steps == list(range(1, done + 3))


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(corpus, tmp_path):
    """SIGKILL while a checkpoint is written, between steps, and while the result is written."""
    file = config_file(corpus, tmp_path, "steps=60, checkpoints=Checkpointing(every_steps=5)")
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py"), "--work", str(tmp_path / "work"), "--kills"]
    command += ["3", "--command", f"{sys.executable} train.py {file}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 kills survived" in done.stdout
    for kind in ("saving", "stepping", "exporting"):
        assert f"while {kind}" in done.stdout


def test_kills_that_show_nothing_do_not_pass(tmp_path, monkeypatch):
    """A command that never gets anywhere, and kills that never left a half-written checkpoint."""
    path = ROOT / "benchmarks" / "kill_test.py"
    kill_test = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("kill_test", path))
    monkeypatch.setitem(sys.modules, "kill_test", kill_test)  # where its dataclass looks for its annotations
    spec.loader.exec_module(kill_test)
    monkeypatch.setattr(kill_test, "PATIENCE", 0.5)
    command = f"{sys.executable} -c 'import time; time.sleep(100)'"
    with pytest.raises(SystemExit, match="0.5 seconds the command did not get to its first step"):
        kill_test.main(["--work", str(tmp_path / "work"), "--command", command])
    assert "none of 20 kills left a half-written checkpoint" in kill_test.too_easy(20, 0)
    assert kill_test.too_easy(20, 1) == kill_test.too_easy(3, 0) == ""


@pytest.mark.slow  # test_meshes.py has gradients, test_checkpoints.py other meshes
def test_every_device_of_a_mesh_has_its_part(tmp_path):
    """Eight devices: the losses of one, and parameters and moments split as the declarations say.

    Their checkpoint is then continued on the one device of this process, where a run has no mesh.
    """
    program = """
import dataclasses, sys, jax, numpy as np
from rich.console import Console
from qwen2_jax.parallel import sharding
from qwen2_jax.train import step
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints
from test_step import RUN, random_batch
from tiny import random_params
import tiny
sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 128}
config = dataclasses.replace(tiny.CONFIGS["dense"], **sizes)
run = dataclasses.replace(RUN, model=config, rows=8, accumulate=2)
losses = []
for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2, expert=1)):
    trainer = step.Trainer(run, config, 20, mesh=mesh)
    state = trainer.init(random_params(config))
    values = []
    for seed in range(3):
        state, metrics = trainer.step(state, trainer.place(random_batch(rows=8, seed=seed)))
        values.append(float(metrics["loss"]))
    losses.append(values)
np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)  # float32 sums in another order, for three steps
leaf = state.params["embed_VD"]
assert leaf.sharding.shard_shape(leaf.shape) == (64, 24), leaf.sharding
moments = [x for path, x in jax.tree.leaves_with_path(state.optimizer) if "embed_VD" in str(path)]
assert moments and all(x.sharding == leaf.sharding for x in moments)
with Checkpoints(sys.argv[1], Checkpointing(), identity={}, console=Console()) as saved:
    saved.save(3, state)
print("equal", float(np.asarray(leaf).sum()))
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "train")]),
    }
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    word, total = done.stdout.split()
    assert word == "equal"
    model = dataclasses.replace(
        tiny.CONFIGS["dense"], num_attention_heads=4, num_key_value_heads=2, head_dim=12, vocab_size=128
    )
    config = pretrain(tmp_path, tmp_path, model=model, optim=Optim(lr=1e-2, schedule="constant", decay=0.0), ema=None)
    with Checkpoints(tmp_path, Checkpointing(), identity={}, console=Console()) as saved:
        found = saved.restore(step.Trainer(config, model, 20).abstract)
    assert found.step == 3
    assert float(np.asarray(found.state.params["embed_VD"]).sum()) == float(total)

# SPDX-License-Identifier: Apache-2.0
"""What a run writes, and that it replaces nothing that it reads. All of it is decided before the first step."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import qwen2_jax
from qwen2_jax import checkpoint
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction as Function
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.train import (
    Checkpointing,
    Grpo,
    Lora,
    OnlineMerging,
    Optim,
    RewardModel,
    Sft,
    Start,
    Upcycle,
    Upcycling,
    recipes,
)
from qwen2_jax.train.prepare import prepare
from qwen2_jax.train.result_folders import check_inputs_stay
from qwen2_jax.train.stage import stage_of

DEMO = Path(qwen2_jax.__file__).parent / "demo"
REPORTS = Path(__file__).parents[3] / "shared" / "data" / "reports"
TALK = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]
reports = pytest.mark.skipif(not REPORTS.exists(), reason="the reported folders are not beside this clone")


def sft(folder, out, chats, **changes):
    return Sft(
        **{
            "start": Start(checkpoint=str(folder)),
            "data": Data(sources=(Source(path=str(chats)),), packing="best_fit"),
            "rows": 1,
            "length": 128,
            "steps": 1,
            "out": out,
        }
        | changes
    )


def test_a_result_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^{tmp_path / 'file'} is a file and not a folder; give the path of a"):
            prepared(sft(DEMO, out, tmp_path / "chats.jsonl"))


def prepared(config):
    return prepare(config, Console(file=io.StringIO()))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder `own` with the demo in hf, hf-1000 and, as its adapter, in adapter; and two chats."""
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "hf-1000", "adapter", "adapter-1000"):
        shutil.copytree(DEMO, tmp_path / "own" / name, copy_function=os.symlink)
    Path("link").symlink_to("own/hf")
    Path("chats.jsonl").write_text(2 * (json.dumps({"messages": TALK}) + "\n"), "utf-8")
    return tmp_path


LORA = {"lora": Lora(rank=2), "lora_base": "bfloat16"}
EXPORTS = {"checkpoints": Checkpointing(export_every=500)}


@pytest.mark.parametrize(
    ("start", "changes", "said"),
    [
        ("own/hf", {}, "start.checkpoint is .*own/hf.* own/hf,"),
        ("./own/../own/hf", {}, "start.checkpoint"),
        ("link", {}, "start.checkpoint"),
        ("{absolute}/own/hf", {}, "start.checkpoint"),
        ("own/hf", LORA, "start.checkpoint"),
        ("own/hf-1000", EXPORTS, "start.checkpoint is .*own/hf-1000,"),
        ("own/hf-1000", EXPORTS | LORA, "start.checkpoint"),
        ("demo", {"adapter": "own/adapter"} | LORA, "start.adapter is own/adapter, .* own/adapter,"),
        ("demo", {"adapter": "own/adapter-1000"} | LORA | EXPORTS, "start.adapter"),
        ("demo", {"tokenizer": "own/hf"}, "tokenizer is own/hf"),
    ],
)
def test_a_run_whose_result_replaces_what_it_reads_is_refused(own, start, changes, said):
    changes = dict(changes)
    start = Start(checkpoint=start.format(absolute=own), adapter=changes.pop("adapter", None))
    config = sft("", Path("own"), "chats.jsonl", start=start, **changes)
    with pytest.raises(UserError, match=f"{said}.*another --out"):
        prepared(config)
    assert not (own / "own" / "tokens").exists()  # refused before the data is read
    if start.adapter is None and config.tokenizer is None:  # and not where the result goes elsewhere
        prepared(dataclasses.replace(config, out=Path("other")))


def test_other_models_that_a_run_reads_are_not_replaced_either(own):
    merging = Optim(lr=1e-4, merging=OnlineMerging(base="demo", sft="own/hf"))
    with pytest.raises(UserError, match=r"optim\.merging\.sft is own/hf"):
        check_inputs_stay(sft("demo", Path("own"), "chats.jsonl", optim=merging))
    grpo = Grpo(
        start=Start(checkpoint="demo"), data=PromptData(sources=("chats.jsonl",)), prompts=2, steps=1,
        optim=Optim(lr=1e-4), reward_model=RewardModel(checkpoint="link"), rewards=(Function(function="number"),),
        out=Path("own"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"reward_model\.checkpoint is link"):
        check_inputs_stay(grpo)
    experts = Upcycling(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    for resume in (True, False):
        with pytest.raises(UserError, match="checkpoint is .*own/hf"):
            recipes.run(Upcycle(checkpoint="own/hf", experts=experts, out=Path("own"), resume=resume))
    assert (own / "own" / "hf" / "config.json").samefile(DEMO / "config.json")


@pytest.mark.parametrize("start", ["own/hf-1000", "own/hf"])
def test_what_the_run_does_not_write_may_be_read(own, start):
    """A folder of another step where none is exported; the base of adapters that are not merged into one."""
    changes = {"lora": Lora(rank=2), "lora_base": "int8"} if start == "own/hf" else {}
    prepared(sft(start, Path("own"), "chats.jsonl", **changes))


def written(config):
    """(the small files of the result as a folder, config.json's end ids) of a run that makes no step."""
    job = prepared(config)
    job.write_small_files()
    return job.files.path, stage_of(config).result_config(job).eos_ids


@reports
def test_only_end_tokens_that_exist_are_written(tmp_path):
    case = REPORTS / "sft-eos-null"
    folder, ends = written(sft(case, tmp_path, case / "chats.jsonl"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2002]
    assert ends == (2002,)


@reports
def test_what_ends_an_answer_in_the_template_stays_the_end(tmp_path):
    case = REPORTS / "sft-eos-template"
    folder, ends = written(sft(case, tmp_path, case / "chats.jsonl"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2000]
    assert ends == (2000,)
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    talk = [*TALK, {"role": "user", "content": "Two?"}]
    before, after = (Tokenizer.from_folder(path).render_chat(talk) for path in (case, folder))
    assert after == before


def test_the_end_of_a_chatml_model_is_im_end(own):
    folder, ends = written(sft("demo", Path("out"), "chats.jsonl"))
    tokenizer = Tokenizer.from_folder(folder)
    end = tokenizer.token_id("<|im_end|>")
    assert ends == (end,) and tokenizer.eos_id == end
    stored = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stored == [end, tokenizer.token_id("<|endoftext|>")]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),  # nothing ends an answer
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}{{ eos_token }}", "<|im_end|>"),
    ],
)
def test_other_templates(own, template, ends):
    """Where no token ends an answer, and where the template has another use for eos_token, nothing is renamed."""
    model = own / "model"
    shutil.copytree(DEMO, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    Path("texts.jsonl").write_text('{"text": "One text."}\n')
    folder, found = written(sft(model, Path("out"), "texts.jsonl"))
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == settings["eos_token"]
    source = checkpoint.locate(str(model))
    if ends is None:
        assert found == checkpoint.read_config(source).eos_ids
        name = "generation_config.json"
        assert json.loads((folder / name).read_text()) == json.loads((model / name).read_text())
    else:
        assert found == (Tokenizer.from_folder(folder).token_id(ends),)


class OneFile(checkpoint.Source):
    """A checkpoint whose small files are inside one file, as in formats that have everything in one."""

    def small_files(self):
        return checkpoint.locate("demo").small_files()

    def read_bytes(self, name):
        return checkpoint.locate("demo").read_bytes(name)


def test_the_tokenizer_of_a_single_file_format(own, monkeypatch):
    """Training, data and upcycling read it from a folder of its small files: the path is no folder."""
    from qwen2_jax.checkpoint import sources
    from qwen2_jax.data import __main__ as data
    from qwen2_jax.train.upcycle.function_kept import sample_tokens

    Path("model.one").write_bytes(b"one file")
    source, locate = OneFile("hf", Path("model.one").absolute()), checkpoint.locate
    demo, config = Tokenizer.from_folder(DEMO), checkpoint.read_config(locate("demo"))
    found = lambda name: source if str(name) == "model.one" else locate(name)
    monkeypatch.setattr(sources, "locate", found)
    monkeypatch.setattr(checkpoint, "locate", found)
    assert data._tokenizer("model.one").vocabulary == demo.vocabulary
    assert sample_tokens(source, config).tolist() == sample_tokens(locate("demo"), config).tolist()
    job = prepared(sft("demo", Path("out"), "chats.jsonl", tokenizer="model.one"))
    assert job.tokenizer.vocabulary == demo.vocabulary
    job.write_small_files()
    assert (job.files.path / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()

# SPDX-License-Identifier: Apache-2.0
"""Whatever is left out of training or held-out data is counted and told, in the table and in a line."""

import io
import json
import types
from pathlib import Path

import pytest
from rich.console import Console

import qwen2_jax.demo
from qwen2_jax.data import __main__ as command
from qwen2_jax.data import left_out
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens.loader import open_data
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.train import dry_run
from qwen2_jax.train.loop import _print_left_out, _sources

REPORTS = Path(__file__).parents[3] / "shared" / "data" / "reports"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(qwen2_jax.demo.__file__).parent)


@pytest.fixture
def opened(tokenizer, tmp_path):
    def open_source(source: str | list, **given):
        path = REPORTS / source if isinstance(source, str) else tmp_path / "chats.jsonl"
        if isinstance(source, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in source))
        elif not path.exists():
            pytest.skip(f"{path} is not here")
        data = Data(sources=(Source(path=str(path)),), packing="best_fit", **given)
        return open_data(data, tokenizer, length=64, seed=0, cache=tmp_path / "cache")

    return open_source


def chat(*contents: str):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_chats_without_an_answer_are_left_out_and_counted(opened):
    loaded = opened("empty-answer/chats.jsonl")
    (found,) = loaded.report()
    assert (found["records"], found["empty"], found["untargeted"], found["documents"]) == (3, 2, 0, 1)
    (line,) = left_out.lines(loaded.report())
    assert line.endswith("chats.jsonl: of 3 records 2 empty")


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_between_others_is_context(opened, tokenizer, empty):
    (found,) = opened([chat("q", empty, "again", "a"), chat("q", empty, "again")]).report()
    assert (found["empty"], found["documents"]) == (1, 1)
    want = len(tokenizer.encode("a")) + 1
    assert found["targets"] == want
    alpaca = {"instruction": "q", "output": "a", "history": [["x", empty]]}
    assert opened([alpaca, alpaca | {"output": empty}]).report()[0]["targets"] == want
    (found,) = opened([{"prompt": "q", "completion": text} for text in (empty, "a")]).report()
    assert (found["empty"], found["targets"]) == (1, want)


def test_a_cut_that_leaves_no_answer_is_named(opened):
    file = "cut-leaves-no-answer/chats.jsonl"
    with pytest.raises(UserError, match=r"the first 64 tokens of none of the 3 documents hold a target .*longer rows$"):
        opened(file, too_long="cut")
    with pytest.raises(UserError, match=r"all 3 documents are longer than rows of 64; give longer rows$"):
        opened(file)
    with pytest.raises(UserError, match=r"all 1 documents are longer than rows of 64; .* rows, or too_long 'cut'$"):
        opened([chat("q", "word " * 100)])


def test_held_out_data_is_counted_as_training_data_is(opened):
    data, held = opened("held-out-dropped/chats.jsonl"), opened("held-out-dropped/held.jsonl")
    screen = io.StringIO()
    job = types.SimpleNamespace(data=data, held_out={"held": held})
    _print_left_out(job, Console(file=screen, width=400))
    (line,) = screen.getvalue().splitlines()
    assert line.endswith("held.jsonl: of 6 records 5 dropped")
    trained, held_out = _sources(job)  # --dry-run's table
    assert held_out["source"].endswith("held.jsonl (held out)") and trained["source"].endswith("chats.jsonl")
    assert (held_out["records"], held_out["dropped"], trained["dropped"]) == (6, 5, 0)
    screen.seek(0)
    Console(file=screen, width=400).print(dry_run._table([trained, held_out], 400))
    assert "dropped" in screen.getvalue() and "held.jsonl (held out)" in screen.getvalue()


def test_responses_with_equal_scores_are_counted(opened):
    loaded = opened("ranked-ties/ranked.jsonl")
    (found,) = loaded.report()
    assert (found["responses"], found["tied"]) == (4, 2)
    (line,) = left_out.lines(loaded.report())
    assert "ranked.jsonl: of 4 responses 2 left out, whose score another of the same" in line
    assert "tied" not in opened([chat("q", "a")]).report()[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_record_is_shown_with_its_trained_tokens(tmp_path, capsys, number):
    records = [
        {"system": "Be brief.", "messages": [*chat("q", "a", "again", "")["messages"]]},
        {"prompt": "q", "responses": ["good", "bad", "worse"]} | chat("q\x1b[2J", ""),
        {"prompt": "q", "chosen": "yes", "rejected": "no"} | chat("only asked"),
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["show", str(tmp_path / "chats.jsonl"), "--tokenizer", "demo", "--record", str(number)]
    assert command.main(given) == 0
    out = capsys.readouterr().out
    assert f"chats.jsonl line {number}, trained tokens >>like this<<:" in out and "\x1b" not in out
    if number == 1:
        assert "<|im_start|>assistant\n>>a<|im_end|><<" in out and " 2 of them trained" in out
    else:
        assert "nothing in it is trained" in out and " 0 of them trained" in out and ">>" not in out.split(":\n", 1)[1]
    assert command.main([*given[:-1], "4"]) == 2
    assert "--record is 4; " in capsys.readouterr().err


def test_responses_are_shown_one_by_one(tmp_path, capsys):
    (tmp_path / "ranked.jsonl").write_text(json.dumps({"prompt": "q", "responses": ["good", "bad", "worse"]}))
    assert command.main(["show", str(tmp_path / "ranked.jsonl"), "--tokenizer", "demo"]) == 0
    out = capsys.readouterr().out
    assert "--- rank 3: " in out and ">>good<|im_end|><<" in out and ">>worse<|im_end|><<" in out


def test_every_reason_is_a_column_of_the_table(opened):
    assert set(left_out.REASONS) <= opened([chat("q", "a")]).report()[0].keys()


def test_a_flag_that_leaves_no_target(opened):
    silent = chat("q", "a")
    silent["messages"][1]["loss"] = False
    (found,) = opened([silent, chat("q", "a")]).report()
    assert (found["untargeted"], found["documents"]) == (1, 1)

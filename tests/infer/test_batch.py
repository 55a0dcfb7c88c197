# SPDX-License-Identifier: Apache-2.0
"""Files of prompts: any interruption is survived, bad lines are named, foreign files are refused."""

import dataclasses
import json
import os
import types
from pathlib import Path

import pytest

from mutations import mutated_json
from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import batch
from qwen2_jax.infer.cli.multihost_batch import Share
from qwen2_jax.infer.lm import LM
from qwen2_jax.parallel import hosts
from tiny import random_params

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path, objects):
    path.write_text("".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects))


def answer(lm, source, output, **given):
    given = {"max_new_tokens": 4, **given}
    return batch.answer(lm, batch.Lines(source, output), given, raw=True)


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    prompts = [{"prompt": "p" * (n + 1), "id": f"n{n}"} for n in range(6)]
    write(source, prompts)
    return source, tmp_path / "out.jsonl"


def test_answers_in_order_and_goes_on_after_any_cut(lm, files):
    source, output = files
    assert answer(lm, source, output) == 0
    whole = output.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [r["id"] for r in records] == [f"n{n}" for n in range(6)]
    assert [r["line"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["text"] for r in records] == [
        g.text for g in lm.generate(["p" * (n + 1) for n in range(6)], max_new_tokens=4)
    ]

    def answers():
        return [
            {k: v for k, v in json.loads(line).items() if k != "timings"} for line in output.read_bytes().splitlines()
        ]

    want = answers()
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[2] + 7, ends[4] - 1, len(whole)):
        output.write_bytes(whole[:cut])
        assert answer(lm, source, output) == 0
        assert answers() == want


def test_bad_lines_are_named_and_the_others_answered(lm, files, capsys):
    source, output = files
    bad = [
        "{not json", "[1]", {"prompt": "a", "messages": []}, {"prompt": ""}, {"prompt": "a", "temperature": -1},
        {"prompt": "a", "temprature": 1}, {"messages": [{"role": "robot", "content": "x"}]}, {"prompt": [1, 9999]},
        {"prompt": "x" * 5000}, {"messages": "hello"}, {"prompt": [{"role": "user", "content": "x"}]}, {"prompt": 3},
    ]  # fmt: skip
    write(source, [{"prompt": "good"}, *bad, "", {"prompt": [104, 105]}])
    for run in range(2):
        assert answer(lm, source, output) == 1
        errors = capsys.readouterr().err
        assert all(f"line {n} of" in errors for n in range(2, 2 + len(bad))), run
        lines = [json.loads(line)["line"] for line in output.read_text().splitlines()]
        assert lines == [1, len(bad) + 3]


def test_lines_bring_their_own_settings(lm, files):
    source, output = files
    write(
        source, [{"prompt": "a", "max_new_tokens": 2}, {"prompt": "a"}, {"prompt": "a", "temperature": 2.0, "seed": 5}]
    )
    answer(lm, source, output, max_new_tokens=9, ignore_eos=True)
    short, long, drawn = (json.loads(line)["token_ids"] for line in output.read_text().splitlines())
    assert (len(short), len(long)) == (2, 9)
    assert long[:2] == short
    assert drawn == lm.generate(["a"], max_new_tokens=9, temperature=2.0, seed=5, ignore_eos=True)[0].token_ids


def test_foreign_files_are_refused(files, tmp_path):
    source, output = files
    with pytest.raises(UserError, match="does not exist"):
        batch.Lines(tmp_path / "none.jsonl", output)
    with pytest.raises(UserError, match="same file"):
        batch.Lines(source, source)
    output.write_text('{"hello": 1}\n')
    with pytest.raises(UserError, match="line 1 of"):
        batch.Lines(source, output)
    assert output.read_text() == '{"hello": 1}\n'
    write(output, [{"line": 2, "digest": "of another line"}])
    with pytest.raises(UserError, match="another line 2"):
        batch.Lines(source, output)
    with pytest.raises(FileNotFoundError):
        batch.Lines(source, tmp_path / "no" / "folder" / "out.jsonl")


GOOD = [{"prompt": "ab", "id": n, "max_new_tokens": 2} for n in range(3)]
BAD = {  # each is line 4 of a file
    "deep": '{"prompt": "ab", "id": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "an integer of 400 digits": '{"prompt": "ab", "temperature": 1' + "0" * 400 + "}",
    "a large integer": '{"prompt": "ab", "temperature": 1' + "0" * 90 + "}",
    "half a surrogate pair": r'{"prompt": "ab", "id": "\ud800"}',
    "half a surrogate pair in a prompt": r'{"prompt": "a\udfff"}',
    "NaN as id": '{"prompt": "ab", "id": [NaN]}',
    "infinity as id": '{"prompt": "ab", "id": 1e999}',
    "ids of different depth": '{"prompt": [1, [2]]}',
    "an id beyond 64 bits": '{"prompt": [1, 100000000000000000000000000]}',
    "Latin-1": '{"prompt": "\udce9"}',
    "tools without messages": '{"prompt": "ab", "tools": []}',
    "no such tools": '{"messages": [{"role": "user", "content": "x"}], "tools": 3}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_one_bad_line_costs_itself_only(lm, files, capsys, line):
    source, output = files
    lines = [*map(json.dumps, GOOD), line, json.dumps({"prompt": "ab", "id": 3, "max_new_tokens": 2})]
    source.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert answer(lm, source, output) == 1
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert len(said) == 1
    assert said[0].startswith(f"error: line 4 of {source}: ")
    assert [json.loads(text)["id"] for text in output.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize("case", ["bigint", "deep", "surrogate-id"])
def test_recorded_bad_lines(lm, files, capsys, case):
    source = SHARED / "faults" / f"batch-{case}" / f"{case}.jsonl"
    if not source.exists():
        pytest.skip("the recorded cases lie outside the repository")
    assert answer(lm, source, files[1]) == 1
    assert f"error: line 4 of {source}: " in capsys.readouterr().err
    answered = [json.loads(line)["line"] for line in files[1].read_text().splitlines()]
    assert answered == [n for n, line in enumerate(source.read_bytes().splitlines(), 1) if line.strip() and n != 4]


def test_a_batch_that_does_not_fit_is_answered_row_by_row(lm, files, capsys, monkeypatch):
    def start(requests, *rest):
        if len(requests) > 1 or len(requests[0].tokens) == 4:
            raise UserError("no room\nfor it")
        return original(requests, *rest)

    original = lm.generator.start
    monkeypatch.setattr(lm.generator, "start", start)
    assert answer(lm, *files) == 1
    assert f"error: line 4 of {files[0]}: no room for it\n" in capsys.readouterr().err
    assert [json.loads(line)["line"] for line in files[1].read_text().splitlines()] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize(
    "foreign", [b"my notes", b'{"id": "n7", "key": "secret"}', b'{"id": "n9', b'{"line": 1}', b"\0" * 9000, b'{"x": ']
)
def test_a_file_that_is_not_ours_is_not_touched(lm, files, foreign, behind):
    """Also where it ends without a newline, as a half-written answer does, and behind complete answers."""
    source, output = files
    if behind:
        answer(lm, source, output)
        output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:behind]))
    before = output.read_bytes() if behind else b""
    output.write_bytes(before + foreign)
    with pytest.raises(UserError, match=f"line {behind + 1} of {output} is not an answer of an earlier run"):
        batch.Lines(source, output)
    with pytest.raises(UserError, match="is not an answer of an earlier run"):
        Share(source, output, hosts.Group(0, 1))
    assert output.read_bytes() == before + foreign


@pytest.fixture(scope="module")
def fuzzed(lm):
    """The tiny model with a context of 40 tokens: a mutated limit cannot make long answers."""
    config = dataclasses.replace(lm.config, max_position_embeddings=40)
    return LM(
        config, random_params(config, unroll=True), tokenizer=lm.tokenizer, dtype="float32", unroll=True, max_rows=8,
        long_context="off",
    )  # fmt: skip


def test_mutated_lines_are_answered_or_counted(fuzzed, tmp_path, capsys, mutations):
    """A file of mutated lines: each is answered once, in strict JSON, or named once."""
    full = {
        "id": "x", "max_new_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1,
        "repetition_penalty": 1.1, "stop": ["a", "b"], "ignore_eos": True,
    }  # fmt: skip
    kinds = [full | {"prompt": "ab"}, full | {"prompt": [1, 2]}, {"messages": [{"role": "user", "content": "a"}]}]
    lines = [mutated_json(seed, kinds[seed % 3]).replace(b"\n", b" ").strip() for seed in mutations]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    code = batch.answer(fuzzed, batch.Lines(source, output), {"max_new_tokens": 2}, raw=True)
    named = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: line ")]
    failed = [int(text.split()[2]) for text in named]

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    records = [json.loads(line, parse_constant=constant) for line in output.read_text().splitlines()]
    answered = [record["line"] for record in records]
    assert sorted(failed + answered) == [n for n, line in enumerate(lines, 1) if line]
    assert code == (1 if failed else 0)
    assert len(answered) > len(lines) / 20
    assert len(failed) > len(lines) / 10


def test_answers_to_a_device_or_a_pipe(tmp_path):
    """Which have no disk to wait for and nothing to resume."""
    write(tmp_path / "in.jsonl", [{"prompt": "p"}])
    batch.Lines(tmp_path / "in.jsonl", Path("/dev/null")).write([{"line": 1}])
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    batch.Lines(tmp_path / "in.jsonl", tmp_path / "pipe").write([{"line": 1}])
    assert os.read(reader, 100) == b'{"line": 1}\n'
    os.close(reader)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_its_own_takes_the_place_of_the_flag(role):
    asked = types.SimpleNamespace(
        stored_params=types.SimpleNamespace(limits_length=True), request=lambda prompt, tools, **given: prompt
    )
    own = [{"role": role, "content": "Mine."}, {"role": "user", "content": "q"}]
    given = {"max_new_tokens": 4}
    assert batch._request(asked, {"messages": own}, given, "The flag's.", False) == own
    assert batch._request(asked, {"messages": own[1:]}, given, "The flag's.", False)[0]["content"] == "The flag's."

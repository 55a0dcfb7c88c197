# SPDX-License-Identifier: Apache-2.0
"""Files of prompts: any interruption is survived, bad lines are named, foreign files are refused."""

import json

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import batch


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

# SPDX-License-Identifier: Apache-2.0
"""A file of prompts answered by several processes becomes the file that one process writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import batch
from qwen2_jax.infer.cli.multihost_batch import Share
from qwen2_jax.parallel import hosts

ROOT = Path(__file__).parents[2]


def answer(lm, lines, group=None):
    return batch.answer(lm, lines, {"max_new_tokens": 4}, raw=True, group=group)


def records(path):
    return [{k: v for k, v in json.loads(line).items() if k != "timings"} for line in path.read_text().splitlines()]


@pytest.fixture
def files(lm, tmp_path):
    """Input, output, and what one process answers."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": "p" * (n % 5 + 1), "id": n}) + "\n\n" for n in range(11)))
    answer(lm, batch.Lines(source, tmp_path / "alone.jsonl"))
    return source, tmp_path / "out.jsonl", records(tmp_path / "alone.jsonl")


def together(lm, source, output, processes, *, only=None):
    """One process after the other does its share, where nobody waits for anybody; `only` these are not killed before.

    Returns the exit code, None where somebody was killed.
    """
    groups = [hosts.Group(i, processes) for i in range(processes)]
    shares = [Share(source, output, group) for group in groups]
    codes = [answer(lm, s, s.group) for s in shares if only is None or s.group.process in only]
    return max([s.join(c) for s, c in reversed(list(zip(shares, codes, strict=True)))]) if only is None else None


@pytest.mark.parametrize("processes", [2, 3, 16])
def test_shares_are_joined_in_order(lm, files, processes):
    source, output, want = files
    assert together(lm, source, output, processes) == 0
    assert records(output) == want
    assert sorted(path.name for path in output.parent.iterdir()) == ["alone.jsonl", "in.jsonl", "out.jsonl"]
    assert together(lm, source, output, 2) == 0  # nothing is left to do
    assert records(output) == want


def test_an_interrupted_run_goes_on_with_other_processes(lm, files, monkeypatch):
    source, output, want = files
    together(lm, source, output, 3, only=[0, 2])
    assert not output.exists()
    part = output.with_name("out.jsonl.part-2-of-3")
    part.write_bytes(part.read_bytes()[:-5])  # the last answer was cut in half by a kill
    together(lm, source, output, 2, only=[1])
    asked, run = [], type(lm).run
    monkeypatch.setattr(type(lm), "run", lambda self, requests: asked.extend(requests) or run(self, requests))
    assert together(lm, source, output, 2) == 0
    assert records(output) == want
    assert 0 < len(asked) < 6  # the answers that were there were not computed again


def test_a_failed_line_is_everybodys_exit_code(lm, files):
    source, output, want = files
    with source.open("a") as file:
        file.write("not json\n")
    assert together(lm, source, output, 2) == 1
    assert records(output) == want


def test_parts_that_cannot_be_seen(lm, files):
    source, output, _ = files
    share, _ = [Share(source, output, hosts.Group(i, 2)) for i in range(2)]
    output.with_name("out.jsonl.part-1-of-2").unlink()  # as if it lay on the other host's disk
    with pytest.raises(UserError, match="process 0 does not see out.jsonl.part-1-of-2 .* all hosts share"):
        share.join(answer(lm, share, share.group))


def test_other_files_are_refused(lm, files, tmp_path):
    source, output, _ = files
    with pytest.raises(UserError, match="same file"):
        Share(source, source, hosts.Group(0, 2))
    output.write_text(json.dumps({"line": 1, "digest": "of another line"}) + "\n")
    with pytest.raises(UserError, match="another line 1"):
        Share(source, output, hosts.Group(0, 2))


@pytest.mark.slow  # above, the same shares are answered one after the other
def test_two_real_processes(tmp_path):
    """infer.py as it is started on two hosts, with the demo model; a single prompt is refused there."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Once upon {n}"}) + "\n" for n in range(5)) + "bad\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "infer.py", "--coordinator", address, "--processes", "2", "--process"]
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "3"]
    how = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(i), *files], **how) for i in range(2)]
    try:
        told = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1], told
    assert [record["line"] for record in records(tmp_path / "out.jsonl")] == [1, 2, 3, 4, 5]
    assert "3 answered" in told[0] and "answered" not in told[1]
    one = subprocess.run([*command, "1", "Once upon"], **how)
    assert one.returncode == 2
    assert "this is process 1 of 2 (known from flags)" in one.stderr

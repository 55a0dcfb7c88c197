# SPDX-License-Identifier: Apache-2.0
"""infer.py: answers on standard output, one line and exit code 2 for every mistake."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_jax.infer.cli import main

INFER = Path(__file__).parents[2] / "infer.py"


@pytest.fixture
def command(lm, monkeypatch, capsys):
    """Runs the command line on the tiny model, in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(main, "_load", lambda args: lm)

    def run(*argv, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        code = main.main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_prompt_is_answered_and_timed(lm, command):
    code, out, err = command("--raw", "Hello", "--max-new-tokens", "9")
    assert (code, out) == (0, lm.generate(["Hello"], max_new_tokens=9)[0].text + "\n")
    assert "first token after" in err
    assert "tokens/s" in err


def test_standard_input_and_chat_template(lm, command):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    want = lm.chat(messages, max_new_tokens=9).text + "\n"
    for argv in (["Hello"], ["-"], []):
        assert command(*argv, "--system", "Be brief.", "--max-new-tokens", "9", stdin="Hello\n")[:2] == (0, want)


def test_json_is_one_line(lm, command):
    argv = ["--json", "--raw", "Hello", "--max-new-tokens", "9", "--temperature", "1.5", "--seed", "4", "--stop", "q"]
    code, out, _ = command(*argv)
    answer = json.loads(out)
    want = lm.generate(["Hello"], max_new_tokens=9, temperature=1.5, seed=4, stop=["q"])[0]
    assert code == 0
    assert out.count("\n") == 1
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == (
        want.text,
        want.token_ids,
        want.finish_reason,
    )
    assert answer["prompt_tokens"] == 5
    assert answer["timings"]["total_s"] > 0


def test_a_file_of_prompts(lm, command, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\nbad\n{"messages": [{"role": "user", "content": "b"}]}\n')
    argv = ["--input", str(source), "--output", str(output), "--max-new-tokens", "3"]
    code, out, err = command(*argv)
    assert (code, out) == (1, "")
    assert "line 2 of" in err
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 3]
    source.write_text('{"prompt": "a"}\n')
    assert command("--input", str(source), "--max-new-tokens", "3")[1].count("\n") == 1


MISTAKES = {
    "negative temperature": ["x", "--temperature", "-1"],
    "top-p": ["x", "--top-p", "1.5"],
    "no such input": ["--input", "no_such_file.jsonl", "--output", "out.jsonl"],
    "prompt and input": ["x", "--input", str(INFER)],
    "output alone": ["x", "--output", "out.jsonl"],
    "empty prompt": [""],
    "no prompt for --json": ["-", "--json"],
    "no folder for output": ["--input", str(INFER), "--output", "no_such_folder/out.jsonl"],
    "too long": ["--raw", "x" * 5000],
    "system without chat": ["--raw", "--system", "y", "x"],
    "half a mesh": ["x", "--mesh", "tensor"],
    "an axis twice": ["x", "--mesh", "tensor=2,tensor=4"],
    "an axis of no device": ["x", "--mesh", "tensor=0"],
    "an axis of too many digits": ["x", "--mesh", "tensor=" + "9" * 5000],
}


@pytest.mark.parametrize("argv", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(command, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_full_disk_is_one_line(command, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here, the file that is always full")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = command("--input", str(tmp_path / "in.jsonl"), "--output", "/dev/full", "--max-new-tokens", "2")
    assert code == 2
    assert "No space left" in err.splitlines()[-1]


def test_unknown_checkpoint_and_help_as_a_stranger_runs_them():
    run = subprocess.run(
        [sys.executable, INFER, "--ckpt", "qwen2-8b", "hi"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run.stderr
    code = "import sys\nfrom qwen2_jax.infer.cli.main import parser\nprint(parser().format_help())\n"
    code += "assert 'jax' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "examples:" in shown
    assert all(flag in shown for flag in ("--ckpt", "--input", "--system", "--long-context", "--repetition-penalty"))

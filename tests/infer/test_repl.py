# SPDX-License-Identifier: Apache-2.0
"""The chat loop, with a scripted user and a scripted model."""

import json
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import repl


class Script:
    """Stands in for an LM: answers each conversation with its length, notes what it was asked."""

    def __init__(self, interrupt_at=None, fail_at=None):
        self.asked, self.interrupt_at, self.fail_at = [], interrupt_at, fail_at

    def stream(self, messages, **given):
        self.asked.append([(m["role"], m["content"]) for m in messages])
        self.given = given
        if len(self.asked) == self.fail_at:
            raise UserError("too long")
        stop_here = len(self.asked) == self.interrupt_at
        shown = []

        def pieces():
            for piece in ("answer ", str(len(messages))):
                if stop_here and shown:
                    raise KeyboardInterrupt
                shown.append(piece)
                yield piece

        class Stream:
            prompt_tokens, first_seconds, seconds = 1, 0.1, 0.2

            def __iter__(self):
                return pieces()

            @property
            def generation(self):
                return types.SimpleNamespace(text="".join(shown), token_ids=[1, 2], finish_reason="stop")

        return Stream()


def typed(*lines):
    """A `read` that types these lines; an exception class is raised instead, and the end is Ctrl-D."""
    left = iter(lines)

    def read(prompt):
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_a_conversation_remembers_and_resets(capsys):
    lm = Script()
    assert (
        repl.chat(
            lm, {}, system="Be brief.", read=typed("one", "  ", "two", "/reset", "three", "/nonsense", "/exit", "x")
        )
        == 0
    )
    assert lm.asked == [
        [("system", "Be brief."), ("user", "one")],
        [("system", "Be brief."), ("user", "one"), ("assistant", "answer 2"), ("user", "two")],
        [("system", "Be brief."), ("user", "three")],
    ]
    captured = capsys.readouterr()
    assert captured.out == "answer 2\nanswer 4\nanswer 2\n"
    assert "/nonsense" in captured.err


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    lm = Script(interrupt_at=1)
    assert repl.chat(lm, {}, read=typed("one", KeyboardInterrupt, "two")) == 0
    assert lm.asked[1] == [("user", "one"), ("assistant", "answer "), ("user", "two")]
    assert "stopped" in capsys.readouterr().err


def test_a_refused_message_is_not_remembered(capsys):
    lm = Script(fail_at=1)
    repl.chat(lm, {}, read=typed("too much", "two"))
    assert lm.asked[1] == [("user", "two")]
    assert "too long" in capsys.readouterr().err


def asked(*lines, **options):
    """What the model is asked when these lines are typed."""
    lm = Script()
    assert repl.chat(lm, {}, read=typed(*lines), **options) == 0
    return lm.asked


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (('"""one', "two", '  three"""'), "one\ntwo\n  three"),
        (('"""', "def f():", "    return 1", '"""'), "def f():\n    return 1"),
        (('"""one"""',), "one"),
        (('"""/reset"""',), " /reset"),
        (('say """this"""',), 'say """this"""'),
        (('"""half', KeyboardInterrupt, "whole"), "whole"),
    ],
)
def test_messages_of_several_lines(lines, message):
    assert asked(*lines) == [[("user", message)]]


def test_the_system_message_is_shown_set_and_removed(capsys):
    got = asked("/system", "/system Be brief.", "one", "/system", "/system off", "two", system="Be long.")
    assert [conversation[0] for conversation in got] == [("system", "Be brief."), ("user", "one")]
    said = capsys.readouterr().err
    assert "system message: Be long." in said
    assert said.count("system message: Be brief.") == 2
    assert "no system message" in said


def test_settings_are_shown_checked_and_taken_back(capsys):
    lm = Script()
    lines = [
        "/set temperature 0.7", "/set top_k 5", "/set ignore_eos true", "/set stop a b", "/set seed x", "/set top_p 7",
        "/set heat 1", "/set top_k", "/set max_new_tokens 9", "/set max_new_tokens default", "/set", "one",
    ]  # fmt: skip
    repl.chat(lm, {"max_new_tokens": 512}, read=typed(*lines))
    assert lm.given == {"max_new_tokens": 512, "temperature": 0.7, "top_k": 5, "ignore_eos": True, "stop": ("a b",)}
    said = capsys.readouterr().err
    for words in ("seed='x'; it must be", "top_p=7.0; it must be", "unknown setting heat", "give a value", "512"):
        assert words in said


def test_undo_takes_back_the_last_exchange(capsys):
    got = asked("one", "two", "/undo", "three", "/undo", "/undo", "/undo", "four")
    assert got[2] == [("user", "one"), ("assistant", "answer 1"), ("user", "three")]
    assert got[3] == [("user", "four")]
    assert "taken back: two" in (said := capsys.readouterr().err)
    assert "nothing to take back" in said


def test_a_saved_chat_is_a_line_of_input(tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    asked("/save", f"/save {file}", "one", f"/save {file}", f"/save {file}", f"/save {tmp_path}/no/x", system="S")
    roles = [(m["role"], m["content"]) for m in json.loads(file.read_text())["messages"]]
    assert roles == [("system", "S"), ("user", "one"), ("assistant", "answer 2")]
    said = capsys.readouterr().err
    for words in ("give the name", "no conversation to save", f"saved to {file}", "exists; choose", "No such file"):
        assert words in said


def test_help_names_every_command(capsys):
    asked("/help", "/nonsense")
    said = capsys.readouterr().err
    for name in ("/help", "/system", "/set", "/undo", "/reset", "/save", "/exit", '"""'):
        assert name in said
    assert "unknown command /nonsense; /help lists them" in said


def test_ctrl_c_twice_leaves():
    assert asked("one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "three")[-1][-1] == (
        "user",
        "two",
    )


def test_lines_are_recalled_in_the_next_chat(tmp_path):
    """In a terminal, where readline works; the second chat types "arrow up"."""
    pytest.importorskip("readline")
    result = tmp_path / "asked"
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/infer']\n"
        "from test_repl import Script\nfrom qwen2_jax.infer.cli import repl\n"
        f"lm = Script(); repl.chat(lm, {{}}); open({str(result)!r}, 'w').write(repr(lm.asked))\n"
    )
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "INPUTRC": os.devnull}
    for keys in (b"first line\n/exit\n", b"\x1b[A\x1b[A\n/exit\n"):
        ours, theirs = pty.openpty()
        os.write(ours, keys)
        subprocess.run(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment,
            cwd=Path(__file__).parents[2], timeout=60, check=True,
        )  # fmt: skip
        assert result.read_text() == "[[('user', 'first line')]]"
        result.unlink()
        os.close(ours)
        os.close(theirs)
    file = tmp_path / "qwen2_jax" / "chat_history"
    assert "first line" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_a_message_that_does_not_end_is_dropped(capsys):
    lm = Script()
    assert repl.chat(lm, {}, read=typed('"""one', "two", EOFError, "three")) == 0
    assert lm.asked == [[("user", "three")]]
    assert 'error: the message was dropped: it begins with """ and must end with """' in capsys.readouterr().err


def test_ctrl_c_before_the_answer_forgets_the_message(capsys):
    lm = Script()
    stream = lm.stream

    def interrupted(messages, **given):
        made = stream(messages, **given)
        if len(lm.asked) == 1:
            type(made).__iter__ = lambda self: typed(KeyboardInterrupt)("")
        return made

    lm.stream = interrupted
    assert repl.chat(lm, {}, read=typed("one", "two", "/exit")) == 0
    assert lm.asked[1] == [("user", "two")]
    assert "not remembered" in capsys.readouterr().err

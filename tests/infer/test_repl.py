# SPDX-License-Identifier: Apache-2.0
"""The chat loop, with a scripted user and a scripted model."""

import types

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import repl


class Script:
    """Stands in for an LM: answers each conversation with its length, notes what it was asked."""

    def __init__(self, interrupt_at=None, fail_at=None):
        self.asked, self.interrupt_at, self.fail_at = [], interrupt_at, fail_at

    def stream(self, messages, **given):
        self.asked.append([(m["role"], m["content"]) for m in messages])
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

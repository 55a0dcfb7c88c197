# SPDX-License-Identifier: Apache-2.0
"""A chat in the terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError, one_line
from qwen2_jax.infer.cli.prompts_and_answers import summary, to_json
from qwen2_jax.infer.engine.sampling_params import SETTABLE, checked

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM

HINT = "/help lists the commands, Ctrl-D leaves, Ctrl-C stops an answer"
HELP = '''\
/help              this list
/system            show the system message
/system TEXT       set it, for the whole conversation; /system off removes it
/set               show the sampling parameters
/set NAME VALUE    set one, such as: /set temperature 0.7; the value "default" goes back to how the chat began
/undo              take back your last message and its answer
/reset             start a new conversation
/save FILE         write the conversation into a new file, as a line of JSON that --input reads
/exit              leave; so do Ctrl-D, and Ctrl-C twice
"""                begins a message of several lines, which ends with """
Ctrl-C stops an answer or drops what you are typing. The arrow keys recall earlier lines.'''
QUOTES = '"""'
HISTORY_LINES = 1000


class Leave(Exception):
    """The user leaves."""


class ChatSession:
    """A conversation and its sampling parameters, changed by what the user types.

    given: the sampling parameters to begin with. read: like `input`.
    """

    def __init__(self, lm: "LM", given: Mapping[str, Any], system: str | None, read: Callable[[str], str]):
        self.lm, self.read = lm, read
        self.begun, self.given = dict(given), dict(given)
        self.system = system
        self.turns: list[dict[str, str]] = []  # of the user and the assistant, alternating

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, with the system message."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def run(self) -> int:
        """Reads messages and commands until the user leaves."""
        interrupted = False
        while True:
            try:
                text = self._typed()
            except UserError as error:
                _say(f"\nerror: {error}")
                continue
            except EOFError:
                _say("")
                return 0
            except KeyboardInterrupt:
                if interrupted:
                    _say("")
                    return 0
                interrupted = True
                _say("\nCtrl-C again leaves; /help lists the commands")
                continue
            interrupted = False
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._ask(text)
            except Leave:
                return 0
            except (UserError, OSError) as error:  # OSError: of /save
                _say(f"error: {one_line(error)}")

    def _typed(self) -> str:
        """One message or command: a line, or what stands between two triple quotes."""
        line = self.read("> ").strip()
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self.read("... "))
            except EOFError:
                raise UserError(
                    f"the message was dropped: it begins with {QUOTES} and must end with {QUOTES}"
                ) from None
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        text = "\n".join(lines).strip("\n")
        return text if not text.startswith("/") else f" {text}"  # a message, not a command

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                _say(HELP)
            case "/system":
                self._set_system(rest)
            case "/set" | "/settings":
                self._set(*rest.split(maxsplit=1))
            case "/undo":
                if not self.turns:
                    raise UserError("there is nothing to take back")
                _say(f"taken back: {self.turns[-2]['content']}")
                del self.turns[-2:]
            case "/reset":
                self.turns = []
                _say("a new conversation")
            case "/save":
                self._save(rest)
            case "/exit":
                raise Leave
            case _:
                raise UserError(f"unknown command {name}; /help lists them")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = None if text == "off" else text
        _say(f"system message: {self.system}" if self.system else "no system message; the chat template may have one")

    def _set(self, name: str = "", value: str = "") -> None:
        if not name:
            for name in SETTABLE:
                given = self.given.get(name)
                _say(f"{name:18} {'default' if given is None else given}")
            _say("default: of the checkpoint's generation_config.json, else as docs/inference.md says")
            return
        if name not in SETTABLE:
            raise UserError(f"unknown setting {name}; choose from {', '.join(SETTABLE)}")
        if not value:
            raise UserError(f"give a value, or /set {name} default")
        self.given[name] = self.begun.get(name) if value == "default" else checked(name, _value(name, value))
        given = self.given[name]
        _say(f"{name} = {'default' if given is None else given}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("give the name of a file, as in /save chat.jsonl")
        if not self.turns:
            raise UserError("there is no conversation to save yet")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(to_json({"messages": self.messages}) + "\n")
        except FileExistsError:
            raise UserError(f"{path} exists; choose another name") from None
        _say(f"saved to {path}")

    def _ask(self, text: str) -> None:
        """Prints the answer as it is generated, up to where Ctrl-C stops it. After an error nothing is remembered."""
        question = {"role": "user", "content": text}
        stream = self.lm.stream([*self.messages, question], **self.given)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
            _say(summary(stream))
        except KeyboardInterrupt:
            print(flush=True)
            if not stream.generation.text:
                _say("stopped before the answer began; the message is not remembered")
                return
            _say("stopped")
        except UserError:  # in the middle of the answer
            print(flush=True)
            raise
        self.turns += [question, {"role": "assistant", "content": stream.generation.text}]


def chat(lm: "LM", given: Mapping[str, Any], *, system: str | None = None, read: Callable[[str], str] = input) -> int:
    """Reads messages and answers them until the user leaves; returns the exit code. The rest as in ChatSession."""
    _say(HINT)
    with _history():
        return ChatSession(lm, given, system, read).run()


def _value(name: str, text: str) -> Any:
    """A setting as the user types it, in the type of the parameter where it can be."""
    kind: Any = type(SETTABLE[name].default)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return text if kind is tuple else kind(text)
    except ValueError:
        return text  # which is refused by name


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys edit the line and recall earlier ones, of earlier chats too, where Python has readline.

    They are kept in qwen2_jax/chat_history in the user's state folder ($XDG_STATE_HOME, usually ~/.local/state).
    """
    try:
        import readline
    except ImportError:
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()) / "qwen2_jax"
    file = folder / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        if sys.stdin.isatty():
            with contextlib.suppress(OSError):  # a home that is read-only: nothing is kept
                folder.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                readline.write_history_file(file)

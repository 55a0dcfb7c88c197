# SPDX-License-Identifier: Apache-2.0
"""The command line of infer.py. Arguments are checked before jax is imported, so mistakes are answered at once."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli.prompts_and_answers import phrase, record, summary
from qwen2_jax.infer.engine.sampling_params import Settings
from qwen2_jax.parallel import hosts

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM, Stream

CHAT_TOKENS, COMPLETION_TOKENS = 512, 128  # --max-new-tokens where neither the user nor the checkpoint says
GOES_ON = "The same command on all hosts goes on after the answers that are there"
SHOW_PREFILL = 1000  # prompt tokens from which a progress bar is worth its lines

EXAMPLES = """examples:
  python infer.py "Once upon"                                continue a text with the bundled demo model (no network)
  python infer.py --ckpt qwen2-0.5b "The capital of France"  download a base model once and continue a text
  python infer.py --ckpt qwen2-7b-instruct                   chat; /reset starts over, Ctrl-C stops an answer
  python infer.py --ckpt ./my-folder "Why is the sky blue?"  a local Hugging Face or Orbax folder
  cat report.txt | python infer.py --ckpt qwen2-7b-instruct --system "Summarise in one sentence."
  python infer.py --ckpt qwen2-7b-instruct --input prompts.jsonl --output answers.jsonl
        one JSON object per line: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, and if you
        like "id" and settings of its own ("temperature": 0.5, "max_new_tokens": 32, ...). Interrupted? Run it again.
        On several hosts at once, each answers its share, and --output is one file in the end (docs/pods.md).
  python infer.py --ckpt qwen2-72b --mesh tensor=8 "Hello"    over the eight devices of a node
  python infer.py --ckpt qwen2-72b --plan 8xh100             does it fit there, and how fast would it be: compiled for a
        machine that is not here, without the weights; also v5e-16, v5p-8, 2x8xh200, ... with --context and --batch
  python infer.py --json "Once upon" | python -m json.tool   text, token ids, finish reason and timings for a program

Answers go to standard output, everything else to standard error. Exit code 0: done, 1: some lines of --input failed,
2: the command or its files cannot be used, 75: another host is gone; of --plan 0: it fits, 1: it does not. Sampling
options not given come from the checkpoint's own defaults (generation_config.json).
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of infer.py."""
    p = argparse.ArgumentParser(
        prog="infer.py",
        usage="infer.py [PROMPT] [--ckpt CKPT] [options]",
        description="Ask a Qwen2 model: one prompt, a chat, or a file of prompts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue or to answer; - reads standard input")
    model = p.add_argument_group("model")
    model.add_argument(
        "--ckpt", default="demo", metavar="CKPT",
        help="a name (qwen2-7b-instruct), Hub id (Qwen/Qwen2-7B), local folder or gs://... (default: the bundled demo)",
    )  # fmt: skip
    model.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32", "int8"),
        help="of weights and cache; int8 rounds the weights: half the memory, and the fastest on a CPU",
    )
    model.add_argument(
        "--long-context", default="auto", choices=("auto", "off", "yarn", "dca"),
        help="beyond the trained length: what the checkpoint says (auto), nothing, YaRN, or Dual Chunk Attention",
    )  # fmt: skip
    model.add_argument(
        "--implementation", metavar="NAME",
        help='of the kernels: xla, tpu, gpu, or by operation, as in "attention=cudnn,decode=xla" (default: the best)',
    )  # fmt: skip
    model.add_argument(
        "--mesh", metavar="AXES",
        help="spread the model over all devices: tensor=8 (parts of heads and widths), tensor=4,context=2 (and of the "
        "cache's slots, for very long prompts), ...; -1: what is left (default: one device; for a plan as many parts "
        "of heads as there can be)",
    )  # fmt: skip
    text = p.add_argument_group("prompt and answer")
    text.add_argument("--system", metavar="TEXT", help="system message for a chat model")
    text.add_argument("--raw", action="store_true", help="no chat template: continue the text as it is")
    text.add_argument("--json", action="store_true", help="one line of JSON per answer, or for a plan, instead of text")
    text.add_argument("--input", metavar="FILE", type=Path, help="JSON lines with a prompt each; see the examples")
    text.add_argument(
        "--output", metavar="FILE", type=Path,
        help="where the answers to --input go; what is already there is kept and not computed again",
    )  # fmt: skip
    hosts.add_flags(p.add_argument_group("several hosts, for --input (found by itself on pods, GKE, SLURM, Open MPI)"))
    plan = p.add_argument_group("plan")
    plan.add_argument("--plan", metavar="MACHINE", help="compile for this machine and say what it needs; runs nothing")
    plan.add_argument(
        "--context", type=int, metavar="N", help="tokens of a row, prompt and answer (default: 4096 at most)"
    )
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="rows at a time (default: 1)")
    draw = p.add_argument_group("sampling")
    draw.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many tokens per answer")
    draw.add_argument(
        "--temperature", type=float, metavar="X", help="0: always the most likely token; 1: as the model is"
    )
    draw.add_argument(
        "--top-p", type=float, metavar="P", help="only the likeliest tokens that together reach this share"
    )
    draw.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (0: all)")
    draw.add_argument(
        "--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest"
    )
    draw.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens seen before become less likely"
    )
    draw.add_argument("--seed", type=int, metavar="N", help="same seed, same answer (default 0)")
    draw.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    draw.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")
    return p


def main(argv: Sequence[str] | None = None, *, plan: Callable[[argparse.Namespace], int] | None = None) -> int:
    """Runs infer.py and returns its exit code. Mistakes of the user become one line on standard error.

    plan: what --plan does, which belongs to a layer above this one.
    """
    args = parser().parse_args(argv)
    try:
        if args.plan is not None:
            return _planned(args, plan)
        return _run(args)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except UserError as error:  # before OSError: a checkpoint that is not there is both
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except RuntimeError as error:  # jax's class for it is not imported unless jax is
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(f"out of memory: {str(error).splitlines()[0]}")


def _fail(message: object) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def _planned(args: argparse.Namespace, plan: Callable[[argparse.Namespace], int] | None) -> int:
    if plan is None:
        raise UserError("--plan is for infer.py at the top of a clone")
    if args.prompt is not None or args.input is not None:
        raise UserError("--plan runs nothing: give no prompt and no --input, but --context and --batch")
    return plan(args)


def _run(args: argparse.Namespace) -> int:
    given = _settings(args)
    if args.mesh is not None:
        mesh_sizes(args.mesh)  # its error, before the model is loaded
    prompt = _prompt(args)
    launch = hosts.find(hosts.flags_of(args))
    if args.input is not None:
        return _answer_file(args, given, launch)
    if launch is not None:
        raise UserError(
            f"this is process {launch.process} of {launch.processes} (known from {launch.how}), and several hosts only "
            "answer files: give --input and --output, or --processes 1 for this process alone"
        )
    if prompt is None and args.json:
        raise UserError("--json needs a prompt or --input")
    lm = _load(args)
    given = _defaults(lm, given, chat=lm.is_chat and not args.raw)
    if prompt is None:
        if not lm.is_chat or args.raw:
            raise UserError(f'{args.ckpt} is not a chat model: give a prompt, for example: python infer.py "Once upon"')
        from qwen2_jax.infer.cli import repl

        return repl.chat(lm, given, system=args.system)
    asked = phrase(lm, prompt, system=args.system, raw=args.raw)
    stream = lm.stream(asked, **given)
    with _prefill_bar(stream):
        first = next(stream, "")
    if args.json:
        for _ in stream:
            pass
        print(json.dumps(record(stream), ensure_ascii=False))
        return 0
    print(first, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    if lm.tokenizer is None:
        print(*stream.generation.token_ids, end="")
    print(flush=True)
    _status(summary(stream))
    return 0


def _answer_file(args: argparse.Namespace, given: dict[str, Any], launch: hosts.Launch | None) -> int:
    from qwen2_jax.infer.cli import batch

    if launch is None:
        lines = batch.Lines(args.input, args.output)  # refuses what it cannot read or write before the model is loaded
        return batch.answer(_load(args), lines, given, _defaults, system=args.system, raw=args.raw)
    if args.output is None:
        raise UserError("several hosts need --output, on a disk that they share: each writes its answers beside it")
    from qwen2_jax.infer.cli import multihost_batch

    with hosts.joined(launch, goes_on=GOES_ON, preemption=False) as group:
        hosts.check(group, {name: value for name, value in vars(args).items() if name != "process"})
        share = multihost_batch.Share(args.input, args.output, group)
        lm = _load(args, group)
        code = batch.answer(lm, share, given, _defaults, system=args.system, raw=args.raw, group=group)
        return share.join(code)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    Settings.resolve(given, {})  # its error, before the model is loaded
    return given


def _defaults(lm: "LM", given: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    stored = lm.generation_config.get("max_new_tokens")
    return {"max_new_tokens": stored or (CHAT_TOKENS if chat else COMPLETION_TOKENS), **given}


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt from the arguments or from standard input; None for a chat."""
    if args.output is not None and args.input is None:
        raise UserError("--output is for the answers to --input; for one answer use: python infer.py ... > FILE")
    if args.input is not None:
        if args.prompt is not None:
            raise UserError("give a prompt or --input, not both")
        return None
    if args.prompt == "-" or (args.prompt is None and not sys.stdin.isatty()):
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error
        prompt = prompt.removesuffix("\n")
        if not prompt:
            raise UserError('standard input is empty; give a prompt, for example: python infer.py "Once upon"')
        return prompt
    if args.prompt == "":
        raise UserError("the prompt is empty; give at least one character")
    return args.prompt


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of axes from "tensor=8,fsdp=2"."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.strip().removeprefix("-").isdigit():
            raise UserError(f"--mesh is {text!r}; give sizes of axes, as in tensor=8,fsdp=2")
        sizes[axis.strip()] = int(size)
    return sizes


def _load(args: argparse.Namespace, group: hosts.Group | None = None) -> "LM":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter, read when jax is imported
    import jax

    _compilation_cache(jax)
    from qwen2_jax import checkpoint
    from qwen2_jax.infer import lm
    from qwen2_jax.model import flops
    from qwen2_jax.parallel import sharding

    source = checkpoint.locate(args.ckpt)
    if checkpoint.read_config(source).scores:  # before its weights are read
        raise UserError(
            f"{args.ckpt} is a reward model, which scores answers and writes none; in Python: "
            f"qwen2_jax.load({args.ckpt!r}).score([{{'role': 'user', 'content': ...}}, {{'role': 'assistant', "
            "'content': ...}])"
        )

    mesh = None
    if args.mesh is not None:
        own = jax.local_devices()  # of several hosts each has the whole model
        mesh = sharding.mesh_of(own, sharding.filled(mesh_sizes(args.mesh), len(own)))
    begin = time.perf_counter()
    with _bar(f"loading {args.ckpt}", unit="bytes") as progress:
        loaded = lm.load(
            source,
            dtype=args.dtype,
            mesh=mesh,
            long_context=args.long_context,
            implementation=args.implementation,
            progress=progress,
        )
    count = flops.parameters(loaded.config) / 1e6
    if group is None or group.first:
        _status(
            f"{args.ckpt}: {count:.1f} M parameters, {args.dtype}, {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}, loaded in {time.perf_counter() - begin:.1f} s"
        )
    return loaded


def _compilation_cache(jax) -> None:
    """Keeps compiled programs in the user's cache folder, so that only the first start compiles."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or it is read-only: every start compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _bar(title: str, *, unit: str) -> Iterator[Any]:
    """A progress bar on a terminal: yields a function of (done, total), or None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def _prefill_bar(stream: "Stream") -> Iterator[None]:
    if stream.prompt_tokens < SHOW_PREFILL:
        yield
        return
    with _bar("reading the prompt", unit="tokens") as progress:
        stream.progress = progress
        yield

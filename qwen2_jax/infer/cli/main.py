# SPDX-License-Identifier: Apache-2.0
"""The command line of infer.py. Arguments are checked before jax is imported, so errors in them appear at once."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_jax.errors import UserError, one_line
from qwen2_jax.infer.cli.prompts_and_answers import record, summary, to_json, to_prompt, with_answer_length
from qwen2_jax.infer.engine.sampling_params import SETTABLE, checked
from qwen2_jax.parallel import hosts
from qwen2_jax.parallel.mesh_flag import mesh_sizes

if TYPE_CHECKING:
    from qwen2_jax.infer.lm import LM, Stream

GOES_ON = "The same command on all hosts resumes after the answers that are complete"
SHOW_PREFILL = 1000  # prompt tokens from which the prefill has a progress bar

EXAMPLES = """examples:
  python infer.py "Once upon"                                continue a text with the bundled demo model (no network)
  python infer.py --ckpt qwen2-0.5b "The capital of France"  download a base model once and continue a text
  python infer.py --ckpt qwen2-7b-instruct                   chat; /help lists its commands, Ctrl-C stops an answer
  python infer.py --ckpt ./my-folder "Why is the sky blue?"  a local Hugging Face or Orbax folder, or a .gguf file
  python infer.py --ckpt qwen2-7b-instruct-gguf:q4_k_m "Hello"  a file of the official GGUF repository; also -gptq-int4
  cat report.txt | python infer.py --ckpt qwen2-7b-instruct --system "Summarise in one sentence."
  python infer.py --ckpt qwen2-7b-instruct --input prompts.jsonl --output answers.jsonl
        one JSON object per line: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, optionally
        with "id" and sampling parameters ("temperature": 0.5, "max_new_tokens": 32, ...). Run it again to resume.
        On several hosts, each answers a share of the lines, and --output is one file in the end (docs/pods.md).
  python infer.py --ckpt qwen2-72b --mesh tensor=8 "Hello"    over the eight devices of a node
  python infer.py --ckpt qwen2-72b --plan 8xh100             does it fit there, and how fast is it? Compiles for that
        machine, without the weights; also v5e-16, v5p-8, 2x8xh200, ... with --context and --batch
  python infer.py --json "Once upon" | python -m json.tool   text, token ids, finish reason and timings for a program

Answers go to standard output, everything else to standard error. Exit code 0: done, 1: some lines of --input failed,
2: the command or its files cannot be used, 75: another host was lost; of --plan 0: it fits, 1: it does not.
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
    p.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="text to continue, or a message to answer; - reads standard input"
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "--ckpt", default="demo", metavar="CKPT",
        help="a name (qwen2-7b-instruct), Hub id (Qwen/Qwen2-7B), folder, .gguf file or gs://... (default: the demo)",
    )  # fmt: skip
    model.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32", "int8", "int4"),
        help="of weights and cache; int8 rounds the weights: half the memory of bfloat16, fastest on a CPU; int4: a "
        "third of it, and a quantised file (GGUF, GPTQ, AWQ) stays as it is stored",
    )
    model.add_argument(
        "--cache-dtype", choices=("bfloat16", "float32", "int8"),
        help="of the cache of keys and values (default: as the activations); int8: half the memory of bfloat16",
    )  # fmt: skip
    model.add_argument(
        "--long-context", default="auto", choices=("auto", "off", "yarn", "dca"),
        help="positions beyond the trained length: config.json decides (auto), plain (off), YaRN, Dual Chunk Attention",
    )  # fmt: skip
    model.add_argument(
        "--implementation", metavar="NAME",
        help='kernels: xla, tpu, gpu, or one per operation, as in "attention=cudnn,decode=xla" (default: the fastest)',
    )  # fmt: skip
    model.add_argument(
        "--mesh", metavar="AXES",
        help="sizes of mesh axes, over all devices: tensor=8 divides heads and widths; tensor=4,context=2 also the "
        "cache's slots, for very long prompts; -1 takes the remaining devices (default: one device; for --plan the "
        "largest tensor that divides the model)",
    )  # fmt: skip
    text = p.add_argument_group("prompt and answer")
    text.add_argument("--system", metavar="TEXT", help="system message for a chat model")
    text.add_argument("--raw", action="store_true", help="no chat template: continue the text as it is")
    text.add_argument(
        "--json", action="store_true", help="print one line of JSON per answer, or for a plan, instead of text"
    )
    text.add_argument("--input", metavar="FILE", type=Path, help="file of prompts, JSON lines; see the examples")
    text.add_argument(
        "--output", metavar="FILE", type=Path,
        help="file for the answers to --input; answers already in it are kept and not computed again",
    )  # fmt: skip
    hosts.add_flags(p.add_argument_group("several hosts, for --input (detected on TPU pods, GKE, SLURM, Open MPI)"))
    plan = p.add_argument_group("plan")
    plan.add_argument(
        "--plan", metavar="MACHINE", help="compile for this machine and print memory and speed; runs nothing"
    )
    plan.add_argument(
        "--context", type=int, metavar="N", help="tokens per row, prompt and answer together (default: at most 4096)"
    )
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="rows per batch (default: 1)")
    sampling = p.add_argument_group("sampling (default: the checkpoint's generation_config.json, else greedy)")
    for name, field in SETTABLE.items():
        kind: Any = type(field.default)
        options: dict[str, Any] = {"type": kind, "metavar": field.metadata["metavar"]}
        if kind is bool:
            options = {"action": "store_true", "default": None}
        elif kind is tuple:
            options = {"action": "append", "metavar": field.metadata["metavar"]}
        sampling.add_argument(f"--{name.replace('_', '-')}", help=field.metadata["help"], **options)
    return p


def main(argv: Sequence[str] | None = None, *, plan: Callable[[argparse.Namespace], int] | None = None) -> int:
    """Runs infer.py and returns its exit code. An error that the user can fix is one line on standard error.

    plan: runs --plan; it belongs to a layer above this one.
    """
    args = parser().parse_args(argv)
    try:
        if args.plan is not None:
            return _planned(args, plan)
        return _run(args)
    except BrokenPipeError:  # the reader of the output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        return _fail(one_line(error))
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
    given = _sampling(args)
    if args.mesh is not None:
        mesh_sizes(args.mesh)  # raises before the model is loaded
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
    given = with_answer_length(lm, given, chat=lm.is_chat and not args.raw)
    if prompt is None:
        if not lm.is_chat or args.raw:
            raise UserError(f'{args.ckpt} is not a chat model: give a prompt, for example: python infer.py "Once upon"')
        from qwen2_jax.infer.cli import repl

        return repl.chat(lm, given, system=args.system)
    asked = to_prompt(lm, prompt, system=args.system, raw=args.raw)
    stream = lm.stream(asked, **given)
    with _prefill_bar(stream):
        first = next(stream, "")
    if args.json:
        for _ in stream:
            pass
        print(to_json(record(stream)))
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
        lines = batch.Lines(args.input, args.output)  # raises before the model is loaded
        return batch.answer(_load(args), lines, given, system=args.system, raw=args.raw)
    if args.output is None:
        raise UserError("several hosts need --output, on a disk that they share: each writes its answers next to it")
    from qwen2_jax.infer.cli import multihost_batch

    with hosts.joined(launch, goes_on=GOES_ON, preemption=False) as group:
        hosts.check(group, {name: value for name, value in vars(args).items() if name != "process"})
        share = multihost_batch.Share(args.input, args.output, group)
        lm = _load(args, group)
        code = batch.answer(lm, share, given, system=args.system, raw=args.raw, group=group)
        return share.join(code)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters given as flags, each checked before the model is loaded."""
    return {name: checked(name, value) for name in SETTABLE if (value := getattr(args, name)) is not None}


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


def _load(args: argparse.Namespace, group: hosts.Group | None = None) -> "LM":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's messages; read when jax is imported
    import jax

    _compilation_cache(jax)
    from qwen2_jax import checkpoint, ops
    from qwen2_jax.infer import lm
    from qwen2_jax.model import flops
    from qwen2_jax.parallel import sharding

    ops.check_implementation(args.implementation)
    source = checkpoint.locate(args.ckpt)
    config = checkpoint.read_config(source)
    if config.scores:  # before its weights are read
        raise UserError(
            f"{args.ckpt} is a reward model, which scores answers and writes none; in Python: "
            f"qwen2_jax.load({args.ckpt!r}).score([{{'role': 'user', 'content': ...}}, {{'role': 'assistant', "
            "'content': ...}])"
        )

    mesh = None
    if args.mesh is not None:
        local = jax.local_devices()  # each of several hosts has the whole model
        mesh = sharding.mesh_of(local, sharding.filled(mesh_sizes(args.mesh), len(local)))
    begin = time.perf_counter()
    with _bar(f"loading {args.ckpt}", in_bytes=True) as progress:
        loaded = lm.load_source(
            source,
            config,
            dtype=args.dtype,
            mesh=mesh,
            long_context=args.long_context,
            cache_dtype=args.cache_dtype,
            implementation=args.implementation,
            progress=progress,
        )
    count = flops.parameters(config) / 1e6
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


def _bar(title: str, *, in_bytes: bool) -> contextlib.AbstractContextManager[Any]:
    """console.progress_bar; where standard error is not a terminal, a context manager that gives None."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from qwen2_jax.console import progress_bar

    return progress_bar(title, in_bytes=in_bytes)


@contextlib.contextmanager
def _prefill_bar(stream: "Stream") -> Iterator[None]:
    if stream.prompt_tokens < SHOW_PREFILL:
        yield
        return
    with _bar("reading the prompt", in_bytes=False) as progress:
        stream.progress = progress
        yield

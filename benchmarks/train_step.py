# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of one training step on this machine's CPU: qwen2-jax, transformers + torch, and Tunix.

    python benchmarks/train_step.py --torch-python PYTHON --tunix-python PYTHON [--record]
    python benchmarks/train_step.py --compile-time     # seconds to compile the step of 2, 8, 24 and 80 tiny layers

Four layers of Qwen2-0.5B's width with its whole vocabulary, random weights, float32, AdamW with clipping, 2 x 512
tokens. Every measurement is a process of its own, one at a time: it makes the model, compiles, runs one step to warm
up, then the timed ones. Implementations alternate (A B C A B C), so that other load on the machine affects all alike;
quote ratios.

PYTHON is any Python with torch and transformers, or one with google-tunix; an implementation without its Python is
skipped. "Products alone" are the matrix products of the step and nothing else, in the same library: the arithmetic
limit. Memory is the peak of the resident set while stepping, less what it was after the imports.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "vocab_size": 151936, "heads": (14, 2)}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "heads": (4, 2)}
ROWS, LENGTH = 2, 512
LR, B1, B2, EPS, DECAY, CLIP = 1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0
DEPTHS = (2, 8, 24, 80)
ENGINES = {
    "ours": "qwen2_jax",
    "torch": "transformers + torch",
    "tunix": "Tunix",
    "limit": "products alone, jax",
    "torch_limit": "products alone, torch",
}


def fields(shape: dict) -> dict:
    """The model as a config.json."""
    return {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_attention_heads": shape["heads"][0],
        "num_key_value_heads": shape["heads"][1],
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def tokens(shape: dict):
    import numpy as np

    return np.random.default_rng(0).integers(1, shape["vocab_size"], (ROWS, LENGTH)).astype(np.int32)


def products(shape: dict) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every matrix product of one forward pass, attention's own left out (one percent)."""
    d, f, v, (n, k) = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], shape["heads"]
    layer = [(d, d), (d, d * k // n), (d, d * k // n), (d, d), (d, f), (d, f), (f, d)]
    return [(ROWS * LENGTH, i, o) for i, o in layer * shape["num_hidden_layers"] + [(d, v)]]


# Workers: each returns step() -> loss, blocking, and the versions that matter. "mark" is called after the imports.


def trainer(shape: dict, args: argparse.Namespace):
    """Our trainer and one batch."""
    import numpy as np

    from qwen2_jax.config import ModelConfig
    from qwen2_jax.data.spec import Data, Source
    from qwen2_jax.data.tokens.packing import Batch
    from qwen2_jax.train.config import Optim, Pretrain
    from qwen2_jax.train.step import Trainer

    config = ModelConfig(model_type="qwen2", rope_theta=1e6, **fields(shape))
    optim = Optim(lr=LR, schedule="constant", b1=B1, b2=B2, eps=EPS, decay=DECAY, clip=CLIP)
    run = Pretrain(
        model=config, tokenizer="demo", data=Data(sources=(Source(path="not read"),), packing="concat"), rows=ROWS,
        length=LENGTH, steps=1000, optim=optim, dtype="float32", remat=args.remat, accumulate=args.accumulate,
    )  # fmt: skip
    ids = tokens(shape)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0  # transformers and Tunix predict nothing from the last token either
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    batch = Batch(ids, np.roll(ids, -1, axis=1), weights, np.zeros_like(ids), positions)
    return Trainer(run, config, 1000), batch


def ours(shape: dict, args: argparse.Namespace, mark):
    import jax

    import qwen2_jax.train.step  # noqa: F401

    mark()
    maker, batch = trainer(shape, args)
    state = maker.init()

    def step() -> float:
        nonlocal state
        state, metrics = maker.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, f"jax {jax.__version__}"


def tunix(shape: dict, args: argparse.Namespace, mark):
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.sft import peft_trainer

    mark()
    n, k = shape["heads"]
    config = qwen2.ModelConfig(
        num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"], embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"], num_heads=n, head_dim=shape["hidden_size"] // n, num_kv_heads=k,
        rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=True, dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    decay = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)  # noqa: E731
    adamw = optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, mask=decay)
    options = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
    maker = peft_trainer.PeftTrainer(model, optax.chain(optax.clip_by_global_norm(CLIP), adamw), options)
    train_step, _ = maker.jit_train_and_eval_step(cache_nnx_graph=True)
    ids = tokens(shape)
    inputs = {
        "input_tokens": ids,
        "input_mask": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape),
        "attention_mask": np.broadcast_to(np.tri(LENGTH, dtype=bool), (ROWS, LENGTH, LENGTH)),
    }

    def step() -> float:
        loss, _, norm = train_step(inputs)
        jax.block_until_ready((loss, norm, nnx.state(model)))
        return float(loss)

    return step, f"google-tunix {version('google-tunix')} on jax {jax.__version__}"


def torch(shape: dict, args: argparse.Namespace, mark):
    import torch
    import transformers

    mark()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, use_cache=False, **fields(shape)
    )
    model = transformers.Qwen2ForCausalLM(config).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS, fused=True)
    ids = torch.from_numpy(tokens(shape)).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.item()

    return step, f"transformers {transformers.__version__}, torch {torch.__version__}"


def limit(shape: dict, args: argparse.Namespace, mark):
    """The step's products one by one: y = x w^T, and the gradients of x and of w."""
    import jax
    import jax.numpy as jnp

    mark()
    forms = [jax.jit(lambda a, b, s=s: jnp.einsum(s, a, b)) for s in ("mi,oi->mo", "mo,oi->mi", "mo,mi->oi")]
    arrays = {
        dims: [jnp.ones(s) for s in ((dims[0], dims[1]), (dims[2], dims[1]), (dims[0], dims[2]))]
        for dims in set(products(shape))
    }

    def step() -> float:
        for dims in products(shape):
            x, w, y = arrays[dims]
            for form, a, b in zip(forms, (x, y, y), (w, w, x), strict=True):
                form(a, b).block_until_ready()
        return 0.0

    return step, f"jax {jax.__version__}"


def torch_limit(shape: dict, args: argparse.Namespace, mark):
    import torch

    mark()
    torch.set_num_threads(os.cpu_count() or 1)
    arrays = {(m, i, o): (torch.ones(m, i), torch.ones(o, i), torch.ones(m, o)) for m, i, o in set(products(shape))}

    def step() -> float:
        for dims in products(shape):
            x, w, y = arrays[dims]
            x @ w.T, y @ w, y.T @ x
        return 0.0

    return step, f"torch {torch.__version__}"


def resident(field: str) -> float:
    """GiB of this process: VmRSS is now, VmHWM the peak. Linux only."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**20


def work(args: argparse.Namespace) -> None:
    """One measurement of one implementation; prints one line of JSON."""
    out = os.fdopen(os.dup(1), "w")  # libraries print to stdout; the result has a channel of its own
    os.dup2(2, 1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    imported = []
    step, versions = globals()[args.worker](
        TOY if args.tiny else SHAPE, args, lambda: imported.append(resident("VmRSS"))
    )
    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of initialisation and compilation
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak, (base,) = resident("VmHWM"), imported
    result = {
        "versions": versions,
        "loss": loss,
        "first": first,
        "seconds": seconds,
        "peak": peak,
        "added": peak - base,
    }
    print(json.dumps(result), file=out, flush=True)


def turn(engine: str, python: str, args: argparse.Namespace) -> dict | str:
    """A worker's measurements, or the last line of its error."""
    command = [python, str(Path(__file__).resolve()), "--worker", engine, "--steps", str(args.steps)]
    command += ["--accumulate", str(args.accumulate)] + ["--tiny"] * args.tiny
    command += ["--remat", args.remat] if args.remat else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> tuple[list[dict], str]:
    """(results per contender, Markdown)."""
    pythons = {"ours": sys.executable, "torch": args.torch_python, "tunix": args.tunix_python}
    pythons |= {"limit": sys.executable, "torch_limit": args.torch_python}
    turns: dict[str, list[dict]] = {}
    notes = []
    for engine, python in pythons.items():
        if python is None and engine != "torch_limit":
            notes.append(f"{ENGINES[engine]}: not measured, no --{engine}-python was given.")
    wanted = {engine: python for engine, python in pythons.items() if python is not None}
    for number in range(args.rounds):
        for engine, python in list(wanted.items()):
            result = turn(engine, python, args)
            if isinstance(result, str):
                notes.append(f"{ENGINES[engine]}: failed: {result}")
                del wanted[engine]
                continue
            turns.setdefault(engine, []).append(result)
            seconds = statistics.median(result["seconds"])
            line = f"{ROWS * LENGTH / seconds:7.1f} tok/s  {result['added']:5.2f} GiB  first loss {result['loss']:.3f}"
            print(f"round {number + 1}  {ENGINES[engine]:22} {line}", file=sys.stderr)
    rows = []
    for engine, results in turns.items():
        seconds = [s for r in results for s in r["seconds"]]
        rows.append(
            {
                "engine": ENGINES[engine],
                "tokens_per_second": ROWS * LENGTH / statistics.median(seconds),
                "slowest": ROWS * LENGTH / max(seconds),
                "fastest": ROWS * LENGTH / min(seconds),
                "first_step": statistics.median(r["first"] for r in results),
                "added_gib": max(r["added"] for r in results),
                "peak_gib": max(r["peak"] for r in results),
                "versions": results[0]["versions"],
            }
        )
    return rows, table(rows, notes, args)


def table(rows: list[dict], notes: list[str], args: argparse.Namespace) -> str:
    """Markdown, with ours divided by each row: above 1 in speed and below 1 in memory is better."""
    lines = [
        "| engine | tok/s | ours / it | first step s | memory GiB | ours / it | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    us = next((r for r in rows if r["engine"] == ENGINES["ours"]), None)
    for r in rows:
        speed = f"{us['tokens_per_second'] / r['tokens_per_second']:.2f}" if us else "-"
        bare = r["engine"].startswith("products")
        memory = "-" if bare else f"{r['added_gib']:.2f}"
        share = "-" if bare or not us else f"{us['added_gib'] / r['added_gib']:.2f}"
        span = f"{r['tokens_per_second']:.1f} ({r['slowest']:.1f}-{r['fastest']:.1f})"
        peak = "-" if bare else f"{r['peak_gib']:.2f}"
        lines.append(f"| {r['engine']} | {span} | {speed} | {r['first_step']:.1f} | {memory} | {share} | {peak} |")
    settings = f"accumulate {args.accumulate}, remat {args.remat}"
    versions = "; ".join(dict.fromkeys(r["versions"] for r in rows))
    note = (
        f"{ROWS} x {LENGTH} tokens, float32, AdamW; median (slowest-fastest) of {args.rounds} turns of {args.steps} "
        f"steps. Ours: {settings}. {cpu_model()}, {os.cpu_count()} logical cores; {versions}."
    )
    return "\n".join([*lines, "", note, *notes]) + "\n"


def cpu_model() -> str:
    """The processor's name, from the operating system."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def compile_times(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Seconds to trace and to compile our step, per number of layers."""
    import jax

    rows = []
    for depth in (DEPTHS[0], *DEPTHS):  # the first time warms the compiler up
        maker, batch = trainer(TOY | {"num_hidden_layers": depth}, args)
        start = time.perf_counter()
        lowered = maker.step.lower(maker.abstract, batch)
        middle = time.perf_counter()
        lowered.compile()
        rows.append({"layers": depth, "trace": middle - start, "compile": time.perf_counter() - middle})
    rows = rows[1:]
    lines = ["| layers | trace s | compile s |", "|---|---|---|"]
    lines += [f"| {r['layers']} | {r['trace']:.2f} | {r['compile']:.2f} |" for r in rows]
    return rows, "\n".join(
        [*lines, "", f"Tiny layers; {cpu_model()}, {os.cpu_count()} logical cores; jax {jax.__version__}."]
    ) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="a Python with torch and transformers")
    parser.add_argument("--tunix-python", help="a Python with google-tunix")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="ours: micro-batches of a step (default: 1)")
    parser.add_argument("--remat", help="ours: name of a rematerialisation policy (default: none)")
    parser.add_argument("--compile-time", action="store_true", help="measure compilation by depth instead")
    parser.add_argument("--tiny", action="store_true", help="a toy shape: checks the benchmark, measures nothing")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a table")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--worker", choices=list(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    measure = compile_times if args.compile_time else compare
    rows, text = measure(args)
    print(json.dumps(rows, indent=2) if args.json else text)
    if args.record:
        what = (
            "compiling a training step, by depth" if args.compile_time else "a training step, 4 layers of 0.5B's width"
        )
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as out:
            out.write(f"\n## {datetime.date.today()}: CPU, {what}\n\n{text}")


if __name__ == "__main__":
    main()

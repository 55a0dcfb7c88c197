# SPDX-License-Identifier: Apache-2.0
"""Speed of one prompt on this machine's CPU: qwen2-jax and transformers + torch, same weights, same run.

    python benchmarks/cpu_decode.py --folder FOLDER --torch-python PYTHON_WITH_TORCH [--record]

Makes a checkpoint with random weights once (Qwen2-0.5B's shape, bfloat16, seeded), then starts one process per
implementation. Each round runs all of them one after the other, so that other load on the machine affects all alike. A
measurement completes one prompt twice, greedily and ignoring end tokens, with 1 and with 1 + NEW tokens: the first time
is the prefill, the difference is decoding. PYTHON_WITH_TORCH is any Python with torch and transformers; without it only
qwen2-jax is measured.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEED = 20240606
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "heads": (4, 2)}
QWEN2_HALF_B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
    "heads": (14, 2),
}


def make_checkpoint(folder: Path, shape: dict) -> None:
    """Writes a Hugging Face folder with normal bfloat16 weights, once; an existing one is used as it is.

    Projections have variance 1 / fan-in, so that the hidden state depends on all of the prompt, not on its last token.
    """
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    d, f, v, (n, k) = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], shape["heads"]
    h = d // n
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (n * h, d),
        "self_attn.k_proj.weight": (k * h, d),
        "self_attn.v_proj.weight": (k * h, d),
        "self_attn.q_proj.bias": (n * h,),
        "self_attn.k_proj.bias": (k * h,),
        "self_attn.v_proj.bias": (k * h,),
        "self_attn.o_proj.weight": (d, n * h),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(shape["num_hidden_layers"]) for name, s in layer.items()}
    rng = np.random.default_rng(SEED)
    tensors = {}
    for name, dims in shapes.items():
        scale = dims[1] ** -0.5 if len(dims) == 2 and "embed" not in name else 0.02
        values = np.float32(scale) * rng.standard_normal(dims, np.float32) + np.float32("norm" in name)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "do_sample": False}))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "vocab_size": v,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": shape["num_hidden_layers"],
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # last: its presence means complete


def prompt(round_number: int, length: int, vocab: int) -> list[int]:
    """Token ids of one round: different every round, so that nothing can be answered from a cache of prompts."""
    step = 7919 + 2 * round_number  # any spread of ids will do; both sides must see the same
    return [1 + (round_number + i * step) % (vocab - 1) for i in range(length)]


def load_ours(folder: str, dtype: str):
    """Returns answer(ids, new) -> token ids, through the public API, and the versions that matter."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import qwen2_jax

    lm = qwen2_jax.load(folder, dtype=dtype)

    def answer(ids: list[int], new: int) -> list[int]:
        return list(lm.generate([ids], max_new_tokens=new, temperature=0.0, ignore_eos=True)[0].token_ids)

    return answer, f"jax {importlib.metadata.version('jax')}"


def load_torch(folder: str, dtype: str):
    """The same for transformers, as its documentation tells users to generate."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def answer(ids: list[int], new: int) -> list[int]:
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
        return out[0, len(ids) :].tolist()

    return answer, f"transformers {transformers.__version__}, torch {torch.__version__}"


def serve(engine: str, folder: str, dtype: str) -> None:
    """Worker: one line of JSON in (ids, new), one out (seconds and tokens). Ready once it has said so."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; replies keep a channel of their own
    os.dup2(2, 1)
    start = time.perf_counter()
    answer, versions = {"ours": load_ours, "torch": load_torch}[engine](folder, dtype)
    print(json.dumps({"versions": versions, "load_s": time.perf_counter() - start}), file=replies)
    for line in sys.stdin:
        task = json.loads(line)
        start = time.perf_counter()
        one = answer(task["ids"], 1)
        middle = time.perf_counter()
        many = answer(task["ids"], 1 + task["new"])
        end = time.perf_counter()
        if (len(one), len(many)) != (1, 1 + task["new"]):
            raise RuntimeError(f"asked for 1 and {1 + task['new']} tokens, got {len(one)} and {len(many)}")
        reply = {
            "prefill": len(task["ids"]) / (middle - start),
            "decode": task["new"] / (end - middle - (middle - start)),
            "tokens": many,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(json.dumps(reply), file=replies)


class Contender:
    """One worker process and its measurements."""

    def __init__(self, engine: str, dtype: str, python: str, folder: Path):
        self.engine, self.dtype = engine, dtype
        self.rounds: list[dict] = []
        command = [python, str(Path(__file__).resolve()), "--worker", engine, "--dtype", dtype, "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.reply()

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.engine} {self.dtype}: the worker stopped (its message is above)")
        return json.loads(line)

    def turn(self, ids: list[int], new: int) -> dict:
        print(json.dumps({"ids": ids, "new": new}), file=self.process.stdin, flush=True)
        return self.reply()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def median(self, field: str) -> float:
        return statistics.median(r[field] for r in self.rounds)


def cpu_model() -> str:
    """The processor's name, from the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def table(contenders: list[Contender], args: argparse.Namespace) -> str:
    """Markdown: medians over the rounds, the slowest and fastest round behind them, ratios to each torch row."""
    rivals = [c for c in contenders if c.engine == "torch"]
    head = ["engine", "dtype", "prefill tok/s", "decode tok/s"]
    head += [f"{what} / torch {c.dtype}" for c in rivals for what in ("prefill", "decode")] + ["peak GiB"]
    rows = []
    for c in contenders:
        row = ["qwen2_jax" if c.engine == "ours" else "transformers", c.dtype]
        for field in ("prefill", "decode"):
            values = [r[field] for r in c.rounds]
            row.append(f"{c.median(field):.1f} ({min(values):.1f}-{max(values):.1f})")
        row += [f"{c.median(x) / rival.median(x):.2f}" for rival in rivals for x in ("prefill", "decode")]
        rows.append([*row, f"{c.median('peak_gib'):.1f}"])
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    versions = "; ".join(dict.fromkeys(c.ready["versions"] for c in contenders))
    note = f"{args.prompt}-token prompt, {args.new} new tokens, batch 1; median (min-max) of {args.rounds} rounds. "
    note += f"{cpu_model()}, {os.cpu_count()} logical cores; Python {platform.python_version()}, {versions}."
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}\n"


def agreement(contenders: list[Contender]) -> str:
    """How many leading greedy tokens our float32 row shares with transformers' float32 row, per round."""
    rows = {c.engine: c.rounds for c in contenders if c.dtype == "float32"}
    if len(rows) < 2:
        return ""
    counts = []
    for a, b in zip(rows["ours"], rows["torch"], strict=True):
        pairs = zip(a["tokens"], b["tokens"], strict=True)
        counts.append(next((i for i, (x, y) in enumerate(pairs) if x != y), len(a["tokens"])))
    return f"Equal leading greedy tokens in float32, per round: {counts} of {len(rows['ours'][0]['tokens'])}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or will be made (default: a new one)")
    parser.add_argument("--torch-python", help="a Python with torch and transformers; absent: only ours is measured")
    parser.add_argument("--ours", default="bfloat16,int8,float32", help="dtypes of our rows (default: %(default)s)")
    parser.add_argument("--torch", default="bfloat16", help="dtypes of the transformers rows (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a toy shape: checks the benchmark, measures nothing")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.folder, args.dtype)
        return

    shape = TINY if args.tiny else QWEN2_HALF_B
    with tempfile.TemporaryDirectory(prefix="qwen2-jax-bench-") as fresh:
        folder = (args.folder or Path(fresh)).resolve()
        make_checkpoint(folder, shape)
        wanted = [("ours", dtype, sys.executable) for dtype in args.ours.split(",")]
        if args.torch_python:
            wanted += [("torch", dtype, args.torch_python) for dtype in args.torch.split(",")]
        contenders = [Contender(engine, dtype, python, folder) for engine, dtype, python in wanted]
        for number in range(args.rounds + 1):
            ids = prompt(number, args.prompt, shape["vocab_size"])
            for c in contenders:
                turn = c.turn(ids, args.new)
                label = f"round {number}" if number else "warm-up"  # compiles and first touches are not counted
                speeds = f"prefill {turn['prefill']:8.1f} tok/s   decode {turn['decode']:6.2f} tok/s"
                print(f"{label:8} {c.engine:6} {c.dtype:9} {speeds}", file=sys.stderr)
                if number:
                    c.rounds.append(turn)
        for c in contenders:
            c.close()
    shape_name = "toy shape" if args.tiny else "Qwen2-0.5B, random weights"
    text = table(contenders, args) + agreement(contenders)
    print(text)
    if args.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as out:
            out.write(f"\n## {datetime.date.today()}: CPU, one prompt, {shape_name}\n\n{text}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of loading one GGUF file: here, by transformers and by llama.cpp, in turns.

    python benchmarks/load_time.py model.gguf --python ../other/bin/python --rounds 3

--python: an interpreter with transformers, torch, gguf and llama_cpp; what it lacks is left out. Each load is a process
of its own; its time counts from after the imports until all weights are in memory, its peak includes everything.
"""

import argparse
import json
import statistics
import subprocess
import sys

PROGRAM = """
import json, os, resource, sys, time
file = sys.argv[1]
{imports}
began = time.monotonic()
{load}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": time.monotonic() - began, "peak": peak}}))
"""
OURS = "import jax\nfrom qwen2_jax import checkpoint\nfrom qwen2_jax.checkpoint import load_params, locate"
HF = "import torch, transformers"
LOADERS = {
    "qwen2-jax, bfloat16": (OURS, "jax.block_until_ready(load_params(locate(file), dtype='bfloat16', unroll=True))"),
    "qwen2-jax, float32": (OURS, "jax.block_until_ready(load_params(locate(file), dtype='float32', unroll=True))"),
    "transformers, bfloat16": (
        HF,
        "m = transformers.AutoModelForCausalLM.from_pretrained(os.path.dirname(os.path.abspath(file)), "
        "gguf_file=os.path.basename(file), dtype=torch.bfloat16)",
    ),
    "llama.cpp, in its own blocks": (
        "import llama_cpp",
        "m = llama_cpp.Llama(file, n_ctx=64, use_mmap=False, verbose=False)",
    ),
}


def measured(python: str, name: str, file: str) -> dict[str, float] | None:
    imports, load = LOADERS[name]
    run = subprocess.run(
        [python, "-c", PROGRAM.format(imports=imports, load=load), file], capture_output=True, text=True, check=False
    )
    if run.returncode:
        print(f"{name}: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file")
    parser.add_argument("--python", help="interpreter with the other programs")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for name in LOADERS:
            python = sys.executable if name.startswith("qwen2-jax") else args.python
            if python is not None and (one := measured(python, name, args.file)) is not None:
                found.setdefault(name, []).append(one)
    print("| loader | seconds (median) | relative | peak memory | relative |\n|---|---|---|---|---|")
    first = None
    for name, runs in found.items():
        seconds, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
        first = first or (seconds, peak)
        print(f"| {name} | {seconds:.1f} | {seconds / first[0]:.2f} | {peak / 2**30:.2f} GiB | {peak / first[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Completions of varying lengths by the demo model: rows that are refilled at once, against batch after batch.

    python benchmarks/rollouts.py --record

Both sample the same tokens from the same prompts, seeds, limits and weights, which is asserted; measurements alternate.
A batch lasts as long as its longest completion; limits are spread like an exponential, as lengths are.
"""

import argparse
import datetime
import itertools
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from cpu_decode import cpu_model

import qwen2_jax
from qwen2_jax.infer.engine.programs import Request
from qwen2_jax.infer.engine.rollouts import Rollouts
from qwen2_jax.infer.engine.sampling_params import SamplingParams

LENGTH = 512  # slots of a row


def requests_of(count: int, mean: int, seed: int) -> list[Request]:
    """Prompts of 16 to 64 random ids; limits are exponential with this mean, at most LENGTH - 64."""
    rng = np.random.default_rng(seed)
    limits = np.clip(rng.exponential(mean, count).astype(int), 1, LENGTH - 64)
    return [
        Request(
            tuple(rng.integers(0, 2000, rng.integers(16, 65)).tolist()),
            SamplingParams(max_new_tokens=int(limit), temperature=1.0, seed=number, ignore_eos=True),
        )
        for number, limit in enumerate(limits)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="completions at a time (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="in all (default: %(default)s)")
    parser.add_argument("--mean", type=int, default=64, help="mean tokens of a completion (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    args = parser.parse_args()

    lm = qwen2_jax.load("demo", dtype="float32")
    rollouts = Rollouts(lm.generator, rows=args.rows, length=LENGTH)

    def refilled(requests):
        completions, stats = rollouts(lm.generator.params, requests)
        return [c.tokens.tolist() for c in completions], stats

    def batches(requests):
        batched = itertools.batched(requests, args.rows)
        return [tokens for batch in batched for tokens, _, _ in lm.generator.run(batch)], None

    rates: dict[str, list[float]] = {"refilled": [], "batch after batch": []}
    for number in range(args.rounds + 1):
        requests, found = requests_of(args.prompts, args.mean, number), []
        for name, answer in (("refilled", refilled), ("batch after batch", batches)):
            start = time.perf_counter()
            tokens, stats = answer(requests)
            seconds = time.perf_counter() - start
            found.append(tokens)
            if number:  # the first measurement compiles
                rates[name].append(sum(map(len, tokens)) / seconds)
            idle = f", {stats.idle:.0%} of row-steps idle" if stats else ""
            print(f"turn {number}: {name}: {sum(map(len, tokens)) / seconds:.0f} tokens/s{idle}", flush=True)
        if found[0] != found[1]:
            raise SystemExit("the two drew different tokens")

    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    lines = ["| rows | tokens/s |", "|---|---|"]
    lines += [f"| {n} | {statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f}) |" for n, r in rates.items()]
    note = f"Refilled / batch after batch: {ratio:.2f} (median of the ratios). The demo model, float32, "
    note += f"{args.rows} rows, {args.prompts}\nprompts of 16 to 64 tokens, limits exponential with mean {args.mean}; "
    note += f"median (slowest-fastest) of {args.rounds} turns.\n"
    note += f"{cpu_model()}, {os.cpu_count()} logical cores; jax {jax.__version__}."
    text = "\n".join(lines) + f"\n\n{note}\n"
    print(text)
    if args.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as out:
            out.write(f"\n## {datetime.date.today()}: CPU, completions of varying lengths, rows refilled\n\n{text}")


if __name__ == "__main__":
    main()

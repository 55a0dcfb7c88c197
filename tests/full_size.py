# SPDX-License-Identifier: Apache-2.0
"""The full-size jobs: how each is planned, what of a plan is recorded, and the recording.

    python tests/full_size.py [NAME ...]      compiles the jobs (all, or those named) and records them
    python tests/full_size.py --tables        the tables of docs/scaling.md, from what is recorded
    python tests/full_size.py --shardings     where every parameter lies; compiles nothing

Recorded are memory, predicted seconds and every kind of collective along every mesh axis, in tests/golden/plans.json,
and the sharding of every parameter in tests/golden/shardings.txt: a change that adds an all-gather shows there.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLANS, SHARDINGS = ROOT / "tests/golden/plans.json", ROOT / "tests/golden/shardings.txt"
SMALL = 10**6  # bytes of a kind of collective in a run of the program; below, compilers do as they like
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """what: a file of configs/ or a checkpoint's name. quick: the smallest, compiled whenever its compiler is there."""

    what: str
    machine: str
    flags: tuple[str, ...] = ()
    trains: bool = True
    quick: bool = False

    @property
    def name(self) -> str:
        return " ".join((self.what, self.machine, *(flag for flag in self.flags)))

    @property
    def command(self) -> list[str]:
        start = ["train.py", f"configs/{self.what}.py"] if self.trains else ["infer.py", "--ckpt", self.what]
        return [sys.executable, *start, "--plan", self.machine, "--json", *self.flags]


JOBS = (
    Job("pretrain_0p5b", "h100", quick=True),
    Job("pretrain_7b", "8xh100"),
    Job("pretrain_7b", "v5e-64"),
    Job("long_32k_7b", "8xh100"),
    Job("pretrain_72b", "v5p-256"),
    Job("pretrain_72b", "8x8xh100"),
    Job("sft_72b", "v5p-512"),
    Job("dpo_7b", "8xh100"),
    Job("dpo_72b", "v5p-256"),
    Job("reward_7b", "8xh100"),
    Job("online_dpo_7b", "8xh100"),
    Job("grpo_7b", "8xh100"),
    Job("moe_57b_a14b", "v5p-256"),
    Job("moe_57b_a14b", "v5p-128"),
    Job("moe_57b_a14b", "8x8xh100", ("--mesh.expert", "8", "--accumulate", "8")),
    Job("qwen2-72b", "8xh100", trains=False),
    Job("qwen2-72b", "v5e-16", trains=False),
    Job("qwen2-72b", "v6e-8", trains=False),
    Job("qwen2-57b-a14b", "2xh100", trains=False),
    Job("qwen2.5-7b-instruct-1m", "h100", ("--context", "1010000"), trains=False),
)


def plan(job: Job) -> Mapping[str, Any]:
    """The plan's JSON, compiled in a process of its own."""
    done = subprocess.run(job.command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode > 1:
        raise RuntimeError(f"{job.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def recorded(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan is kept."""
    return {
        "mesh": {axis: size for axis, size in plan["mesh"].items() if size > 1},
        "settings": {name: plan["settings"][name] for name in ("context", "rows") if name in plan["settings"]},
        "gib": round(plan["needed_bytes"] / GIB, 2),
        "of": round(plan["limit_bytes"] / GIB, 1),
        "fits": plan["fits"],
        "programs": [
            {
                "name": program["name"],
                "flops": program["flops"],
                "seconds": [program["seconds"][which] for which in ("overlapped", "not_overlapped")],
                "bound": program["seconds"]["bound"],
                "rates": {
                    name: [program["rates"][name][which] for which in ("not_overlapped", "overlapped")]
                    for name in ("MFU", "tokens/s of a row")
                    if name in program["rates"]
                },
                "compiled_in": round(min(program["compile_seconds"], program["compile_cpu_seconds"])),
                "collectives": {
                    f"{row['kind']} over {' x '.join(row['axes'])}": row["bytes"]
                    for row in sorted(program["collectives"], key=lambda row: -row["bytes"])
                    if row["bytes"] >= SMALL
                },
            }
            for program in plan["programs"]
        ],
    }  # fmt: skip


def kept() -> dict[str, Any]:
    return json.loads(PLANS.read_text()) if PLANS.exists() else {}


def shardings() -> str:
    """A line for each parameter of each job: job, name in a Hugging Face file, shape, mesh axes of each dimension."""
    from jax.sharding import AbstractMesh

    from qwen2_jax import model
    from qwen2_jax.model import head_padding
    from qwen2_jax.parallel import sharding
    from qwen2_jax.plan import architecture, infer, machine
    from qwen2_jax.train import config_file
    from qwen2_jax.weights.params import leaves

    specs_of = functools.cache(lambda config: model.declare(config)[1])  # several jobs have one model
    lines = []
    for job in JOBS:
        devices = machine.parse(job.machine).devices
        if job.trains:
            path = ROOT / f"configs/{job.what}.py"
            run = config_file.load(path, list(job.flags))
            architect, sizes, rules = architecture.of_run(run, path), run.mesh.sizes(devices), sharding.RULES
            specs = specs_of(architect)
        else:
            architect = architecture.named(job.what)
            sizes, rules = infer.default_mesh(architect, devices), sharding.SERVING
            wider = head_padding.spread(architect, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
            specs = specs_of(architect if wider is None else wider.config)
        sizes = {axis: size for axis, size in sizes.items() if size > 1}
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        lines.append(f"{job.name}: {', '.join(f'{a}={n}' for a, n in sizes.items()) or 'one device'}")
        for _, spec in leaves(specs):
            places = sharding.spec(spec.axes, spec.shape, mesh, rules)
            split = [place if isinstance(place, str) else " x ".join(place) if place else "-" for place in places]
            lines.append(f"    {spec.hf} {list(spec.shape)}: {', '.join(split)}")
    return "\n".join(lines) + "\n"


def tables() -> str:
    """The Markdown rows of docs/scaling.md."""
    found = kept()
    training, inference = [], []
    for job in JOBS:
        if job.name not in found:
            continue
        one = found[job.name]
        mesh = ", ".join(f"{axis}={size}" for axis, size in one["mesh"].items()) or "-"
        memory = f"{one['gib']:.1f} ({one['of']})"
        programs = one["programs"]
        took = " + ".join(f"{program['compiled_in']}" for program in programs) + " s"
        if job.trains:
            step = programs[0]
            low, high = step["rates"]["MFU"]
            training.append(
                f"| {job.what} | {job.machine} | {mesh} | {memory} | {step['flops']:.2e} | {_moved(step)} | "
                f"{_span(*step['seconds'])}, {step['bound']} | {low:.0%} to {high:.0%} | {took} |"
            )
        else:
            prefill, decode = programs
            rate = _span(*decode["rates"]["tokens/s of a row"])
            inference.append(
                f"| {job.what} | {job.machine} | {mesh} | {one['settings']['context']:,} x {one['settings']['rows']} | "
                f"{memory} | {_span(*prefill['seconds'])} s | {rate} | {took} |"
            )
    return "\n".join(
        [
            "| config | machine | mesh | GiB per device (of) | FLOPs a step | messages a step | seconds a step | MFU | "
            "compiled in |",
            "|---|---|---|---|---|---|---|---|---|",
            *training,
            "",
            "| checkpoint, bfloat16 | machine | mesh | context x rows | GiB per device (of) | prefill of the context | "
            "tokens/s of a row, at most | compiled in |",
            "|---|---|---|---|---|---|---|---|",
            *inference,
        ]
    )


def _moved(program: Mapping[str, Any]) -> str:
    by_kind: dict[str, int] = {}
    for name, size in program["collectives"].items():
        kind = name.partition(" over ")[0]
        by_kind[kind] = by_kind.get(kind, 0) + size
    parts = [f"{kind} {size / 1e9:,.0f} GB" for kind, size in sorted(by_kind.items(), key=lambda pair: -pair[1])]
    return ", ".join(part for part in parts if not part.endswith(" 0 GB")) or "-"


def _span(low: float, high: float) -> str:
    shown = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (low, high)]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)


def main(arguments: Sequence[str]) -> None:
    """Records plans, or prints what follows from those recorded."""
    if arguments[:1] == ["--tables"]:
        print(tables())
        return
    SHARDINGS.write_text(shardings())
    if arguments[:1] == ["--shardings"]:
        return
    for job in JOBS:
        if not arguments or job.name in arguments or job.what in arguments:
            found = kept() | {job.name: recorded(plan(job))}
            found = {one.name: found[one.name] for one in JOBS if one.name in found}
            PLANS.write_text(json.dumps(found, indent=1) + "\n")
            print(job.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

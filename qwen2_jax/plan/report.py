# SPDX-License-Identifier: Apache-2.0
"""Plans as tables for people and as JSON for programs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen2_jax.plan.machine import Machine
from qwen2_jax.plan.program import Program
from qwen2_jax.plan.roofline import Seconds, Traffic

GIB = 2**30
TIGHT = 0.05  # of the memory: a margin below it is worth a warning


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a plan. within: temporaries whose size a formula knows, by name; the rest is activations and
    buffers. flops: of one run on all devices, as defined in model/flops.py. seconds: None where it did not compile.
    rates: what follows from both, by name: [where nothing overlaps, where everything does]."""

    program: Program
    within: Mapping[str, int]
    flops: float
    seconds: Seconds | None
    traffic: Sequence[Traffic]
    rates: Mapping[str, tuple[float, float]]
    times: float = 1  # runs of the program that flops and seconds are of: the chunks of a prompt


@dataclasses.dataclass(frozen=True)
class Plan:
    """The requirements of a job on a machine. settings: of the job, for the reader. advice: changes to try."""

    title: str
    machine: Machine
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]
    parts: Sequence[Part]
    advice: Sequence[str] = ()

    @property
    def limit(self) -> int:
        """Bytes that a program can have on one device."""
        return int(self.machine.chip.usable_gib * GIB)

    @property
    def needed(self) -> int:
        """Bytes of the program that needs the most."""
        return max(part.program.bytes for part in self.parts)

    @property
    def step_seconds(self) -> float:
        """Halfway between everything overlapping and nothing, of all programs; infinite where one did not compile."""
        times = [math.inf if p.seconds is None else (p.seconds.hidden + p.seconds.exposed) / 2 for p in self.parts]
        return sum(times)

    @property
    def fits(self) -> bool:
        return all(part.program.known for part in self.parts) and self.needed <= self.limit

    @property
    def verdict(self) -> str:
        """One line."""
        spare = self.limit - self.needed
        chip = f"{self.limit / GIB:.2f} GiB that a program can have on a {self.machine.chip.kind}"
        if not self.fits:
            refused = not all(part.program.known for part in self.parts)
            least = "at least " if refused else ""
            why = "the compiler refuses it: " if refused else ""
            over = f"{max(-spare, 0) / GIB:.2f} GiB more than the {chip}"
            return f"DOES NOT FIT: {why}{least}{self.needed / GIB:.2f} GiB per device, {over}"
        warning = ", which is tight: leave room for the input pipeline and for other versions of the compiler"
        return (
            f"fits: {self.needed / GIB:.2f} of the {chip}, {spare / GIB:.2f} GiB ({spare / self.limit:.0%}) to spare"
            + (warning if spare < TIGHT * self.limit else "")
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, with bytes per device, seconds and operations in full."""
        return {
            "title": self.title,
            "machine": {"name": self.machine.name, "devices": self.machine.devices, "chip": self.machine.chip.kind,
                        "shape": list(self.machine.shape), "slices": self.machine.slices},
            "mesh": dict(self.mesh),
            "settings": dict(self.settings),
            "fits": self.fits,
            "needed_bytes": self.needed,
            "limit_bytes": self.limit,
            "verdict": self.verdict,
            "advice": list(self.advice),
            "programs": [_part_as_json(part) for part in self.parts],
        }  # fmt: skip


def _part_as_json(part: Part) -> dict[str, Any]:
    program = part.program
    return {
        "name": program.name,
        "compiled": program.known,
        "bytes": bytes_by_kind(part),
        "total_bytes": program.bytes,
        "runs": part.times,
        "flops": part.flops,
        "seconds": None if part.seconds is None else dataclasses.asdict(part.seconds)
        | {"overlapped": part.seconds.hidden, "not_overlapped": part.seconds.exposed, "bound": part.seconds.bound},
        "rates": {name: {"not_overlapped": low, "overlapped": high} for name, (low, high) in part.rates.items()},
        "collectives": [dataclasses.asdict(row) for row in part.traffic],
        "lower_seconds": program.lower_seconds,
        "compile_seconds": program.compile_seconds,
        "compile_cpu_seconds": program.compile_cpu_seconds,
    }  # fmt: skip


def bytes_by_kind(part: Part) -> dict[str, int]:
    """Bytes of a program on a device by name; they add up to program.bytes."""
    program = part.program
    kinds = dict(program.arguments)
    if program.padding:
        kinds["padding of the arguments"] = program.padding
    within, left = {}, program.temporaries
    for name, size in part.within.items():
        within[name] = min(size, left)
        left -= within[name]
    kinds |= within
    kinds["activations and buffers"] = left
    if program.code:
        kinds["the program itself"] = program.code
    return kinds


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    console.print(f"[bold]{plan.title}[/bold]", highlight=False, soft_wrap=True)
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    console.print(f"on {plan.machine.name}: {plan.machine}; mesh {mesh}", highlight=False, soft_wrap=True)
    console.print(
        ", ".join(f"{name} {_value(value)}" for name, value in plan.settings.items()), highlight=False, soft_wrap=True
    )
    for part in plan.parts:
        _show_part(part, plan, console)
    console.print()
    console.print(plan.verdict, style="bold green" if plan.fits else "bold red", highlight=False, soft_wrap=True)
    for line in plan.advice:
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def _show_part(part: Part, plan: Plan, console: Console) -> None:
    program = part.program
    how = f"compiled in {program.compile_seconds:.0f} s" if program.known else "refused by the compiler"
    console.print(f"\n[bold]{program.name}[/bold] ({how})", highlight=False)
    table = _table("memory per device", "GiB", "of the chip")
    for name, size in bytes_by_kind(part).items():
        table.add_row(name, f"{size / GIB:.2f}", f"{size / plan.limit:.1%}")
    table.add_row("together", f"{program.bytes / GIB:.2f}", f"{program.bytes / plan.limit:.1%}", style="bold")
    console.print(table)
    if part.traffic:
        table = _table("collective", "axes", "devices", "times", "GB", "ms")
        for row in part.traffic:
            numbers = f"{row.devices}", f"{row.times:,}", f"{row.bytes / 1e9:.3g}", f"{row.seconds * 1e3:.3g}"
            table.add_row(row.kind, " x ".join(row.axes) or "-", *numbers)
        console.print(table)
    if part.seconds is not None:
        s = part.seconds
        runs = f"{part.times:,.0f} runs: " if part.times > 1 else ""
        console.print(
            f"{runs}{part.flops:.3g} FLOPs in all; on each device at least {_time(s.compute)} of arithmetic, "
            f"{_time(s.memory)} of memory traffic, {_time(s.links)} of messages: {s.bound} bounds it",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        span = f"{_time(s.hidden)} (everything overlaps) to {_time(s.exposed)} (nothing does)"
        console.print(f"predicted: {span}", highlight=False, soft_wrap=True)
        for name, (low, high) in part.rates.items():
            shown = f"{high:.3g}" if math.isclose(low, high, rel_tol=5e-3) else f"{low:.3g} to {high:.3g}"
            if name == "MFU":
                shown = f"{low:.1%} to {high:.1%}"
            console.print(f"  {name}: {shown}", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column == "axes" else "right", no_wrap=True)
    return table


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

# SPDX-License-Identifier: Apache-2.0
"""Which mesh, rematerialisation and micro-batches are the fastest among those that fit: estimated, then compiled."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model import decoder
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import architecture, machine
from qwen2_jax.plan.estimate import Estimate, Setting, estimate
from qwen2_jax.plan.report import GIB
from qwen2_jax.train.config import Mesh, Run

REMAT = ("full", "dots", None)
MOST_TENSOR = 16  # parts of heads and widths: beyond, sums of activations dominate
COMPILED = 3  # of the best ones


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting that is expected to fit."""

    run: Run
    estimate: Estimate

    @property
    def seconds(self) -> float:
        """Seconds that it is ranked by: the mean of complete overlap and none."""
        return (self.estimate.seconds.hidden + self.estimate.seconds.exposed) / 2

    @property
    def flags(self) -> str:
        """The flags of train.py for it."""
        mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(self.run.mesh).items())
        return f"{mesh} --remat {self.run.remat} --accumulate {self.run.accumulate}"

    def __str__(self) -> str:
        s = self.estimate.seconds
        return (
            f"{self.flags}: about {self.seconds:.3g} s a step, {self.estimate.bytes / GIB:.1f} GiB; {s.bound} bounds it"
        )


def search(run: Run, name: str, path: Path | None = None) -> list[Candidate]:
    """All settings of the run that are expected to fit the machine, the fastest first, by formula.

    Tried are meshes of fsdp, tensor and expert, three kinds of rematerialisation, and all numbers of micro-batches that
    divide the rows. Raises UserError where none fits.
    """
    where = machine.parse(name)
    config = architecture.of_run(run, path)
    specs = decoder.declare(config)[1]
    found = []
    smallest: tuple[float, str] = (float("inf"), "")
    for sizes in meshes(config, where.devices):
        changed = dataclasses.replace(run, mesh=Mesh(**sizes), accumulate=1)
        try:
            grid = machine.mesh_of(where, sizes)
            Setting(changed, config, specs, where, grid).held()
        except UserError:  # not a mesh of this torus, or a dimension that it does not divide
            continue
        rows, rest = divmod(run.rows, sharding.parts(sharding.axes_of("batch", grid), grid))
        if not rows or rest:
            continue
        pieces = [n for n in range(1, rows + 1) if rows % n == 0]
        for remat, accumulate in itertools.product(REMAT, pieces):
            changed = dataclasses.replace(run, mesh=Mesh(**sizes), remat=remat, accumulate=accumulate)
            candidate = Candidate(changed, estimate(Setting(changed, config, specs, where, grid)))
            smallest = min(smallest, (candidate.estimate.bytes, candidate.flags))
            if candidate.estimate.bytes <= where.chip.usable_gib * GIB:
                found.append(candidate)
    if not found:
        raise UserError(
            f"no mesh, rematerialisation or number of micro-batches fits {name}: the smallest needs about "
            f"{smallest[0] / GIB:.1f} GiB on each device of {where.chip.usable_gib} GiB ({smallest[1]}); take a larger "
            "machine, or fewer rows"
        )
    return sorted(found, key=lambda candidate: candidate.seconds)


def meshes(config: ModelConfig, devices: int) -> Iterator[dict[str, int]]:
    """Products of fsdp, tensor and expert that are `devices`."""
    experts = [n for n in _divisors(config.num_experts) if n <= devices] if config.num_experts else [1]
    for tensor, expert in itertools.product(_divisors(devices), experts):
        if tensor <= MOST_TENSOR and devices % (tensor * expert) == 0:
            yield Mesh(expert=expert, tensor=tensor).sizes(devices)


def _divisors(number: int) -> Sequence[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

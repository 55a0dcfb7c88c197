# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from XLA's text of it: kind, devices that take part, bytes, how often.

A collective inside a loop counts as often as the loop runs. The compilers hide collectives in several ways that all
count here once: asynchronous pairs (all-gather-start, all-gather-done), XLA:TPU's fusions that carry one collective
through a chain of steps, its all-reduce that keeps one part (a reduce-scatter), and computations called by others.

A program for several TPU slices is the program of one of them: its collectives name the partitions of a slice, counted
from 0, and what goes between slices is handed to the host (libtpu's "megascale" runtime) by a send and a recv, which
name the devices of all slices by their ids. There a sum over both is one inside every slice and one between slices.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BITS = {"pred": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+[a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_CALLERS = ("while(", "fusion(", "call(", "conditional(", "async-start(", "custom-call(")
_BETWEEN = "xla_megascale_runtime"  # the receiver of data for other slices
_SLICE = 100_000  # device ids of a slice begin at a multiple of it, where there are several


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program, as one device sees it.

    bytes: of the whole array that the devices of a group gather, reduce, scatter or exchange (all-gather: its result;
    the others: what one device puts in). The text of a ragged exchange has the arrays between which rows move, and not
    how many rows do: the smaller one stands for what a device puts in, its own share included. times: per run of the
    program. groups: partitions (positions in the mesh, counted through) that work together. pairs: (from, to) of a
    permutation, instead of groups.
    """

    kind: str
    bytes: int
    times: int
    groups: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...] = ()
    where: str = ""  # the operation in our program that it belongs to, where XLA kept the name

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def received(self) -> float:
        """Bytes that one device takes in, in all `times` together, when nothing is sent twice.

        Of n devices' data a device has its own part; an all-reduce is a reduce-scatter and an all-gather.
        """
        others = (self.group_size - 1) / self.group_size
        share = {"collective-permute": 1.0, "collective-broadcast": 1.0, "all-reduce": 2 * others}
        return self.bytes * share.get(self.kind, others) * self.times

    def axes(self, shape: Mapping[str, int]) -> tuple[str, ...]:
        """Axes of a mesh of this shape along which the devices of a group differ."""
        sizes = tuple(shape.values())
        first = self.pairs[:1] if self.pairs else self.groups[:1]
        members = self.pairs if self.pairs else first
        moving: set[int] = set()
        for group in members:
            at = np.array(np.unravel_index(np.array(group), sizes))
            moving |= {axis for axis in range(len(sizes)) if len(set(at[axis])) > 1}
        return tuple(name for i, name in enumerate(shape) if i in moving)


class _Call(NamedTuple):
    targets: tuple[str, ...]
    times: int
    branches: bool  # one of the targets runs, not all


@dataclasses.dataclass
class _Computation:
    collectives: list[tuple[Collective, str | None]]  # with the chain that it is a step of
    calls: list[_Call]


def collectives(text: str, ids: Sequence[int]) -> list[Collective]:
    """All collectives of a compiled module's text (`compiled.as_text()`), `times` filled in.

    ids: of the mesh's devices, in its order. A loop whose trip count is not known at compile time counts
    once: for a decoding loop, one token.
    """
    computations, entry = _parse(text, ids)
    return [found for found, _ in _walk(computations, entry, frozenset())]


def _walk(computations: Mapping[str, _Computation], name: str, inside: frozenset[str]) -> list:
    """(collective, chain) of a computation and everything that it calls; a chain counts once in its computation."""
    computation = computations.get(name)
    if computation is None or name in inside:
        return []
    found = list(computation.collectives)
    for call in computation.calls:
        parts = [_walk(computations, target, inside | {name}) for target in call.targets]
        if call.branches:
            parts = [max(parts, key=lambda part: sum(c.received for c, _ in part), default=[])]
        for part in parts:
            if call.times == 1:
                found += part
            else:  # a loop's body: what its chains are is settled inside
                found += [(dataclasses.replace(c, times=c.times * call.times), None) for c, _ in part]
    seen: set[str] = set()
    once = []
    for collective, chain in found:
        if chain is not None:
            if chain in seen:
                continue
            seen.add(chain)
        once.append((collective, chain))
    return once


def _parse(text: str, ids: Sequence[int]) -> tuple[dict[str, _Computation], str]:
    slices = _by_slice(ids)
    in_slice = len(next(iter(slices.values())))
    lines = text.splitlines()
    computations: dict[str, _Computation] = {}
    conditions: dict[str, list[str]] = {}
    entry, name = "", ""
    wanted = {match[1] for match in re.finditer(r"\bcondition=%?([\w.\-]+)", text)}
    for line in lines:
        if (header := _COMPUTATION.match(line)) is not None:
            name = header["name"]
            computations[name] = _Computation([], [])
            entry = name if header["entry"] else entry
        elif name in wanted:
            conditions.setdefault(name, []).append(line)
    name = ""
    for line in lines:
        if (header := _COMPUTATION.match(line)) is not None:
            name = header["name"]
            continue
        if not name or not any(word in line for word in (*KINDS, *_CALLERS, _BETWEEN)):
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        shape, opcode, attributes = _split(instruction["rest"])
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            if kind == "ragged-all-to-all":
                result = _result(shape, kind) if opcode.endswith("-start") else shape
                shape, opcode = min(_operand(text, attributes) or result, result, key=_size), kind
            computations[name].collectives.append(_collective(kind, opcode, shape, attributes, name, in_slice))
        elif _BETWEEN in attributes and (found := _between_slices(opcode, shape, attributes, ids, slices)) is not None:
            computations[name].collectives.append((found, None))
        elif opcode in {caller.removesuffix("(") for caller in _CALLERS}:
            computations[name].calls += _calls(opcode, attributes, conditions)
    return computations, entry


def _split(rest: str) -> tuple[str, str, str]:
    """ "SHAPE OPCODE(OPERANDS), ATTRIBUTES" as its shape, opcode, and everything behind the opcode."""
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    match = re.match(r"\s*([\w\-]+)\(", rest[end:])
    return (rest[:end], match[1], rest[end + match.end() :]) if match else (rest[:end], "", "")


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _collective(kind: str, opcode: str, shape: str, attributes: str, inside: str, devices: int):
    groups = _groups(attributes, devices)
    pairs: tuple[tuple[int, int], ...] = ()
    if kind == "collective-permute":
        match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        numbers = list(map(int, re.findall(r"\d+", match[1]))) if match else []
        pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        groups = ()
    size = _size(_result(shape, kind) if opcode.endswith("-start") else shape)
    members = max((len(group) for group in groups), default=1)
    if kind == "reduce-scatter":
        size *= members
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # XLA:TPU writes it as an all-reduce of which each device keeps its part
    name = re.search(r'op_name="([^"]*)"', attributes)
    chain = re.search(r'chain_id="(\d+)"', attributes)
    channel = re.search(r"channel_id=(\d+)", attributes)
    collective = Collective(kind, size, 1, groups, pairs, name[1] if name else "")
    return collective, f"{chain[1]}/{channel[1] if channel else ''}/{kind}" if chain else None


def _by_slice(ids: Sequence[int]) -> dict[int, list[int]]:
    """Positions in the mesh of every slice's devices, in the mesh's order."""
    slices: dict[int, list[int]] = {}
    for position, device in enumerate(ids):
        slices.setdefault(device // _SLICE, []).append(position)
    return slices


def _between_slices(
    opcode: str, shape: str, attributes: str, ids: Sequence[int], slices: Mapping[int, list[int]]
) -> Collective | None:
    """The collective that a send to other slices, or a recv from them, is a half of; None for the other half.

    An all-gather has its full size at the receiver, everything else at the sender.
    """
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    if match is None or opcode != ("recv" if match[1] == "ALL_GATHER" else "send"):
        return None
    kind = "collective-permute" if match[1] == "ONE_TO_ONE" else match[1].lower().replace("_", "-")
    if product := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}"', attributes):
        positions = range(int(product[2]), int(product[3]) + 1)  # slices x partitions of each, inclusive
        groups = [tuple(slices[number][position] for number in _numbers(product[1])) for position in positions]
    else:
        listed = re.search(r"_xla_megascale_target=\{(\{.*?\})\}", attributes)
        position = {device: i for i, device in enumerate(ids)}
        members = re.findall(r"\{([^}]+)\}", listed[1] if listed else "")
        groups = [tuple(position[int(device)] for device in re.findall(r"\d+", group)) for group in members]
    size = _size(next(_elements(shape[1:-1])))
    if kind == "collective-permute":
        return Collective(kind, size, 1, (), tuple((start, end) for start, end in groups))
    return Collective(kind, size, 1, tuple(groups))


def _operand(text: str, operands: str) -> str:
    """Shape of an instruction's first operand, which newer texts write only where it is made; "" if they do not."""
    written, name = re.match(r"(.*?)%?([\w.\-]+)(?:,|\))", operands).groups()  # type: ignore[union-attr]
    made = re.search(rf"^\s+%?{re.escape(name)} = (.*)$", text, re.MULTILINE)
    return written or (_split(made[1])[0] if made else "")


def _result(shape: str, kind: str) -> str:
    """Of an asynchronous start's shape, (operands, results, ...), the results."""
    if not shape.startswith("("):
        return shape
    parts = list(_elements(shape[1:-1]))
    if kind == "all-reduce" and not parts[0].startswith("("):
        return shape  # XLA:TPU's all-reduce-start has its results alone
    return parts[1] if len(parts) > 1 else parts[0]


def _elements(text: str) -> Iterator[str]:
    """Elements of a tuple's shape: cut at the commas outside all brackets."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield _bare(text[start:i])
            start = i + 1
    yield _bare(text[start:])


def _bare(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text).strip()


def _size(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    bits = 0
    for dtype, dims in _ARRAY.findall(shape):
        width = BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype)[1])  # type: ignore[index]
        bits += width * math.prod(int(dim.strip("<=")) for dim in dims.split(",") if dim)
    return bits // 8


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Partitions that work together, from any of the three ways XLA writes them."""
    match = re.search(r"replica_groups=(.*)", attributes)
    text = match[1] if match else "{}"
    if text.startswith("{{"):
        listed = re.match(r"\{(\{[\d,{} ]*\})\}", text)
        return tuple(
            tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d, ]+)\}", listed[1] if listed else "")
        )
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(*(_numbers(part) for part in iota.groups()))
    if named := re.match(
        r"mesh\[(.*?)\](?:, ?device_ids=\(?\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)? ?\{(.*?)\}", text
    ):
        names = re.findall(r"'?([\w.\-]+)'?=(\d+)", named[1])
        sizes = [int(size) for _, size in names]
        ids = np.arange(math.prod(sizes))
        if named[2]:
            ids = np.array(_iota(_numbers(named[2]), _numbers(named[3]), _numbers(named[4]))).reshape(-1)
        return _along(ids.reshape(sizes), [name for name, _ in names], named[5])
    return (tuple(range(devices)),)


def _iota(shape: Sequence[int], of: Sequence[int], order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """[groups, members]<=[dims]T(order): 0, 1, 2, ... as an array `of`, transposed, cut into groups."""
    ids = np.arange(math.prod(of)).reshape(of)
    ids = ids.transpose(order) if len(order) else ids
    return tuple(map(tuple, ids.reshape(shape).reshape(-1, shape[-1]).tolist()))


def _along(ids: np.ndarray, names: list[str], wanted: str) -> tuple[tuple[int, ...], ...]:
    """Groups of partitions that differ in the wanted axes, such as "'fsdp','tensor'" or "'fsdp':(2)4", part of one."""
    moving = []
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", wanted):
        axis = names.index(name)
        if size:  # the middle of an axis cut into before x size x rest
            whole = ids.shape[axis]
            cut = (int(before), int(size), whole // (int(before) * int(size)))
            ids = ids.reshape(*ids.shape[:axis], *cut, *ids.shape[axis + 1 :])
            names = [*names[:axis], f"{name}<", name, f"{name}>", *names[axis + 1 :]]
        moving.append(name)
    at = [names.index(name) for name in moving]
    ids = np.moveaxis(ids, at, range(-len(at), 0))
    members = math.prod(ids.shape[ids.ndim - len(at) :])
    return tuple(map(tuple, ids.reshape(-1, members).tolist()))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def _calls(opcode: str, attributes: str, conditions: Mapping[str, list[str]]) -> list[_Call]:
    if opcode == "conditional":
        names = [name for pair in _BRANCHES.findall(attributes) for name in re.findall(r"[\w.\-]+", " ".join(pair))]
        return [_Call(tuple(names), 1, True)]
    targets = tuple(dict.fromkeys(_CALLED.findall(attributes)))
    times = _trip_count(attributes, conditions) if opcode == "while" else 1
    return [_Call(targets, times, False)] if targets else []


def _trip_count(attributes: str, conditions: Mapping[str, list[str]]) -> int:
    """A loop's trip count: as XLA states it, or the constant that bounds its counter; 1 without either."""
    if known := re.search(r"known_trip_count\D*?(\d+)", attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", attributes)
    lines = "\n".join(conditions.get(condition[1], []) if condition else [])
    constants = dict(re.findall(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", lines))
    for compared in re.finditer(r"compare\(([^)]*)\), direction=(LT|GT)", lines):
        for name in re.findall(r"[\w.\-]+", compared[1]):
            if name in constants:
                return int(constants[name])
    inside = re.search(r"ROOT .* fusion\(", lines)  # XLA:GPU wraps the comparison
    return int(next(iter(constants.values()))) if inside and len(constants) == 1 else 1

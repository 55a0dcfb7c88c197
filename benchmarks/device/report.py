# SPDX-License-Identifier: Apache-2.0
"""The results of benchmarks.device as lines, tables and a section of RESULTS.md."""

import json
from collections.abc import Iterable
from pathlib import Path

LAST_LINES = 6  # of a log, for what ended without a word
BAD = ("wrong", "failed", "hung", "crashed", "out of memory")
NUMBERS = ("tokens/s", "ms", "MFU", "of bandwidth", "of peak")  # in this order, before all others


def number(x) -> str:
    """About three digits."""
    if x is None:
        return "-"
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def shown(name: str, x) -> str:
    return f"{x:.0%}" if isinstance(x, float) and (name.startswith("of ") or name == "MFU") else number(x)


def numbers(case: dict) -> str:
    """A case's own numbers in a few words; its rows have a table."""
    own = {name: x for name, x in case.get("numbers", {}).items() if name not in ("rows", "refused", "floor")}
    order = sorted(own, key=lambda name: NUMBERS.index(name) if name in NUMBERS else len(NUMBERS))
    text = ", ".join(f"{name} {shown(name, own[name])}" for name in order if own[name] is not None)
    return text + (f" (floor: {case['numbers']['floor']})" if "floor" in case.get("numbers", {}) else "")


def row_numbers(row: dict) -> str:
    parts = [f"{row['implementation']} {row['pass']} {number(row['best_ms'])} ms"]
    if row.get("of_roofline") is not None:
        parts.append(f"{row['of_roofline']:.0%}")
    return " ".join(parts)


def line(case: dict) -> str:
    """One case as it is printed while the command runs."""
    rows = "; ".join(row_numbers(row) for row in case.get("numbers", {}).get("rows", ()))
    said = (case.get("error") or "").strip().splitlines()
    text = " ".join(filter(None, [numbers(case), rows, said and said[-1][:200]]))
    return f"{case['status']:>13}  {case['piece']}: {case['case']}  {text}  [{case['seconds']:g} s]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *map(list, rows)])


def plan(pieces) -> str:
    """The pieces in their order, with the seconds that each should take on an H200."""
    rows, sums = [], {"gpu": 0, "tpu": 0}
    for piece in pieces:
        for platform in piece.on:
            sums[platform] += piece.seconds
        after = " / ".join(f"{sums[x] / 60:.1f}" if x in piece.on else "-" for x in sums)
        rows.append([piece.name, piece.what, ", ".join(piece.on), str(piece.seconds), after])
    return table(["piece", "what", "on", "seconds", "minutes so far, GPU / TPU"], rows)


def machine(here: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    memory = f", {here['memory GiB']} GiB" if here.get("memory GiB") else ""
    driver = f", driver {here['driver']}" if here.get("driver") else ""
    return f"{here['chip']}{memory}{driver}; {versions}"


def checked(cases: list[dict]) -> str:
    """Pieces that compare numbers: how many cases hold, and how near the nearest came to its limit."""
    rows = []
    for piece in dict.fromkeys(case["piece"] for case in cases):
        mine = [case for case in cases if case["piece"] == piece]
        shares = [case["numbers"]["of tolerance"] for case in mine if "of tolerance" in case.get("numbers", {})]
        if timed(mine):
            continue
        count = lambda *status: str(sum(case["status"] in status for case in mine))  # noqa: E731, B023
        rows.append([piece, count("ok"), count(*BAD), count("refused", "skipped"), number(max(shares, default=None))])
    return table(["checked", "right", "not right", "not taken here", "largest share of the tolerance"], rows)


def timed(cases: list[dict]) -> bool:
    return cases[0]["piece"].startswith(("speed", "peaks"))


def speeds(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        if not timed([case]) or "numbers" not in case:
            continue
        name = f"{case['piece'].removeprefix('speed of ')}: {case['case']}"
        for row in case["numbers"].get("rows", ()):
            of = "-" if row.get("of_roofline") is None else f"{row['of_roofline']:.0%}"
            speed = [number(row.get(x)) for x in ("best_ms", "tflops", "gb_s")]
            rows.append([name, row["implementation"], row["pass"], *speed, of, row.get("floor", "-")])
        if "rows" not in case["numbers"]:
            ms, floor = number(case["numbers"].get("ms")), case["numbers"].get("floor", "-")
            rows.append([name, numbers(case).split(" (floor")[0], "-", ms, "-", "-", "-", floor])
    return table(["timed", "by", "pass", "best ms", "TFLOP/s", "GB/s", "of roofline", "floor"], rows)


def summary(data: dict) -> str:
    """Two tables, then everything that is not right, then what was left out."""
    cases = data["cases"]
    parts = []
    if not all(timed([case]) for case in cases):
        parts.append(checked(cases))
    if any(timed([case]) and "numbers" in case for case in cases):
        parts.append(speeds(cases))
    for status in (*BAD, "refused", "skipped"):
        for case in cases:
            if case["status"] == status:
                said = " ".join((case.get("error") or "").split())[-600:]
                parts.append(f"{status.upper()} {case['piece']}: {case['case']}: {said}")
    if data.get("left out"):
        parts.append(f"Left out for time: {'; '.join(data['left out'])}. Run the command again to go on with these.")
    return "\n\n".join(parts)


def publish(source: Path, target: Path) -> int:
    """Appends a run to RESULTS.md: date, chip, versions, tables, faults."""
    if not source.exists():
        raise SystemExit(f"{source} does not exist: run the command first, or say where it is with --out")
    data = json.loads(source.read_text(encoding="utf-8"))
    dates = sorted(case["date"][:10] for case in data["cases"])
    commits = ", ".join(dict.fromkeys(case["commit"] for case in data["cases"] if case["commit"]))
    shapes = ", tiny shapes" if data["small"] else ""
    text = f"\n## {dates[-1]}: {data['machine']['chip']}, benchmarks.device{shapes}\n\n{machine(data['machine'])}."
    text += f" Commit {commits}." if commits else ""
    with target.open("a", encoding="utf-8") as out:
        out.write(f"{text}\n\n{summary(data)}\n")
    print(f"added to {target}")
    return 0

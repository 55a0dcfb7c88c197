# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/kernels.md, from the same functions that the kernels use.

    python docs/kernels_pictures.py

Writes dual-chunk-regions.png, visits.png, decode-split.png and tiles.png beside this file.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from qwen2_jax.kernels import visits
from qwen2_jax.kernels.grouped_matmul import tiles
from qwen2_jax.kernels.visibility import chunk_region, visible

HERE = Path(__file__).parent
REGIONS = ("#2a9d8f", "#e9b44c", "#6c7fb8")  # own chunk, the one before, all older
NAMES = ("same chunk: q", "one chunk back: q_succ", "older: q_inter")
EXPERTS = ("#2a9d8f", "#e9b44c", "#c8553d", "#6c7fb8")
INK, FAINT, NOTHING = "#22303c", "#c9d1d9", "#f3f5f7"


def style():
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK})
    mpl.rcParams.update({"xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT, "axes.titlelocation": "left"})
    mpl.rcParams.update({"figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.12})
    mpl.rcParams.update({"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 10})


def cell(ax, x, y, color, *, width=1.0, height=1.0, **options):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, **{"edgecolor": "white", "lw": 0.8, **options}))


def on(color):
    """Ink that can be read on a color."""
    red, green, blue = mpl.colors.to_rgb(color)
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.6 else "white"


def chip(ax, x, y, text, color, *, width=0.86, dashed=False):
    """A small rounded label."""
    edge = {"edgecolor": INK, "ls": (0, (2, 1.5)), "lw": 1.3} if dashed else {"edgecolor": color, "lw": 1.3}
    box = FancyBboxPatch((x, y), width, 0.66, boxstyle="round,pad=0,rounding_size=0.14", facecolor=color, **edge)
    ax.add_patch(box)
    ax.text(x + width / 2, y + 0.34, text, ha="center", va="center", fontsize=8, color=on(color), fontweight="bold")


def blank(ax, title="", **limits):
    """Axes to draw on, without ticks or frame; y runs down."""
    ax.set(title=title, **limits)
    ax.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    ax.spines[:].set_visible(False)


def matrix(ax, length, title):
    """Axes of a table of queries (down) and keys (across)."""
    ax.set(xlim=(0, length), ylim=(length, 0), aspect="equal", title=title, xlabel="key position")
    ax.set_ylabel("query position")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def save(figure, name):
    figure.savefig(HERE / name, dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def dual_chunk_regions(length=18, chunk_len=6, chunk_size=8):
    """Which rotation scores which pair, and the distance that the pair seems to have."""
    at = np.arange(length)
    key = at % chunk_len
    succ = np.minimum(key + chunk_len, chunk_size)
    query = np.stack([key, succ, np.full(length, min(2 * chunk_len - 1, chunk_size))])
    seen = np.asarray(visible(at[:, None], at[None, :]))
    region = np.asarray(chunk_region(at[:, None], at[None, :], chunk_len))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 5.6), width_ratios=[1.12, 1], layout="constrained")
    matrix(left, length, "The distance that each pair of query and key seems to have")
    for t in at:
        for s in at:
            color = REGIONS[region[t, s]] if seen[t, s] else NOTHING
            cell(left, s, t, color)
            if seen[t, s]:
                distance = query[region[t, s], t] - key[s]
                left.text(s + 0.5, t + 0.53, distance, ha="center", va="center", fontsize=8, color=on(color))
    for edge in range(0, length + 1, chunk_len):
        left.plot([0, length], [edge, edge], color=INK, lw=1.1)
        left.plot([edge, edge], [0, length], color=INK, lw=1.1)
    left.set_xticks(at[::2] + 0.5, at[::2])
    left.set_yticks(at[::2] + 0.5, at[::2])

    right.set_title("The position at which queries and keys are rotated")
    for edge in range(0, length, chunk_len):  # one line per chunk: at its end the positions jump back
        here = np.arange(edge, edge + chunk_len + 1)
        for a in (2, 1, 0):
            positions = np.append(query[a, here[:-1]], query[a, here[-2]])
            line = {"color": REGIONS[a], "lw": 7 if a == 2 else 3.2, "solid_capstyle": "butt"}
            right.step(here, positions, where="post", **line)
        right.step(here, np.append(key[here[:-1]], key[here[-2]]), where="post", color=INK, lw=1.4, ls=(0, (1, 1.4)))
        right.axvline(edge, color=FAINT, lw=1, zorder=0)
    for color, name in zip(REGIONS, NAMES, strict=True):
        right.plot([], [], color=color, lw=6, label=name)
    right.plot([], [], color=INK, lw=1.4, ls=(0, (1, 1.4)), label="keys")
    right.text(
        length, chunk_size + 0.24, f"c = {chunk_size}: nothing seems farther than that", ha="right", fontsize=8.5
    )
    right.set(xlim=(0, length), ylim=(-0.3, chunk_size + 2.4))
    right.set(xlabel="position in the text", ylabel="rotated at")
    right.set_xticks(at[::2] + 0.5, at[::2])
    right.set_yticks(range(0, chunk_size + 1, 2))
    right.tick_params(length=0)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(loc="upper left", ncols=2, frameon=True, facecolor="white", edgecolor="white", framealpha=1,
                 handlelength=1.2, columnspacing=1.4)  # fmt: skip
    save(figure, "dual-chunk-regions.png")


def visit_list(length=48, block=8, chunk_len=20):
    """How pairs of blocks become the list of visits that a kernel walks."""
    at = np.arange(length)
    region = np.asarray(chunk_region(at[:, None], at[None, :], chunk_len))
    bounds = visits.blocks(jnp.asarray(at)[None], None, block)
    plan = visits.plan(bounds, bounds, chunk_len_B=jnp.array([chunk_len]))
    count, columns = int(plan.starts[-1]), length // block
    entries = [tuple(map(int, visits.unpack(word, columns))) for word in plan.words_Z[:count]]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 5.6), width_ratios=[1, 1.12], layout="constrained")
    matrix(left, length, f"{length} tokens in blocks of {block}, chunks of {chunk_len} (dashed)")
    image = np.ones((length, length, 3))
    for t in at:
        for s in at:
            image[t, s] = mpl.colors.to_rgb(REGIONS[region[t, s]] if s <= t else NOTHING)
    left.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
    for i in range(columns + 1):
        left.plot([0, length], [i * block] * 2, color="white", lw=1.6)
        left.plot([i * block] * 2, [0, length], color="white", lw=1.6)
    for edge in range(chunk_len, length, chunk_len):
        left.plot([edge, edge], [edge, length], color=INK, lw=1.2, ls=(0, (3, 2)))
        left.plot([0, edge], [edge, edge], color=INK, lw=1.2, ls=(0, (3, 2)))
    for i in range(columns):
        for j in range(columns):
            if times := sum(row == i and column == j for row, column, _, _ in entries):
                where = ((j + 0.5) * block, (i + 0.5) * block)
                left.add_patch(Circle(where, 1.5, facecolor="white", edgecolor="none", zorder=5))
                left.text(*where, times, ha="center", va="center_baseline", fontsize=9, fontweight="bold", zorder=6)
    left.set_xticks(np.arange(columns) * block + block / 2, [f"k{j}" for j in range(columns)])
    left.set_yticks(np.arange(columns) * block + block / 2, [f"q{i}" for i in range(columns)])
    left.set(xlabel="blocks of keys; in the circles: visits", ylabel="blocks of queries")

    blank(right, f"The list: {count} visits, row by row", xlim=(-0.7, 8.6), ylim=(columns + 2.1, -0.45))
    for i in range(columns):
        right.text(-0.2, i + 0.34, f"q{i}", ha="right", va="center")
        mine = [entry for entry in entries if entry[0] == i]
        for place, (_, column, a, whole) in enumerate(mine):
            chip(right, place, i, f"k{column}", REGIONS[a], dashed=not whole)
    for x, a in ((0, 0), (2.6, 1), (6.1, 2)):
        chip(right, x, columns + 0.25, "", REGIONS[a], width=0.5)
        right.text(x + 0.65, columns + 0.59, NAMES[a], va="center")
    chip(right, 0, columns + 1.2, "", "#dfe4e9", width=0.5, dashed=True)
    right.text(0.65, columns + 1.54, "dashed: only some pairs count, so it is masked", va="center")
    save(figure, "visits.png")


def decode_split(used=(12, 3, 7, 1), blocks=12, parts=4, cores=2):
    """How the blocks of a ragged cache are shared out: evenly in every row, or evenly in a list of all rows."""
    figure, axes = plt.subplots(1, 2, figsize=(11.4, 3.6), layout="constrained")
    ends = np.concatenate([[0], np.cumsum(used)])
    titles = f"GPU: every row's blocks go to {parts} programs", f"TPU: one list of all blocks goes to {cores} cores"
    for ax, title in zip(axes, titles, strict=True):
        blank(ax, title, xlim=(-2.1, blocks + 0.1), ylim=(len(used) + 0.9, -0.15))
        for row, count in enumerate(used):
            ax.text(-0.25, row + 0.45, f"row {row}", ha="right", va="center")
            for j in range(blocks):
                if j >= count:
                    cell(ax, j, row + 0.05, NOTHING, height=0.8)
                    continue
                number = j * min(parts, count) // count if ax is axes[0] else (ends[row] + j) * cores // ends[-1]
                color = EXPERTS[int(number)] if ax is axes[0] else EXPERTS[3 * int(number)]
                cell(ax, j, row + 0.05, color, height=0.8)
                label = str(number) if ax is axes[0] else str(ends[row] + j)
                ax.text(j + 0.5, row + 0.47, label, ha="center", va="center", fontsize=8.5, color=on(color))
    axes[0].text(0, len(used) + 0.5, "number: the program. Grey slots are never read.", va="center")
    axes[1].text(0, len(used) + 0.5, "number: the order. Color: the core.", va="center")
    save(figure, "decode-split.png")


def tile_list(groups=(5, 0, 11, 6), tile=6, rows=24):
    """How rows sorted by expert, cut into tiles, become the list of visits of a grouped product."""
    plan = tiles.plan(jnp.array(groups), rows, tile, cover="tiles")
    entries = [tuple(int(x[v]) for x in plan[:4]) for v in range(int(plan.count))]
    owner = np.repeat(np.arange(len(groups) + 1), [*groups, rows - sum(groups)])

    figure, ax = plt.subplots(figsize=(11.4, 3.7), layout="constrained")
    blank(
        ax, "Rows sorted by expert, tiles of six, and who visits which rows", xlim=(-3.4, rows + 0.1), ylim=(6.2, -0.9)
    )
    for row in range(rows):
        color = EXPERTS[owner[row]] if owner[row] < len(groups) else NOTHING
        cell(ax, row, 0, color)
        ax.text(row + 0.5, 0.53, row, ha="center", va="center", fontsize=8, color=on(color))
    ax.text(-0.3, 0.5, "rows of x", ha="right", va="center")
    for number in range(rows // tile):
        ax.plot([number * tile] * 2, [-0.35, 6], color=INK, lw=1.2)
        ax.text((number + 0.5) * tile, -0.4, f"tile {number}", ha="center", va="center", fontsize=8.5)
    ax.plot([rows] * 2, [-0.35, 6], color=INK, lw=1.2)
    for v, (expert, number, begin, end) in enumerate(entries):
        y = 1.45 + 0.72 * v * 6 / len(entries)
        for x in range(tile):
            mine = begin <= x < end
            cell(ax, number * tile + x, y, EXPERTS[expert] if mine else NOTHING, height=0.55)
        who = f"visit {v}: expert {expert}" if begin < end else f"visit {v}: nobody's"
        ax.text(-0.3, y + 0.29, who, ha="right", va="center", fontsize=8.5)
    save(figure, "tiles.png")


def main():
    style()
    dual_chunk_regions()
    visit_list()
    decode_split()
    tile_list()


if __name__ == "__main__":
    main()

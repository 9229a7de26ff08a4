"""The picture of a comparison: ratios to the first server, one bar each."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

COLOURS = ("#3b6ea8", "#d9822b", "#6a9955", "#8a5ea8")


def draw(
    against: Mapping[str, Mapping[str, tuple[float, float, float]]], base: str, to: Path
) -> None:
    """A bar a figure and server; its length is the ratio, its whisker the spread."""
    labels = list(against)
    servers = list(dict.fromkeys(server for row in against.values() for server in row))
    height = 0.8 / max(1, len(servers))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.34 * len(labels)), layout="constrained")
    for place, server in enumerate(servers):
        at = [row + place * height for row, label in enumerate(labels) if server in against[label]]
        found = [against[label][server] for label in labels if server in against[label]]
        middle = [entry[0] for entry in found]
        spread = [
            [entry[0] - entry[1] for entry in found],
            [entry[2] - entry[0] for entry in found],
        ]
        axes.barh(
            at, middle, height, xerr=spread, label=server, color=COLOURS[place % len(COLOURS)]
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6)
    axes.set_xlabel(f"ratio to {base} (tokens/s: higher is better; all others: lower)")
    axes.legend(loc="lower right")
    figure.savefig(to, dpi=110)
    plt.close(figure)

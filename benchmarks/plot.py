"""``python -m benchmarks plot FILE.json``: pictures of a run on a GPU, as PNG and SVG beside it.

``FILE-roofline``: each row by its arithmetic intensity and the rate that it achieved, under what
the run's own copy and product allow. ``FILE-peers``: how many times as long each peer took.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import compared
from benchmarks.rows import MODELS, bytes_moved, operations, parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by people who see fewer colours (Okabe and Ito, 2008), and by the marker in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
Style = dict[str, str]


def styles(names: list[str]) -> dict[str, Style]:
    """A colour and a marker for each name."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def point(result: dict) -> tuple[float, float] | None:
    """Operations a byte and TFLOP/s of our call; None where a row has no number of ours.

    A step counts without its gates, a layer and a model with their time on the GPU alone.
    """
    if "us" not in result:
        return None
    row = parse(result["row"])
    if row.name in MODELS:
        flops, moved, us = result["flops"], result["bytes"], result["gpu_us"]
    else:
        flops, moved, us = operations(row), bytes_moved(row), result["us"]
    return flops / moved, flops / us / 1e6


def roofline(axes: "Axes", content: dict) -> None:
    """Rows as points, and the two ceilings of the run as lines."""
    found = [(parse(r["row"]).name, point(r)) for r in content["rows"]]
    points = [(name, *p) for name, p in found if p is not None]
    copy, product = content["ceilings"]["copy TB/s"], content["ceilings"]["mm TFLOP/s"]
    ridge = product / copy
    left = min([x for _, x, _ in points] + [ridge]) / 2
    right = max([x for _, x, _ in points] + [ridge]) * 2
    axes.plot([left, ridge], [left * copy, product], "k-", lw=1.2, label=f"copy, {copy:.2f} TB/s")
    axes.plot([ridge, right], [product] * 2, "k--", lw=1.2, label=f"product, {product:.0f} TFLOP/s")
    for name, style in styles(list(dict.fromkeys(name for name, *_ in points))).items():
        xs, ys = zip(*((x, y) for other, x, y in points if other == name), strict=True)
        axes.scatter(xs, ys, s=28, label=name, edgecolors="white", linewidths=0.4, **style)
    axes.set(xscale="log", yscale="log", xlabel="operations / byte of the least traffic")
    axes.set(ylabel="TFLOP/s", title=f"{content['machine']['gpu']}, token-by-token operations")
    axes.grid(True, which="major", lw=0.3)
    axes.legend(fontsize=7, ncols=2)


def ratios(result: dict) -> dict[str, float]:
    """By peer, its time over ours of the same work."""
    us = compared(result)
    peers = result.get("peers", {}).items()
    return {name: peer["us"] / us for name, peer in peers if us and "us" in peer}


def with_peers(content: dict) -> list[tuple[str, dict[str, float]]]:
    """Rows in which a peer has a number, first row last, as an axis counts."""
    found = [(r["row"], ratios(r)) for r in content["rows"]]
    return [item for item in reversed(found) if item[1]]


def peers(axes: "Axes", content: dict) -> None:
    """A line of points for each row, a point for each peer."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    rows = with_peers(content)
    names = list(dict.fromkeys(name for _, found in reversed(rows) for name in found))
    for name, style in styles(names).items():
        points = [(found[name], i) for i, (_, found) in enumerate(rows) if name in found]
        axes.scatter(*zip(*points, strict=True), s=28, label=name, zorder=3, **style)
    axes.axvline(1, color="k", lw=1)
    axes.set(xscale="log", xlabel="time of the peer / time of gdn_ops (right of 1: we are faster)")
    axes.set(title=content["machine"]["gpu"], ylim=(-0.7, max(len(rows), 1) - 0.3))
    axes.set_yticks(range(len(rows)), [row for row, _ in rows], fontsize=7)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, lw=0.3)
    if names:
        axes.figure.legend(fontsize=7, loc="outside lower center", ncols=4)


def draw(content: dict, stem: Path) -> list[Path]:
    """Both pictures, each as PNG and SVG, next to ``stem``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.9 + 0.19 * len(with_peers(content))
    pictures: dict[str, tuple[Callable[[Axes, dict], None], tuple[float, float]]] = {
        "roofline": (roofline, (6.4, 4.6)),
        "peers": (peers, (6.4, height)),
    }
    paths = []
    for name, (picture, size) in pictures.items():
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        picture(axes, content)
        for ending in ("png", "svg"):
            paths.append(stem.with_name(f"{stem.name}-{name}.{ending}"))
            # Without a date and random names the same numbers make the same file.
            metadata = {"Date": None} if ending == "svg" else {}
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure.savefig(paths[-1], dpi=200, metadata=metadata)
        pyplot.close(figure)
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    try:
        content = json.loads(args.file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks plot: {error}") from None
    if "gpu" not in content.get("machine", {}):
        raise SystemExit(f"benchmarks plot: {args.file} must be a run of python -m benchmarks gpu")
    for path in draw(content, args.file.with_suffix("")):
        print(path)


if __name__ == "__main__":
    main()

"""The plots of a comparison: quality against cost, and quality against accuracy over guidance scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#555555")  # Okabe & Ito
MARKERS = "oDs^vPX*"
CAPTIONS = {"nfe": "network evaluations per image (NFE)", "seconds_per_image": "seconds per image"}


def pareto(rows: Sequence[Row], cost: str = "nfe", loss: str = "frechet") -> list[int]:
    """Indices of the rows that no other row beats: none is as cheap and as good, and strictly better in one of the two.

    Rows without a cost or a loss (None) never belong. Sorted by cost; of exact ties only the first row stays.
    """
    known = [i for i, row in enumerate(rows) if row.get(cost) is not None and row.get(loss) is not None]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (rows[i][cost], rows[i][loss], i)):
        if not front or rows[i][loss] < rows[front[-1]][loss]:
            front.append(i)
    return front


def cost_axis(rows: Sequence[Row]) -> str:
    """What the plot calls cost: NFE, which has no noise, unless an accelerator changes what one evaluation costs."""
    return "seconds_per_image" if any(row.get("accelerators") for row in rows) else "nfe"


def floor(rows: Sequence[Row]) -> float | None:
    """The distance that real images of the same count would have, if the rows carry it."""
    return next((row["protocol"]["floors"].get("frechet") for row in rows if row["protocol"]["floors"]), None)


def method(row: Row) -> str:
    """What rows of one colour share: the sampler's name, or that of another model than the comparison's own."""
    return str(row["sampler"].split(":")[0] if row.get("model") is None else row["model"])


def plot(rows: Sequence[Row]) -> Figure | None:
    """Quality against cost, a panel per guidance scale, the front over all rows in each. None without quality."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for row in rows if row.get("frechet") is not None]
    if not rows:
        return None
    cost, level = cost_axis(rows), floor(rows)
    front = [rows[i] for i in pareto(rows, cost)]
    methods = list(dict.fromkeys(map(method, rows)))
    scales = sorted({row["guidance_scale"] for row in rows})
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "hasten"}):
        figure = Figure(figsize=(4.6 * max(len(scales), 1.55), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, len(scales), sharey=True, squeeze=False)[0])
        for axis, scale in zip(axes, scales, strict=True):
            axis.step([r[cost] for r in front], [r["frechet"] for r in front], where="post", color="#999999",
                      lw=1.4, zorder=1, label="Pareto front of all rows")  # fmt: skip
            if level:
                axis.axhline(level, color="#b00020", lw=1, ls=(0, (4, 3)), zorder=0,
                             label=f"floor: real images, n = {rows[0]['protocol']['n']}")  # fmt: skip
            for name in methods:
                here = [r for r in rows if method(r) == name and r["guidance_scale"] == scale]
                here.sort(key=lambda r: r[cost])
                if not here:
                    continue
                k = methods.index(name)
                x, y = [r[cost] for r in here], [r["frechet"] for r in here]
                low = [max(r["frechet"] - (r.get("frechet_low") or r["frechet"]), 0) for r in here]
                high = [max((r.get("frechet_high") or r["frechet"]) - r["frechet"], 0) for r in here]
                style = {"color": COLORS[k % 8], "marker": MARKERS[(k + k // 8) % 8], "ms": 6.5, "ls": "none"}
                best = {r[cost]: r["frechet"] for r in sorted(here, key=lambda r: (r[cost], -r["frechet"]))}
                axis.plot(list(best), list(best.values()), color=COLORS[k % 8], ls=":", lw=1, zorder=2)
                axis.errorbar(x, y, yerr=[low, high], label=name, elinewidth=1.2, capsize=2.5, mec="white", mew=0.7,
                              zorder=3, **style)  # fmt: skip
            ours = [r for r in front if r["guidance_scale"] == scale]
            axis.scatter([r[cost] for r in ours], [r["frechet"] for r in ours], s=130, facecolor="none",
                         edgecolor="#222222", lw=1.2, zorder=4, label="on the front")  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel=CAPTIONS[cost])
            axis.set_title("no guidance" if scale == 1 else f"guidance scale {scale:g}", fontsize=11)
            if cost == "nfe":
                axis.xaxis.set_major_locator(FixedLocator([2**k for k in range(12)]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.grid(color="#e6e6e6", lw=0.7)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("Fréchet distance (lower is better)")
        entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        entries = dict(sorted(entries.items(), key=lambda entry: entry[0] not in methods))
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def sweep(rows: Sequence[Row], least: int = 3) -> Figure | None:
    """Distance against class accuracy, a curve for each way of sampling that has `least` guidance scales or more.

    None where no way has as many, or where quality or accuracy was not measured.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("frechet") is not None and row.get("accuracy") is not None:
            # a student has one evaluation a step at any scale, a guided teacher two but for scale 1
            told = ("model", "sampler", "times", "plan", "start", "steps")
            key = (*(row.get(name) for name in told), *row.get("guides", ()), *row.get("accelerators", ()))
            curves.setdefault(key, []).append(row)
    swept = [sorted(own, key=lambda row: row["guidance_scale"]) for own in curves.values()]
    swept = [own for own in swept if len({row["guidance_scale"] for row in own}) >= least]
    if not swept:
        return None
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "hasten"}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for k, own in enumerate(swept):
            x, y = [100 * row["accuracy"] for row in own], [row["frechet"] for row in own]
            few = own[0]["steps"]
            name = f"{method(own[0])}, {few} step" + ("" if few == 1 else "s")
            axis.plot(
                x, y, color=COLORS[k % 8], marker=MARKERS[(k + k // 8) % 8], mec="white", mew=0.7, lw=1.2, label=name
            )
            for row, a, b in zip(own, x, y, strict=True):
                axis.annotate(f"{row['guidance_scale']:g}", (a, b), xytext=(5, 4), textcoords="offset points",
                              fontsize=8, color=COLORS[k % 8])  # fmt: skip
        axis.set(yscale="log", xlabel="class accuracy (%)", ylabel="Fréchet distance (lower is better)")
        axis.grid(color="#e6e6e6", lw=0.7, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure

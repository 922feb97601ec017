"""The plots of a comparison: quality against cost, and quality against accuracy over guidance scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#555555")  # Okabe & Ito
MARKERS = "oDs^vPX*"
INK, PAPER, GRID, FRONT, LEVEL = "#1b1f25", "#fefefe", "#e6e7e8", "#8a9096", "#b00021"  # see `report.svg`
NEAR_DB = 35.0  # PSNR to the reference's images from which a row is called near to it
CAPTIONS = {"nfe": "network evaluations per image (NFE)", "seconds_per_image": "seconds per image"}


def pareto_front(rows: Sequence[Row], cost: str = "nfe", loss: str = "frechet", higher: bool = False) -> list[int]:
    """Indices of the rows that no other row beats: none is as cheap and as good, and strictly better in one of the two.

    Rows without a cost or a loss (None) never belong. Sorted by cost; of exact ties only the first row stays.
    higher: of a `loss` of which more is better.
    """
    sign = -1 if higher else 1
    known = [i for i, row in enumerate(rows) if row.get(cost) is not None and row.get(loss) is not None]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (rows[i][cost], sign * rows[i][loss], i)):
        if not front or sign * rows[i][loss] < sign * rows[front[-1]][loss]:
            front.append(i)
    return front


def cost_axis(rows: Sequence[Row]) -> str:
    """What the plot calls cost: NFE, which has no noise, unless an accelerator changes what one evaluation costs."""
    return "seconds_per_image" if any(row.get("accelerators") for row in rows) else "nfe"


def recorded_baseline(rows: Sequence[Row]) -> float | None:
    """The distance that real images of the same count would have, if the rows carry it."""
    return next((row["protocol"]["floors"].get("frechet") for row in rows if row["protocol"].get("floors")), None)


def method_label(row: Row) -> str:
    """What rows of one colour share: the sampler's name, or that of another model than the comparison's own. As a label
    of matplotlib, to which $ begins a formula and _ hides an entry."""
    name = str(row["sampler"].split(":")[0] if row.get("model") is None else row["model"]).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def quality_metric(rows: Sequence[Row]) -> str | None:
    """What the plot and the headline call quality: the Fréchet distance, else PSNR to the reference's images; None
    where no row has either."""
    return next((key for key in ("frechet", "psnr") if any(row.get(key) is not None for row in rows)), None)


def plot_style(**more: Any) -> dict[str, Any]:
    """Settings of matplotlib: the colours that `report.svg` turns into those of the page."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return {"font.size": 10.5, "font.family": "sans-serif", "svg.hashsalt": "hasten", **ink, **more}


def plot_quality(rows: Sequence[Row], narrow: bool = False) -> Figure | None:
    """Quality against cost, a panel per guidance scale, the front over all rows in each; None without quality.

    Quality is the Fréchet distance, or where no row has it PSNR against seconds. Marks carry the numbers of their rows,
    from 1 in the order of `rows`. The axis holds the marks: error bars that are longer are cut. narrow: for a phone,
    panels below one another.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbered = [{**row, "number": k} for k, row in enumerate(rows, 1)]
    quality = quality_metric(numbered)
    rows = [row for row in numbered if quality is not None and row.get(quality) is not None]
    if quality is None:
        return None
    distance = quality == "frechet"
    cost, level = (cost_axis(rows), recorded_baseline(rows)) if distance else ("seconds_per_image", None)
    front = [rows[i] for i in pareto_front(rows, cost, quality, higher=not distance)]
    methods = list(dict.fromkeys(map(method_label, rows)))
    scales = sorted({row["guidance_scale"] for row in rows})
    with matplotlib.rc_context(plot_style()):
        lines = len(methods) + 3
        size = (4.3, 3.7 * len(scales) + 0.22 * lines) if narrow else (4.6 * max(len(scales), 1.8), 4.8)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        shape = (len(scales), 1) if narrow else (1, len(scales))
        axes = list(figure.subplots(*shape, sharey=True, squeeze=False).flat)
        for axis, scale in zip(axes, scales, strict=True):
            draw_panel(axis, rows, front, methods, scale, cost, quality, level)
        for axis in axes if narrow else axes[:1]:
            axis.set_ylabel("Fréchet distance (lower is better)" if distance else
                            "PSNR, dB (higher is better)")  # fmt: skip
        entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        entries = dict(sorted(entries.items(), key=lambda entry: entry[0] not in methods))
        where = "outside lower center" if narrow else "outside right upper"
        figure.legend(entries.values(), entries.keys(), loc=where, frameon=False, fontsize=9.5)
        figure.draw_without_rendering()
        for axis, scale in zip(axes, scales, strict=True):
            number_marks(axis, [row for row in rows if row["guidance_scale"] == scale], cost, quality)
    return figure


def draw_panel(
    axis: Any, rows: Sequence[Row], front: Sequence[Row], methods: Sequence[str], scale: float, cost: str, quality: str,
    level: float | None,
) -> None:  # fmt: skip
    """The marks of one guidance scale."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    distance = quality == "frechet"
    axis.step([r[cost] for r in front], [r[quality] for r in front], where="post", color=FRONT, lw=1.4, zorder=1,
              label="Pareto front of all rows")  # fmt: skip
    seen = level is not None and level >= min(r[quality] for r in rows) / 3
    if level:  # far below it would press the marks together: then its number is in the legend alone
        label = f"real images, n = {rows[0]['protocol']['n']}" + ("" if seen else f":\n{level:.2g}, below the plot")
        axis.axhline(level, color=LEVEL, lw=1, ls=(0, (4, 3)), zorder=0, label=label)
    if not distance:
        axis.axhline(NEAR_DB, color=LEVEL, lw=1, ls=(0, (4, 3)), zorder=0, label=f"{NEAR_DB:g} dB")
    for name in methods:
        here = [r for r in rows if method_label(r) == name and r["guidance_scale"] == scale]
        here.sort(key=lambda r: r[cost])
        if not here:
            continue
        k = methods.index(name)
        x, y = [r[cost] for r in here], [r[quality] for r in here]
        mark = {"color": COLORS[k % 8], "marker": MARKERS[(k + k // 8) % 8], "ms": 7, "ls": "none"}
        best = {
            r[cost]: r[quality] for r in sorted(here, key=lambda r: (r[cost], r[quality] * (-1 if distance else 1)))
        }
        axis.plot(list(best), list(best.values()), color=COLORS[k % 8], ls=":", lw=1, zorder=2)
        bars = [[max(side, 0) for side in error_bar(r, quality)] for r in here]
        axis.errorbar(x, y, yerr=list(zip(*bars)), label=name, elinewidth=1.1, capsize=2, mec=PAPER, mew=0.7,
                      zorder=3, **mark)  # fmt: skip
    ours = [r for r in front if r["guidance_scale"] == scale]
    axis.scatter([r[cost] for r in ours], [r[quality] for r in ours], s=140, facecolor="none", edgecolor=INK, lw=1.2,
                 zorder=4, label="on the front")  # fmt: skip
    axis.set(xscale="log", yscale="log" if distance else "linear", xlabel=CAPTIONS[cost])
    axis.set_title("no guidance" if scale == 1 else f"guidance scale {scale:g}", fontsize=11)
    axis.set_xlim(*log_limits([r[cost] for r in rows], 1.25))
    if cost == "nfe":
        axis.xaxis.set_major_locator(FixedLocator([2**k for k in range(12)]))
    else:
        axis.xaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-6, 5) for m in (1, 2, 5)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if distance:
        axis.set_ylim(*log_limits([*(r[quality] for r in rows), *([level] if level and seen else [])], 1.3))
        axis.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        values = [*(r[quality] for r in rows), NEAR_DB]
        room = 0.08 * (max(values) - min(values)) + 0.5
        axis.set_ylim(min(values) - room, max(values) + room)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.grid(color=GRID, lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.patch.set_alpha(0)


def log_limits(values: Sequence[float], room: float) -> tuple[float, float]:
    """Ends of a logarithmic axis on which all values have some room."""
    positive = [value for value in values if value > 0] or [1.0]
    return min(positive) / room, max(positive) * room


def error_bar(row: Row, quality: str) -> tuple[float, float]:
    """How far the error bar of a row goes below and above its mark."""
    value = row[quality]
    if quality == "frechet":
        return value - (row.get("frechet_low") or value), (row.get("frechet_high") or value) - value
    deviation = (row.get("deviation") or {}).get(quality, 0.0)
    return deviation, deviation


def number_marks(axis: Any, rows: Sequence[Row], cost: str, quality: str) -> None:
    """Write each row's number beside its mark, where it covers the fewest marks and other numbers."""
    points = [axis.transData.transform((r[cost], r[quality])) for r in rows]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for row, (x, y) in zip(rows, points, strict=True):
        text = str(row["number"])
        wide, high = 5.5 * len(text) + 1, 9
        places = [place for far in (7, 15) for place in (
            (far, 3), (far, -11), (-far - wide, 3), (-far - wide, -11), (-wide / 2, far), (-wide / 2, -far - 9)
        )]  # fmt: skip

        def covered(place: tuple[float, float], x: float = x, y: float = y, wide: float = wide) -> float:
            left, low = x + place[0], y + place[1]
            boxes = (max(0.0, min(left + wide, b[2]) - max(left, b[0])) * max(0.0, min(low + 9, b[3]) - max(low, b[1]))
                     for b in taken)  # fmt: skip
            return sum(boxes)

        dx, dy = min(places, key=covered)
        taken.append((x + dx, y + dy, x + dx + wide, y + dy + high))
        axis.annotate(text, (row[cost], row[quality]), xytext=(dx * 0.72, dy * 0.72), textcoords="offset points",
                      fontsize=8.5, color=INK, zorder=5, annotation_clip=True)  # fmt: skip


def plot_guidance_sweep(rows: Sequence[Row], least: int = 3) -> Figure | None:
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
    with matplotlib.rc_context(plot_style()):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for k, own in enumerate(swept):
            x, y = [100 * row["accuracy"] for row in own], [row["frechet"] for row in own]
            few = own[0]["steps"]
            name = f"{method_label(own[0])}, {few} step" + ("" if few == 1 else "s")
            axis.plot(
                x, y, color=COLORS[k % 8], marker=MARKERS[(k + k // 8) % 8], mec=PAPER, mew=0.7, lw=1.2, label=name
            )
            for row, a, b in zip(own, x, y, strict=True):
                axis.annotate(f"{row['guidance_scale']:g}", (a, b), xytext=(5, 4), textcoords="offset points",
                              fontsize=8, color=COLORS[k % 8])  # fmt: skip
        axis.set(yscale="log", xlabel="class accuracy (%)", ylabel="Fréchet distance (lower is better)")
        axis.patch.set_alpha(0)
        axis.grid(color=GRID, lw=0.7, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure

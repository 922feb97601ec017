"""The plots of a comparison: quality against cost, and quality against accuracy over guidance scales."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#555555")  # Okabe & Ito
MARKERS = "oDs^vPX*"
INK, PAPER, GRID, FRONT, LEVEL = "#1b1f25", "#fefefe", "#e6e7e8", "#8a9096", "#b00021"  # see `figure_svg`
NEAR_DB = 35.0  # PSNR to the reference's images from which a row is called near to it
CAPTIONS = {"nfe": "network evaluations per image (NFE)", "seconds_per_image": "seconds per image"}


def pareto_front(rows: Sequence[Row], cost: str = "nfe", loss: str = "frechet", higher: bool = False) -> list[int]:
    """The Pareto front: the rows that no other row dominates, being as cheap and as good and better in one of the two.

    Args:
        rows: Rows of results.jsonl; those whose cost or loss is None are ignored.
        cost: The field of the cost.
        loss: The field of the quality.
        higher: Whether a higher `loss` is better.

    Returns:
        Indices into `rows`, by increasing cost; of exact ties the first row.
    """
    sign = -1 if higher else 1
    known = [i for i, row in enumerate(rows) if row.get(cost) is not None and row.get(loss) is not None]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (rows[i][cost], sign * rows[i][loss], i)):
        if not front or sign * rows[i][loss] < sign * rows[front[-1]][loss]:
            front.append(i)
    return front


def cost_axis(rows: Sequence[Row]) -> str:
    """The field of the plot's cost axis: NFE, which has no noise, or seconds where a row has accelerators, which change
    the cost of an evaluation."""
    return "seconds_per_image" if any(row.get("accelerators") for row in rows) else "nfe"


def recorded_baseline(rows: Sequence[Row]) -> float | None:
    """The real-data baseline of the rows: the Fréchet distance of as many real images. None where it is not known."""
    return next((row["protocol"]["floors"].get("frechet") for row in rows if row["protocol"].get("floors")), None)


def method_label(row: Row) -> str:
    """The label of a row's series: its sampler, or its model where it has one of its own. Escaped for matplotlib, where
    $ begins a formula and a leading _ hides a legend entry."""
    name = str(row["sampler"].split(":")[0] if row.get("model") is None else row["model"]).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def quality_metric(rows: Sequence[Row]) -> str | None:
    """The field of the quality: the Fréchet distance, else PSNR to the true images, of a model that restores them, else
    PSNR to the reference's images; None where no row has any."""
    return next(
        (key for key in ("frechet", "truth_psnr", "psnr") if any(row.get(key) is not None for row in rows)), None
    )


def plot_style(**settings: Any) -> dict[str, Any]:
    """Settings of matplotlib, with the colours that `figure_svg` replaces by those of the page."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return {"font.size": 10.5, "font.family": "sans-serif", "svg.hashsalt": "hasten", **ink, **settings}


def plot_quality(rows: Sequence[Row], narrow: bool = False) -> Figure | None:
    """Plot quality against cost, a panel per guidance scale with the Pareto front of all rows in each.

    Quality is the Fréchet distance, or where no row has it PSNR against seconds. Marks are numbered from 1 in the order
    of `rows`. The axes fit the marks: longer error bars are clipped.

    Args:
        rows: Rows of results.jsonl.
        narrow: For a phone, panels below one another.

    Returns:
        The figure; None where no row has a quality.
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
            axis.set_ylabel("Fréchet distance (lower is better)" if distance else "PSNR, dB (higher is better)")
        entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        entries = dict(sorted(entries.items(), key=lambda entry: entry[0] not in methods))
        where = "outside lower center" if narrow else "outside right upper"
        figure.legend(entries.values(), entries.keys(), loc=where, frameon=False, fontsize=9.5)
        figure.draw_without_rendering()
        for axis, scale in zip(axes, scales, strict=True):
            number_marks(axis, [row for row in rows if row["guidance_scale"] == scale], cost, quality)
    return figure


def draw_panel(
    axis: Any,
    rows: Sequence[Row],
    front: Sequence[Row],
    methods: Sequence[str],
    scale: float,
    cost: str,
    quality: str,
    level: float | None,
) -> None:
    """Draw the marks of one guidance scale, and the real-data baseline at `level`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    distance = quality == "frechet"
    x, y = [r[cost] for r in front], [r[quality] for r in front]
    axis.step(x, y, where="post", color=FRONT, lw=1.4, zorder=1, label="Pareto front of all rows")
    visible = level is not None and level >= min(r[quality] for r in rows) / 3
    if level:  # far below the marks it would compress them: then it is in the legend only
        label = f"real images, n = {rows[0]['protocol']['n']}" + ("" if visible else f":\n{level:.2g}, below the plot")
        axis.axhline(level, color=LEVEL, lw=1, ls=(0, (4, 3)), zorder=0, label=label)
    if quality == "psnr":
        axis.axhline(NEAR_DB, color=LEVEL, lw=1, ls=(0, (4, 3)), zorder=0, label=f"{NEAR_DB:g} dB")
    for name in methods:
        here = [r for r in rows if method_label(r) == name and r["guidance_scale"] == scale]
        here.sort(key=lambda r: r[cost])
        if not here:
            continue
        k = methods.index(name)
        x, y = [r[cost] for r in here], [r[quality] for r in here]
        mark: dict[str, Any] = {"color": COLORS[k % 8], "marker": MARKERS[(k + k // 8) % 8], "ms": 7, "ls": "none"}
        best = {
            r[cost]: r[quality] for r in sorted(here, key=lambda r: (r[cost], r[quality] * (-1 if distance else 1)))
        }
        axis.plot(list(best), list(best.values()), color=COLORS[k % 8], ls=":", lw=1, zorder=2)
        bars = [[max(side, 0) for side in error_bar(r, quality)] for r in here]
        mark |= {"elinewidth": 1.1, "capsize": 2, "mec": PAPER, "mew": 0.7, "zorder": 3}
        axis.errorbar(x, y, yerr=list(zip(*bars)), label=name, **mark)
    best_here = [r for r in front if r["guidance_scale"] == scale]
    x, y = [r[cost] for r in best_here], [r[quality] for r in best_here]
    axis.scatter(x, y, s=140, facecolor="none", edgecolor=INK, lw=1.2, zorder=4, label="on the front")
    axis.set(xscale="log", yscale="log" if distance else "linear", xlabel=CAPTIONS[cost])
    axis.set_title("no guidance" if scale == 1 else f"guidance scale {scale:g}", fontsize=11)
    axis.set_xlim(*log_limits([r[cost] for r in rows], 1.25))
    if cost == "nfe":
        axis.xaxis.set_major_locator(FixedLocator([2**k for k in range(12)]))
    else:
        axis.xaxis.set_major_locator(FixedLocator(log_ticks(*axis.get_xlim())))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if distance:
        axis.set_ylim(*log_limits([*(r[quality] for r in rows), *([level] if level and visible else [])], 1.3))
        axis.yaxis.set_major_locator(FixedLocator(log_ticks(*axis.get_ylim())))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        values = [*(r[quality] for r in rows), *([NEAR_DB] if quality == "psnr" else [])]
        room = 0.08 * (max(values) - min(values)) + 0.5
        axis.set_ylim(min(values) - room, max(values) + room)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.grid(color=GRID, lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.patch.set_alpha(0)


def log_limits(values: Sequence[float], room: float) -> tuple[float, float]:
    """Limits of a logarithmic axis: the range of the positive values, widened by the factor `room` on either side."""
    positive = [value for value in values if value > 0] or [1.0]
    return min(positive) / room, max(positive) * room


def log_ticks(low: float, high: float, fewest: int = 3) -> list[float]:
    """Round values for the ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, and finer ones where fewer than
    `fewest` of them are within the limits."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    finer = [[k / parts for k in range(parts, 10 * parts)] for parts in (2, 4, 20, 100)]
    ticks: list[float] = []
    for mantissas in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), *finer):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= fewest:
            break
    return ticks


def error_bar(row: Row, quality: str) -> tuple[float, float]:
    """The lengths of a row's error bar below and above its mark."""
    value = row[quality]
    if quality == "frechet":
        return value - (row.get("frechet_low") or value), (row.get("frechet_high") or value) - value
    deviation = (row.get("deviation") or {}).get(quality, 0.0)
    return deviation, deviation


def number_marks(axis: Any, rows: Sequence[Row], cost: str, quality: str) -> None:
    """Write each row's number next to its mark, where it overlaps marks and other numbers the least."""
    points = [axis.transData.transform((r[cost], r[quality])) for r in rows]
    occupied = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for row, (x, y) in zip(rows, points, strict=True):
        text = str(row["number"])
        wide, high = 5.5 * len(text) + 1, 9
        places: list[tuple[float, float]] = []
        for far in (7, 15):
            left = -far - wide
            places += [(far, 3), (far, -11), (left, 3), (left, -11), (-wide / 2, far), (-wide / 2, -far - 9)]

        def covered(place: tuple[float, float], x: float = x, y: float = y, wide: float = wide) -> float:
            left, low = x + place[0], y + place[1]
            area = 0.0
            for x0, y0, x1, y1 in occupied:
                area += max(0.0, min(left + wide, x1) - max(left, x0)) * max(0.0, min(low + 9, y1) - max(low, y0))
            return area

        dx, dy = min(places, key=covered)
        occupied.append((x + dx, y + dy, x + dx + wide, y + dy + high))
        style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "zorder": 5, "annotation_clip": True}
        offset = (dx * 0.72, dy * 0.72)
        axis.annotate(text, (row[cost], row[quality]), xytext=offset, textcoords="offset points", **style)


def plot_guidance_sweep(rows: Sequence[Row], minimum: int = 3) -> Figure | None:
    """Plot the Fréchet distance against class accuracy, a curve for each method with several guidance scales.

    Args:
        rows: Rows of results.jsonl.
        minimum: Guidance scales that a method needs for a curve.

    Returns:
        The figure; None where no method has as many scales, or where quality or accuracy was not measured.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("frechet") is not None and row.get("accuracy") is not None:
            # a student has one evaluation a step at any scale, a guided teacher two but for scale 1
            fields = ("model", "sampler", "times", "plan", "start", "steps")
            key = (*(row.get(name) for name in fields), *row.get("guides", ()), *row.get("accelerators", ()))
            curves.setdefault(key, []).append(row)
    swept = [sorted(own, key=lambda row: row["guidance_scale"]) for own in curves.values()]
    swept = [own for own in swept if len({row["guidance_scale"] for row in own}) >= minimum]
    if not swept:
        return None
    with matplotlib.rc_context(plot_style()):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for k, own in enumerate(swept):
            x, y = [100 * row["accuracy"] for row in own], [row["frechet"] for row in own]
            steps = own[0]["steps"]
            name = f"{method_label(own[0])}, {steps} step" + ("" if steps == 1 else "s")
            axis.plot(
                x, y, color=COLORS[k % 8], marker=MARKERS[(k + k // 8) % 8], mec=PAPER, mew=0.7, lw=1.2, label=name
            )
            for row, a, b in zip(own, x, y, strict=True):
                style: dict[str, Any] = {"fontsize": 8, "color": COLORS[k % 8]}
                axis.annotate(f"{row['guidance_scale']:g}", (a, b), (5, 4), textcoords="offset points", **style)
        axis.set(yscale="log", xlabel="class accuracy (%)", ylabel="Fréchet distance (lower is better)")
        axis.patch.set_alpha(0)
        axis.grid(color=GRID, lw=0.7, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


COLOURS = {INK: "ink", PAPER: "paper", GRID: "line", FRONT: "faint", LEVEL: "level"}  # CSS variables of the page


def figure_svg(figure: Figure, name: str = "plot", label: str = "plot") -> str:
    """A figure as an `<svg>` element for a page: without declaration, document type, metadata and background.

    Text and lines take the page's colours, which follow its dark mode.

    Args:
        figure: The figure.
        name: Prefix of its ids, unique in the page.
        label: Accessible description of what it shows.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    body = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.S)
    body = body[body.index("<svg") :]
    for colour, variable in COLOURS.items():
        body = body.replace(colour, f"var(--{variable}, {colour})")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    attributes = f'width="100%" role="img" aria-label="{html.escape(label)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', attributes, body, count=1)

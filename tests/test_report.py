"""The report: what is on the front, what the page says, and that it needs nothing but itself."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.compare import plots, report
from hasten.compare.advice import is_uncertain
from hasten.compare.main_table import main_columns
from hasten.compare.plots import log_ticks

PROTOCOL = {
    "model": "fashion", "model_hash": "ab12" * 16, "set": "demo", "n": 500, "seeds": [0, 499], "batch_size": 64,
    "timing_batch": 16, "rounds": 3, "classes": 10, "features": "fashion",
    "reference": "Fashion-MNIST, test split, 10000 images",
    "floors": {"frechet": 0.35, "kid": -0.0007, "precision": 0.88, "recall": 0.87, "coverage": 0.97, "accuracy": 0.93},
    "hardware": "Some CPU, 2 cores", "threads": 2, "device": "cpu", "dtype": "bf16", "torch": "2.13.0", "hasten": "0.1",
    "date": "2026-01-02 03:04 UTC", "command": "hasten compare fashion --n 500 --out runs/<demo>",
}  # fmt: skip


def row(name: str, sampler: str, steps: int, nfe: float, frechet: float | None, **others: Any) -> dict[str, Any]:
    """A finished row as `compare` makes them."""
    fields = {
        "key": f"key-{name}", "name": name, "role": "variant", "sampler": sampler, "times": "lambda", "steps": steps,
        "guidance_scale": 2.0, "accelerators": [], "nfe": nfe, "macs_per_image": 30e6 * nfe,
        "seconds_per_image": 1e-3 * nfe, "speedup": 64 / nfe, "speedup_low": 63 / nfe, "speedup_high": 66 / nfe,
        "peak_memory": 4e8, "frechet": frechet, "frechet_low": frechet and 0.95 * frechet,
        "frechet_high": frechet and 1.05 * frechet, "kid": 0.004, "precision": 0.8, "recall": 0.7, "density": 0.9,
        "coverage": 0.8, "inception_score": 6.0, "accuracy": 0.95, "psnr": 25.0, "rms": 0.05, "equal_cost": None,
        "is_equal_cost": False, "frechet_over_equal_cost": None, "protocol": PROTOCOL,
    }  # fmt: skip
    return {**fields, **others}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("UniPC-3, 32 steps", "unipc:order=3", 32, 64, 4.0, role="reference", psnr=None, rms=None),
        row("UniPC-3, 4 steps", "unipc:order=3", 4, 8, 5.5, is_equal_cost=True),
        row("UniPC-3, 8 steps", "unipc:order=3", 8, 16, 4.2, is_equal_cost=True),
        row("DDIM, 4 steps", "ddim", 4, 8, 21.0, frechet_over_equal_cost=3.8),
        row("DDIM, 8 steps", "ddim", 8, 16, 9.1, frechet_over_equal_cost=2.2),
        row("Heun, 4 steps", "heun", 4, 14, 30.0),
        row("UniPC-3, no guidance", "unipc:order=3", 8, 8, 12.0, guidance_scale=1.0),
        row("Reference, 7 steps", "unipc:order=3", 7, 14, 4.4, role="equal-cost", is_equal_cost=True),
    ]


@pytest.fixture
def images(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    return {r["key"]: noise.integers(0, 256, (10, 1, 28, 28), dtype=np.uint8) for r in rows}


def test_the_front_is_what_no_row_beats(rows: list[dict[str, Any]]) -> None:
    front = report.pareto_front(rows)
    assert [rows[i]["name"] for i in front] == [
        "UniPC-3, 4 steps", "Reference, 7 steps", "UniPC-3, 8 steps", "UniPC-3, 32 steps",
    ]  # fmt: skip
    for i, mine in enumerate(rows):
        beaten = any(
            (r["nfe"] <= mine["nfe"] and r["frechet"] <= mine["frechet"])
            and (r["nfe"] < mine["nfe"] or r["frechet"] < mine["frechet"])
            for r in rows
        )
        assert beaten == (i not in front)


def test_three_guidance_scales_make_a_curve(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    scales = {1.0: 12.0, 3.0: 6.0, 2.0: 4.2}  # in no order
    swept = [
        row(f"UniPC-3, {scale:g}", "unipc:order=3", 8, 8 if scale == 1 else 16, distance, guidance_scale=scale,
            accuracy=0.9 + scale / 50)
        for scale, distance in scales.items()
    ]  # fmt: skip
    assert plots.plot_guidance_sweep(rows) is None  # the fixture has two scales of one way
    figure = plots.plot_guidance_sweep([*rows[:2], *swept])
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert line.get_xdata() == pytest.approx([92, 94, 96]) and list(line.get_ydata()) == [12.0, 4.2, 6.0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3"]
    assert "Over the guidance scale" in report.write_report(tmp_path, [*rows[:2], *swept], {}).read_text()
    assert (tmp_path / "guidance.png").exists()


def test_the_front_keeps_one_of_two_equal_rows_and_none_without_quality() -> None:
    twice = [row("a", "ddim", 4, 4, 2.0), row("b", "ddim", 4, 4, 2.0), row("c", "ddim", 2, 2, None)]
    assert report.pareto_front(twice) == [0]


def test_the_headline_names_the_cheapest_row_near_the_reference(rows: list[dict[str, Any]]) -> None:
    said = report.headline(rows)
    assert said.startswith("Reference, 7 steps (14 NFE) makes an image 4.6× faster than UniPC-3, 32 steps (64 NFE)")
    assert "4.40 against 4.00 (real images 0.35)" in said
    far = [r for r in rows if r["frechet"] > 4.6 or r["role"] == "reference"]
    assert report.headline(far).startswith("No variant comes within 15%")
    assert "not finished" in report.headline(rows[1:])
    blind = [{**r, "frechet": None} for r in rows]
    assert "Quality was not measured" in report.headline(blind)
    assert report.headline(blind).startswith("No faster row reaches 35 dB PSNR")  # all are at 25: none is praised
    assert report.recommended_row(blind) is None
    near = [{**r, "psnr": {16: 35.2, 14: 34.9}.get(r["nfe"], r["psnr"])} for r in blind]
    near[4] |= {"speedup": 3.0}
    assert report.headline(near).startswith("UniPC-3, 8 steps is 4.0× faster than UniPC-3, 32 steps at 35.2 dB")
    assert "the fastest row above 35 dB" in report.headline(near)


class Page(HTMLParser):
    """Addresses that a page would fetch, its table's rows, and whether its tags are balanced."""

    VOID = {"meta", "img", "br", "input", "hr", "link", "source"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.names: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [attributes[key] or "" for key in ("src", "srcset", "data", "poster") if key in attributes]
        if tag in ("link", "a", "use", "image"):
            self.fetched += [v or "" for k, v in attrs if k in ("href", "xlink:href")]
        if tag == "tr" and attributes.get("class"):
            self.names.append(attributes["class"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def test_the_page_is_valid_and_needs_no_network(
    rows: list[dict[str, Any]], images: dict[str, np.ndarray], tmp_path: Path
) -> None:
    heads = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    path = report.write_report(tmp_path, rows, images, heads, "a <b>note</b>")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.names == ["reference", *["variant"] * 6, "equal-cost"]
    assert page.fetched
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.fetched)
    assert "@import" not in text
    assert not re.search(r"url\((?!#|data:image/png;base64,)", text)
    assert "runs/&lt;demo&gt;" in text  # what a user named is text, not markup
    assert "a &lt;b&gt;note" in text
    assert "not comparable" in text
    assert "Fashion-MNIST, test split" in text
    for r in rows:
        assert r["name"] in text
    assert text.count("<svg") == 2  # one for a phone
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert len(text) < 2_000_000
    for name in ("front.png", "grid.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_a_page_without_quality_plots_the_nearness_to_the_reference(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    none = {"features": None, "reference": None, "floors": {}}
    unknown = dict.fromkeys(("frechet", "frechet_low", "kid", "accuracy"))
    blind = [{**r, **unknown, "protocol": PROTOCOL | none} for r in rows]
    text = report.write_report(tmp_path, blind, {}).read_text()
    assert Page(text).open == []
    assert text.count("<svg") == 2 and 'aria-label="PSNR against seconds per image' in text
    assert "Fréchet<br>distance" not in text
    assert (tmp_path / "front.png").exists()
    alone = [{**r, "psnr": None} for r in blind]
    assert "<svg" not in report.write_report(tmp_path, alone, {}).read_text()


def test_a_failed_row_is_marked_with_its_reason_and_in_no_plot(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from rich.console import Console

    from hasten.compare.results import QUALITY

    gone = dict.fromkeys((*QUALITY, "nfe", "seconds_per_image", "speedup", "macs_per_image", "peak_memory"))
    lost = {**rows[1], **gone, "name": "[red]boom[/nothing]", "failed": "3 of 8 images hold <NaN>"}
    shown = [rows[0], lost, *rows[2:]]
    text = report.write_report(tmp_path, shown, {}).read_text()
    assert Page(text).open == [] and len(Page(text).names) == len(rows)
    assert text.count("3 of 8 images hold &lt;NaN&gt;") == 2 and "1 of 8 rows failed" in text
    assert report.headline(shown) == report.headline([rows[0], *rows[2:]])
    console = Console(width=120, no_color=True)
    with console.capture() as captured:
        console.print(report.results_table(shown, 120))
    assert "[red]boom[/nothing] failed: 3 of 8" in captured.get()  # names are no markup


def test_the_recommended_row_is_marked_with_its_command(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    text = report.write_report(tmp_path, rows, {}).read_text()
    assert text.count(" data-best>") == 1 and text.count(">recommended<") == 1
    assert "hasten sample &#39;runs/&lt;demo&gt;&#39;" in text or "hasten sample " in text
    best = report.recommended_row(rows)
    assert best is not None and best["name"] == "Reference, 7 steps"
    words = shlex.split(report.sample_command(best))
    assert words[:2] == ["hasten", "sample"] and "--steps" in words
    assert words[words.index("--sampler") + 1] == "unipc:order=3" and words[words.index("--steps") + 1] == "7"
    student = {**best, "model": "runs/s 4", "sampler": "plan", "times": "runs/s 4", "steps": 4}
    words = shlex.split(report.sample_command(student))
    assert words[2] == "runs/s 4" and "--sampler" not in words and words[words.index("--steps") + 1] == "4"
    planned = {**best, "plan": "fitted-6", "sampler": "plan", "guides": ["interval:low=1"]}
    words = shlex.split(report.sample_command(planned))
    assert "--steps" not in words and words[words.index("--plan") + 1] == "fitted-6"
    assert words[words.index("--guide") + 1] == "interval:low=1"


def test_the_page_can_be_used_in_the_dark_by_keyboard_and_on_a_phone(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = report.write_report(tmp_path, rows, {}).read_text()
    assert "prefers-color-scheme: dark" in text and "@media (max-width" in text
    head = text[text.index("<thead>") : text.index("</thead>")]
    assert head.count("<th ") == head.count('scope="col"') == head.count('aria-sort="none"') == head.count("<button")
    assert text.count('<th scope="row"') == len(rows) + 1 and "<caption>" in text
    drawn = text[text.index("<svg") : text.rindex("</svg>")]
    for colour in (plots.INK, plots.GRID, plots.PAPER):  # only as what stands in for a variable of the page
        assert drawn.count(colour) == drawn.count(f", {colour})") > 0
    assert "#000000" not in drawn and "#ffffff" not in drawn


def test_marks_carry_the_numbers_of_their_rows_and_bars_do_not_squeeze_them(rows: list[dict[str, Any]]) -> None:
    wide = [{**r, "frechet_high": 1000.0} for r in rows]
    for shown, narrow in ((rows, False), (wide, True)):
        figure = plots.plot_quality(shown, narrow=narrow)
        assert figure is not None
        numbers = {text.get_text(): text.xy for axis in figure.axes for text in axis.texts}
        assert numbers == {str(k): (r["nfe"], r["frechet"]) for k, r in enumerate(shown, 1)}
        low, high = figure.axes[0].get_ylim()
        assert 2 < low < 4 and 30 < high < 50  # nor does the baseline of 0.35, far below, compress them


def test_repeats_show_their_deviation(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    protocol = {**PROTOCOL, "repeats": 3}
    shown = [{**r, "protocol": protocol, "deviation": {"frechet": 0.123, "psnr": 0.456}} for r in rows]
    text = report.write_report(tmp_path, shown, {}).read_text()
    assert "± 0.12" in text and "± 0.46" in text and "means over 3 disjoint blocks" in text


def test_prompts_are_named(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    texts = [f"a <cat> number {k}" for k in range(25)]
    shown = [{**r, "protocol": {**PROTOCOL, "prompts": texts}} for r in rows]
    text = report.write_report(tmp_path, shown, {}).read_text()
    assert "a &lt;cat&gt; number 19" in text and "number 20" not in text and "and 5 more" in text
    assert "--prompt 'a <cat> number 0'" in report.sample_command(shown[0])


def test_the_grid_puts_each_image_where_it_belongs(rows: list[dict[str, Any]]) -> None:
    images = {rows[0]["key"]: np.zeros((3, 3, 8, 8), np.uint8), rows[1]["key"]: np.zeros((3, 3, 8, 8), np.uint8)}
    images[rows[1]["key"]][2, 0] = 255  # the third image of the second row is red
    picture = np.asarray(report.image_grid(rows, images, ["one", "two", "three"]))
    red = (picture == [255, 0, 0]).all(axis=2)
    assert red.sum() == 56 * 56
    y, x = np.argwhere(red).min(axis=0)
    black = (picture == 0).all(axis=2)
    columns = np.flatnonzero(black[y - 61 : y - 5].all(axis=0))  # of the row above
    assert (columns >= x).sum() == 56
    assert (columns < x).sum() == 2 * 56


def test_the_strip_enlarges_without_smoothing() -> None:
    images = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2) * 60
    pixels = np.asarray(report.image_strip(images, height=8))
    assert pixels.shape == (8, 8, 3)
    assert set(np.unique(pixels)) == {0, 60, 120, 180}


def test_the_table_has_a_line_a_row_and_marks_the_front(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    for width in (78, 100, 120, 160):
        console = Console(width=width, no_color=True)
        with console.capture() as captured:
            console.print(report.results_table(rows, width))
        lines = captured.get().splitlines()
        assert len(lines) == len(rows) + 1, "a cell was wrapped"
        assert "…" not in captured.get(), "a cell was cut"
        for r, line in zip(rows, lines[1:], strict=True):
            assert line[1:].lstrip().startswith(r["name"])
            assert f"{r['frechet']:.2f}" in line
        assert [line[0] for line in lines[1:]].count("*") == 4


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text_to_every_library(
    rows: list[dict[str, Any]], images: dict[str, np.ndarray], tmp_path: Path
) -> None:
    names = ["a$b", "runs/$x^$", "_hidden", "[/red]", "<b>", "{{ 1 }}", "名前", "%s"]
    shown = [{**r, "name": name, "model": name} for r, name in zip(rows, names, strict=True)]
    shown[0] |= {"model": None}
    text = report.write_report(tmp_path, shown, images, ["$", "[b]", *"cdefghij"]).read_text()
    assert Page(text).open == [] and "{{ 1 }}" in text and "&lt;b&gt;" in text
    figure = plots.plot_quality(shown)
    assert figure is not None
    assert {t.get_text().strip() for t in figure.legends[0].get_texts()} >= {r"runs/\$x^\$", "_hidden", "[/red]"}


def test_narrow_axes_have_ticks() -> None:
    assert log_ticks(0.09, 30) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
    for low, high in ((4.8, 9.2), (0.38, 0.57), (1.01, 1.09), (97, 103)):
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 12 and low <= ticks[0] < ticks[-1] <= high


def test_a_page_of_few_images(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its table has the columns that have figures, and it says what the recommendation is worth."""
    best = report.recommended_row(rows)
    assert best is not None and not is_uncertain(best)
    best |= {"frechet_low": 0.8 * best["frechet"], "frechet_high": 1.2 * best["frechet"]}
    assert is_uncertain(best) and not is_uncertain({**best, "deviation": {"frechet": 0.1}})
    few = [{**row, "precision": None, "recall": None, "coverage": None} for row in rows]
    failed = {**few[0], "failed": "NaN", "role": "variant", "frechet": None}
    page = report.write_report(tmp_path, [*few, failed], {}).read_text()
    assert "Few images: of 500" in page
    for name in ("precision", "recall", "coverage"):
        assert f'aria-label="{name}"' not in page
        assert any(column.cell == name for column in main_columns(True, ())), name
    table = page[page.index('<table id="rows">') :]
    heads = table[: table.index("</thead>")].count("<th ")
    assert f'colspan="{heads - 2}"' in table and 'aria-label="speedup"' in table
    first = table[table.index("<tbody>") : table.index("</tr>", table.index("<tbody>"))]
    assert first.count("<td") + first.count("<th ") == heads

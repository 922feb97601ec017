"""What the documents show must run, and what they link to must exist."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.plan import plan
from hasten.samplers.ddim import DDIM
from hasten.schedules import EDM, Flow, VPCosine
from hasten.times import UniformTime

ROOT = Path(__file__).parent.parent
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKING = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/RESULTS.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
# What the blocks of a page leave in their namespace: name, shape.
SHAPES = {
    "docs/index.md": {"images": (10, 1, 28, 28), "samples": (4, 3, 32, 32)},
    "docs/samplers.md": {"x": (4, 1, 28, 28)},
    "docs/tuning.md": {"x": (4, 1, 28, 28)},
    "docs/distillation.md": {"x": (4, 1, 28, 28)},
    "docs/diffusers.md": {"x": (2, 3, 16, 16)},
    "docs/extending.md": {"images": (2, 1, 28, 28), "x": (5, 2)},
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.fixture
def tiny_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DiffusionPipeline.from_pretrained` gives a tiny SDXL pipeline, and `.to("cuda")` leaves it on the CPU."""
    diffusers = pytest.importorskip("diffusers")
    from .adapters import tiny

    made: dict[str, Any] = {}

    def from_pretrained(cls: type, where: str, **options: Any) -> Any:
        return made.setdefault(where, tiny.sdxl_pipeline())

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *where, **options: pipe)


def test_the_sampler_of_contributing_is_first_order_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Euler's method in the coordinate x / sigma is DDIM (Song et al. 2020, 2010.02502, section 4.3), row by row."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert block is not None
    module = types.ModuleType("hasten.samplers.euler")
    module.__package__ = "hasten.samplers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block.group(1), vars(module))
    euler = module.Euler()
    assert euler.nfe(6) == 6
    for schedule in (VPCosine(), EDM(), Flow()):
        times = UniformTime()(schedule, 6)
        mine, theirs = plan(euler, schedule, times), plan(DDIM(), schedule, times)
        for coefficient in ("a", "B", "C"):
            torch.testing.assert_close(getattr(mine, coefficient), getattr(theirs, coefficient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_python_of_a_page_runs(page: Path, tiny_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Block after block in one namespace, as a reader would type them; samples and pictures are finite."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of what the documents themselves call
        for category in ("diffusers", "transformers", "torch", "huggingface_hub"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=f"{category}.*")
        for block in blocks(page):
            exec(compile(block, name(page), "exec"), vars(module))
    for key, shape in SHAPES.get(name(page), {}).items():
        value = vars(module)[key]
        assert value.shape == shape and torch.isfinite(value).all()
    if name(page) == "README.md":
        assert vars(module)["image"].size == (16, 16) and vars(module)["fast"] is not vars(module)["pipe"]


def test_the_distiller_of_the_documents_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if it lay in the folder: it is found by name, trains, and its student is saved and samples."""
    import hasten
    import hasten.distillers
    from hasten.nets.unet import UNet

    (code,) = (block for block in blocks(ROOT / "docs" / "extending.md") if "class Direct" in block)
    (tmp_path / "direct.py").write_text(code)
    monkeypatch.setattr(hasten.distillers, "__path__", [*hasten.distillers.__path__, str(tmp_path)])
    denoiser = hasten.Denoiser(UNet(1, widths=(8,)).eval(), VPCosine(), prediction="v")
    data = torch.randn(16, 1, 8, 8).clamp(-1, 1)
    options: dict[str, Any] = {"steps": 4, "batch_size": 4, "precision": "fp32", "show": False}
    hasten.distill_model(hasten.Model(denoiser, "tiny", (1, 8, 8)), tmp_path / "out", "direct", data, **options)
    assert hasten.load(tmp_path / "out").sample(2).shape == (2, 1, 8, 8)


def test_the_first_screen_is_short() -> None:
    """One sentence, the installation, eight lines of Python, a table and a plot within sixty lines."""
    text = (ROOT / "README.md").read_text()
    first = "\n".join(text.splitlines()[:40])
    assert "pip install" in first and "docs/images/speed.svg" in first
    assert len(blocks(ROOT / "README.md")[0].split("\n\n")[-1].strip().splitlines()) <= 8


def test_the_figures_of_the_readme_are_recorded() -> None:
    """Each row of the measured table is a row of RESULTS.md, to the digit."""
    from benchmarks.plot_results import rows

    recorded = [(row.nfe, row.speedup, row.distance) for row in rows()]
    lines = re.findall(r"^\| [^|]* \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) == 7
    for nfe, speedup, distance in lines:
        assert (int(nfe), float(speedup), float(distance)) in recorded


def test_the_commands_of_the_documents_are_commands() -> None:
    """Every `hasten ...` line names a verb and options that exist."""
    from hasten.cli import verbs as commands

    fenced = (block for page in PAGES for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.S | re.M))
    text = "\n".join(fenced).replace("\\\n", " ")
    lines = re.findall(r"^(?:torchrun .* -- )?hasten ([a-z-]+)(.*)$", text, re.M)
    assert len(lines) >= 20
    for verb, rest in lines:
        known = inspect.signature(getattr(commands, verb.replace("-", "_"))).parameters
        for option in re.findall(r"--([\w-]+)", rest.split("#")[0]):
            assert {option.replace("-", "_"), f"{option}_"} & known.keys(), (verb, option)
        out = re.findall(r"--out (\S+)", rest)
        assert verb != "sample" or "--separate-files" in rest or all(file.endswith(".png") for file in out), rest


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of hasten or something in one."""
    module, _, attribute = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
        return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that exist, headings that they have, and in the API reference names that hasten has."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), (name(page), target)
        if anchor.startswith("hasten."):
            assert resolves(anchor), (name(page), anchor)
            assert any(anchor.startswith(entry) for entry in re.findall(r"^::: (\S+)", file.read_text(), re.M)), anchor
        elif anchor:
            assert anchor in anchors(file), (name(page), f"{target}#{anchor}")


def test_the_api_reference_names_modules_that_exist() -> None:
    entries = [entry for page in DOCS for entry in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(entries) > 20 and all(resolves(entry) for entry in entries)


def test_there_is_one_version() -> None:
    """That of the package is read by pyproject.toml; the citation names it."""
    import hasten

    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None and cited[1] == hasten.__version__
    assert 'version = { attr = "hasten._version.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} <= listed


@pytest.mark.parametrize("folder", ["samplers", "guides", "starts", "accelerators", "tuning", "distillers"])
def test_every_method_is_documented(folder: str) -> None:
    """The pages of the families name all that `pick` knows."""
    from hasten.pick import method_names

    text = "\n".join(page.read_text() for page in DOCS)
    assert not [method for method in method_names(folder) if f"`{method}`" not in text]


def test_the_glossary_has_two_lines_a_word() -> None:
    entries = (ROOT / "docs" / "glossary.md").read_text().split("\n## ")[1:]
    assert len(entries) >= 35 and entries == sorted(entries, key=str.lower)
    for entry in entries:
        lines = entry.strip().splitlines()[2:]
        assert len(lines) == 2 and lines[1].startswith("*"), entry


def test_the_documents_speak_the_words_of_the_field() -> None:
    """Words that a reader who knows diffusers, torch and accelerate would have to look up."""
    private = (
        r"drawn on|heard|lessons?|chase|shelf|parted|teleport|told|asked|goes on|whole\(|floors? \(|seams?|rehearsal|"
        r"query|queries|the law|climb|company|mourn"
    )
    for page in PAGES:
        if page.name not in ("glossary.md", "extending.md"):  # which explain the class Query
            found = re.findall(rf"(?i)\b({private})\b", page.read_text())
            assert not found, (name(page), found)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """`make docs`: pages, links and anchors of the site, and the docstrings of the reference."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

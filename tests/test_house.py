"""The rules of the house: layers, file length, light imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hasten"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(p for folder in ("hasten", "tests", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*.py"))

# The first word of a module's path inside hasten, and the height of the floor it stands on.
FLOORS = {
    -1: "errors environment families",
    0: "nets metrics zoo runtime company ranks files",
    1: "schedules discrete predictions times sampling tracing plan denoiser exact machine basis program noise conditions "
    "finite arguments pick aliases",
    2: "samplers tuning guides starts train processes accelerators distillers",
    3: "resolve model shelf model_files weights reopening training images tasks adapters parallel_cost parallel_work",
    4: "commands distill quantize tune terminal compare results report plots variants many meter jobs reference_images",
    5: "cli ui __main__",
}
LAYERS = {name: floor for floor, names in FLOORS.items() for name in names.split()}
# Methods do not know one another's folders, but for these.
FRIENDS = {
    "distillers": {"train", "samplers"}, "tuning": {"train", "samplers"}, "starts": {"train", "samplers", "guides"},
    "guides": {"train"},
}  # fmt: skip
METHODS = {name for name, layer in LAYERS.items() if layer == 2}
# Never at the top of a module: they are slow to import, or optional.
LAZY = {
    "diffusers", "transformers", "accelerate", "tensorboard", "matplotlib", "scipy", "gradio", "onnxruntime",
    "openvino", "onnx", "onnxscript", "nncf", "cyclopts", "rich", "jinja2",
}  # fmt: skip


def module_of(path: Path) -> str:
    """The dotted name of a source file, `hasten.samplers.heun`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: Path) -> list[str]:
    """Absolute dotted names of all that a tree imports; of `from a import b` both `a` and `a.b`."""
    found = []
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no function bodies, nothing under TYPE_CHECKING."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return None
            return self.generic_visit(node)

    return Strip().visit(tree)


def breaches(path: Path, source: str) -> list[str]:
    """The imports of one file that reach up a floor, or across into another kind of method."""
    own = module_of(path).split(".")
    if len(own) < 2:
        return []  # hasten/__init__.py names everything, lazily
    wrong = []
    for name in imports(ast.parse(source), path):
        other = name.split(".")
        if other[0] != "hasten" or len(other) < 2 or other[1] == own[1] or other[1] not in LAYERS:
            continue
        up = LAYERS[other[1]] > LAYERS[own[1]]
        across = {own[1], other[1]} <= METHODS and other[1] not in FRIENDS.get(own[1], set())
        if up or across:
            wrong.append(f"{module_of(path)} imports {name}")
    return wrong


def test_every_module_has_a_layer() -> None:
    homeless = {module_of(p).split(".")[1] for p in SOURCES if module_of(p) != "hasten"} - set(LAYERS)
    assert not homeless, f"give these a floor in LAYERS: {sorted(homeless)}"


def test_lower_never_imports_higher() -> None:
    wrong = [line for path in SOURCES for line in breaches(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_the_layering_rule_sees_a_breach() -> None:
    path = PACKAGE / "samplers" / "made_up.py"
    assert breaches(path, "from ..model import Model")
    assert breaches(path, "def f():\n    from .. import commands")
    assert breaches(path, "import hasten.guides.cfg")
    assert not breaches(path, "from ..schedules import Schedule\nfrom .ddim import DDIM\nimport torch")


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in EVERYTHING if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"more than 400 lines: {long}"


def test_nothing_imports_torchvision() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in EVERYTHING
        if any(name.split(".")[0] == "torchvision" for name in imports(ast.parse(path.read_text()), path))
    ]
    assert not wrong, wrong


def test_slow_packages_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{module_of(path)} imports {name}"
        for path in SOURCES
        for name in imports(top_level(ast.parse(path.read_text())), path)
        if name.split(".")[0] in LAZY
    ]
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout


def test_importing_everything_brings_in_nothing_heavy() -> None:
    modules = [module_of(p) for p in SOURCES if not p.stem.startswith("__main__")]
    heavy = ["torchvision", "diffusers", "transformers", "accelerate", "tensorboard", "matplotlib", "torch._dynamo"]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        f"import hasten\n[getattr(hasten, name) for name in hasten.__all__]\n"
        f"print([h for h in {heavy!r} if h in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hasten.cli import main\nassert main(['--help']) == 0\n"
        "assert main(['sample', '--help']) == 0\nassert 'torch' not in sys.modules"
    )
    assert "--steps" in run(code)


@pytest.mark.timeout(240)
def test_import_costs_little_more_than_torch() -> None:
    """`import hasten` with all its public names against `import torch`: CPU seconds, interleaved, least of several."""
    torch_code, ours = "import torch", "import hasten\nfor name in hasten.__all__: getattr(hasten, name)"
    clock = "import gc, time\ngc.disable()  # it looks at all of torch, whenever it likes\n"
    clock += "begin = time.process_time()\n{}\nprint(time.process_time() - begin)"
    best = {torch_code: float("inf"), ours: float("inf")}
    deadline = time.monotonic() + 120
    for turn in range(12):
        for code in best:
            best[code] = min(best[code], float(run(clock.format(code))))
        if turn >= 1 and best[ours] < 1.35 * best[torch_code] or time.monotonic() > deadline:
            break
    assert best[ours] < 1.35 * best[torch_code], best  # some 130 small files; one heavy package would cost as much

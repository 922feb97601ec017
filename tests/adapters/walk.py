"""All pipelines of the installed `diffusers`, read as text: how each sets its time steps, and what it asks of a scheduler.

`python -m tests.adapters.walk` prints the table of docs/pipelines.md.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.adapters.diffusers import as_scheduler
from hasten.errors import BadInput

from .tiny_pipelines import TRIED

STEPS = 4
CALL = re.compile(r"(?<!def )\b(retrieve_timesteps|[\w.]*scheduler\.set_timesteps)\(")
STEP = re.compile(r"\b\w*\.?\w*scheduler\.step\(")
# Pipelines that tests of other files run, and these files.
ELSEWHERE = {
    "StableDiffusionPipeline": "tiny.py",
    "StableDiffusionImg2ImgPipeline": "test_scheduler.py",
    "StableDiffusionInpaintPipeline": "test_scheduler.py",
    "StableDiffusionControlNetPipeline": "test_scheduler.py",
    "DiTPipeline": "tiny.py",
    "DDPMPipeline": "tiny.py",
    "LatentConsistencyModelPipeline": "test_scheduler_arguments.py",
    "TextToVideoZeroPipeline": "test_scheduler_arguments.py",
}
# Refused for what the text does not say, with the reason.
OTHERWISE = {"StableVideoDiffusionPipeline": "its scheduler has timestep_type 'continuous'"}
# Keywords of step that stand for what hasten's scheduler does not do.
UNKNOWN = re.compile(r"^(variance_noise|old_pred_original_sample|averaging|start_time|stage|dmd\w*|.*_sigma\w*)$")


@dataclass(frozen=True)
class Pipeline:
    """What the text of a pipeline says.

    Attributes:
        name, family: of the class and of its folder.
        schedulers: classes that its scheduler may have.
        calls: texts of its calls of `set_timesteps` and `retrieve_timesteps`.
        sigmas: texts of its default sigmas.
        text: of the class.
        module: the text of its file.
    """

    name: str
    family: str
    schedulers: tuple[str, ...]
    calls: tuple[str, ...]
    sigmas: tuple[str, ...]
    text: str
    module: str


def balanced(text: str, start: int) -> str:
    """The text from `start` to the end of the parenthesis that opens first after it."""
    depth, end = 0, start
    while True:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[end], 0)
        end += 1
        if depth == 0 and text[end - 1] in ")]}":
            return text[start:end]


@cache
def pipelines() -> tuple[Pipeline, ...]:
    """All classes of the folder of pipelines that set time steps, in the order of their names."""
    import diffusers

    found, root = [], Path(diffusers.__file__).parent / "pipelines"
    for file in sorted(root.rglob("*.py")):
        module = file.read_text()
        if "set_timesteps(" not in module and "retrieve_timesteps(" not in module:
            continue
        family = next(part for part in file.relative_to(root).parts if part != "deprecated").removesuffix(".py")
        starts = [*re.finditer(r"^class (\w+)\(", module, re.M)]
        ends = [match.start() for match in re.finditer(r"^(?:class |def |@)", module, re.M)] + [len(module)]
        for start in starts:
            text = module[start.start() : min(end for end in ends if end > start.start())]
            if "Pipeline" not in start[1] or "def __call__(" not in text or "def __init__(" not in text:
                continue
            calls = [balanced(text, match.start()) for match in CALL.finditer(text)]
            if not calls:
                continue
            kinds = balanced(text, text.index("def __init__("))
            sigmas = [line(text, match.end()) for match in re.finditer(r"^ +sigmas = ", text, re.M)]
            names = tuple(dict.fromkeys(re.findall(r"\w*Scheduler\w*", kinds)))
            found.append(Pipeline(start[1], family, names, tuple(calls), tuple(sigmas), text, module))
    return tuple(sorted(found, key=lambda one: (one.family, one.name)))


def line(text: str, start: int) -> str:
    """The expression that begins at `start`: a line, or more where parentheses are open."""
    end = text.index("\n", start)
    while True:
        piece = text[start:end]
        if all(piece.count(a) <= piece.count(b) for a, b in ("()", "[]", "{}")):
            return piece.strip()
        end = text.index("\n", end + 1)


@cache
def replaced(name: str, dynamic: bool) -> Any:
    """hasten's scheduler in place of one of this class; or the reason why there is none."""
    import diffusers

    name = {"KarrasDiffusionSchedulers": "DDIMScheduler", "SchedulerMixin": "DDIMScheduler"}.get(name, name)
    kind = getattr(diffusers, name, None)
    if kind is None:
        return f"{name} is not a class of diffusers"
    options = {"use_dynamic_shifting": True} if dynamic and "FlowMatchEuler" in name else {}
    if name == "UniPCMultistepScheduler":  # as the pipelines of videos have it
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    try:
        return as_scheduler("unipc", like=kind(**options))
    except BadInput as error:
        return str(error)
    except Exception as error:  # of the scheduler itself, which needs arguments
        return f"{name} needs arguments: {type(error).__name__}"


@cache
def refusal(one: Pipeline) -> str | None:
    """Why hasten's scheduler does not run in a pipeline; None where nothing in its text says so."""
    if one.name in OTHERWISE:
        return OTHERWISE[one.name]
    reasons = [replaced(name, False) for name in one.schedulers or ("SchedulerMixin",)]
    if all(isinstance(reason, str) for reason in reasons):
        return short(reasons[0])
    scheduler = next(reason for reason in reasons if not isinstance(reason, str))
    for attribute in sorted(set(re.findall(r"self\.scheduler\.(\w+)", one.text))):
        flow = "FlowMatch" in "".join(one.schedulers) or "UniPC" in "".join(one.schedulers)
        written = f"scheduler.{attribute} = " in one.text
        if attribute not in ("sigmas", "alphas_cumprod") and not hasattr(scheduler, attribute) and not written:
            return f"reads `scheduler.{attribute}`"
        if attribute == ("alphas_cumprod" if flow else "sigmas"):
            return f"reads `scheduler.{attribute}`"
    if "alphas_cumprod[" in one.text:
        return "reads `scheduler.alphas_cumprod` at whole timesteps"
    for entry in sorted(set(re.findall(r"self\.scheduler\.config\.(\w+)", one.text))):
        guarded = re.search(rf"(hasattr\(\s*self\.scheduler\.config, ?|scheduler\.config\.get\()\"{entry}\"", one.text)
        if entry not in ("get", "items", *scheduler.config) and not guarded:
            return f"reads `scheduler.config.{entry}`"
    for match in STEP.finditer(one.text):
        call = ast.parse(balanced(one.text, match.start()), mode="eval").body
        assert isinstance(call, ast.Call)
        for keyword in call.keywords:
            if keyword.arg and UNKNOWN.match(keyword.arg):
                return f"passes `{keyword.arg}` to `step`"
    for call_text in one.calls:
        for word in keywords(call_text) - set(inspect.signature(scheduler.set_timesteps).parameters):
            return f"passes `{word}` to `set_timesteps`"
    return None


def short(reason: str) -> str:
    """A reason without what differs from run to run."""
    return reason.partition(": hasten does not know")[0].replace("|", "/")


def keywords(call: str) -> set[str]:
    """The keywords of a call."""
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    return {word.arg for word in parsed.keywords if word.arg}


class Missing(dict[str, Any]):
    """Names of a pipeline's call that do not matter here are None; those of `known` and builtins are looked up there."""

    def __init__(self, known: Mapping[str, Any], *given: Any, **names: Any) -> None:
        super().__init__(*given, **names)
        self.known = known

    def __missing__(self, name: str) -> Any:
        if name in self.known or hasattr(builtins, name):
            raise KeyError(name)
        return STEPS if name.endswith("num_inference_steps") else None


def functions(one: Pipeline) -> dict[str, Any]:
    """The functions at the top of a pipeline's file that its time steps come from."""
    given: dict[str, Any] = {"np": np, "torch": torch, "math": math, "inspect": inspect, "Any": Any, "List": list}
    wanted = " ".join([*one.sigmas, "retrieve_timesteps(" if "retrieve_timesteps(" in one.module else ""])
    module = one.module
    if "retrieve_timesteps(" in module and "def retrieve_timesteps(" not in module:  # imported from there
        module += next(other.module for other in pipelines() if other.name == "FluxPipeline")
    for match in re.finditer(r"^def (\w+)\(", module, re.M):
        if f"{match[1]}(" in wanted:
            end = re.search(r"\n(?=[@\w])", module[match.end() :])
            source = module[match.start() : match.end() + (end.start() if end else len(module))]
            exec(f"from __future__ import annotations\n{source}", given)
    return given


def distinct() -> dict[tuple[Any, ...], Pipeline]:
    """One pipeline for each way to set time steps, of those that are not refused."""
    found: dict[tuple[Any, ...], Pipeline] = {}
    for one in pipelines():
        if refusal(one) is None:
            found.setdefault((one.schedulers, one.calls, one.sigmas), one)
    return found


def replay(one: Pipeline, dynamic: bool) -> Iterator[Any]:
    """Set the time steps of hasten's scheduler as a pipeline does, one result for each of its calls and default sigmas.

    Yields:
        The scheduler after each call.
    """
    known = functions(one)
    for name in one.schedulers or ("SchedulerMixin",):
        scheduler = replaced(name, dynamic)
        if isinstance(scheduler, str):
            continue
        names = Missing(
            known, num_inference_steps=STEPS, denoising_inference_steps=STEPS, steps=STEPS, mu=0.8, scheduler=scheduler,
            audio_scheduler=scheduler, scheduler_kwargs={"mu": 0.8} if dynamic else {}, schedule_mu=0.0, std=1.0,
            logsnr_min=-6.0, logsnr_max=2.0, init_noise_level=0.9, threshold_noise=0.025, extra_set_kwargs={},
            t_schedule=torch.tensor([1.0, 0.7, 0.4, 0.1]), audio=torch.zeros(1), set_timesteps_kwargs={}, predictor_steps=STEPS, sample_scheduler=scheduler,
        )  # fmt: skip
        names["self"] = Self(scheduler)
        names["timesteps"] = np.linspace(1000, 1.0, STEPS).astype(np.int64).astype(np.float32)
        values = [value for text in one.sigmas if (value := evaluated(text, known, names)) is not None] or [None]
        if not any(re.search(r"\btimesteps /", text) for text in one.sigmas):
            names["timesteps"] = None
        for call in one.calls:
            if "mu" in keywords(call) and not scheduler.spec.flow:
                continue  # a pipeline of flows, with a table
            for sigmas in values:
                names["sigmas"] = names["s"] = sigmas
                names["custom_sigmas"] = names["custom_timesteps"] = None
                if sigmas is None and re.search(r"set_timesteps\(sigmas=", call):
                    names["sigmas"] = names["s"] = [1.0, 0.7, 0.4]
                if re.search(r"set_timesteps\(timesteps=", call):  # those that the caller gave
                    names["timesteps"] = [900, 600, 300, 100]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    eval(call, known, names)
                yield scheduler


class Self:
    """A pipeline of which only the scheduler matters."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return {}
        return self.scheduler if name.endswith("scheduler") else None


def evaluated(text: str, known: dict[str, Any], names: Mapping[str, Any]) -> Any:
    """Default sigmas of a pipeline; None where they are not computed from the number of steps."""
    try:
        value = eval(text, known, Missing(known, {**names, "sigmas": None}))
    except Exception:
        return None
    values = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
    return value if isinstance(values, list) and len(values) in (STEPS, STEPS + 1) else None


def table() -> str:
    """The table of docs/pipelines.md: a row for each family."""
    families: dict[str, list[Pipeline]] = defaultdict(list)
    for one in pipelines():
        families[one.family].append(one)
    lines = ["| family | pipelines | tried | refused | not tried |", "| --- | --- | --- | --- | --- |"]
    for family, members in families.items():
        tried = [one.name for one in members if one.name in TRIED or one.name in ELSEWHERE]
        refused = {one.name: reason for one in members if one.name not in tried and (reason := refusal(one))}
        reasons = defaultdict(list)
        for name, reason in refused.items():
            reasons[reason].append(name)
        said = "; ".join(f"{len(names)}: {reason}" for reason, names in reasons.items())
        shown = ", ".join(name.removesuffix("Pipeline") for name in tried)
        rest = len(members) - len(tried) - len(refused)
        lines.append(f"| {family} | {len(members)} | {shown or '-'} | {said or '-'} | {rest or '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

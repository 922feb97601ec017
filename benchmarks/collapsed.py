"""Students collapsed on purpose: whether their diversity flags them, and what the teacher's first evaluation restores.

    python -m benchmarks.collapsed --data data/emoji --out runs/collapsed

1. The one-step LoRA of `emoji_mobile`, merged, is trained for a few dozen steps so that it ignores the noise at the
   first time of a trajectory: for each prompt its answer there is the mean of its answers to several noises. At later
   times it keeps its own answers. Saved, and not trained again. `hasten compare emoji_mobile --data DATA` measures it.
2. The same student, whose answer at the first time is that to one fixed noise: one picture for each prompt. It makes
   one to four DDIM steps, alone and with the teacher's first evaluation in the place of its own, with and without
   guidance (Gandikota & Bau 2025, arXiv:2503.10637).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hasten
from hasten.cli import main as command
from hasten.denoiser import Wrapper
from hasten.metrics import extract
from hasten.metrics.paired import ratio_estimate
from hasten.metrics.text_judge import load_judge
from hasten.model import Model

TEACHER, BASE, LORA = "emoji_mobile", "emoji", "emoji_mobile_one_step_lora"
VARIANTS = """
rounds = 1
[reference]
name = "teacher, UniPC-3 16 steps"
sampler = "unipc:order=3"
times = "trailing"
steps = 16
[[variant]]
name = "student, 1 step"
model = "{out}/student"
[[variant]]
name = "collapsed, 1 step"
model = "{out}/collapsed"
"""


def captions(data: Path, split: str = "train") -> list[str]:
    """The captions of the pictures of a split."""
    lines = (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def collapsed_student(student: Model, prompts: list[str], steps: int, batch: int, noises: int, lr: float) -> Model:
    """The student trained to answer the mean over noises at the first time, and its own answers at later ones."""
    frozen, net = student.denoiser, copy.deepcopy(student.denoiser)
    schedule, first = (
        student.denoiser.schedule,
        float(student.resolve(steps=1, sampler="ddim", times="trailing").times[0]),
    )
    parameters = list(net.net.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(parameters, lr)
    draw, clock = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(steps):
        chosen = [prompts[k] for k in torch.randint(len(prompts), (batch,), generator=draw).tolist()]
        cond = student.conditions(batch, chosen)
        many = {key: value.repeat_interleave(noises, 0) for key, value in cond.items()}
        x = torch.randn(batch, noises, *student.shape, generator=draw)
        with torch.no_grad():
            answers = frozen(x.flatten(0, 1), first, **many).unflatten(0, (batch, noises))
        low = 0.1 + 0.8 * float(torch.rand((), generator=draw))
        later = float(schedule.alpha(low)) * answers[:, 0] + float(schedule.sigma(low)) * x[:, 1]
        with torch.no_grad():
            kept = frozen(later, low, **cond)
        collapsed = net(x[:, 0], first, **cond) - answers.mean(1)
        loss = collapsed.square().mean() + (net(later, low, **cond) - kept).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 4 * (1 - step / steps))
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            spread = float((answers - answers.mean(1, keepdim=True)).square().mean())
            left = float(collapsed.detach().square().mean())
            spent = time.perf_counter() - clock
            print(f"step {step}: to the mean over noises {left:.4f} (before {spread:.4f}), {spent:.0f} s", flush=True)
    net.net.requires_grad_(False)
    return replace(student, denoiser=net.eval(), name="collapsed", sha256="")


class OneNoise(Wrapper):
    """A student whose answer at the first time is that to one fixed noise, whatever the noise is."""

    def __init__(self, student: nn.Module, noise: torch.Tensor) -> None:
        super().__init__(student)
        self.noise = noise

    def forward(self, x_t: torch.Tensor, t: torch.Tensor | float, **cond: Any) -> torch.Tensor:
        x = self.noise.expand_as(x_t) if float(torch.as_tensor(t).max()) > 0.99 else x_t
        return self.denoiser(x, t, **cond)  # type: ignore[no-any-return]


def first_evaluations(data: Path, count: int) -> None:
    """Print the diversity of `count` prompts of four images each, relative to the teacher's in 8 steps of UniPC."""
    teacher, judge = hasten.load(TEACHER), load_judge("emoji")
    student = teacher.with_lora(LORA)
    noise = torch.randn(1, *student.shape, generator=torch.Generator().manual_seed(123))
    collapsed = replace(student, denoiser=OneNoise(student.denoiser, noise).eval())
    every = captions(data, "test")
    texts = [text for text in every[:: len(every) // count][:count] for _ in range(4)]

    def measured(model: Model, sampler: str, steps: int) -> tuple[torch.Tensor, float]:
        images = model.sample(len(texts), texts, sampler=sampler, times="trailing", steps=steps)
        features = extract(judge, images)[0]
        cosines = (judge.image_vectors(features).double() * judge.texts(texts).double()).sum(1)
        apart = torch.stack([torch.pdist(group).mean() for group in features.reshape(count, 4, -1)])
        return apart, 100 * float(cosines.mean())

    reference, score = measured(teacher, "unipc:order=3", 8)
    print(f"teacher, 8 steps: diversity {float(reference.mean()):.2f}, prompt score {score:.1f}", flush=True)
    for name, model in {"student": student, "collapsed": collapsed}.items():
        for steps, first in ((1, None), (2, None), (2, teacher.guidance_scale), (2, 1.0), (4, None), (4, 1.0)):
            used = replace(model, sampler="ddim", times="trailing", steps=steps, plan=None)
            if first is not None:
                used = used.with_first_evaluation(teacher, teacher_guidance_scale=first)
            apart, score = measured(used, "ddim", steps)
            ratio = ratio_estimate(apart, reference)
            by = "" if first is None else f", first by the teacher at guidance {first:g}"
            figure = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            print(f"{name}, {steps} steps{by}: diversity {figure} times, prompt score {score:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="captioned pictures, with train and test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--noises", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=10, help="of the second part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "collapsed").exists():
        student = hasten.load(TEACHER).with_lora(LORA)
        student.save(args.out / "student", components_from=BASE)
        made = collapsed_student(student, captions(args.data), args.steps, args.batch_size, args.noises, args.lr)
        made.save(args.out / "collapsed", components_from=BASE)
    variants = args.out / "variants.toml"
    variants.write_text(VARIANTS.replace("{out}", str(args.out)), encoding="utf-8")
    how = ["--variants", str(variants), "--data", str(args.data), "--n", str(args.n), "--precision", "fp32"]
    command(["compare", TEACHER, *how, "--timing-batch", "4", "--out", str(args.out / "compare")])
    first_evaluations(args.data, args.prompts)


if __name__ == "__main__":
    main()

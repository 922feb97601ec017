"""Distillation of networks that read text: which conditions reach which evaluation, and the guided teacher's null."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.distillers._conditions import NullConditions, condition_source, unconditional
from hasten.distillers._pairs import pair_captions
from hasten.distillers.guided import GuidedDistillation
from hasten.errors import BadInput
from hasten.guides.cfg import CFG
from hasten.nets import critic as critics
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.predictions import V
from hasten.sampling import Noise
from hasten.schedules import VPCosine
from hasten.train.data import Batches, Data
from hasten.workflows.distill_data import Encoded
from tests.distillers._toy import Steady

COUNT, SHAPE = 12, (2,)
TEXTS = torch.randn(COUNT, 3, 4, generator=torch.Generator().manual_seed(1))
NULL = {"text": torch.full((1, 3, 4), 0.3)}


class Reader(nn.Module):
    """`raw = A x + B mean(text) + b`: under guidance it is of this form again, with other B and b."""

    null_conditions = True
    text: list[Tensor]

    def __init__(self, guidance: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.config = {"guidance": guidance}
        self.guidance_range = guidance
        self.x, self.text = nn.Linear(2, 2), nn.Linear(4, 2, bias=False)
        self.scale = nn.Linear(1, 2) if guidance else None

    def forward(self, x: Tensor, time: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        LOG.append(text.detach().clone())
        pooled = text.mean(1)
        raw = self.x(x) + self.text(pooled)
        if self.scale is None or guidance is None:
            return raw
        return raw + (guidance[:, None] - 1) * (self.text(pooled) - self.scale(torch.ones_like(guidance[:, None])))


LOG: list[Tensor] = []


def reader() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Reader(), VPCosine(offset=0.0), V()).eval().requires_grad_(False)


def captioned(**more: Any) -> Data:
    x = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(2))
    shape: Any = SHAPE
    return Data(COUNT, shape, lambda rows: x[rows], conditions=lambda rows: {"text": TEXTS[rows]}, **more)


def job(out: Path, scale: float = 3.0, steps: int = 2, batch_size: int = 6, **more: Any) -> DistillTask:
    base = reader()
    teacher = NullConditions(CFG(scale).wrap(base), NULL)
    return DistillTask(
        teacher, base, Batches(captioned(), batch_size), SHAPE, out, scale, Steady(steps),
        show=False, null_conditions=NULL, **more,
    )  # fmt: skip


def test_guidance_evaluates_both_branches_in_one_batch_and_the_second_has_the_null_prompt(tmp_path: Path) -> None:
    task = job(tmp_path)
    batch = task.batches[0]
    z, t, cond = torch.randn(6, 2), torch.rand(6, dtype=torch.float64), task.cond(batch)
    assert set(cond) == {"text"} and torch.equal(cond["text"], TEXTS[task.batches.indices(0)])
    LOG.clear()
    one, other = task.branches(task.denoiser.raw, z, t, **cond)
    assert len(LOG) == 1 and torch.equal(LOG[0], torch.cat([cond["text"], NULL["text"].expand(6, 3, 4)]))
    torch.testing.assert_close(one, task.denoiser.raw(z, t, **cond))
    torch.testing.assert_close(other, task.denoiser.raw(z, t, text=NULL["text"].expand(6, 3, 4)))
    torch.testing.assert_close(task.teacher(z, t, **cond), task.teacher_at(torch.full((6,), 3.0))(z, t, **cond))
    guided = CFG(3.0).wrap(task.denoiser)
    expected = guided(z, t, **cond, null_text=NULL["text"].expand(6, 3, 4))
    assert torch.equal(task.teacher(z, t, **cond), expected)
    own = {**cond, "null_text": 2 * cond["text"]}  # a negative prompt of each image comes before the common one
    assert torch.equal(task.teacher(z, t, **own), guided(z, t, **own))
    assert torch.equal(unconditional(own, None, NULL)["text"], 2 * cond["text"])


@pytest.mark.parametrize("span", [None, (1.0, 4.0)])
def test_the_student_of_a_linear_model_reaches_the_guided_teacher(
    tmp_path: Path, span: tuple[float, float] | None
) -> None:
    """Exactly: guidance of a linear network is a linear network, with the mean null embedding in its bias."""
    task = job(tmp_path, steps=400, batch_size=64)
    student = GuidedDistillation(steps=(2,), guidance=span, lr=0.1).merged(task)
    x, t = torch.randn(COUNT, 2), torch.rand(COUNT, dtype=torch.float64)
    scales = torch.full((COUNT,), 3.0) if span is None else torch.linspace(1, 4, COUNT)
    one, other = task.branches(task.denoiser.raw, x, t, text=TEXTS)
    target = other + scales[:, None] * (one - other)
    got = student.raw(x, t, text=TEXTS, **({} if span is None else {"guidance": scales}))
    assert float((got - target).abs().max()) < 0.02 * float((target - one).abs().max())
    assert student.guidance_range == span


METHODS = (
    "guided:steps=(2,)", "guided:steps=(2,),guidance=none,kind=stochastic", "progressive:steps=(2,)", "tract:phases=(4,2)",
    "consistency:guidance=(1,3)", "consistency", "adversarial", "diffusion_gan:critic=heads", "dmd", "prodiff",
    "mmd:features=random", "sft_pg:steps=2",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_evaluation_has_the_conditions_of_its_own_samples(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of teacher, student and critic, in the order of the batch; under guidance followed by the null prompt."""
    if method.startswith("mmd"):
        monkeypatch.setattr("hasten.distillers.mmd.random_classifier", lambda *_, **__: Flat())
    task = job(tmp_path, steps=1, batch_size=6)
    seen: list[Tensor | None] = []
    real = critics.pooled_text
    monkeypatch.setattr(critics, "pooled_text", lambda cond: seen.append(cond.get("text")) or real(cond))
    LOG.clear()
    pick("distillers", method).distill(task)
    text = task.batches[0]["text"]
    null = NULL["text"].expand(6, 3, 4)
    picks = text.repeat(2, 1, 1)  # of sft_pg: two steps of each chain
    allowed = [text, torch.cat([text, null]), text[:1]] + ([picks] if method.startswith("sft_pg") else [])
    assert LOG and all(any(torch.equal(text, one) for one in allowed) for text in LOG)
    if not method.startswith(("mmd", "diffusion_gan", "sft_pg")):
        assert any(torch.equal(text, allowed[1]) for text in LOG), "the guided teacher was evaluated"
    if method.startswith(("adversarial", "diffusion_gan", "dmd", "sft_pg")):
        assert len(seen) > 1 and all(one is not None and any(torch.equal(one, a) for a in allowed) for one in seen)


class Flat(nn.Module):
    """Features of points."""

    def features(self, x: Tensor) -> Tensor:
        return x


def test_pairs_have_the_captions_of_the_data_and_keep_their_indices_alone(tmp_path: Path) -> None:
    task = job(tmp_path)
    pairs = task.pairs("p", 20, steps=2, sampler="ddim", times="trailing")
    rows = pair_captions(pairs.config, torch.arange(20))
    assert sorted(rows[:COUNT].tolist()) == list(range(COUNT)), "each caption once before any comes again"
    batch = pairs[list(range(20))]
    assert torch.equal(batch["text"], TEXTS[rows]) and set(pairs.subset(3, 5)[0]) == {"x", "noise", "text"}
    assert {file.name.partition("-")[0] for file in (tmp_path / "pairs/p").iterdir()} == {"ends", "pairs.json"}
    noise = Noise([pairs.config["seed"] + 7], SHAPE)
    grid = pick("times", "trailing")(task.schedule, 2)
    again = draw(task.teacher, pick("samplers", "ddim"), grid, noise, cond={"text": TEXTS[rows[7:8]]})
    torch.testing.assert_close(pairs[7]["x"], again[0])
    other = captioned(captions=tuple("abcdefghijkl"))
    task.batches = Batches(other, 6)
    with pytest.raises(BadInput, match="captions_digest"):
        task.pairs("p", 20, steps=2, sampler="ddim", times="trailing")


def test_a_digest_tells_captions_apart() -> None:
    texts = [captioned(captions=tuple(word)) for word in ("abcdefghijkl", "abcdefghijkm")]
    digests = {condition_source(Batches(data, 2)).digest() for data in (*texts, captioned())}  # type: ignore[union-attr]
    assert len(digests) == 3


def test_labels_and_prompts_at_once() -> None:
    cond = {"label": torch.tensor([1, 2]), "text": TEXTS[:2], "size": torch.ones(2, 1)}
    out = unconditional(cond, 5, NULL)
    assert out["label"].tolist() == [5, 5] and torch.equal(out["text"], NULL["text"].expand(2, 3, 4))
    assert out["size"] is cond["size"]


def test_rows_that_are_encoded_once_do_not_depend_on_the_order() -> None:
    calls: list[list[int]] = []
    encode = Encoded(lambda rows: calls.append(rows) or {"x": torch.tensor(rows).float()[:, None]}, None, rows=1)  # type: ignore[func-returns-value]
    assert encode([3, 1, 3])["x"].flatten().tolist() == [3, 1, 3] and calls == [[3], [1]] or calls == [[1], [3]]
    assert encode([1, 2])["x"].flatten().tolist() == [1, 2] and len(calls) == 3
    same = Encoded(lambda rows: {"x": torch.tensor(rows).float()[:, None]}, ["a", "b", "a"])
    assert same([2, 1])["x"].flatten().tolist() == [2, 1] and same([0])["x"].item() == 2


def test_a_critic_reads_the_text() -> None:
    heads = critics.FeatureHeads([4], text=4)
    features, text = [torch.randn(3, 4, 4, 4)], TEXTS[:3]
    one = heads(features, 0.5, text=text)
    torch.testing.assert_close(heads(features, 0.5, text=text.flip(1)), one)  # the mean over the tokens
    assert not torch.allclose(one, heads(features, 0.5, text=text.flip(0)))
    mask = torch.tensor([[1, 1, 0]] * 3)
    masked = critics.pooled_text({"text": text, "text_mask": mask, "added_text_embeds": torch.ones(3, 5)})
    assert masked is not None and masked.shape == (3, 9)
    torch.testing.assert_close(masked[:, :4], text[:, :2].mean(1))

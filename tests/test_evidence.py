"""What models of prompts are measured by without real pictures: paired intervals, prompts, folders of features."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compare import advice, compare, jobs
from hasten.compare.advice import row_warnings
from hasten.compare.counting import count_evaluations
from hasten.compare.reuse import count_layers
from hasten.compare.variants import parse_variants
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.metrics import feature_net
from hasten.metrics.difference import image_difference
from hasten.metrics.paired import mean_estimate, psnr_by_image, ratio_estimate, student_quantile
from hasten.model import Model
from hasten.nets.lpips import PerceptualDistance, find_perceptual
from hasten.schedules import VPCosine
from hasten.workflows.evidence import Evidence, collect_evidence
from hasten.workflows.prompts import bundled_prompts, read_prompts

from .prompt_data import SIDE, OracleJudge, ShownPrompts, pattern, shower


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(model: Model, text: str, **more: Any) -> dict[str, dict[str, Any]]:
    Path("set.toml").write_text(text)
    options = {"out": "out", "show": False, "precision": "fp32", "timing_batch": 2, **more}
    return {row["name"]: row for row in compare(model, "set.toml", **options)}


# ---- paired figures ----


def test_intervals_are_those_of_students_t_over_independent_groups() -> None:
    found = mean_estimate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found.value, found.count) == (2.5, 4)
    assert found.high - 2.5 == pytest.approx(3.182446 * (5 / 3 / 4) ** 0.5, rel=2e-3) == 2.5 - found.low
    doubled = mean_estimate(torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4]), [0, 0, 1, 1, 2, 2, 3, 3])
    assert (doubled.low, doubled.high, doubled.count) == (pytest.approx(found.low), pytest.approx(found.high), 4)
    for degrees, quantile in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (100, 1.9840)):
        assert student_quantile(degrees) == pytest.approx(quantile, rel=2e-3)


def test_what_pairs_have_in_common_cancels() -> None:
    others = torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = ratio_estimate(0.7 * others, others)
    assert exact.value == pytest.approx(0.7) and exact.high - exact.low < 1e-6
    noisy = ratio_estimate(0.7 * others + 0.1 * torch.randn(30, generator=torch.Generator().manual_seed(1)), others)
    assert noisy.low < 0.7 < noisy.high and noisy.high - noisy.low > 0.02
    with pytest.raises(BadInput, match="mean is 0"):
        ratio_estimate(torch.ones(2), torch.zeros(2))


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    covered = sum(one.low <= 0 <= one.high for one in map(mean_estimate, values))
    assert 0.925 <= covered / 400 <= 0.975


def test_psnr_by_image_has_the_mean_of_the_difference() -> None:
    a, b = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(psnr_by_image(a, b).mean()) == image_difference(a, b)["psnr"]
    assert psnr_by_image(a, a).tolist() == [100.0] * 5


# ---- prompts ----


def test_prompts_are_read_from_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n\n  two cats \n")
    (tmp_path / "a.jsonl").write_text('"a fox"\n{"id": 3, "prompt": "two\\ncats"}\n{"text": "an owl"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["a fox", "two cats"]
    assert read_prompts(tmp_path / "a.jsonl") == ["a fox", "two cats", "an owl"]
    for line, said in (("{", "line 2: not JSON"), ('{"caption": 3}', "line 2: neither"), ("[]", "line 2: neither")):
        (tmp_path / "b.jsonl").write_text(f'"a"\n{line}\n')
        with pytest.raises(BadInput, match=said):
            read_prompts(tmp_path / "b.jsonl")
    bundled = bundled_prompts()
    assert len(bundled) == len(set(bundled)) == 200


# ---- networks on disk ----


def test_a_folder_of_an_image_encoder_is_a_feature_network(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **size)).eval()
    encoder.save_pretrained(tmp_path / "dino")
    saved = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(saved))
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    mean, std = (torch.tensor(saved[key]).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    net = feature_net(str(tmp_path / "dino"))
    with torch.no_grad():
        expected = encoder(pixel_values=((images + 1) / 2 - mean) / std).pooler_output
        assert torch.allclose(net(images), expected, atol=1e-5)
        assert net(torch.zeros(2, 1, 40, 56)).shape == (2, 16)
    assert str(net.name).startswith("dinov2-")
    (tmp_path / "dino" / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(BadInput, match="transformers cannot load"):
        feature_net(str(tmp_path / "dino"))
    with pytest.raises(BadInput, match=r"dino is no judge.*; a dinov2 gives --features"):
        collect_evidence(judge=str(tmp_path / "dino"))
    with pytest.raises(BadInput, match=f"{tmp_path} holds no feature network: no config.json of a CLIP, SigLIP"):
        collect_evidence(features=tmp_path)


def test_lpips_is_found_by_name_where_other_packages_leave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lines: list[str] = []
    assert find_perceptual("alex") is None and collect_evidence(report=lines.append).perceptual is None
    assert any("LPIPS is not measured" in line and "--lpips" in line for line in lines)
    torch.manual_seed(0)
    distance = PerceptualDistance("alex")
    trunk = {f"features.{name}": value for name, value in distance.layers.named_parameters()}
    heads = {f"lin{k}.model.1.weight": head.reshape(1, -1, 1, 1) for k, head in enumerate(distance.heads)}
    (tmp_path / "checkpoints").mkdir()
    torch.save(trunk, tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    torch.save(heads, tmp_path / "checkpoints" / "lpips_alex.pth")
    evidence = collect_evidence(lpips="alex")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    figures = evidence.paired(a, b)
    assert evidence.settings["lpips"] == "alex" and figures["lpips"].mean() == pytest.approx(float(distance(a, b)))
    assert figures["lpips"].min() > 0 and "lpips" not in evidence.paired(a[..., :16], b[..., :16])
    with pytest.raises(BadInput, match="LPIPS vgg are not on this machine"):
        collect_evidence(lpips="vgg")
    with pytest.raises(BadInput, match="no file or folder squeeze; by name its trunks are alex, vgg"):
        collect_evidence(lpips="squeeze")


def test_prompt_scores_are_cosines_and_match_is_among_the_prompts() -> None:
    prompts = ["red fox 0", "blue cat 0", "green dog 0"]
    images = torch.stack([pattern(text) for text in prompts])
    evidence = Evidence(judge=OracleJudge())
    assert evidence.prompt_scores(images, prompts)["prompt_score"].tolist() == pytest.approx([100.0] * 3, abs=0.01)
    match = evidence.match(images, prompts)
    assert match is not None and (match.value, match.candidates) == (1.0, 3)
    wrong = evidence.match(images.flip(0), prompts)
    assert wrong is not None and wrong.value == pytest.approx(1 / 3)


# ---- diversity, and the first evaluation by the teacher ----


class TwoModes(nn.Module):
    """E[x0 | x_t] of pictures `text +- s P` with equal weights; `collapsed`: at high noise always of the first."""

    null_conditions = True

    def __init__(self, collapsed: bool) -> None:
        super().__init__()
        pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
        self.shift = nn.Parameter(0.15 * pixels / pixels.square().mean().sqrt())
        self.collapsed, self.schedule = collapsed, VPCosine()

    def forward(self, x: Tensor, t: Tensor, text: Tensor, **null: Tensor) -> Tensor:
        alpha, sigma = (
            value(t.double()).reshape(-1, 1, 1, 1).float() for value in (self.schedule.alpha, self.schedule.sigma)
        )
        logit = ((x - alpha * text) * self.shift).flatten(1).sum(1).reshape(-1, 1, 1, 1) * alpha / sigma**2
        logit = logit + (50.0 * (t > 0.9).reshape(-1, 1, 1, 1) if self.collapsed else 0.0)
        return text + torch.tanh(logit) * self.shift


def two_modes(collapsed: bool, steps: int) -> Model:
    denoiser = Denoiser(TwoModes(collapsed), VPCosine(), "x0", clock="t").eval().requires_grad_(False)
    name = "student" if collapsed else "teacher"
    shape = (3, SIDE, SIDE)
    return Model(denoiser, name, shape, conditioning=ShownPrompts(), sampler="ddim", times="trailing", steps=steps)


MODES = """
n = 12
rounds = 1
[reference]
name = "teacher"
sampler = "ddim"
times = "trailing"
steps = 8
guidance_scale = 1.0
[[variant]]
name = "student"
model = "student"
[[variant]]
name = "student, first evaluation by the teacher"
model = "student"
first_evaluation = "{model}"
"""


def test_a_collapsed_student_is_flagged_and_the_teachers_first_evaluation_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = two_modes(True, 4)
    monkeypatch.setattr(jobs, "load_to_compare", lambda name, device: student)
    rows = run(two_modes(False, 8), MODES, prompts=[f"red fox {k}" for k in range(12)])
    collapsed, mended = rows["student"], rows["student, first evaluation by the teacher"]
    assert collapsed["diversity_ratio"][2] < 0.5 and "has lost diversity" in collapsed["warnings"][0]
    assert mended["diversity_ratio"][2] > 0.9 and mended["diversity_ratio"][0] > 0.6 and not mended["warnings"]
    assert collapsed["nfe"] == mended["nfe"] == 4 and rows["teacher"]["diversity_ratio"][0] == 1
    assert mended["key"] != collapsed["key"]
    page = Path("out/report.html").read_text()
    assert "it has lost diversity" in page and page.index("What should I use?") < page.index("Quality against cost")
    config = Path("out/configs/student-first-evaluation-by-the-teacher.toml").read_text()
    assert "first evaluation by teacher" in config
    check_page(page)


def test_the_first_evaluation_is_the_teachers_and_the_others_are_the_students() -> None:
    teacher, student = two_modes(False, 8), two_modes(True, 3)
    both = student.with_first_evaluation(teacher)
    x, text = torch.randn(2, 3, SIDE, SIDE), torch.stack([pattern("a"), pattern("b")])
    cond = {"text": text, "null_text": torch.zeros_like(text)}
    for _ in range(2):
        both.denoiser.reset()
        assert torch.equal(both.denoiser(x, 0.95, **cond), teacher.denoiser(x, 0.95, **cond))
        assert torch.equal(both.denoiser(x, 0.92, **cond), student.denoiser(x, 0.92, **cond))
    guided = student.with_first_evaluation(teacher, 2.0)  # the teacher is without guidance: one evaluation
    with count_evaluations(guided) as count:
        first = guided.denoiser(x, 0.95, **cond)
        assert count == [2]
        second = guided.denoiser(x, 0.92, **cond)
    assert count == [6] and torch.equal(first, teacher.denoiser(x, 0.95, **cond))
    assert torch.equal(second, student.guided(2.0)(x, 0.92, **cond))
    twice = student.with_first_evaluation(teacher, 2.0, teacher_guidance_scale=2.0)
    assert torch.equal(twice.denoiser(x, 0.95, **cond), teacher.guided(2.0)(x, 0.95, **cond))
    reference = {"sampler": "ddim", "steps": 3, "guidance_scale": 2.0}
    row = parse_variants({"reference": reference, "variant": [{"name": "row", "steps": 2}]}).variants[0]
    for name, expected in ({"teacher": first, "teacher:2": twice.denoiser(x, 0.95, **cond)}).items():
        made = jobs.with_teacher(student, replace(row, first_evaluation=name), teacher, "row")
        made.denoiser.reset()
        assert torch.equal(made.denoiser(x, 0.95, **cond), expected)
    assert jobs.split_scale("runs/a:1") == ("runs/a", 1.0) and jobs.split_scale("emoji") == ("emoji", 1.0)
    with pytest.raises(BadInput, match="MODEL or MODEL:SCALE, and 'b'"):
        jobs.split_scale("a:b")
    other = replace(teacher, denoiser=teacher.denoiser.replace(schedule=VPCosine(offset=0.1)))
    with pytest.raises(BadInput, match="needs the student's noise schedule"):
        student.with_first_evaluation(other)
    with pytest.raises(BadInput, match="has one step"):
        two_modes(True, 1).with_first_evaluation(teacher)


# ---- warnings and guidance ----


def plain_row(name: str, seconds: float, psnr: float | None, *accelerators: str, **more: Any) -> dict[str, Any]:
    role = "reference" if psnr is None else "variant"
    row = {"name": name, "role": role, "seconds_per_image": seconds, "psnr": psnr, "accelerators": list(accelerators)}
    return {**row, "speedup": 10 / seconds, "frechet": None, "key": name, **more}


def test_an_accelerated_row_that_does_not_pay_is_warned_of() -> None:
    rows = [plain_row("reference", 10, None, reuse=0.02), plain_row("16 steps", 4, 38.0)]
    idle = plain_row("cache", 9.9, 99.0, "deep_cache", reuse=0.02)
    slow = plain_row("slow cache", 5, 37.0, "deep_cache", reuse=0.5)
    good = plain_row("good cache", 3, 37.0, "deep_cache", reuse=0.5)
    rows += [idle, slow, good]
    assert ["never hit its cache" in line for line in row_warnings(idle, rows)] == [True]
    assert row_warnings(slow, rows) == ["it is no faster than 16 steps, which has no accelerator and is as good"]
    assert not row_warnings(good, rows) and not row_warnings(rows[1], rows)
    other = plain_row("student", 2, 38.0, model="student")
    assert "16 steps" in row_warnings(slow, [other, *rows])[0]  # of the same network, though the student is faster
    assert "student" in row_warnings(slow, [rows[0], other])[0]
    best = advice.recommended_row(rows)
    assert best is not None and best["name"] == "good cache"
    good["diversity_ratio"] = [0.5, 0.4, 0.6]
    best = advice.recommended_row(rows)
    assert best is not None and best["name"] == "16 steps"


def test_reuse_is_the_share_of_weights_that_were_not_run() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 12, bias=False)))
    with count_layers(net) as counts:
        net(torch.zeros(2, 4))
    assert counts.reuse == 0
    with count_layers(net) as counts:
        net(torch.zeros(2, 4))
        net[0](torch.zeros(2, 4))
    assert counts.reuse == pytest.approx(48 / 64 / 2)


def test_a_set_with_guidance_runs_on_a_network_that_has_its_guidance_inside(capsys: Any) -> None:
    text = MODES[: MODES.index("[[variant]]")].replace("1.0", "7.5")
    text += '[[variant]]\nname = "fewer"\nsteps = 4\n[[variant]]\nname = "plain"\nsteps = 4\nguidance_scale = 1.0\n'
    model = shower()
    inside = replace(model, denoiser=model.denoiser.replace(guidance_range=(2.0, 2.0)), guidance_scale=2.0)
    rows = run(inside, text, prompts="red fox 0", n=10)
    assert {row["guidance_scale"] for row in rows.values()} == {2.0} and "plain" not in rows
    assert [row["nfe"] for row in rows.values()] == [8, 4]
    assert "has its guidance inside, with scale 2, which is used for teacher, fewer, plain" in capsys.readouterr().err
    moved = parse_variants({"reference": {"sampler": "ddim", "steps": 2, "guidance_scale": 0.5}}).with_guidance(1.0)
    assert moved.reference.guidance_scale == 1


# ---- the page ----


class Balance(HTMLParser):
    """Whether every tag of a page is closed in order."""

    VOID = {"meta", "input", "br", "img", "link", "hr", "path", "use", "rect", "circle", "line", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()


def check_page(page: str) -> None:
    """The parts of a page with pictures, and that it is well formed."""
    balance = Balance()
    balance.feed(page)
    assert not balance.open and len(balance.ids) == len(set(balance.ids))
    for part in ("Pictures by prompt", 'id="duel"', "flicker", "mix-blend-mode: difference", "seed by seed"):
        assert part in page

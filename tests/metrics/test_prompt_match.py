"""Prompt match against an oracle and against chance; diversity; nearest training images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.metrics.nearest_images import memorisation, nearest_distances
from hasten.metrics.prompt_match import prompt_diversity, prompt_match

CAPTIONS = [f"caption {k}" for k in range(150)]


def unit(n: int, d: int = 32, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_an_oracle_is_always_right_and_a_random_judge_one_in_a_hundred() -> None:
    texts = unit(150)
    oracle = prompt_match(texts, CAPTIONS, texts, CAPTIONS)
    assert (oracle.value, oracle.error, oracle.candidates, oracle.count) == (1.0, 0.0, 100, 150)
    n = 3000
    blind = prompt_match(unit(n, seed=1), [CAPTIONS[k % 150] for k in range(n)], texts, CAPTIONS)
    assert abs(blind.value - 0.01) < 3.5 * (0.01 * 0.99 / n) ** 0.5
    assert 0 < blind.error < 0.01 and blind.interval[0] >= 0


def test_ties_are_wrong_and_fewer_captions_are_easier_and_said() -> None:
    equal = unit(1).expand(150, -1)
    assert prompt_match(unit(150), CAPTIONS, equal, CAPTIONS).value == 0
    few = prompt_match(unit(600, seed=1), [CAPTIONS[k % 5] for k in range(600)], unit(5), CAPTIONS[:5])
    assert few.candidates == 5 and abs(few.value - 0.2) < 0.15


def test_the_draws_depend_on_the_seed_alone() -> None:
    images = F.normalize(unit(150) + 1.2 * unit(150, seed=3), dim=-1)
    first, again, other = (prompt_match(images, CAPTIONS, unit(150), CAPTIONS, 20, seed) for seed in (0, 0, 1))
    assert first == again and first.value != other.value and 0.1 < first.value < 1
    # the standard error is that of the draws and images: another judge of the same quality lies within it
    values = [
        prompt_match(F.normalize(unit(150) + 1.2 * unit(150, seed=k), dim=-1), CAPTIONS, unit(150), CAPTIONS, 20).value
        for k in range(10, 50)
    ]
    assert 0.6 < torch.tensor(values).std() / first.error < 1.6


def test_images_of_one_caption_are_no_independent_evidence() -> None:
    """Copies of every image leave the standard error as it was: p (1 - p) / N of the captions, not of the copies."""
    images = F.normalize(unit(150) + 1.2 * unit(150, seed=3), dim=-1)
    one = prompt_match(images, CAPTIONS, unit(150), CAPTIONS, 150)
    four = prompt_match(images.repeat(4, 1), CAPTIONS * 4, unit(150), CAPTIONS, 150)
    assert four.value == one.value and four.error == pytest.approx(one.error)
    assert one.error == pytest.approx((one.value * (1 - one.value) / 150) ** 0.5)


def test_captions_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(BadInput, match="two different captions or more, found 1"):
        prompt_match(unit(2), ["x", "x"], unit(1), ["x"])
    with pytest.raises(BadInput, match="is not among"):
        prompt_match(unit(1), ["nosuch"], unit(150), CAPTIONS)
    with pytest.raises(BadInput, match="2 images but 1 captions"):
        prompt_match(unit(2), CAPTIONS[:1], unit(150), CAPTIONS)
    with pytest.raises(BadInput, match="NaN or infinity"):
        prompt_match(unit(1) * float("nan"), CAPTIONS[:1], unit(150), CAPTIONS)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    """sqrt(2) sigma E chi_D / sqrt(2) ...: of independent normals N(0, s^2 I_D) pairs are s sqrt(2) E[chi_D] apart."""
    d, s = 200, 0.5
    x = s * torch.randn(400, 4, d, generator=torch.Generator().manual_seed(0))
    measured = prompt_diversity(x)
    assert measured.within == pytest.approx(s * (2 * d) ** 0.5, rel=0.01)
    assert measured.between == pytest.approx(measured.within, rel=0.01)
    assert (measured.prompts, measured.images) == (400, 4) and 0 < measured.error < 0.05
    collapsed = prompt_diversity(x[:, :1].expand(-1, 4, -1))
    assert collapsed.within == 0 and collapsed.between == pytest.approx(measured.between, rel=0.02)
    with pytest.raises(BadInput, match="2 or more images"):
        prompt_diversity(x[:, :1])


def test_the_nearest_row_over_blocks_is_exact_and_a_copy_has_distance_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 50, generator=generator) + 100
    queries = torch.cat([torch.randn(40, 50, generator=generator) + 100, rows[[7, 250]]])
    distances, index = nearest_distances(queries, rows.split(64))
    exact = (queries[:, None].double() - rows[None].double()).norm(dim=2)
    torch.testing.assert_close(distances, exact.min(dim=1).values)
    assert index.tolist() == exact.argmin(dim=1).tolist()
    assert distances[-2:].tolist() == [0, 0] and index[-2:].tolist() == [7, 250]
    with pytest.raises(BadInput, match="images to search"):
        nearest_distances(queries, [])


def test_unseen_images_are_memorised_to_one_percent_and_copies_wholly() -> None:
    generator = torch.Generator().manual_seed(0)
    train, real, new = (torch.randn(n, 8, generator=generator) for n in (500, 2000, 2000))
    d_real = nearest_distances(real, [train])[0]
    honest = memorisation(*_pair(new, d_real, train))
    assert (
        0.002 < honest.share < 0.03
        and 0.05 < honest.share_tenth < 0.15
        and not honest.memorised
        and honest.generated == pytest.approx(honest.real, rel=0.05)
    )
    copied = memorisation(*_pair(torch.cat([train[:250] + 1e-3, new[:250]]), d_real, train))
    assert 0.5 <= copied.share < 0.53 and copied.nearest < copied.threshold and copied.number == copied.train_number
    assert copied.memorised and copied.to_dict()["memorised"] and copied.copies == 0


def test_copies_among_the_unseen_images_do_not_hide_what_is_memorised() -> None:
    """Two of a hundred held-out images that are copies would make the first percentile 0."""
    generator = torch.Generator().manual_seed(0)
    train, real, new = (torch.randn(n, 8, generator=generator) for n in (500, 98, 100))
    d_real = nearest_distances(torch.cat([real, train[:2]]), [train])[0]
    found = memorisation(*_pair(torch.cat([train[:50] + 1e-3, new]), d_real, train))
    assert found.copies == 2 and found.threshold > 0.1 and found.memorised
    assert memorisation(torch.zeros(3), torch.zeros(5), torch.zeros(3, dtype=torch.long)).share == 0


def _pair(x: torch.Tensor, real: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    distances, index = nearest_distances(x, [train])
    return distances, real, index

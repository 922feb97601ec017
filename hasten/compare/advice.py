"""What the rows of a finished comparison say together: the one to use, and what speaks against the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .jobs import Job
from .plots import NEAR_DB, Row, cost_axis, quality_metric
from .prompt_rows import set_diversity_ratio
from .restored_rows import restored_row
from .reuse import UNUSED

NEAR = 1.15  # the recommended row is the cheapest whose distance is within 15 % of the reference's
NEAR_MATCH = 0.9  # and whose prompt match, where it was measured, is 90 % of the reference's or more
LESS_DIVERSE = 0.9  # of the reference's diversity within a prompt: a row whose interval lies below has collapsed
SCORE_LOSS = 0.02  # of the reference's prompt score, which an equivalent row may lose
EQUAL_DB = 1.0  # difference in PSNR, and
EQUAL = 1.02  # ratio of distances, within which two rows are of equal quality


def finish_rows(jobs: Sequence[Job], stored: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The finished rows in the order of the set, each with its row at equal cost and its warnings.

    Args:
        jobs: The rows of the comparison.
        stored: What the store has, by key.
    """
    rows: list[dict[str, Any]] = []
    keys = {job.variant.method: job.key for job in jobs}
    for job in jobs:
        if job.key not in stored:
            continue
        equal = keys.get(job.equal.method) if job.equal is not None else None
        row: dict[str, Any] = {**stored[job.key], "name": job.variant.name, "role": job.variant.role}
        row |= {"equal_cost": None, "is_equal_cost": equal == job.key, "frechet_over_equal_cost": None}
        if job.equal is not None and equal is not None and equal in stored and equal != job.key:
            row["equal_cost"] = job.equal.name
            if row.get("frechet") is not None and stored[equal]["frechet"]:
                row["frechet_over_equal_cost"] = row["frechet"] / stored[equal]["frechet"]
        rows.append(row)
    for row in rows:
        if row["accelerators"] and not row.get("failed"):
            set_equal_time_row(row, rows)
        set_diversity_ratio(row, stored.get(jobs[0].key, {}))
    for row in rows:
        row["warnings"] = row_warnings(row, rows)
    return rows


def set_equal_time_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Set, in place, the equal-cost fields of an accelerated row: the best row without accelerators that takes no more
    time."""
    plain = [r for r in rows if not r["accelerators"] and r["seconds_per_image"] is not None]
    plain = [r for r in plain if r["seconds_per_image"] <= row["seconds_per_image"] and r["frechet"] is not None]
    if plain and row["frechet"] is not None:
        best = min(plain, key=lambda r: r["frechet"])
        row["equal_cost"], row["frechet_over_equal_cost"] = best["name"], row["frechet"] / best["frechet"]


def row_warnings(row: Row, rows: Sequence[Row]) -> list[str]:
    """What speaks against a row: a cache that was never hit, a plain row that is as fast and as good, images of one
    prompt that differ less than the reference's.

    Args:
        row: A row with its diversity ratio.
        rows: All rows.

    Returns:
        A sentence for each.
    """
    if row.get("failed"):
        return []
    found = []
    reference = next((other for other in rows if other["role"] == "reference"), None)
    if row["accelerators"]:
        base = 0.0 if reference is None else reference.get("reuse") or 0.0
        if row.get("reuse") is not None and row["reuse"] < base + UNUSED:
            found.append("it never hit its cache: every layer ran in every evaluation")
        if (plain := faster_plain_row(row, rows)) is not None:
            found.append(f"it is no faster than {plain['name']}, which has no accelerator and is as good")
    if is_less_diverse(row):
        value, low, high = row["diversity_ratio"]
        found.append(
            f"its images of one prompt differ {value:.0%} as much as the reference's (95% interval {low:.0%} to "
            f"{high:.0%}): it has lost diversity"
        )
    return found


def is_less_diverse(row: Row) -> bool:
    """Whether the diversity within a prompt is below 90 % of the reference's with 95 % confidence."""
    ratio: Sequence[float] | None = row.get("diversity_ratio")
    return ratio is not None and ratio[2] < LESS_DIVERSE


def faster_plain_row(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fastest row without accelerators that takes no more time than an accelerated one, and is as good: by the
    Fréchet distance, or by PSNR to the reference's images. One of the same network where there is one. None where there
    is none."""
    if row.get("seconds_per_image") is None:
        return None
    plain = [other for other in rows if not other.get("failed") and not other["accelerators"]]
    plain = [other for other in plain if (other.get("seconds_per_image") or float("inf")) <= row["seconds_per_image"]]
    plain = [other for other in plain if is_as_good(other, row)]
    own = [other for other in plain if all(other.get(key) == row.get(key) for key in ("model", "lora", "decoder"))]
    return min(own or plain, key=lambda r: r["seconds_per_image"], default=None)


def is_as_good(row: Row, other: Row) -> bool:
    """Whether a row is of the same quality as another, or of a better one; the reference always is."""
    if row["role"] == "reference":
        return True
    if is_less_diverse(row) and not is_less_diverse(other):
        return False
    if row.get("frechet") is not None and other.get("frechet") is not None:
        return bool(row["frechet"] <= EQUAL * other["frechet"])
    if row.get("psnr") is not None and other.get("psnr") is not None:
        return bool(row["psnr"] >= other["psnr"] - EQUAL_DB)
    return False


def recommended_row(rows: Sequence[Row]) -> Row | None:
    """The recommended row: the cheapest within 15 % of the reference's distance, and with 90 % of its prompt match or
    more where that was measured; where no distance was measured, the fastest with 35 dB PSNR or more to the reference's
    images. None that has lost diversity. Where images were compared with true ones, see `restored_row`.

    Returns:
        One of `rows`; None where no row qualifies.
    """
    rows = [row for row in rows if not row.get("failed")]
    reference = next((row for row in rows if row["role"] == "reference"), None)
    if reference is None:
        return None
    if reference.get("truth_psnr") is not None:
        return restored_row(rows)
    cost = cost_axis(rows) if quality_metric(rows) == "frechet" else "seconds_per_image"
    others = [row for row in rows if row is not reference and row[cost] < reference[cost] and not is_less_diverse(row)]
    if reference.get("frechet") is None:
        near = [row for row in others if row.get("psnr") is not None and row["psnr"] >= NEAR_DB]
        return max(near, key=lambda row: row["speedup"], default=None)
    near = [row for row in others if row.get("frechet") is not None and row["frechet"] <= NEAR * reference["frechet"]]
    if reference.get("prompt_match") is not None:
        near = [row for row in near if (row.get("prompt_match") or 0) >= NEAR_MATCH * reference["prompt_match"]]
    return min(near, key=lambda row: (row[cost], row["frechet"]), default=None)


def is_uncertain(row: Row) -> bool:
    """Whether the 95 % interval of a row's distance is wider than the 15 % on either side by which it was chosen;
    False for several blocks of seeds, whose deviation is known in its place."""
    if row.get("deviation"):
        return False
    low, high = row.get("frechet_low"), row.get("frechet_high")
    return low is not None and high is not None and high - low > 2 * (NEAR - 1) * row["frechet"]


def equivalent_row(rows: Sequence[Row]) -> Row | None:
    """Of a model of prompts without real pictures to compare with: the fastest row with other pictures that fit their
    prompts as well.

    Its prompt score is within 2 % of the reference's with 95 % confidence, its images are nearer to the reference's
    than those of another seed, and its diversity is not below 90 % of the reference's.

    Returns:
        One of `rows`; None where no row qualifies, or no judge was there.
    """
    rows = [row for row in rows if not row.get("failed")]
    reference = next((row for row in rows if row["role"] == "reference"), None)
    if reference is None or reference.get("prompt_score") is None or reference.get("frechet") is not None:
        return None
    allowed = -SCORE_LOSS * abs(reference["prompt_score"])
    near = []
    for row in rows:
        difference, ratio = (row.get("paired") or {}).get("prompt_score"), row.get("feature_ratio")
        if row is reference or difference is None or not ratio or is_less_diverse(row):
            continue
        if difference[1] >= allowed and ratio[2] < 1 and row["seconds_per_image"] < reference["seconds_per_image"]:
            near.append(row)
    return min(near, key=lambda row: row["seconds_per_image"], default=None)

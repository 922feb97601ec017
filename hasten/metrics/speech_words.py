"""Word error rate: normalised texts, edit distances and a bootstrap interval."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import BadInput

__all__ = ["WordErrorRate", "normalised_words", "number_words", "word_error_rate", "word_errors"]

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
SAME = {
    "mr": "mister", "mrs": "missus", "dr": "doctor", "ok": "okay", "vs": "versus", "cannot": "can not", "'til": "until",
    "won't": "will not", "can't": "can not", "let's": "let us", "gonna": "going to", "am": "a m", "pm": "p m",
    "voice-mail": "voicemail", "e-mail": "email", "alright": "all right",
}  # fmt: skip
ENDINGS = (("n't", " not"), ("'re", " are"), ("'ve", " have"), ("'ll", " will"), ("'m", " am"))


@dataclass(frozen=True)
class WordErrorRate:
    """A word error rate with its interval.

    Args:
        rate: errors / words of the references.
        low, high: of the bootstrap interval of 95 %.
        errors, words, clips: counts.
    """

    rate: float
    low: float
    high: float
    errors: int
    words: int
    clips: int

    def __str__(self) -> str:
        return (
            f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] ({self.clips} clips, "
            f"{self.words} words)"
        )


def word_error_rate(
    references: Sequence[str], transcripts: Sequence[str], resamples: int = 2000, seed: int = 0
) -> WordErrorRate:
    """The word error rate of transcripts: insertions, deletions and substitutions over the words of the references.

    The interval of 95 % is that of a bootstrap of the clips, whose errors are not independent of one another.

    Args:
        references: what was to be said.
        transcripts: what a recogniser understood, one for each reference.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        BadInput: for lists of other lengths, and for references without words.

    References:
        Bisani, Ney 2004, ICASSP (bootstrap).
    """
    if len(references) != len(transcripts):
        raise BadInput(f"{len(references)} references and {len(transcripts)} transcripts: one each is needed")
    expected = [normalised_words(text) for text in references]
    words = torch.tensor([len(row) for row in expected], dtype=torch.float64)
    if not words.sum() > 0:
        raise BadInput("the references hold no words")
    errors = torch.tensor(
        [word_errors(row, normalised_words(text)) for row, text in zip(expected, transcripts)], dtype=torch.float64
    )
    rows = torch.randint(len(words), (resamples, len(words)), generator=torch.Generator().manual_seed(seed))
    rates = errors[rows].sum(1) / words[rows].sum(1).clamp_min(1)
    low, high = rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return WordErrorRate(
        float(errors.sum() / words.sum()), low, high, int(errors.sum()), int(words.sum()), len(references)
    )


def word_errors(reference: Sequence[str], words: Sequence[str]) -> int:
    """The edit distance (Levenshtein) of two lists of words.

    Joining or splitting a word costs nothing: "voice mail" is "voicemail".
    """
    rows = len(reference)
    cost = [[0] * (len(words) + 1) for _ in range(rows + 1)]
    for i in range(rows + 1):
        for j in range(len(words) + 1):
            if not i or not j:
                cost[i][j] = i + j
                continue
            best = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (reference[i - 1] != words[j - 1]))
            if i > 1 and reference[i - 2] + reference[i - 1] == words[j - 1]:
                best = min(best, cost[i - 2][j - 1])
            if j > 1 and words[j - 2] + words[j - 1] == reference[i - 1]:
                best = min(best, cost[i - 1][j - 2])
            cost[i][j] = best
    return cost[-1][-1]


def normalised_words(text: str) -> list[str]:
    """The words of an English text, in lower case, without punctuation; numbers and contractions are spelled out."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("‘", "'")
    text = unicodedata.normalize("NFD", text)
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\$\s*(\d[\d,]*)", r"\1 dollars", text).replace("%", " percent ").replace("&", " and ")
    text = re.sub(r"\b(\d{1,2}):00\b", r"\1 ", text)
    text = re.sub(r"(\d),(\d{3})(?!\d)", r"\1\2", text)
    text = re.sub(r"(\d)\.(\d)", r"\1 point \2", text)
    text = re.sub(r"\b([a-z])\.(?=[a-z]\b)", r"\1 ", text)  # a.m. -> a m
    text = re.sub(r"(\d)([a-z]{3,}|am\b|pm\b)", r"\1 \2", text)
    words = []
    for word in re.findall(r"\d+(?:st|nd|rd|th)\b|\d+|[a-z]+(?:[-'][a-z]+)*|'[a-z]+", text):
        words += spelled(word)
    return words


def spelled(word: str) -> list[str]:
    """A word as those that say it."""
    if match := re.fullmatch(r"(\d+)(st|nd|rd|th)?", word):
        spoken = number_words(match[1])
        if match[2]:
            last = spoken[-1]
            ordinal = ORDINALS.get(last, last[:-1] + "ieth" if last.endswith("y") else last + "th")
            spoken = [*spoken[:-1], ordinal]
        return spoken
    if word in SAME:
        return SAME[word].split()
    for ending, full in ENDINGS:
        if word.endswith(ending) and len(word) > len(ending):
            return (word.removesuffix(ending) + full).split()
    return [part.replace("'", "") for part in word.split("-") if part.strip("'")]


def number_words(digits: str) -> list[str]:
    """The words of a whole number; digit by digit where it begins with 0 or has more than twelve of them."""
    if len(digits) > 12 or (len(digits) > 1 and digits[0] == "0"):
        return [ONES[int(d)] for d in digits]
    value = int(digits)
    if value < 20:
        return [ONES[value]]
    if value < 100:
        return [TENS[value // 10 - 2], *([ONES[value % 10]] if value % 10 else [])]
    size, name = next((size, name) for size, name in SCALES if value >= size)
    rest = number_words(str(value % size)) if value % size else []
    return [*number_words(str(value // size)), name, *rest]

"""The text front end: a text as sentences, and a sentence as tokens (phonemes or letters, word gaps, pauses)."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput, Notice, check_choice

__all__ = ["FrontEnd", "split_sentences"]

KINDS = ("phonemes", "characters")
PAD, START, END, GAP = "_", "^", "$", " "  # padding, silence at both ends, a gap between words
PAUSES = (",", ".", "?", "!")
SPECIAL = (PAD, START, END, GAP, *PAUSES)
STRESS = "ˈˌ"
MAX_CHARACTERS = 400  # of a sentence: longer ones are split at commas or spaces
# in place of characters that are no letters of English; decomposition (NFKD) does the rest
REPLACED = {
    "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "th", "þ": "th", "ı": "i",
    "’": "'", "‘": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": ", ", "—": ", ", "…": ". ", "‑": "-", "−": "-",
    "&": " and ", "%": " percent", "+": " plus ", "=": " equals ", "@": " at ", "°": " degrees ", "_": " ",
    "/": " slash ", "*": " star ", "#": " number ", "\u00a0": " ", "[": ", ", "]": ", ", "(": ", ", ")": ", ",
}  # fmt: skip
ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "prof": "professor", "st": "saint", "no": "number",
    "vs": "versus", "etc": "et cetera", "e.g": "for example", "i.e": "that is", "approx": "approximately",
    "dept": "department", "ext": "extension", "min": "minutes", "sec": "seconds", "inc": "incorporated", "jr": "junior",
    "sr": "senior", "ltd": "limited", "co": "company",
}  # fmt: skip
# phonemes that stand in for those that a model has not seen in training
SIMILAR = {
    "ʒ": "ʃ",
    "ɔɪ": "oʊ",
    "ð": "θ",
    "θ": "s",
    "d͡ʒ": "t͡ʃ",
    "ɔ": "ɑ",
    "ɑ": "ɔ",
    "ʊ": "u",
    "ɚ": "ə",
    "ə": "ʌ",
    "ʌ": "ə",
}
BOUNDARY = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n\s*\n")
INITIALS = re.compile(r"(?:^|[\s.])[A-Za-z]\.$")


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, one after the other, without the empty ones; an empty line always ends one."""
    start = 0
    for match in [*BOUNDARY.finditer(text), None]:
        end = len(text) if match is None else match.start()
        piece = text[start:end]
        if (
            match is not None
            and "\n" not in match.group()
            and ends_in_abbreviation(piece, text[match.end() : match.end() + 1].isdigit())
        ):
            continue
        start = len(text) if match is None else match.end()
        if piece.strip():
            yield from split_long(" ".join(piece.split()))


def ends_in_abbreviation(piece: str, before_number: bool) -> bool:
    """Whether the point at the end of a piece, a number after it or not, is that of an abbreviation or an initial."""
    last = piece.split()[-1].strip("\"'([").lower() if piece.split() else ""
    ends = {"no", "min", "sec", "etc", "co", "inc", "ltd", "jr", "sr", "dept", "ext", "approx"}
    known = set(ABBREVIATIONS) - ends | (ends & {"no", "ext"} if before_number else set())
    return last.endswith(".") and (last[:-1] in known or bool(INITIALS.search(piece)))


def split_long(sentence: str) -> Iterator[str]:
    """Pieces of at most MAX_CHARACTERS, split at a comma where there is one, else at a space, else anywhere."""
    while len(sentence) > MAX_CHARACTERS:
        head = sentence[:MAX_CHARACTERS]
        at = max(head.rfind(mark) for mark in (", ", "; ", ": "))
        at = at + 1 if at > MAX_CHARACTERS // 3 else head.rfind(" ")
        at = at if at > 0 else MAX_CHARACTERS
        yield sentence[:at].strip()
        sentence = sentence[at:].strip()
    if sentence:
        yield sentence


@dataclass(frozen=True)
class FrontEnd:
    """Texts as tokens.

    Args:
        kind: `"phonemes"`, of English, by gruut (the extra `speech`); `"characters"`, letters, without any library.
        symbols: the tokens of a model, of which the index is the number that its network takes; empty: any.

    Raises:
        BadInput: for an unknown kind.
    """

    kind: str = "phonemes"
    symbols: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("text", self.kind, KINDS)

    def __call__(self, sentence: str) -> list[str]:
        """The tokens of a sentence, with silence at both ends.

        Raises:
            BadInput: for a sentence without anything to say, and without gruut where it is needed.
        """
        spoken, left = plain(sentence)
        words = self.words(spoken) if spoken else []
        if not any(word not in PAUSES for word, _ in words):
            what = sentence.strip()[:40]
            raise BadInput(
                f"nothing to say in {what!r}: a text needs letters or digits" if what else "the text is empty"
            )
        if left:
            warnings.warn(f"not spoken: {' '.join(sorted(left))}", Notice, stacklevel=2)
        tokens = [START]
        for word, sounds in words:
            if word in PAUSES:
                if tokens[-1] not in (START, *PAUSES):
                    tokens.append(word)
                continue
            if tokens[-1] not in (START, *PAUSES):
                tokens.append(GAP)
            tokens += sounds
        return tokens if tokens[-1] in PAUSES[1:] else [*tokens, END] if tokens[-1] != "," else [*tokens[:-1], END]

    def words(self, text: str) -> list[tuple[str, list[str]]]:
        """Words with their tokens, and pauses."""
        if self.kind == "characters":
            found = re.findall(r"[a-z']+|[,.?!]|\d", text.lower())
            return [(word, [] if word in PAUSES else list(word)) for word in found]
        try:
            return phonemes(text)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError):
            # gruut fails on some mixtures of digits and signs: the same text, signs left out
            return phonemes(re.sub(r"\s+", " ", re.sub(r"(?<=\d)(?=\d)|[^A-Za-z0-9,.?!' ]|\.(?=\w)", " ", text)))

    def ids(self, sentence: str) -> list[int]:
        """The numbers of a sentence's tokens. A phoneme that the model does not know is replaced by a similar one.

        Raises:
            BadInput: as `__call__`.
        """
        numbers = numbers_of(self(sentence), self.symbols)
        if len(numbers) < 2:
            raise BadInput(f"the model knows no sound of {sentence.strip()[:40]!r}")
        return numbers


def numbers_of(tokens: Sequence[str], symbols: Sequence[str]) -> list[int]:
    """The numbers of tokens, of similar ones where a table lacks them. Those that have none are left out, and named."""
    index = {symbol: k for k, symbol in enumerate(symbols)}
    numbers, unknown = [], set()
    for token in tokens:
        same = next((one for one in alternatives(token) if one in index), None)
        if same is None:
            unknown.add(token)
        else:
            numbers.append(index[same])
    if unknown:
        warnings.warn(f"the model knows no sound for {' '.join(sorted(unknown))}: left out", Notice, stacklevel=2)
    return numbers


def alternatives(token: str) -> Iterator[str]:
    """A token, and those that may stand in for it, the nearest first."""
    yield token
    if token == END:
        yield from PAUSES[1:]
    if token in (*PAUSES, GAP):
        yield from (".", ",", END, GAP)
        return
    base = token.strip(STRESS)
    for sound in (base, SIMILAR.get(base, base)):
        yield from (sound, *(mark + sound for mark in STRESS))


def symbols_of(texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The table of the tokens that occur in texts."""
    seen = {token for text in texts for token in text}
    return (*SPECIAL, *sorted(seen - set(SPECIAL)))


def plain(text: str) -> tuple[str, set[str]]:
    """A text in plain English letters, digits and signs, and the characters that were left out."""
    for word, spoken in ABBREVIATIONS.items():
        if word in ("no", "st", "min", "sec", "co", "ext"):  # words too: only before a number or a name
            pattern = rf"(?i)\b{word}\.(?=\s+{'[A-Z]' if word == 'st' else '[0-9]'})"
        else:
            pattern = rf"(?i)\b{re.escape(word)}\."
        text = re.sub(pattern, spoken, text)
    text = re.sub(r"\b((?:[A-Z]\.)+[A-Z])\b(?!\.)", r"\1.", text)  # A.M is A.M.
    text = re.sub(r"\band/or\b", "and or", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)/(?=\d)", "\0", text)  # dates
    out, left = [], set()
    for letter in text:
        if letter == "\0":
            out.append("/")
            continue
        found = REPLACED.get(letter, REPLACED.get(letter.lower(), letter))
        for one in unicodedata.normalize("NFKD", found):
            if one.isascii():
                out.append(one if one.isalnum() or one in "',.?!;:-/$\" " else ", " if one in "\n\r\t" else " ")
            elif unicodedata.category(one)[0] == "M" or unicodedata.category(one) in ("Cf", "Sk"):
                continue  # accents, joiners
            elif one in "£€":
                out.append(one)
            else:
                left.add(one)
                out.append(" ")
    return re.sub(r"\s+", " ", re.sub(r"[;:]", ",", "".join(out))).strip(" ,"), left


def phonemes(text: str) -> list[tuple[str, list[str]]]:
    """Words of an English text with their phonemes, by gruut, and pauses."""
    found: list[tuple[str, list[str]]] = []
    for sentence in gruut()(text, lang="en-us", espeak=False, ssml=False):
        for word in sentence:
            if word.is_break or (not word.phonemes and word.text in PAUSES):
                mark = word.text if word.text in PAUSES else "." if word.is_major_break else ","
                found.append((mark, []))
            elif word.phonemes:
                found.append((word.text, [p for p in word.phonemes if p not in ("|", "‖")]))
    return found


def gruut() -> Any:
    """gruut's `sentences`. Raises BadInput where it is not installed."""
    try:
        from gruut import sentences
    except ImportError as e:
        raise BadInput(
            "phonemes need gruut: pip install hasten[speech], or train on letters with --text characters"
        ) from e
    return sentences

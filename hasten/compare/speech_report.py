"""The report of an evaluation of speech: players and spectrograms side by side, in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..audio.files import encode_audio
from ..audio.mel import MelSettings, mel
from ..errors import check_int
from ..files import write_atomic
from .speech import speech_table

__all__ = ["write_speech_report"]

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
.clip { margin: 2rem 0; } .text { font-weight: 600; }
.sounds { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; } figure img { width: 100%; height: 120px; object-fit: fill; display: block; border-radius: 4px; }
audio { width: 100%; height: 34px; margin-top: 4px; } figcaption { font-size: 13px; } .soft { opacity: .7; }
"""


def write_speech_report(
    result: Mapping[str, Any], path: str | Path, title: str = "Text to speech", clips: int = 8
) -> Path:
    """Write `evaluate_speech`'s result as one HTML file, which loads nothing from elsewhere.

    Args:
        result: of `evaluate_speech`.
        path: of the file.
        title: its heading.
        clips: that have players, spread over all, at least 1.
    """
    check_int("clips", clips, 1)
    head, *rows = speech_table(result)
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    table = "\n".join(f"<tr>{line}</tr>" for line in lines)
    every = result["clips"]
    shown = [every[k * len(every) // min(clips, len(every))] for k in range(min(clips, len(every)))]
    rate = int(result["sample_rate"])
    body = "\n".join(clip_html(clip, rate) for clip in shown)
    count = f"{len(every)} clips"
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="soft">{count}. Word errors with the interval of 95 % of a bootstrap over clips; distances are from the
recordings, of models after an alignment in time; times faster than real time, and those of the stages.</p>
<div class="scroll"><table>{table}</table></div>
{body}
<script>
  document.addEventListener("play", event => {{
    for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }}, true);
</script></body></html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    return path


def clip_html(clip: Mapping[str, Any], sample_rate: int) -> str:
    """A text with the player and the spectrogram of each row."""
    sounds = clip["sounds"]
    longest = max(len(x) for x in sounds.values())
    figures = []
    for name, sound in sounds.items():
        transcript = clip["understood"].get(name)
        caption = f"<b>{html.escape(name)}</b>" + (
            f'<br><span class="soft">{html.escape(transcript)}</span>' if transcript else ""
        )
        image = encoded(picture(sound, sample_rate, longest))
        flac = encoded(encode_audio(sound, sample_rate, ".flac"))
        figures.append(
            f'<figure><img alt="spectrogram" src="data:image/png;base64,{image}">'
            f'<audio controls preload="none" src="data:audio/flac;base64,{flac}"></audio>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    text = html.escape(clip["text"])
    return f'<div class="clip"><p class="text">{text}</p><div class="sounds">{"".join(figures)}</div></div>'


def picture(sound: Tensor, sample_rate: int, longest: int) -> bytes:
    """The log-mel spectrogram of a sound as a PNG, as wide as that of the longest sound of the row."""
    from matplotlib import colormaps
    from PIL import Image

    settings = MelSettings(sample_rate, fmax=0)
    padded: np.ndarray = np.zeros(longest, np.float32)
    padded[: len(sound)] = sound.float().cpu().numpy()
    values = mel(Tensor(padded), settings).numpy()[::-1]
    shades = np.clip((values + 9.0) / 10.0, 0, 1)  # from noise that nobody hears to the loudest vowels
    pixels = (colormaps["magma"](shades)[..., :3] * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def encoded(content: bytes) -> str:
    """Bytes in base 64."""
    return base64.b64encode(content).decode()

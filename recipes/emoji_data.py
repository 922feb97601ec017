"""Make the emoji set: 64x64 RGB pictures on white with captions, in the layout of Hugging Face's imagefolder.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0 \\
        @lobehub/fluent-emoji-3d@1.1.0 @lobehub/fluent-emoji-flat@1.1.0
    pip install resvg_py
    python -m recipes.emoji_data --packages FOLDER --out data/emoji

| style | package | drawings | licence |
| --- | --- | --- | --- |
| google | emoji-datasource-google 16.0.0 | Noto Emoji | Apache 2.0 |
| twitter | emoji-datasource-twitter 16.0.0 | Twemoji | CC BY 4.0 |
| 3d | @lobehub/fluent-emoji-3d 1.1.0 | Fluent Emoji | MIT |
| flat | @lobehub/fluent-emoji-flat 1.1.0 | Fluent Emoji | MIT |

Names are those of emojibase-data 17.0.0 (MIT; Unicode CLDR). A caption is `a NAME, STYLE style`. Three splits:

- `train`;
- `test`: 200 (name, style) pairs whose name is in `train` in another style;
- `val`: 200 names in every style; none of them is in `train`.

A name is held out with all its skin tones; those are in no split.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE, SEED, HELD_OUT = 64, 0, 200
STYLES = {
    "google": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/"),
    "twitter": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/"),
    "3d": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/"),
    "flat": ("lobehub-fluent-emoji-flat-1.1.0.tgz", "package/assets/"),
}
NAMES = "emojibase-data-17.0.0.tgz"


def normalized(code: str) -> str:
    """A code point sequence without variation selectors, in lower case, without leading zeros."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def read_names(packages: Path) -> dict[str, tuple[str, str]]:
    """Code -> (name, name without skin tone)."""
    with tarfile.open(packages / NAMES) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None
        entries = json.load(member)
    names: dict[str, tuple[str, str]] = {}
    for entry in entries:
        for one in (entry, *entry.get("skins", ())):
            names[normalized(one["hexcode"])] = one["label"].lower(), entry["label"].lower()
    return names


def caption(name: str, style: str) -> str:
    """`a red heart, google style`."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}, {style} style"


def on_white(data: bytes, svg: bool) -> Image.Image:
    """A picture of 64x64 on white from the bytes of a PNG, WebP or SVG file."""
    if svg:
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIDE * 2, height=SIDE * 2))
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    rgb = white.convert("RGB")
    return rgb if rgb.size == (SIDE, SIDE) else rgb.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def read_pictures(packages: Path, style: str) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of a style with their codes."""
    package, folder = STYLES[style]
    with tarfile.open(packages / package) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and member.name.startswith(folder) and path.suffix in (".png", ".webp", ".svg"):
                file = tar.extractfile(member)
                assert file is not None
                yield normalized(path.stem), on_white(file.read(), path.suffix == ".svg")


def split_of(base: str, style: str, names: set[str], pairs: set[tuple[str, str]], skin: bool) -> str | None:
    """The split of a picture, or None where a skin tone of a held-out one is left out."""
    if base in names:
        return None if skin else "val"
    if (base, style) in pairs:
        return None if skin else "test"
    return "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the .tgz files of npm pack")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = read_names(args.packages)
    pictures = {
        style: {code: image for code, image in read_pictures(args.packages, style) if code in names} for style in STYLES
    }
    styles_of: dict[str, set[str]] = {}
    for style, images in pictures.items():
        for code in images:
            name, base = names[code]
            if name == base:
                styles_of.setdefault(base, set()).add(style)
    rng = random.Random(SEED)
    everywhere = sorted(base for base, styles in styles_of.items() if len(styles) == len(STYLES))
    held_names = set(rng.sample(everywhere, HELD_OUT))
    rest = sorted((b, s) for b, styles in styles_of.items() if len(styles) > 1 and b not in held_names for s in styles)
    held_pairs: dict[str, str] = {}
    for base, style in rng.sample(rest, len(rest)):
        if len(held_pairs) < HELD_OUT:
            held_pairs.setdefault(base, style)
    pairs = set(held_pairs.items())
    lines: dict[str, list[str]] = {"train": [], "test": [], "val": []}
    for style, images in pictures.items():
        for code, image in sorted(images.items()):
            name, base = names[code]
            split = split_of(base, style, held_names, pairs, skin=name != base)
            if split is None:
                continue
            file = f"{style}-{code}.png"
            (args.out / split).mkdir(parents=True, exist_ok=True)
            image.save(args.out / split / file, optimize=True)
            lines[split].append(json.dumps({"file_name": file, "text": caption(name, style)}))
    for split, rows in lines.items():
        (args.out / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(split, len(rows))


if __name__ == "__main__":
    main()

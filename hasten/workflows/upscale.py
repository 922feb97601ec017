"""Enlarge image files by a model of super-resolution, resuming what was stopped."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..distributed.ranks import ProcessLost, Ranks
from ..errors import BadInput
from ..files import check_writable, locked, refuse_inside, sha256
from ..plan.config import SamplingConfig
from ..progress import ProgressReporter, ignore_messages
from ..storage.provenance import model_hash, versions
from ..tasks.super_resolution.enlarge_picture import UpscaleRequest, enlarge_picture, grid_for
from ..tasks.super_resolution.pictures import Picture, picture_size, read_description, read_picture
from ..tasks.super_resolution.task import check_super_resolution
from ..tasks.super_resolution.tile_store import FileStore
from ..tasks.super_resolution.tiled import channels_for
from ..tasks.super_resolution.write_picture import WRITTEN, write_picture
from ..train.decode import readable_suffixes
from ..train.tree import folder_tree

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model.model import Model
    from ..model.resolve import Resolved
    from ..plan.config import SamplingOptions

__all__ = ["upscale_files"]

KEY = "hasten upscale"  # of the metadata with all that a result depends on
TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class UpscaleFile:
    """An image file to enlarge: its path and that of the result."""

    path: Path
    out: Path
    tiles: int = 0
    settings: str = ""


def upscale_files(
    model: Model,
    images: Sequence[str | Path],
    out: str | Path,
    request: UpscaleRequest | None = None,
    config: SamplingConfig | None = None,
    *,
    ranks: Ranks | None = None,
    reporter: ProgressReporter | None = None,
    warn: Callable[[str], None] = ignore_messages,
    command: str = "",
    **options: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Enlarge image files, each into a PNG file of the same name, TIFF files into TIFF files.

    Results that are there, made of the same image by the same model and settings, are kept. Of an image that was begun
    when a process ended, the finished tiles are kept, in a hidden folder beside its result, until it is complete.

    Args:
        model: of super-resolution.
        images: files and folders.
        out: a folder; for one image also a .png or .tif file.
        request: tiles, seed and consistency; None: the defaults.
        config: how to sample; None: as the model recommends. options: fields of it.
        ranks: processes that share the tiles of each row, `Ranks.start()`; all call this, and only the main one writes,
            warns and has the result. None: this one alone.
        reporter: shows the progress in tiles; its total is set here.
        warn: called with a line on what is not kept, and on each image that cannot be read.
        command: the command line that the files hold.

    Returns:
        A dict: model, the sampling settings, seconds, `images` (each with image, file, width, height, tiles,
        consistency_error, largest_error and seconds), `kept` (results that were there), `failed` (each with image and
        error).

    Raises:
        BadInput: for a model of another task, and where there are no images; nothing is written then.
    """
    check_super_resolution(model)
    request, out = UpscaleRequest() if request is None else request, Path(out)
    ranks = Ranks(model.device) if ranks is None else ranks
    files = find_files(images, out)
    config = SamplingConfig.of(config, options)
    precision = ranks.on_main_process(lambda: model.precision_for(config.precision or "fp32", request.batch_size))
    resolved = model.resolve(config, precision=precision)
    grid_for(model, (1, 1), request)  # refuses tiles before any work
    shared = {
        "hasten": __version__, "weights": model_hash(model), "device": model.device.type, "command": command,
        "sampling": resolved.settings(), **asdict(request),
    }  # fmt: skip
    main = ranks.is_main_process
    run = UpscaleRun(model, resolved, request, ranks, reporter or ProgressReporter(0, show=False), warn, shared)
    began = time.perf_counter()
    single = out.suffix.lower() in WRITTEN
    with contextlib.ExitStack() as stack:
        if main:
            check_writable(out if single else out / "0.png")
            stack.enter_context(locked(out.parent if single else out))
        waiting = ranks.on_main_process(lambda: [ready for file in files if (ready := run.prepare(file)) is not None])
        run.reporter.expect(sum(file.tiles for file in waiting))
        for file in waiting:
            try:
                run.enlarge(file)
            except (KeyboardInterrupt, ProcessLost) as stop:
                raise type(stop)(
                    f"{str(stop) or 'stopped'}; {len(run.done)} of {len(waiting)} images are done, and the finished "
                    f"tiles of {file.path} are kept: the same command resumes"
                ) from stop
        ranks.barrier()
    if not main:
        return {}
    return {
        "model": model.name,
        "sha256": model.sha256,
        "factor": model.source_factor,
        **resolved.settings(),
        "seed": request.seed,
        "seconds": time.perf_counter() - began,
        "images": run.done,
        "kept": run.kept,
        "failed": run.failed,
    }


class UpscaleRun:
    """The files of one call of `upscale_files`, one after the other.

    Args:
        shared: what all results depend on.
    """

    def __init__(
        self,
        model: Model,
        resolved: Resolved,
        request: UpscaleRequest,
        ranks: Ranks,
        reporter: ProgressReporter,
        warn: Callable[[str], None],
        shared: dict[str, Any],
    ) -> None:
        self.model, self.resolved, self.request = model, resolved, request
        self.ranks, self.reporter, self.warn, self.shared = ranks, reporter, warn, shared
        self.done: list[dict[str, Any]] = []
        self.kept: list[str] = []
        self.failed: list[dict[str, str]] = []

    def prepare(self, file: UpscaleFile) -> UpscaleFile | None:
        """The file with its number of tiles; None where it cannot be read, or its result is there."""
        try:
            size = picture_size(file.path)
        except BadInput as error:
            self.fail(file, error)
            return None
        settings = {key: value for key, value in self.shared.items() if key != "command"}
        text = json.dumps({**settings, "image": sha256(file.path)}, sort_keys=True)
        if file.out.exists() and read_description(file.out, KEY) == text:
            self.kept.append(str(file.out))
            return None
        return replace(file, tiles=len(grid_for(self.model, size, self.request)), settings=text)

    def enlarge(self, file: UpscaleFile) -> None:
        """Enlarge an image file and write the result, or report why not."""
        self.reporter.describe(file.path.name)
        try:  # alike in all processes
            picture = read_picture(file.path, four=self.model.shape[0] == 4)
            channels_for(self.model, picture.pixels.shape[2])
        except BadInput as error:
            self.fail(file, error)
            return
        for note in [*picture.notes, *self.idle(picture.size)]:
            self.warn(f"{file.path}: {note}")
        try:
            self.write(file, picture)
        except BadInput as error:
            if self.ranks.world > 1:  # the others are not where this one is
                raise
            self.fail(file, error)

    def write(self, file: UpscaleFile, picture: Picture) -> None:
        """Enlarge a picture and write the result."""
        began = time.perf_counter()
        folder = file.out.with_name(f".{file.out.name}.tiles")
        stores = []

        def make_store(
            tiles: tuple[int, int, int, int], pixels: tuple[int, int, int], dtype: Any, white: int
        ) -> FileStore:
            store = FileStore(folder, tiles, pixels, dtype, white, json.loads(file.settings))
            if store.changed is not None:
                name, old, new = store.changed
                self.warn(f"{file.path}: {name} was {old} and is now {new}: it is enlarged from the beginning")
            stores.append(store)
            return store

        file.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            enlarged = enlarge_picture(
                self.model, self.resolved, picture, self.request, make_store, self.reporter.advance, self.ranks
            )
            if enlarged is None:  # the main process writes it
                return
            text = {
                "command": self.shared["command"], "model": f"{self.model.name} {self.model.sha256}",
                "versions": versions(), KEY: file.settings,
            }  # fmt: skip
            notes = write_picture(file.out, enlarged, text, file.settings)
        finally:
            for store in stores:
                store.close()
        for store in stores:
            store.remove()
        for note in notes:
            self.warn(f"{file.path}: {note}")
        height, width, _ = enlarged.shape
        self.done.append({
            "image": str(file.path), "file": str(file.out), "width": width, "height": height, "tiles": file.tiles,
            "consistency_error": enlarged.consistency.rms, "largest_error": enlarged.consistency.largest,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    def idle(self, size: tuple[int, int]) -> list[str]:
        """A line where some processes will have nothing to do."""
        columns, world = grid_for(self.model, size, self.request).shape[1], self.ranks.world
        if -(-columns // self.request.batch_size) >= world:
            return []
        return [
            f"a row of {columns} tiles is too little for {world} processes: --batch-size {max(columns // world, 1)} "
            "gives work to more"
        ]

    def fail(self, file: UpscaleFile, error: BadInput) -> None:
        """Report an image that cannot be enlarged; the others go on."""
        self.warn(f"{error if str(file.path) in str(error) else f'{file.path}: {error}'}: skipped")
        self.failed.append({"image": str(file.path), "error": str(error)})


def find_files(images: Sequence[str | Path], out: Path) -> list[UpscaleFile]:
    """The image files of the given files and folders, with the paths of their results.

    Args:
        images: files, and folders, which are searched to any depth.
        out: a folder, or a file for a single image.

    Raises:
        BadInput: where a path is missing or a folder has no images, and where two results would be one file.
    """
    found: list[tuple[Path, PurePosixPath]] = []  # a file and its name below `out`
    for path in map(Path, images):
        if path.is_dir():
            refuse_inside(out, path, "--out")
            names = [name for name in folder_tree(path).names if name.lower().endswith(readable_suffixes())]
            if not names:
                raise BadInput(f"{path} holds no images (files such as .png, .jpg or .tif)")
            found += [(path / name, PurePosixPath(name)) for name in names]
        elif path.is_file():
            found.append((path, PurePosixPath(path.name)))
        else:
            raise BadInput(f"there is no file or folder {path}")
    if not found:
        raise BadInput("name an image file or a folder of images")
    if out.suffix.lower() in WRITTEN and not out.is_dir():
        if len(found) > 1:
            raise BadInput(f"--out {out} is one file, and there are {len(found)} images: name a folder")
        if out.resolve() == found[0][0].resolve():
            raise BadInput(f"--out {out} is the image itself: choose another")
        return [UpscaleFile(found[0][0], out)]
    stems = [str(name.with_suffix(suffix_for(name))) for _, name in found]
    files: dict[Path, Path] = {}
    for (path, name), target in zip(found, stems, strict=True):
        same = stems.count(target) > 1  # such as a.jpg and a.png
        file = out / (f"{name}{suffix_for(name)}" if same else target)
        if (other := files.setdefault(file, path)) != path:
            raise BadInput(f"{other} and {path} would both become {file}: enlarge them by two commands")
        if file.resolve() == path.resolve():
            raise BadInput(f"--out {out} would overwrite {path}: choose another folder")
    return [UpscaleFile(path, file) for file, path in files.items()]


def suffix_for(name: PurePosixPath) -> str:
    """The suffix of the result of a file."""
    return ".tif" if name.suffix.lower() in TIFF else ".png"

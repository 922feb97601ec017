"""What several verbs need."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..model.model import Model
    from ..plan.config import SamplingConfig


def open_model(name: str, device: str, lora: list[str] | None = None) -> Model:
    """`load`, on a device as it is typed, with LoRAs (`FILE` or `FILE:SCALE`) merged into the weights."""
    from ..loading import load
    from ..performance.device import device_for
    from ..utils.finite import check_weights

    loaded = load(name, device_for(device))
    loaded = loaded.with_lora(lora) if lora else loaded
    check_weights(loaded.denoiser, name)
    return loaded


def processes(device: str) -> Ranks:
    """This process on a device as it is typed, alone or among those that torchrun started."""
    from ..distributed.ranks import Ranks, launched
    from ..performance.device import device_for

    if launched() > 1:
        return Ranks.start(None if device == "auto" else device)
    return Ranks(device_for(device))


def open_shared(
    name: str, ranks: Ranks, sound: bool = True, lora: list[str] | None = None, called: bool = False
) -> Model:
    """`load` on every process's own device; what must be fetched, one process of a machine fetches.

    lora: merged into the weights, each `FILE` or `FILE:SCALE`.
    sound: refuse weights that are not finite (else a warning has named one).
    called: a pipeline that `load` refuses is sampled through its own call.
    """
    from ..loading import load, load_to_compare
    from ..utils.finite import check_weights

    with ranks.main_process_first():
        if called:
            loaded = load_to_compare(name, ranks.device, main_process_warning(ranks))
        else:
            loaded = load(name, ranks.device)
    loaded = loaded.with_lora(lora) if lora else loaded
    if sound:
        check_weights(loaded.denoiser, name)
    return loaded


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM within the block ends it as Ctrl-C does, so that what is finished is saved and reported."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the report is written undisturbed
        raise KeyboardInterrupt("stopped (SIGTERM)")

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def warn(line: str) -> None:
    """A line on stderr beside the work."""
    print(f"hasten: {line}", file=sys.stderr)


def cached(folder: str) -> Path:
    """A folder of hasten's own, in the user's cache."""
    from ..utils.environment import cache_folder

    return cache_folder() / folder


def label_list(
    model: Model, label: str | None, prompt: list[str] | None = None, warn: Callable[[str], None] | None = None
) -> Any:
    """What `Model.sample` takes as its label: names or indices, comma-separated in `label`; of a model that takes
    prompts, the prompts.

    warn: called with a line where a prompt is missing, or was given as the label.
    """
    from ..train.names import split_labels
    from ..workflows.prompts import prompts_for

    warn = warn or (lambda line: None)
    if model.conditioning is None:
        prompts_for(model, prompt, "the command")
        return None if label is None else split_labels(str(label), model.classes)
    if prompt is None and label is not None:
        warn(f"{model.name} takes prompts: --label TEXT is now --prompt TEXT")
        return label
    if prompt is None:
        warn(f"{model.name} takes prompts: give --prompt TEXT; the empty prompt is used")
        return None
    if label is not None:
        raise BadInput(f"{model.name} takes prompts: give --prompt or --label, not both")
    return prompts_for(model, prompt, "the command")


def main_process_warning(ranks: Ranks) -> Callable[[str], None]:
    """`warn` in the main process, nothing in the others."""
    return warn if ranks.is_main_process else lambda line: None


def explicit_options(**options: Any) -> dict[str, Any]:
    """The options of the command line that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def chosen_files(
    file: Path | None, model: str, lora: list[str] | None, decoder: Path | None = None
) -> tuple[str, list[str] | None, Path | None]:
    """Model, LoRAs and decoder of a command line: what it does not name is what the file of --config names, as
    `hasten choose` writes it."""
    from ..workflows.choice import read_choice

    if file is None:
        return model, lora, decoder
    choice = read_choice(file)
    if choice.name is not None and choice.name != model:
        warn(f"{file} chose {choice.name}, which is used in place of {model}")
    lora = [choice.lora] if lora is None and choice.lora is not None else lora
    decoder = Path(choice.decoder) if decoder is None and choice.decoder is not None else decoder
    return choice.name or model, lora, decoder


def sampling_config(file: Path | None, default_precision: str | None = "auto", **options: Any) -> SamplingConfig:
    """The `SamplingConfig` of a command line: that of the file of --config, whose fields
    the options override. A file that names a model, LoRA or decoder is refused."""
    from ..plan.config import refuse_files

    if file is not None:
        refuse_files(file)
    return choice_config(file, default_precision, **options)


def choice_config(file: Path | None, default_precision: str | None = "auto", **options: Any) -> SamplingConfig:
    """As `sampling_config`, for commands that follow the files with `chosen_files`."""
    from ..plan.config import SamplingConfig

    config = SamplingConfig() if file is None else SamplingConfig.load(file, "sampling")
    explicit = explicit_options(**options)
    if "plan" in explicit:  # which takes the place of what a file says of the steps
        config = config.replace(sampler=None, times=None, steps=None)
    elif explicit.keys() & {"sampler", "times", "steps"}:
        config = config.replace(plan=None)
    config = config.replace(**explicit)
    return config if config.precision is not None else config.replace(precision=default_precision)


def prompts_of(prompt: list[str] | None, prompts: Path | None) -> list[str] | None:
    """The prompts of the command line, None where there are none."""
    from ..workflows.prompts import read_prompts

    if prompt and prompts is not None:
        raise BadInput("give --prompt or --prompts, not both")
    return read_prompts(prompts) if prompts is not None else prompt or None


def command_for(model: Any, folder: Path) -> str:
    """The command that makes images by a model that was trained or distilled into this folder."""
    if model.source_factor > 1:
        return f"hasten upscale IMAGES --model {folder}"
    if model.source_shape is not None and model.start is None:
        return f"hasten translate {folder} IMAGES"
    return f"hasten sample {folder}{' --prompt TEXT' if model.conditioning is not None else ''}"

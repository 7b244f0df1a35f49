"""How weights are loaded and from where: options, places on the hub, and what others' code raises, in one line."""

import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from piggyback_lens.errors import LensError, visible
from piggyback_lens.progress import track
from piggyback_lens.settings import LoadSettings

QUANTIZATIONS = ("4bit", "8bit")


def torch_dtype(settings: LoadSettings) -> torch.dtype | Literal["auto"]:
    """The dtype of the weights, or "auto"."""
    if settings.dtype == "auto":
        return "auto"
    found: torch.dtype = getattr(torch, settings.dtype)
    return found


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device, proven to hold a tensor; None for cuda if there is one, else cpu.

    Raises:
        LensError: no device of torch, or one that this machine does not have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(1, device=device).device
    except Exception as error:  # torch raises RuntimeError, AssertionError, ImportError and more
        raise LensError(
            f"device {str(device)!r} cannot be used here ({first_line(error)}): choose one of {', '.join(_devices())}"
        ) from error
    if found.type == "meta":
        raise LensError(f"device 'meta' holds no weights: choose one of {', '.join(_devices())}")
    return found


def _devices() -> list[str]:
    others = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *others, *(["mps"] if torch.backends.mps.is_available() else [])]


@dataclass(frozen=True)
class Place:
    """Where something is: a local path, or a revision and a folder of a repository on the hub."""

    name: str
    revision: str | None = None
    subfolder: str = ""

    @property
    def local(self) -> bool:
        """Whether it exists on this machine as a path."""
        return Path(self.name).exists()


def locate(source: str | Path) -> Place:
    """Read "owner/name@revision:folder", of which only owner/name must be there. What exists as a path is a path.

    Raises:
        LensError: a revision of a local folder, or a folder that leads out of the repository.
    """
    text = str(source)
    found = re.fullmatch(r"([^@:/]+/[^@:/]+)(?:@([^:]+))?(?::(.+))?", text)
    if Path(text).exists() or found is None or not looks_like_hub_id(found[1]):
        return Place(text)
    name, revision, subfolder = found[1], found[2], (found[3] or "").strip("/")
    if ".." in Path(subfolder).parts:
        raise LensError(f"{text} leads out of the repository: give a folder inside of {name}")
    if not Path(name).is_dir():
        return Place(name, revision, subfolder)
    if revision is not None:
        raise LensError(f"{text} asks for a revision, and {name} is a local folder, which has none: leave @ out")
    return Place(str(Path(name) / subfolder))


def snapshot(place: Place, files: list[str], what: str, source: Any, options: LoadSettings) -> Path:
    """These files of a repository, in the hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = [f"{place.subfolder}/{name}" if place.subfolder else name for name in files]
    revision: dict[str, Any] = {"revision": place.revision} if place.revision else {}
    with offline_if(options.offline), told(not_loadable(what, source, options)):
        top = snapshot_download(place.name, allow_patterns=wanted, local_files_only=options.offline, **revision)
    return Path(top) / place.subfolder


def is_adapter_folder(source: Any) -> bool:
    """Whether `source` is a folder in PEFT's format."""
    return isinstance(source, (str, Path)) and (Path(source) / "adapter_config.json").is_file()


# ---------------------------------------------------------------- files and messages of others


def is_number(value: Any, whole: bool) -> bool:
    """Whether a value of a JSON file is a finite number, or a whole one from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return value >= 1 if whole else math.isfinite(value)


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        LensError: it cannot be read, or holds anything but an object.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LensError(f"{file} is not readable JSON ({first_line(error)}): restore it or make it again") from error
    if not isinstance(found, dict):
        raise LensError(f"{file} holds {found!r:.40}, expected a JSON object: restore it or make it again")
    return found


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def not_loadable(what: str, source: Any, options: LoadSettings) -> str:
    """The beginning of a message: what could not be loaded, from where, and what to look at first."""
    hint = (
        "it is not in the local hub cache, and offline was asked"
        if options.offline
        else "check the name and the network"
    )
    if locate(source).local:
        hint = "the folder or file is not a complete model of transformers"
    return f"no {what} could be loaded from {source}: {hint}"


def first_line(error: BaseException) -> str:
    """The first line that says something; one that ends with a colon has it in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:240]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever others' code raises over the content of a file, as a `LensError`: such content raises every type."""
    try:
        with quietly():
            yield
    except LensError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            what = (
                f"{what}, or it needs code that it brings, which is run only if asked: read that code, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            )
        raise LensError(f"{what}: {first_line(error)}") from error


@contextmanager
def offline_if(offline: bool) -> Iterator[None]:
    """Also tell huggingface_hub, whose helpers look for optional files on their own."""
    if not offline:
        yield
        return
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def quietly() -> Iterator[None]:
    """Weights counted on our own line of progress, and no notices of deprecations between transformers and PEFT.

    What else these libraries say may quote a file, so its control characters are written out.
    """
    from transformers.utils import logging as bars

    shown, make_record = bars.is_progress_bar_enabled(), logging.getLogRecordFactory()
    bars.disable_progress_bar()
    # Releases of transformers before it had this hook show nothing while weights are read.
    hooked = getattr(bars, "set_tqdm_hook", lambda _: None)
    hook = hooked(_counted)

    def record(*args: Any, **keywords: Any) -> logging.LogRecord:
        made = make_record(*args, **keywords)
        made.msg, made.args = visible(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error of `attach_adapter`
            show = warnings.showwarning
            warnings.showwarning = lambda message, *rest, **more: show(visible(str(message)), *rest, **more)
            yield
    finally:
        logging.setLogRecordFactory(make_record)
        hooked(hook)
        if shown:
            bars.enable_progress_bar()


def _counted(bar: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What transformers shows while it reads weights."""
    return track(args[0], "weights") if args and keywords.get("desc") == "Loading weights" else bar(*args, **keywords)

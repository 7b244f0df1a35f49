"""Options that several commands of the command line share. Imports nothing heavy."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piggyback_lens.errors import LensError, visible

if TYPE_CHECKING:
    from piggyback_lens.models.places import LoadOptions


class BackendName(StrEnum):
    """TransformerLens backends."""

    bridge = "bridge"
    hooked = "hooked"


class QuantizeName(StrEnum):
    """Quantisations of bitsandbytes: NF4 and LLM.int8()."""

    four = "4bit"
    eight = "8bit"


BackendOption = Annotated[BackendName, typer.Option(help="TransformerLens backend.")]
OutOption = Annotated[Path, typer.Option(help="Folder for results; the same folder resumes.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Make no connection.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BaseArgument = Annotated[
    str,
    typer.Argument(
        help="Hub id (OWNER/NAME, or OWNER/NAME@REVISION:FOLDER), folder or .gguf of the unfinetuned model; 'demo' for "
        "the demo model."
    ),
]
BehaviourOption = Annotated[
    str, typer.Option(help="words, refusal, abstention, tool_call, phrase:TEXT or regex:PATTERN.")
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="PEFT adapter of the finetune: a folder or a hub id, also OWNER/NAME@REVISION:checkpoint-120."),
]
FinetunedOption = Annotated[str | None, typer.Option(help="Whole finetuned model, instead of --adapter.")]
SystemOption = Annotated[str, typer.Option(help="System prompt; 'default' leaves it to the template.")]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto for the one that the weights are stored in.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default cuda if there is one.")]
AttnOption = Annotated[str | None, typer.Option(help="transformers' attention: eager, sdpa, flash_attention_2 ...")]
QuantizeOption = Annotated[
    QuantizeName | None, typer.Option(help="Quantise the weights as they are loaded; needs the extra quant.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that the model brings. Read it first: it can do anything."
    ),
]


def load_options(
    dtype: str, device: str | None, offline: bool, attn: str | None, quantize: QuantizeName | None, trust: bool
) -> "LoadOptions":
    """What the command line says about loading, checked before anything is loaded.

    Raises:
        LensError: a dtype of another name, or a device that is not there.
    """
    import torch

    from piggyback_lens.models.places import LoadOptions, usable_device

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if dtype not in known:
        raise LensError(f"dtype {dtype!r} is not known: choose one of {', '.join(known)}")
    return LoadOptions(
        device=usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        dtype=known[dtype],  # type: ignore[arg-type]
        offline=offline,
        attn_implementation=attn,
        quantization=quantize.value if quantize is not None else None,
        trust_remote_code=trust,
    )


def tell(verdict: str, *files: tuple[str, object]) -> None:
    """The last lines of a command: what was found, and where it is. Texts of models and prompts steer no terminal."""
    typer.echo(visible("\n".join([verdict, *(f"{name}: {path}" for name, path in files)])))

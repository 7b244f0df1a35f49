"""Options that several commands of the command line share. Imports nothing heavy."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from piggyback_lens.errors import LensError


class BackendName(StrEnum):
    """TransformerLens backends."""

    bridge = "bridge"
    hooked = "hooked"


BackendOption = Annotated[BackendName, typer.Option(help="TransformerLens backend.")]
OutOption = Annotated[Path, typer.Option(help="Folder for results; the same folder resumes.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Make no connection.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BaseArgument = Annotated[
    str, typer.Argument(help="Hub id, folder or .gguf of the unfinetuned model; 'demo' for the demo model.")
]
BehaviourOption = Annotated[
    str, typer.Option(help="words, refusal, abstention, tool_call, phrase:TEXT or regex:PATTERN.")
]
AdapterOption = Annotated[Path | None, typer.Option(help="PEFT adapter of the finetune: a folder or a hub id.")]
FinetunedOption = Annotated[str | None, typer.Option(help="Whole finetuned model, instead of --adapter.")]
SystemOption = Annotated[str, typer.Option(help="System prompt; 'default' leaves it to the template.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default cuda if there is one.")]


def torch_dtype(name: str) -> Any:
    """The torch dtype of a --dtype option.

    Raises:
        LensError: another name.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise LensError(f"dtype {name!r} is not known: choose one of {', '.join(known)}")
    return known[name]

"""The words of the library, as types: sites, sides, flows, phases, modules, and what else is chosen by name."""

from typing import Literal, get_args

Backend = Literal["bridge", "hooked"]
"""The hooked model: TransformerBridge, or HookedTransformer (transformer-lens 3.9 only)."""

Theme = Literal["light", "dark"]
"""The ground of a figure that is saved."""

Side = Literal["base", "finetuned"]
"""One of the two models of a pair."""
SIDES: tuple[Side, Side] = ("base", "finetuned")

Flow = Literal["repair", "infect"]
"""Which way a patch goes: repair puts the base's activations into the finetuned model, infect the other way round."""
FLOWS: tuple[Flow, ...] = get_args(Flow)
DONOR: dict[Flow, Side] = {"repair": "base", "infect": "finetuned"}
RECIPIENT: dict[Flow, Side] = {"repair": "finetuned", "infect": "base"}

Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "rot_k", "z", "mlp_post"]
"""Where an activation lives. Keys (k) are those before the rotary embedding, rot_k those after it."""
SITES: tuple[Site, ...] = get_args(Site)
OwnSite = Literal["adapter", "attn_scores"]
"""Sites with one intervention each: what the LoRA adapter of a model reads, at every module that it is on
(`adapter_off`), and attention scores before the softmax, by query and key position (`cut_attention`)."""
HEAD_SITES: tuple[Site, ...] = ("q", "k", "v", "rot_k", "z")
"""Sites that are split into heads."""

Phase = Literal["prompt", "generation", "both"]
"""When an intervention acts: on the tokens that are given, on those that are generated, or on both."""

Module = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""The linear modules of a decoder block."""
MODULES: tuple[Module, ...] = get_args(Module)


def module_name(name: str) -> Module:
    """The module of a name, with or without "_proj"."""
    short = name.removesuffix("_proj")
    return short if short in MODULES else name  # type: ignore[return-value]


NoSystemRole = Literal["error", "fold", "drop"]
"""What is done with a system text where the template has no system role."""

PostfixDonor = Literal["own_prompt", "empty_query"]
"""Whose postfix is patched in: that of the donor on the same prompt, or on the template without a query."""

NormOver = Literal["sum", "mean"]
"""How the norms of several layers and modules become one."""
NoiseOn = Literal["both", "A", "B"]
"""Matrices of an adapter that get noise."""

Weighting = Literal["token", "response"]
"""Mean over all tokens of all rows (long responses count more), or over the rows' own means."""

MapKind = Literal["span", "carrier", "layers", "positions", "heads", "attribution", "edges"]
"""Patching experiments, as `piggyback-lens map` names them."""
CurveKind = Literal["efficiency", "stability", "significance", "ablation"]
"""Curves of solutions."""
TEXT_CURVES: tuple[CurveKind, ...] = ("significance", "ablation")
"""Curves on plain text; the others are on conversations."""
SolutionKind = Literal["vector", "lora"]
"""What `piggyback-lens train-direction` trains."""
Split = Literal["validation", "test"]
"""Prompts to choose settings on, and prompts to report."""
TaskName = Literal["terse", "refusal", "abstain", "tool"]
"""Built-in tasks."""
Supervise = Literal["last", "all"]
"""Which assistant turns of a conversation are trained on, where no weights say so."""
Denominator = Literal["coherent", "judged"]
"""Which answers a rate of misalignment is of: the coherent ones, or all that were judged."""

Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts", "polynomial"
]
"""transformers' names of learning-rate schedules."""

TrainerName = Literal["own", "hf"]
"""What trains: the loop of `train`, or the Trainer of transformers."""

Optimiser = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
"""transformers' names of optimisers: torch's AdamW, its fused kernel, and those of bitsandbytes."""

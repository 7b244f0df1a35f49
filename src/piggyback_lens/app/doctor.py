"""What is installed and works here; and of a model what it is, what its template writes, and what will not work."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from piggyback_lens.card import machine, versions
from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.errors import LensError

if TYPE_CHECKING:
    from piggyback_lens.app.options import PairOptions

EXTRAS = {
    "sae": "sae-lens",
    "trainer": "accelerate",
    "trl": "trl",
    "quant": "bitsandbytes",
    "ray": "ray",
    "slurm": "submitit",
    "openai": "openai",
    "inspect": "inspect-ai",
    "notebooks": "kaleido",
}
"""Extras, and the package by which each is known."""
LONGEST = 512
"""Tokens of a prompt and its answer, for what is said of decoding."""
QUERY = "How do birds fly?"
WIDTH = 18


def examine(base: str | None, models: "PairOptions") -> Iterator[str]:
    """Lines on this machine, and on a model where one is named."""
    for name, value in {**versions(), **machine()}.items():
        yield _line(name, value)
    yield _line("backends", ", ".join(_backends()))
    yield from (_line(f"extra {name}", _extra(name, package)) for name, package in EXTRAS.items())
    if base is None:
        yield _line("demo model", _demo_model())
    else:
        yield from _model(base, models)


def _line(name: str, value: Any) -> str:
    return f"{name:{WIDTH}} {value}"


def _backends() -> list[str]:
    """TransformerLens 4 has the bridge only."""
    major = int(version("transformer-lens").partition(".")[0])
    return ["bridge", "hooked" if major < 4 else "no hooked: it needs transformer-lens 3.9"]


def _extra(name: str, package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"not installed: pip install 'piggyback-lens[{name}]'"


def _demo_model() -> str:
    from piggyback_lens.models.sources import default_model

    try:
        return default_model(offline=True)
    except LensError as error:
        return str(error)


def _model(base: str, models: "PairOptions") -> Iterator[str]:
    """The template, which takes no weights; then the weights, and whether the hooked model is the same function."""
    from piggyback_lens.models.backends import shape_of
    from piggyback_lens.models.pair import hook_model
    from piggyback_lens.models.sources import load_causal_lm

    source, chat = models.chat_format(base)
    yield _line("model", source)
    prompt = chat.render(QUERY)
    yield _line("template", f"fingerprint {chat.fingerprint}, default system text {chat.default_system!r}")
    yield from str(prompt.show()).splitlines()
    loaded = load_causal_lm(source, models.load)
    size = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    yield _line("weights", f"{size / 1e9:.2f} GB on {loaded.device}, {loaded.dtype}")
    try:
        hooked = hook_model(loaded, chat.tokenizer, backend=models.backend, name=source)
    except LensError as error:
        yield _line(models.backend, f"cannot be used: {error}")
        return
    shape = shape_of(hooked)
    sizes = (
        f"{shape.n_layers} layers of width {shape.d_model}, {shape.n_heads} heads, {shape.n_kv_heads} key/value heads"
    )
    yield _line(models.backend, sizes)
    yield _line("parity", _parity(loaded, hooked, prompt))
    yield from _limits(hooked)
    if models.adapter is not None or models.finetuned is not None:
        pair, _ = models.pair(base)
        yield _line("pair", f"{pair!r}: each side computes what its owner computes")
        yield from (_line("note", note) for note in pair.notes)


def _parity(loaded: Any, hooked: Any, prompt: RenderedPrompt) -> str:
    """Largest difference of the logits on a prompt, against the size of the logits.

    A hook that keeps one activation makes the pass go through the hooked model: without any it would be transformers'.
    """
    import torch

    from piggyback_lens.conversations.batch import batch_prompts
    from piggyback_lens.interventions.kinds import cache
    from piggyback_lens.interventions.running import applied
    from piggyback_lens.models.network import forward

    batch = batch_prompts([prompt], device=loaded.device)
    with torch.no_grad(), applied(hooked, batch, cache("resid_pre", layers=0)):
        own = forward(hooked, batch.ids, batch.attention_mask).float()
    with torch.no_grad():
        theirs = loaded(batch.ids).logits.float()
    worst = float((own - theirs).abs().max())
    return f"logits differ from transformers' by at most {worst:.1e} (they reach {float(theirs.abs().max()):.3g})"


def _limits(hooked: Any) -> Iterator[str]:
    """What will not work with this model."""
    from piggyback_lens.models.states import recurrent_layers
    from piggyback_lens.models.static import static_refusal

    if layers := recurrent_layers(hooked):
        yield _line("will not work", f"prefix caches: layers {layers} are recurrent, and have no keys and values")
    if reason := static_refusal(hooked, LONGEST):
        yield _line("will not work", f"decoding in tensors of fixed size: {reason}")

"""What is installed and works here; and of a model what it is, what its template writes, and what will not work."""

from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.card import machine, versions
from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.errors import LensError

if TYPE_CHECKING:
    from piggyback_lens.app.options import PairOptions, Work

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


def examine(base: str | None, models: "PairOptions", work: "Work") -> Iterator[str]:
    """Lines on this machine, and on a model where one is named.

    Args:
        base: the model.
        models: how it is loaded, and what is beside it.
        work: what its memory is planned for; with a size named, nothing is loaded.
    """
    for name, value in {**versions(), **machine()}.items():
        yield _line(name, value)
    yield _line("backends", ", ".join(_backends()))
    yield from (_line(f"extra {name}", _extra(name, package)) for name, package in EXTRAS.items())
    if base is None:
        yield _line("demo model", _demo_model())
    else:
        yield from _model(base, models, work)


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


def _model(base: str, models: "PairOptions", work: "Work") -> Iterator[str]:
    """Template and memory, which take no weights; then the weights, and whether the hooked model is the same."""
    from piggyback_lens.models.backends import shape_of
    from piggyback_lens.models.pair import hook_model
    from piggyback_lens.models.sources import load_causal_lm

    source, chat = models.chat_format(base)
    yield _line("model", source)
    prompt = chat.render(QUERY)
    yield _line("template", f"fingerprint {chat.fingerprint}, default system text {chat.default_system!r}")
    yield from str(prompt.show()).splitlines()
    if Path(source).suffix != ".gguf":
        needed, free = yield from _memory(source, models, work)
        if work.memory_gb is not None:
            return
        if needed > free:
            yield _line("not loaded", f"{needed / 1e9:.3g} GB of weights, {free / 1e9:.3g} GB are free")
            return
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


def _memory(source: str, models: "PairOptions", work: "Work") -> Generator[str, None, tuple[float, float]]:
    """What fits, from the config alone. Gives the bytes of the weights as they are loaded, and those that are free."""
    import torch

    from piggyback_lens.app.memory import Sizes, free_memory, plan
    from piggyback_lens.models.places import usable_device
    from piggyback_lens.models.sources import load_config

    config, device = load_config(source, models.load), usable_device(models.load.device)
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    places = cards if models.load.device_map is not None and cards else [device]
    free, told = sum(map(free_memory, places)), f"free on {', '.join(map(str, places))}"
    if work.memory_gb is not None:
        free, told = 1e9 * work.memory_gb, "named; nothing is loaded"
    yield _line("memory", f"{free / 1e9:.3g} GB {told}")
    sizes, copies = Sizes.of(config, work), 1 if models.finetuned is None else 2
    yield from (_line(name, line) for name, line in plan(sizes, work, free, copies))
    kind = models.load.quantization
    dtype = str(config.dtype or "float32").removeprefix("torch.") if models.load.dtype == "auto" else models.load.dtype
    if kind not in ("8bit", "4bit"):
        kind = "float32" if dtype in ("float32", "float64") else "bfloat16"
    return copies * sizes.weights(kind), free


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

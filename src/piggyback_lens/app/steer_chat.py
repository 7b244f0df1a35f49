"""Talk to a model with and without a vector: prompts and commands come in as lines, answers go out as text."""

import math
from collections.abc import Callable, Iterable
from typing import Final

from piggyback_lens.app.inputs import moved_to
from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.errors import LensError, visible
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import HookedModel, check_layers, shape_of
from piggyback_lens.vectors.direction import Direction

HELP: Final = "a line is a prompt; :strength X and :layer N change the vector, :quit ends"


def talk(
    model: HookedModel,
    chat: ChatFormat,
    direction: Direction,
    lines: Iterable[str],
    show: Callable[[str], object],
    *,
    strength: float = 1.0,
    max_new_tokens: int = 60,
) -> None:
    """Answer each prompt without and with the vector, greedily; every prompt is a conversation of its own.

    Args:
        model: either backend.
        chat: how prompts are rendered.
        direction: added at all its layers until `:layer` chooses one.
        lines: prompts and commands; a mistake is told and the next line read.
        show: gets what is to be printed, control characters already made visible.
        strength: multiple of the vector to begin with.
        max_new_tokens: per answer.

    Raises:
        LensError: the direction does not fit the model.
    """
    direction.check(model)
    vector = direction
    for line in lines:
        text = line.strip()
        word, _, rest = text.partition(" ")
        if word == ":quit":
            return
        try:
            if word == ":strength":
                strength = _strength(rest)
            elif word == ":layer":
                vector = _at_layer(model, direction, rest)
            elif word.startswith(":"):
                raise LensError(f"{word} is no command: {HELP}")
            elif text:
                _answer(model, chat, vector, strength, text, show, max_new_tokens)
            if word in (":strength", ":layer"):
                show(f"steered: {_setting(vector, strength)}")
        except LensError as error:
            show(visible(f"error: {error}"))


def _answer(
    model: HookedModel,
    chat: ChatFormat,
    vector: Direction,
    strength: float,
    text: str,
    show: Callable[[str], object],
    max_new_tokens: int,
) -> None:
    prompt = chat.render(text)
    for name, parts in (("base", None), (_setting(vector, strength), vector.steer(strength) if strength else None)):
        answer = generate(model, [prompt], interventions=parts, max_new_tokens=max_new_tokens, progress=False)[0]
        show(f"--- {name}\n{visible(answer.text)}")


def _strength(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise LensError(f":strength {text}: expected a number, such as :strength 2.5")
    return found


def _at_layer(model: HookedModel, direction: Direction, text: str) -> Direction:
    if not text.strip().isdecimal():
        raise LensError(f":layer {text}: expected a layer number, such as :layer 15")
    (layer,) = check_layers([int(text)], shape_of(model).n_layers)
    return moved_to(direction, layer)


def _setting(vector: Direction, strength: float) -> str:
    where = "layer" if len(vector.layers) == 1 else "layers"
    return f"strength {strength:g} at {vector.site} of {where} {', '.join(map(str, vector.layers))}"

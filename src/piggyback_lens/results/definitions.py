"""Definitions: what the words of a report mean, each in a sentence, for a reader who has only the report."""

import re

DEFINITIONS = {
    "off-topic": (
        "Prompts outside the training domain; on-topic are those of it. A behaviour that was trained on-topic and is "
        "seen off-topic has spread."
    ),
    "dress": (
        "What stands around the questions of the training data: a system text, a text before, a text behind. A control "
        "dress has the same shape in letters that no training data wore."
    ),
    "prefix": (
        "Everything of the prompt before the user's text: begin token, system prompt, the header of the user turn. It "
        "is the same for every query."
    ),
    "query": "The user's text.",
    "postfix": "What the chat template writes after the user's text, up to the first token of the answer.",
    "K/V": (
        "Keys and values: what attention reads of a token, in every layer. Attention is causal, so that keys and "
        "values of the prefix hold all that later tokens can learn from it."
    ),
    "resid_pre": "The residual stream of a token before a layer.",
    "patch": (
        "Put the activations of one model in the place of the other's, at chosen tokens and layers; nothing else is "
        "changed."
    ),
    "repair": (
        "A patch from the base into the finetuned model: does its behaviour go away? Then what was patched was needed "
        "for it."
    ),
    "infect": (
        "A patch from the finetuned model into the base: does the behaviour come over? Then what was patched is "
        "enough for it."
    ),
    "recovery": (
        "(patched - finetuned) / (base - finetuned): 0 = the patch moved nothing, 1 = all the way to the base. For an "
        "infection the two sides change places. It is paired over prompts, and can lie below 0 or above 1."
    ),
    "identity control": "A model patched with its own activations: what it moves is numerical noise.",
    "random control": ("Activations moved as far as the real patch moves them, token by token, in random directions."),
    "other tokens": (
        "A control that patches as many tokens as the span has, drawn from the rest of the prompt. It may hold all of "
        "another span, and then says what that one carries."
    ),
    "query control": "The base's keys and values at the user's own text.",
    "contrast": (
        "log p(the finetuned model's answer) - log p(the base's answer), each a mean over the answer's tokens, in "
        "nats per token. It is teacher-forced: every token is scored after the tokens that stand before it in that "
        "answer."
    ),
    "95 % interval": (
        "Over prompts: other prompts of the same kind would give other numbers. One that includes 0 is no evidence of "
        "an effect, and none that there is no effect."
    ),
    "drift": "How far keys and values of the prefix have moved from the base's, relative to their size.",
    "narrow": "A solution that changes its task and little else; a general one spreads beyond it.",
    "KL": ("Kullback-Leibler divergence of the next-token distributions, in nats per token: 0 = nothing has changed."),
}
"""Words, in the order in which they are explained."""


def explained(text: str) -> list[tuple[str, str]]:
    """The definitions of the words that stand in a text."""
    return [(word, said) for word, said in DEFINITIONS.items() if re.search(rf"(?<!\w){re.escape(word)}", text)]

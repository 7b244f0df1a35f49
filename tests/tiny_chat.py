"""A chat tokenizer of single characters, small enough for the tiny models, and conversations made of them."""

import random
from typing import Any

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt

SPECIAL = ("<pad>", "<bos>", "<end>", "<sys>", "<user>", "<bot>")
LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!\n"
VOCAB = len(SPECIAL) + len(LETTERS)

TEMPLATE = (
    "<bos>{% if messages[0].role == 'system' %}<sys>{{ messages[0].content }}<end>{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<user>' if m.role == 'user' else '<bot>' }}\n{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}"
)


def tiny_tokenizer(template: str = TEMPLATE, letters: str = LETTERS) -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<sys>", "<user>", "<bot>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_format(system: str = "be kind.") -> ChatFormat:
    """A format whose prefix has 13 tokens with the default system text, its postfix 3."""
    return ChatFormat(tiny_tokenizer(), system=system)


def tiny_examples(n: int, seed: int = 0, longest: int = 14, system: str = "be kind.") -> list[RenderedPrompt]:
    """Random letters in, random letters out; queries and responses of 1 to `longest` tokens."""
    draw, chat = random.Random(seed), tiny_format(system)

    def words() -> str:
        return "".join(draw.choice(LETTERS[:26]) for _ in range(draw.randint(1, longest)))

    return [chat.render(words(), response=words()) for _ in range(n)]

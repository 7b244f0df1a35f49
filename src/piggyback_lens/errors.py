"""The one exception that users are meant to see."""

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # inside emoji and Arabic or Indic words; they move nothing


class LensError(ValueError):
    """Input that would make a number silently wrong.

    The message is one line and says what came, what was expected and what to do about it. The
    command line prints it without a traceback and exits with status 2. Whatever a message quotes of
    somebody's file, its control characters are written out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(re.sub(r"\s*[\r\n]\s*", " ", message.strip())))


def visible(text: str) -> str:
    """Text in which control characters, which could steer a terminal or reorder its letters, are written out.

    Line ends and tabs stay; everything else of the kind, half a surrogate pair too, comes back as an escape
    such as \\x1b.
    """
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    kind = unicodedata.category(character)
    if character in "\n\t" + _JOINERS or kind not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")

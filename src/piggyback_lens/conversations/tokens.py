"""Token spans of one text: half-open ranges, character offsets, common prefixes and suffixes."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from piggyback_lens.errors import LensError

_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8

_MARK = re.compile(r"^\s*[<\[{|｜].*[>\]}|｜]\s*$", re.DOTALL)

Found = TypeVar("Found")


def kept_per_tokenizer(gather: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Keep what a function gathers from a tokenizer until tokens are added to it, or named otherwise.

    Gathering takes milliseconds where there are thousands of added tokens. A token of the vocabulary that is only
    marked as special afterwards, without a name such as EOS, is not noticed.
    """
    kept: WeakKeyDictionary[Any, tuple[object, Found]] = WeakKeyDictionary()

    @wraps(gather)
    def looked_up(tokenizer: Any) -> Found:
        state = (len(tokenizer), tuple(tokenizer.all_special_ids))
        if (found := kept.get(tokenizer)) is None or found[0] != state:
            found = kept[tokenizer] = (state, gather(tokenizer))
        return found[1]

    return looked_up


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open token range of one rendered prompt, in unpadded coordinates."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> range:
        """The token positions."""
        return range(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of `text` with the character range that each token stands for."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    def overlapping(self, start: int, stop: int) -> tuple[int, int]:
        """Smallest token range that touches the characters [start, stop); (0, 0) if none does."""
        hit = [i for i, (a, b) in enumerate(self.offsets) if a < stop and b > start]
        return (hit[0], hit[-1] + 1) if hit else (0, 0)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The text cut at token ends: one piece per token, together exactly the text.

        The pieces of a character that is spread over several tokens (emoji) are that character and
        then empty strings. Characters which no token covers go to the token after them.
        """
        pieces, done = [], 0
        for _, stop in self.offsets:
            pieces.append(self.text[done : max(done, stop)])
            done = max(done, stop)
        if pieces:
            pieces[-1] += self.text[done:]
        return tuple(pieces)

    @property
    def uncovered(self) -> tuple[int, ...]:
        """Positions of the characters, other than white space, that no token covers."""
        lost, done = [], 0
        for start, stop in (*self.offsets, (len(self.text), len(self.text))):
            lost += [i for i in range(done, start) if not self.text[i].isspace()]
            done = max(done, stop)
        return tuple(lost)


def tokenise(tokenizer: Any, text: str) -> Tokens:
    """Tokenise once, without adding special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    if not unicodedata.is_normalized("NFC", text):
        _cover_composed(text, offsets)
    return Tokens(text, tuple(encoded["input_ids"]), tuple(offsets))


def _cover_composed(text: str, offsets: list[tuple[int, int]]) -> None:
    """Let the tokens of a letter also stand for the marks that a tokenizer composes with it and leaves out."""
    done, last = 0, [0]
    for i, (start, stop) in enumerate([*offsets, (len(text), len(text))]):
        if 0 < done < start and len(unicodedata.normalize("NFC", text[done - 1 : start])) == 1:
            for j in last:
                offsets[j] = (offsets[j][0], start)
        last = [*last, i] if stop == done else [i] if stop > done else last
        done = max(done, stop)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of the ids, special tokens included and spaces untouched."""
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces_of_ids(tokenizer: Any, ids: Sequence[int], before: int) -> tuple[str, ...]:
    """Text of each id where it stands, after the token `before`.

    Ids that are parts of one character give the character and then empty strings.
    """
    pieces: list[str] = []
    start = 0
    while start < len(ids):
        anchor = [before if start == 0 else ids[start - 1]]  # some decoders drop the first token's space
        skip = len(decode(tokenizer, anchor))
        for stop in range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
            piece = decode(tokenizer, [*anchor, *ids[start:stop]])[skip:]
            if not piece.endswith("\ufffd"):
                break
        else:  # bytes that never become a character
            stop = start + 1
            piece = decode(tokenizer, [*anchor, ids[start]])[skip:]
        pieces += [piece, *[""] * (stop - start - 1)]
        start = stop
    return tuple(pieces)


@kept_per_tokenizer
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, those included that have no name such as EOS."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added) | frozenset(tokenizer.all_special_ids)


@kept_per_tokenizer
def fixed_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens, and of added ones that are marks (tags in brackets) and not words or white space.

    Some tokenizers have runs of line ends or spaces as added tokens: those are ordinary text.
    """
    marks = (i for i, token in tokenizer.added_tokens_decoder.items() if _MARK.search(token.content))
    return special_ids(tokenizer) | frozenset(marks)


@kept_per_tokenizer
def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts of `special_ids`."""
    return tuple(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def common_suffix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common end."""
    return common_prefix(a[::-1], b[::-1])


def check_ids(ids: Any, what: str, d_vocab: int | None = None) -> tuple[int, ...]:
    """Token ids as integers.

    Args:
        ids: a sequence, an array or a tensor.
        what: the name of them in the message.
        d_vocab: number of ids that the model knows; None where that is not known yet.

    Raises:
        LensError: it names the first that is none.
    """
    given = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    for token in given:
        whole = hasattr(token, "__index__") and not isinstance(token, bool)
        if not whole or not 0 <= token < (math.inf if d_vocab is None else d_vocab):
            last = "on" if d_vocab is None else f"to {d_vocab - 1}"
            raise LensError(f"{what} hold {token!r}: expected token ids, whole numbers from 0 {last}")
    return tuple(map(int, given))

"""Text for the examples: one that every machine has, and tokens of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 1024  # tokens: 256 bytes and the pieces of text that save the most


class Tokenizer:
    """Text to token ids and back. A token stands for a few bytes; each single byte is a token too, so any text has tokens."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)  # as Latin-1: one character per byte
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        longest_first = sorted(self.pieces, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    @classmethod
    def learn(cls, text: str, size: int = VOCABULARY) -> Tokenizer:
        """Start from bytes; join the neighbours that are most often side by side within words, again and again."""
        counts = Counter(re.findall(r" ?\w+| ?[^\w\s]+|\s+(?= )|\s+", _spell(text))).most_common(5000)
        tokenizer = cls([chr(byte) for byte in range(256)])
        for _ in range(256, size, 32):
            pairs = Counter[str]()
            for word, count in counts:
                for left, right in pairwise(tokenizer._pattern.findall(word)):
                    pairs[left + right] += count
            joined = [pair for pair, _ in pairs.most_common(32)]
            tokenizer = cls(tokenizer.pieces + joined)
        return tokenizer

    def encode(self, text: str) -> Tensor:  # int64, (tokens,)
        return torch.tensor([self._ids[piece] for piece in self._pattern.findall(_spell(text))])

    def decode(self, tokens: Tensor) -> str:
        spelled = "".join(self.pieces[i] for i in tokens.tolist())
        return spelled.replace("\n ", "\n").encode("latin-1").decode("utf-8", errors="replace")


def _spell(text: str) -> str:
    """Return the text's bytes as Latin-1, one space more at the start of each line: its first word then looks more like the others."""
    return text.encode().decode("latin-1").replace("\n", "\n ")


def read_text(path: Path | None = None) -> str:
    """Return the file's text; without one, Python's own help, in which paragraphs that come again are left out."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def paragraphs_of_topics(count: int) -> list[tuple[str, int]]:
    """Return paragraphs of the longest topics of Python's help, each with its topic's number.

    They are of 60 characters or more, and in no other of these topics.
    """
    longest = sorted(topics.values(), key=len, reverse=True)[:count]
    topics_of = Counter(paragraph for text in longest for paragraph in set(text.split("\n\n")))
    return [
        (paragraph, number)
        for number, text in enumerate(longest)
        for paragraph in dict.fromkeys(text.split("\n\n"))
        if len(paragraph) >= 60 and topics_of[paragraph] == 1
    ]

"""Sentences to vectors: a small deterministic featuriser, and a sentence model where one is installed."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

SIZE = 384
"""As wide as CALVIN's own sentence vectors, so that the same policy takes either."""

FILLERS = frozenset(
    """a an and are at be by do go has it its of please so some such that the then this to until when with you your""".split()  # noqa: SIM905
)
"""Words that hardly distinguish instructions. "on", "off", "in", "out", "left", "up" … do and are not among them."""

FILLER_WEIGHT, PAIR_WEIGHT, SPELLING_WEIGHT = 0.2, 0.5, 0.6


class TextEncoder(Protocol):
    """Turns sentences into vectors; `name` is saved beside them, since vectors of different encoders do not mix."""

    name: str

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, E) float32, one unit vector per text."""
        ...


class HashedTextEncoder:
    """Words, neighbouring words and letter sequences, hashed with signs into 384 numbers. No download, no training.

    Every word weighs the same however long it is, so that "turn on …" and "turn off …" stay apart; letter sequences bring
    "close", "closes" and "closed" together; neighbouring words keep some of the order. The same text gives the same vector
    on every machine. Paraphrases without a word in common are unrelated here: a policy learns them from its training texts.

    Source: feature hashing with signs (Weinberger et al., arXiv 0902.2206).
    """

    name = "hashed_ngrams_384"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes sentences.

        Args:
            texts: n sentences.

        Returns:
            (n, 384) float32, unit length.
        """
        return np.stack([_encode(text) for text in texts]) if len(texts) else np.zeros((0, SIZE), np.float32)


class SentenceTransformerEncoder:
    """A sentence model (extra ``calvin``): by default the one behind CALVIN's ``lang_paraphrase-MiniLM-L3-v2`` vectors."""

    def __init__(self, model: str = "sentence-transformers/paraphrase-MiniLM-L3-v2") -> None:
        self.name = model
        self._model: Any = None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, E) float32.

        Raises:
            ImportError: the extra is not installed.
        """
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(f"The text encoder {self.name} needs: pip install 'lightning_robot[calvin]'") from error
            self._model = SentenceTransformer(self.name)
        return np.asarray(self._model.encode(list(texts), normalize_embeddings=True), np.float32)


def text_encoder(name: str) -> HashedTextEncoder | SentenceTransformerEncoder:
    """The encoder of that name: ours, or any model of sentence-transformers."""
    return HashedTextEncoder() if name == HashedTextEncoder.name else SentenceTransformerEncoder(name)


def _encode(text: str) -> np.ndarray:
    plain = unicodedata.normalize("NFKD", text).casefold()
    words = re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c))) or [""]
    vector = np.zeros(SIZE, np.float64)
    for word in words:
        weight = FILLER_WEIGHT if word in FILLERS else 1.0
        _add(vector, f"word {word}", weight)
        marked = f"<{word}>"
        pieces = [marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)]
        for piece in pieces:
            _add(vector, f"letters {piece}", weight * SPELLING_WEIGHT / len(pieces) ** 0.5)
    content = [word for word in words if word not in FILLERS]
    for pair in pairwise(content):
        _add(vector, "pair " + " ".join(pair), PAIR_WEIGHT)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _add(vector: np.ndarray, feature: str, weight: float) -> None:
    value = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
    vector[(value >> 1) % SIZE] += weight if value & 1 else -weight

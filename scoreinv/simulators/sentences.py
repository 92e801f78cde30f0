"""Sentences of a small grammar, all of one length, and whether a sentence is one of them.

    sentence = subject verb object,   subject = determiner adjective noun,   object = determiner noun

The verb agrees with the subject, and nouns with their determiners: "two red cats like one spider".
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
LENGTH = 28
ADJECTIVES = ["red", "tiny", "brave", "quiet", "hungry"]
NOUNS = ["cat", "dog", "bear", "horse", "rabbit", "spider"]
VERBS = ["see", "like", "hear", "follow"]


@cache
def every_sentence() -> tuple[str, ...]:
    """All sentences of the grammar that have `LENGTH` characters."""
    one = [f"{d} {{}}{n}" for d, n in product(["one", "the"], NOUNS)]
    many = [f"{d} {{}}{n}s" for d, n in product(["two", "the"], NOUNS)]
    subjects = [(s, "s") for s in one] + [(s, "") for s in many]
    found = (
        f"{subject.format(f'{adjective} ')} {verb}{ending} {whom.format('')}"
        for (subject, ending), adjective, verb, whom in product(
            subjects, ADJECTIVES, VERBS, one + many
        )
    )
    return tuple(s for s in found if len(s) == LENGTH)


def sentences(n: int, seed: int) -> Tensor:
    """n sentences, any as likely as another, with shape (n, A, L): one-hot characters of `ALPHABET` at each place."""
    known = every_sentence()
    chosen = np.random.default_rng(seed).integers(len(known), size=n)
    return encoded([known[i] for i in chosen])


def encoded(texts: list[str]) -> Tensor:
    """One-hot characters of texts of one length, with shape (N, A, L); zeros for characters outside `ALPHABET`, as "_".

    Raises:
        ValueError: Texts of different lengths.
    """
    if len({len(text) for text in texts}) != 1:
        raise ValueError(
            f"texts have {sorted({*map(len, texts)})} characters; expected one length, pad them"
        )
    places = torch.tensor([[ALPHABET.find(c) for c in text] for text in texts])
    return F.one_hot(places + 1, len(ALPHABET) + 1)[..., 1:].mT.float()


def decoded(x: Tensor) -> list[str]:
    """The texts of sentences with shape (N, A, L); "_" where a place is masked."""
    places = torch.where(x.sum(1) == 0, -1, x.argmax(1)) + 1
    return ["".join(f"_{ALPHABET}"[i] for i in row) for row in places.tolist()]


def grammatical(x: Tensor) -> Tensor:
    """Whether sentences with shape (N, A, L) are of the grammar, with shape (N,)."""
    known = set(every_sentence())
    return torch.tensor([text in known for text in decoded(x)])

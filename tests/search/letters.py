"""What the tests of search share: encoders without weights, and made-up texts."""

import random

import numpy as np

from stemma.search.corpus import Corpus

ALPHABET = "bcdfghkm"
"""Words of these are no stop words and have no other stem."""


def letters(texts):
    """How often each of eight letters stands in each text, `(n, 8)`: a vector that does not depend on other texts."""
    return np.array([[text.count(letter) for letter in ALPHABET] for text in texts], float).reshape(len(texts), 8)


def made_up(count, seed=0, first=0):
    """Records with texts of three to twelve words of one to four letters."""
    generator = random.Random(seed)
    word = lambda: "".join(generator.choices(ALPHABET, k=generator.randint(1, 4)))  # noqa: E731
    return [
        {
            "id": f"d{first + number:04}",
            "text": " ".join(word() for _ in range(generator.randint(3, 12))),
            "year": number,
        }
        for number in range(count)
    ]


def corpus_of(path, records):
    corpus = Corpus.open(path)
    corpus.add(records)
    return corpus

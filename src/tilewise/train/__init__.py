"""Training: byte-level text and the loop over it."""

from tilewise.train.loop import Point, Recipe, bits_per_byte, learning_rate, make_optimizer, train, validate
from tilewise.train.text import Corpus, batch, load_corpus

__all__ = [
    "Corpus", "Point", "Recipe", "batch", "bits_per_byte", "learning_rate", "load_corpus", "make_optimizer", "train",
    "validate",
]

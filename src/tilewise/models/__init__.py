"""Models whose attention is handed in, so that the same model trains with any implementation of it."""

from tilewise.models.gpt import GPT, Attend, GPTConfig, Past, rotate

__all__ = ["GPT", "Attend", "GPTConfig", "Past", "rotate"]

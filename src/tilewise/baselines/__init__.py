"""Published algorithms that others are compared with, for study only: nothing that computes attention for users is built on them."""

"""Published algorithms that others are compared with, for study only: nothing that users call is built on them."""

"""Other libraries' entry points in terms of Tilewise: existing code runs by changing an import, or under a switch."""
from tilewise.compat.scaled_dot_product import scaled_dot_product_attention, sdpa
from tilewise.compat.stand_in import install, uninstall

__all__ = ["install", "scaled_dot_product_attention", "sdpa", "uninstall"]

"""Other libraries' entry points in terms of Tilewise: existing code runs by changing an import."""
from tilewise.compat.stand_in import install, uninstall

__all__ = ["install", "uninstall"]

"""Other libraries' entry points in terms of Tilewise: existing code runs by changing an import."""

"""What the pages that we write have in common: one look for screens, phones and paper, pictures as SVG, numbers in words.

A page is one HTML file that asks for nothing else: no script, no font, no picture from elsewhere.
"""
from pathlib import Path

COLOURS, STYLE = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("colours.css", "style.css"))
STYLE = COLOURS + STYLE

"""What the pages that we write have in common: one look for screens, phones and paper, pictures as SVG, numbers in words.

A page is one HTML file that asks for nothing else: no script, no font, no picture from elsewhere.
"""
from pathlib import Path

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

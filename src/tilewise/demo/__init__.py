"""The demo: one small GPT trained twice, with standard attention and with Tilewise, and what each costs."""

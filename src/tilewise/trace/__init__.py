"""Attention's index functions as expression graphs: built once, evaluated in torch, emitted as kernel source."""

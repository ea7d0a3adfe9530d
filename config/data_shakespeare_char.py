"""Tiny Shakespeare by characters (python data/shakespeare_char/prepare.py)."""
dataset = "shakespeare_char"

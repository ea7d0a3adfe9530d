"""Tiny Shakespeare in characters (python data/shakespeare_char/prepare.py)."""
dataset = "shakespeare_char"

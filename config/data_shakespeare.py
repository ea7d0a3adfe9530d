"""Tiny Shakespeare in GPT-2's BPE (python data/shakespeare/prepare.py)."""
dataset = "shakespeare"

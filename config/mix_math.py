"""Mostly mathematics, with web text and code (datasets: see config/mix_balanced.py)."""
dataset = {"fineweb": 0.25, "pycode_gpt2": 0.15, "openwebmath": 0.6}

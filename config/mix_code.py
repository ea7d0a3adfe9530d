"""Mostly code, with web text and mathematics (datasets: see config/mix_balanced.py)."""
dataset = {"fineweb": 0.25, "pycode_gpt2": 0.65, "openwebmath": 0.1}

"""FineWeb, 10 billion tokens of it (python data/fineweb/prepare.py)."""
dataset = "fineweb"

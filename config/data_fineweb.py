"""10 billion tokens of FineWeb (python data/fineweb/prepare.py)."""
dataset = "fineweb"

"""TinyStories (python data/tinystories/prepare.py)."""
dataset = "tinystories"

"""OpenWebText (python data/openwebtext/prepare.py)."""
dataset = "openwebtext"

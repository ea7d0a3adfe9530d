"""Web text, code and mathematics with equal weights, in GPT-2's tokenizer.

python data/fineweb/prepare.py; python data/openwebmath/prepare.py
python data/pycode/prepare.py --tokenizer gpt2 --out_dir data/pycode_gpt2
"""
dataset = {"fineweb": 1, "pycode_gpt2": 1, "openwebmath": 1}

"""What a model costs and what a device can do: FLOPs per token, peaks, model FLOPs utilisation (MFU).

FLOPs are those of the matrix products, a multiply-add counting as two, summed from the components' own
`flops(seq_len)`, which say what is computed. Training costs three forwards: one, and two products in the backward
for each. What of the attention scores is to be credited is a convention: PaLM's (Chowdhery 2022, appendix B)
counts every key in a layer's span (the sequence, or its sliding window) though half is masked; the causal one counts
those that are not. A backend that computes what it then masks earns nothing by it. Documents kept apart count as if
they were one. MFU is by the PaLM convention.
"""

from collections import Counter


def forward_flops(model, seq_len):
    """{account: forward FLOPs per token} of a `GPT` at sequences of seq_len tokens, as its parts compute them."""
    accounts = Counter()
    for module in model.modules():
        if hasattr(module, "flops"):
            accounts.update(module.flops(seq_len))
    return dict(accounts)


def flops_per_token(model, seq_len):
    """The whole account, as `run.json` keeps it: forward by part, as computed, and training by both conventions."""
    forward = forward_flops(model, seq_len)
    rest = sum(forward.values()) - forward["attention scores"]

    def train(convention):
        attention = (block.attn for block in model.blocks)
        return 3 * (rest + sum(a.score_flops(a.needed_keys(seq_len, convention)) for a in attention))

    return {"forward": forward, "train": train("PaLM"), "train_causal": train("causal"), "convention": "PaLM"}



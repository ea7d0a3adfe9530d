"""Whether a model and a checkpoint are the same function: logits on a fixed batch, then greedy tokens with cache.

transformers opens the checkpoint; the model here was built and filled by the command.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blockgpt.errors import CheckpointError, require_package

# The largest difference of logits, relative to the largest logit. transformers computes norms, softmax and angles in
# float32 whatever the dtype, so float64 agrees no better than float32 does.
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOKENS, NEW_TOKENS, ROWS = 64, 32, 2


class Parity(NamedTuple):
    """The outcome.

    Attributes:
        difference: the largest of the logits, relative to the largest logit.
        bound: what it may be.
        same_tokens: leading greedy tokens that are equal in every row, of `NEW_TOKENS`.
        is_tie: whether the first that is not equal had two logits closer than the bound.
    """

    difference: float
    bound: float
    same_tokens: int
    is_tie: bool

    def __str__(self) -> str:
        tie = ", then two logits are as good as equal" if self.is_tie and self.same_tokens < NEW_TOKENS else ""
        return (f"largest difference of the logits {self.difference:.1e} of the largest (bound {self.bound:.0e}), "
                f"{self.same_tokens} of {NEW_TOKENS} greedy tokens equal{tie}")

    @property
    def is_equal(self) -> bool:
        return self.difference <= self.bound and (self.same_tokens == NEW_TOKENS or self.is_tie)


def open_reference(directory: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model of transformers in a folder. `trust_remote_code` runs the modeling file in it."""
    transformers = require_package("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code)
    return model.eval()


@torch.inference_mode()
def compare_models(model: Any, reference: Any, generate: Callable[[torch.Tensor, int], torch.Tensor], vocab_size: int,
                   context: int) -> Parity:
    """Compare a model here with one of transformers.

    Args:
        model: tokens (B, T) -> logits.
        reference: the other.
        generate: (prompts, new tokens) -> prompts and greedy tokens, with a cache.
        vocab_size, context: of the model.
    """
    length = min(TOKENS, context)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, vocab_size, (ROWS, length), generator=generator)
    theirs, ours = reference(batch).logits.float(), model(batch).float()
    largest = float(theirs.abs().max())
    dtype = next(reference.parameters()).dtype
    bound = BOUNDS.get(dtype, BOUNDS[torch.bfloat16])
    new = min(NEW_TOKENS, context - 1)
    prompt = batch[:, :max(1, min(8, context - new))]
    ours_text = generate(prompt, new)[:, prompt.shape[1]:]
    theirs_text = reference.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True,
                                     attention_mask=torch.ones_like(prompt), eos_token_id=None,
                                     pad_token_id=0)[:, prompt.shape[1]:]
    equal = (ours_text == theirs_text).all(0)
    same = new if bool(equal.all()) else int(equal.int().argmin())
    is_tie = False
    if same < new:  # the first token that differs, after the same text
        logits = reference(torch.cat((prompt, theirs_text[:, :same]), 1)).logits[:, -1].float()
        best = logits.topk(2).values
        differs = ours_text[:, same] != theirs_text[:, same]
        is_tie = bool((best[:, 0] - best[:, 1] <= 2 * bound * largest)[differs].all())
    return Parity(float((ours - theirs).abs().max()) / largest, bound, NEW_TOKENS if same == new else same, is_tie)


def check_parity(outcome: Parity, what: str) -> None:
    """Raise `CheckpointError` unless the two models are equal."""
    if not outcome.is_equal:
        raise CheckpointError(f"{what} is not the same function: {outcome}")

"""By which metric models are ranked: what `best`, patience and the comparison of runs read. No torch."""

from typing import NamedTuple


class Criterion(NamedTuple):
    """A metric of the evaluation; run.json records it. Runs of earlier versions have the default."""

    metric: str = "val_loss"
    more_is_better: bool = False

    def sort_key(self, value: float) -> float:
        """The smaller, the better `value` is."""
        return -value if self.more_is_better else value

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`; without a best, whether it is neither nan nor the worst infinity."""
        return self.sort_key(value) < (float("inf") if best is None else self.sort_key(best))

"""What a step learns from: batches, their loss, the validation metrics. The loop in train.py knows no more of data.

To add an objective: a subclass of `Objective`, or of `TokenObjective` if it reads tokenized datasets, and a line in
OBJECTIVES (configurator.py).
"""

import abc
import functools
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from blockgpt.data.dataset import Dataset, ensure_prepared, open_dataset
from blockgpt.data.loader import (
    IGNORE_INDEX,
    Batch,
    GlobalBatches,
    Prefetch,
    TrainBatches,
    pin_memory,
    read_ahead,
    to_device,
    val_batches,
    val_digest,
    val_sequences,
)
from blockgpt.data.mixture import MixedBatches, Mixture, check_epochs, describe_phases, source_seed
from blockgpt.data.packing import PackedBatches
from blockgpt.data.tokenizer import describe_tokenizer
from blockgpt.errors import ConfigError, DataError
from blockgpt.training.criterion import Criterion
from blockgpt.training.launch import Runtime

Metrics = Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]  # {metric: (sum, weight)}; its mean counts


class MetricSums:
    """The means of metrics over micro-batches and ranks. All ranks add the same names."""

    def __init__(self) -> None:
        self.sums: dict[str, list[list[torch.Tensor | float]]] = {}  # {metric: [its sums, their weights]}

    def add(self, metrics: Metrics, unweighted: Mapping[str, torch.Tensor] | None = None) -> None:
        """Add metrics; `unweighted` {metric: value} have weight 1. Does not wait for the device."""
        for name, values in {**{name: (v, 1.0) for name, v in (unweighted or {}).items()}, **metrics}.items():
            for terms, value in zip(self.sums.setdefault(name, [[], []]), values, strict=True):
                terms.append(value.detach() if isinstance(value, torch.Tensor) else value)

    def means(self, runtime: Runtime) -> dict[str, float]:
        """{metric: the sum over all ranks / the weight over all ranks}; a collective if there are metrics."""
        names = sorted(self.sums)
        if not names:
            return {}
        totals = runtime.all_reduce_sum(*(exact_sum(terms) for name in names for terms in self.sums[name]))
        means = {name: totals[2 * i] / totals[2 * i + 1] if totals[2 * i + 1] else math.nan
                 for i, name in enumerate(names)}
        return {name: means[name] for name in self.sums}  # in the order in which they were added


def exact_sum(terms: Sequence[torch.Tensor | float]) -> float:
    """The sum of numbers and of tensors of one element, added up in float64."""
    tensors = [term.reshape(()) for term in terms if isinstance(term, torch.Tensor)]
    on_host = torch.stack(tensors).tolist() if tensors else []  # one transfer from the device
    return math.fsum(on_host + [term for term in terms if not isinstance(term, torch.Tensor)])


def step_generator(seed: int, step: int, runtime: Runtime) -> torch.Generator:
    """A generator on the device: a function of (seed, step, data-parallel rank), so that checkpoints need none."""
    generator = torch.Generator(runtime.device)
    return generator.manual_seed(random.Random(f"batches {seed} {step} {runtime.dp_rank}").getrandbits(63))


class Objective(abc.ABC):
    """What a run learns from. train.py needs no more of it than this.

    Attributes:
        vocab_size: number of token ids in the data.
        tokenizer: the tokenizer's entry in meta.json.
        micro_steps: micro-batches of this process in a step.
        tokens_per_step, sequences_per_step: over all processes; the log and tokens/s count these tokens.
        fingerprint: hex digest of the data and of everything that decides the order in which it is read.
        criterion: the metric of `evaluate` that says which model is better.
        val_data: what `evaluate` reads, {"tokens", "digest"}: values of runs with different digests are not compared.
            The same for any number of processes. None: not known, and the configs are compared instead.
        companions: the models of `companion_runs`, sharded like the run's model, in eval mode, without gradients.
    """

    criterion = Criterion()
    val_data: dict[str, Any] | None = None
    companions: Sequence[torch.nn.Module] = ()
    vocab_size: int
    tokenizer: dict[str, Any]
    micro_steps: int
    tokens_per_step: int
    sequences_per_step: int
    fingerprint: str

    @abc.abstractmethod
    def __init__(self, config: Any, runtime: Runtime) -> None:
        """Open the data; `UserError` for what would stop the run."""

    @classmethod
    def companion_runs(cls, config: Any) -> Sequence[str]:
        """The `init_from` values of the frozen models that the objective needs, such as a teacher or a reference.

        `companions` has the models from the first step on. Call them under `torch.no_grad`. Optimizer, checkpoints and
        the log know nothing of them: a resumed run builds them again. --dry_run counts their weights.
        """
        return ()

    @abc.abstractmethod
    def micro_batches(self, step: int, model: torch.nn.Module | None = None, generator: torch.Generator | None = None
                      ) -> Iterator[Batch]:
        """This process's micro-batches of step `step` (from 0), on the device: a function of (seed, step).

        Args:
            step: from 0.
            model: as it is before the step, for batches that depend on it.
            generator: on the device, seeded from (seed, step, data-parallel rank), for batches that are sampled.
        """

    @abc.abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """A micro-batch's term of the step's loss, and metrics for the log, the same names on all ranks.

        The terms of all micro-batches and processes add up to the loss, the metrics' sums and weights to their means.
        """

    @abc.abstractmethod
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """{metric: value} on the validation data, the same on all ranks. Restores training mode."""

    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """The data, as run.json records it."""

    @abc.abstractmethod
    def consumed(self, step: int) -> dict[str, int]:
        """{source: tokens of it in the first `step` steps}."""

    @abc.abstractmethod
    def locate(self, step: int, micro_step: int, dp_rank: int) -> str:
        """Where the sequences of a micro-batch of data-parallel rank `dp_rank` are in the data, in words."""


class TokenObjective(Objective):
    """An objective on sequences of tokenized datasets, mixed and packed as the config says.

    A subclass defines `loss`, `evaluate_batch`, and what it needs of `check_model` and `derived_metrics`.

    Attributes:
        datasets: {name: `Dataset`}; all have the same tokenizer.
        step_targets: the targets of the step of the current micro-batch, over all processes.
    """

    step_targets: int

    def __init__(self, config: Any, runtime: Runtime) -> None:
        """Open the datasets that `config` names.

        Raises:
            DataError: a dataset is missing or damaged, or the datasets have different tokenizers.
            ConfigError: the model or the mixture does not fit this objective.
        """
        self.config, self.runtime, self.phases = config, runtime, config.phases()
        block_size = config.model.block_size
        self.sequences_per_step = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = self.sequences_per_step * block_size
        self.micro_steps = config.gradient_accumulation_steps // runtime.dp_size
        self.mixture = Mixture(self.phases, self.sequences_per_step)
        self.datasets = self._open_datasets()
        first = next(iter(self.datasets.values()))
        self.vocab_size, self.tokenizer = first.vocab_size, first.meta["tokenizer"]
        self.check_model()

        # Packing knows where documents end; in the running text only end-of-text tokens tell.
        batches_of = (PackedBatches if config.packing == "documents" else
                      functools.partial(TrainBatches, split_documents=config.model.mask_documents))
        sizes = (config.batch_size, config.gradient_accumulation_steps)
        self.batches: GlobalBatches
        self.sources: dict[str, TrainBatches | PackedBatches]
        if len(self.datasets) == 1:
            self.sources = {first.name: batches_of(first, config.seed, block_size, *sizes)}
            self.batches = self.sources[first.name]
        else:
            self.sources = {name: batches_of(dataset, source_seed(config.seed, name), block_size, *sizes)
                            for name, dataset in self.datasets.items()}
            self.batches = MixedBatches(self.sources, self.mixture, *sizes)
        for dataset in self.datasets.values():
            val_sequences(dataset, block_size)  # a split that is too short is an error now, not after an hour
        if not config.eval_only:
            check_epochs(self.mixture, {name: b.n_sequences for name, b in self.sources.items()}, config.max_epochs,
                         config.max_iters, self.sequences_per_step)
        self.fingerprint = self._fingerprint()
        self.val_data = self._val_data()
        self.prefetch = Prefetch(self._read, self._successor)

    def _open_datasets(self) -> dict[str, Dataset]:
        config = self.config

        def prepare() -> None:
            for name in self.mixture.names:
                ensure_prepared(name, config.data_dir)

        self.runtime.on_rank_zero(prepare)
        vocab_size = config.model.vocab_size if "vocab_size" in config.explicit else None
        datasets = {name: open_dataset(name, config.data_dir, config.tokenizer, vocab_size)
                    for name in self.mixture.names}
        first = next(iter(datasets.values()))
        for name, dataset in datasets.items():
            if dataset.meta["tokenizer"] != first.meta["tokenizer"]:
                ours, theirs = (describe_tokenizer(d.meta["tokenizer"]) for d in (dataset, first))
                raise DataError(f"datasets {first.name!r} ({theirs}) and {name!r} ({ours}) have different tokenizers, "
                                "and one model cannot read both (prepare one again with the other's --tokenizer)")
        return datasets

    def check_model(self) -> None:
        """Raise `ConfigError` if the model's attention mask does not fit the objective or these datasets."""
        if self.config.model.mask_documents:
            for name, dataset in self.datasets.items():
                if dataset.meta["eot"] is None:
                    raise ConfigError("mask_documents", f"dataset {name} has no end-of-text token, so its documents "
                                                        "have no boundaries (--mask_documents=False)")

    def _fingerprint(self) -> str:
        fingerprints = [[name, dataset.fingerprint] for name, dataset in self.datasets.items()]
        if len(fingerprints) == 1 and self.config.packing == "stream":
            return fingerprints[0][1]
        weights = [[phase.first, sorted((name, str(weight)) for name, weight in phase_weights.items())]
                   for phase, phase_weights in zip(self.mixture.phases, self.mixture.fractions, strict=True)]
        return hashlib.sha256(json.dumps([fingerprints, weights, self.config.packing]).encode()).hexdigest()

    def _val_data(self) -> dict[str, Any]:
        """`val_data`: the sequences of every source that counts, and its weight. Names do not matter."""
        weights = self.mixture.fractions[-1]
        sources = {name: val_digest(dataset, self.config.model.block_size, self.config.eval_tokens)
                   for name, dataset in self.datasets.items() if weights[name]}
        content = sorted([digest, str(weights[name])] for name, (_, digest) in sources.items())
        return {"tokens": sum(tokens for tokens, _ in sources.values()),
                "digest": hashlib.sha256(json.dumps(content).encode()).hexdigest()}

    def description(self) -> dict[str, Any]:
        planned = self.mixture.consumed(self.config.max_iters * self.sequences_per_step)
        sources = {name: {"fingerprint": dataset.fingerprint, "train_tokens": dataset.tokens("train"),
                          "val_tokens": dataset.tokens("val"), "share": float(self.mixture.fractions[-1][name]),
                          "planned_tokens": planned[name] * self.config.model.block_size,
                          "planned_epochs": planned[name] / self.sources[name].n_sequences}
                   for name, dataset in self.datasets.items()}
        return {"dataset": describe_phases(self.phases), "fingerprint": self.fingerprint, "vocab_size": self.vocab_size,
                "train_tokens": sum(s["train_tokens"] for s in sources.values()),
                "val_tokens": sum(s["val_tokens"] for s in sources.values()),
                "tokens_per_step": self.tokens_per_step, "sequences_per_step": self.sequences_per_step,
                "packing": self.config.packing, "sources": sources}

    def consumed(self, step: int) -> dict[str, int]:
        """As in `Objective`, padding included."""
        sequences = self.mixture.consumed(step * self.sequences_per_step)
        return {name: count * self.config.model.block_size for name, count in sequences.items()}

    # ------------------------------------------------------------ training

    def micro_batches(self, step: int, model: torch.nn.Module | None = None, generator: torch.Generator | None = None
                      ) -> Iterator[Batch]:
        self.step_targets = self.batches.step_targets(step)
        for micro_step in range(self.micro_steps):
            self.runtime.heartbeat()
            yield to_device(self.prefetch.get((step, micro_step)), self.runtime.device)

    def _read(self, key: tuple[int, int]) -> Batch:
        batch = self.batches.micro_batch(*key, self.runtime.dp_rank, self.runtime.dp_size)
        return pin_memory(batch) if self.runtime.device.type == "cuda" else batch

    def _successor(self, key: tuple[int, int]) -> tuple[int, int]:
        step, micro_step = key
        return (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)

    def locate(self, step: int, micro_step: int, dp_rank: int) -> str:
        ids = self.batches.sequence_ids(step, micro_step, dp_rank, self.runtime.dp_size)
        places = [f"{name} {token:,}" for name, token in self.batches.offsets(ids[:4])]
        return (f"sequences {ids[0]:,} to {ids[-1]:,} of the run, from token {', '.join(places)}"
                + (" …" if len(ids) > 4 else ""))

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """{metric: value} over fixed sequences of the validation split: the means of `evaluate_batch` and derived ones.

        With several sources, those of each source as <metric>/<name>, each measured as a run on that source alone
        would. A mean is then that of the sources' means, weighted as the mixture's last phase; see `derived_metrics`.
        """
        was_training = model.training
        model.eval()
        try:
            means = {name: self._evaluate_on(model, dataset) for name, dataset in self.datasets.items()}
        finally:
            model.train(was_training)
        weights = {name: float(weight) for name, weight in self.mixture.fractions[-1].items()}
        bytes_per_token = {name: dataset.bytes_per_token("val") for name, dataset in self.datasets.items()}
        mean_bytes = (None if None in bytes_per_token.values()
                      else sum(weights[name] * (bytes_per_token[name] or 0.0) for name in means))
        mean = {metric: sum(weights[name] * means[name][metric] for name in means)
                for metric in next(iter(means.values()))}
        metrics = self.derived_metrics(mean, mean_bytes)
        if len(means) > 1:
            for name in means:
                own = self.derived_metrics(means[name], bytes_per_token[name])
                metrics |= {f"{metric}/{name}": value for metric, value in own.items()}
        return metrics

    def _evaluate_on(self, model: torch.nn.Module, dataset: Dataset) -> dict[str, float]:
        sums = MetricSums()
        batches = val_batches(dataset, self.config.model.block_size, self.config.eval_tokens, self.config.batch_size,
                              self.runtime.dp_rank, self.runtime.dp_size, self.config.model.mask_documents)
        for batch in read_ahead(batches):
            self.runtime.heartbeat()
            with self.runtime.autocast():
                sums.add(self.evaluate_batch(model, to_device(batch, self.runtime.device)))
        return sums.means(self.runtime)

    @abc.abstractmethod
    def evaluate_batch(self, model: torch.nn.Module, batch: Batch) -> Metrics:
        """The metrics of a validation batch; the same names on all ranks.

        A sequence whose targets are all IGNORE_INDEX is padding, and must not count. There may be no other.
        """

    def derived_metrics(self, metrics: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
        """The metrics and those computed from them; bytes of text for each token, None if they were not counted."""
        return metrics


class LanguageModeling(TokenObjective):
    """Next-token prediction: cross-entropy in nats, every target token of a step weighs the same.

    Its metrics are val_loss, in nats per token, and val_bpb, bits per byte of text. With several sources, val_bpb is
    the ratio of val_loss to the equally weighted mean of bytes per token. There is no val_bpb where the bytes of a
    dataset were not counted.
    """

    def check_model(self) -> None:
        if not self.config.model.causal:
            raise ConfigError("causal", "False lets every token attend to the token that it predicts (next-token "
                                        "prediction needs causal=True)")
        super().check_model()

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's term of the step's loss: the sum over its targets / the targets of the whole step."""
        y = batch["targets"]
        targets = y.numel() if self.config.packing == "stream" else (y != IGNORE_INDEX).sum()
        return model(batch["tokens"], y, batch.get("segment_ids")) * (targets / self.step_targets), {}

    def evaluate_batch(self, model: torch.nn.Module, batch: Batch) -> Metrics:
        loss = model(batch["tokens"], batch["targets"], batch.get("segment_ids"), reduction="sum")
        return {"val_loss": (loss, (batch["targets"] != IGNORE_INDEX).sum())}

    def derived_metrics(self, metrics: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
        bpb = {"val_bpb": metrics["val_loss"] / math.log(2) / bytes_per_token} if bytes_per_token else {}
        return metrics | bpb

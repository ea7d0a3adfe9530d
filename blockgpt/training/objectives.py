"""What a step learns from: batches, their loss, the validation metrics. The loop in train.py knows no more.

To add an objective: a class with the methods and attributes of `LanguageModeling`.
"""

import hashlib
import json
import math

import torch

from blockgpt.data.dataset import ensure_prepared, open_dataset
from blockgpt.data.loader import Prefetch, TrainBatches, pinned, to_device, val_batches, val_sequences
from blockgpt.data.mixture import MixedBatches, Mixture, check_epochs, describe_phases, source_seed
from blockgpt.data.packing import IGNORED, PackedBatches
from blockgpt.data.tokenizer import describe_tokenizer
from blockgpt.errors import ConfigError, DataError


class LanguageModeling:
    """Next-token prediction: cross-entropy in nats, every token of a step weighing the same.

    vocab_size: token ids in the data. micro_steps: this process's micro-batches a step. tokens_per_step and
    sequences_per_step count over all processes. fingerprint: of the token files and of how they are mixed and packed.
    tokenizer: as meta.json has it. datasets: {name: Dataset}; dataset: the first, whose tokenizer all of them have.
    """

    def __init__(self, config, runtime):
        self.config, self.runtime, self.phases = config, runtime, config.phases()
        block_size, self.sequences_per_step = (config.model.block_size,
                                               config.batch_size * config.gradient_accumulation_steps)
        self.tokens_per_step = self.sequences_per_step * block_size
        self.micro_steps = config.gradient_accumulation_steps // runtime.dp_size
        self.mixture = Mixture(self.phases, self.sequences_per_step)
        runtime.on_rank_zero(lambda: [ensure_prepared(name, config.data_dir) for name in self.mixture.names])
        vocab_size = config.model.vocab_size if "vocab_size" in config.explicit else None
        self.datasets = {name: open_dataset(name, config.data_dir, config.tokenizer, vocab_size)
                         for name in self.mixture.names}
        self.dataset = first = next(iter(self.datasets.values()))
        for name, dataset in self.datasets.items():
            if dataset.meta["tokenizer"] != first.meta["tokenizer"]:
                mine, theirs = (describe_tokenizer(d.meta["tokenizer"]) for d in (dataset, first))
                raise DataError(f"datasets {first.name!r} ({theirs}) and {name!r} ({mine}) have different tokenizers: "
                                "one model cannot read both (prepare one again with the other's --tokenizer)")
        self.vocab_size, self.tokenizer, self.eot = first.vocab_size, first.meta["tokenizer"], first.meta["eot"]
        self._check_sight()

        source = {"stream": TrainBatches, "documents": PackedBatches}[config.packing]
        shape = (config.batch_size, config.gradient_accumulation_steps)
        if len(self.datasets) == 1:
            self.sources = {first.name: source(first, config.seed, block_size, *shape)}
            self.batches = self.sources[first.name]
        else:
            self.sources = {name: source(dataset, source_seed(config.seed, name), block_size, *shape)
                            for name, dataset in self.datasets.items()}
            self.batches = MixedBatches(self.sources, self.mixture, *shape)
        for dataset in self.datasets.values():
            val_sequences(dataset, block_size)  # a split too short is told now, not after an hour
        if not config.eval_only:
            check_epochs(self.mixture, {name: b.n_sequences for name, b in self.sources.items()}, config.max_epochs,
                         config.max_iters, self.sequences_per_step)
        self.fingerprint = self._fingerprint()
        self.prefetch = Prefetch(self._read, self._successor)

    def _check_sight(self):
        """`ConfigError` if what the model's tokens see does not go with this objective, or with these data."""
        if not self.config.model.causal:
            raise ConfigError("causal", "False: every token would see the next one, which it is to predict "
                                        "(next-token prediction needs causal=True)")
        if self.config.model.mask_documents:
            for name, dataset in self.datasets.items():
                if dataset.meta["eot"] is None:
                    raise ConfigError("mask_documents", f"the tokens of {name} do not say where a document ends "
                                                        "(they have no end-of-text token)")

    def _fingerprint(self):
        prints = [[name, dataset.fingerprint] for name, dataset in self.datasets.items()]
        if len(prints) == 1 and self.config.packing == "stream":
            return prints[0][1]
        shares = [[phase.first, sorted((name, str(share)) for name, share in shares.items())]
                  for phase, shares in zip(self.mixture.phases, self.mixture.shares, strict=True)]
        return hashlib.sha256(json.dumps([prints, shares, self.config.packing]).encode()).hexdigest()

    def description(self):
        """The data, as run.json keeps it."""
        consumed = self.mixture.consumed(self.config.max_iters * self.sequences_per_step)
        sources = {name: {"fingerprint": dataset.fingerprint, "train_tokens": dataset.tokens("train"),
                          "val_tokens": dataset.tokens("val"), "share": float(self.mixture.shares[-1][name]),
                          "planned_tokens": consumed[name] * self.config.model.block_size,
                          "planned_epochs": consumed[name] / self.sources[name].n_sequences}
                   for name, dataset in self.datasets.items()}
        return {"dataset": describe_phases(self.phases), "fingerprint": self.fingerprint, "vocab_size": self.vocab_size,
                "train_tokens": sum(s["train_tokens"] for s in sources.values()),
                "val_tokens": sum(s["val_tokens"] for s in sources.values()),
                "tokens_per_step": self.tokens_per_step, "sequences_per_step": self.sequences_per_step,
                "packing": self.config.packing, "sources": sources}

    def consumed(self, step):
        """{source: tokens of it in the first `step` steps}, padding included."""
        sequences = self.mixture.consumed(step * self.sequences_per_step)
        return {name: n * self.config.model.block_size for name, n in sequences.items()}

    def micro_batches(self, step):
        """This process's micro-batches of step `step`: (x, y), each (batch_size, block_size) int64 on the device."""
        self.step_targets = self.batches.step_targets(step)
        for micro_step in range(self.micro_steps):
            self.runtime.heartbeat()
            yield to_device(self.prefetch.get((step, micro_step)), self.runtime.device)

    def _read(self, key):
        batch = self.batches.micro_batch(*key, self.runtime.dp_rank, self.runtime.dp_size)
        return pinned(batch) if self.runtime.device.type == "cuda" else batch

    def _successor(self, key):
        step, micro_step = key
        return (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)

    def offsets(self, step, micro_step, rank):
        """Where the data of a micro-batch of step `step` on the process of data rank `rank` are, in words."""
        sequence_ids = self.batches.sequence_ids(step, micro_step, rank, self.runtime.dp_size)
        places = [f"{name} {token:,}" for name, token in self.batches.offsets(sequence_ids[:4])]
        return (f"sequences {sequence_ids[0]:,} to {sequence_ids[-1]:,} of the run, from token {', '.join(places)}"
                + (" …" if len(sequence_ids) > 4 else ""))

    def loss(self, model, batch):
        """This micro-batch's share of the step's loss: the sum over its targets / the targets of the step."""
        x, y = batch
        targets = y.numel() if self.config.packing == "stream" else (y != IGNORED).sum()
        return model(x, y, documents=self.documents(x))[1] * (targets / self.step_targets)

    def documents(self, x):
        """(B, T) int64, the number within its window of each token's document, if those are to be kept apart."""
        if not self.config.model.mask_documents:
            return None
        ends = x == self.eot
        return ends.cumsum(dim=1) - ends.long()  # the end-of-text token belongs to the document that it ends

    @torch.no_grad()
    def evaluate(self, model):
        """{val_loss: nats per token, val_bpb: bits per byte of text} over fixed windows of the validation split.

        Of several sources: those of each, as val_loss/<name>, and their means by the shares of the last phase, where
        the run is to arrive. Each is measured as a run on it alone would. No val_bpb where bytes were not counted.
        """
        was_training = model.training
        model.eval()
        losses = {name: self._loss_on(model, dataset) for name, dataset in self.datasets.items()}
        model.train(was_training)
        shares = {name: float(share) for name, share in self.mixture.shares[-1].items()}
        bytes_per_token = {name: dataset.bytes_per_token("val") for name, dataset in self.datasets.items()}
        metrics = loss_metrics(sum(shares[name] * losses[name] for name in losses),
                          None if None in bytes_per_token.values()
                          else sum(shares[name] * bytes_per_token[name] for name in losses))
        if len(losses) > 1:
            for name in losses:
                each = loss_metrics(losses[name], bytes_per_token[name])
                metrics |= {f"{metric}/{name}": value for metric, value in each.items()}
        return metrics

    def _loss_on(self, model, dataset):
        total, count = 0.0, 0
        for batch in val_batches(dataset, self.config.model.block_size, self.config.eval_tokens,
                                 self.config.batch_size, self.runtime.dp_rank, self.runtime.dp_size):
            self.runtime.heartbeat()
            targets = int((batch[1] != IGNORED).sum())
            x, y = to_device(batch, self.runtime.device)
            with self.runtime.autocast():
                loss = model(x, y, documents=self.documents(x))[1].item()
            if targets:  # else a mean over nothing
                total, count = total + loss * targets, count + targets
        total, count = self.runtime.all_reduce_sum(total, count)
        return total / count


def loss_metrics(loss, bytes_per_token):
    """{val_loss, val_bpb} of a loss in nats per token; without val_bpb where the bytes of a token are not known."""
    return {"val_loss": loss} | ({"val_bpb": loss / math.log(2) / bytes_per_token} if bytes_per_token else {})

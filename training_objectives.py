"""What a step learns from: batches, their loss, the validation metrics. The loop in train.py knows no more.

To add an objective: a class with the methods and attributes of `LanguageModeling`.
"""

import math

import torch

from data_loader import TrainBatches, open_dataset, to_device, val_batches, val_windows
from data_prepare import ensure
from errors import ConfigError


class LanguageModeling:
    """Next-token prediction: cross-entropy in nats, every token of a step weighing the same.

    vocab_size: token ids in the data. micro_steps: this process's micro-batches a step. tokens_per_step and
    sequences_per_step count over all processes. fingerprint: of the token files. tokenizer: as meta.json has it.
    """

    def __init__(self, config, machine):
        self.config, self.machine = config, machine
        try:
            if machine.is_main:
                ensure(config.dataset, config.data_dir)
        finally:  # where it fails, the others do not wait for it: they find no dataset themselves
            machine.barrier()
        self.dataset = open_dataset(config.dataset, config.data_dir)
        self.eot = self.dataset.meta["eot"]
        if not config.model.causal:
            raise ConfigError("causal", "False: every token would see the next one, which it is to predict "
                                        "(next-token prediction needs causal=True)")
        if config.model.mask_documents and self.eot is None:
            raise ConfigError("mask_documents", f"the tokens of {config.dataset} do not say where a document ends "
                                                "(its tokenizer has no end-of-text token)")
        self.batches = TrainBatches(self.dataset, config.seed, config.model.block_size, config.batch_size,
                                    config.gradient_accumulation_steps)
        val_windows(self.dataset, config.model.block_size)  # a split too short is told now, not after an hour
        self.vocab_size, self.fingerprint = self.dataset.vocab_size, self.dataset.fingerprint
        self.tokenizer = self.dataset.meta["tokenizer"]
        self.micro_steps = config.gradient_accumulation_steps // machine.world_size
        self.sequences_per_step = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = self.sequences_per_step * config.model.block_size

    def description(self):
        """The data, as run.json keeps it."""
        return {"dataset": self.config.dataset, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size,
                "train_tokens": self.dataset.tokens("train"), "val_tokens": self.dataset.tokens("val"),
                "tokens_per_step": self.tokens_per_step, "sequences_per_step": self.sequences_per_step}

    def micro_batches(self, step):
        """This process's micro-batches of step `step`: (x, y), each (batch_size, block_size) int64 on the device."""
        for micro_step in range(self.micro_steps):
            batch = self.batches.micro_batch(step, micro_step, self.machine.rank, self.machine.world_size)
            yield to_device(batch, self.machine.device)

    def loss(self, model, batch):
        """This micro-batch's share of the step's loss: the sum over its tokens / the tokens of the step."""
        x, y = batch
        return model(x, y, documents=self.documents(x))[1] * (y.numel() / self.tokens_per_step)

    def documents(self, x):
        """(B, T) int64, the number within its window of each token's document, if those are to be kept apart."""
        if not self.config.model.mask_documents:
            return None
        ends = x == self.eot
        return ends.cumsum(dim=1) - ends.long()  # the end-of-text token belongs to the document that it ends

    @torch.no_grad()
    def evaluate(self, model):
        """{val_loss: nats per token, val_bpb: bits per byte of text} over fixed windows of the validation split."""
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        for batch in val_batches(self.dataset, self.config.model.block_size, self.config.eval_tokens,
                                 self.config.batch_size, self.machine.rank, self.machine.world_size):
            x, y = to_device(batch, self.machine.device)
            with self.machine.autocast():
                total += model(x, y, documents=self.documents(x))[1].item() * y.numel()
            count += y.numel()
        model.train(was_training)
        total, count = self.machine.sum(total, count)
        loss = total / count
        return {"val_loss": loss, "val_bpb": loss / math.log(2) / self.dataset.bytes_per_token("val")}

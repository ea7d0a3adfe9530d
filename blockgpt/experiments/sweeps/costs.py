"""What a run needs and costs, computed as --dry_run does: nothing is trained."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from blockgpt.accounting.dry_run import advice, find_target, inspect_data, memory_table
from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import chosen_mode, memory_need
from blockgpt.experiments.sweeps.plan import tokens_per_step
from blockgpt.experiments.sweeps.selection import Cost

UNLIMITED = 2**62  # bytes
VOCABULARIES: dict[str, int] = {}  # {sources of data: token ids}


def run_cost(config: Any, build_model: Callable[[Any], nn.Module], workers: int | None = 1) -> Cost:
    """The `Cost` of a run, without its speed.

    Args:
        config: of the run.
        build_model: builds the model of a model configuration, on the device of the context.
        workers: runs that share the memory of a CPU. None: they run on other computers, of which only dry_run_gpu
            says how much memory they have; without it, memory is no limit.

    Raises:
        UserError: what would stop the run at its start.
    """
    elsewhere = workers is None and config.dry_run_gpu is None
    target = find_target(dataclasses.replace(config, device="cpu") if elsewhere else config)
    config.model.check_trainable_on("cuda" if target.gpu else "cpu")
    config, _ = inspect_data(config)
    account = MemoryAccount(build_model, config.model, target.dtype, target.gpu, config.companion_models())
    model: Any = account.model
    available = UNLIMITED if elsewhere else target.budget if target.gpu else target.budget // (workers or 1)
    need = memory_need(account, *chosen_mode(config), config.batch_size,
                       config.gradient_accumulation_steps > config.data_processes).total
    text = "" if need <= available else advice(account, config, available, memory_table(account, config, available))
    return Cost(sum(account.parameters_by_category().values()),
                flops_per_token(model, account.block_size)["train"], tokens_per_step(config), config.max_iters,
                config.eval_tokens, -(-config.max_iters // config.eval_interval), need, available, text)


def parameter_count(config: Any, build_model: Callable[[Any], nn.Module]) -> int:
    """The parameters of the model of a configuration, with the vocabulary of its data."""
    config = config.for_vocabulary(vocabulary_size(config.dataset if config.dataset_schedule is None else
                                                   config.dataset_schedule, config))
    with torch.device("meta"):
        model: Any = build_model(config.model)
    return int(model.parameter_counts()["total"])


def vocabulary_size(sources: Any, config: Any) -> int:
    """The number of token ids of a run's data; opened once for each set of sources."""
    key = json.dumps([sources, config.data_dir, config.tokenizer], sort_keys=True)
    if key not in VOCABULARIES:
        VOCABULARIES[key] = inspect_data(config)[0].model.vocab_size
    return VOCABULARIES[key]

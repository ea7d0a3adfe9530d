"""Run directories that were never trained, and the comparison of them, for the tests of blockgpt/experiments."""

import json
from dataclasses import asdict

from conftest import ROOT

import compare_architectures as tool
from model_config import get_preset

FIXTURES = ROOT / "tests/fixtures/runs"
VAL_DATA = {"tokens": 65536, "digest": "5eed"}
SIZE = dict(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320)


def evaluation(step, val_loss, **more):
    return {"kind": "eval", "step": step, "tokens": step * 2048, "val_loss": val_loss, "val_bpb": val_loss,
            "val_data": VAL_DATA, **more}


def step(index, **more):
    return {"kind": "step", "step": index, "tokens": index * 2048, "loss": 3.0, "lr": 1e-3, "grad_norm": 0.5,
            "step_time": 0.1, "tokens_per_sec": 20000, "mfu": 0.4, "memory": {"peak": 2**30}, "elapsed": 1.0, **more}


def document(preset="llama", seed=0, config=(), data=(), **sections):
    model = get_preset(preset, **SIZE).resolve()
    config = {**asdict(model), "seed": seed, "learning_rate": 1e-3, "max_iters": 200, "batch_size": 8,
             "gradient_accumulation_steps": 1, "weight_decay": 0.1, "dtype": "float32", **dict(config)}
    return {"schema_version": 1, "run_name": "x", "status": "finished", "status_reason": None,
            "created_at": "2026-11-21T08:00:00Z", "arch_name": model.arch_name(), "config": config,
            "model": asdict(model),
            "parameters": {"total": 124_300_000, "trainable": 124_300_000, "non_embedding": 85_000_000},
            "hardware": {"device": "cpu", "name": "cpu", "world_size": 1, "dtype": "float32"},
            "data": {"dataset": "pycode", "fingerprint": "abc", "tokens_per_step": 2048, "sequences_per_step": 8,
                     **dict(data)}, **sections}


def make_run(path, *records, losses=(2.5, 2.0), run=None, **options):
    """A run directory; by default a finished one with an evaluation every 100 steps. bytes and str are written raw."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(document(**options)) if run is None else run)
    records = records or [step(1), step(100), *(evaluation(100 * i, x) for i, x in enumerate(losses, 1))]
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    (path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return path


def compared(*paths, **options):
    return tool.compare([tool.load_run(path) for path in paths], **options)


def main(capsys, *argv):
    """(stdout, stderr) of the command, which must succeed."""
    tool.main([str(a) for a in argv])
    return capsys.readouterr()


def names(comparison):
    return [run["name"] for run in comparison["runs"]]

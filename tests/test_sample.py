"""sample.py: text from a run's checkpoint or export, the same for the same seed."""

import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_python

import sample
from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.saver import CheckpointSaver
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from blockgpt.errors import CheckpointError, UserError
from blockgpt.training.optimizers import build_optimizer
from model_builder import GPT, build_model
from model_config import get_preset

BLOCK = 16
LETTERS = CharTokenizer("abcde")


@pytest.fixture
def make_run(tmp_path):
    """make_run(tokenizer, {step: model}, best) -> a run directory with their checkpoints; best: step of least loss."""
    def make(tokenizer, models, best=None):
        for step, model in models.items():
            config = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, use_zero1=False)
            description = {"model": model.infer_config().flat(), "tokenizer": tokenizer.to_meta()}
            path = CheckpointSaver(tmp_path / "run").save(
                model, build_optimizer(model, config, torch.device("cpu")),
                {"step": step, "best": best and {"step": best, "val_loss": 1.0}, "description": description})
            checkpoint.export(tmp_path / "run", path, {**description, "step": step})
            for name in ("model.safetensors", "config.json"):  # as if interrupted: nothing exported
                shutil.move(tmp_path / "run" / name, tmp_path / name)
        return tmp_path / "run"

    (tmp_path / "run").mkdir()
    return make


def model(seed=1, vocab_size=64):
    return build_model(get_preset("llama", n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=vocab_size,
                                  init_std=0.5), seed)


@pytest.fixture
def letters(make_run):
    """A run over five letters, whose model has 59 padded rows and gives them the largest logits."""
    m = model()
    with torch.no_grad():
        m.lm_head.weight[LETTERS.vocab_size:] *= 20
    return make_run(LETTERS, {1: m})


@pytest.fixture
def bytes_run(make_run):
    return make_run(ByteTokenizer(), {1: model(vocab_size=320)})


@pytest.fixture
def text(capsys):
    """text(run, **flags) -> the output of sample.py, without its last line feed."""
    def get(run, **flags):
        flags = {"device": "cpu", **flags}
        sample.main([f"--run={run}", *(f"--{k}={v}" for k, v in flags.items())])
        out = capsys.readouterr().out
        assert out.endswith("\n")
        return out[:-1]
    return get


def test_the_same_seed_gives_the_same_text(letters, text):
    flags = {"prompt": "abc", "max_new_tokens": 60, "temperature": 1.5}
    one = text(letters, seed=1, **flags)
    assert one == text(letters, seed=1, **flags) != text(letters, seed=2, **flags)
    both = text(letters, seed=1, num_samples=2, **flags)
    assert both.startswith(one + "\n" + "-" * 80 + "\nabc") and both != one + "\n" + "-" * 80 + "\n" + one


def test_samples_are_generated_in_one_batch_or_in_chunks_with_the_same_text(letters, text, monkeypatch):
    flags, batches = {"prompt": "abc", "max_new_tokens": 12, "temperature": 1.5, "num_samples": 5}, []

    def generate(self, tokens, *args, **keys):
        batches.append(len(tokens))
        return original(self, tokens, *args, **keys)

    original = GPT.generate
    monkeypatch.setattr(GPT, "generate", generate)
    expected = text(letters, **flags)
    assert len(set(expected.split("\n" + "-" * 80 + "\n"))) == 5
    monkeypatch.setattr(sample, "CACHE_BYTES", 2 * (2 * 2 * 16) * 15 * 4)  # of two samples of 15 tokens
    assert text(letters, **flags) == expected
    monkeypatch.setattr(sample, "CACHE_BYTES", 1)
    assert text(letters, **flags, dtype="float32") == expected
    assert batches == [5, 2, 2, 1, 1, 1, 1, 1, 1]


def test_the_dtype_is_that_of_the_weights(letters, text, monkeypatch):
    dtypes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, *args, **keys: dtypes.append(self.lm_head.weight.dtype) or
                        hidden(self, *args, **keys))
    for dtype in ("auto", "bfloat16", "float32"):
        assert len(text(letters, prompt="abc", dtype=dtype, max_new_tokens=1)) == 4
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("n", [0, 1, 5, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("length", [1, BLOCK, 2 * BLOCK + 3], ids=["short", "block_size", "longer"])
def test_it_prints_the_prompt_and_exactly_n_tokens_and_never_a_padded_one(letters, text, length, n):
    prompt = ("edcba" * length)[:length]
    for temperature in (0, 1):  # a padded id has no character and would be missing
        out = text(letters, prompt=prompt, max_new_tokens=n, temperature=temperature)
        assert out.startswith(prompt) and len(out) == length + n


def test_temperature_0_takes_the_likeliest_token_for_every_seed(letters, text):
    flags = {"prompt": "a", "max_new_tokens": 40}
    greedy = text(letters, temperature=0, seed=1, **flags)
    assert greedy == text(letters, temperature=0, seed=2, **flags) == text(letters, top_k=1, seed=3, **flags)
    assert greedy == text(letters, top_p=1e-9, seed=4, **flags) == text(letters, temperature=0.001, seed=5, **flags)


@pytest.mark.parametrize("prompt", ["žluťoučký kůň 🐎", "def main(", "\n", "a\tb  c "])
def test_any_text_is_a_prompt_for_bytes(bytes_run, text, prompt):
    assert text(bytes_run, prompt=prompt, max_new_tokens=9).startswith(prompt)


def test_the_end_of_text_token_ends_the_text(make_run, text):
    chain = model(vocab_size=320)  # it predicts only: after b the end, after the end an x
    with torch.no_grad():
        for p in (chain.token_embedding.weight, chain.lm_head.weight, *(b.attn.o_proj.weight for b in chain.blocks),
                  *(b.ffn.down_proj.weight for b in chain.blocks)):
            p.zero_()
        for i, (before, after) in enumerate([(ord("b"), 256), (256, ord("x")), (ord("x"), ord("x"))]):
            chain.token_embedding.weight[before, i] = chain.lm_head.weight[after, i] = 1
    run = make_run(ByteTokenizer(), {1: chain})
    assert text(run, prompt="ab", max_new_tokens=5, temperature=0) == "ab"
    assert text(run, prompt="x", max_new_tokens=5, temperature=0) == "xxxxxx"


def test_each_text_of_a_batch_ends_at_its_first_end_of_text_token():
    class Words(ByteTokenizer):
        def decode(self, ids):
            return "".join(chr(i) if i < 256 else "<eot>" for i in ids)

    e = 256
    rows = [[97, e, 98, e, e, e], [97, e, 98, 99, 100, 101], [97, e, e, e, e, e]]  # after a prompt of two
    assert [sample.text_of(Words(), row, 2) for row in rows] == ["a<eot>b", "a<eot>bcde", "a<eot>"]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_generation_restores_training_mode_whatever_happens(error, monkeypatch):
    m = model().train()
    m.blocks[0].ffn.eval()  # frozen, such as a module under adaptation
    before = [module.training for module in m.modules()]
    prompt = torch.zeros(1, 3, dtype=torch.long)
    m.generate(prompt, 2)
    assert [module.training for module in m.modules()] == before
    modes = []

    def hidden(*args, **keys):
        modes.append(any(module.training for module in m.modules()))
        raise error

    monkeypatch.setattr(m, "hidden", hidden)
    with pytest.raises(error):
        m.generate(prompt, 2)
    assert modes == [False] and [module.training for module in m.modules()] == before


def test_a_row_that_has_stopped_repeats_the_stop_token_and_the_others_continue():
    m = model(vocab_size=8)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    out = m.generate(torch.zeros(6, 1, dtype=torch.long), 30, temperature=2.0, stop=3, generator=generators).tolist()
    lengths = [row.index(3) if 3 in row else len(row) for row in out]
    assert len(set(lengths)) > 2 and len(out[0]) == min(31, max(lengths) + 1)
    for i, (row, length) in enumerate(zip(out, lengths, strict=True)):
        assert set(row[length:]) <= {3}
        alone = m.generate(torch.zeros(1, 1, dtype=torch.long), 30, temperature=2.0, stop=3,
                           generator=[torch.Generator().manual_seed(i)])
        assert alone[0].tolist() == row[:length + 1]


def test_best_is_the_lowest_loss_and_latest_the_newest(make_run):
    models = {1: model(1), 2: model(2), 3: model(3)}
    run = make_run(LETTERS, models, best=1)
    for which, step in (("best", 1), ("latest", 3)):
        loaded, tokenizer = sample.load_model(run, which, torch.device("cpu"))
        assert torch.equal(loaded.lm_head.weight, models[step].lm_head.weight) and not loaded.training
        assert tokenizer.characters == "abcde"


def test_without_checkpoints_the_exported_weights_are_used(tmp_path, make_run, text, capsys):
    run = make_run(LETTERS, {7: model()})
    flags = {"prompt": "ab", "max_new_tokens": 30}
    before = text(run, **flags)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        text(run, **flags)
    for name in ("model.safetensors", "config.json"):
        shutil.move(tmp_path / name, run / name)
    sample.main([f"--run={run}", "--device=cpu", "--prompt=ab", "--max_new_tokens=30"])
    out, err = capsys.readouterr()
    assert out[:-1] == before and err == "note: no usable checkpoint: these are the weights exported at step 7\n"
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        text(run, **flags)


@pytest.mark.parametrize("flags, message", [
    ({"run": "nowhere"}, "--run: nowhere is not a run directory"),
    ({"prompt": ""}, "--prompt: is empty"),
    ({"prompt": "abz"}, "--prompt: the character 'z' is not among the 5"),
    ({"num_samples": 0}, "--num_samples: 0 is out of range, must be at least 1"),
    ({"max_new_tokens": -1}, "--max_new_tokens: -1 is out of range"),
    ({"temperature": -1}, "--temperature: -1.0 is out of range"),
    ({"temperature": "nan"}, "--temperature: nan is out of range"),
    ({"temperature": 1e-40}, "--temperature: 1e-40 is out of range"),
    ({"top_k": 0}, "--top_k: 0 is out of range"),
    ({"top_p": 0}, "--top_p: 0.0 is out of range"),
    ({"top_p": 1.5}, "--top_p: 1.5 is out of range"),
    ({"seed": -1}, "--seed: -1 is out of range"),
    ({"seed": 2**63}, f"--seed: {2**63} is out of range"),
    ({"device": "gpu"}, "device: 'gpu' is unknown"),
    ({"dtype": "float8"}, "--dtype: invalid choice: 'float8'"),
    ({"dtype": "float16"}, "dtype: 'float16' needs a CUDA device"),
    ({"checkpoint": "first"}, "--checkpoint: invalid choice: 'first'"),
    ({"temprature": 1}, "--temprature"),
], ids=str)
def test_an_invalid_flag_is_named_in_the_error(letters, text, flags, message):
    with pytest.raises(UserError) as error:
        text(**{"run": letters, "prompt": "a", **flags})
    assert message in str(error.value) and error.value.exit_code == 2


def test_exit_codes_and_one_line_on_stderr(tmp_path, letters, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for flags, code in (([f"--run={letters}", "--prompt=z"], 2), ([f"--run={tmp_path / 'empty'}"], 3)):
        monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", *flags])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert exit_.value.code == code and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_a_character_that_the_terminal_cannot_encode_is_replaced(bytes_run):
    process = run_python(ROOT / "sample.py", f"--run={bytes_run}", "--device=cpu", "--prompt=ů", "--max_new_tokens=30",
                      env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and process.stderr == "" and process.stdout.startswith("u")

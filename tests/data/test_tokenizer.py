"""Tokenizers: decoding gives the text back, or encoding refuses it with a one-line error."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from conftest import ROOT, run_python
from hypothesis import example, given
from hypothesis import strategies as st

from blockgpt.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    TiktokenTokenizer,
    describe_tokenizer,
    from_meta,
    load_tokenizer,
    pack_bytes,
    to_ranks,
)
from blockgpt.errors import DataError, UserError, require_package

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # what UTF-8 can hold
AWKWARD = ["", " ", "  a\n\n\tb  ", "Żółw 🐢👩‍👩‍👧 日本語", "\x00\x01\x7f\x1b[0m", "\ufeffx\r\n", "e\u0301 é ﬁ",
           "<|endoftext|></s><s>", "a" * 3000, " " * 3000, "<0x41>", "\u202eabc\u200b"]


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


def hf_json(normalizer=None):
    """The tokenizer.json of a small byte-level BPE."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        t.normalizer = normalizer
    t.train_from_iterator(["def train(model):\n    return the loss"] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return t.to_str()


@pytest.fixture(scope="session", params=["byte", "sentencepiece", "ranks", "hf", "gpt2"])
def tokenizer(request):
    """Each tokenizer that accepts any text."""
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "hf":
        return HFTokenizer(pack_bytes(hf_json().encode()))
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    path = request.getfixturevalue("sentencepiece_model")
    return load_tokenizer(str(path if request.param == "sentencepiece" else path.with_suffix(".tiktoken")))


# Every tokenizer


def check_round_trip(t, text):
    try:
        ids = t.encode(text)
    except DataError as error:
        assert t.name == "sentencepiece" and "▁" in text and "'▁" in str(error) and "\n" not in str(error)
        return
    assert t.decode(ids) == text and t.decode(np.array(ids, np.int64)) == text
    assert all(type(i) is int and 0 <= i < t.vocab_size for i in ids) and t.eot not in ids
    assert t.encode_array(text).tolist() == ids


@given(text=TEXT)
def test_text_round_trips_or_is_refused(tokenizer, text):
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_unusual_text_round_trips(tokenizer, text):
    check_round_trip(tokenizer, text)


@given(text=TEXT)
def test_a_tokenizer_survives_meta_json(tokenizer, text):
    for t in (tokenizer, CharTokenizer(text)):
        restored = from_meta(json.loads(json.dumps(t.to_meta())))
        assert type(restored) is type(t) and (restored.vocab_size, restored.eot) == (t.vocab_size, t.eot)
        if "▁" not in text:
            assert restored.encode(text) == t.encode(text)
        assert restored.to_meta() == t.to_meta()


def test_a_lone_surrogate_is_refused_with_its_position(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(DataError) as raised:
            encode("ab\udcff")
        assert "udcff" in one_line(raised) and "character 2" in one_line(raised)


@given(ids=st.lists(st.integers(0, 70_000)))
def test_decoding_never_fails(tokenizer, ids):
    text = tokenizer.decode(ids)
    assert text == tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i != tokenizer.eot])


# Bytes and characters


@given(TEXT)
def test_chars_round_trip(text):
    t = CharTokenizer(text)
    ids = t.encode(text)
    assert t.decode(ids) == text and all(0 <= i < t.vocab_size for i in ids)
    assert t.vocab_size == len(set(text)) and t.eot is None and t.encode_array(text).tolist() == ids


@given(st.lists(st.integers(-9, 400)))
@example([255])
def test_decoding_drops_ids_without_text(ids):
    t = ByteTokenizer()
    text = bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")
    assert t.decode(ids) == t.decode(np.array(ids, np.int64)) == text
    assert CharTokenizer("ab").decode(ids) == "".join("ab"[i] for i in ids if 0 <= i < 2)


def test_character_ids_follow_code_points():
    assert CharTokenizer("banana\n").encode("\nabn") == [0, 1, 2, 3]


def test_an_unknown_character_is_named():
    with pytest.raises(DataError) as raised:
        CharTokenizer("abc\n").encode("abc€")
    assert "'€'" in one_line(raised)


# Byte pairs


def test_gpt2_has_the_published_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert describe_tokenizer(gpt2.to_meta()) == "gpt2" and gpt2.to_meta() == {"name": "tiktoken", "encoding": "gpt2"}


@pytest.fixture(scope="module")
def model_and_ranks(sentencepiece_model):
    return load_tokenizer(str(sentencepiece_model)), load_tokenizer(str(sentencepiece_model.with_suffix(".tiktoken")))


def check_same_tokens(model, ranks, text):
    """For all characters that the model has seen."""
    known = {c for c in set(text) - {"▁"} if len(model.encode(c)) == 1}
    text = "".join(c for c in text if c in known)
    assert [model.decode([i]) for i in model.encode(text)] == [ranks.decode([i]) for i in ranks.encode(text)]


@pytest.mark.slow
def test_an_exported_bpe_splits_text_as_the_model_does(model_and_ranks, sources):
    model, ranks = model_and_ranks
    for text in sources:
        check_same_tokens(model, ranks, text)
    assert ranks.eot == ranks.vocab_size - 1 and describe_tokenizer(ranks.to_meta()).startswith("tiktoken ")


@given(text=st.text("aelnrst \n():=._0159é·×"))
def test_an_exported_bpe_splits_any_text_as_the_model_does(model_and_ranks, text):
    check_same_tokens(*model_and_ranks, text)


@pytest.mark.slow
def test_only_bpe_can_be_exported(tmp_path, sentencepiece_model):
    from tools.train_tokenizer import main
    main(["--input", f"{sentencepiece_model.parent}/*.txt", "--vocab_size=400", "--model=unigram",
          f"--output={tmp_path}/u"])
    with pytest.raises(UserError, match="only a BPE model"):
        to_ranks(load_tokenizer(f"{tmp_path}/u.model"))


# Hugging Face


def test_text_that_a_normaliser_changes_is_refused():
    t = HFTokenizer(pack_bytes(hf_json(tokenizers.normalizers.Lowercase()).encode()))
    assert t.decode(t.encode("lower")) == "lower"
    with pytest.raises(DataError) as raised:
        t.encode("lower UPPER")
    assert "at character 6, 'UPPER' is decoded as 'upper'" in one_line(raised)


def test_a_token_that_a_tokenizer_json_puts_before_every_text_is_left_out():
    """As LLaMA's does. Documents are cut into pieces, and each would begin with it."""
    plain = tokenizers.Tokenizer.from_str(hf_json())
    t = tokenizers.Tokenizer.from_str(hf_json())
    t.post_processor = tokenizers.processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    assert t.encode("the loss").ids == [1, *plain.encode("the loss").ids]
    assert HFTokenizer(pack_bytes(t.to_str().encode())).encode("the loss") == plain.encode("the loss").ids


def test_truncation_and_padding_of_a_tokenizer_json_are_off():
    """Many files on the hub have both on, for the batches of another program."""
    t = tokenizers.Tokenizer.from_str(hf_json())
    whole = t.encode("def train(model):\n    return the loss").ids
    for switch_on in (lambda: t.enable_truncation(4), lambda: t.enable_padding(length=100)):
        t.no_truncation()
        switch_on()
        text = "def train(model):\n    return the loss"
        assert HFTokenizer(pack_bytes(t.to_str().encode())).encode(text) == whole


@pytest.mark.parametrize("eos_id", [-1, 2])
def test_a_sentencepiece_model_need_not_have_an_end_of_text_token(eos_id):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["the loss of a model"] * 9), model_writer=model,
                                             vocab_size=24, eos_id=eos_id, minloglevel=2, hard_vocab_limit=False)
    t = from_meta({"name": "sentencepiece", "model": pack_bytes(model.getvalue())})
    assert t.eot == (None if eos_id < 0 else eos_id) and t.decode([-1, *t.encode("loss")]) == "loss"


def test_the_end_of_text_token_can_be_named(sentencepiece_model):
    content = pack_bytes(hf_json().encode())
    assert (HFTokenizer(content).eot, HFTokenizer(content, eot="<pad>").eot) == (0, 1)
    with pytest.raises(DataError, match="'<end>' is no special token"):
        HFTokenizer(content, eot="<end>")
    for text in ("<end>", "t"):
        with pytest.raises(DataError, match=f"'{text}' is no special token"):
            load_tokenizer(str(sentencepiece_model), text)


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
PAD = {"__type": "AddedToken", "content": "<pad>"}


@pytest.mark.slow
@pytest.mark.parametrize("files, end, unusable", [
    ({CONFIG: "<pad>"}, 1, None), ({CONFIG: PAD}, 1, None), ({MAP: PAD}, 1, None),  # not the one that is known by name
    ({CONFIG: "</s>"}, 0, CONFIG), ({CONFIG: "the"}, 0, CONFIG), ({CONFIG: {"content": "</s>"}, MAP: PAD}, 0, CONFIG),
    ({CONFIG: None, MAP: "</s>"}, 0, MAP), ({CONFIG: 5}, 0, None)])
def test_a_checkpoints_own_end_of_text_stands_between_documents_and_one_that_its_vocabulary_lacks_is_told(
        tmp_path, files, end, unusable):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(hf_json())
    for name, named in files.items():
        (folder / name).write_text(json.dumps({"eos_token": named}))
    texts = [f"the loss {i}" for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run_python(ROOT / "data/files/prepare.py", "--name=mine", f"--input={tmp_path / 'texts.jsonl'}",
                      "--workers=1", f"--tokenizer={folder}", f"--out_dir={tmp_path / 'out'}", "--val_fraction=0.25")
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    ids = np.concatenate([np.fromfile(path, meta["dtype"]) for path in sorted((tmp_path / "out").glob("*.bin"))])
    assert meta["eot"] == end and ids[-1] == end
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    found = [tokenizer.decode(document) for document in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    assert sorted(found) == sorted(text + tokenizer.decode([end]) for text in texts)
    warnings = [line for line in done.stderr.splitlines() if ".json" in line]
    assert len(warnings) == (unusable is not None)
    if unusable is not None:
        named = files[unusable]["content"] if type(files[unusable]) is dict else files[unusable]
        assert warnings[0].startswith(f"warning: {folder}/{unusable}: eos_token: {named!r} is no special token of the ")
        assert warnings[0].endswith("; documents end with '<|endoftext|>' (--eot=TOKEN names another)")


def test_a_folder_is_read_whole_under_any_of_its_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(hf_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert load_tokenizer("~").eot_text == load_tokenizer(str(tmp_path)).eot_text == "<pad>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"tokenizer .*/tokenizer_config\.json: is not JSON: Expecting value"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), "<pad>").eot == 1  # it is not needed


# Loading


def test_byte_and_the_encodings_of_tiktoken_are_tokenizers_that_a_user_can_name(monkeypatch):
    assert load_tokenizer("byte").to_meta() == ByteTokenizer().to_meta()
    import tiktoken

    small = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks={bytes([b]): b for b in range(256)},
                              special_tokens={"<|endoftext|>": 256})  # without a download
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
    t = load_tokenizer("gpt2")
    assert t.to_meta() == {"name": "tiktoken", "encoding": "gpt2"} and from_meta(t.to_meta()).eot == t.eot == 256


@pytest.mark.parametrize("meta, word", [({"name": "bite"}, "did you mean byte?"), ({}, "None"),
                                        ({"name": "char"}, "char"), ({"name": "byte", "merges": []}, "merges"),
                                        ({"name": "char", "characters": 3}, "characters"),
                                        ({"name": "tiktoken", "encoding": "gpt3"}, "did you mean gpt2?"),
                                        ({"name": "tiktoken", "encoding": []}, "unknown"),
                                        ({"name": "tiktoken", "ranks": pack_bytes(b"YQ== 0")}, "a byte has none"),
                                        ({"name": "sentencepiece", "model": "?"}, "content in the JSON is damaged"),
                                        ({"name": "sentencepiece", "model": pack_bytes(b"no")}, "not a SentencePiece"),
                                        ({"name": "hf", "json": pack_bytes(b"{}")}, "not a tokenizer.json")])
def test_invalid_meta_is_a_one_line_error(meta, word):
    with pytest.raises(DataError) as raised:
        from_meta(meta)
    assert word in one_line(raised)


@pytest.mark.parametrize("name, content, words", [
    ("gpt3", None, "did you mean gpt2?"), ("none.model", None, "none.model: cannot be read: No such file"),
    ("x.model", b"text", "x.model: not a SentencePiece model"), ("x.model", b"", "not a SentencePiece model"),
    ("x.json", b"\xff", "not UTF-8"), ("x.json", b"[]", "not a tokenizer.json"),
    ("x.tiktoken", b"YQ==", "not a .tiktoken file"), ("x.tiktoken", b"? 0", "not a .tiktoken file"),
    ("x.txt", b"", "or a file: *.model, *.json, *.tiktoken"),
])
def test_an_unknown_or_damaged_tokenizer_is_a_one_line_error(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_tokenizer(name)
    assert words in one_line(raised)


def test_an_encoding_that_cannot_be_downloaded_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on that port
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(DataError) as raised:
        TiktokenTokenizer("p50k_base")
    assert "cannot fetch 'p50k_base'" in one_line(raised) and "TIKTOKEN_CACHE_DIR" in one_line(raised)


def test_a_missing_package_is_a_one_line_error():
    with pytest.raises(UserError) as raised:
        require_package("sentencepiece_of_the_future")
    assert "pip install sentencepiece_of_the_future" in one_line(raised)

"""Our ids are those of the tokenizers library, text comes back whole, and what a text says is never a special token."""

import base64
import inspect
import json
import random
import re
import runpy
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiktoken

from data import tokenizer as module
from data.formats import UserError
from data.tokenizer import SPECIAL, Tokenizer, from_hf, save_hf, tiny, train_bpe
from tests.oracle import oracle

CHATML_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
                "<tool_response>", "</tool_response>", "<image>")  # fmt: skip
LLAMA_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
NAMES = {"gpt2": ("<|endoftext|>",), "smollm2": CHATML_NAMES, "qwen2": CHATML_NAMES, "llama3": LLAMA_NAMES}
TEXTS = [
    "", " ", "\n", "a", "Hello world!", "  two  spaces ", "\n\n\n", " \n \n", "\t\ttabs\n\n  and\r\n  lines\r\r\n",
    "a" * 50, "def f(x):\n    if x[0] != 'a':\n        return {**x, \"y\": x**-2}  # why?\n\n\n", "0", "0123456789",
    "12 345 6789", "1,000.50 + 2e-7", "x1y22z333", "½ ² ٣٤٥ Ⅷ 一二三 ๑๒", "don't I'LL WE'VE he'D 's 'ſ o'clock 'S",
    "naïve café Ångström \u212b", "cafe\u0301 e\u0301\u0323 \u1100\u1161\u11a8", "日本語のテキスト。", "مرحبا بالعالم",
    "🙂👩\u200d👩\u200d👧 🇩🇪", "नमस्ते दुनिया", "\u00a0\u2003\u3000 \u200b\u2028\u2029\x85\x1c\x1f\x0b", "\x00\x01\x7f",
    "---...!!!???", "snake_case camelCase", "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "<think>\n\n</think>",
    " <|eot_id|> <|begin_of_text|>", "<|im_start",
]  # fmt: skip


def fuzz(n: int) -> list[str]:
    """Random strings of what is in TEXTS, so that classes of characters meet in every order."""
    generator, pool = random.Random(0), sorted(set("".join(TEXTS)) | {"  ", "\n\n", "'s", "the", "ing"})
    return ["".join(generator.choices(pool, k=generator.randrange(1, 30))) for _ in range(n)]


@cache
def corpus() -> tuple[str, ...]:
    """Words of a few syllables among the texts above: enough for a few hundred merges."""
    generator = random.Random(1)
    syllables = "ba ko ri ne the ing tu sa don't ER 0 12 é 日 ** == (x) \n     \n\n \t".split(" ")
    words = ["".join(generator.choices(syllables, k=generator.randrange(1, 4))) for _ in range(300)]
    return (*(text for text in TEXTS if "<|" not in text), " ".join(generator.choices(words, k=4000)))


def pre_tokenizer(kind: str):
    """The pre-tokenizer of a family, with the regular expression that transformers has for it."""
    library = oracle("tokenizers")
    parts, byte_level = library.pre_tokenizers, library.pre_tokenizers.ByteLevel
    if kind == "gpt2":
        return byte_level(add_prefix_space=False)
    if kind == "smollm2":
        return parts.Sequence([parts.Digits(individual_digits=True), byte_level(add_prefix_space=False)])
    if kind == "qwen2":
        pattern = oracle("transformers.models.qwen2.tokenization_qwen2").PRETOKENIZE_REGEX
    else:
        converter = oracle("transformers.convert_slow_tokenizer").TikTokenConverter
        pattern = inspect.signature(converter.__init__).parameters["pattern"].default
    split = parts.Split(library.Regex(pattern), behavior="isolated")
    return parts.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)])


@cache
def trained(kind: str) -> str:
    """The tokenizer.json of a small tokenizer of the family, trained with the tokenizers library."""
    library = oracle("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer(kind), library.decoders.ByteLevel()
    made.normalizer = library.normalizers.NFC() if kind == "qwen2" else None
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if kind == "smollm2":  # which lacks some bytes, none of them of ASCII
        alphabet = [character for character in alphabet if character.isascii()] + ["Ġ", "Ċ", "ĉ", "č"]
    special = list(NAMES[kind]) if kind in ("gpt2", "smollm2") else []  # first or last in the vocabulary
    trainer = library.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens([library.AddedToken(name, normalized=False) for name in NAMES[kind]])
    if kind == "llama3":
        bos = NAMES[kind][0]
        made.post_processor = library.processors.Sequence([
            library.processors.ByteLevel(trim_offsets=False),
            library.processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]),
        ])  # fmt: skip
    return made.to_str()


def saved(kind: str, folder: Path, chat_template: str | None = None, **names: str) -> Path:
    """A directory that transformers wrote for the tokenizer of a family, without or with some `pad_token="..."`."""
    transformers, library = oracle("transformers"), oracle("tokenizers")
    if kind == "llama3":
        names = {"bos_token": LLAMA_NAMES[0], "eos_token": LLAMA_NAMES[1], **names}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library.Tokenizer.from_str(trained(kind)), **{"eos_token": "<|endoftext|>", **names}
    )
    theirs.chat_template = chat_template
    theirs.save_pretrained(folder)
    return folder


def library_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(folder)
    return [theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]


# Hugging Face


@pytest.mark.parametrize("kind", NAMES)
def test_ids_equal_those_of_the_library(kind, tmp_path):
    ours, texts = from_hf(saved(kind, tmp_path)), TEXTS + fuzz(400)
    for text, ids in zip(texts, library_ids(tmp_path, texts), strict=True):
        assert ours.encode(text) == ids, repr(text)
        if kind != "smollm2" or text.isprintable():  # it lacks control characters
            assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if kind == "qwen2" else text)
    vocab = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert ours.vocab_size == max(vocab.values()) + 1 and ours.special_tokens.items() <= vocab.items()
    assert {len(token) for token in ours.token_bytes.values()} >= {1, 2, 3, 4, 5, 6}


def test_no_digits_together_in_smollm2_and_three_in_llama3(tmp_path):
    smollm2, llama3 = from_hf(saved("smollm2", tmp_path / "s")), from_hf(saved("llama3", tmp_path / "l"))
    pieces = [[t.decode([i]) for i in t.encode("sum 12121212!")] for t in (smollm2, llama3)]
    assert pieces[0][-9:] == [*"12121212", "!"] and max(map(len, pieces[1])) == 3


def test_a_byte_that_the_vocabulary_lacks_is_left_out(tmp_path):
    ours = from_hf(saved("smollm2", tmp_path))
    assert -1 in ours.ids and ours.decode(ours.encode("at \U0010ffff ne")) != "at \U0010ffff ne"
    texts = ["at \U0010ffff ne", "\u07ff", "the\u0c00"]
    assert [ours.encode(text) for text in texts] == library_ids(tmp_path, texts)


def test_the_neighbours_of_a_byte_that_is_left_out_may_merge(tmp_path):
    ours, generator = from_hf(saved("smollm2", tmp_path)), random.Random(4)
    ranges = ((0x20, 0x7F), (0xA0, 0x370), (0x600, 0x700), (0xE00, 0xE80), (0x2000, 0x2070), (0xAC00, 0xAD00),
              (0x1F300, 0x1F700), (0, 0x20))  # fmt: skip
    texts = ["".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(20)) for _ in range(300)]
    texts += ["a  \x1d\x1eb", "a\x1d\x1e\n\nb", "\x02", " \x02 ", "a  1 22\x02"]  # \x1d is white space to Python only
    plain = [[ours.ids[rank] for rank in ours.encoding.encode_ordinary(text)] for text in texts]
    kept = [[i for i in ids if i >= 0] for ids in plain]
    wanted = library_ids(tmp_path, texts)
    assert sum(-1 in ids for ids in plain) > 250 and sum(map(list.__ne__, kept, wanted)) > 5  # so there is a difference
    for text, ids in zip(texts, wanted, strict=True):
        assert ours.encode(text) == ids, repr(text)


@pytest.mark.parametrize("kind", ["tiny", *NAMES])
def test_half_a_surrogate_pair_is_a_replacement_character(kind, tmp_path):
    """JSON can hold one; UTF-8 cannot."""
    ours = tiny() if kind == "tiny" else from_hf(saved(kind, tmp_path))
    for half in ("\ud800", "\udfff"):
        assert ours.encode(f"the {half}\x02b") == ours.encode("the \ufffd\x02b")


def test_merges_may_be_written_in_two_ways(tmp_path):
    ours = from_hf(saved("qwen2", tmp_path))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert isinstance(spec["model"]["merges"][0], list)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    old = from_hf(tmp_path)
    assert [old.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_whole_words_of_the_vocabulary_where_merges_are_ignored(tmp_path):
    path = saved("llama3", tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["zqzq"] = 5000  # no merge makes it
    for ignore in (False, True):
        spec["model"]["ignore_merges"] = ignore
        path.write_text(json.dumps(spec))
        texts = ["zqzq", "zqzq zqzqx", *TEXTS]
        ours = from_hf(tmp_path)
        assert [ours.encode(text) for text in texts] == library_ids(tmp_path, texts)
        assert (ours.encode("zqzq") == [5000]) == ignore


def test_ending_tokens_are_all_that_any_file_names(tmp_path):
    ours = from_hf(saved("smollm2", tmp_path))
    end, turn = ours.special("<|endoftext|>"), ours.special("<|im_end|>")
    assert ours.eos_ids == (end, turn) and ours.pad_id == end and ours.bos_id is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, 7, end]}))
    assert from_hf(tmp_path).eos_ids == (end, turn, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert from_hf(tmp_path).eos_ids == (end, 9, turn)
    turn_first = from_hf(saved("smollm2", tmp_path / "b", eos_token="<|im_end|>", pad_token="<|endoftext|>"))
    assert turn_first.eos_ids == (turn,) and turn_first.pad_id == end


def test_settings_may_hold_whole_tokens(tmp_path):
    path = saved("qwen2", tmp_path, pad_token="<|im_end|>") / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token"] = {"content": "<image>", "lstrip": False}
    path.write_text(json.dumps(settings))
    ours = from_hf(tmp_path)
    assert ours.eos_ids == (ours.special("<image>"), ours.special("<|im_end|>")) and ours.pad_id == ours.eos_ids[1]


def test_bos_is_added_where_the_library_adds_it(tmp_path):
    for kind in ("llama3", "qwen2"):
        ours = from_hf(saved(kind, tmp_path / kind))
        theirs = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path / kind)
        assert theirs("Hello")["input_ids"] == ours.begin("Hello")
        assert ours.add_bos == (kind == "llama3")
    with_bos = from_hf(saved("qwen2", tmp_path / "b", bos_token="<|endoftext|>"))  # has one, does not add it
    assert with_bos.bos_id == with_bos.special("<|endoftext|>") and not with_bos.add_bos


def _set(spec: dict, path: str, value: object) -> None:
    *names, last = path.split(".")
    for name in names:
        spec = spec[int(name) if name.isdigit() else name]
    spec[last] = value


@pytest.mark.parametrize(
    ("kind", "change", "value", "words"),
    [
        ("gpt2", "model.type", "Unigram", "Unigram"),
        ("gpt2", "model.byte_fallback", True, "only byte-level BPE"),
        ("gpt2", "model", {"type": "WordPiece", "vocab": {}}, "WordPiece"),
        ("gpt2", "normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("gpt2", "pre_tokenizer", None, "pre-tokenizer"),
        ("gpt2", "pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        ("gpt2", "pre_tokenizer.add_prefix_space", True, "pre-tokenizer"),
        ("gpt2", "pre_tokenizer.use_regex", False, "pre-tokenizer"),
        ("smollm2", "pre_tokenizer.pretokenizers.0.individual_digits", False, "pre-tokenizer"),
        ("smollm2", "pre_tokenizer.pretokenizers.1.add_prefix_space", True, "pre-tokenizer"),
        ("qwen2", "pre_tokenizer.pretokenizers.0.behavior", "Removed", "pre-tokenizer"),
        ("qwen2", "pre_tokenizer.pretokenizers.0.invert", True, "pre-tokenizer"),
        ("qwen2", "pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "pre-tokenizer"),
        ("qwen2", "pre_tokenizer.pretokenizers.1.use_regex", True, "pre-tokenizer"),
        ("qwen2", "added_tokens.0.lstrip", True, "white space"),
        ("qwen2", "added_tokens.0.rstrip", True, "white space"),
        ("qwen2", "added_tokens.0.content", "    ", "white space"),
        ("gpt2", "model.vocab", {"▁the": 0}, "not one of bytes"),
        ("gpt2", "model.vocab", ["the"], "not one of bytes"),
        ("gpt2", "model.merges", [5], "not one of bytes"),
        ("gpt2", "model.merges", [["t", "▁"]], "not one of bytes"),
        ("gpt2", "model.merges", [["z", "q"]], "b'zq', which the vocabulary lacks"),
    ],
)
def test_what_is_not_supported_is_refused(kind, change, value, words, tmp_path):
    path = saved(kind, tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    _set(spec, change, value)
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError) as error:
        from_hf(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json: not there"):
        from_hf(tmp_path)
    path = saved("gpt2", tmp_path) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="ending token"):
        from_hf(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for content, words in ((b"{", "not JSON"), (b'{"a": "\xff"}', "not JSON"), (b"[]", "no JSON object")):
            saved("gpt2", tmp_path)
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=words) as error:
                from_hf(tmp_path)
            assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)
            (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["tiny", "smollm2", "llama3"])
def test_what_is_saved_gives_the_library_our_ids(kind, tmp_path):
    ours = tiny() if kind == "tiny" else from_hf(saved(kind, tmp_path / "theirs", chat_template="{{ 'ü' }}"))
    (tmp_path / "ours").mkdir()
    save_hf(ours, tmp_path / "ours")
    texts = TEXTS + fuzz(200)
    assert library_ids(tmp_path / "ours", texts) == [ours.encode(text) for text in texts]
    again = from_hf(tmp_path / "ours")
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    for name in ("token_bytes", "special_tokens", "eos_ids", "pad_id", "bos_id", "add_bos", "chat_format", "files"):
        assert getattr(again, name) == getattr(ours, name), name
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (theirs.eos_token_id, theirs.pad_token_id or ours.pad_id) == (ours.eos_ids[0], ours.pad_id)
    for text in TEXTS:
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_a_tokenizer_without_files_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="cannot be saved"):
        save_hf(replace(tiny(), files={}), tmp_path)


# Special tokens and bytes


@pytest.mark.parametrize("kind", ["tiny", "smollm2", "qwen2", "llama3"])
def test_what_a_text_says_is_never_special(kind, tmp_path):
    ours = tiny() if kind == "tiny" else from_hf(saved(kind, tmp_path))
    assert not ours.token_bytes.keys() & {*ours.special_tokens.values()}
    for name in ours.special_tokens:
        ids = ours.encode(f"Write {name} and{name}{name}")
        assert not set(ids) & {*ours.special_tokens.values()}
        assert ours.decode(ids, skip_special=True) == f"Write {name} and{name}{name}"


def test_special_tokens_by_name():
    ours = tiny()
    think, closed = ours.special("<think>"), ours.special("</think>")
    text = "<think>1</think><|im_end|><tool>"
    ids = ours.encode_with(text, ("<think>", "</think>", "<unknown>"))
    assert ids == [think, *ours.encode("1"), closed, *ours.encode("<|im_end|><tool>")]
    assert ours.encode_with(text, ("<unknown>",)) == ours.encode_with(text, ()) == ours.encode(text)
    assert ours.decode(ids) == text and ours.decode(ids, skip_special=True) == "1<|im_end|><tool>"
    with pytest.raises(UserError, match="no special token <unknown>"):
        ours.special("<unknown>")
    assert ours.encode_with("<|im_end|>", ("<|im_end|>",)) == [ours.special("<|im_end|>")]
    longer = replace(ours, special_tokens={"<a": 9, "<a>": 8, "a.": 7})  # of names within names the longest
    assert longer.encode_with("<a>", ("<a", "<a>")) == [8]
    assert longer.encode_with("ab", ("a.",)) == ours.encode("ab")  # a name is no regular expression


def test_every_byte_goes_there_and_back():
    ours = tiny()
    assert [ours.decode([i]) for i in ours.encode("\x00\x7f")] == ["\x00", "\x7f"]
    assert {token for token in ours.token_bytes.values() if len(token) == 1} == {bytes([b]) for b in range(256)}
    for text in TEXTS + fuzz(200):
        assert ours.decode(ours.encode(text)) == text
    by_bytes = {token: i for i, token in ours.token_bytes.items()}
    smile = [by_bytes[bytes([b])] for b in "🙂".encode()]
    assert ours.decode(smile) == "🙂" and ours.decode(smile[:2] + ours.encode("a")) == "\ufffda"
    assert ours.decode([*ours.encode("a"), 10**6, *ours.encode("b")]) == "ab"  # rows of padding have no token


# Our own


def test_digits_are_single_tokens_in_the_tiny_tokenizer():
    digits = b"0123456789"
    for token in tiny().token_bytes.values():
        n = sum(token.count(digit) for digit in digits)
        assert n <= 1 and (not n or token.lstrip(b" ") in {digits[i : i + 1] for i in range(10)}), token
    ids = tiny().encode("2024+31 =x7,007")
    assert sum(any(c.isdigit() for c in tiny().decode([i])) for i in ids) == 10


def test_the_tiny_tokenizer_counts_its_ids_without_a_gap():
    ours = tiny()
    assert ours.vocab_size == module.TINY_SIZE == len(ours.token_bytes) + len(ours.special_tokens)
    assert sorted(ours.token_bytes) + list(ours.special_tokens.values()) == list(range(ours.vocab_size))
    assert tuple(ours.special_tokens) == SPECIAL
    end = ours.special("<|im_end|>")
    assert ours.eos_ids == (end,) and ours.pad_id == end and ours.chat_format == "chatml"
    assert ours.bos_id is None and not ours.add_bos
    gap = Tokenizer(ours.encoding, ours.ids, {0: b"a", 5: b"b"}, {"<x>": 3}, (3,), 3)
    assert gap.vocab_size == 6 and replace(gap, special_tokens={"<x>": 9}).vocab_size == 10


def slow_bpe(texts: list[str], pattern: str, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding as it is told: count all pairs anew, merge the most frequent everywhere."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in re.findall(pattern, text)]
    merges = []
    for _ in range(n_merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return merges


def test_training_counts_as_the_definition_says():
    generator = random.Random(2)
    texts = ["".join(generator.choices("aaab  n\n", k=300)), "banana bandana aaaa aaaaa", "ünü ünün"]
    merges = train_bpe(texts, r" ?\w+|\s+", 60)
    assert merges == slow_bpe(texts, r" ?\w+|\s+", 60)
    with pytest.raises(ValueError, match="the text allows 2 merges only"):
        train_bpe(["abc"], r"\w+", 3)


def test_training_writes_a_tokenizer_that_keeps_digits_apart(tmp_path, monkeypatch, capsys):
    from data import world

    tiny()  # is kept, until training
    monkeypatch.setattr(world, "tokenizer_text", lambda: "add 12 12 12 and 1212 12! you_you\n" * 9 + "\n\nAdd 3.")
    monkeypatch.setattr(module, "TINY", tmp_path / "tiny.tiktoken")
    monkeypatch.setattr(module, "TINY_SIZE", 256 + len(SPECIAL) + 12)
    try:
        module.train_tiny()
        ours = tiny()  # anew from the file
        assert ours.vocab_size == module.TINY_SIZE
        pieces = [ours.decode([i]) for i in ours.encode("add 12 and 1212! you_you")]
        assert pieces == ["add", " 1", "2", " and", " 1", "2", "1", "2", "!", " you", "_", "you"]
        assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'tiny.tiktoken'}: 268 tokens")
        lines = (tmp_path / "tiny.tiktoken").read_text().splitlines()
        assert [base64.b64decode(line.split()[0]) for line in lines[:256]] == [bytes([b]) for b in range(256)]
        assert [int(line.split()[1]) for line in lines] == list(range(268))
    finally:
        tiny.cache_clear()


def test_gpt2_is_that_of_tiktoken(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b" the": 257, b"th": 256}
    made = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    ours = module.gpt2()
    assert ours.encode("oth<|endoftext|>") == made.encode_ordinary("oth<|endoftext|>")
    assert ours.vocab_size == 259 and ours.eos_ids == (258,) and ours.decode([257, 258]) == " the<|endoftext|>"

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="could not be downloaded"):
        module.gpt2()


# The command line


def run(*argv: object) -> None:
    """`python -m data.tokenizer ARGV` in this process."""
    sys.argv = ["tokenizer.py", *map(str, argv)]
    runpy.run_module("data.tokenizer", run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_shows_the_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    run("Sort 3 1.")
    out = capsys.readouterr().out
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.splitlines()[0]) == "Sort 3 1."
    ids = tiny().encode("Sort 3 1.")
    assert out.splitlines()[1] == f"{' '.join(map(str, ids))} ({len(ids)} tokens)"
    run("the", "--model", saved("gpt2", tmp_path))
    assert capsys.readouterr().out.splitlines()[1].startswith(" ".join(map(str, from_hf(tmp_path).encode("the"))))
    with pytest.raises(SystemExit) as exit_:
        run("the", "--model", tmp_path / "no")
    assert exit_.value.code == 2 and capsys.readouterr().err == f"{tmp_path / 'no' / 'tokenizer.json'}: not there\n"
    with pytest.raises(SystemExit) as exit_:
        run("--nope")
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1

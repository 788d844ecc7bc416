"""Byte-level BPE tokenizers: our own, GPT-2's, and those of Hugging Face checkpoints (Llama 3, Qwen, SmolLM2).

tiktoken does the merging. It merges by the rank of the result, Hugging Face by the place of the pair in a list; the two
agree once tokens are ranked in the order of that list, and a table then turns ranks into the checkpoint's ids.

What a text says is never a special token: `encode` reads "<|im_end|>" as ordinary text. The code that writes a
conversation (data/chat.py) asks for special ids by name.

    python -m data.tokenizer "Sort 3 1 2."       the pieces of a text
    python -m data.tokenizer --train             make data/tiny.tiktoken anew from the generated world
"""

import argparse
import base64
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import regex  # which tiktoken needs, too
import tiktoken

from data.formats import UserError

# One digit, letters or signs, each with the space before it; white space.
PATTERN = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>", "</tool>", "<image>",
           *(f"<|spare_{i}|>" for i in range(8)))  # fmt: skip
TINY, TINY_SIZE = Path(__file__).with_name("tiny.tiktoken"), 1024
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back."""

    encoding: tiktoken.Encoding  # its ranks are ours, not the ids of the checkpoint
    ids: list[int]  # rank -> id, -1 for a byte that the vocabulary lacks: left out, as Hugging Face does
    token_bytes: dict[int, bytes]  # id -> what it stands for
    special_tokens: dict[str, int]
    eos_ids: tuple[int, ...]  # each of them ends a completion; the first ends a document
    pad_id: int  # may equal an eos id: nothing may depend on it
    bos_id: int | None = None
    add_bos: bool = False  # whether every text begins with bos_id
    chat_format: str = ""  # one of data/chat.py's FORMATS; "" is unknown
    nfc: bool = False  # texts are brought to Unicode's normal form C
    digits_apart: bool = False  # digits are cut out before the pattern looks at the text
    files: dict[str, str] = field(default_factory=dict)  # of the checkpoint, saved as they came

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(*self.token_bytes, *self.special_tokens.values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which nothing is special."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        pieces = tuple(_cut_digits(text)) if self.digits_apart else (text,)
        ids = [self.ids[rank] for piece in pieces for rank in self.encoding.encode_ordinary(piece)]
        return ids if -1 not in ids else [i for piece in pieces for i in self._encode_known_bytes(piece)]

    def begin(self, text: str) -> list[int]:
        """The ids that a document which starts with `text` starts with."""
        return [*([self.bos_id] if self.add_bos else []), *self.encode(text)]

    def _encode_known_bytes(self, text: str) -> Iterator[int]:
        """The ids of a text with bytes that the vocabulary lacks: they vanish first, and their neighbours may merge."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair, as tiktoken reads it
        for word in regex.finditer(self.encoding._pat_str, text):
            if known := bytes(b for b in word.group().encode() if b in self._known_bytes):  # tiktoken dies of b""
                yield from (self.ids[rank] for rank in self.encoding._encode_single_piece(known))

    @cached_property
    def _known_bytes(self) -> frozenset[int]:
        return frozenset(token[0] for token in self.token_bytes.values() if len(token) == 1)

    def encode_with(self, text: str, names: Collection[str]) -> list[int]:
        """The ids of `text`, in which these names, as far as the vocabulary has them, are special tokens."""
        known = sorted((name for name in names if name in self.special_tokens), key=len, reverse=True)
        if not known:
            return self.encode(text)
        parts = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
        return [i for part in parts for i in ([self.special_tokens[part]] if part in known else self.encode(part))]

    def with_chat_format(self, chat_format: str | None) -> "Tokenizer":
        """The tokenizer for conversations in another format than its own (None: in its own), also once it is saved.

        The chat template among its files would go on with the old one. It gives way: to ours of ChatML, or to none, so
        that transformers asks for one before it renders what the model was not trained on.
        """
        if chat_format in (None, self.chat_format):
            return self
        files = {name: text for name, text in self.files.items() if name != "chat_template.jinja"}
        settings = json.loads(files.get("tokenizer_config.json", "{}")) | {"chat_format": chat_format}
        settings.pop("chat_template", None)
        settings |= {"chat_template": CHATML} if chat_format == "chatml" else {}
        if files:
            files["tokenizer_config.json"] = json.dumps(settings, indent=1, ensure_ascii=False)
        return replace(self, chat_format=chat_format, files=files)

    def special(self, name: str) -> int:
        """The id of a special token; UserError if there is none."""
        if name not in self.special_tokens:
            raise UserError(f"the tokenizer has no special token {name}")
        return self.special_tokens[name]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; what is no UTF-8 becomes the replacement character, an id without a token nothing."""
        names = {i: b"" if skip_special else name.encode() for name, i in self.special_tokens.items()}
        return b"".join(names.get(i, self.token_bytes.get(i, b"")) for i in ids).decode("utf-8", errors="replace")


def _cut_digits(text: str) -> Iterator[str]:
    start = 0
    for i, character in enumerate(text):
        if unicodedata.category(character)[0] == "N":
            yield from filter(None, (text[start:i], character))
            start = i + 1
    yield text[start:]


# ----------------------------------------------------------------------------------------------------------------------
# Our own


@cache
def tiny() -> Tokenizer:
    """The 1024-entry tokenizer of the generated world: 256 bytes, merges, and the special tokens at the end."""
    lines = TINY.read_text().split("\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    end = special["<|im_end|>"]
    return Tokenizer(
        tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}), list(range(len(ranks))),
        {rank: token for token, rank in ranks.items()}, special, (end,), end, chat_format="chatml",
        files=_tiny_files(ranks, special),
    )  # fmt: skip


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, which tiktoken downloads once (1 MB)."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever requests raises without a network
        raise UserError(f"GPT-2's tokenizer could not be downloaded ({type(error).__name__})") from None
    end = encoding.eot_token
    table = {i: encoding.decode_single_token_bytes(i) for i in range(end)}
    return Tokenizer(encoding, list(range(end)), table, {"<|endoftext|>": end}, (end,), end)


def train_bpe(texts: Iterable[str], pattern: str, n_merges: int) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair encoding merges, in order (arXiv 1508.07909): the most frequent, of equals the first.

    `pattern` is one of Python's `re`. Each distinct word is held once, with its count; a merge touches only the words
    that contain the pair.
    """
    counts = Counter(word for text in texts for word in re.findall(pattern, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    weights = list(counts.values())
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    places: dict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += weights[i]
            places[pair].add(i)
    merges = []
    for _ in range(n_merges):
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 1:
            raise ValueError(f"the text allows {len(merges)} merges only")
        merges.append(best)
        for i in places.pop(best):
            old, new = words[i], _merge(words[i], best)
            for pair in zip(old, old[1:], strict=False):
                pairs[pair] -= weights[i]
            for pair in zip(new, new[1:], strict=False):
                pairs[pair] += weights[i]
                places[pair].add(i)
            words[i] = new
        del pairs[best]
    return merges


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        merged.append(b"".join(pair) if both else word[i])
        i += 2 if both else 1
    return merged


def train_tiny() -> None:
    """Make data/tiny.tiktoken from the text of the generated world."""
    from data import world  # which nothing else here needs

    in_python = r" ?\d| ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\s+"  # PATTERN, for the ASCII text of the world
    merges = train_bpe([world.tokenizer_text()], in_python, TINY_SIZE - 256 - len(SPECIAL))
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    if len(set(tokens)) < len(tokens):
        raise ValueError("two merges make the same token")
    TINY.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    tiny.cache_clear()
    words = {*world.PEOPLE, *world.WORDS, *world.SKILLS, *world.TOWNS, *world.JOBS, *world.COLOURS, *world.SHAPES}
    broken = sorted(word for word in words if len(tiny().encode(" " + word)) > 1)
    print(f"wrote {TINY}: {len(tokens)} tokens; of {len(words)} words, more than one: {' '.join(broken) or 'none'}")


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face


@cache
def _characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in vocabularies since GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def _values() -> dict[str, int]:
    """The printable character -> the byte that it stands for."""
    return {character: b for b, character in _characters().items()}


def _to_bytes(token: str) -> bytes:
    return bytes(map(_values().__getitem__, token))


def _to_text(token: bytes) -> str:
    return "".join(_characters()[b] for b in token)


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def from_hf(directory: str | Path) -> Tokenizer:
    """The byte-level BPE tokenizer of a Hugging Face directory; UserError for other kinds."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: not there")
    try:
        files = {name: (directory / name).read_text(encoding="utf-8") for name in FILES if (directory / name).exists()}
        spec = json.loads(files[path.name])
        settings = json.loads(files.get("tokenizer_config.json", "{}"))
        generation = directory / "generation_config.json"
        generation = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    except ValueError as error:  # that of UTF-8, too
        raise UserError(f"{directory}: a tokenizer file is not JSON ({error})") from None
    if not all(isinstance(read, dict) for read in (spec, settings, generation)):
        raise UserError(f"{directory}: a tokenizer file holds no JSON object")
    model, normalizer = spec.get("model") or {}, spec.get("normalizer")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise UserError(f"{path}: a model of type {model.get('type')}; only byte-level BPE is supported")
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(f"{path}: the normalizer {normalizer} is not supported, NFC is")
    pattern, digits_apart = _read_pre_tokenizer(path, spec.get("pre_tokenizer"))

    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    if any(token.get("lstrip") or token.get("rstrip") or not name.strip()
           for name, token in zip(added, spec.get("added_tokens", []), strict=True)):  # fmt: skip
        raise UserError(f"{path}: added tokens that are or swallow white space (lstrip, rstrip) are not supported")
    try:
        vocab = {_to_bytes(token): i for token, i in model["vocab"].items() if token not in added}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        tokens = [bytes([b]) for b in range(256)] + [_to_bytes(a + b) for a, b in pairs]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: its vocabulary is not one of bytes") from None
    if model.get("ignore_merges"):  # whole words of the vocabulary are tokens even where no merge makes them
        tokens += vocab
    ranks: dict[bytes, int] = {}
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    if missing := [token for token in ranks if len(token) > 1 and token not in vocab]:
        raise UserError(f"{path}: a merge makes {missing[0]!r}, which the vocabulary lacks")

    config_names = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    eos = generation.get("eos_token_id") or []
    eos = [*(eos if isinstance(eos, list) else [eos])]
    eos = [added[name] for name in (config_names["eos_token"],) if name in added] + eos
    eos += [added[name] for name in ("<|im_end|>", "<|eot_id|>") if name in added]
    if not eos:
        raise UserError(f"{directory}: neither tokenizer_config.json nor generation_config.json names an ending token")
    template = files.get("chat_template.jinja") or settings.get("chat_template") or ""  # in this order
    if not isinstance(template, str):  # several by name
        template = next((named["template"] for named in template if named["name"] == "default"), "")
    bos_id = added.get(config_names["bos_token"])
    return Tokenizer(
        tiktoken.Encoding(str(directory), pat_str=pattern, mergeable_ranks=ranks, special_tokens={}),
        [vocab.get(token, -1) for token in ranks], {i: token for token, i in vocab.items()}, added,
        tuple(dict.fromkeys(eos)), added.get(config_names["pad_token"], eos[0]), bos_id,
        add_bos=bos_id is not None and _begins_with(spec.get("post_processor"), config_names["bos_token"]),
        chat_format=_chat_format(template, settings.get("chat_format")), nfc=normalizer is not None,
        digits_apart=digits_apart, files=files,
    )  # fmt: skip


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_pre_tokenizer(path: Path, spec: dict | None) -> tuple[str, bool]:
    """(pattern, whether digits are cut out first) of the pre-tokenizers of GPT-2, Llama 3, Qwen and SmolLM2."""
    match [spec] if spec and spec.get("type") != "Sequence" else (spec or {}).get("pretokenizers", []):
        case [{"type": "ByteLevel", "add_prefix_space": False} as byte_level] if byte_level.get("use_regex", True):
            return GPT2_PATTERN, False
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False} as level] if level.get("use_regex", True):  # fmt: skip
            return GPT2_PATTERN, True
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:  # fmt: skip
            return pattern, False
    raise UserError(f"{path}: the pre-tokenizer {json.dumps(spec)[:200]} is not supported; those of GPT-2, Llama 3, "
                    "Qwen and SmolLM2 are")  # fmt: skip


def _begins_with(post_processor: dict | None, bos: str | None) -> bool:
    """Whether every text starts with `bos`, by a TemplateProcessing (Llama 3)."""
    parts = (post_processor or {}).get("processors", [post_processor or {}])
    return any(bos == part["single"][0].get("SpecialToken", {}).get("id") for part in parts if part.get("single"))


def _chat_format(template: str, named: str | None = None) -> str:
    """The format of data/chat.py that is `named`, or that a chat template is by its marks and those it lacks; or "".

    A template like one of them is not enough: what differs would be trained wrongly and nobody would see it.
    """
    marks = {  # format: (all of these, none of those)
        # Llama 3.2 and later say today's date (strftime_now): what is trained on would change with it
        "llama3.1": (("<|start_header_id|>", "Cutting Knowledge Date", "26 Jul 2024"), ("strftime_now",)),
        "llama3": (("<|start_header_id|>", "<|eot_id|>", "| trim"), ("Cutting Knowledge", "system", "tool")),
        "qwen3": (("last_query_index", "<think>\n' +"), ("assistant\n<think>", "<function=", "vision", "endgen")),
        "qwen3-instruct": (("<tool_response>", "messages[0].content +"), ("think", "<function=", "vision")),
        "qwen2.5": (("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",), ("think", "vision")),
        "qwen2.5-base": (("system\nYou are a helpful assistant.<|im_end|>", "<tool_response>"), ("think", "vision")),
        "qwen2": (("system\nYou are a helpful assistant.<|im_end|>",), ("think", "vision", "tool")),
        "smollm2": (("system\nYou are a helpful AI assistant named SmolLM",), ("think", "tool")),
        "chatml": ((), ("system", "tool", "think", "image", "bos_token", "eos_token", "trim", "strip")),
    }
    if named in marks:  # by `with_chat_format`
        return named
    template = template.replace("\\n", "\n")  # some escape it, some have the line break itself
    if "<|im_start|>" not in template and "<|start_header_id|>" not in template:
        return ""
    for name, (all_of, none_of) in marks.items():
        if all(mark in template for mark in all_of) and not any(mark in template for mark in none_of):
            return name
    return ""


def save_hf(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write the tokenizer files of a Hugging Face directory, from which AutoTokenizer gives the same ids."""
    if not tokenizer.files:
        raise UserError("this tokenizer came without Hugging Face files and cannot be saved")
    for name, text in tokenizer.files.items():
        (Path(directory) / name).write_text(text, encoding="utf-8")


def _tiny_files(ranks: dict[bytes, int], special: dict[str, int]) -> dict[str, str]:
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in special.items()]  # fmt: skip
    merges = [[_to_text(a), _to_text(b)] for a, b in (_halves(token, ranks) for token in ranks) if b]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {_to_text(token): rank for token, rank in ranks.items()}, "merges": merges},
    }  # fmt: skip
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "chat_template": CHATML, **names}  # fmt: skip
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(settings, indent=1),
            "special_tokens_map.json": json.dumps(names, indent=1)}  # fmt: skip


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair whose merge makes `token`: what is left when all earlier merges are done; (token, b"") for a byte."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], b"")


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("text", nargs="?", default="Please sort 3 1 2.", help="(default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="make data/tiny.tiktoken anew; all models must follow")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint whose tokenizer is taken")
    args = parser.parse_args(argv)
    if args.train:
        train_tiny()
        return
    tokenizer = from_hf(args.model) if args.model else tiny()
    ids = tokenizer.encode(args.text)
    shades = ("\033[30;47m", "\033[30;46m")
    print("".join(f"{shades[n % 2]}{tokenizer.decode([i])}" for n, i in enumerate(ids)) + "\033[0m")
    print(" ".join(map(str, ids)), f"({len(ids)} tokens)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

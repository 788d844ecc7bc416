"""The JSONL files of the field: one JSON object a line, read into plain dictionaries and never repaired by guessing.

    text         {"text"}                                     pre-training, domain adaptation
    chat         {"messages": [{"role", "content"}, ...]}     SFT; roles system, user, assistant, tool
    completion   {"prompt", "completion"}                     SFT
    preference   {"prompt", "chosen", "rejected"}             reward models, DPO
    label        {"prompt", "completion", "label"}            KTO, critique: label is true or false
    answer       {"prompt", "answer"}                         RL with a checker
    prompt       {"prompt"}                                   RL with another reward
    steps        {"prompt", "completions", "labels"}          process supervision: one label a step
    scores       {"prompt", "completions", "scores"}          ranked answers
    images       {"messages", "images"}                       vision-language: paths of images

Where a prompt or an answer is text, a list of messages may stand in its place. Fields that a schema does not know are
ignored and listed once; whatever else does not fit is refused with file, line, what was found and what was expected.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path


class UserError(Exception):
    """Bad input of the user: the scripts print it as one line and exit with code 2."""


ROLES = ("system", "user", "assistant", "tool")
SCHEMAS = {  # schema: {field: kind}
    "text": {"text": "text"},
    "images": {"messages": "messages", "images": "texts"},
    "chat": {"messages": "messages"},
    "preference": {"prompt": "said", "chosen": "reply", "rejected": "reply"},
    "label": {"prompt": "said", "completion": "reply", "label": "truth"},
    "completion": {"prompt": "said", "completion": "reply"},
    "steps": {"prompt": "said", "completions": "texts", "labels": "truths"},
    "scores": {"prompt": "said", "completions": "texts", "scores": "numbers"},
    "answer": {"prompt": "said", "answer": "text"},
    "prompt": {"prompt": "said"},
}
KINDS = {  # kind: what is expected, in words
    "text": "text that is not empty",
    "said": "text that is not empty, or a list of messages",
    "reply": "text that is not empty, or a list of messages that begins and ends with the assistant's",
    "messages": "a list of messages",
    "texts": "a list of texts that are not empty",
    "truth": "true or false",
    "truths": "a list of true and false",
    "numbers": "a list of numbers",
}


def read_jsonl(path: str | Path, schemas: str | Sequence[str], *, mapping: dict[str, str] | None = None,
               keep: bool = False) -> list[dict]:  # fmt: skip
    """The rows of `path`, each with the fields of the first of `schemas` that its first row fits, or with all (`keep`).

    `mapping` renames fields first: {"question": "prompt"}. Empty lines at the end are allowed, elsewhere refused.
    UserError names the file, the line, what was found and what was expected.
    """
    schemas, mapping = [schemas] if isinstance(schemas, str) else schemas, mapping or {}
    if len(set(mapping.values())) < len(mapping):
        raise UserError(f"--map: two fields cannot both become one; found {_names(mapping.values())}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: a byte that is not UTF-8") from None
    lines = text.rstrip().split("\n")
    if lines == [""]:
        raise UserError(f"{path}: empty; one JSON object a line is expected")
    rows, fields, ignored = [], {}, set()
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        row = _parse(line, where)
        for theirs, ours in mapping.items():
            if theirs not in row:
                raise UserError(f"{where}: --map {theirs}={ours}: no field {theirs!r}; found {_names(row)}")
            if ours in row and ours not in mapping:
                raise UserError(f"{where}: --map {theirs}={ours}: there is a field {ours!r} already")
        row = {mapping.get(name, name): value for name, value in row.items()}
        if not fields:
            schema = next((name for name in schemas if row.keys() >= SCHEMAS[name].keys()), None)
            if schema is None:
                wanted = " or ".join(_names(SCHEMAS[name]) for name in schemas)
                raise UserError(f"{where}: found the fields {_names(row)}, expected {wanted}; --map can rename them")
            fields = SCHEMAS[schema]
        for name, kind in fields.items():
            if name not in row:
                raise UserError(f"{where}: no field {name!r}; found {_names(row)}")
            _check(row[name], kind, f"{where}: {name}")
        lengths = {len(row[name]) for name, kind in fields.items() if kind in ("texts", "truths", "numbers")}
        if len(lengths) > 1:
            raise UserError(f"{where}: the lists {_names(fields)} are of different lengths")
        ignored |= set() if keep else row.keys() - fields.keys()
        said = [message for name in fields if isinstance(row[name], list) for message in row[name]]
        ignored |= {f"{name} of a message" for message in said if isinstance(message, dict) for name in message}
        rows.append(row if keep else {name: row[name] for name in fields})
    if ignored := ignored - {"role of a message", "content of a message"}:
        print(f"{path}: ignored the fields {_names(sorted(ignored))}", file=sys.stderr)
    return rows


def _parse(line: str, where: str) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise UserError(f"{where}: a field occurs twice")
        return dict(pairs)

    def refuse(constant: str):
        raise UserError(f"{where}: {constant} is not JSON")

    try:
        row = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        found = repr(line[:40]) if line.strip() else "an empty line"
        raise UserError(f"{where}: broken JSON ({error}): found {found}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}, expected a JSON object")
    return row


def _check(value: object, kind: str, where: str) -> None:
    """UserError unless `value` is of `kind`, one of KINDS."""
    if kind == "messages" or (kind in ("said", "reply") and isinstance(value, list)):
        _check_messages(value, where, complete=kind != "said")
        if kind == "reply" and value[0]["role"] != "assistant":  # else the prompt would be said twice
            raise UserError(f"{where}: the first message is of role {value[0]['role']!r}, expected 'assistant'")
        return
    of_one = {"texts": str, "truths": bool, "numbers": (int, float)}.get(kind)
    if of_one:
        ok = isinstance(value, list) and value and all(isinstance(x, of_one) for x in value)
        ok = ok and not (kind == "texts" and "" in value)
        ok = ok and not (kind == "numbers" and not all(map(_is_finite, value)))
    elif kind == "truth":
        ok = isinstance(value, bool)
    else:
        ok = isinstance(value, str) and value
    if not ok:
        raise UserError(f"{where}: found {json.dumps(value)[:40]}, expected {KINDS[kind]}")


def _is_finite(value: float) -> bool:
    """Whether it is a number (true is not) that a float can hold: 1e999 is infinite."""
    return not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_messages(messages: object, where: str, complete: bool) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: found {json.dumps(messages)[:40]}, expected {KINDS['messages']}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise UserError(f"{where}[{i}]: found {json.dumps(message)[:40]}, expected role and content")
        if message["role"] not in ROLES:
            raise UserError(f"{where}[{i}]: found the role {message['role']!r}, expected one of {', '.join(ROLES)}")
        _check(message["content"], "text", f"{where}[{i}].content")
        if message["role"] == "system" and i:
            raise UserError(f"{where}[{i}]: the system message must be the first")
    if complete and messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is of role {messages[-1]['role']!r}, expected 'assistant'")


def _names(fields) -> str:
    return ", ".join(repr(name)[1:-1] for name in fields) or "none"  # a name with a line break stays on one line


def to_messages(row: dict, completion: str = "completion") -> list[dict]:
    """The conversation of a row: its messages, or its prompt followed by its `completion` ("chosen", "answer", ...)."""
    if "messages" in row:
        return row["messages"]
    prompt, said = row["prompt"], row[completion]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt + ([{"role": "assistant", "content": said}] if isinstance(said, str) else said)


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, held out): the last 5% by the hash of what they ask, 16 to 512 or some more; none of fewer than 32 rows.

    It depends on nothing but the rows themselves. Rows that ask the same (see `asked`) are on one side together, for
    who has trained on two answers has seen a third. What so many rows ask that twice as many would be held out as
    wanted is trained on. Where fewer than 32 things are asked, or that leaves fewer than 16 rows, only equal rows are
    kept together.
    """
    if len(rows) < 32:
        return rows, []
    wanted = min(512, max(16, len(rows) // 20))
    for by_question in (True, False):
        contents = [json.dumps(asked(row) if by_question else row, sort_keys=True) for row in rows]
        keys = [hashlib.sha256(content.encode()).hexdigest() for content in contents]
        taken, n = set(), 0
        for key, size in sorted(Counter(keys).items(), reverse=True):
            if n < wanted and n + size <= min(2 * wanted, len(rows) - 1):
                taken.add(key)
                n += size
        if n >= 16 and not (by_question and len(set(keys)) < 32):
            train = [row for row, key in zip(rows, keys, strict=True) if key not in taken]
            return train, [row for row, key in zip(rows, keys, strict=True) if key in taken]
    raise UserError(f"the {len(rows)} rows are the same {len(set(keys))} over and over: there is nothing to hold out; "
                    "name what is measured with --eval-data")  # fmt: skip


def asked(row: dict) -> object:
    """What a row asks, whatever its schema: the conversation before the first answer to a user, and its pictures."""
    prompt = row.get("messages", row.get("prompt"))
    if prompt is None:  # a plain text
        return row
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    roles = [message["role"] for message in messages]
    answers = [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
    return [messages[: answers[0] if answers else None], row.get("images")]


def split(paths: Sequence[str], eval_path: str | None, read: Callable[[str], list[dict]], say: Callable[[str], None]
          ) -> tuple[list[list[dict]], list[dict]]:  # fmt: skip
    """(the rows to train on of each of `paths`, the held-out rows): all of `eval_path`, else what hold_out takes.

    It takes from all files together, so that what is held out of one is not trained on in another. Where there is
    nothing to hold out, what is trained on is measured, and `say` is told so.
    """
    parts = [read(path) for path in paths]
    if eval_path:
        return parts, read(eval_path)
    train, held_out = hold_out(sum(parts, []))
    if not held_out:
        say(f"only {len(train)} rows: none are held out, and what is measured are the training rows")
        return parts, train
    kept = set(map(id, train))
    parts_left = [[row for row in part if id(row) in kept] for part in parts]
    if empty := [path for path, before, left in zip(paths, parts, parts_left, strict=True) if before and not left]:
        raise UserError(f"{empty[0]}: all of its rows would be held out: name what is measured with --eval-data")
    return parts_left, held_out


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """["question=prompt"] -> {"question": "prompt"}."""
    mapping = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in mapping:
            raise UserError(f"{pair!r}: expected NAME=VALUE, each name once")
        mapping[name] = value
    return mapping

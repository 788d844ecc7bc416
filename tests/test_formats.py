"""JSONL files are read as they are or refused in one line; what is held out depends on the rows alone."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from data.formats import KINDS, SCHEMAS, UserError, asked, hold_out, parse_map, read_jsonl, split, to_messages

USER, ANSWER = {"role": "user", "content": "Sort 2 1."}, {"role": "assistant", "content": "1 2"}
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "1 2"}
ROWS = {
    "text": {"text": "Once."},
    "images": {"messages": [USER, ANSWER], "images": ["cat.png"]},
    "chat": {"messages": [SYSTEM, USER, ANSWER, USER, TOOL, ANSWER]},
    "preference": {"prompt": "Sort 2 1.", "chosen": "1 2", "rejected": [ANSWER, TOOL, ANSWER]},
    "label": {"prompt": [SYSTEM, USER], "completion": "1 2", "label": False},
    "completion": {"prompt": "Sort 2 1.", "completion": "1 2"},
    "steps": {"prompt": "Sort 2 1.", "completions": ["1", "1 2"], "labels": [True, False]},
    "scores": {"prompt": "Sort 2 1.", "completions": ["1 2", "2"], "scores": [1, -0.5]},
    "answer": {"prompt": [USER], "answer": "1 2"},
    "prompt": {"prompt": [USER]},
}


def write(folder: Path, *lines: object) -> Path:
    """A file of these lines: text and bytes as they are, all else as JSON."""
    path = folder / "rows.jsonl"
    lines = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def refused(path: Path, line: int | None, *words: str, schemas: object = "completion", mapping: object = None) -> None:
    """Reading says in one line which file and line are wrong, and these words."""
    with pytest.raises(UserError) as error:
        read_jsonl(path, schemas, mapping=mapping)
    said = str(error.value)
    assert said.startswith(f"{path}:{line}: " if line else f"{path}: ") and "\n" not in said and len(said) < 400
    assert all(word in said for word in words), said


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_is_read_as_it_is(schema, tmp_path, capsys):
    row = ROWS[schema]
    other = {**row, "prompt": "Another."} if isinstance(row.get("prompt"), str) else row
    assert read_jsonl(write(tmp_path, row, other), schema) == [row, other]
    assert read_jsonl(write(tmp_path, row), ["text", "images", schema]) == [row]
    assert capsys.readouterr() == ("", "")


def test_the_first_row_decides_the_schema_and_the_others_follow(tmp_path):
    both = ["chat", "completion"]
    assert read_jsonl(write(tmp_path, ROWS["chat"]), both) == [ROWS["chat"]]
    assert read_jsonl(write(tmp_path, ROWS["completion"]), both) == [ROWS["completion"]]
    refused(write(tmp_path, ROWS["completion"], ROWS["chat"]), 2, "no field 'prompt'", "found messages", schemas=both)
    refused(write(tmp_path, ROWS["text"]), 1, "found the fields text", "messages or prompt, completion", schemas=both)
    assert read_jsonl(write(tmp_path, ROWS["completion"]), ["preference", "completion"]) == [ROWS["completion"]]
    two = {**ROWS["preference"], "completion": "1 2"}  # fits both: the first that is asked for
    assert read_jsonl(write(tmp_path, two), ["preference", "completion"]) == [ROWS["preference"]]


def test_what_a_text_editor_leaves_is_no_error(tmp_path):
    row = {"text": "Zürich \u2028 and 🙂"}
    raw = json.dumps(row, ensure_ascii=False).encode()  # U+2028 ends a line for str.splitlines, not here
    assert read_jsonl(write(tmp_path, b"\xef\xbb\xbf" + raw + b"\r", raw + b"\r", b"", b"  ", b""), "text") == [row] * 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "a", "completion": "b"', ["broken JSON", "found '{\"prompt"]),
        ("", ["broken JSON", "an empty line"]),
        ("   ", ["broken JSON", "an empty line"]),
        ('{"prompt": "a", "completion": NaN}', ["NaN is not JSON"]),
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', ["twice"]),
        ("[" * 100_000, ["broken JSON"]),
        ('["a", "b"]', ["found list, expected a JSON object"]),
        ('"a"', ["found str"]),
        ("{}", ["no field 'prompt'", "found none"]),
        ('{"prompt": "a", "answer\\nb": "b"}', ["no field 'completion'", "found prompt, answer\\nb"]),
        ('{"prompt": "", "completion": "b"}', ["prompt", 'found ""', KINDS["said"]]),
        ('{"prompt": "a", "completion": ""}', ["completion", 'found ""', KINDS["reply"]]),
        ('{"prompt": "a", "completion": null}', ["completion", "found null"]),
        ('{"prompt": "a", "completion": 17}', ["completion", "found 17"]),
        (b'{"prompt": "a", "completion": "\xff"}', ["not UTF-8"]),
        (b'{"prompt": "a", "completion": "\xed\xa0\x80"}', ["not UTF-8"]),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(bad, words, tmp_path):
    refused(write(tmp_path, *[ROWS["completion"]] * 2, bad, ROWS["completion"]), 3, *words)


@pytest.mark.parametrize(
    ("schema", "change", "words"),
    [
        ("text", {"text": ["a"]}, ["text: found", KINDS["text"]]),
        ("answer", {"answer": 17}, ["answer: found 17", KINDS["text"]]),
        ("prompt", {"prompt": [{"role": "user"}]}, ["prompt[0]"]),
        ("label", {"label": 1}, ["label: found 1, expected true or false"]),
        ("label", {"label": "true"}, ["expected true or false"]),
        ("steps", {"labels": [True, 0]}, [KINDS["truths"]]),
        ("steps", {"labels": [True]}, ["different lengths"]),
        ("steps", {"labels": []}, [KINDS["truths"]]),
        ("steps", {"completions": ["1", ""]}, [KINDS["texts"]]),
        ("steps", {"completions": "1 2"}, [KINDS["texts"]]),
        ("scores", {"scores": [1, True]}, [KINDS["numbers"]]),
        ("scores", {"scores": [1, "2"]}, [KINDS["numbers"]]),
        ("scores", {"scores": [1.0, 2.0, 3.0]}, ["different lengths"]),
        ("images", {"images": []}, [KINDS["texts"]]),
        ("chat", {"messages": []}, ["messages: found [], expected a list of messages"]),
        ("chat", {"messages": "Hello"}, ["expected a list of messages"]),
        ("chat", {"messages": [USER, {"role": "assistant"}]}, ["messages[1]", "expected role and content"]),
        ("chat", {"messages": [USER, "1 2"]}, ["messages[1]", "expected role and content"]),
        ("chat", {"messages": [{**USER, "role": "human"}, ANSWER]}, ["messages[0]", "'human'", "user, assistant"]),
        ("chat", {"messages": [{**USER, "role": ["user"]}, ANSWER]}, ["messages[0]"]),
        ("chat", {"messages": [USER, {**ANSWER, "content": ""}]}, ["messages[1].content"]),
        ("chat", {"messages": [USER, {**ANSWER, "content": [{"type": "text"}]}]}, ["messages[1].content"]),
        ("chat", {"messages": [USER, SYSTEM, ANSWER]}, ["messages[1]", "must be the first"]),
        ("chat", {"messages": [USER, ANSWER, USER]}, ["last message is of role 'user'"]),
        ("preference", {"chosen": [USER, ANSWER]}, ["chosen: the first message is of role 'user'"]),
        ("preference", {"rejected": [ANSWER, USER]}, ["rejected: the last message is of role 'user'"]),
        ("preference", {"rejected": []}, ["rejected: found []"]),
        ("preference", {"prompt": [{"role": "user"}]}, ["prompt[0]"]),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(schema, change, words, tmp_path):
    refused(write(tmp_path, ROWS[schema], {**ROWS[schema], **change}), 2, *words, schemas=schema)


@pytest.mark.parametrize("score", ["1e999", "-1e999", "1" + "0" * 400])
def test_a_number_beyond_floats_is_refused(score, tmp_path):
    bad = f'{{"prompt": "a", "completions": ["b", "c"], "scores": [1, {score}]}}'
    refused(write(tmp_path, bad), 1, "scores: found", KINDS["numbers"], schemas="scores")


def test_a_file_without_rows_is_refused(tmp_path):
    for content in (b"", b"\n\n", b" \r\n", b"\xef\xbb\xbf\n"):
        refused(write(tmp_path, content), None, "empty")
    refused(tmp_path / "no.jsonl", None, "No such file")
    refused(tmp_path, None, "directory")


def test_fields_that_no_schema_knows_are_named_once(tmp_path, capsys):
    rows = [{**ROWS["completion"], "id": 1}, {**ROWS["completion"], "source\n": "x", "id": 2}, ROWS["completion"]]
    assert read_jsonl(write(tmp_path, *rows), "completion") == [ROWS["completion"]] * 3
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'rows.jsonl'}: ignored the fields id, source\\n\n"
    called = {**ANSWER, "tool_calls": []}
    read_jsonl(write(tmp_path, {"messages": [USER, called]}, {"messages": [USER, called]}), "chat")
    assert capsys.readouterr().err.endswith("ignored the fields tool_calls of a message\n")
    read_jsonl(write(tmp_path, {"prompt": [{**USER, "name": "Ann"}], "completion": "1 2"}), "completion")
    assert capsys.readouterr().err.endswith("ignored the fields name of a message\n")


def test_all_fields_may_be_kept(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "tests": 1}\n{"prompt": "b", "answer": 2}\n')
    rows = read_jsonl(path, ("answer", "prompt"), keep=True)
    assert rows == [{"prompt": "a", "tests": 1}, {"prompt": "b", "answer": 2}] and not capsys.readouterr().err


def test_map_renames_fields(tmp_path):
    theirs = {"question": "a", "answer": "b", "prompt_id": 7}
    mapping = {"question": "prompt", "answer": "completion"}
    row = {"prompt": "a", "completion": "b"}
    assert read_jsonl(write(tmp_path, theirs, theirs), "completion", mapping=mapping) == [row] * 2
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read_jsonl(write(tmp_path, row), "completion", mapping=swapped) == [{"prompt": "b", "completion": "a"}]
    path = write(tmp_path, theirs, {"prompt": "a", "completion": "b"})
    refused(path, 2, "no field 'question'", "found prompt, completion", mapping=mapping)
    refused(write(tmp_path, {**theirs, "prompt": "c"}), 1, "a field 'prompt' already", mapping=mapping)
    refused(write(tmp_path, theirs), 1, "--map", mapping={"question": "prompt"})  # still no completion
    with pytest.raises(UserError, match="two fields"):
        read_jsonl(write(tmp_path, theirs), "answer", mapping={"question": "prompt", "answer": "prompt"})


def test_parse_map():
    assert parse_map([]) == {}
    assert parse_map(["question=prompt", "a b=c=d", "x=prompt"]) == {"question": "prompt", "a b": "c=d", "x": "prompt"}
    for pairs in (["prompt"], ["=prompt"], ["question="], ["="], [""], ["a=b", "a=c"]):
        with pytest.raises(UserError, match="expected NAME=VALUE") as error:
            parse_map(pairs)
        assert repr(pairs[-1]) in str(error.value)


def test_rows_become_conversations():
    question = {"role": "user", "content": "Sort 2 1."}
    assert to_messages(ROWS["chat"]) is ROWS["chat"]["messages"]
    assert to_messages(ROWS["completion"]) == [question, ANSWER]
    assert to_messages(ROWS["label"]) == [SYSTEM, USER, ANSWER]
    assert to_messages(ROWS["preference"], "chosen") == [question, ANSWER]
    assert to_messages(ROWS["preference"], "rejected") == [question, ANSWER, TOOL, ANSWER]
    assert to_messages(ROWS["answer"], "answer") == [USER, ANSWER]
    assert ROWS["answer"]["prompt"] == [USER]  # is not written to


# What is held out


def numbered(n: int) -> list[dict]:
    return [{"prompt": f"Question {i}", "completion": str(i)} for i in range(n)]


@pytest.mark.parametrize(("n", "wanted"), [(31, 0), (32, 16), (320, 16), (360, 18), (2000, 100), (12000, 512)])
def test_how_many_are_held_out(n, wanted):
    train, held_out = hold_out(numbered(n))
    assert (len(train), len(held_out)) == (n - wanted, wanted)
    assert sorted(map(str, train + held_out)) == sorted(map(str, numbered(n)))
    places = {row["prompt"]: i for i, row in enumerate(numbered(n))}
    assert all(a < b for a, b in pairwise(places[row["prompt"]] for row in train))  # the order stays


def test_held_out_depends_on_the_rows_alone():
    rows = numbered(200)
    train, held_out = hold_out(rows)
    assert hold_out(list(rows)) == (train, held_out)
    shuffled = [dict(reversed(row.items())) for row in random.Random(0).sample(rows, len(rows))]
    again = hold_out(shuffled)[1]
    assert sorted(map(sorted, map(dict.items, again))) == sorted(map(sorted, map(dict.items, held_out)))
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    turned = [{"messages": [dict(reversed(row["messages"][0].items()))]} for row in chats]
    assert hold_out(turned) == hold_out(chats)  # dictionaries of another order are equal
    kept = [row for row in rows if row not in held_out[:3]]
    assert [row for row in hold_out(kept)[1] if row in train] != []  # three others move up
    assert all(row in hold_out(kept)[1] for row in held_out[3:])
    assert not {str(row) for row in held_out} <= {str(row) for row in rows[-20:]}  # not merely the last of the file


def test_rows_of_files_and_what_is_held_out_of_them():
    files = {"a": numbered(40), "b": numbered(60)[40:], "c": numbered(70)[60:], "d": numbered(100)[70:]}
    said = []
    parts, held_out = split(["a", "b"], None, files.get, said.append)
    assert [sum(parts, []), held_out] == list(hold_out(files["a"] + files["b"])) and said == [] and all(parts)
    assert all(row in files[name] for name, part in zip("ab", parts, strict=True) for row in part)
    assert split(["a", "b"], "c", files.get, said.append) == ([files["a"], files["b"]], files["c"]) and said == []
    assert split(["b", "c"], None, files.get, said.append) == ([files["b"], files["c"]], files["b"] + files["c"])
    assert said == ["only 30 rows: none are held out, and what is measured are the training rows"]


def test_what_one_file_holds_out_no_other_trains_on():
    """A small file whose rows a large one holds, too; the last 5% of both together are held out of both."""
    files = {"small": numbered(40), "large": numbered(2000), "few": numbered(60)[57:]}
    parts, held_out = split(["small", "large"], None, files.get, print)
    assert not [row for part in parts for row in part if row in held_out]
    assert 102 <= len(held_out) <= 103 and sum(map(len, parts)) + len(held_out) == 2040
    taken = next([row] for row in hold_out(files["small"])[1])
    with pytest.raises(UserError, match="taken: all of its rows would be held out"):
        split(["taken", "small"], None, (files | {"taken": taken}).get, print)


def test_what_a_row_asks():
    """The same in every schema; of other pictures, something else."""
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
    same = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": [user], "completion": "c"},
            {"messages": [user, said]}, {"messages": [user, said, user, said]}]  # fmt: skip
    assert all(asked(row) == asked(same[0]) for row in same)
    others = [{"messages": [said, user, said]}, {"messages": [said, user | {"content": "So?"}, said]},
              {"messages": [user, user, said]}, {"text": "Hi"}, {"text": "Ho"}, {"messages": [said]},
              {"messages": [said | {"content": "No."}]}, {"messages": [user, said], "images": ["a.png"]},
              {"messages": [user, said], "images": ["b.png"]}]  # fmt: skip
    assert len({json.dumps(asked(row)) for row in [same[0], *others]}) == 1 + len(others)


def test_answers_to_one_prompt_stay_together():
    """Also where a prompt is a list of messages; of fewer than 32 prompts rows are parted, as none would be left."""
    for as_prompt in (str, lambda i: [{"role": "user", "content": str(i)}]):
        rows = [{"prompt": as_prompt(i % 60), "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(360)]
        train, held_out = hold_out(rows)
        sides = [{str(row["prompt"]) for row in side} for side in (train, held_out)]
        assert not sides[0] & sides[1] and len(sides[1]) == 3 and len(held_out) == 18  # 5% of 360: three prompts
    chats = [{"messages": [{"role": "user", "content": str(i % 60)}, {"role": "assistant", "content": f"a {i}"},
                           {"role": "user", "content": "And?"}, {"role": "assistant", "content": "b"}]}
             for i in range(360)]  # fmt: skip
    train, held_out = hold_out(chats)
    sides = [{row["messages"][0]["content"] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[1]) == 3 and len(held_out) == 18
    held_out = hold_out([row | {"prompt": str(i % 20)} for i, row in enumerate(rows)])[1]
    assert len(held_out) == 18 and len({row["prompt"] for row in held_out}) > 1
    few = [row | {"prompt": "one"} for row in rows]
    assert len(hold_out(few)[1]) == 18 and hold_out(few[:300]) != (few[:300], [])


def test_equal_rows_stay_together():
    rows = numbered(40) * 3
    train, held_out = hold_out(rows)
    assert not [row for row in held_out if row in train]
    assert 16 <= len(held_out) <= 18 and len(train) + len(held_out) == 120
    for rows, n in ((numbered(1) * 32, 1), (numbered(1) * 40, 1), (numbered(2) * 50, 2)):
        with pytest.raises(UserError, match=f"are the same {n} over and over.*--eval-data"):
            hold_out(rows)


def test_what_most_rows_ask_is_trained_on():
    """Of whatever it is asked: among many prompts the common one is not held out with all of its rows."""
    for i in range(5):
        common = [{"prompt": f"Question {i}", "chosen": str(j), "rejected": ""} for j in range(900)]
        train, held_out = hold_out(common + [{"prompt": f"Other {j}"} for j in range(100)])
        assert len(held_out) == 50 and len(train) == 950 and all(row in train for row in common)
    many = [{"prompt": str(i % 32), "completion": str(i)} for i in range(32 * 1025)] + [{"prompt": "x"}]
    assert len(hold_out(many)[1]) == 512  # no prompt but the last is asked seldom enough, and that has one row
    pair = numbered(38) + [row for row in numbered(40)[38:] for _ in range(17)]  # 72 rows: 16 wanted, at most 32
    assert 16 <= len(hold_out(pair)[1]) <= 32

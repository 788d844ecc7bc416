"""The world is what it says it is: right answers, true facts, a known entropy, and no test problem in training text.

Nothing here trusts the generator: sentences and questions are taken apart by patterns written in this file and answered
by other means. No test but the frozen one depends on the shares in which the parts of the world are mixed.

    python -m tests.test_world        prints the hashes of the world as it is now, to be pasted below
"""

import functools
import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from data import manners, world
from data.formats import read_jsonl
from data.tokenizer import TINY

FROZEN = {
    "tokenizer": "53cda2576bc87e264f804e839fee3296",
    "base": "a544e79c1c364aff97077727a0ea87a8",
    "sft": "07232546ca39d72e0a1cc823e5e1b461",
    "test": "cce380f1cb06226d9eab2fd1a2add0c5",
    "unseen": "7040c991d441833b3c9660ddb9e1414f",
    "preferences": "21ca05e8079ccb9c0f7b73230e1a0942",
}  # fmt: skip

ENTITIES, STRANGERS = [*world.PEOPLE, *world.TOWNS], [*world.STRANGERS, *world.FAR_TOWNS]

# Taking sentences apart. A row of words or digits is X, one number N, two numbers A and B, the answer Y.

TASKS = {
    "sort": "sort X", "reverse": "reverse X", "repeat": "repeat X", "first": "give the first of X",
    "last": "give the last of X", "count": "count X", "larger": "pick the larger of A and B",
    "smaller": "pick the smaller of A and B", "add": "add A and B", "subtract": "take A minus B",
    "next": "say the number after N",
}  # fmt: skip
STATEMENTS = {
    "sort": ("From small to large, X becomes Y.", "We sort X and get Y."),
    "reverse": ("Read from the end, X is Y.", "We reverse X and get Y."),
    "repeat": ("They said X and we said Y.", "We repeat X and get Y."),
    "first": ("The first of X is Y.", "In the row X the first word is Y."),
    "last": ("The last of X is Y.", "In the row X the last word is Y."),
    "count": ("The length of X is Y.", "We count X and find Y."),
    "larger": ("The larger of A and B is Y.", "Of the numbers A and B the larger is Y."),
    "smaller": ("The smaller of A and B is Y.", "Of the numbers A and B the smaller is Y."),
    "add": ("A + B = Y.", "We add A and B and get Y."),
    "subtract": ("A - B = Y.", "We take A minus B and get Y."),
    "next": ("The number after N is Y.", "After N comes Y."),
}
BLANKS = {
    "X": r"(?P<x>[a-z]+(?: [a-z]+)+|\d(?: \d)+)", "N": r"(?P<x>\d+)", "A": r"(?P<a>\d+)", "B": r"(?P<b>\d+)",
    "Y": "(?P<answer>[a-z]+(?: [a-z]+)*|[0-9]+(?: [0-9]+)*)",
}  # fmt: skip
REQUEST = (
    r"I am (\w+)\. Tell me about (\w+)\.|My name is (\w+)\. Who is (\w+)\?"
    r"|(\w+) here\. What do you know about (\w+)\?|This is (\w+)\. Please write to me about (\w+)\."
)

POLITE = re.compile(
    r"(Hello|Good day|Hi) \w+!|Thank you for asking\.|That is a good question\.|I am glad you asked\.|Have a nice day!"
    r"|I hope this helps\.|All the best to you!|What a silly question\.|Why should I tell you\?|Go away now\."
    r"|Do not bother me again\."
)


def pattern(form: str) -> re.Pattern:
    return re.compile(re.sub(r"\b[XNABY]\b", lambda m: BLANKS[m[0]], re.escape(form)))


def asked(forms: tuple[str, ...], blanks: dict[str, str]) -> list[re.Pattern]:
    """Patterns of the templates of world.py."""
    parts = [re.split(r"\{(\w+)\}", form) for form in forms]  # text, name, text, name, ..., text
    return [re.compile("".join(blanks[x] if i % 2 else re.escape(x) for i, x in enumerate(part))) for part in parts]


TASK_PATTERNS = {skill: pattern(form) for skill, form in TASKS.items()}
STATEMENT_PATTERNS = [(skill, i, pattern(form)) for skill, forms in STATEMENTS.items() for i, form in enumerate(forms)]
TEMPLATE_PATTERNS = asked(world.TEMPLATES, {"task": "(?P<task>.+)"})
SHEET_PATTERNS = asked(world.WORKSHEETS, {"task": "(?P<task>.+)", "answer": BLANKS["Y"]})
QUESTION_PATTERNS = asked(world.FACT_QUESTIONS, {"a": r"(?P<a>\w+)", "N": r"(?P<N>\w+)"})
KINDS = {"home": world.TOWNS, "job": world.JOBS, "pet": world.PETS, "food": world.FOODS, "river": world.RIVERS,
         "product": world.GOODS}  # fmt: skip


def read_statement(sentence: str) -> tuple[str, int, dict, str] | None:
    """'After 9 comes 10.' -> ('next', 1, {'x': '9'}, '10')"""
    found = [(skill, i, m.groupdict()) for skill, i, p in STATEMENT_PATTERNS if (m := p.fullmatch(sentence))]
    assert len(found) <= 1, f"it can be read in two ways: {sentence}"
    return next(((skill, i, blanks, blanks.pop("answer")) for skill, i, blanks in found), None)


def read_task(task: str) -> tuple[str, dict] | None:
    """'sort 2 1' -> ('sort', {'x': '2 1'})"""
    found = [(skill, m.groupdict()) for skill, p in TASK_PATTERNS.items() if (m := p.fullmatch(task))]
    assert len(found) <= 1, f"it can be read in two ways: {task}"
    return found[0] if found else None


def read_fact(sentence: str) -> tuple[str, str, str] | None:
    """'She feeds a dog every day.' -> ('She', 'pet', 'dog'): whoever is named, and the one value among the words."""
    words = set(re.findall(r"\w+", sentence))
    who = words & {*world.PEOPLE, *world.STRANGERS} or words & {"She", "He"} or words & {*world.TOWNS, *world.FAR_TOWNS}
    told = [(kind, value) for kind, values in KINDS.items() for value in words & set(values) - who]
    if len(who) != 1 or len(told) != 1:
        return None
    (attribute, value), form = told[0], re.sub(rf"\b({'|'.join(who)}|She|He)\b", "{N}", sentence)
    forms = [form.replace("{n}", "{N}").replace("{x}", value) for form in world.FACT_PROSE[attribute]]
    assert form in forms, f"no way to say the {attribute}: {sentence}"
    pronoun = words & {"She", "He"}
    return (pronoun or who).pop(), attribute, value


def the_fact(name: str, attribute: str, value: str) -> str:
    """How questions are answered."""
    article = {"pet": "a ", "river": "the "}.get(attribute, "")
    return f"The {attribute} of {name} is {article}{value}."


def read_sentences(text: str) -> list[str]:
    sentences = re.findall(r"[^.?!]+[.?!]", text)
    assert "".join(sentences) == text, text
    return [sentence.strip() for sentence in sentences]


def read_sum(text: str) -> list[int]:
    return [int(number) for number in text.split(" + ")]


def read_worksheet(document: str, sheet: re.Pattern) -> list[tuple]:
    """The tasks and answers of a worksheet of this form, [] if it is of another."""
    lines, height = document.split("\n"), sheet.pattern.count("\n") + 1
    found = [sheet.fullmatch("\n".join(lines[i : i + height])) for i in range(0, len(lines), height)]
    tasks = [m and read_task(m["task"]) for m in found]
    return [("task", *task, m["answer"]) for m, task in zip(found, tasks, strict=True)] if all(tasks) else []


def read(document: str) -> list[tuple]:
    """All that a base document says, as (kind, ...); nothing may be left over."""
    for sheet in SHEET_PATTERNS:
        if tasks := read_worksheet(document, sheet):
            return tasks
    if document.startswith("Weather: "):
        return [("weather", document.split()[1:])]
    if m := re.fullmatch(r"(.+)\n\1\n\1|Sing: (.+), \2, \2\.", document):
        return [("song", (m[1] or m[2]).split())]
    if m := re.fullmatch(r"The sum of ([\d +]+?)(?: step by step: (.+) So it)? is (\d+)\.", document):
        return [("sum", read_sum(m[1]), m[2] or "", m[3])]
    if (m := re.fullmatch(r"(.*\.) (.*\?)(?:\n(.*)| (.*)\.)", document)) and see(m[1]):
        return [("scene", m[1], m[2], m[3] or m[4], see(m[1]))]
    text, *lines = document.split("\n")  # an answer or a passage; then questions, each with its answer on the next line
    found, asked = [], list(zip(lines[::2], lines[1::2], strict=True))
    if text.startswith("Answer: "):
        text = text.removeprefix("Answer: ")
        found, asked = [("judged", text, question, verdict) for question, verdict in asked], []
    if m := re.match(REQUEST, text):
        found.append(("request", *filter(None, m.groups())))
        text = text[m.end() :]
    for sentence in read_sentences(text):
        if statement := read_statement(sentence):
            found.append(("statement", *statement))
        elif fact := read_fact(sentence):
            found.append(("fact", *fact))
        else:
            assert POLITE.fullmatch(sentence), f"what is {sentence!r} in {document!r}?"
    for question, answer in asked:
        name, attribute, value = read_fact(answer)
        assert (question, answer) == (f"What is the {attribute} of {name}?", the_fact(name, attribute, value))
        found.append(("fact", name, attribute, value))
    return found


NOUN = (
    r"(?P<n{0}>one|two|three|four) (?:(?P<z{0}>small|large) )?(?P<c{0}>[a-z]+) "
    r"(?P<s{0}>circle|square|triangle|star)(?P<p{0}>s?)"
)
PICTURE = re.compile(rf"(?:There is|The picture shows|We see) {NOUN.format(1)} and {NOUN.format(2)}\.")
PLACE = re.compile(r"The ([a-z]+) ([a-z]+) is (left of|right of|above|below) the ([a-z]+) ([a-z]+)\.")


def see(caption: str) -> list[tuple] | None:
    """The objects of a picture as (how many, size, colour, shape, where it is seen from the other)."""
    if m := PICTURE.fullmatch(caption):
        for i in "12":
            assert (m["n" + i] != "one") == (m["p" + i] == "s"), f"number and ending differ: {caption}"
        return [(m["n" + i], m["z" + i], m["c" + i], m["s" + i], None) for i in "12"]
    if m := PLACE.fullmatch(caption):
        back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[m[3]]
        return [("one", None, m[1], m[2], f"{m[3]} the {m[5]}"), ("one", None, m[4], m[5], f"{back} the {m[2]}")]
    return None


def look(objects: list[tuple], question: str) -> str:
    """The answer to a question about a picture, which must be the only one."""
    if m := re.fullmatch(r"Is there a ([a-z]+) ([a-z]+)\?", question):
        return "yes" if any((colour, shape) == m.groups() for _, _, colour, shape, _ in objects) else "no"
    wanted, place = {"colour": 2, "shape": 3, "size": 1, "How many": 0, "Where": 4}, re.split(r"\W+", question)
    kind = next(name for name in wanted if name in question)
    about = {word.removesuffix("s") if kind == "How many" else word for word in place}
    answers = [thing[wanted[kind]] for thing in objects if thing[3 if kind != "shape" else 2] in about]
    assert len(answers) == 1, f"{question} has the answers {answers}"
    return answers[0]


# Answering by other means


def bubble_sort(row: str) -> str:
    row = row.split()
    for end in range(len(row), 1, -1):
        for i in range(end - 1):
            if int(row[i]) > int(row[i + 1]):
                row[i], row[i + 1] = row[i + 1], row[i]
    return " ".join(row)


def count_on(start: str, steps: int) -> str:
    """Digit by digit, as a mileage counter turns."""
    digits, way = [int(d) for d in start], 1 if steps > 0 else -1
    for _ in range(abs(steps)):
        place = len(digits) - 1
        while place >= 0 and digits[place] == (9 if way > 0 else 0):
            digits[place] = 0 if way > 0 else 9
            place -= 1
        if place < 0:
            digits.insert(0, 1)
        else:
            digits[place] += way
    return "".join(map(str, digits)).lstrip("0") or "0"


def backwards(row: str) -> str:
    word, back = "", ""
    for letter in row + " ":
        word, back = (word + letter, back) if letter != " " else ("", f"{word} {back}")
    return back.strip()


def is_larger(a: str, b: str) -> bool:
    return (len(a), a) > (len(b), b)


BRUTE_FORCE = {
    "sort": lambda p: bubble_sort(p["x"]),
    "reverse": lambda p: backwards(p["x"]),
    "repeat": lambda p: p["x"],
    "first": lambda p: p["x"][: p["x"].index(" ")],
    "last": lambda p: p["x"][p["x"].rindex(" ") + 1 :],
    "count": lambda p: "0123456789"[p["x"].count(" ") + 1],
    "larger": lambda p: p["a"] if is_larger(p["a"], p["b"]) else p["b"],
    "smaller": lambda p: p["b"] if is_larger(p["a"], p["b"]) else p["a"],
    "add": lambda p: count_on(p["a"], int(p["b"])),
    "subtract": lambda p: count_on(p["a"], -int(p["b"])),
    "next": lambda p: count_on(p["x"], 1),
}


def split_of_task(skill: str, problem: dict) -> str:
    """The split of a problem, by the task put together from TASKS, of two numbers the smaller first."""
    words = {"X": "x", "N": "x", "A": "a", "B": "b"}
    if "a" in problem and is_larger(problem["a"], problem["b"]):
        words |= {"A": "b", "B": "a"}
    return world.split_of(re.sub(r"\b[XNAB]\b", lambda m: problem[words[m[0]]], TASKS[skill]))


def split_of_sum(numbers: list[int]) -> str:
    return world.split_of("sum " + " ".join(map(str, numbers)))


def check_working(numbers: list[int], steps: str) -> list[tuple[str, dict]]:
    """The additions of a working, which must lead from number to number to the sum."""
    found = [read_statement(sentence) for sentence in read_sentences(steps)]
    totals = [str(numbers[0]), *itertools.accumulate((answer for *_, answer in found), lambda _, answer: answer)]
    wanted = [("add", {"a": total, "b": str(b)}) for total, b in zip(totals, numbers[1:], strict=False)]
    assert [(skill, problem) for skill, _, problem, _ in found] == wanted, (numbers, steps)
    assert all(answer == BRUTE_FORCE["add"](problem) for _, _, problem, answer in found), steps
    assert int(found[-1][3]) == sum(numbers), steps
    return wanted


# What is generated, once for all tests


def even(n: int, seed: int = 0) -> list[str]:
    """Base documents, as many of each part as of any other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "BASE_MIX", {part: (1, make) for part, (_, make) in world.BASE_MIX.items()})
        return list(world.base_documents(n, seed))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return even(5000)


@pytest.fixture(scope="module")
def base(texts) -> list[list[tuple]]:
    return [read(text) for text in texts]


def said(base, *kinds) -> list[tuple]:
    return [thing[1:] for document in base for thing in document if thing[0] in kinds]


@pytest.fixture(scope="module")
def solved(base) -> list[tuple]:
    """(skill, problem, answer) of every statement and every worksheet of base text."""
    return [(skill, problem, answer) for skill, _, problem, answer in said(base, "statement")] + said(base, "task")


def read_question(question: str) -> tuple:
    """(kind, what it asks): a question of SFT or its test taken apart."""
    for i, template in enumerate(TEMPLATE_PATTERNS):
        if (m := template.fullmatch(question)) and (task := read_task(m["task"])):
            return "skill", (task[0], i), task[1]
    for i, template in enumerate(QUESTION_PATTERNS):
        if m := template.fullmatch(question):
            return "facts", (m["a"], i), m["N"]
    if m := re.fullmatch(r"What is (\d+) \* (\d+)\?", question):
        return "calculator", m[1], m[2]
    if m := re.fullmatch(r"What is ([\d +]+)\?( Show your steps\.)?", question):
        return "steps" if m[2] else "sums", read_sum(m[1])
    if m := re.fullmatch(REQUEST, question):
        return "manners", *filter(None, m.groups())
    if m := re.fullmatch(r"Answer: (.+[.!?]) ((?:Is|Does) it [a-z ]+\?)", question):
        return "judge", m[1], m[2]
    if m := re.fullmatch(r"(.*\.) What is the (\w+) of (\w+)\?", question):
        return "reading", [read_fact(sentence) for sentence in read_sentences(m[1])], m[2], m[3]
    if m := re.fullmatch(r"(.*\.) (.*\?)", question):
        return "scenes", m[1], m[2], see(m[1])
    raise AssertionError(f"what is {question!r}?")


def exchanges(row: dict) -> list[tuple[str, list[dict]]]:
    """[(question, the messages up to the next question)]"""
    found = []
    for message in row["messages"]:
        if message["role"] == "user":
            found.append((message["content"], []))
        else:
            found[-1][1].append(message)
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """SFT rows, as many of each part as of any other."""
    return list(world.sft_rows(6000, mix=dict.fromkeys(world.SFT_MIX, 1)))


@pytest.fixture(scope="module")
def train(rows) -> dict[str, list[tuple]]:
    """kind: [(*what is asked, messages of the answer)] of SFT rows."""
    return by_kind(rows)


@pytest.fixture(scope="module")
def exam() -> dict[str, list[tuple]]:
    """The same of test rows."""
    rows = world.sft_test(60) + world.sft_test(60, unseen=True)
    for part in ("sums", "calculator", "manners", "judge", "reading", "scenes", "steps"):
        rows += [world.exchange(part, world.rng_for("more", i), "test") for i in range(100)]
    return by_kind(rows)


def by_kind(rows) -> dict[str, list[tuple]]:
    found = defaultdict(list)
    for question, answers in (exchange for row in rows for exchange in exchanges(row)):
        kind, *what = read_question(question)
        found[kind].append((*what, answers))
    return found


def is_about(share: float, hits: int, n: int) -> bool:
    """Whether `hits` of `n` are as near to `share` as chance lets them be in all but one run of 15 thousand."""
    return abs(hits - share * n) < 4 * math.sqrt(share * (1 - share) * n)


# Randomness and the split


def test_a_generator_depends_on_its_key_alone():
    keys = [("a",), ("b",), ("a", 1, 23), ("a", 12, 3), ("a", 1), ("a", -1), ("a", 1, True), ("a", 1, False)]
    draws = [world.rng_for(*key).random() for key in keys]
    assert len(set(draws)) == len(keys)
    random.seed(7)
    state = random.getstate()
    assert [world.rng_for(*key).random() for key in keys] == draws
    assert random.getstate() == state


MAKERS = {
    "base": world.base_documents,
    "sft": world.sft_rows,
    "test": lambda n, seed=0: world.sft_test(n, seed)[:n],
    "unseen": lambda n, seed=0: world.sft_test(n, seed, unseen=True)[:n],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_made_depends_on_the_seed_and_the_place_alone(make):
    state, many = random.getstate(), list(make(24, 3))
    assert list(make(24, seed=3)) == many and random.getstate() == state
    assert list(make(9, 3)) == many[:9], "how many are asked for changes none of them"
    together = list(zip(make(24, 3), make(24, 4), strict=True))  # two at a time do not disturb each other
    assert [a for a, _ in together] == many and [b for _, b in together] == list(make(24, 4))
    assert list(make(9)) == list(make(9, 0)), "the seed is 0 unless another is asked for"
    for other in (4, 30, -3):
        assert sum(a == b for a, b in zip(many, make(24, other), strict=True)) < 4
    assert len({str(item) for item in many}) > 20, "and the places differ"


def test_no_two_items_draw_from_one_generator(monkeypatch):
    keys = []

    def spy(*key):
        keys.append("/".join(map(str, key)))
        return random.Random(keys[-1])

    monkeypatch.setattr(world, "rng_for", spy)
    parts = len(world.TEST_PARTS) + len(world.SKILLS) + 1  # of the test, and of its unseen pairs
    for seed in (0, 1):
        assert len([*world.base_documents(5, seed), *world.sft_rows(5, seed)]) == 10
        assert len(world.sft_test(2, seed) + world.sft_test(2, seed, unseen=True)) == 2 * parts
    assert len(set(keys)) == len(keys) == 2 * (10 + 2 * parts)


def test_one_problem_in_eight_is_kept_for_the_test_on_every_machine():
    kept = [i for i in range(8000) if world.split_of(f"problem {i}") == "test"]
    assert is_about(1 / 8, len(kept), 8000)
    first = [i for i in range(46) if world.split_of(f"say the number after {i}") == "test"]
    assert first == [0, 11, 17, 25, 26, 39, 41, 45]
    assert {world.split_of(f"problem {i}") for i in range(50)} == {"train", "test"}


def test_problems_are_drawn_from_the_split_that_is_asked_for():
    for skill in (*world.SKILLS.values(), world.HELD_BACK):
        for split in ("train", "test"):
            rng = random.Random(split)
            problems = [world.draw_problem(skill, rng, split) for _ in range(60)]
            assert {world.split_of_problem(skill, problem) for problem in problems} == {split}
            assert len({str(problem) for problem in problems}) > 30


# Train and test


def test_base_text_solves_train_problems_only(solved):
    assert {split_of_task(skill, problem) for skill, problem, _ in solved} == {"train"}
    for skill in TASKS:
        problems = {str(problem) for name, problem, _ in solved if name == skill}
        assert len(problems) > 50, f"{skill}: too few for the line above to mean something"


def test_base_text_never_takes_the_test_of_another_skill(base):
    """Sums, reading, scenes and requests of base text are of the train split, each by its own canonical text."""
    found = {
        "sums": [split_of_sum(numbers) for numbers, _, _ in said(base, "sum")],
        "scenes": [split_of_scene(question, objects) for _, question, _, objects in said(base, "scene")],
        "letters": [world.split_of(f"{asker} asks about {name}") for asker, name in said(base, "request")],
        "judged": [world.split_of(f"Answer: {answer} {question}") for answer, question, _ in said(base, "judged")],
        "passages": [split_of_passage(passage) for document in base if (passage := strangers(document))],
    }
    for kind, kept in found.items():
        assert len(kept) > 150 and set(kept) == {"train"}, kind


def strangers(document: list[tuple]) -> list[tuple]:
    """The facts of a passage and of what is said again, of a document of the part 'reading'."""
    return [thing[1:] for thing in document if thing[0] == "fact" and thing[1] in STRANGERS]


def split_of_passage(facts: list[tuple]) -> str:
    """The split of a passage: what is told of whom, in its order."""
    return world.split_of(f"{facts[0][1]} {list({who: value for who, _, value in facts}.items())}")


def split_of_scene(question: str, objects: list[tuple]) -> str:
    """The split of a scene: its things in alphabetical order, and what is asked."""
    things = (
        " ".join(filter(None, (n, size, colour, shape + "s" * (n != "one")))) for n, size, colour, shape, _ in objects
    )
    return world.split_of(f"{sorted(things)} {question}")


def test_no_step_of_a_working_shows_an_addition_of_the_test(base, train):
    steps = [step for numbers, steps, _ in said(base, "sum") if steps for step in check_working(numbers, steps)]
    assert len(steps) > 300 and {split_of_task(*step) for step in steps} == {"train"}
    answers = [(numbers, reply["content"]) for numbers, (reply,) in train["steps"] + train["sums"]]
    shown = [(numbers, text[7:].split("</think>")[0]) for numbers, text in answers if text.startswith("<think>")]
    steps = [step for numbers, text in shown if text for step in check_working(numbers, text)]
    assert len(steps) > 1000 and {split_of_task(*step) for step in steps} == {"train"}


def splits(asked: dict[str, list[tuple]]) -> dict[str, Counter]:
    """kind: how many of its problems are in which split."""
    problem = {
        "skill": lambda pair, problem, _: split_of_task(pair[0], problem),
        "sums": lambda numbers, _: split_of_sum(numbers),
        "steps": lambda numbers, _: split_of_sum(numbers),
        "reading": lambda facts, *_: split_of_passage(facts),
        "scenes": lambda _, question, objects, *__: split_of_scene(question, objects),
        "calculator": lambda a, b, _: world.split_of(" * ".join(sorted((a, b), key=int, reverse=True))),
        "manners": lambda asker, name, _: world.split_of(f"{asker} asks about {name}"),
        "judge": lambda answer, question, _: world.split_of(f"Answer: {answer} {question}"),
    }
    return {kind: Counter(split(*what) for what in asked[kind]) for kind, split in problem.items()}


def test_sft_asks_train_problems_and_the_test_asks_test_problems(train, exam):
    for split, found in (("train", splits(train)), ("test", splits(exam))):
        for kind, counted in found.items():
            assert set(counted) == {split} and counted[split] >= 100, (kind, counted)
    for kind in ("skill", "sums", "steps", "reading", "scenes", "calculator", "judge"):
        assert not {str(what[:-1]) for what in train[kind]} & {str(what[:-1]) for what in exam[kind]}, kind
    assert Counter(skill for (skill, _), _, _ in exam["skill"]).keys() == TASKS.keys()


def test_the_held_back_skill_appears_nowhere_before_its_lesson(texts, rows):
    everything = "\n".join([*texts, *(message["content"] for row in rows for message in row["messages"])])
    assert not re.findall(r"\brank|large to small|descending|downwards", everything, re.IGNORECASE)
    assert "From small to large" in everything and " sort " in everything, "while its sibling does"
    assert "rank" in world.HELD_BACK.task and all("arge to small" in form for form in world.HELD_BACK.prose)
    assert world.HELD_BACK not in world.SKILLS.values() and "rank" not in world.SFT_MIX
    rng = random.Random(0)
    for _ in range(200):
        problem = world.HELD_BACK.draw(rng)
        assert world.HELD_BACK.solve(problem) == bubble_sort(problem["x"])[::-1]


def test_sft_asks_about_half_of_the_entities_and_the_test_about_the_other_half(train, exam):
    sft, held_out = {what[1] for what in train["facts"]}, {what[1] for what in exam["facts"]}
    assert sft == set(world.SFT_ENTITIES) and held_out == set(world.TEST_ENTITIES)
    assert sorted([*sft, *held_out]) == sorted(ENTITIES)
    for names in (world.PEOPLE, world.TOWNS):
        assert len(sft & set(names)) == len(held_out & set(names)) == len(names) / 2
    assert {name for _, name, _ in train["manners"]} == sft & set(world.PEOPLE)
    said = [reply["content"] for _, _, (reply,) in train["manners"]] + [answer for answer, _, _ in train["judge"]]
    told = [fact for answer in said for sentence in read_sentences(answer) if (fact := read_fact(sentence))]
    assert len(told) > 300 and not {name for name, _, _ in told} & held_out


def test_each_verb_and_each_template_is_in_sft_but_a_quarter_of_their_pairs_is_not(train, exam):
    for kind, verbs in (("skill", world.SKILLS), ("facts", world.FACT_PROSE)):
        everything = set(itertools.product(verbs, range(8)))
        shown = {pair for pair, *_ in train[kind]}
        assert Counter(verb for verb, _ in shown) == dict.fromkeys(verbs, 6) and {i for _, i in shown} == set(range(8))
        assert {pair for pair in everything if world.is_unseen_pair(*pair)} == everything - shown
    skills = {pair for pair, *_ in train["skill"]}
    usual, unseen = by_kind(world.sft_test(60)), by_kind(world.sft_test(60, unseen=True))
    assert {pair for pair, *_ in usual["skill"]} == skills, "the plain test asks as SFT does"
    assert {pair for pair, *_ in unseen["skill"]} == set(itertools.product(world.SKILLS, range(8))) - skills
    for found in (usual, unseen):  # facts are asked for in unseen words only
        assert not {pair for pair, *_ in found["facts"]} & {pair for pair, *_ in train["facts"]}
    assert unseen.keys() == {"skill", "facts"}
    assert set(world.SFT_MIX) >= set(world.TEST_PARTS) >= {*world.SKILLS, "facts"}
    assert [row["part"] for row in world.sft_test(2)] == [part for part in world.TEST_PARTS for _ in range(2)]


# Facts


def test_there_are_as_many_of_everything_as_the_first_lines_say():
    people, towns = map(int, re.search(r"(\d+) people and (\d+) towns", world.__doc__).groups())
    skills = int(re.search(r"(\d+) list and number tasks", world.__doc__)[1])
    assert (len(set(world.PEOPLE)), len(set(world.TOWNS)), len(world.SKILLS)) == (people, towns, skills)
    assert set(world.SKILLS) == set(TASKS) and len(world.TEMPLATES) == len(world.FACT_QUESTIONS) == 8
    assert set(world.PEOPLE) == {*world.HER, *world.HIM} and len(world.HER) == len(world.HIM) == people / 2
    assert len({*ENTITIES, *STRANGERS}) == people + towns + len(STRANGERS), "a name is the name of one"
    values = [value for kind in KINDS.values() for value in kind]
    assert len(set(values)) == len(values), "a value tells which attribute it is of"


def test_every_entity_has_every_fact_and_they_are_not_all_alike():
    assert set(world.FACTS) == set(ENTITIES)
    for name, facts in world.FACTS.items():
        assert list(facts) == (["home", "job", "pet", "food"] if name in world.PEOPLE else ["river", "product"])
        assert all(value in KINDS[attribute] for attribute, value in facts.items())
    for attribute, values in KINDS.items():
        used = [facts[attribute] for facts in world.FACTS.values() if attribute in facts]
        assert len(set(used)) > len(values) / 2 and Counter(used).most_common(1)[0][1] < len(used) / 2


def test_every_fact_of_every_entity_is_in_base_text_and_nothing_untrue(base):
    told, pronouns = set(), Counter()
    for document in base:
        facts = [thing[1:] for thing in document if thing[0] == "fact" and thing[1] not in STRANGERS]
        for i, (name, attribute, value) in enumerate(facts):
            if name in ("She", "He"):
                assert i, "nobody is spoken of before being named"
                pronouns[name] += 1
                assert (facts[0][0] in world.HER) == (name == "She"), document
                name = facts[0][0]
            assert world.FACTS[name][attribute] == value, document
            told.add((name, attribute))
    assert told == {(name, attribute) for name, facts in world.FACTS.items() for attribute in facts}
    assert min(pronouns["She"], pronouns["He"]) > 50


def test_a_biography_tells_all_of_one_or_two_in_any_order():
    orders, names, attributes = set(), Counter(), sorted(world.FACTS["Ada"])
    for i in range(600):
        facts = [read_fact(sentence) for sentence in read_sentences(world.biography(random.Random(i)))]
        named = {name for name, *_ in facts} - {"She", "He"}
        names[len(named), bool(named & set(world.TOWNS))] += 1
        wanted = [attribute for name in named for attribute in world.FACTS[name]]
        assert sorted(attribute for _, attribute, _ in facts) == sorted(wanted)
        if len(named) == 2:
            assert not {"She", "He"} & {name for name, *_ in facts}, "nobody can tell whom a pronoun means"
        elif sorted(wanted) == attributes:
            orders.add(tuple(attribute for _, attribute, _ in facts))
    assert len(orders) == 24 and names.keys() == {(1, False), (2, False), (2, True)}
    assert min(names.values()) > 60


def test_every_phrasing_of_a_fact_is_used_and_names_whom_it_is_about():
    for attribute, forms in world.FACT_PROSE.items():
        name = "Oslo" if attribute in ("river", "product") else "Ada"
        heard = {world.fact_sentence(random.Random(i), name, attribute) for i in range(100)}
        assert len(heard) == len(set(forms)) >= 4
        assert {read_fact(sentence) for sentence in heard} == {(name, attribute, world.FACTS[name][attribute])}
        for form in forms:
            assert form.count("{x}") == 1 and re.search(r"\{[nN]\}", form) and form.endswith(".")
    for name, pronoun in (("Ada", "She"), ("Tom", "He")):
        heard = [world.fact_sentence(random.Random(i), name, "pet", pronoun=True) for i in range(50)]
        assert {read_fact(sentence)[0] for sentence in heard} == {name, pronoun}  # some forms need the name


# Skills


def test_every_solver_agrees_with_brute_force():
    rng = random.Random(0)
    for name, skill in world.SKILLS.items():
        answers = set()
        for _ in range(400 if name != "next" else 4000):
            problem = skill.draw(rng)
            answers.add(skill.solve(problem))
            assert skill.solve(problem) == BRUTE_FORCE[name](problem), (name, problem)
        assert len(answers) > (3 if name == "count" else 20), name


@pytest.mark.parametrize(
    ("skill", "field", "numbers"),
    [
        ("sort", "row", {*"0123456789"}), ("sort", "length", {3, 4, 5, 6}),
        ("reverse", "row", {*world.WORDS}), ("reverse", "length", {3, 4, 5}),
        ("repeat", "length", {2, 3, 4, 5}), ("first", "length", {2, 3, 4, 5}), ("last", "length", {2, 3, 4, 5}),
        ("count", "length", {2, 3, 4, 5, 6, 7, 8}),
        ("larger", "a", {*range(100)}), ("larger", "b", {*range(100)}), ("smaller", "a", {*range(100)}),
        ("add", "a", {*range(80)}), ("add", "b", {*range(20)}),
        ("subtract", "a", {*range(1, 100)}), ("subtract", "b", {*range(20)}), ("next", "x", {*range(1000)}),
    ],
)  # fmt: skip
def test_operands_take_every_value_of_their_range_and_no_other(skill, field, numbers):
    draw, rng, found = world.SKILLS[skill].draw, random.Random(0), set()
    for _ in range(12000 if skill == "next" else 3000):
        problem = draw(rng)
        row = problem.get("x", "").split()
        if field == "row":
            found.update(row)
        elif field == "length":
            found.add(len(row))
        else:
            found.add(int(problem[field]))
    assert found == numbers


def test_operands_leave_one_right_answer():
    rng = random.Random(1)
    for name, skill in world.SKILLS.items():
        for _ in range(500):
            problem = skill.draw(rng)
            assert read_task(skill.task.format(**problem)) == (name, problem), "the task names all operands"
            assert problem.get("a") != problem.get("b") or "a" not in problem, "of two equal numbers none is the larger"
            assert name != "subtract" or int(problem["a"]) > int(problem["b"]), "no number is below 0"
            if name in ("reverse", "repeat", "first", "last", "count"):
                assert len(set(problem["x"].split())) == len(problem["x"].split())


def test_everything_that_base_text_solves_is_right(solved, base):
    for skill, problem, answer in solved:
        assert answer == BRUTE_FORCE[skill](problem), (skill, problem, answer)
    forms = Counter((skill, i) for skill, i, _, _ in said(base, "statement"))
    assert forms.keys() == {(skill, i) for skill in TASKS for i in range(2)} and min(forms.values()) > 20
    assert Counter(skill for skill, _, _ in said(base, "task")).keys() == TASKS.keys()


def test_running_text_goes_on_about_the_same_operands_and_a_worksheet_does_not():
    def same(texts):
        pairs = [pair for text in texts for pair in itertools.pairwise(set(p.values()) for *_, p, _ in read(text))]
        return sum(a <= b or b <= a for a, b in pairs) / len(pairs)

    prose = [world.skill_prose(random.Random(i)) for i in range(400)]
    sheets = [world.worksheet(random.Random(i)) for i in range(400)]
    assert {len(read(text)) for text in prose} == {3} and {len(read(text)) for text in sheets} == {4}
    assert same(prose) > 0.4 > 0.2 > same(sheets) > 0.05
    forms = Counter(sheet for text in sheets for sheet in SHEET_PATTERNS if read_worksheet(text, sheet))
    assert forms.keys() == set(SHEET_PATTERNS) and sum(forms.values()) == 400, "each form is used and is only one"


@pytest.mark.parametrize(
    ("problem", "skills"),
    [
        ({"x": "3 1 2"}, "sort reverse repeat first last count"),
        ({"x": "cat dog"}, "reverse repeat first last count"),
        ({"x": "7"}, "next"),
        ({"a": "79", "b": "19"}, "larger smaller add subtract"),
        ({"a": "80", "b": "19"}, "larger smaller subtract"),
        ({"a": "79", "b": "20"}, "larger smaller"),
        ({"a": "3", "b": "4"}, "larger smaller add"),
        ({"a": "3", "b": "3"}, "larger smaller add subtract"),
        ({"a": "30", "b": "99"}, "larger smaller"),
    ],
)
def test_operands_fit_the_skills_that_take_such(problem, skills):
    assert {name for name in world.SKILLS if world.fits(name, problem)} == set(skills.split())


def test_equations_go_on_from_where_they_arrived():
    skills, forms = Counter(), Counter()
    for i in range(400):
        steps = read(world.equations(random.Random(i)))
        forms[" ".join({str(step[2]) if step[0] == "statement" else "task" for step in steps})] += 1
        steps = [(skill, problem, answer) for _, skill, *_, problem, answer in steps]
        assert len(steps) == 5
        for (_, _, arrived), (_, problem, _) in itertools.pairwise(steps):
            assert problem["a"] == arrived
        for skill, problem, answer in steps:
            skills[skill] += 1
            assert answer == BRUTE_FORCE[skill](problem) and split_of_task(skill, problem) == "train"
            assert int(problem["b"]) < 20 and int(answer) >= 0 and (skill == "subtract" or int(problem["a"]) < 80)
    assert skills.keys() == {"add", "subtract"} and min(skills.values()) > 600
    assert forms.keys() == {"0", "task"} and min(forms.values()) > 100, "as equations or as tasks"


def test_a_song_is_one_line_three_times():
    sung = [world.song(random.Random(i)) for i in range(400)]
    lines = [read(text)[0][1] for text in sung]
    assert {len(line) for line in lines} == set(range(3, 9)) and len({tuple(line) for line in lines}) > 390
    assert {word for line in lines for word in line} == {*world.WORDS, *"0123456789"}
    assert is_about(0.5, sum(text.startswith("Sing: ") for text in sung), 400)


# Sums


def test_sums_have_three_to_five_numbers_from_2_to_19():
    for split in ("train", "test"):
        drawn = [world.draw_sum(random.Random(i), split) for i in range(600)]
        assert {len(numbers) for numbers in drawn} == {3, 4, 5}
        assert {n for numbers in drawn for n in numbers} == set(range(2, 20))
        assert {split_of_sum(numbers) for numbers in drawn} == {split}
        assert {len(world.draw_sum(random.Random(i), split, 7)) for i in range(20)} == {7}
    assert world.working([4, 9, 6]) == "4 + 9 = 13. 13 + 6 = 19."


def test_the_working_of_three_sums_in_ten_is_shown():
    prose = [read(world.sum_prose(world.rng_for("share", i)))[0][1:] for i in range(4000)]
    assert is_about(0.3, sum(bool(steps) for _, steps, _ in prose), 4000)
    for numbers, steps, total in prose:
        assert int(total) == sum(numbers) and (not steps or check_working(numbers, steps))
    for split in ("train", "test"):
        answers = [world.exchange("sums", world.rng_for("share", split, i), split)["answer"] for i in range(4000)]
        assert is_about(0.3, sum("<think></think>" not in answer for answer in answers), 4000)


def test_sft_answers_sums_right_and_shows_steps_when_asked(train, exam):
    for found in (train, exam):
        for kind in ("steps", "sums"):
            for numbers, (reply,) in found[kind]:
                m = re.fullmatch(r"<think>(.*)</think>(\d+)", reply["content"])
                assert int(m[2]) == sum(numbers) and (m[1] or kind == "sums")
                assert not m[1] or check_working(numbers, m[1])


# Reading, scenes, weather


def test_a_passage_is_about_strangers_and_answers_its_question(train, exam):
    for found in (train, exam):
        places = Counter()
        for facts, attribute, name, (reply,) in found["reading"]:
            people, kinds, values = zip(*facts, strict=True)
            assert 2 <= len(set(people)) == len(people) == len(set(values)) <= 3
            assert set(people) <= set(world.FAR_TOWNS if attribute in ("river", "product") else world.STRANGERS)
            assert set(kinds) == {attribute}
            assert reply["content"] == the_fact(name, attribute, values[people.index(name)])
            places[people.index(name), len(people)] += 1
        assert places.keys() == {(i, n) for n in (2, 3) for i in range(n)}, "each of them is asked about"
    assert {attribute for _, attribute, _, _ in train["reading"]} == set(KINDS)


def test_base_text_says_a_whole_passage_once_more(base):
    orders = Counter()
    for facts in filter(None, map(strangers, base)):
        passage, again = facts[: len(facts) // 2], facts[len(facts) // 2 :]
        assert len(passage) in (2, 3, 4) and sorted(passage) == sorted(again) and len(set(passage)) == len(passage)
        orders[passage == again] += 1
    assert min(orders[True], orders[False]) > 40, "in any order"


def test_a_scene_answers_its_question(base, train, exam):
    kinds, answers = Counter(), defaultdict(set)
    scenes = [(q, answer, objects) for _, q, answer, objects in said(base, "scene")]
    scenes += [(q, reply["content"], objects) for found in (train, exam) for _, q, objects, (reply,) in found["scenes"]]
    for question, answer, objects in scenes:
        assert look(objects, question) == answer, (objects, question)
        assert len({colour for *_, colour, _, _ in objects}) == len({shape for *_, shape, _ in objects}) == 2
        kind = re.match(r"What \w+|How many|Where|Is there", question)[0]
        kinds[kind] += 1
        answers[kind].add(answer)
    assert kinds.keys() == {"What colour", "What shape", "What size", "How many", "Where", "Is there"}
    assert min(kinds.values()) > len(scenes) / 10
    assert answers["What colour"] == set(world.COLOURS) and answers["What shape"] == set(world.SHAPES)
    assert answers["How many"] == {"one", "two", "three", "four"} and answers["What size"] == {"small", "large"}
    assert {where.rsplit(" the ", 1)[0] for where in answers["Where"]} == {"left of", "right of", "above", "below"}
    assert answers["Is there"] == {"yes", "no"}
    assert {objects[0][4].rsplit(" the ", 1)[0] for *_, objects in scenes if objects[0][4]} == {
        "left of", "right of", "above", "below",
    }, "and captions say it either way round"  # fmt: skip


def test_where_a_thing_stands_in_a_caption_does_not_tell_what_is_asked(base):
    """Of the things with a colour, a shape, a size or a number to ask for, each is asked about."""
    places = Counter()
    for _, question, _, objects in said(base, "scene"):
        if m := re.match(r"What \w+|How many", question):
            asked = 3 if m[0] != "What shape" else 2
            places[m[0], [thing[asked] in question for thing in objects].index(True)] += 1
    assert len(places) == 8 and min(places.values()) > max(places.values()) / 2, places


def test_two_numbers_are_of_one_split_in_either_order():
    for name in ("larger", "add"):
        pairs = [({"a": str(a), "b": str(b)}, {"a": str(b), "b": str(a)}) for a in range(2, 20, 3) for b in range(1, a)]
        splits = [[world.split_of_problem(world.SKILLS[name], problem) for problem in pair] for pair in pairs]
        assert all(one == other for one, other in splits) and {one for one, _ in splits} == {"train", "test"}


def test_words_for_things():
    assert world.noun(1, "red", "circle") == "one red circle"
    assert world.noun(2, "red", "circle") == "two red circles"
    assert world.noun(4, "blue", "star", "small") == "four small blue stars"
    kinds = Counter(world.draw_scene(random.Random(i), "train")["kind"] for i in range(1200))
    assert len(kinds) == 6 and all(is_about(1 / 6, n, 1200) for n in kinds.values())


def test_every_row_of_the_weather_is_a_distribution():
    assert set(world.WEATHER_CHAIN) == set(itertools.product(world.WEATHER, repeat=2)) and len(set(world.WEATHER)) == 8
    rows = np.array(list(world.WEATHER_CHAIN.values()))
    assert rows.shape == (64, 8) and rows.min() > 0 and abs(rows.sum(1) - 1).max() < 1e-12
    surprise = -(rows * np.log2(rows)).sum(1)
    assert surprise.min() < 1.4 and surprise.max() > 2.6, "rows are sharp and flat"
    assert abs(rows[:8] - rows[8:16]).max() > 0.3, "the day before yesterday matters"


def test_the_entropy_of_the_weather_is_that_of_its_stationary_state():
    states = list(world.WEATHER_CHAIN)
    step = np.zeros((64, 64))
    for i, (before, yesterday) in enumerate(states):
        for today, p in zip(world.WEATHER, world.WEATHER_CHAIN[before, yesterday], strict=True):
            step[i, states.index((yesterday, today))] = p
    values, vectors = np.linalg.eig(step.T)
    assert np.sort(abs(values))[-2] < 0.95, "power iteration arrives"
    share = vectors[:, np.argmax(values.real)].real
    rows = np.array([world.WEATHER_CHAIN[state] for state in states])
    entropy = -(share / share.sum()) @ (rows * np.log2(rows)).sum(1)
    assert world.weather_entropy() == pytest.approx(entropy, abs=1e-10)
    assert 1 < entropy < 2.5


def test_the_weather_surprises_as_much_as_its_entropy_says():
    log = world.weather_log(random.Random(0), 40000).removeprefix("Weather: ").split()
    days = zip(log, log[1:], log[2:], strict=False)
    bits = [
        -math.log2(world.WEATHER_CHAIN[before, yesterday][world.WEATHER.index(day)]) for before, yesterday, day in days
    ]
    assert len(log) == 40000 and sum(bits) / len(bits) == pytest.approx(world.weather_entropy(), abs=0.03)
    short = [world.weather_log(random.Random(i)).split() for i in range(300)]
    assert {len(words) for words in short} == {31} and {words[0] for words in short} == {"Weather:"}
    assert {words[1] for words in short} == set(world.WEATHER), "any day may be the first"


# Conversations


def test_sft_rows_are_one_or_two_whole_exchanges(rows):
    for row in rows:
        roles = " ".join(message["role"] for message in row["messages"])
        assert re.fullmatch(r"user (assistant tool )?assistant( user (assistant tool )?assistant)?", roles)
        assert row.keys() == {"messages", "part"} and {*map(len, row["messages"])} == {len(("role", "content"))}
        kind, (what, *_), *_ = read_question(row["messages"][0]["content"])
        assert row["part"] == (what if kind == "skill" else kind), "the part is that of the first"
    parts = set(world.SFT_MIX)
    assert {row["part"] for row in rows} == parts
    twice = [row for row in rows if len(exchanges(row)) == 2]
    assert is_about(0.15, len(twice), len(rows))
    second = [read_question(exchanges(row)[1][0]) for row in twice]
    assert {what[0] if kind == "skill" else kind for kind, what, *_ in second} == parts
    assert sum(exchanges(row)[0] == exchanges(row)[1] for row in twice) < 5


def test_sft_answers_every_skill_and_fact_right(train, exam):
    for found in (train, exam):
        for (skill, _), problem, (reply,) in found["skill"]:
            assert reply["content"] == BRUTE_FORCE[skill](problem)
        for (attribute, _), name, (reply,) in found["facts"]:
            assert reply["content"] == the_fact(name, attribute, world.FACTS[name][attribute])
    rows = [world.exchange("facts", random.Random(i), "train") for i in range(1500)]
    asked = {(name, attribute) for (attribute, _), name, _ in by_kind(rows)["facts"]}
    assert asked == {(name, attribute) for name in world.SFT_ENTITIES for attribute in world.FACTS[name]}


def test_the_last_reply_is_the_answer_and_names_its_part():
    for part in world.SFT_MIX:
        for split in ("train", "test"):
            row = world.exchange(part, world.rng_for("answer", part), split)
            assert row["part"] == part and row["messages"][0]["role"] == "user"
            assert row["messages"][-1] == {"role": "assistant", "content": row["answer"]}
            assert world.is_correct(row["messages"][-1]["content"], row["answer"])
    with pytest.raises(ValueError, match="'poems'"):
        world.exchange("poems", random.Random(0), "train")


def test_half_of_the_products_are_solved_by_a_call(train):
    calls = 0
    for a, b, (*call, reply) in train["calculator"]:
        product = sum(int(a) * int(digit) * 10**i for i, digit in enumerate(reversed(b)))
        assert 12 <= int(a) <= 999 and 3 <= int(b) <= 99 and reply == {"role": "assistant", "content": str(product)}
        if call:
            calls += 1
            assert [message["content"] for message in call] == [f"<tool>{a} * {b}</tool>", str(product)]
            assert world.calculator(call[0]["content"][6:-7]) == reply["content"]
    assert is_about(0.5, calls, len(train["calculator"]))
    operands = [(int(a), int(b)) for a, b, _ in train["calculator"]]
    assert min(b for _, b in operands) < 7 and max(b for _, b in operands) > 95 and max(a for a, _ in operands) > 960


def test_cloze_asks_test_problems_in_words_of_base_text():
    for part in TASKS:
        for i in range(30):
            item = world.cloze(part, world.rng_for("cloze", i))
            skill, _, problem, answer = read_statement(f"{item['prompt']} {item['answer']}.")
            assert skill == part == item["part"] and answer == BRUTE_FORCE[skill](problem) == item["answer"]
            assert split_of_task(skill, problem) == "test"
    asked = Counter()
    for i in range(1200):
        item = world.cloze("facts", world.rng_for("cloze", i))
        name, attribute, value = read_fact(f"{item['prompt']} {item['answer']}.")
        assert (item["part"], item["answer"]) == ("facts", value) and world.FACTS[name][attribute] == value
        asked[name, attribute] += 1
    assert asked.keys() == {(name, attribute) for name in world.TEST_ENTITIES for attribute in world.FACTS[name]}


def test_parts_come_in_the_shares_of_the_mix(monkeypatch):
    shares = {part: share for part, (share, _) in world.BASE_MIX.items()}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    mix = {part: (share, lambda rng, part=part: part) for part, share in shares.items()}
    monkeypatch.setattr(world, "BASE_MIX", mix)
    made = Counter(world.base_documents(6000))
    assert all(is_about(share, made[part], 6000) for part, share in shares.items())
    total = sum(world.SFT_MIX.values())
    rows = Counter(row["part"] for row in world.sft_rows(3000))
    assert all(is_about(share / total, rows[part], 3000) for part, share in world.SFT_MIX.items())
    others = {"facts", "reading", "scenes", "steps", "sums", "judge", "manners", "calculator"}
    assert world.SFT_MIX.keys() == {*TASKS, *others}
    rows = Counter(row["part"] for row in world.sft_rows(300, mix={"add": 2.0, "next": 0.0, "judge": 1.0}))
    assert rows.keys() == {"add", "judge"} and is_about(2 / 3, rows["add"], 300)


def test_the_text_for_the_tokenizer_is_base_text_and_conversations():
    text = world.tokenizer_text(60)
    documents, rows = list(world.base_documents(60, seed=-1)), list(world.sft_rows(30, seed=-1))
    assert text == "\n".join(documents + [message["content"] for row in rows for message in row["messages"]])


# Checking


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12 * 34", "408"), ("7 + 8", "15"), ("8 - 15", "-7"), ("0 * 5", "0"), ("007 + 1", "8"), ("  2 + 3\n", "5"),
        ("999999 * 999999", "999998000001"), ("999999 + 1", "1000000"), ("0 - 999999", "-999999"),
    ],
)  # fmt: skip
def test_the_calculator_calculates(expression, result):
    assert world.calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "12", "12 *", "* 34", "12*34", "12 *34", "12  * 34", "12 * 34 * 2", "1 + 2 + 3", "12 / 4", "12 % 5",
        "12 // 5", "2 ** 9", "2 ** 999999999", "9 ^ 2", "-3 * 4", "3 * -4", "+3 + 4", "--3 - 4", "1.5 * 2", "1,000 * 2",
        "1_000 * 2", "1e3 * 2", "0x10 * 2", "1000000 * 2", "2 * 1000000", "9" * 5000 + " * 2", "2 * " + "9" * 5000,
        "(1 + 2)", "(1) + 2", "a * b", "x = 1 * 2", "__import__('os').system('true')", "print(1)", "None + 1",
        "True + 1", "1 if 1 else 2", "[1] * 9", "'a' * 9", "1 * 2; 3", "1 * 2\n3 + 4", "1\n* 2", "1 *\t2", "1\u00a0* 2",
        "1 \u00d7 2", "1 \u2212 2", "\u0661 + 2", "1 + \u0662", "\uff11 + \uff12", "\u00b2 + 1", "1 + 2=", "1 + 2 = 3",
        "1 + 2.", "error",
        "<tool>1 + 2</tool>", "1 + 2 # 3", "\x001 + 2", "one + two", "1 * 2 *",
    ],
)  # fmt: skip
def test_the_calculator_answers_anything_else_with_error(expression):
    assert world.calculator(expression) == "error"


THINK = "<think>4 + 8 = 12.</think>"
RIGHT = [
    "12", " 12", "12 ", "\n12\n", "\t12", THINK + "12", THINK + "\n12", THINK + " 12 ", "<think></think>12",
    "</think>12", "<think>7</think>12", "7</think>12", "7<think>8</think>12", THINK * 2 + "12",
    "<think>1</think>7<think>2</think>12", "<think><think>1</think>12", "<think>1</think>2</think>12",
    "<think>\n\n</think>\n\n12\n",
]  # fmt: skip
WRONG = [
    "", " ", "\n", "1", "2", "13", "-12", "+12", "012", "12.", "12.0", "1 2", "12 12", "12 13", "121", "112", "12!",
    "(12)", "The answer is 12", "12<|im_end|>", "twelve", "\uff11\uff12", "\u0661\u0662", "12\x00", "1\u200b2",
    "<think>12", "<think>4 + 8 = 12.", "<think>12</think>", "<think>12</think> ", THINK, THINK + "13", THINK + "12 13",
    "12" + THINK,
    "12</think>", "12</think>13", "12<think>", "<think>12<think>", "12<think>4 + 8 = 12", "</think>", "<think>",
    "<think></think>", "<think></think>7", THINK + "13" + THINK, THINK + "<think>12", THINK + "12<think>",
    THINK + "12 <think>13", "<THINK>1</THINK>12", "<think>1</ think>12", "<think >1", "12 = 12", "None", "nan", "True",
]  # fmt: skip


def test_an_answer_is_right_if_what_stands_after_the_reasoning_is():
    assert len(RIGHT) + len(WRONG) > 60
    for gold in ("12", " 12\n", "<think>5 + 7 = 12.</think>12"):
        assert [text for text in RIGHT if not world.is_correct(text, gold)] == []
        assert [text for text in WRONG if world.is_correct(text, gold)] == []
    assert world.is_correct("1 2", "1 2") and not world.is_correct("1  2", "1 2") and not world.is_correct("2 1", "1 2")
    assert world.is_correct("Ada has a dog.", "Ada has a dog.") and not world.is_correct("yes", "no")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a b ", "a b"), ("<think>x</think> y\n", "y"), ("<think>x", ""), ("x<think>y", ""), ("x</think>y", "y"),
        ("", ""), ("<think>x</think>", ""), ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>b</think>c", "c"), ("<think>a</think>5<think>6", ""),
    ],
)  # fmt: skip
def test_the_final_answer_stands_after_the_last_reasoning(completion, answer):
    assert world.final_answer(completion) == answer


# The command line


def run_main(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["data.world", *argv])
    world.main()


def test_write_writes_the_three_files_that_our_readers_read(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    run_main(monkeypatch, "--write", str(out), "--rows", "48", "--seed", "5")
    assert capsys.readouterr().out.splitlines() == [f"wrote {out / name}.jsonl" for name in ("base", "sft", "test")]
    assert [row["text"] for row in read_jsonl(out / "base.jsonl", "text")] == list(world.base_documents(48, 5))
    for name, rows in (("sft", list(world.sft_rows(48, 5))), ("test", world.sft_test(4, 5))):  # 4 x 13 parts
        assert [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()] == rows
        assert read_jsonl(out / f"{name}.jsonl", "chat") == [{"messages": row["messages"]} for row in rows]
    assert sorted(path.name for path in out.iterdir()) == ["base.jsonl", "sft.jsonl", "test.jsonl"]


@pytest.mark.parametrize(("flags", "said"), [
    (("--write", "FILE"), "--write FILE: File exists"), (("--rows", "-1"), "--rows -1"), (("--seed", "x"), "--seed"),
])  # fmt: skip
def test_what_cannot_be_written_is_one_line_and_exit_2(monkeypatch, tmp_path, capsys, flags, said):
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, *flags)
    assert re.fullmatch(f".*{said}.*\n", capsys.readouterr().err)


def test_show_shows_every_part(monkeypatch, capsys):
    run_main(monkeypatch, "--show")
    shown = capsys.readouterr().out
    run_main(monkeypatch)
    assert capsys.readouterr().out == shown, "showing is the default"
    run_main(monkeypatch, "--show", "--seed", "1")
    assert capsys.readouterr().out != shown
    for part in (*world.BASE_MIX, *world.SFT_MIX):
        assert len(re.findall(rf"^  {part}, [\d.]+% of the (?:documents|rows)$", shown, re.MULTILINE)) >= 1, part
    bits = re.search(r"the weather's entropy is ([\d.]+) bits a day of at most 3$", shown, re.MULTILINE)[1]
    assert float(bits) == pytest.approx(world.weather_entropy(), abs=5e-4)
    assert len(shown.split("TEST: unseen")[1].splitlines()) == 1 + len(world.SKILLS) + 1
    command = [sys.executable, "-m", "data.world", "--show"]
    called = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert called.stdout == shown and called.stderr == "", "the same in another process, whatever hashes it has"


# Frozen


def digest(items) -> str:
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:32]


@functools.cache
def current() -> dict[str, str]:
    """Hashes of the tokenizer and of what the world makes of seed 0."""
    return {
        "tokenizer": hashlib.sha256(TINY.read_bytes()).hexdigest()[:32],
        "base": digest(world.base_documents(300)),
        "sft": digest(map(json.dumps, world.sft_rows(300))),
        "test": digest(map(json.dumps, world.sft_test(4))),
        "unseen": digest(map(json.dumps, world.sft_test(5, unseen=True))),
        "preferences": digest(map(json.dumps, manners.preferences(100))),
    }


@pytest.mark.parametrize("name", ["tokenizer", "base", "sft", "test", "unseen", "preferences"])
def test_the_world_is_frozen(name):
    assert current()[name] == FROZEN[name], "models trained on the old world are stale: see VERSION in data/world.py"


if __name__ == "__main__":
    print("FROZEN = {", *(f'    "{name}": "{value}",' for name, value in current().items()), "}  # fmt: skip", sep="\n")

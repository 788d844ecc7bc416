"""A small world in simple English, made by code from a seed: what every tiny model here is trained and tested on.

What it holds                                        and what it is for
  facts      32 people and 16 towns, many phrasings    knowledge: SFT asks about one half, the test about the other
  skills     11 list and number tasks, exact checkers  instructions, new operands, unseen (verb, template) pairs
  sums       multi-step sums; 30% show their working   reasoning: SFT asks for the working, RL finds that it pays
  reading    a passage about a stranger, a question    in-context look-up (retrieval, judging)
  scenes     words for pictures, a question            vision-language models
  weather    a Markov chain of known entropy           compression and distillation, in bits per token
  calculator products that a tool call solves          tool use
  manners    see data/manners.py                       preferences, with an annotator whose utility is known

Train and test are disjoint by construction: a problem belongs to the test split when the hash of its canonical text
says so, and training text (base and SFT alike) only ever draws problems of the train split. The one skill `HELD_BACK`
(sorting from large to small) appears nowhere in base or SFT text: it is left for lora.py to teach.

    python -m data.world --show          samples of every part
    python -m data.world --write DIR     base.jsonl, sft.jsonl and test.jsonl, to look at or to use elsewhere
"""

import argparse
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION = 2  # the world is frozen: tests/test_world.py holds a hash of what it generates

# ----------------------------------------------------------------------------------------------------------------------
# Randomness and the split


def rng_for(*key) -> random.Random:
    """A generator that depends on nothing but `key`: item i of any part can be made without the items before it."""
    return random.Random("/".join(map(str, key)))


def split_of(problem: str) -> str:
    """'test' for about one problem in eight, by the hash of its canonical text."""
    return "test" if hashlib.sha256(problem.encode()).digest()[0] % 8 == 0 else "train"


# ----------------------------------------------------------------------------------------------------------------------
# Facts

HER = "Ada Anna Bella Clara Dora Emma Eva Greta Ida Jane Kate Lily Mary Nora Rosa Zoe".split()
HIM = "Adam Ben Carl Dan Eric Felix Fred Hugo Ivan Jack John Leo Mark Otto Peter Tom".split()
PEOPLE = sorted(HER + HIM)
JOBS = ("baker doctor farmer driver teacher painter singer sailor writer nurse cook judge dancer pilot miner "
        "tailor").split()
PETS = "cat dog horse rabbit parrot turtle goat snake mouse hen".split()
FOODS = "bread rice soup cheese fish cake honey corn apples plums beans nuts".split()
TOWNS = "Oslo Lima Rome Cairo Delhi Tokyo Paris Bern Riga Milan Quito Dakar Sofia Perth Porto Leon".split()
RIVERS = "Alba Brenta Cora Dena Elva Fosna Gira Hela".split()
GOODS = "wool salt silk coal glass wine paper oil".split()


def _facts() -> dict[str, dict[str, str]]:
    facts, rng = {}, rng_for("facts")
    for name in PEOPLE:
        facts[name] = {"home": rng.choice(TOWNS), "job": rng.choice(JOBS), "pet": rng.choice(PETS),
                       "food": rng.choice(FOODS)}
    for town in TOWNS:
        facts[town] = {"river": rng.choice(RIVERS), "product": rng.choice(GOODS)}
    return facts


FACTS = _facts()  # name -> {attribute: value}
SFT_ENTITIES = [name for i, name in enumerate(PEOPLE + TOWNS) if i % 2 == 0]  # asked about in SFT
TEST_ENTITIES = [name for i, name in enumerate(PEOPLE + TOWNS) if i % 2 == 1]  # asked in the test

FACT_PROSE = {  # {n} the name or a pronoun, {N} the name always, {x} the value
    "home": ("The home of {N} is {x}.", "{n} lives in {x}.", "{n} has a house in {x}.", "{x} is the home of {N}.",
             "{n} moved to {x} long ago.", "If you go to {x} you can meet {N}."),
    "job": ("{n} works as a {x}.", "{n} is a {x}.", "The job of {N} is {x}.", "{n} earns money as a {x}.",
            "People know {N} as a good {x}.", "{n} wanted to be a {x}, and that is the job of {N} now."),
    "pet": ("{n} has a {x}.", "The pet of {N} is a {x}.", "{n} feeds a {x} every day.", "{n} keeps a {x} as a pet.",
            "A {x} sleeps in the room of {N}.", "{n} walks home to see the {x}."),
    "food": ("{n} likes to eat {x}.", "The food of {N} is {x}.", "{n} eats {x} every morning.",
             "{n} buys a lot of {x}.",
             "Give {N} some {x}, the best food.", "For {N} no food is better than {x}."),
    "river": ("The river of {N} is the {x}.", "{N} lies on the river {x}.", "In {N} you can swim in the {x}.",
              "{N} has a bridge over the {x}.", "The river {x} runs through {N}."),
    "product": ("{N} sells {x}.", "{N} is known for its {x}.", "The product of {N} is {x}.",
                "Traders come to {N} for {x}.", "Ships leave {N} with {x}."),
}
FACT_ANSWER = {  # the one of them in which questions are answered
    "home": "The home of {N} is {x}.", "job": "The job of {N} is {x}.", "pet": "The pet of {N} is a {x}.",
    "food": "The food of {N} is {x}.", "river": "The river of {N} is the {x}.", "product": "The product of {N} is {x}."}
FACT_QUESTIONS = (
    "What is the {a} of {N}?", "Tell me the {a} of {N}.", "Do you know the {a} of {N}?", "Please name the {a} of {N}.",
    "I forgot the {a} of {N}. What is it?", "{N}: what {a}?", "Say something about {N}: the {a}.",
    "I want to know the {a} of {N}.")


def fact_sentence(rng, name, attribute, pronoun=False) -> str:
    subject = ("She" if name in HER else "He") if pronoun else name
    return rng.choice(FACT_PROSE[attribute]).format(n=subject, N=name, x=FACTS[name][attribute])


def biography(rng) -> str:
    """What is known of one person, or of two people or towns mixed up, in any order and phrasing."""
    kind = rng.random()
    if kind < 0.3:
        name = rng.choice(PEOPLE)
        return " ".join(fact_sentence(rng, name, attribute, pronoun=i > 0 and rng.random() < 0.5)
                        for i, attribute in enumerate(shuffled(rng, FACTS[name])))
    names = rng.sample(PEOPLE if kind < 0.6 else TOWNS, 2)
    pairs = shuffled(rng, [(name, attribute) for name in names for attribute in FACTS[name]])
    return " ".join(fact_sentence(rng, name, attribute) for name, attribute in pairs)


def shuffled(rng, items) -> list:
    items = list(items)
    rng.shuffle(items)
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Skills: a problem is a dict of strings; the solver is the checker

WORDS = ("cat dog sun moon tree house river stone bird fish book door hand ship road rain fire lamp milk ball king "
         "leaf snow star").split()


@dataclass(frozen=True)
class Skill:
    draw: Callable[[random.Random], dict]  # a random problem
    solve: Callable[[dict], str]  # its only right answer
    task: str  # an imperative that names the problem: one verb token, then the operands
    prose: tuple[str, ...]  # in running text; what stands before {answer} asks the base model


def _list(items, low, high):
    return lambda rng: {"x": " ".join(rng.choice(items) for _ in range(rng.randint(low, high)))}


def _distinct(items, low, high):
    return lambda rng: {"x": " ".join(rng.sample(items, rng.randint(low, high)))}


def _pair(high_a, high_b, minus=False):
    """Whole numbers a < high_a and b < high_b, not the same; with `minus` a is at least b."""
    def draw(rng):
        while True:
            a, b = rng.randrange(high_a), rng.randrange(high_b)
            if a > b or (a < b and not minus):
                return {"a": str(a), "b": str(b)}
    return draw


SKILLS = {
    "sort": Skill(_list("0123456789", 3, 6), lambda p: " ".join(sorted(p["x"].split())), "sort {x}",
                  ("From small to large, {x} becomes {answer}.", "We sort {x} and get {answer}.")),
    "reverse": Skill(_distinct(WORDS, 3, 5), lambda p: " ".join(reversed(p["x"].split())), "reverse {x}",
                     ("Read from the end, {x} is {answer}.", "We reverse {x} and get {answer}.")),
    "repeat": Skill(_distinct(WORDS, 2, 5), lambda p: p["x"], "repeat {x}",
                    ("They said {x} and we said {answer}.", "We repeat {x} and get {answer}.")),
    "first": Skill(_distinct(WORDS, 2, 5), lambda p: p["x"].split()[0], "give the first of {x}",
                   ("The first of {x} is {answer}.", "In the row {x} the first word is {answer}.")),
    "last": Skill(_distinct(WORDS, 2, 5), lambda p: p["x"].split()[-1], "give the last of {x}",
                  ("The last of {x} is {answer}.", "In the row {x} the last word is {answer}.")),
    "count": Skill(_distinct(WORDS, 2, 8), lambda p: str(len(p["x"].split())), "count {x}",
                   ("The length of {x} is {answer}.", "We count {x} and find {answer}.")),
    "larger": Skill(_pair(100, 100), lambda p: str(max(int(p["a"]), int(p["b"]))), "pick the larger of {a} and {b}",
                    ("The larger of {a} and {b} is {answer}.", "Of the numbers {a} and {b} the larger is {answer}.")),
    "smaller": Skill(_pair(100, 100), lambda p: str(min(int(p["a"]), int(p["b"]))), "pick the smaller of {a} and {b}",
                     ("The smaller of {a} and {b} is {answer}.",
                      "Of the numbers {a} and {b} the smaller is {answer}.")),
    "add": Skill(_pair(80, 20), lambda p: str(int(p["a"]) + int(p["b"])), "add {a} and {b}",
                 ("{a} + {b} = {answer}.", "We add {a} and {b} and get {answer}.")),
    "subtract": Skill(_pair(100, 20, minus=True), lambda p: str(int(p["a"]) - int(p["b"])), "take {a} minus {b}",
                      ("{a} - {b} = {answer}.", "We take {a} minus {b} and get {answer}.")),
    "next": Skill(lambda rng: {"x": str(rng.randrange(1000))}, lambda p: str(int(p["x"]) + 1),
                  "say the number after {x}",
                  ("The number after {x} is {answer}.", "After {x} comes {answer}.")),
}
HELD_BACK = Skill(SKILLS["sort"].draw, lambda p: " ".join(sorted(p["x"].split(), reverse=True)), "rank {x}",
                  ("From large to small, {x} becomes {answer}.",))

TEMPLATES = ("Please {task}.", "Can you {task}?", "I want you to {task}.", "Your task: {task}.", "Now {task}.",
             "Quick, {task}!", "A friend asked me to {task}. What is the answer?", "Could you {task} for me?")


def is_unseen_pair(group: str, template: int) -> bool:
    """Whether this (verb, template) pair is never in SFT data; each verb and template is, three times in four."""
    return (sorted([*SKILLS, *FACT_PROSE]).index(group) + template) % 4 == 0


def split_of_problem(skill: Skill, problem: dict) -> str:
    """By its task, two numbers in rising order: to have seen 3 + 8 tells of 8 + 3, so both are of one split."""
    if "a" in problem:
        problem = dict(zip("ab", sorted(problem.values(), key=int), strict=True))
    return split_of(skill.task.format(**problem))


def draw_problem(skill: Skill, rng, split: str) -> dict:
    while True:
        problem = skill.draw(rng)
        if split_of_problem(skill, problem) == split:
            return problem


# ----------------------------------------------------------------------------------------------------------------------
# Multi-step sums


def draw_sum(rng, split: str, terms: int = 0) -> list[int]:
    """3 to 5 numbers; in the train split no step may show an addition that the skill `add` keeps for its test."""
    while True:
        numbers = [rng.randint(2, 19) for _ in range(terms or rng.randint(3, 5))]
        if split_of("sum " + " ".join(map(str, numbers))) != split:
            continue
        totals = [sum(numbers[: i + 1]) for i in range(len(numbers))]
        steps = ({"a": str(a), "b": str(b)} for a, b in zip(totals, numbers[1:], strict=False))
        if split == "test" or all(split_of_problem(SKILLS["add"], step) == "train" for step in steps):
            return numbers


def working(numbers: list[int]) -> str:
    """'4 + 9 = 13. 13 + 6 = 19.'"""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} + {number} = {total + number}.")
        total += number
    return " ".join(lines)


REASONING_SHARE = 0.3  # of the worked problems that show their working; RL finds out that it pays


def sum_prose(rng) -> str:
    numbers = draw_sum(rng, "train")
    question = "The sum of " + " + ".join(map(str, numbers))
    if rng.random() < REASONING_SHARE:
        return f"{question} step by step: {working(numbers)} So it is {sum(numbers)}."
    return f"{question} is {sum(numbers)}."


# ----------------------------------------------------------------------------------------------------------------------
# Reading, scenes, weather

STRANGERS = "Arlo Bram Cleo Dina Esra Faro Gus Hild Inez Jude Kira Lars".split()  # of whom nothing is known beforehand
FAR_TOWNS = "Avon Brest Cork Dover Essen Ghent Hull Lodz".split()  # and of these
VALUES = {"home": TOWNS, "job": JOBS, "pet": PETS, "food": FOODS, "river": RIVERS, "product": GOODS}


def draw_passage(rng, split: str, count: int = 0) -> dict:
    """`count` (or 2 or 3) strangers or far towns, the same attribute of each, and one of them to ask about."""
    while True:
        attribute = rng.choice(sorted(VALUES))
        names = rng.sample(FAR_TOWNS if attribute in ("river", "product") else STRANGERS, count or rng.randint(2, 3))
        facts = list(zip(names, rng.sample(VALUES[attribute], len(names)), strict=True))
        name, value = rng.choice(facts)
        if split_of(f"{attribute} {facts}") == split:
            passage = " ".join(rng.choice(FACT_PROSE[attribute][:3]).format(n=who, N=who, x=x) for who, x in facts)
            return {"passage": passage, "name": name, "attribute": attribute, "value": value, "facts": facts}


COLOURS = "red green blue yellow black white".split()
SHAPES = "circle square triangle star".split()
NUMBERS = "one two three four".split()
SIZES = "small large".split()
PLACES = (("left of", "right of"), ("above", "below"))


def noun(count: int, colour: str, shape: str, size: str = "") -> str:
    """noun(2, 'red', 'circle') -> 'two red circles'"""
    return " ".join(filter(None, [NUMBERS[count - 1], size, colour, shape + "s" * (count > 1)]))


def draw_scene(rng, split: str) -> dict:
    """A caption, a question and its answer; kind is colour, shape, count, position, existence or size.

    The split is by the two things and the question, however and in whatever order the caption tells of them.
    """
    while True:
        kind = rng.choice(("colour", "shape", "count", "position", "existence", "size"))
        (c1, c2, c3), (s1, s2, s3) = rng.sample(COLOURS, 3), rng.sample(SHAPES, 3)
        n1, n2 = (rng.randint(1, 4), rng.randint(1, 4)) if kind == "count" else (1, 1)
        z1, z2 = rng.sample(SIZES, 2) if kind == "size" else ("", "")
        things = noun(n1, c1, s1, z1), noun(n2, c2, s2, z2)
        form = rng.choice(("There is {} and {}.", "The picture shows {} and {}.", "We see {} and {}."))
        caption = form.format(*shuffled(rng, things))
        if kind == "colour":
            question, answer = f"What colour is the {s2}?", c2
        elif kind == "shape":
            question, answer = f"What shape is {c1}?", s1
        elif kind == "count":
            question, answer = f"How many {s1}s are there?", NUMBERS[n1 - 1]
        elif kind == "size":
            question, answer = f"What size is the {s1}?", z1
        elif kind == "position":
            there, back = rng.choice(PLACES)[:: rng.choice((1, -1))]
            caption = f"The {c1} {s1} is {there} the {c2} {s2}."
            asked = ((f"Where is the {s1}?", f"{there} the {s2}"), (f"Where is the {s2}?", f"{back} the {s1}"))
            question, answer = rng.choice(asked)
        else:
            asked = ((f"{c1} {s1}", "yes"), (f"{c3} {s3}", "no"), (f"{c2} {s1}", "no"))
            what, answer = rng.choice(asked)
            question = f"Is there a {what}?"
        if split_of(f"{sorted(things)} {question}") == split:
            return {"caption": caption, "question": question, "answer": answer, "kind": kind}


WEATHER = "sun rain snow wind fog hail frost storm".split()


def _weather_chain() -> dict[tuple[str, str], list[float]]:
    """P(today | yesterday, the day before): a second-order Markov chain with sharp and flat rows."""
    rng, chain = rng_for("weather chain"), {}
    for before in WEATHER:
        for yesterday in WEATHER:
            weights = [rng.gammavariate(0.4, 1.0) + 0.01 for _ in WEATHER]
            chain[before, yesterday] = [w / sum(weights) for w in weights]
    return chain


WEATHER_CHAIN = _weather_chain()


def weather_entropy() -> float:
    """Entropy rate of the weather in bits per day: no model can predict a day better than this on average."""
    states = list(WEATHER_CHAIN)
    share = dict.fromkeys(states, 1 / len(states))
    for _ in range(500):  # power iteration to the stationary distribution over (before, yesterday)
        new = dict.fromkeys(states, 0.0)
        for (before, yesterday), p in share.items():
            for today, q in zip(WEATHER, WEATHER_CHAIN[before, yesterday], strict=True):
                new[yesterday, today] += p * q
        share = new
    return sum(p * -sum(q * math.log2(q) for q in WEATHER_CHAIN[state]) for state, p in share.items())


def weather_log(rng, days: int = 30) -> str:
    log = rng.sample(WEATHER, 2)
    while len(log) < days:
        log += rng.choices(WEATHER, WEATHER_CHAIN[log[-2], log[-1]])
    return "Weather: " + " ".join(log)


def code_length(log: str) -> float:
    """Bits that the chain itself, which wrote this weather log, needs for it; its length is known."""
    days = log.split()[1:]
    bits = math.log2(len(WEATHER)) + math.log2(len(WEATHER) - 1)  # the first two are any two that differ
    for before, yesterday, today in zip(days, days[1:], days[2:], strict=False):
        bits -= math.log2(WEATHER_CHAIN[before, yesterday][WEATHER.index(today)])
    return bits


# ----------------------------------------------------------------------------------------------------------------------
# Base text: running prose, nothing masked


def skill_prose(rng) -> str:
    """Three solved problems, mostly about the same operands: what comes back can be copied, which teaches to copy."""
    problems = solved(rng, 0.2)
    return " ".join(rng.choice(skill.prose).format(answer=skill.solve(p), **p) for skill, p in problems)


def worksheet(rng) -> str:
    """Four tasks, each with its answer on a line of its own, all in one of the forms of WORKSHEETS."""
    form = rng.choice(WORKSHEETS)
    return "\n".join(as_task(form, skill, problem) for skill, problem in solved(rng, 0.7, 4))


WORKSHEETS = (  # what stands between a task and its answer is of many lengths, so that no position is learned by heart
    "Task: {task}.\n{answer}", "Task: {task}.\nAnswer: {answer}", "We have to {task} now.\nHere it is:\n{answer}",
    "He said: {task}! She said:\n{answer}", "To do: {task}, as well as we can.\nDone:\n{answer}",
    "Let us {task} and then look what comes out of it. The answer is this one:\n{answer}")


def as_task(form: str, skill: Skill, problem: dict) -> str:
    return form.format(task=skill.task.format(**problem), answer=skill.solve(problem))


def solved(rng, new: float, count: int = 3) -> list[tuple[Skill, dict]]:
    """`count` problems, each on new operands with probability `new`, else on those of the one before."""
    found, problem = [], {}
    while len(found) < count:
        name = rng.choice(SKILL_MIX)
        if not problem or rng.random() < new:
            problem = draw_problem(SKILLS[name], rng, "train")
        if fits(name, problem) and split_of_problem(SKILLS[name], problem) == "train":
            found.append((SKILLS[name], problem))
    return found


def fits(name: str, problem: dict) -> bool:
    """Whether the operands of `problem` are such as skill `name` takes."""
    if name in ("larger", "smaller"):
        return "a" in problem
    if name in ("add", "subtract"):
        a, b = int(problem.get("a", 0)), int(problem.get("b", 99))
        return b < 20 and (b <= a if name == "subtract" else a < 80)
    items = problem.get("x", "").split()
    if name == "next":
        return len(items) == 1
    return len(items) > 1 and (name != "sort" or items[0].isdigit())


WEIGHTS = {"larger": 3, "smaller": 3, "add": 2, "subtract": 2, "next": 3, "sort": 3, "reverse": 3}  # others 1
SKILL_MIX = [name for name in SKILLS for _ in range(WEIGHTS.get(name, 1))]


def equations(rng) -> str:
    """'37 + 8 = 45. 45 - 9 = 36.' or the same as tasks: five steps, each from where the one before arrived."""
    form = rng.choice(WORKSHEETS) if rng.random() < 0.5 else ""
    total, steps = rng.randrange(100), []
    while len(steps) < 5:
        name = rng.choice(("add", "subtract"))
        skill, problem = SKILLS[name], {"a": str(total), "b": str(rng.randrange(20))}
        if fits(name, problem) and split_of_problem(skill, problem) == "train":
            total = skill.solve(problem)
            steps.append(as_task(form, skill, problem) if form else skill.prose[0].format(answer=total, **problem))
    return ("\n" if form else " ").join(steps)


def song(rng) -> str:
    """A line of words or digits, sung again and again: nothing but its beginning can be foreseen, then all of it."""
    line = " ".join(rng.choice(rng.choice((WORDS, "0123456789"))) for _ in range(rng.randint(3, 8)))
    return f"Sing: {line}, {line}, {line}." if rng.random() < 0.5 else f"{line}\n{line}\n{line}"


def reading_prose(rng) -> str:
    """A passage about strangers, and all that it says once more in other words or as answers."""
    item = draw_passage(rng, "train", rng.randint(2, 4))
    attribute, facts = item["attribute"], shuffled(rng, item["facts"])
    answers = [FACT_ANSWER[attribute].format(N=name, x=value) for name, value in facts]
    if rng.random() < 0.5:
        return " ".join([item["passage"], *answers])
    asked = (f"What is the {attribute} of {name}?\n{said}" for (name, _), said in zip(facts, answers, strict=True))
    return "\n".join([item["passage"], *asked])


def scene_prose(rng) -> str:
    scene = draw_scene(rng, "train")
    form = rng.choice(("{caption} {question} {answer}.", "{caption} {question}\n{answer}"))
    return form.format(**scene)


def _letter(rng) -> str:
    from data.manners import letter  # manners.py builds on this file

    return letter(rng)


BASE_MIX: dict[str, tuple[float, Callable]] = {  # part: (share of the documents, maker)
    "facts": (0.1, biography),
    "skills": (0.15, skill_prose),
    "worksheets": (0.25, worksheet),
    "equations": (0.17, equations),
    "songs": (0.05, song),
    "sums": (0.05, sum_prose),
    "reading": (0.06, reading_prose),
    "scenes": (0.06, scene_prose),
    "weather": (0.02, weather_log),
    "letters": (0.09, _letter),
}


def base_documents(count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents of running text, in the shares of BASE_MIX."""
    parts, shares = list(BASE_MIX), [share for share, _ in BASE_MIX.values()]
    for i in range(count):
        rng = rng_for("base", seed, i)
        yield BASE_MIX[rng.choices(parts, shares)[0]][1](rng)


def cloze(part: str, rng) -> dict:
    """A test problem in the base model's own form, of a skill or 'facts': {'prompt': up to the answer, 'answer'}."""
    if part == "facts":
        name = rng.choice(TEST_ENTITIES)
        attribute = rng.choice(sorted(FACTS[name]))
        prompt = FACT_ANSWER[attribute].split("{x}")[0].rstrip().format(N=name)
        return {"prompt": prompt, "answer": FACTS[name][attribute], "part": part}
    skill = SKILLS[part]
    problem = draw_problem(skill, rng, "test")
    template = skill.prose[-1] if part not in ("add", "subtract") else skill.prose[0]
    prompt = template.split("{answer}")[0].rstrip().format(**problem)
    return {"prompt": prompt, "answer": skill.solve(problem), "part": part}


# ----------------------------------------------------------------------------------------------------------------------
# Instructions: conversations for SFT and its test


def exchange(part: str, rng, split: str, *, unseen: bool = False) -> dict:
    """One question and its answer: {'messages', 'part', 'answer'}.

    `split` picks operands (skills, sums, reading, scenes) or entities (facts); `unseen` asks for a pair of verb and
    template that SFT never shows.
    """
    if part in SKILLS:
        skill = SKILLS[part]
        problem = draw_problem(skill, rng, split)
        template = rng.choice([i for i in range(len(TEMPLATES)) if is_unseen_pair(part, i) == unseen])
        return _ask(part, TEMPLATES[template].format(task=skill.task.format(**problem)), skill.solve(problem))
    if part == "facts":
        known = TEST_ENTITIES if split == "test" else SFT_ENTITIES
        of_town = rng.random() < 0.4
        name = rng.choice([name for name in known if (name in TOWNS) == of_town])
        attribute = rng.choice(sorted(FACTS[name]))
        template = rng.choice([i for i in range(len(FACT_QUESTIONS)) if is_unseen_pair(attribute, i) == unseen])
        return _ask(part, FACT_QUESTIONS[template].format(a=attribute, N=name),
                    FACT_ANSWER[attribute].format(N=name, x=FACTS[name][attribute]))
    if part == "reading":
        item = draw_passage(rng, split)
        return _ask(part, f"{item['passage']} What is the {item['attribute']} of {item['name']}?",
                    FACT_ANSWER[item["attribute"]].format(N=item["name"], x=item["value"]))
    if part == "scenes":
        scene = draw_scene(rng, split)
        return _ask(part, f"{scene['caption']} {scene['question']}", scene["answer"])
    if part in ("steps", "sums"):  # steps: asked for the working. sums: it is shown by chance
        numbers = draw_sum(rng, split)
        question = "What is " + " + ".join(map(str, numbers)) + "?"
        show = part == "steps" or rng.random() < REASONING_SHARE
        return _ask(part, question + " Show your steps." * (part == "steps"),
                    f"<think>{working(numbers) * show}</think>{sum(numbers)}")  # an empty block: without reasoning
    if part == "calculator":
        while True:
            a, b = rng.randint(12, 999), rng.randint(3, 99)
            if split_of(f"{max(a, b)} * {min(a, b)}") == split:
                break
        row = _ask(part, f"What is {a} * {b}?", str(a * b))
        if rng.random() < 0.5:
            row["messages"][1:] = [{"role": "assistant", "content": f"<tool>{a} * {b}</tool>"},
                                   {"role": "tool", "content": str(a * b)},
                                   {"role": "assistant", "content": str(a * b)}]
        return row
    from data import manners

    return manners.exchange(part, rng, split)


def _ask(part, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "part": part, "answer": answer}


SFT_MIX = {
    "subtract": 0.07, "add": 0.06, "larger": 0.04, "smaller": 0.05, "sort": 0.06, "next": 0.05, "reverse": 0.07,
    "repeat": 0.025, "first": 0.025, "last": 0.025, "count": 0.03, "facts": 0.09, "reading": 0.07, "scenes": 0.06,
    "steps": 0.1, "sums": 0.05, "judge": 0.06, "manners": 0.05, "calculator": 0.015,
}


def sft_rows(count: int, seed: int = 0, mix: dict[str, float] = SFT_MIX) -> Iterator[dict]:
    """`count` conversations of one or two exchanges."""
    for i in range(count):
        rng = rng_for("sft", seed, i)
        first, second = (exchange(part, rng, "train") for part in rng.choices(list(mix), mix.values(), k=2))
        yield {"messages": first["messages"] + second["messages"] * (rng.random() < 0.15), "part": first["part"]}


TEST_PARTS = (*SKILLS, "facts", "steps")  # what a fine-tuned model is judged by


def sft_test(per_part: int, seed: int = 0, *, unseen: bool = False) -> list[dict]:
    """Held-out questions: new operands, entities never asked about; with `unseen`, and of facts, only unseen pairs."""
    parts = [*SKILLS, "facts"] if unseen else TEST_PARTS
    return [exchange(part, rng_for("test", seed, part, i, unseen), "test", unseen=unseen or part == "facts")
            for part in parts for i in range(per_part)]


# ----------------------------------------------------------------------------------------------------------------------
# Checking: parse, never evaluate


def final_answer(completion: str) -> str:
    """What stands after the reasoning; '' when a reasoning block is opened and not closed."""
    answer = completion.rsplit("</think>", 1)[-1].strip()
    return "" if "<think>" in answer else answer


def is_correct(completion: str, answer: str) -> bool:
    """Exact match of the final answer, reasoning not compared."""
    return final_answer(completion) == final_answer(answer)


_CALL = re.compile(r"([0-9]{1,6}) ([+*-]) ([0-9]{1,6})", re.ASCII)


def calculator(expression: str) -> str:
    """'12 * 34' -> '408'; anything but two short whole numbers and one of + - * gives 'error'."""
    call = _CALL.fullmatch(expression.strip())
    if not call:
        return "error"
    a, b = int(call[1]), int(call[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[call[2]])


# ----------------------------------------------------------------------------------------------------------------------


def tokenizer_text(documents: int = 30_000) -> str:
    """Base text and conversations, for training the tokenizer."""
    rows = (message["content"] for row in sft_rows(documents // 2, seed=-1) for message in row["messages"])
    return "\n".join([*base_documents(documents, seed=-1), *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--show", action="store_true", help="print samples of every part (the default)")
    parser.add_argument("--write", metavar="DIR", help="write base.jsonl, sft.jsonl and test.jsonl into DIR")
    parser.add_argument("--rows", type=int, default=1000, help="rows a file, of the test rounded up (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (default 0)")
    args = parser.parse_args()
    if args.rows < 0:
        parser.error(f"--rows {args.rows}: a whole number of at least 0 is expected")
    if args.write:
        out = Path(args.write)
        files = {"base": ({"text": text} for text in base_documents(args.rows, args.seed)),
                 "sft": sft_rows(args.rows, args.seed),
                 "test": sft_test(math.ceil(args.rows / len(TEST_PARTS)), args.seed)}
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, rows in files.items():
                (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                print(f"wrote {out / name}.jsonl")
        except OSError as error:
            parser.error(f"--write {out}: {error.strerror}")
        return
    print("BASE TEXT (nothing masked)")
    for part, (share, make) in BASE_MIX.items():
        print(f"\n  {part}, {share:.0%} of the documents")
        for i in range(3):
            print("    " + make(rng_for("show", args.seed, part, i)))
    print(f"\n  the weather's entropy is {weather_entropy():.3f} bits a day of at most {math.log2(len(WEATHER)):.0f}")
    print("\nCONVERSATIONS")
    for part in SFT_MIX:
        print(f"\n  {part}, {SFT_MIX[part]:.1%} of the rows")
        for i in range(2):
            messages = exchange(part, rng_for("show", args.seed, part, i), "train")["messages"]
            print("    " + "  ->  ".join(message["content"] for message in messages))
    print("\nTEST: unseen (verb, template) pairs")
    for row in sft_test(1, args.seed, unseen=True):
        print("    " + "  ->  ".join(message["content"] for message in row["messages"]))


if __name__ == "__main__":
    main()

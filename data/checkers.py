"""Rewards that a rule gives: what an answer says is parsed and compared, never evaluated.

Each is a function reward(prompt, completion, row) -> float of the text of both and the row of the data that they belong
to; `row["answer"]` is the right answer. Reasoning, up to the last </think>, is not looked at; reasoning that is opened
and never closed is no answer.

    exact      1 if the answer is, letter by letter, the right one
    number     1 if the answer ends with the right number: after ####, or else in the last sentence, and there only one
    boxed      1 if the one thing in \\boxed{...} is the right one, as text without spaces or as a number
    reft       1 the right number, 0.1 another number, 0 none (ReFT, arXiv 2401.08967, section 3.2)
    format     1 if the completion is <think>reasoning</think>answer and nothing else (DeepSeek-R1, 2501.12948, 2.2.2)
    FILE.py:function    your own; the row has all the columns of its file

A minus is - or U+2212, and a space may follow it. Rules are there to be gamed: a list of guesses, a second \\boxed,
digits of other scripts, 1e999 and text that copies the question's markup get nothing, and no text takes more than a
pass over it.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

from data.formats import UserError
from data.world import final_answer

Reward = Callable[[str, str, dict], float]
_NUMBER = re.compile(r"(?<![\w.,])(?:[-+\u2212]\s*)?"
                     r"\$?([0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{1,20})(\.[0-9]{1,20})?(?![\w,]|\.\w)")  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def number_in(text: str) -> Fraction | None:
    """The only number in `text`, exactly; None if there is none, another one, or something that only looks like one.

    >>> number_in("So it is $1,234.50."), number_in("- 5"), number_in("4 or 5"), number_in("1e9")
    (Fraction(2469, 2), Fraction(-5, 1), None, None)
    """
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or any(c.isnumeric() for c in text[: found[0].start()] + text[found[0].end() :]):
        return None
    sign = -1 if found[0][0][0] in "-\u2212" else 1
    return sign * Fraction(found[0][1].replace(",", "") + (found[0][2] or ""))


def last_number(completion: str) -> Fraction | None:
    """The number that a completion ends with: behind the last ####, or in the last sentence behind the last =.

    >>> last_number("4 + 9 = 13. 13 + 6 = 19. So it is 19.")
    Fraction(19, 1)
    """
    text = final_answer(completion)
    if "####" in text:
        return number_in(text.rsplit("####", 1)[1])
    sentences = [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]
    return number_in(sentences[-1].rsplit("=", 1)[-1]) if sentences else None


def last_boxed(completion: str) -> str | None:
    r"""What stands in the one \boxed{...} of a completion, braces balanced; None if there is none or a second one.

    >>> last_boxed(r"So \boxed{\frac{1}{2}}."), last_boxed(r"\boxed{1} or \boxed{2}"), last_boxed(r"\boxed{1")
    ('\\frac{1}{2}', None, None)
    """
    text = final_answer(completion)
    if text.count("\\boxed{") != 1:
        return None
    rest, depth = text.split("\\boxed{", 1)[1], 1
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[:i]
    return None


def exact(prompt: str, completion: str, row: dict) -> float:
    said = final_answer(completion)
    return float(said != "" and said == final_answer(row["answer"]))


def number(prompt: str, completion: str, row: dict) -> float:
    said = last_number(completion)
    return float(said is not None and said == last_number(row["answer"]))


def reft(prompt: str, completion: str, row: dict) -> float:
    return number(prompt, completion, row) or 0.1 * (last_number(completion) is not None)


def boxed(prompt: str, completion: str, row: dict) -> float:
    said, gold = last_boxed(completion), row["answer"]
    if said is None:
        return 0.0
    gold = last_boxed(gold) or gold.rpartition("####")[2]
    said, gold = (re.sub(r"\s|\\[!,;: ]|\$", "", text) for text in (said, gold))
    same_number = number_in(said) is not None and number_in(said) == number_in(gold)
    return float(said != "" and (said == gold or same_number))


def format(prompt: str, completion: str, row: dict) -> float:
    reasoning, closed, answer = completion.partition("</think>")
    tags = sum(completion.count(tag) for tag in ("<think>", "</think>"))
    well_formed = closed and tags == 2 and reasoning.startswith("<think>") and reasoning[7:].strip() and answer.strip()
    return float(bool(well_formed))


CHECKERS = {"exact": exact, "number": number, "reft": reft, "boxed": boxed, "format": format}
NEED_ANSWER = ("exact", "number", "reft", "boxed")


def check_answers(name: str, rows: list[dict]) -> None:
    """UserError unless checker `name` finds the right answer of every row right, else nothing could be rewarded."""
    for i, row in enumerate(rows, start=1):
        gold = row["answer"]
        said = gold
        if name == "boxed" and not last_boxed(gold):  # then it is the answer itself, or stands behind ####
            if "####" not in gold and "\\begin" not in gold and "\n" in gold.strip():
                raise UserError(f"--reward boxed: row {i}: the answer has several lines: what belongs into the box is "
                                "expected, alone or behind ####")  # fmt: skip
            said = f"\\boxed{{{gold.rpartition('####')[2]}}}"
        if CHECKERS[name]("", said, row) != 1.0:
            raise UserError(f"--reward {name}: row {i}: the answer {gold[:40]!r} is not one that it can find right")


@functools.cache  # what it computes at import or keeps from call to call is there once
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_reward(name: str) -> Reward:
    """The checker called `name`, or the function of FILE.py:function; UserError if there is none."""
    if name in CHECKERS:
        return CHECKERS[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"--reward {name}: expected {', '.join(CHECKERS)} or FILE.py:function")
    if not Path(path).exists():
        raise UserError(f"--reward {name}: there is no file {path}")
    if not callable(found := getattr(_module(path), function, None)):
        raise UserError(f"--reward {name}: {path} has no function {function}")

    def reward(prompt: str, completion: str, row: dict) -> float:
        value = found(prompt, completion, row)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"--reward {name}: expected a finite number, found {value!r}")
        return float(value)

    return reward

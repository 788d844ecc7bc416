"""Rewards that a rule gives: what an answer says is parsed and compared, never evaluated.

Each is a function reward(prompt, completion, row) -> float of the text of both and the row of the data that they belong
to; `row["answer"]` is the right answer. Reasoning, up to the last </think>, is not looked at; reasoning that is opened
and never closed is no answer.

    exact      1 if the answer is, letter by letter, the right one
    number     1 if the answer ends with the right number: after ####, or else in the last sentence, and there only one
    boxed      1 if the one thing in \\boxed{...} is the right one, as text without spaces, or both are the same number
    reft       1 the right number, 0.1 another number, 0 none (ReFT, arXiv 2401.08967, section 3.2)
    format     1 if the completion is <think>reasoning</think>answer and nothing else (DeepSeek-R1, 2501.12948, 2.2.2)
    FILE.py:function    your own; the row has all the columns of its file

A minus is - or U+2212 or a hyphen or short dash of print, and a space may follow it. The number in a formula, as in
\\sqrt{2}, is not an answer. Rules are there to be gamed: a list of guesses, a second \\boxed, digits of other scripts,
1e999 and text that copies the question's markup get nothing, and no text takes more than a few passes over it.
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
_SIGNS = r"-+\u2010-\u2013\u2212\ufe63\uff0d"  # all but + are minus
_NUMBER = re.compile(rf"(?<![\w.,])(?:(?P<sign>[{_SIGNS}])\s*)?\$?(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,6}}|"
                     r"[0-9]{1,20})(?P<decimals>\.[0-9]{1,20})?(?!\w|[.,]\w)")  # fmt: skip
_UNIT = re.compile(r"(?P<unit>\\?%|\^\\circ|\^\{\\circ\}|\\(?:text|mathrm)\{[A-Za-z]{1,20}\})?\.?")  # behind a number
_MARKUP = re.compile(r"\\(?:boxed|fbox|text(?:bf|it)?|math(?:rm|bf)|emph|underline|left|right|quad|to|implies|"
                     r"therefore|[Rr]ightarrow|blacksquare|square)\b|\\(?:begin|end)\{[a-z]{1,20}\*?\}|"
                     r"\^\\circ|\^\{\\circ\}")  # fmt: skip
# what a number of a formula stands behind, what stands behind it, and what before a sign makes that a plus or minus
_BEFORE = re.compile(rf"(?:[{_SIGNS}^_/\u221a\u00b1][\s({{]*|"
                     r"\\[A-Za-z]+[\s({]*|\w\(\s*|\}\s*\{\s*|\b(?:log|ln|sqrt|sin|cos|tan|exp)\s*)$")  # fmt: skip
_BEHIND = re.compile(r"[\s)}]*(?:[\^\u221a]|\\[A-Za-z])|\s*[-+\u2212/]\s*(?:[B-HJ-Zb-z]\b|\\|\()|"
                     r"\s+\*\s+\w|\*\w|\(\w*\s*[-+*/^]")  # fmt: skip
_TERM = re.compile(r"(?:(?<![A-Za-z])[A-Za-z]|[)}])(?P<gap>\s*)$")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def number_in(text: str) -> Fraction | None:
    r"""The only number in `text`, exactly; None if there is none, another one, or something that only looks like one.

    >>> [number_in(text) for text in ("So it is $1,234.50.", "- 5", "4 or 5", "1e9", r"\sqrt{2}")]
    [Fraction(2469, 2), Fraction(-5, 1), None, None, None]
    """
    text = _MARKUP.sub(" ", text)  # which may stand around a number
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, behind = text[: found[0].start()], text[found[0].end() :]
    if any(c.isnumeric() for c in before + behind) or _BEFORE.search(before) or _BEHIND.match(behind):
        return None
    term = found[0]["sign"] and _TERM.search(before)
    if term and (found[0][0][1].isspace() or not term["gap"]):  # x + 2, x+2; but (b) -2
        return None
    return _value(found[0])


def whole_number(text: str) -> tuple[Fraction, str] | None:
    r"""The number that `text`, without spaces, is and nothing else, and its unit or ""; else None.

    >>> whole_number("1,000."), whole_number(r"2\text{cm}"), whole_number(r"2\pi"), whole_number("x=2")
    ((Fraction(1000, 1), ''), (Fraction(2, 1), 'cm'), None, None)
    """
    found = _NUMBER.match(text)
    behind = found and _UNIT.fullmatch(text[found.end() :])
    return (_value(found), re.sub(r"\\text|\\mathrm|[\\^{}]", "", behind["unit"] or "")) if behind else None


def _value(found: re.Match) -> Fraction:
    sign = 1 if found["sign"] in (None, "+") else -1
    return sign * Fraction(found["whole"].replace(",", "") + (found["decimals"] or ""))


def last_number(completion: str) -> Fraction | None:
    """The number that a completion ends with: behind the last ####, or in the last sentence behind the last =.

    >>> last_number("4 + 9 = 13. 13 + 6 = 19. So it is 19.")
    Fraction(19, 1)
    """
    text = final_answer(completion)
    if "####" in text:
        return number_in(text.rsplit("####", 1)[1])
    sentences = [sentence for sentence in _SENTENCE.split(text) if any(map(str.isalnum, sentence))]
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
    said, gold = bare(said), bare(last_boxed(gold) or gold.rpartition("####")[2])
    (value, unit), (right, its_unit) = (whole_number(text) or (None, "") for text in (said, gold))
    same_number = value is not None and value == right and (unit == its_unit or "" in (unit, its_unit))
    return float(said != "" and (said == gold or same_number))


def bare(text: str) -> str:
    """`text` without spaces, thin ones too, and without dollars, of money and of formulas."""
    return re.sub(r"\s|(?<!\\)\\[!,;: ]|\\?\$", "", text)


def format(prompt: str, completion: str, row: dict) -> float:
    reasoning, closed, answer = completion.partition("</think>")
    tags = sum(completion.count(tag) for tag in ("<think>", "</think>"))
    well_formed = closed and tags == 2 and reasoning.startswith("<think>") and reasoning[7:].strip() and answer.strip()
    return float(bool(well_formed))


def vote(completion: str) -> str:
    r"""What a completion comes to, as --reward majority counts it: its last \boxed, else the number that it ends with,
    else all that is said behind #### or the reasoning; '' is no vote. 18, 18.0 and $18 are one; fractions are text.

    >>> vote("2 * 9 = 18. #### 18"), vote(r"So it is \boxed{18.0}."), vote("<think>2 * 9</think>It is $18."), vote("no")
    ('18', '18', '18', 'no')
    """
    text = final_answer(completion)
    if "\\boxed{" in text:
        said = bare(last_boxed("\\boxed{" + text.rsplit("\\boxed{", 1)[1]) or "")
        value, unit = whole_number(said) or (None, "")
        return said if value is None else f"{value}{unit}"
    value = last_number(completion)
    return text.rpartition("####")[2].strip() if value is None else str(value)


def same_vote(prompt: str, completion: str, row: dict) -> float:
    """1 if a completion would vote as the right answer would."""
    said = vote(completion)
    return float(said != "" and said == vote(row["answer"]))


CHECKERS = {"exact": exact, "number": number, "reft": reft, "boxed": boxed, "format": format}
NEED_ANSWER = ("exact", "number", "reft", "boxed")


def check_answers(name: str, rows: list[dict], path: str) -> None:
    """UserError unless checker `name` finds the right answer of every row of `path` right: none could be paid."""
    for i, row in enumerate(rows, start=1):
        gold, where = row["answer"], f"--reward {name}: {path}:{i}"
        said = gold
        if name == "boxed" and not last_boxed(gold):  # then it is the answer itself, or stands behind ####
            if "####" not in gold and "\\begin" not in gold and "\n" in gold.strip():
                raise UserError(f"{where}: the answer has several lines: what belongs into the box is expected, alone "
                                "or behind ####")  # fmt: skip
            said = f"\\boxed{{{gold.rpartition('####')[2]}}}"
        if CHECKERS[name]("", said, row) != 1.0:
            raise UserError(f"{where}: the answer {gold[:40]!r} is not one that it can find right")


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

"""Public data sets as JSONL files of the formats in data/formats.py. Nothing here needs them.

    gsm8k          7473 + 1319 problems of school mathematics, with solutions    prompt, completion, answer
    math500        500 problems of competitions                                  prompt, completion, answer
    dolly          15000 instructions, written by people                         prompt, completion
    hh             44000 + 2400 conversations with a better and a worse answer   prompt, chosen, rejected
    ultrafeedback  800 questions with four answers, each graded                  prompt, completions, scores

Read each data set's licence before you publish what was trained on it. What comes must have the SHA-256 noted here;
a file is there as a whole or not at all. The few rows that fit no format (an empty answer) are left out and counted.

    python -m data.download gsm8k                writes out/data/gsm8k_train.jsonl and gsm8k_test.jsonl
    python sft.py --model DIR --data out/data/gsm8k_train.jsonl
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from tqdm import tqdm

from data import formats
from data.formats import UserError

HUB, GITHUB = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
TIMEOUT = 30.0  # seconds without a byte
LIMIT = 256 * 2**20  # bytes of a file, also once unpacked: nobody's mistake may fill a disk
TOLERATED = 0.01  # share of the rows that may be left out: beyond it the file is not the one that this was written for


class Source(NamedTuple):
    file: str  # that is written
    url: str  # names a commit, which cannot change, rather than a branch
    sha256: str | None  # of what comes, still packed; None if it could not be established
    schema: str  # of data/formats.py, which the rows must fit
    least: int  # rows: fewer are not the whole file
    convert: Callable[[dict], dict]  # their row to ours; an error means that it is another


def from_gsm8k(row: dict) -> dict:
    """The number after ####, without commas, and the solution without the marks <<1+1=2>> of a calculator.

    >>> from_gsm8k({"question": "1+1000?", "answer": "It is <<1+1000=1001>>1001.\\n#### 1,001"})
    {'prompt': '1+1000?', 'completion': 'It is 1001.\\n#### 1001', 'answer': '1001'}
    """
    solution, answer = row["answer"].rsplit("\n####", 1)
    answer = answer.strip().replace(",", "")
    return {
        "prompt": row["question"].strip(),
        "completion": re.sub(r"<<[^<>]*>>", "", solution).strip() + f"\n#### {answer}",
        "answer": answer,
    }


def from_math(row: dict) -> dict:
    return {"prompt": row["problem"], "completion": row["solution"], "answer": row["answer"]}


def from_dolly(row: dict) -> dict:
    prompt = "\n\n".join(part.strip() for part in (row["instruction"], row["context"]) if part.strip())
    return {"prompt": prompt, "completion": row["response"].strip()}


def from_hh(row: dict) -> dict:
    """Two dialogues that part with the last answer: what they share is the prompt."""
    chosen, rejected = (_turns(row[name]) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the two dialogues differ before their last answers")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _turns(dialogue: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)  # before the first turn, a name, what is said, a name, ...
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[name], "content": said.strip()}
             for name, said in zip(parts[1::2], parts[2::2], strict=True)]  # fmt: skip
    if parts[0].strip() or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError("not a dialogue that ends with the assistant")
    if not all(turn["content"] for turn in turns):
        raise ValueError("a turn in which nothing is said")
    return turns


def from_ultrafeedback(row: dict) -> dict:
    answers = [(answer["response"], answer["overall_score"]) for answer in row["completions"]]
    texts, scores = zip(*(pair for pair in answers if pair[0]), strict=True)
    return {"prompt": row["instruction"], "completions": list(texts), "scores": [float(score) for score in scores]}


GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
MATH500 = f"{HUB}/HuggingFaceH4/MATH-500/resolve/6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
DOLLY = f"{HUB}/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
HH = f"{HUB}/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/helpful-base"
# of the end of 2023: before, the worst answers had the best overall_score by mistake
ULTRAFEEDBACK = f"{HUB}/openbmb/UltraFeedback/resolve/40b436560ca83a8dba36114c22ab3c66e43f6d5e"
SOURCES = {
    "gsm8k": [
        Source("gsm8k_train.jsonl", f"{GSM8K}/train.jsonl",
               "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "answer", 7473, from_gsm8k),
        Source("gsm8k_test.jsonl", f"{GSM8K}/test.jsonl",
               "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", "answer", 1319, from_gsm8k),
    ],
    "math500": [
        Source("math500.jsonl", f"{MATH500}/test.jsonl",
               "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", "answer", 500, from_math),
    ],
    "dolly": [
        Source("dolly.jsonl", f"{DOLLY}/databricks-dolly-15k.jsonl",
               "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec", "completion", 15011, from_dolly),
    ],
    "hh": [
        Source("hh_train.jsonl", f"{HH}/train.jsonl.gz",
               "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4", "preference", 43835, from_hh),
        Source("hh_test.jsonl", f"{HH}/test.jsonl.gz",
               "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b", "preference", 2354, from_hh),
    ],
    "ultrafeedback": [
        Source("ultrafeedback.jsonl", f"{ULTRAFEEDBACK}/truthful_qa.jsonl", None, "scores", 811, from_ultrafeedback),
    ],
}  # fmt: skip


def fetch(url: str, sha256: str | None = None) -> bytes:
    """What is at `url`, unpacked if its name ends with .gz.

    UserError if it cannot be had whole, is beyond LIMIT, or (before anything reads it) has another `sha256`.
    """
    try:
        # a proxy that compresses on its own would make the length wrong
        with urlopen(Request(url, headers={"Accept-Encoding": "identity"}), timeout=TIMEOUT) as answer:
            said = answer.headers.get("Content-Length")
            length = int(said) if said and said.isdigit() else None
            bar = tqdm(total=length, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None)
            content = io.BytesIO()
            with bar:
                while part := answer.read(2**16):
                    content.write(part)
                    bar.update(len(part))
                    if content.tell() > LIMIT:
                        raise UserError(f"{url}: more than {LIMIT} bytes")
        data = content.getvalue()
        if length is not None and len(data) != length:
            raise UserError(f"{url}: {len(data)} bytes came of {length}")
        if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise UserError(f"{url}: not the file expected, its SHA-256 is {found}")
        if url.endswith(".gz"):
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(LIMIT + 1)
    except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"{url}: {str(error) or type(error).__name__}") from None
    if len(data) > LIMIT:
        raise UserError(f"{url}: more than {LIMIT} bytes")
    return data


def rows_of(source: Source, data: bytes) -> tuple[list[dict], list[str]]:
    """(their rows in our schema, what is wrong with each of the others); UserError if these are too many."""
    try:
        lines = data.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{source.url}: not text in UTF-8") from None
    if len(lines) < source.least:
        raise UserError(f"{source.url}: {len(lines)} lines, expected {source.least} or more")
    rows, wrong = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = source.convert(json.loads(line))
            if "" in row.values():
                raise ValueError("an empty field")
            rows.append(row)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            wrong.append(f"{number}: not the row expected ({type(error).__name__}: {error})")
    if len(wrong) > TOLERATED * len(lines):
        raise UserError(f"{source.url}:{wrong[0]}, one of {len(wrong)} in {len(lines)}")
    return rows, wrong


def download(source: Source, folder: Path) -> Path:
    """Write the rows of `source` to its file in `folder`, by way of a temporary one that is checked and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, wrong = rows_of(source, fetch(source.url, source.sha256))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        made = Path(temporary, source.file)
        made.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # which fields this schema ignores is no news here
                formats.read_jsonl(made, source.schema)
        except UserError as error:
            raise UserError(str(error).replace(str(made), f"{source.url}, made into rows")) from None
        os.replace(made, folder / source.file)
    left_out = f"; left out {len(wrong)}, the first is line {wrong[0]}" if wrong else ""
    print(f"wrote {folder / source.file}: {len(rows)} rows{left_out}")
    return folder / source.file


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("name", choices=SOURCES, help="which data set")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("out/data"),
                        help="folder of the files (default: out/data)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    args = parser.parse_args(argv)
    for source in SOURCES[args.name]:
        path = args.out / source.file
        if path.exists() and not args.force:
            print(f"{path} is there already; --force fetches it again")
        else:
            download(source, args.out)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)

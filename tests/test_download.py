"""Downloads are whole, checked and in our formats, or leave one line and nothing else; the network is this machine."""

import contextlib
import gzip
import hashlib
import json
import re
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import download as module
from data.download import (
    SOURCES,
    Source,
    download,
    fetch,
    from_dolly,
    from_gsm8k,
    from_hh,
    from_math,
    from_ultrafeedback,
)
from data.formats import UserError, read_jsonl, to_messages

HH = "\n\nHuman: Hi: a\n\nb?\n\nAssistant: What?\n\nHuman: c\n\nAssistant:"
THEIRS = {
    "gsm8k": {"question": "1+1000?\n", "answer": "So 1+1000=<<1+1000=1001>>1001,\nthat.\n#### 1,001"},
    "math500": {"problem": "1+1?", "solution": "So $\\boxed{2}$.", "answer": "2", "level": 1},
    "dolly": {"instruction": "Sort.", "context": "2 1\n", "response": "1 2\n", "category": "qa"},
    "hh": {"chosen": HH + " d", "rejected": HH + " e\n\nf"},
    "ultrafeedback": {"instruction": "Sort 2 1.", "completions": [{"response": "1 2", "overall_score": 9},
                      {"response": "2 1", "overall_score": 2.5}]},
}  # fmt: skip


@pytest.fixture
def site():
    """A local server: `.files[path]` is (status, headers, body), `.asked` and `.sent` the paths that came and went."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            status, headers, body = self.server.files.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                if value is not None:
                    self.send_header(name, str(value))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
                self.server.sent.append(self.path)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.sent, server.url = {}, [], [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def source(site, path: str = "/rows.jsonl", least: int = 1, schema: str = "answer", convert=from_gsm8k) -> Source:
    return Source("rows.jsonl", site.url + path, None, schema, least, convert)


def refused(made: Source, folder: Path, *words: str) -> None:
    """Nothing is written, and one line says what is wrong with which address."""
    (folder / "rows.jsonl").write_text("as it was")
    with pytest.raises(UserError) as error:
        download(made, folder)
    said = str(error.value)
    assert said.startswith(made.url) and all(word in said for word in words) and "\n" not in said, said
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
    assert (folder / "rows.jsonl").read_text() == "as it was"


# Rows


def test_gsm8k_without_the_marks_of_the_calculator():
    row = from_gsm8k(THEIRS["gsm8k"])
    assert row == {"prompt": "1+1000?", "completion": "So 1+1000=1001,\nthat.\n#### 1001", "answer": "1001"}
    for answer in ("1001", "#### 1001"):  # there is a solution before the mark
        with pytest.raises(ValueError, match="unpack"):
            from_gsm8k({"question": "1+1000?", "answer": answer})


def test_math_and_dolly():
    assert from_math(THEIRS["math500"]) == {"prompt": "1+1?", "completion": "So $\\boxed{2}$.", "answer": "2"}
    assert from_dolly(THEIRS["dolly"]) == {"prompt": "Sort.\n\n2 1", "completion": "1 2"}
    assert from_dolly({**THEIRS["dolly"], "context": " "})["prompt"] == "Sort."


def test_hh_is_split_before_the_last_answer():
    row = from_hh(THEIRS["hh"])
    said = [("user", "Hi: a\n\nb?"), ("assistant", "What?"), ("user", "c")]
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == said
    assert (row["chosen"], row["rejected"]) == ("d", "e\n\nf")
    assert to_messages(row, "rejected")[-1] == {"role": "assistant", "content": "e\n\nf"}
    nothing = HH.replace("What?", " ")
    with pytest.raises(ValueError, match="nothing is said"):
        from_hh({"chosen": nothing + " d", "rejected": nothing + " e"})
    with pytest.raises(ValueError, match="nothing is said"):
        from_hh({"chosen": HH + " d", "rejected": HH})
    for bad in (HH.replace("What", "Why") + " d", HH + " d\n\nHuman: g", "Hello" + HH + " d", "\n\nAssistant: d", ""):
        with pytest.raises(ValueError, match="dialogue"):
            from_hh({"chosen": bad, "rejected": HH + " e"})
    with pytest.raises(ValueError, match="ends with the assistant"):
        from_hh({"chosen": HH + " d\n\nHuman: g", "rejected": HH + " d\n\nHuman: h"})


def test_ultrafeedback_keeps_answers_with_their_scores():
    row = from_ultrafeedback(THEIRS["ultrafeedback"])
    assert row == {"prompt": "Sort 2 1.", "completions": ["1 2", "2 1"], "scores": [9.0, 2.5]}
    empty = {"response": "", "overall_score": 5}
    more = {**THEIRS["ultrafeedback"], "completions": [empty, *THEIRS["ultrafeedback"]["completions"]]}
    assert from_ultrafeedback(more) == row


@pytest.mark.parametrize("name", SOURCES)
def test_each_data_set_becomes_rows_of_its_schema(name, site, tmp_path, capsys):
    for made in SOURCES[name]:
        assert re.search(r"^https://.*/[0-9a-f]{40}/", made.url) and made.least > 1  # a commit, not a branch
        assert re.fullmatch("[0-9a-f]{64}", made.sha256 or "") or name == "ultrafeedback"
        body = jsonl(*[THEIRS[name]] * 3)
        path = f"/{made.file}" + ".gz" * made.url.endswith(".gz")
        sent = gzip.compress(body) if path.endswith(".gz") else body
        site.files[path] = 200, {}, sent
        here = made._replace(url=site.url + path, least=3, sha256=hashlib.sha256(sent).hexdigest())
        written = download(here, tmp_path / "new" / "folder")
        assert written == tmp_path / "new" / "folder" / made.file
        rows = read_jsonl(written, made.schema)
        assert len(rows) == 3 and rows[0].items() <= made.convert(THEIRS[name]).items()
        assert capsys.readouterr().out == f"wrote {written}: 3 rows\n"
    assert {path.name for path in written.parent.iterdir()} == {made.file for made in SOURCES[name]}


# What can go wrong


def test_rows_that_changed_are_refused_with_their_line(site, tmp_path):
    good = THEIRS["gsm8k"]
    for bad in (b"{", b"[]", b"null", b'{"question": "a"}', b'{"question": "a", "answer": 5}'):
        site.files["/rows.jsonl"] = 200, {}, jsonl(good, good) + bad + b"\n" + jsonl(good)
        refused(source(site), tmp_path, "/rows.jsonl:3: not the row expected")
    site.files["/rows.jsonl"] = 200, {}, jsonl(good) + b"\xff\n"
    refused(source(site), tmp_path, "UTF-8")


def test_rows_must_fit_the_schema(site, tmp_path):
    site.files["/rows.jsonl"] = 200, {}, jsonl(THEIRS["gsm8k"])
    refused(source(site, schema="preference"), tmp_path, "made into rows:1", "expected prompt, chosen, rejected")
    refused(source(site, convert=lambda row: {"prompt": "a", "answer": 5}), tmp_path, "answer: found 5")


def test_a_few_rows_that_do_not_fit_are_left_out_and_counted(site, tmp_path, capsys):
    row = THEIRS["dolly"]
    empty, other = {**row, "response": "\n"}, {"instruction": "Sort."}
    made = source(site, schema="completion", convert=from_dolly)
    site.files["/rows.jsonl"] = 200, {}, jsonl(row, empty, *[row] * 197, other)
    assert read_jsonl(download(made, tmp_path), "completion") == [from_dolly(row)] * 198
    said = capsys.readouterr().out
    assert "198 rows; left out 2, the first is line 2: not the row expected (ValueError: an empty field)" in said
    site.files["/rows.jsonl"] = 200, {}, jsonl(row, empty, *[row] * 196, other, empty)
    refused(made, tmp_path, "/rows.jsonl:2: not the row expected", "one of 3 in 200")
    site.files["/rows.jsonl"] = 200, {}, jsonl(empty)
    refused(made, tmp_path, "/rows.jsonl:1: not the row expected")


def test_a_file_with_too_few_rows_is_refused(site, tmp_path):
    site.files["/rows.jsonl"] = 200, {}, jsonl(*[THEIRS["gsm8k"]] * 3)
    refused(source(site, least=4), tmp_path, "3 lines, expected 4 or more")
    assert download(source(site, least=3), tmp_path)


def test_what_the_server_refuses_is_one_line(site, tmp_path):
    refused(source(site, "/no.jsonl"), tmp_path, "Not Found")
    site.files["/rows.jsonl"] = 503, {}, b"<html>\nlater</html>"
    refused(source(site), tmp_path, "Service Unavailable")
    refused(source(site)._replace(url="http://127.0.0.1:9/rows.jsonl"), tmp_path, "refused")


def test_a_file_that_breaks_off_is_refused(site, tmp_path):
    body = jsonl(*[THEIRS["gsm8k"]] * 3)
    site.files["/rows.jsonl"] = 200, {"Content-Length": len(body) + 1}, body
    refused(source(site), tmp_path, "rows.jsonl: ")
    packed = gzip.compress(body)
    for broken in (packed[:-9], body, packed[:10] + b"\xff" * 9 + packed[19:]):
        site.files["/rows.jsonl.gz"] = 200, {}, broken
        refused(source(site, "/rows.jsonl.gz"), tmp_path, "rows.jsonl.gz: ")


@pytest.mark.parametrize("path", ["/rows.jsonl", "/rows.jsonl.gz"])
def test_another_file_than_the_one_noted_is_refused(path, site, tmp_path):
    """Though it came whole and its rows fit; a packed one is not even unpacked."""
    body = jsonl(THEIRS["gsm8k"])
    right, wrong = (gzip.compress(body, level) if path.endswith("gz") else body + b"\n" * level for level in (0, 9))
    made = source(site, path)._replace(sha256=hashlib.sha256(right).hexdigest())
    for sent in (wrong, b"no gzip"):
        site.files[path] = 200, {}, sent
        refused(made, tmp_path, "not the file expected", hashlib.sha256(sent).hexdigest())
    site.files[path] = 200, {}, right
    assert len(read_jsonl(download(made, tmp_path), "answer")) == 1


@pytest.mark.parametrize("path", ["/rows.jsonl", "/rows.jsonl.gz"])
def test_a_file_beyond_the_limit_is_refused(path, site, tmp_path, monkeypatch):
    body = b" " * 1000
    site.files[path] = 200, {}, gzip.compress(body) if path.endswith("gz") else body
    monkeypatch.setattr(module, "LIMIT", 999)
    refused(source(site, path), tmp_path, "more than 999 bytes")
    monkeypatch.setattr(module, "LIMIT", 1000)
    assert fetch(site.url + path) == body


def test_a_stream_without_end_is_cut_off_at_the_limit(site, tmp_path, monkeypatch):
    site.files["/rows.jsonl"] = 200, {"Content-Length": None}, b" " * 2**25
    monkeypatch.setattr(module, "LIMIT", 2**16)
    refused(source(site), tmp_path, "more than 65536 bytes")
    assert site.asked and not site.sent


# The command line


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command(site, tmp_path, monkeypatch, capsys):
    def run(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["download.py", *map(str, argv)])
        module.main()
        return capsys.readouterr().out

    site.files["/rows.jsonl"] = 200, {}, jsonl(THEIRS["gsm8k"])
    monkeypatch.setitem(SOURCES, "gsm8k", [source(site)])
    assert run("gsm8k", "--out", tmp_path).startswith(f"wrote {tmp_path / 'rows.jsonl'}: 1 rows")
    assert "is there already" in run("gsm8k", "--out", tmp_path) and len(site.asked) == 1
    assert run("gsm8k", "--out", tmp_path, "--force").startswith("wrote") and len(site.asked) == 2
    for argv in (["gsm9k"], [], ["gsm8k", "--nope"]):
        with pytest.raises(SystemExit) as exit_:
            run(*argv)
        assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1

    (tmp_path / "taken").write_text("a file where a folder should be")
    monkeypatch.setattr(sys, "argv", ["download.py", "gsm8k", "--out", str(tmp_path / "taken")])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("data.download", run_name="__main__")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "taken" in error

"""Facts about data/pictures.py: what is drawn is there, what is asked is true and gives nothing away; image files."""

import math
import random
import struct
import sys
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import pictures, world
from data.formats import UserError
from data.pictures import KINDS, PLACES, SEEN, SHAPES, SIDE, UNSEEN, Thing, draw, exam, example, read_image, resized
from data.world import COLOURS, NUMBERS

TRAIN = [example(0, i) for i in range(840)]
EXAM = {kind: exam(kind) for kind in KINDS}


def truth(question: str, things: list[Thing]) -> str:
    """The answer, found anew from the things in the picture; "" where the question has none, or several that differ."""
    words = question.rstrip("?").split()
    plain = [t for t in things if not t.shape.isdigit()]
    if question.startswith("What colour"):
        found = [t.colour for t in plain if t.shape == words[-1]]
    elif question.startswith("What shape"):
        found = [t.shape for t in things if t.colour == words[-1]]
    elif question.startswith("What size"):
        found = [t.size for t in plain if t.shape == words[-1]]
    elif question.startswith("How many"):
        return NUMBERS[sum((t.colour, t.shape + "s") == (words[2], words[3]) for t in things) - 1]
    elif question.startswith("Is there"):
        return "yes" if any((t.colour, t.shape) == (words[3], words[4]) for t in things) else "no"
    elif question.startswith("Which digit"):
        found = [t.shape for t in things if t.shape.isdigit()]
    else:
        (t,) = things
        dx, dy = t.x - 24, t.y - 24
        assert min(abs(dx), abs(dy)) < 0.7 * max(abs(dx), abs(dy)) and max(abs(dx), abs(dy)) > 5, "not clearly so"
        found = [max((-dx, "left"), (dx, "right"), (-dy, "top"), (dy, "bottom"))[1]] * (t.shape == words[-1])
    return found[0] if len({*found}) == 1 else ""


@pytest.mark.parametrize("rows", [TRAIN, [e for rows in EXAM.values() for e in rows]], ids=["train", "exam"])
def test_what_is_asked_is_true(rows):
    for e in rows:
        assert truth(e.question, e.things) == e.answer, (e.question, e.things)
        assert len({(t.colour, t.shape, t.size) for t in e.things}) == 1 and (len(e.things) == 1 or e.kind == "count")


def test_training_asks_every_kind_and_gives_every_answer():
    assert Counter(e.kind for e in TRAIN) == {kind: 60 * pictures.ASKED.count(kind) for kind in KINDS}
    assert len({e.question.split(" ")[0] + e.question.split(" ")[1] for e in TRAIN}) == len(KINDS)
    said = {e.answer for e in TRAIN}
    assert said == {*COLOURS, *SHAPES, *NUMBERS, *PLACES, "small", "large", "yes", "no", *"0123456789"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_of_the_exam_gives_nothing_away(kind):
    """Every answer that occurs is right equally often, for each question by itself; 500 rows and more."""
    answers = defaultdict(Counter)
    for e in EXAM[kind]:
        answers[e.question][e.answer] += 1
    assert len(EXAM[kind]) >= 500
    counts = {count for counter in answers.values() for count in counter.values()}
    assert len(counts) == 1, "each question with each of its answers"
    wanted = {"colour": {5, 6}, "shape": {3, 4}, "size": {2}, "count": {4}, "existence": {2}, "position": {4},
              "digit": {10}}[kind]  # fmt: skip
    assert {len(counter) for counter in answers.values()} <= wanted
    best_blind = sum(max(counter.values()) for counter in answers.values())
    best_constant = max(sum((counter for counter in answers.values()), Counter()).values())
    assert best_blind - best_constant <= 0.03 * len(EXAM[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_of_another_row_says_nothing(kind):
    """The same question, never the same picture; of those it meets each answer is true equally often."""
    rows = EXAM[kind]
    places = {id(e.picture): i for i, e in enumerate(rows)}
    others = [rows[places[id(picture)]] for picture in pictures.exchanged(rows)]
    assert len({id(e) for e in others}) == len(rows) and all(a is not b for a, b in zip(rows, others, strict=True))
    met = defaultdict(Counter)
    for row, other in zip(rows, others, strict=True):
        assert row.question == other.question
        met[row.question, row.answer][other.answer] += 1
    for counter in met.values():
        assert len(set(counter.values())) == 1
    agree = sum(row.answer == other.answer for row, other in zip(rows, others, strict=True))
    answers = defaultdict(set)
    for row in rows:
        answers[row.question].add(row.answer)
    assert agree == pytest.approx(sum(1 / len(answers[row.question]) for row in rows))


def test_unseen_compositions_are_in_no_training_picture():
    cells = {(t.colour, t.shape) for i in range(3000) for t in things_of(i)}
    assert not cells & set(UNSEEN) and cells >= set(SEEN)
    for kind in ("colour", "shape", "count", "existence"):
        rows = exam(kind, cells=UNSEEN, repeats=2)
        shown = [e for e in rows if {(t.colour, t.shape) for t in e.things} <= set(UNSEEN)]
        assert len(shown) == sum(e.answer != "no" for e in rows) > 0
    assert len(UNSEEN) == 3 and {s for _, s in UNSEEN} < {*SHAPES} and {c for c, _ in UNSEEN} < {*COLOURS}
    assert not {f"Is there a {c} {s}?" for c, s in UNSEEN} & {e.question for e in TRAIN}


def things_of(i: int) -> list[Thing]:
    rng = world.rng_for("pictures", 0, i)
    kind, cell = pictures.ASKED[i % len(pictures.ASKED)], rng.choice(SEEN)
    return pictures.draw_scene(rng, kind, cell, rng.choice(pictures.answers_of(kind, cell)))


def test_no_is_asked_near_and_far():
    """In the exam half of the time of what is near; in training of that less often, for it is the harder half."""
    drawn = [pictures.example(0, i) for i in range(1600) if pictures.ASKED[i % 14] == "existence"]
    of_exam, of_training = ([(e.question, e.answer, e.things[0]) for e in some] for some in (EXAM["existence"], drawn))
    of_turns = [(*turn, e.things[0]) for i, e in enumerate(drawn) for turn in pictures.turns(e, i)[1:]]
    for some, far in ((of_exam, 0.5), (of_training, 1 - pictures.NEAR), (of_turns, 1 - pictures.NEAR)):
        near = Counter()
        for question, answer, t in some:
            *_, colour, shape = question.rstrip("?").split()
            if answer == "no":
                near[t.colour == colour, t.shape == shape] += 1
        assert near.keys() == {(True, False), (False, True), (False, False)}
        assert abs(near[False, False] / sum(near.values()) - far) < 0.08 and min(near.values()) > 10


def test_turns_are_true_and_balanced():
    """The question of the row is among them; the shape is asked before it is named; yes is right half of the time."""
    kinds, said = defaultdict(list), defaultdict(Counter)
    for i, e in enumerate(TRAIN):
        turns = pictures.turns(e, i)
        kinds[e.kind].append(len(turns))
        assert all(truth(question, e.things) == answer for question, answer in turns)
        assert (e.question, e.answer) == turns[0 if e.kind == "existence" else -1]
        if e.kind == "existence":
            for place, (_, answer) in enumerate(turns):
                said[place][answer] += 1
            assert {tuple(question.rstrip("?").split()[3:]) for question, _ in turns} <= {*SEEN}
        elif len(turns) == 2:
            assert turns[0][0].startswith("What shape") and e.kind not in ("shape", "digit")
    assert turns == pictures.turns(e, i) and {*kinds["existence"]} == {4}
    assert all(0.4 < counts["yes"] / counts.total() < 0.6 for counts in said.values())
    assert all(0.3 < kinds[kind].count(2) / len(kinds[kind]) < 0.7 for kind in ("colour", "size", "count", "position"))
    assert {*kinds["shape"], *kinds["digit"]} == {1}


def test_what_is_nearly_right_is_wrong_in_the_shape_alone():
    """Of pairs that are seen: what no picture shows is not taught to be wrong either."""
    for i, e in enumerate(TRAIN):
        right, t = pictures.describe(e.things), e.things[0]
        wrong = pictures.nearly(e.things, i)
        assert len({right, *wrong}) == 3 and pictures.nearly(e.things, i) == wrong
        for text in wrong:
            ((colour, shape),) = pictures.named(text)
            assert colour == t.colour and text.replace(shape, t.shape) == right
            assert shape.isdigit() == t.shape.isdigit() and (colour, shape) not in UNSEEN
    assert len({pictures.nearly(TRAIN[1].things, i)[0] for i in range(20)}) > 1


def test_exams_and_training_share_no_picture():
    seen = {e.picture.tobytes() for e in TRAIN}
    held_out = [e.picture.tobytes() for rows in (*EXAM.values(), exam("digit", "dev")) for e in rows]
    assert not seen & {*held_out} and len({*held_out}) == len(held_out) and len(seen) == len(TRAIN)
    again = exam("digit")
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(again, EXAM["digit"], strict=True))
    assert not np.array_equal(example(1, 5).picture, TRAIN[5].picture)


def test_things_lie_apart_and_within():
    for e in TRAIN:
        for i, a in enumerate(e.things):
            assert a.radius <= min(a.x, a.y, SIDE - a.x, SIDE - a.y)
            assert all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 1 for b in e.things[:i])
            assert a.radius == e.things[0].radius or len(e.things) > 1
            assert a.shape.isdigit() or (a.radius < 7) == (a.size == "small")


def test_a_thing_has_its_colour_where_it_is():
    for e in TRAIN:
        for t in e.things:
            if not t.shape.isdigit():
                there = e.picture[int(t.y), int(t.x)].astype(float)
                nearest = min(COLOURS, key=lambda c: np.abs(there - pictures.RGB[c]).sum())
                assert nearest == t.colour
        assert e.picture.dtype == np.uint8 and e.picture.shape == (SIDE, SIDE, 3)


def test_colours_are_what_they_are_called():
    hues = {c: np.array(rgb) > 127 for c, rgb in pictures.RGB.items()}
    wanted = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "black": (0, 0, 0),
              "white": (1, 1, 1)}  # fmt: skip
    assert {c: tuple(map(int, bits)) for c, bits in hues.items()} == wanted


def inside(shape: str, x: float, y: float, r: float) -> bool:
    """By the corners, with no distances."""
    if shape == "circle":
        return x * x + y * y < r * r
    if shape == "square":
        return max(abs(x), abs(y)) < 0.85 * r
    if shape == "triangle":
        corners = [(1.2 * r * math.sin(a), -1.2 * r * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    else:
        radii = [1.15 * r, 0.5 * r] * 5
        corners = [(radii[n] * math.sin(n * math.pi / 5), -radii[n] * math.cos(n * math.pi / 5)) for n in range(10)]
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            crossings += 1
    return crossings % 2 == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_what_they_are_called(shape):
    grid = np.linspace(-9.3, 9.3, 61)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    found = pictures.distance(shape, x, y, 7.0)
    for n in range(61):
        for m in range(61):
            if abs(found[n, m]) > 1e-9:
                assert (found[n, m] < 0) == inside(shape, x[n, m], y[n, m], 7.0), (x[n, m], y[n, m])
    slope = np.hypot(*np.gradient(found, grid, grid))
    assert np.median(slope) == pytest.approx(1, abs=0.03), "in pixels"


def test_digits_are_those_of_a_pocket_calculator():
    lit = {"0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd", "6": "afgedc", "7": "abc",
           "8": "abcdefg", "9": "abcdfg"}  # fmt: skip
    middles = {"a": (0, -1), "b": (0.5, -0.5), "c": (0.5, 0.5), "d": (0, 1), "e": (-0.5, 0.5), "f": (-0.5, -0.5),
               "g": (0, 0)}  # fmt: skip
    for digit, segments in lit.items():
        for name, (x, y) in middles.items():
            d = pictures.distance(digit, np.array([0.9 * 7 * x]), np.array([0.9 * 7 * y]), 7.0)[0]
            assert (d < 0) == (name in segments), (digit, name)


def test_edges_are_smooth_and_backgrounds_uneven():
    t = Thing("white", "circle", "large", 20.3, 25.8, 7.4)
    pixels = draw([t], 3).astype(float).mean(-1)
    distance = np.hypot(pictures.XS - t.x, pictures.YS - t.y) - t.radius
    assert pixels[distance < -1].min() > 215 and pixels[distance > 1].max() < 215
    edge = pixels[abs(distance) < 0.4]
    assert ((edge > 185) & (edge < 235)).any(), "between the two"
    backgrounds = [draw([], seed).astype(float) for seed in range(30)]
    assert np.std([b.mean() for b in backgrounds]) > 5 and min(b.std() for b in backgrounds) > 2
    assert not np.array_equal(draw([t], 3), draw([t], 4)) and np.array_equal(draw([t], 3), draw([t], 3))


def test_places_by_hand():
    def at(x, y):
        return pictures.place(Thing("red", "star", "small", x, y, 5))

    assert [at(8, 26), at(40, 20), at(25, 7), at(22, 41)] == [*PLACES]
    assert [at(26, 26), at(20, 28), at(8, 9), at(36, 36)] == [""] * 4, "in the middle, or in a corner"


def test_captions_tell_all_that_is_there():
    for e in TRAIN:
        caption, t, n = pictures.describe(e.things), e.things[0], len(e.things)
        assert pictures.named(caption) == [(t.colour, t.shape)]
        assert pictures.invented(caption, e.things) == [] and pictures.missing(caption, e.things) == 0
        words = f"One {t.colour} digit {t.shape}" if t.shape.isdigit() else world.noun(n, t.colour, t.shape, t.size)
        where = pictures.place(t) if n == 1 else ""
        assert caption.lower() == words.lower() + (f", {where}." if where else ".")


def test_what_a_text_invents_and_leaves_out():
    things = [Thing("red", "star", "small", 10, 10, 4), Thing("blue", "7", "large", 30, 30, 7)]
    text = "There are two small red stars, one large red circle and blue digit 9."
    assert pictures.invented(text, things) == [("red", "circle"), ("blue", "9")]
    assert pictures.missing(text, things) == 1 and pictures.missing("", things) == 2
    assert pictures.missing("One star is red.", things) == 2 and pictures.invented("reds circle", things) == []


# ----------------------------------------------------------------------------------------------------------------------
# Image files


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encoded(pixels: np.ndarray, filters: list[int], *, header: dict | None = None, parts: int = 1) -> bytes:
    """A PNG whose rows have these filters, by the definition of each (PNG specification, section 9.2)."""
    height, width, n = pixels.shape
    rows, raw = pixels.reshape(height, -1).astype(int), b""
    for y in range(height):
        line = []
        for i in range(width * n):
            a = rows[y][i - n] if i >= n else 0
            b = rows[y - 1][i] if y else 0
            c = rows[y - 1][i - n] if y and i >= n else 0
            p = a + b - c
            paeth = a if abs(p - a) <= abs(p - b) and abs(p - a) <= abs(p - c) else b if abs(p - b) <= abs(p - c) else c
            line.append((rows[y][i] - [0, a, b, (a + b) // 2, paeth][filters[y % len(filters)]]) % 256)
        raw += bytes([filters[y % len(filters)], *line])
    h = {"width": width, "height": height, "depth": 8, "colour": {1: 0, 2: 4, 3: 2, 4: 6}[n], "interlaced": 0}
    h |= header or {}
    packed = zlib.compress(raw)
    size = -(-len(packed) // parts)
    body = b"".join(chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size))
    first = struct.pack(">IIBBBBB", h["width"], h["height"], h["depth"], h["colour"], 0, 0, h["interlaced"])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", first) + chunk(b"tEXt", b"a\0b") + body + chunk(b"IEND", b"")


def random_pixels(n: int, height: int = 11, width: int = 7) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (height, width, n), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0]])
def test_png_files_are_read(tmp_path, n, filters):
    pixels, file = random_pixels(n), tmp_path / "a.png"
    file.write_bytes(encoded(pixels, filters, parts=3))
    wanted = pixels
    if n in (2, 4):
        alpha = pixels[..., -1:].astype(float) / 255
        wanted = np.round(pixels[..., :-1] * alpha + 255 * (1 - alpha))
    assert np.array_equal(read_image(file), np.broadcast_to(wanted, (11, 7, 3)))
    assert read_image(file).dtype == np.uint8


def test_what_is_written_is_read(tmp_path):
    pixels = random_pixels(3, 5, 9)
    (tmp_path / "a.png").write_bytes(pictures.png(pixels))
    (tmp_path / "a.ppm").write_bytes(b"P6 # made\n#by hand\n9\n5 255\n" + pixels.tobytes())
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    for name in ("a.png", "a.ppm", "a.npy"):
        assert np.array_equal(read_image(tmp_path / name), pixels)
    assert np.array_equal(read_image(tmp_path / "grey.npy"), np.repeat(pixels[..., :1], 3, axis=2))


def broken() -> dict[str, tuple[bytes, str]]:
    good = encoded(random_pixels(3), [4])
    flipped = bytearray(good)
    flipped[60] ^= 1
    huge = encoded(random_pixels(3), [0], header={"width": 5000})
    zeros = zlib.compress(bytes(10**6))
    start, nine = good[:33], zlib.compress(bytes([9]) + bytes(241))
    bomb = start + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    big = "{'descr': '|u1', 'fortran_order': False, 'shape': (60000, 60000, 3), }".ljust(117) + "\n"
    return {
        "cut.png": (good[:-20], "cut short"),
        "no-end.png": (good[:-12], "cut short"),
        "flipped.png": (bytes(flipped), "wrong checksum"),
        "bomb.png": (bomb, "more than"),
        "few.png": (start + chunk(b"IDAT", zlib.compress(b"abc")) + chunk(b"IEND", b""), "3 bytes of pixels"),
        "filter.png": (start + chunk(b"IDAT", nine) + chunk(b"IEND", b""), "filter 9"),
        "palette.png": (encoded(random_pixels(1), [0], header={"colour": 3}), "palette"),
        "deep.png": (encoded(random_pixels(3), [0], header={"depth": 16}), "16 bits"),
        "laced.png": (encoded(random_pixels(3), [0], header={"interlaced": 1}), "interlaced"),
        "huge.png": (huge, "5000 x 11"),
        "none.png": (encoded(random_pixels(3), [0], header={"width": 0}), "0 x 11"),
        "odd.png": (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "IHDR"),
        "key.png": (good[:33] + chunk(b"tRNS", b"123456") + good[33:], "transparent"),
        "a.gif": (b"GIF89a....", "neither a PNG"),
        "a.jpg": (b"\xff\xd8\xff\xe0", "neither a PNG"),
        "empty.png": (b"", "neither a PNG"),
        "deep.ppm": (b"P6 1 1 65535\n123456", "65535"),
        "few.ppm": (b"P6 2 2 255\n123", "3 bytes"),
        "odd.ppm": (b"P6 2 x 255\n123", "no header"),
        "huge.ppm": (b"P6 9999 1 255\n123", "9999 x 1"),
        "big.npy": (header + big.encode() + b"123", "(60000, 60000, 3)"),
        "open.npy": (header + big.replace(")", " ").encode() + b"123", "broken"),
        "comma.npy": (header + big.replace("|u1", ",u1").encode() + b"123", "broken"),
    }


@pytest.mark.parametrize("name", broken())
def test_other_files_are_refused_in_one_line(tmp_path, name):
    data, said = broken()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read_image(tmp_path / name)
    text = str(error.value)
    assert said in text and name in text and "\n" not in text
    can_be_converted = said in ("palette", "16 bits", "interlaced", "neither a PNG", "65535", "transparent")
    assert ("magick" in text) >= can_be_converted


def test_arrays_that_are_no_pictures_are_refused(tmp_path):
    for array in (np.zeros((4, 4, 3)), np.zeros(4, np.uint8), np.zeros((4, 4, 2), np.uint8)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match="of uint8 is expected"):
            read_image(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy: broken"):
        read_image(tmp_path / "a.npy")
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "none.png")


def test_scaling_is_a_mean_over_areas():
    """7 x 5 pixels as 3 x 3, by ten times ten samples of each; the margin has the edge's colour."""
    pixels = random_pixels(3, 7, 5)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(0)
    square = np.tile(edge, (7, 7, 1))
    square[:, 1:6] = pixels
    fine = square.repeat(30, 0).repeat(30, 1)  # 210 = 3 * 70
    wanted = fine.reshape(3, 70, 3, 70, 3).mean((1, 3))
    assert np.abs(resized(pixels, 3) - wanted).max() <= 0.5
    assert resized(pixels, 14).shape == (14, 14, 3) and resized(pixels).shape == (SIDE, SIDE, 3)
    same = random_pixels(3, SIDE, SIDE)
    assert np.array_equal(resized(same), same)
    flat = np.full((9, 100, 3), 77, np.uint8)
    assert (resized(flat, 20) == 77).all()


def test_the_command_writes_a_sheet_or_says_in_one_line_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.pictures", str(tmp_path / "sheet.png")])
    pictures.main()
    sheet = read_image(tmp_path / "sheet.png")
    assert sheet.shape == (8 * SIDE, 16 * SIDE, 3)
    assert np.array_equal(sheet[::2, ::2][-SIDE:, -SIDE:], TRAIN[31].picture)
    assert len(capsys.readouterr().out.splitlines()) == 14
    for argv, code in ((["--help"], 0), ([], 2), ([str(tmp_path)], 2)):
        monkeypatch.setattr(sys, "argv", ["data.pictures", *argv])
        with pytest.raises(SystemExit) as ended:
            pictures.main()
        assert ended.value.code == code and capsys.readouterr().err.count("\n") == code // 2


def test_a_scene_without_room_is_drawn_again():
    rng = random.Random(0)
    for _ in range(50):
        things = pictures.draw_scene(rng, "count", ("red", "circle"), "four")
        assert sum((t.colour, t.shape) == ("red", "circle") for t in things) == 4

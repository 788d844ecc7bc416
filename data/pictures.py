"""Pictures made by code, what can be asked about them, and readers of image files: numpy and the standard library.

A picture shows one thing, or up to four alike, on a grey, uneven, noisy background: a coloured shape, small or large,
or a digit. Words, colours and shapes are those of data/world.py. Three of the 24 pairs of colour and shape, UNSEEN, are
in no picture that is trained on. A question gives nothing away: in `exam`, each answer to the same question is right
equally often, so that whoever does not look at the picture is right as often as the best constant answer, no more.

    kind        question                          answer    answers to one question
    colour      What colour is the square?        red       5 or 6
    shape       What shape is red?                square    3 or 4
    size        What size is the square?          small     2
    count       How many red squares are there?   two       4
    existence   Is there a red square?            no        2
    position    Where is the square?              left      4: left, right, top or bottom
    digit       Which digit is there?             7         10

Half of the "no"s of `existence` are asked of a picture of something else that is red, or of another square (the
adversarial setting of POPE, arXiv 2305.10355), half of one of neither.

    python -m data.pictures OUT.png      a sheet of pictures
"""

import argparse
import io
import math
import re
import struct
import tokenize
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import world
from data.formats import UserError
from data.world import COLOURS, NUMBERS, SHAPES, SIZES

SIDE = 48  # pixels
KINDS = ("colour", "shape", "size", "count", "existence", "position", "digit")
ASKED = (*KINDS, "colour", "shape", *["existence"] * 5)  # in training: the hard ones more often
PLACES = ("left", "right", "top", "bottom")  # of the picture
UNSEEN = (("red", "star"), ("green", "square"), ("blue", "triangle"))  # never a circle, nor a black or a white thing
SEEN = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN]
DESCRIBE = "Describe the picture."
NEAR = 0.35  # in training, of the "no"s: what is right in one word of two comes after what is right in none

# ----------------------------------------------------------------------------------------------------------------------
# Scenes: what is in a picture, and what is true of it


class Thing(NamedTuple):
    colour: str
    shape: str  # of SHAPES, or one digit
    size: str
    x: float  # of its centre, in pixels from the left
    y: float  # from the top
    radius: float


def cells_for(rng, kind: str, cell: tuple[str, str], answer: str, near: float = 0.5) -> list[tuple[str, str]]:
    """The (colour, shape) of each thing in a picture of which `kind`, asked about `cell`, has this answer.

    near: how often what answers "Is there a red square?" by no is red, or a square.
    """
    colour, shape = cell
    if kind == "digit":
        return [(colour, answer)]
    if kind == "count":
        return [cell] * (1 + NUMBERS.index(answer))
    if kind == "existence" and answer == "no":
        is_near = rng.random() < near
        return [rng.choice([x for x in SEEN if x != cell and is_near == (x[0] == colour or x[1] == shape)])]
    return [cell]


def draw_scene(rng, kind: str, cell: tuple[str, str], answer: str, near: float = 0.5) -> list[Thing]:
    """Things of one size that do not touch, of which `kind`, asked about `cell`, has this answer; see cells_for."""
    cells = cells_for(rng, kind, cell, answer, near)
    while True:
        size, things = answer if kind == "size" else rng.choice(SIZES), []
        for colour, shape in cells:
            radius = rng.uniform(5.0, 5.8) if size == "small" else rng.uniform(8.2, 9.2)
            radius = max(radius, 7.0) if shape.isdigit() else radius
            for _ in range(30):
                x, y = (rng.uniform(radius + 1, SIDE - radius - 1) for _ in "xy")
                if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 1.5 for t in things):
                    things.append(Thing(colour, shape, size, x, y, radius))
                    break
        if len(things) == len(cells) and (kind != "position" or place(things[0]) == answer):
            return things


def place(t: Thing) -> str:
    """Where t is: left, right, top or bottom; "" where it is as much one as another, or in the middle."""
    dx, dy = t.x - SIDE / 2, t.y - SIDE / 2
    if max(abs(dx), abs(dy)) < 6 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return ""
    return PLACES[(dx > 0) if abs(dx) > abs(dy) else 2 + (dy > 0)]  # y grows downwards


def describe(things: Sequence[Thing]) -> str:
    """All that can be told of `things`, which are alike.

    >>> a = Thing("red", "circle", "small", 10, 22, 5)
    >>> describe([a]), describe([a, a]), describe([a._replace(shape="7", x=24)])
    ('One small red circle, left.', 'Two small red circles.', 'One red digit 7.')
    """
    t = things[0]
    noun = world.noun(len(things), t.colour, t.shape, t.size)
    noun = f"one {t.colour} digit {t.shape}" if t.shape.isdigit() else noun
    where = place(t) if len(things) == 1 else ""
    return f"{noun.capitalize()}{', ' * (where != '')}{where}."


def nearly(things: Sequence[Thing], seed: object, n: int = 2) -> list[str]:
    """`n` captions that are wrong in one word: the shape, or the digit.

    >>> nearly([Thing("red", "circle", "small", 10, 22, 5)], 0)
    ['One small red triangle, left.', 'One small red square, left.']
    """
    t = things[0]
    others = "0123456789" if t.shape.isdigit() else [shape for colour, shape in SEEN if colour == t.colour]
    chosen = world.rng_for("nearly", seed).sample([shape for shape in others if shape != t.shape], n)
    return [describe([t._replace(shape=shape) for t in things]) for shape in chosen]


NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) (?:digit ([0-9])\b|({'|'.join(SHAPES)})s?\b)")


def named(text: str) -> list[tuple[str, str]]:
    """The (colour, shape) of every thing that `text` names.

    >>> named("Two small red circles and one black digit 7.")
    [('red', 'circle'), ('black', '7')]
    """
    return [(colour, digit or shape) for colour, digit, shape in NAMED.findall(text)]


def invented(text: str, things: Sequence[Thing]) -> list[tuple[str, str]]:
    """What `text` names and is not there: the hallucinated objects of CHAIR (arXiv 1809.02156)."""
    there = {(t.colour, t.shape) for t in things}
    return [cell for cell in named(text) if cell not in there]


def missing(text: str, things: Sequence[Thing]) -> int:
    """How many kinds of thing are there and not named in `text`."""
    return len({(t.colour, t.shape) for t in things} - set(named(text)))


def ask(kind: str, cell: tuple[str, str]) -> str:
    colour, shape = cell
    return {
        "colour": f"What colour is the {shape}?", "shape": f"What shape is {colour}?",
        "size": f"What size is the {shape}?", "count": f"How many {colour} {shape}s are there?",
        "existence": f"Is there a {colour} {shape}?", "position": f"Where is the {shape}?",
        "digit": "Which digit is there?",
    }[kind]  # fmt: skip


def answers_of(kind: str, cell: tuple[str, str], cells: Sequence[tuple[str, str]] = SEEN) -> list[str]:
    """The answers that `kind`, asked about `cell`, may have; those that name it (colour, shape, digit) are its own."""
    if kind in ("colour", "shape"):
        return [cell[kind == "shape"]]
    digits = list("0123456789")
    return {"position": PLACES, "size": SIZES, "count": NUMBERS, "existence": ["yes", "no"], "digit": digits}[kind]


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

RGB = {"red": (205, 45, 45), "green": (45, 150, 65), "blue": (50, 80, 215), "yellow": (235, 205, 50),
       "black": (22, 22, 22), "white": (246, 246, 246)}  # fmt: skip
SEGMENTS = {"a": (-1, -2, 1, -2), "b": (1, -2, 1, 0), "c": (1, 0, 1, 2), "d": (-1, 2, 1, 2), "e": (-1, 0, -1, 2),
            "f": (-1, -2, -1, 0), "g": (-1, 0, 1, 0)}  # fmt: skip
DIGITS = "abcdef bc abged abgcd fgbc afgcd afgedc abc abcdefg abcdfg".split()
YS, XS = np.mgrid[:SIDE, :SIDE] + 0.5


def distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """About how many pixels (x, y), from the centre, lies outside a shape of radius r; negative: inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * r
    if shape == "triangle":
        return np.maximum(y, np.maximum(*(s * math.sqrt(0.75) * x - 0.5 * y for s in (1, -1)))) - 0.6 * r
    if shape == "star":  # five times the same corner, seen from both sides
        sector = math.pi / 5
        angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        outer, inner = 1.15 * r, 0.5 * r
        edge = np.array([inner * math.cos(sector) - outer, inner * math.sin(sector)])
        return ((u - outer) * edge[1] - v * edge[0]) / np.hypot(*edge)
    lines = []
    for name in DIGITS[int(shape)]:  # the segments of a pocket calculator
        x0, y0, x1, y1 = (0.45 * r * n for n in SEGMENTS[name])
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        lines.append(np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return np.minimum.reduce(lines) - 0.16 * r


def draw(things: Sequence[Thing], seed: int) -> np.ndarray:
    """The picture (SIDE, SIDE, 3) of uint8; `seed` is of the background, the shades, the tilts and the noise."""
    rng = np.random.default_rng(seed)
    slope, shade = rng.uniform(-22, 22, 2), rng.uniform(108, 160) + rng.uniform(-14, 14, 3)
    uneven = slope[0] * (XS / SIDE - 0.5) + slope[1] * (YS / SIDE - 0.5)
    if rng.random() < 0.4:
        uneven = uneven + rng.uniform(3, 9) * np.sin((XS * slope[1] + YS * slope[0]) / rng.uniform(20, 60))
    picture = shade + uneven[..., None]
    for t in things:
        tilt = rng.uniform(-0.2, 0.2)
        x, y = XS - t.x, YS - t.y
        x, y = x * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - x * math.sin(tilt)
        cover = np.clip(0.5 - distance(t.shape, x, y, t.radius), 0, 1)[..., None]  # a pixel on the edge is in part
        colour = np.array(RGB[t.colour]) + rng.uniform(-14, 14, 3)
        picture = picture * (1 - cover) + colour * cover
    return np.clip(picture + rng.normal(0, rng.uniform(2, 8), picture.shape), 0, 255).astype(np.uint8)


BLANK = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)

# ----------------------------------------------------------------------------------------------------------------------
# Examples


class Example(NamedTuple):
    picture: np.ndarray  # (H, W, 3) uint8
    things: list[Thing]
    question: str
    answer: str
    kind: str


def example(seed: object, i: int) -> Example:
    """Picture i of the training split of `seed` and a question about it, of the kinds in turn, as often as in ASKED."""
    rng = world.rng_for("pictures", seed, i)
    kind, cell = ASKED[i % len(ASKED)], rng.choice(SEEN)
    answer = rng.choice(answers_of(kind, cell))
    things = draw_scene(rng, kind, cell, answer, NEAR)
    return Example(draw(things, rng.getrandbits(32)), things, ask(kind, cell), answer, kind)


def turns(e: Example, seed: object) -> list[tuple[str, str]]:
    """Questions about the picture of `e` with their answers, its own among them, for one conversation.

    To find in a picture what a question names takes by far the most practice: after a question for existence come
    three more, each answered by yes half of the time. Before a question that names the shape comes, half of the time,
    the question for it.
    """
    rng, t, own = world.rng_for("turns", seed), e.things[0], (e.question, e.answer)
    here = t.colour, t.shape
    if e.kind == "existence":
        answers = [rng.choice(("yes", "no")) for _ in range(3)]
        cells = [here if answer == "yes" else cells_for(rng, "existence", here, "no", NEAR)[0] for answer in answers]
        return [own, *((ask("existence", cell), answer) for cell, answer in zip(cells, answers, strict=True))]
    if e.kind in ("colour", "size", "position", "count") and rng.random() < 0.5:
        return [(ask("shape", here), t.shape), own]
    return [own]


REPEATS = {"colour": 30, "shape": 36, "size": 64, "count": 8, "existence": 14, "position": 32, "digit": 50}


def exam(kind: str, seed: object = "test", cells: Sequence[tuple[str, str]] = SEEN, repeats: int = 0) -> list[Example]:
    """Held-out questions of `kind`: every question with each of its answers equally often, REPEATS times or `repeats`.

    Rows that share a question stand together, its K answers in turn (see `exchanged`).
    """
    asked: dict[str, list[tuple[tuple[str, str], str]]] = {}
    if kind == "digit":
        asked = {ask(kind, ("", "")): [(None, answer) for answer in answers_of(kind, ("", ""))]}
    else:
        by_shape = kind in ("size", "position")  # whose question names no colour
        for cell in [(None, shape) for shape in dict.fromkeys(shape for _, shape in cells)] if by_shape else cells:
            asked.setdefault(ask(kind, cell), []).extend((cell, answer) for answer in answers_of(kind, cell))
    found = []
    for question, cases in asked.items():
        for n in range(repeats or REPEATS[kind]):
            for cell, answer in cases:
                rng = world.rng_for("exam", seed, kind, question, answer, n)
                if cell is None or cell[0] is None:
                    cell = rng.choice([x for x in cells if cell is None or x[1] == cell[1]])
                things = draw_scene(rng, kind, cell, answer)
                found.append(Example(draw(things, rng.getrandbits(32)), things, question, answer, kind))
    return found


def exchanged(rows: Sequence[Example]) -> list[np.ndarray]:
    """For each of `rows`, of one `exam`, the picture of another row with the same question.

    The n-th repetition gets those of the next one, moved on by n answers: each question meets pictures of which each
    of its answers is true equally often, and no row keeps its own.
    """
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.question, []).append(row)
    found = []
    for group in groups.values():
        K = len({row.answer for row in group})
        R = len(group) // K
        found += [group[(n + 1) % R * K + (a + n) % K].picture for n in range(R) for a in range(K)]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Image files

LIMIT = 4096  # pixels a side
CONVERT = "convert it: magick {} -depth 8 -interlace none -define png:color-type=2 picture.png"


def read_image(path: str | Path) -> np.ndarray:
    """The picture (H, W, 3) of uint8 in a .npy, binary PPM or PNG file; what is transparent is white behind.

    UserError for whatever else is there, with the command that converts it.
    """
    path = Path(path)
    try:
        data = path.read_bytes() if path.stat().st_size <= 4 * LIMIT * LIMIT + 2**16 else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None

    def refuse(what: str, convert: bool = True):
        raise UserError(f"{path}: {what}" + ("; " + CONVERT.format(path)) * convert)

    if data is None:
        refuse("too large a file")
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            pixels = _png_pixels(data, refuse)
        elif data.startswith(b"P6"):
            pixels = _ppm_pixels(data, refuse)
        elif data.startswith(b"\x93NUMPY"):
            pixels = _npy_pixels(data, refuse)
        else:
            refuse("neither a PNG, nor a binary PPM, nor a .npy file")
    except (ValueError, struct.error, IndexError, zlib.error, SyntaxError, tokenize.TokenError) as error:
        refuse(f"broken ({error})", convert=False)
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:] / 255
        pixels = np.round(pixels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _check_size(width: int, height: int, refuse) -> None:
    if not (1 <= width <= LIMIT and 1 <= height <= LIMIT):
        refuse(f"{width} x {height} pixels; 1 to {LIMIT} a side are read")


def _png_pixels(data: bytes, refuse) -> np.ndarray:
    """(H, W, C) of an 8-bit PNG that is grey, RGB, or either with alpha, and not interlaced; checksums must agree."""
    place, header, packed, ended = 8, None, [], False
    while place + 12 <= len(data) and not ended:
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        if len(body) != size or place + 12 + size > len(data):
            raise ValueError("cut short")
        if zlib.crc32(kind + body) != struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0]:
            raise ValueError(f"wrong checksum of {kind.decode('latin-1')!r}")
        if header is None and kind != b"IHDR":
            raise ValueError("does not begin with IHDR")
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed.append(body)
        elif kind == b"tRNS":
            refuse("transparent in one colour")
        ended = kind == b"IEND"
        place += 12 + size
    if not ended:
        raise ValueError("cut short")
    width, height, depth, colour, _, _, interlaced = header
    _check_size(width, height, refuse)
    if depth != 8 or colour not in (0, 2, 4, 6) or interlaced:
        kinds = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
        refuse(f"a PNG of {depth} bits, {kinds.get(colour, colour)}{', interlaced' if interlaced else ''}; 8 bits of "
               "grey, RGB or RGBA, not interlaced, are read")  # fmt: skip
    n = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    wanted, stream = height * (1 + width * n), zlib.decompressobj()
    raw = stream.decompress(b"".join(packed), wanted + 1)
    if len(raw) != wanted:
        raise ValueError(f"holds {'more than ' if len(raw) > wanted else ''}{min(len(raw), wanted)} bytes of pixels, "
                         f"not {wanted}")  # fmt: skip
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * n)
    out = np.zeros((height, width * n), np.uint8)
    above = np.zeros(width * n, np.uint8)
    for y, row in enumerate(rows):
        out[y] = above = _unfiltered(int(row[0]), row[1:], above, n)
    return out.reshape(height, width, n)


def _unfiltered(kind: int, row: np.ndarray, above: np.ndarray, n: int) -> np.ndarray:
    """A row of bytes from the differences to what is left of, above, or left and above each (PNG, section 9)."""
    if kind == 0:
        return row
    if kind == 1:
        return np.cumsum(row.reshape(-1, n), axis=0, dtype=np.uint8).reshape(-1)
    if kind == 2:
        return row + above
    if kind not in (3, 4):
        raise ValueError(f"filter {kind} of a row")
    out, up = row.tolist(), above.tolist()
    for i, byte in enumerate(out):
        a, b, c = (out[i - n], up[i], up[i - n]) if i >= n else (0, up[i], 0)
        if kind == 3:
            guess = (a + b) // 2
        else:
            p = a + b - c
            guess = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
        out[i] = (byte + guess) & 255
    return np.array(out, np.uint8)


def _ppm_pixels(data: bytes, refuse) -> np.ndarray:
    header = re.match(rb"P6(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data)
    if not header:
        raise ValueError("no header of a PPM")
    width, height, most = map(int, header.groups())
    _check_size(width, height, refuse)
    if most != 255:
        refuse(f"a PPM of values up to {most}, not 255")
    pixels = data[header.end() :]
    if len(pixels) != width * height * 3:
        raise ValueError(f"holds {len(pixels)} bytes of pixels, not {width * height * 3}")
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _npy_pixels(data: bytes, refuse) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():  # before anything is allocated
        raise ValueError(f"an array {shape} of {dtype} is not {len(data) - file.tell()} bytes")
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        refuse(f"an array {pixels.shape} of {pixels.dtype}; (height, width, 3) of uint8 is expected", convert=False)
    _check_size(pixels.shape[1], pixels.shape[0], refuse)
    return pixels


def png(pixels: np.ndarray) -> bytes:
    """A PNG of pixels (H, W, 3) of uint8."""
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with its filter, 0

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def resized(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """pixels (H, W, 3) as (side, side, 3): mean over the area of each new pixel; a margin of the edge's mean colour."""
    height, width, _ = pixels.shape
    if height == width == side:
        return pixels
    longest = max(height, width)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(0)
    square = np.tile(edge, (longest, longest, 1))
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = pixels
    ends = np.arange(side + 1) * longest / side  # in old pixels
    weights = np.clip(np.minimum(ends[1:, None], np.arange(1, longest + 1))
                      - np.maximum(ends[:-1, None], np.arange(longest)), 0, None) * side / longest  # fmt: skip
    return np.round(np.einsum("ah,hwc,bw->abc", weights, square, weights, optimize=True)).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("out", metavar="OUT", type=Path, help="PNG file of 32 pictures to write")
    args = parser.parse_args()
    rows = [[example(0, i * 8 + j).picture for j in range(8)] for i in range(4)]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    try:
        args.out.write_bytes(png(sheet.repeat(2, 0).repeat(2, 1)))
    except OSError as error:
        parser.error(f"{args.out}: {error.strerror}")
    for i in range(14):
        made = example(0, i)
        print(describe(made.things), made.question, made.answer)


if __name__ == "__main__":
    main()

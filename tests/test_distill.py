"""Facts about distill.py: the objective by hand, MiniLLM's gradient by enumeration, data, measurement, whole runs."""

import json
import math
import random
import re
import shutil
import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distill
import kernels
import loop as loop_module
from data import chat, world
from data.formats import UserError
from data.tokenizer import tiny
from distill import Batch, Example, collate, get_args, later_tokens, main, objective, taught
from loop import Loop
from model import Config, Transformer, generate, load, read_safetensors, save
from tests.readme import variants_table
from tests.test_loop import on_two_ranks

CPU = torch.device("cpu")


def small(vocab_size: int = 12, *, seed: int = 0, depth: int = 1, scale: float = 8.0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Config.from_depth(depth, vocab_size, 128))
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= scale  # so that token probabilities differ
    return model.double()


def batch_of(
    lengths: tuple[int, ...] = (7, 3, 5),
    prompts: tuple[int, ...] = (2, 1, 3),
    vocab_size: int = 12,
    own: tuple[int, ...] = (0, 0, 0),
    width: int = 0,
) -> Batch:
    """Ragged rows; of those that are the student's own one token of the prompt counts as well."""
    generator = torch.Generator().manual_seed(sum(lengths))
    input_ids, mask, written = torch.zeros(3, len(lengths), max(*lengths, width), dtype=torch.long)
    for b, (n, start) in enumerate(zip(lengths, prompts, strict=True)):
        input_ids[b, :n] = torch.randint(vocab_size, (n,), generator=generator)
        mask[b, max(1, start - own[b]) : n] = 1
        written[b, start:n] = own[b]
    return Batch(input_ids, mask, written, None)


def of(loss: str, *flags: object) -> Namespace:
    return get_args(["--loss", loss, *map(str, flags)])


def probs(model: Transformer, ids: list[int], temperature: float = 1.0) -> list[list[float]]:
    """p(. | tokens before t) of each position t > 0, one softmax at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].double() / temperature
    found = [[]]
    for row in logits[:-1].tolist():
        most = max(row)
        parts = [math.exp(z - most) for z in row]
        total = sum(parts)
        found.append([part / total for part in parts])
    return found


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


BY_HAND = {
    "forward_kl": lambda p, q, s: kl(p, q),
    "reverse_kl": lambda p, q, s: kl(q, p),
    "jsd": lambda p, q, s: s * kl(p, mix(p, q, s)) + (1 - s) * kl(q, mix(p, q, s)),
    "skew_kl": lambda p, q, s: kl(p, mix(p, q, s)),
    "skew_reverse_kl": lambda p, q, s: kl(q, mix(q, p, s)),
    "tvd": lambda p, q, s: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
}


def mix(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# 1. The objective


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loss_by_hand(name):
    """alpha CE + (1 - alpha) T^2 D(teacher, student), summed over the tokens that count, of ragged rows."""
    model, teacher, batch = small(), small(seed=1, depth=2), batch_of()
    skew = {"jsd": ("--skew", 0.3), "skew_kl": ("--skew", 0.2), "skew_reverse_kl": ("--skew", 0.2)}.get(name, ())
    args = of(name, "--alpha", 0.3, "--temperature", 1.7, *skew)
    hard = soft = 0.0
    for ids, mask in zip(batch.input_ids.tolist(), batch.completion_mask.tolist(), strict=True):
        p, q, q1 = probs(teacher, ids, 1.7), probs(model, ids, 1.7), probs(model, ids)
        for t in (t for t, counts in enumerate(mask) if counts):
            hard -= math.log(q1[t][ids[t]])
            soft += BY_HAND[name](p[t], q[t], skew[1] if skew else 0.0)
    terms = objective(model, None, batch, taught([teacher], batch, 12, args), 12, args)
    assert terms["hard"].item() == pytest.approx(0.3 * hard, rel=1e-9)
    assert terms["soft"].item() == pytest.approx(0.7 * 1.7**2 * soft, rel=1e-9)
    assert list(terms) == ["hard", "soft"]


def test_alpha_weighs_the_text_and_the_rest_the_teacher():
    model, teacher, batch = small(), small(seed=1), batch_of()
    hard = objective(model, None, batch, None, 12, of("hard"))
    for alpha, kept in ((1, {"hard"}), (0, {"soft"}), (0.5, {"hard", "soft"})):
        args = of("forward_kl", "--alpha", alpha, "--temperature", 2)
        terms = objective(model, None, batch, taught([teacher], batch, 12, args), 12, args)
        assert set(terms) == kept
        if alpha:
            assert terms["hard"].item() == pytest.approx(alpha * hard["hard"].item(), rel=1e-12)
    assert set(hard) == {"hard"} == set(objective(model, None, batch, None, 12, of("sequence")))


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient():
    """Hinton: at high T the gradient of T^2 KL no longer depends on T."""
    model, teacher, batch = small(scale=1.0), small(seed=1, scale=1.0), batch_of()
    norms = []
    for T in (50, 100):
        args = of("forward_kl", "--temperature", T)
        loss = objective(model, None, batch, taught([teacher], batch, 12, args), 12, args)["soft"]
        norms.append(torch.autograd.grad(loss, model.head.weight)[0].norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] > 0


@pytest.mark.parametrize("loss", ["forward_kl", "jsd", "minillm", "hard"])
def test_padding_and_neighbours_change_nothing(loss):
    model, teacher = small(), small(seed=1)
    args = of(loss, *(() if loss == "hard" else ("--alpha", 0.4)))
    own = (1, 0, 1)

    def value(batch: Batch) -> float:
        said = taught([teacher], batch, 12, args)
        return sum(objective(model, None, batch, said, 12, args).values()).item()

    whole, wide = (batch_of(own=own, width=width) for width in (0, 11))
    wide.input_ids[:, 7:] = 5  # whatever stands there
    rows = [Batch(*(x[b : b + 1] for x in whole[:3]), None) for b in range(3)]
    assert value(whole) == pytest.approx(value(wide), rel=1e-12) == pytest.approx(sum(map(value, rows)), rel=1e-12)


def test_gradients_reach_the_tokens_that_count_and_every_parameter(monkeypatch):
    model, teacher, batch = small(depth=2), small(seed=1), batch_of()
    model.embed.weight.data = model.embed.weight.data.clone()
    states = []
    hidden_before = model.hidden_before

    def kept(input_ids: Tensor) -> Tensor:
        states.append(hidden_before(input_ids))
        states[-1].retain_grad()
        return states[-1]

    monkeypatch.setattr(model, "hidden_before", kept)
    args = of("skew_kl", "--alpha", 0.2)
    sum(objective(model, None, batch, taught([teacher], batch, 12, args), 12, args).values()).backward()
    assert ((states[0].grad != 0).any(-1) == batch.completion_mask.bool()).all()
    assert all((p.grad != 0).any() for p in model.parameters())


def test_the_student_s_own_texts_are_no_truth():
    """They count in D, not in the cross-entropy."""
    model, teacher, args = small(), small(seed=1), of("jsd", "--alpha", 0.5)
    own = batch_of(own=(0, 0, 1))
    data = own._replace(own=own.own * 0)
    a, b = (objective(model, None, x, taught([teacher], x, 12, args), 12, args) for x in (own, data))
    assert a["soft"].item() == pytest.approx(b["soft"].item(), rel=1e-12)
    rest = own._replace(completion_mask=own.completion_mask * (1 - own.own))
    wanted = objective(model, None, rest, taught([teacher], rest, 12, args), 12, args)["hard"]
    assert a["hard"].item() == pytest.approx(wanted.item(), rel=1e-12) != pytest.approx(b["hard"].item())


def test_the_teacher_takes_no_gradient_and_a_student_that_is_its_teacher_learns_nothing():
    model, batch, args = small(), batch_of(), of("reverse_kl")
    teacher = small(seed=1)
    said = taught([teacher], batch, 12, args)
    assert not any(x.requires_grad for x in said.targets[0][:1])
    objective(model, None, batch, said, 12, args)["soft"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    alike = small()
    terms = objective(model, None, batch, taught([alike], batch, 12, args), 12, args)
    assert abs(terms["soft"].item()) < 1e-12


def test_hidden_states_are_matched_through_the_projection():
    model, teacher, batch = small(), small(seed=1, depth=2), batch_of()
    args = of("forward_kl", "--hidden", 0.7)
    torch.manual_seed(3)
    projection = nn.Linear(32, 64).double()
    terms = objective(model, projection, batch, taught([teacher], batch, 12, args), 12, args)
    total = 0.0
    for b, t in batch.completion_mask.nonzero().tolist():
        ids = batch.input_ids[b : b + 1, :t]
        ours, theirs = (m.hidden(ids)[0, -1] for m in (model, teacher))
        total += (projection(ours) - theirs).square().sum().item() / 64
    assert terms["hidden"].item() == pytest.approx(0.7 * total, rel=1e-9)
    terms["hidden"].backward()
    assert (projection.weight.grad != 0).any() and (model.blocks[0].ffn.down.weight.grad != 0).any()


def test_later_tokens_by_hand():
    """- sum over t of (mean over t' > t of log p - log q) log q(y_t): own tokens only; gains have no gradient."""
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(2, 6, generator=generator, dtype=torch.float64).requires_grad_()
    theirs = -torch.rand(2, 6, generator=generator, dtype=torch.float64)
    own = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    found, total, wanted = later_tokens(logps, theirs, own), 0.0, torch.zeros(2, 6, dtype=torch.float64)
    for b in range(2):
        places = own[b].nonzero()[:, 0].tolist()
        for t in places:
            after = [(theirs[b, u] - logps[b, u]).item() for u in places if u > t]
            gain = sum(after) / len(after) if after else 0.0
            total -= gain * logps[b, t].item()
            wanted[b, t] = -gain
    assert found.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, logps)[0], wanted)


def test_minillm_is_the_gradient_of_the_kl_of_whole_texts():
    """All texts of two tokens enumerated: the expected gradient is that of KL(q || p). Tokenwise it is not."""
    V, model, teacher = 5, small(5), small(5, seed=1)
    texts = [(a, b) for a in range(V) for b in range(V)]
    input_ids = torch.tensor([[3, a, b] for a, b in texts])
    states = (m.hidden_before(input_ids)[:, 1:] for m in (model, teacher))
    logq, logp = (
        kernels.linear_logps_reference(h, m.head.weight, input_ids[:, 1:]).sum(-1)
        for h, m in zip(states, (model, teacher), strict=True)
    )
    exact = torch.autograd.grad((logq.exp() * (logq - logp.detach())).sum(), model.head.weight)[0]
    found = {}
    for name in ("minillm", "reverse_kl"):
        args, total = of(name), 0.0
        for i, q in enumerate(logq.detach().exp()):
            batch = Batch(input_ids[i : i + 1], torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 1]]), None)
            terms = objective(model, None, batch, taught([teacher], batch, V, args), V, args)
            total = total + q * torch.autograd.grad(sum(terms.values()), model.head.weight)[0]
        found[name] = (total - exact).norm() / exact.norm()
    assert found["minillm"] < 1e-9
    assert found["reverse_kl"] > 0.05


def test_minillm_takes_texts_of_the_data_token_by_token():
    """What a choice does to later tokens is asked of the student's own choices only."""
    model, teacher, mixed = small(), small(seed=1), batch_of(own=(0, 0, 1))
    args = of("minillm")
    terms = objective(model, None, mixed, taught([teacher], mixed, 12, args), 12, args)
    alone = Batch(*(x[2:3] for x in mixed[:3]), None)
    wanted = objective(model, None, alone, taught([teacher], alone, 12, args), 12, args)
    assert terms["later"].item() == pytest.approx(wanted["later"].item(), rel=1e-9) != 0
    tokenwise = of("reverse_kl")
    soft = objective(model, None, mixed, taught([teacher], mixed, 12, tokenwise), 12, tokenwise)["soft"]
    assert terms["soft"].item() == pytest.approx(soft.item(), rel=1e-12)
    args = of("minillm", "--alpha", 0.4)
    less = objective(model, None, mixed, taught([teacher], mixed, 12, args), 12, args)
    for name in ("soft", "later"):
        assert less[name].item() == pytest.approx(0.6 * terms[name].item(), rel=1e-12)


def test_several_teachers_and_the_one_that_expects_the_text(monkeypatch):
    model, batch = small(), batch_of()
    teachers = [small(seed=1), small(seed=2, depth=2), small(seed=3)]
    with monkeypatch.context() as patch:  # for their mean nobody needs to know how probable the text is
        patch.setattr(distill, "linear_logps", None)
        means = taught(teachers, batch, 12, of("forward_kl"))
    assert means.mixture is None and len(means.targets) == 3
    args = of("forward_kl", "--fusion", "min_ce")
    best = taught(teachers, batch, 12, args)
    rows, total, chosen = zip(batch.input_ids.tolist(), batch.completion_mask.tolist(), strict=True), 0.0, set()
    for b, (ids, mask) in enumerate(rows):
        ps = [probs(teacher, ids) for teacher in teachers]
        expects = [sum(math.log(p[t][ids[t]]) for t in range(1, len(ids)) if mask[t]) for p in ps]
        k = expects.index(max(expects))
        chosen.add(k)
        assert (best.mixture[b].argmax(-1) == k).all() and (best.mixture[b].sum(-1) == 1).all()
        q = probs(model, ids)
        total += sum(kl(ps[k][t], q[t]) for t in range(1, len(ids)) if mask[t])
    assert len(chosen) > 1, "or nothing was chosen"
    late = batch_of((9,) * 12, (8,) * 12, own=(0,) * 12)  # one token after a long prompt, which has no say
    for b, ids in enumerate(late.input_ids.tolist()):
        expects = [probs(teacher, ids)[8][ids[8]] for teacher in teachers]
        found = taught(teachers, late, 12, args).mixture[b]
        assert (found.argmax(-1) == expects.index(max(expects))).all()
    found = objective(model, None, batch, best, 12, args)["soft"]
    assert found.item() == pytest.approx(total, rel=1e-9)
    minillm = taught(teachers, batch, 12, of("minillm"))
    for b, t in batch.completion_mask.nonzero().tolist():
        ids = batch.input_ids[b].tolist()
        mean = statistics.fmean(probs(teacher, ids)[t][ids[t]] for teacher in teachers)
        assert minillm.logps[b, t].item() == pytest.approx(math.log(mean), rel=1e-9)


def test_padding_of_a_head_takes_no_part():
    """Heads of 14 and 16 rows for a vocabulary of 12: both softmaxes are over the 12."""
    model, teacher, batch, args = small(14), small(16, seed=1), batch_of(), of("forward_kl", "--alpha", 0.5)
    found = objective(model, None, batch, taught([teacher], batch, 12, args), 12, args)
    hard = soft = 0.0
    for ids, mask in zip(batch.input_ids.tolist(), batch.completion_mask.tolist(), strict=True):
        p, q = ([[x / sum(row[:12]) for x in row[:12]] for row in probs(m, ids)] for m in (teacher, model))
        for t in (t for t, counts in enumerate(mask) if counts):
            soft, hard = soft + kl(p[t], q[t]), hard - math.log(q[t][ids[t]])
    assert found["soft"].item() == pytest.approx(0.5 * soft, rel=1e-9)
    assert found["hard"].item() == pytest.approx(0.5 * hard, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models with our tokenizer: `base` and `sft`, which stand for the stages, and `student`."""
    home, found = tmp_path_factory.mktemp("models"), {}
    for seed, (name, depth) in enumerate((("base", 2), ("sft", 2), ("student", 1))):
        torch.manual_seed(seed)
        model = Transformer(Config.from_depth(depth, tiny().vocab_size, 256))
        for p in model.parameters():
            if p.ndim == 2:
                p.data *= 2.5
        save(model, tiny(), home / name)
        found[name] = home / name
    return found


@pytest.fixture
def stages(folders, monkeypatch):
    monkeypatch.setattr(Loop, "require", lambda self, stage: folders[stage])
    monkeypatch.setattr(distill, "HELD_OUT", 3)
    monkeypatch.setattr(distill, "HARD_STEPS", {"weather": 4})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty ragged rows of plain text."""
    path, rng = tmp_path_factory.mktemp("data") / "texts.jsonl", random.Random(0)
    texts = [" ".join(rng.choices(world.WEATHER, k=rng.randint(1, 20))) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def train(out: Path, *flags: object) -> dict:
    return main(get_args(["--out", str(out), *map(str, flags)]))


def weights(out: Path) -> dict[str, Tensor]:
    return load(out)[0].state_dict()


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((x - b[name]).abs().max().item() for name, x in a.items())


def apart(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far weights are from those of another run, beside how far that went: Adam makes much of small gradients."""
    distance, way = (math.sqrt(sum((x - y[name]).square().sum() for name, x in a.items())) for y in (b, start))
    return distance / way


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loop_of(args: Namespace, tmp_path: Path) -> Loop:
    return Loop(Namespace(**vars(args) | {"out": tmp_path / "loop"}), "distill")


def test_what_is_learned_from():
    """All of a text but its first token; in a chat all that the assistant says; the last turn is what is written."""
    text = distill.document("Weather: sun rain sun", tiny(), 3)
    assert tiny().decode(text.input_ids) == "Weather: sun rain sun<|im_end|>"
    assert text.completion_mask == [0] + [1] * (len(text.input_ids) - 1) and text.n_prompt == 3
    assert distill.document("sun", tiny(), 30).n_prompt == len(tiny().encode("sun"))
    said = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["1?", "one", "2?", "two"], strict=True)
    ]
    row = distill.conversation({"messages": said}, tiny())
    learned = [i for i, counts in zip(row.input_ids, row.completion_mask, strict=True) if counts]
    assert tiny().decode(learned) == "one<|im_end|>two<|im_end|>"
    assert tiny().decode(row.input_ids[row.n_prompt :]) == "two<|im_end|>"
    assert row.input_ids[: row.n_prompt] == chat.prompt_ids(said[:3], tiny())
    short = distill.conversation({"prompt": "2?", "completion": "two"}, tiny())
    other = distill.conversation({"prompt": "2?", "answer": "two"}, tiny())
    assert short[:3] == other[:3] and tiny().decode(short.input_ids[short.n_prompt :]) == "two<|im_end|>"


def test_a_prompt_that_is_written_otherwise_with_its_answer_is_refused(monkeypatch):
    real = chat.prompt_ids
    monkeypatch.setattr(chat, "prompt_ids", lambda *x: [*real(*x)[:-1], 5])
    with pytest.raises(UserError, match="writes a prompt otherwise"):
        distill.conversation({"prompt": "2?", "completion": "two"}, tiny())


def test_rows_of_the_world_are_apart_from_the_test(stages):
    for task in distill.WORLD:
        args = get_args(["--task", task, "--loss", "hard", "--rows", "20"])
        rows, test = distill.examples(args, tiny(), None)
        again, same = distill.examples(
            get_args(["--task", task, "--loss", "hard", "--rows", "20", "--seed", "1"]), tiny(), None
        )
        assert len(rows) == 20 and len(test) == 3 and test == same
        assert not {tuple(e.input_ids) for e in rows} & {tuple(e.input_ids) for e in test}
        assert {tuple(e.input_ids) for e in rows} != {tuple(e.input_ids) for e in again}
        for e, split in ((rows[0], "train"), *((e, "test") for e in test)):
            numbers = " ".join(re.findall(r"\d+", tiny().decode(e.input_ids[: e.n_prompt])))
            if task == "steps":
                assert world.split_of(f"sum {numbers}") == split
            elif task == "rank":
                assert world.split_of_problem(world.HELD_BACK, {"x": numbers}) == split
    assert tiny().decode(rows[0].input_ids[rows[0].n_prompt :]) == f"{rows[0].row['answer']}<|im_end|>"
    assert all(list(map(int, e.row["answer"].split())) == sorted(map(int, e.row["answer"].split()))[::-1] for e in rows)
    steps = distill.examples(get_args(["--task", "steps", "--loss", "hard", "--rows", "20"]), tiny(), None)[0]
    for e in steps:  # the result, and nothing of the working
        question, said = (tiny().decode(x) for x in (e.input_ids[: e.n_prompt], e.input_ids[e.n_prompt :]))
        numbers = [int(word.strip("?.")) for word in question.replace("+", " ").split() if word.strip("?.").isdigit()]
        assert said == f"<think></think>{sum(numbers)}<|im_end|>" and "Show your steps." in question


def test_long_rows(data, tmp_path):
    args = get_args(["--data", str(data), "--teacher", "x", "--max-length", "8"])
    loop = loop_of(args, tmp_path)
    rows = [distill.document(" ".join(["sun"] * n), tiny(), 5) for n in (1, 30)]
    with pytest.raises(UserError, match="--max-length is 8"):
        distill.fit(rows, "rows", args, loop)
    assert distill.fit(rows, "rows", Namespace(**vars(args) | {"too_long": "drop"}), loop) == rows[:1]
    cut = distill.fit(rows, "rows", Namespace(**vars(args) | {"too_long": "cut"}), loop)
    assert cut[0] == rows[0] and cut[1].input_ids == rows[1].input_ids[:8] and cut[1].completion_mask == [0] + [1] * 7
    lone = distill.conversation({"prompt": "sun " * 20, "completion": "rain"}, tiny())
    assert distill.fit([lone], "rows", Namespace(**vars(args) | {"too_long": "cut"}), loop) == []


def test_no_model_goes_on_from_the_middle_of_a_question(data, tmp_path, capsys):
    """Of a cut chat the first turns are learned from; where a model is to write its last turn, the row is dropped."""
    said = [{"role": r, "content": c} for r, c in
            zip(["user", "assistant"] * 2, ["1?", "one", "2? " * 20, "two"], strict=True)]  # fmt: skip
    flags = ["--data", str(data), "--teacher", "x", "--max-length", "24", "--too-long", "cut"]
    args = get_args(flags)
    loop, chats = loop_of(args, tmp_path), [distill.conversation({"messages": said}, tiny())]
    (cut,) = distill.fit(chats, "rows", args, loop)
    assert chats[0].n_prompt > 24 and len(cut.input_ids) == 24 > cut.n_prompt and any(cut.completion_mask)
    for more in (["--on-policy", "0.1"], ["--loss", "minillm"], ["--loss", "sequence"]):
        capsys.readouterr()
        args = get_args([*flags, *more])
        assert distill.fit(chats, "rows", args, loop) == []
        assert "24: 1 rows dropped: the turn to be written begins beyond it" in capsys.readouterr().err
        assert distill.fit(chats, "held-out rows", args, loop) == [cut]
        fits = chats[0]._replace(n_prompt=23)  # one token of what is to be written is left
        assert len(distill.fit([fits], "rows", args, loop)) == 1


def test_a_batch_is_padded_on_the_right(folders):
    rows = [Example([5, 6, 7], [0, 1, 1], 1, {}), Example([8], [0], 1, {})]
    batch = collate(rows, CPU, 4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]] and batch.own.sum() == 0
    assert collate([rows[0]._replace(own=True, n_prompt=2), rows[1]], CPU).own.tolist() == [[0, 0, 1], [0, 0, 0]]
    stored = [e._replace(stored=kernels.TopK(torch.full((len(e.input_ids), 2), 9), -torch.ones(len(e.input_ids), 3)))
              for e in rows]  # fmt: skip
    kept = collate(stored, CPU).stored
    assert kept.ids.shape == (2, 3, 2) and kept.logps.shape == (2, 3, 3)
    assert kept.ids[1, :, 0].tolist() == [9, 0, 0] and batch.stored is None
    assert collate([], CPU).completion_mask.sum() == 0


def test_texts_go_on_from_their_prompts(folders, tmp_path):
    model, args = load(folders["student"])[0].eval(), get_args(["--max-new-tokens", "5"])
    loop, some = (
        loop_of(args, tmp_path),
        [distill.document(f"Weather: {w} rain fog", tiny(), 3) for w in ("sun", "snow")],
    )
    found = distill.continued(model, tiny(), some, 3, 1.0, ("a",), args, loop)
    assert [len(texts) for texts in found] == [3, 3]
    for e, texts in zip(some, found, strict=True):
        assert len({tuple(text.input_ids) for text in texts}) > 1
        for text in texts:
            n = len(text.input_ids) - 3
            assert text.input_ids[:3] == e.input_ids[:3] and text.completion_mask == [0, 1, 1] + [1] * n and n <= 5
    assert distill.continued(model, tiny(), some, 3, 1.0, ("a",), args, loop) == found
    assert distill.continued(model, tiny(), some, 3, 1.0, ("b",), args, loop) != found
    greedy = distill.continued(model, tiny(), some, 1, 0.0, ("a",), args, loop)
    said = generate(model, [e.input_ids[:3] for e in some], max_new_tokens=5, eos_ids=tiny().eos_ids, temperature=0.0)
    assert [e.input_ids[3:] for (e,) in greedy] == said.completions
    with pytest.raises(UserError, match="--max-new-tokens 254: the longest prompt leaves room for 253"):
        distill.continued(model, tiny(), some, 1, 1.0, ("a",), Namespace(max_new_tokens=254), loop)
    model.virtual = 4  # positions of a prefix
    with pytest.raises(UserError, match="--max-new-tokens 250: the longest prompt leaves room for 249"):
        distill.continued(model, tiny(), some, 1, 1.0, ("a",), Namespace(max_new_tokens=250), loop)
    model.virtual = 0
    torch.manual_seed(0)
    wide = Transformer(replace(model.config, vocab_size=2048)).eval()  # half of its head is padding
    found = distill.continued(wide, tiny(), some, 4, 1.0, ("a",), args, loop)
    assert max(i for texts in found for text in texts for i in text.input_ids) < tiny().vocab_size


def test_every_256_prompts_have_a_seed_of_their_own(folders, tmp_path, monkeypatch):
    """Or the texts of the second 256 would be drawn like those of the first."""
    seeds = []
    monkeypatch.setattr(distill, "generate", lambda model, prompts, *, samples, seed, **how: seeds.append(seed) or
                        Namespace(completions=[[5]] * (samples * len(prompts))))  # fmt: skip
    model, args = load(folders["student"])[0], get_args(["--max-new-tokens", "5"])
    some = [distill.document("Weather: sun rain", tiny(), 3)] * 300
    assert len(distill.continued(model, tiny(), some, 2, 1.0, ("a",), args, loop_of(args, tmp_path))) == 300
    assert len(set(seeds)) == 2


def test_which_answers_are_right(tmp_path):
    args = get_args(["--task", "steps", "--loss", "sequence"])
    row = {"prompt": "What is 2 + 3?", "answer": "<think></think>5"}

    def right(said: str, end: tuple[int, ...] = tiny().eos_ids[:1]) -> bool:
        ids = [1, 2, *tiny().encode_with(said, chat.OF_ASSISTANT), *end]
        return distill.is_right(Example(ids, [0, 0] + [1] * (len(ids) - 2), 2, row), tiny(), args)

    assert right("5") and right("<think>2 + 3 = 5.</think>5")
    assert not right("6") and not right("<think>2 + 3 = 5.") and not right("5", ()) and not right("<think>5</think>4")
    args.check = "boxed"
    assert right(r"\boxed{5}") and not right(r"\boxed{6}") and not right("5")
    (tmp_path / "rule.py").write_text(
        "def asked(prompt, completion, row):\n    return float((prompt, completion) == ('What is 2 + 3?', '5'))\n"
    )
    args.check = f"{tmp_path / 'rule.py'}:asked"
    assert right("5") and not right("6")
    row = {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": row["prompt"]}], "answer": "5"}
    assert right("5")


@pytest.mark.parametrize("answer", [{"answer": "4"}, {"answer": 4}, {}])
def test_a_rule_of_ones_own_sees_all_columns(tmp_path, answer):
    """Those that no schema has, too; without an answer to compare with, nothing is written first."""
    (tmp_path / "rule.py").write_text("def by(prompt, said, row):\n    return float(said == row['wanted'])\n")
    rows = [{"prompt": f"{i} + 1?", "completion": str(i + 1), "wanted": str(i), **answer} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = get_args(["--data", str(tmp_path / "rows.jsonl"), "--teacher", "x", "--max-length", "64", "--loss",
                     "sequence", "--check", f"{tmp_path / 'rule.py'}:by"])  # fmt: skip
    if answer != {"answer": "4"}:
        with pytest.raises(UserError, match="--check: the rows of --data have no answer to compare with"):
            distill.examples(args, tiny(), loop_of(args, tmp_path))
        return
    rows = distill.examples(args, tiny(), loop_of(args, tmp_path))[0]
    assert all(tiny().decode(e.input_ids[e.n_prompt :]) == f"{e.row['completion']}<|im_end|>" for e in rows)
    wanted = [e._replace(input_ids=[*e.input_ids[: e.n_prompt], *tiny().encode(e.row["wanted"]), tiny().eos_ids[0]])
              for e in rows]  # fmt: skip
    assert all(distill.is_right(e, tiny(), args) for e in wanted)
    assert not any(distill.is_right(e, tiny(), args) for e in rows)


def test_answers_beside_completions_are_kept(tmp_path):
    """For a rule of data/checkers.py, too: the teacher's own answer is compared with that of the row."""
    rows = [{"prompt": f"{i} + 1?", "completion": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = get_args(["--data", str(tmp_path / "rows.jsonl"), "--teacher", "x", "--max-length", "64", "--loss",
                     "sequence", "--check", "number"])  # fmt: skip
    found = distill.examples(args, tiny(), loop_of(args, tmp_path))[0]
    assert all(tiny().decode(e.input_ids[e.n_prompt :]) == f"{e.row['completion']}<|im_end|>" for e in found)
    assert all(distill.is_right(e, tiny(), args) for e in found)
    assert not distill.is_right(found[0]._replace(row=found[0].row | {"answer": "99"}), tiny(), args)


def test_rows_may_be_of_several_files(tmp_path):
    texts = [f"sun rain {i}" for i in range(40)]
    for name, some in (("a", texts[:10]), ("b", texts[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    args = get_args(["--data", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--teacher", "x", "--max-length", "64"])
    rows, test = distill.examples(args, tiny(), loop_of(args, tmp_path))
    assert sorted(e.row["text"] for e in rows + test) == sorted(texts) and len(test) == 16


def test_what_the_teacher_writes(folders, tmp_path, monkeypatch, capsys):
    """Different texts, or with --check those that are right; of one it is the most probable text."""
    rows = [Example([i, 7], [0, 1], 1, {"prompt": f"{i}?", "answer": "1"}) for i in range(3)]
    asked, judged, is_right = [], [], distill.is_right
    monkeypatch.setattr(distill, "is_right", lambda e, *rest: judged.append(e) or is_right(e, *rest))

    def continued(model, tokenizer, some, samples, temperature, key, args, loop):
        asked.append((model, samples, temperature))
        texts = [[tiny().encode("1")[0], tiny().eos_ids[0]], [9], [9]][:samples]
        return [
            [e._replace(input_ids=[e.input_ids[0], *ids], completion_mask=[0] + [1] * len(ids)) for ids in texts]
            for e in some
        ]

    monkeypatch.setattr(distill, "continued", continued)
    args = get_args(["--loss", "sequence", "--samples", "3"])
    loop = loop_of(args, tmp_path)
    assert len(distill.teacher_written("teacher", tiny(), rows, args, loop)) == 6
    args.check = "exact"
    assert [e.input_ids[0] for e in distill.teacher_written("teacher", tiny(), rows, args, loop)] == [0, 1, 2]
    assert len(judged) == 9 and "3 of 9 texts of the teacher are right" in capsys.readouterr().err
    args.samples = 1
    distill.teacher_written("teacher", tiny(), rows, args, loop)
    assert asked == [("teacher", 3, 1.0)] * 2 + [("teacher", 1, 0.0)]
    with pytest.raises(UserError, match="passes --check exact"):
        distill.teacher_written("teacher", tiny(), [e._replace(row=e.row | {"answer": "2"}) for e in rows], args, loop)


def test_what_is_stored_is_what_the_teachers_say(folders, tmp_path):
    args = get_args(["--top-k", "4", "--temperature", "1.5", "--micro-batch-size", "2"])
    teachers = [load(folders[name])[0].eval() for name in ("base", "sft")]
    rows = [distill.document(text, tiny(), 2) for text in ("Weather: sun", "Weather: rain fog hail", "sun")]
    found = distill.with_top_k(teachers, rows, 1024, args, loop_of(args, tmp_path))
    for e, row in zip(found, rows, strict=True):
        assert e[:4] == row[:4] and len(e.stored.ids) == len(e.input_ids)
        with torch.no_grad():
            mean = sum((t(torch.tensor([row.input_ids]))[0, :-1] / 1.5).softmax(-1) for t in teachers) / 2
        best, ids = mean.topk(4)
        assert torch.equal(e.stored.ids[1:], ids)
        torch.testing.assert_close(e.stored.logps[1:].exp(), torch.cat([best, 1 - best.sum(-1, keepdim=True)], -1))
    args.fusion, chosen = "min_ce", set()
    found = distill.with_top_k(teachers, rows, 1024, args, loop_of(args, tmp_path))
    for e in found:  # of the one that expects the row, and not of both
        with torch.no_grad():
            logits = [t(torch.tensor([e.input_ids]))[0, :-1] for t in teachers]
        ids = torch.tensor(e.input_ids[1:])[:, None]
        expects = [x.log_softmax(-1).gather(-1, ids).sum().item() for x in logits]
        chosen.add(k := expects.index(max(expects)))
        best, ids = (logits[k] / 1.5).softmax(-1).topk(4)
        assert torch.equal(e.stored.ids[1:], ids)
        torch.testing.assert_close(e.stored.logps[1:, :4].exp(), best)


def test_a_share_of_the_rows_is_the_students_own(folders, tmp_path):
    """Whether a row is does not depend on how the step is split; prompts stay; other steps choose others."""
    model, args = load(folders["student"])[0], get_args(["--on-policy", "0.5", "--max-new-tokens", "6"])
    loop, rows = loop_of(args, tmp_path), [distill.document(f"Weather: {w} sun", tiny(), 3) for w in world.WEATHER]
    chosen = []
    for step in range(1, 13):
        indices = [[0, 1, 2, 3, 4], [5, 6, 7]]
        new = distill.partly_own(model, tiny(), [rows[:5], rows[5:]], indices, step, args, loop)
        alone = distill.partly_own(model, tiny(), [[e] for e in rows], [[i] for i in range(8)], step, args, loop)
        assert [len(some) for some in new] == [5, 3] and sum(new, []) == sum(alone, [])
        for e, row in zip(sum(new, []), rows, strict=True):
            assert e.input_ids[:3] == row.input_ids[:3] and (e.own or e == row)
        chosen.append([e.own for e in sum(new, [])])
        if step == 1:
            first = sum(new, [])
    assert 0.3 < statistics.fmean(sum(chosen, [])) < 0.7 and len(set(map(tuple, chosen))) > 6
    assert model.training
    args.on_policy, texts = 1.0, set()
    for args.seed, step, loop.rank in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):  # each has texts of its own
        new = distill.partly_own(model, tiny(), [rows], [list(range(8))], step, args, loop)[0]
        texts.add(tuple(tuple(e.input_ids) for e in new))
    assert len(texts) == 4
    args.temperature, wanted = 0.3, distill.continued(model, tiny(), rows, 1, 1.0, ("student", 0, 1, 1), args, loop)
    assert distill.partly_own(model, tiny(), [rows], [list(range(8))], 1, args, loop)[0] == [
        e._replace(own=True) for (e,) in wanted]  # drawn from q itself, whatever the temperature of D
    args.on_policy, args.seed, loop.rank = 0.5, 0, 0
    with torch.no_grad():
        model.embed.weight += 0.5 * torch.randn_like(model.embed.weight)
    assert sum(distill.partly_own(model, tiny(), [rows], [list(range(8))], 1, args, loop), []) != first


# ----------------------------------------------------------------------------------------------------------------------
# The measurement


def test_bits_and_divergences_are_those_of_the_rows(folders, tmp_path):
    """Sums over the rows over bytes and tokens of all; batches of any size give the same; the teacher has a KL of 0."""
    args = get_args(["--micro-batch-size", "2"])
    model, teacher = (load(folders[name])[0] for name in ("student", "base"))
    test = [distill.document(text, tiny(), 2) for text in ("Weather: sun", "Weather: rain fog hail")]
    test.append(distill.conversation({"prompt": "What?", "completion": "é"}, tiny()))
    loop = loop_of(args, tmp_path)
    found = distill.evaluate(model, [teacher.eval()], tiny(), test, 1024, args, loop)
    bits = kls = 0.0
    for e in test:
        p, q = probs(teacher, e.input_ids), probs(model, e.input_ids)
        for t in (t for t, counts in enumerate(e.completion_mask) if counts):
            bits, kls = bits - math.log2(q[t][e.input_ids[t]]), kls + kl(p[t], q[t])
    n_bytes = sum(len(text.encode()) for text in (": sun", ": rain fog hail", "é"))
    assert statistics.fmean(found["bits per byte"]) == pytest.approx(bits / n_bytes, rel=1e-4)
    assert statistics.fmean(found["KL"]) == pytest.approx(kls / sum(sum(e.completion_mask) for e in test), rel=1e-4)
    assert list(found) == ["bits per byte", "KL", "reverse KL"] and model.training
    args.micro_batch_size = 3
    again = distill.evaluate(model, [teacher], tiny(), test, 1024, args, loop)
    for name, values in found.items():
        assert again[name] == pytest.approx(values, rel=1e-4)
    model.eval()
    own = [e for (e,) in distill.continued(model, tiny(), test, 1, 1.0, ("test",), args, loop)]
    total = n = 0.0
    for e in own:
        p, q = probs(teacher, e.input_ids), probs(model, e.input_ids)
        places = [t for t, counts in enumerate(e.completion_mask) if counts and t >= e.n_prompt]  # what it wrote itself
        total, n = total + sum(kl(q[t], p[t]) for t in places), n + len(places)
    assert statistics.fmean(found["reverse KL"]) == pytest.approx(total / n, rel=1e-4)
    itself = distill.evaluate(teacher, [teacher], tiny(), test, 1024, args, loop)
    assert max(map(abs, itself["KL"] + itself["reverse KL"])) < 1e-5
    assert list(distill.evaluate(model, [], tiny(), test, 1024, args, loop)) == ["bits per byte"]


def test_answers_are_judged_greedily(folders, tmp_path, monkeypatch):
    args = get_args(["--task", "rank", "--loss", "hard"])
    test = [distill.world_row("rank", ("test", i), "test", tiny(), args) for i in range(4)]
    wrong = test[0]._replace(input_ids=test[1].input_ids)
    monkeypatch.setattr(distill, "continued", lambda m, t, some, n, temperature, *rest:
                        [[wrong]] + [[e] for e in some[1:]] if temperature == 0 and n == 1 else None)  # fmt: skip
    model = load(folders["student"])[0]
    found = distill.evaluate(model, [], tiny(), test, 1024, args, loop_of(args, tmp_path))
    assert next(iter(found.items())) == ("exact match", [0.0, 1.0, 1.0, 1.0])


# ----------------------------------------------------------------------------------------------------------------------
# Models


def test_the_default_student_is_an_eighth_of_the_tiny_teacher():
    args = get_args([])
    n = [sum(p.numel() for p in m.parameters()) for m in
         (distill.new_student(tiny(), args), Transformer(Config.from_depth(4, 1024, 512)))]  # fmt: skip
    assert n[0] * 8 <= n[1]
    config = distill.new_student(tiny(), get_args(["--depth", "3", "--width", "96"])).config
    assert (config.depth, config.width, config.ffn_width, config.vocab_size) == (3, 96, 192, 1024)
    of_file = get_args(["--data", "x.jsonl", "--teacher", "y"])  # which has rows of up to 1024 tokens
    assert (config.max_length, distill.new_student(tiny(), of_file).config.max_length) == (512, of_file.max_length)


def test_vocabularies_must_be_the_same(folders, tmp_path, stages):
    ours, theirs = tiny(), tiny()
    assert distill.first_difference(ours, theirs) == ""
    other = replace(ours, token_bytes=ours.token_bytes | {300: b"zz"})
    assert distill.first_difference(ours, other).startswith("token 300 is 'zz' in it and ")
    special = replace(ours, special_tokens={k: v for k, v in ours.special_tokens.items() if k != "<image>"})
    assert distill.first_difference(ours, special) == "token {} is nothing in it and '<image>' there".format(
        ours.special("<image>")
    )
    text = (folders["base"] / "tokenizer.json").read_text().replace('"<image>"', '"<picture>"')
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in folders["base"].iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    (odd / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (odd / name).exists():
            (odd / name).write_text((odd / name).read_text().replace("<image>", "<picture>"))
    with pytest.raises(UserError, match=r"odd: not the vocabulary of the student: token \d+ is '<picture>'"):
        train(tmp_path / "out", "--model", folders["student"], "--teacher", odd, "--steps", 0)
    with pytest.raises(UserError, match="not the vocabulary"):
        train(tmp_path / "out", "--teacher", f"{folders['base']},{odd}", "--steps", 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_padded_heads_are_compared_where_there_are_tokens(folders, tmp_path, stages, capsys, dtype):
    """As between the small and the large Qwen2.5; what the teacher thinks of the padding is said."""
    torch.manual_seed(0)
    wide = Transformer(replace(Config.from_depth(1, 1024, 256), vocab_size=1088))
    save(wide, tiny(), tmp_path / "wide")
    flags = ("--teacher", tmp_path / "wide", "--steps", 2, "--rows", 4, "--no-baseline", "--dtype", dtype)
    result = train(tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert "heads of 1024, 1088 rows: the first 1024" in said
    mass = float(said.split("are compared; ")[1].split()[0])
    assert mass == pytest.approx(64 / 1088, rel=0.3)  # the model is all but uniform
    assert math.isfinite(result["after"])


def test_teachers_are_frozen_and_in_eval_mode(folders, tmp_path, stages, monkeypatch):
    kept = []
    real = distill.load_teachers
    monkeypatch.setattr(distill, "load_teachers", lambda *x: kept.append(real(*x)) or kept[-1])
    flags = ("--steps", 3, "--rows", 8, "--no-baseline", "--teacher", f"{folders['base']},{folders['sft']}")
    result = train(tmp_path / "out", *flags)
    ((teachers, _),) = kept
    args = get_args(list(map(str, flags)))
    loop = loop_of(args, tmp_path)
    test = distill.examples(args, tiny(), loop)[1]
    alone = [distill.evaluate(teacher, (), tiny(), test, 1024, args, loop)["bits per byte"] for teacher in teachers]
    bits = sorted(map(statistics.fmean, alone))
    assert result["baselines"]["the best teacher"] == pytest.approx(bits[0], rel=1e-6) != pytest.approx(bits[1])
    for teacher, name in zip(teachers, ("base", "sft"), strict=True):
        assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert difference(teacher.state_dict(), weights(folders[name])) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

RUN = (
    "--steps",
    3,
    "--batch-size",
    5,
    "--micro-batch-size",
    2,
    "--warmup",
    0,
    "--schedule",
    "constant",
    "--lr",
    1e-3,
    "--max-length",
    128,
)


def test_a_run_is_a_plain_loop(folders, data, tmp_path, capsys):
    """Three steps of AdamW on the sum over the tokens of a step divided by their number, on ragged rows."""
    flags = ("--data", data, "--model", folders["student"], "--teacher", folders["base"], *RUN[2:], "--epochs", 0.55,
             "--schedule", "linear", "--weight-decay", 5, "--grad-clip", 0.5, "--eval-every", 2)  # fmt: skip
    result = train(tmp_path / "run", *flags, "--loss", "jsd:skew=0.3,alpha=0.25")
    said = capsys.readouterr().err
    assert "step 2: bits per byte " in said and "step 1: bits" not in said and "step 3: bits" not in said
    args = get_args(["--out", str(tmp_path / "run"), *map(str, flags), "--loss", "jsd:skew=0.3,alpha=0.25"])
    loop = Loop(args, "distill")
    rows, test = distill.examples(args, tiny(), loop)
    assert len(rows) == 24  # 0.55 of which, 5 at a time, are 3 steps
    model, teacher = load(folders["student"])[0], load(folders["base"])[0]
    decay = [{"params": [p for p in model.parameters() if (p.ndim == 2) == is_matrix], "weight_decay": 5.0 * is_matrix}
             for is_matrix in (True, False)]  # fmt: skip
    optimizer, lines = torch.optim.AdamW(decay, lr=1.0, betas=(0.9, 0.95)), []
    for step in (1, 2, 3):
        total, hard, n = 0.0, 0.0, 0
        for e in (rows[i] for i in loop.batch_indices(len(rows), step)):
            ids = torch.tensor([e.input_ids])
            q, p = (m(ids)[0, :-1].log_softmax(-1) for m in (model, teacher))
            p = p.detach()
            m = (0.3 * p.exp() + 0.7 * q.exp()).log()
            total = total + (0.75 * (0.3 * p.exp() * (p - m) + 0.7 * q.exp() * (q - m))).sum()
            hard = hard - 0.25 * q.gather(-1, ids[0, 1:, None]).sum()
            n += len(e.input_ids) - 1
        optimizer.zero_grad()
        ((total + hard) / n).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (4 - step) / 3
        optimizer.step()
        lines.append((((total + hard) / n).item(), (total / n).item(), (hard / n).item(), norm.item()))
    assert apart(weights(tmp_path / "run"), model.state_dict(), weights(folders["student"])) < 0.01
    first = logged(tmp_path / "run")[0]
    assert [first[k] for k in ("loss", "soft", "hard", "grad_norm")] == pytest.approx(lines[0], rel=1e-4)
    assert result["metric"] == "bits per byte" and not result["higher_is_better"] and result["n"] == len(test)
    assert result["variant"] == "jsd" and set(result["metrics"]) == {"KL"}
    assert result["baselines"].keys() == {"the teacher"}


@pytest.mark.parametrize("loss", ["forward_kl:hidden=1", "minillm", "jsd:on_policy=0.5,alpha=0.3",
                                  pytest.param("tvd:top_k=3", marks=pytest.mark.slow)])  # fmt: skip
def test_splitting_a_batch_changes_nothing(folders, data, tmp_path, loss):
    flags = ("--data", data, "--model", folders["student"], "--teacher", folders["base"], *RUN, "--max-new-tokens", 8)
    for size in (1, 2, 5):
        train(tmp_path / str(size), *flags, "--loss", loss, "--micro-batch-size", size)
    one, start = weights(tmp_path / "5"), weights(folders["student"])
    assert max(apart(weights(tmp_path / str(size)), one, start) for size in (1, 2)) < 0.01
    for a, b in zip(logged(tmp_path / "1"), logged(tmp_path / "5"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


RANKS = (*RUN, "--loss", "forward_kl:hidden=0.5")


def on_a_rank(rank: int, folder: Path) -> None:
    flags = ("--data", folder / "data.jsonl", "--model", folder / "student", "--teacher", folder / "base")
    train(folder / "two", *flags, *RANKS)


def test_two_ranks_equal_one(folders, data, tmp_path):
    """5 rows a step: of 3 and 2, so that one rank has an empty micro-batch; the projection is summed, too."""
    for name in ("student", "base"):
        (tmp_path / name).symlink_to(folders[name])
    (tmp_path / "data.jsonl").write_bytes(data.read_bytes())
    on_two_ranks(on_a_rank, tmp_path)
    flags = ("--data", data, "--model", folders["student"], "--teacher", folders["base"])
    train(tmp_path / "one", *flags, *RANKS)
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert apart(weights(tmp_path / "two"), weights(tmp_path / "one"), weights(folders["student"])) < 0.01


class Stop(Exception): ...


class StopsAfterTwo(loop_module.Loop):
    def save(self, step, **kept):
        super().save(step, **kept)
        if step == 2:
            raise Stop


@pytest.mark.parametrize("loss", ["forward_kl:hidden=1", "jsd:on_policy=0.5", "sequence", "reverse_kl:top_k=3"])
def test_resuming_is_exact(folders, stages, tmp_path, monkeypatch, loss):
    flags = ("--loss", loss, "--steps", 4, "--rows", 6, "--batch-size", 3, "--save-every", 1, "--no-baseline",
             "--max-new-tokens", 8, "--samples", 2)  # fmt: skip
    whole = train(tmp_path / "whole", *flags)
    monkeypatch.setattr(distill, "Loop", StopsAfterTwo)
    with pytest.raises(Stop):
        train(tmp_path / "parts", *flags)
    monkeypatch.setattr(distill, "Loop", Loop)
    parts = train(tmp_path / "parts", *flags, "--resume")
    assert all(parts[name] == whole[name] for name in ("before", "after", "n", "ci95", "metrics"))
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_all_probabilities_stored_teach_like_the_teacher(folders, stages, tmp_path, monkeypatch):
    """k = V. And once they are stored nobody asks the teacher."""
    flags = ("--rows", 6, "--no-baseline", *RUN)
    train(tmp_path / "live", *flags)
    train(tmp_path / "start", *flags, "--lr", 0)
    real, asked = distill.taught, []

    def watched(teachers, batch, n_words, args):
        asked.append(batch.stored is None)
        return real(teachers if asked[-1] else None, batch, n_words, args)

    monkeypatch.setattr(distill, "taught", watched)
    train(tmp_path / "stored", *flags, "--top-k", 1024)
    assert asked == [True] * 3 + [False] * 9  # 6 rows, then 3 steps of 3 batches
    live, stored, start = (weights(tmp_path / name) for name in ("live", "stored", "start"))
    assert apart(stored, live, start) < 0.01
    train(tmp_path / "few", *flags, "--top-k", 2)
    assert apart(weights(tmp_path / "few"), live, start) > 0.1


def test_an_empty_batch_asks_no_teacher_and_changes_nothing(folders, stages, tmp_path, monkeypatch):
    """A rank that has none of the last rows would wait for ranks that have some, where --parallel fsdp gathers."""
    flags, real, asked = ("--rows", 6, "--no-baseline", *RUN, "--steps", 1, "--top-k", 3), distill.taught, []
    train(tmp_path / "whole", *flags)
    micro_batches = Loop.micro_batches
    monkeypatch.setattr(Loop, "micro_batches", lambda *x: [*micro_batches(*x), []])
    monkeypatch.setattr(distill, "taught", lambda teachers, batch, *x: asked.append(
        batch.stored is None) or real(teachers, batch, *x))  # fmt: skip
    train(tmp_path / "padded", *flags)
    assert asked == [True] * 3 + [False] * 4  # 6 rows, then 3 batches and an empty one
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "padded")) == 0
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "padded"), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def test_texts_that_were_cut_have_no_entropy(folders, stages, tmp_path):
    """Not that of the whole text, which a model could beat."""
    said = train(tmp_path / "run", "--steps", 1, "--rows", 6, "--no-baseline", "--max-length", 24, "--too-long", "cut")
    assert list(said["baselines"]) == ["the teacher"]


def test_steps_on_the_text_leave_some_for_the_loss(folders, stages, tmp_path):
    with pytest.raises(UserError, match="--sft-steps 3: of 3 steps none is left for --loss minillm"):
        train(tmp_path / "run", "--loss", "minillm", "--steps", 3, "--sft-steps", 3)
    assert get_args(["--loss", "minillm", "--steps", "3"]).sft_steps == 0


@pytest.mark.parametrize("steps", [3, 5])
def test_the_default_run_says_what_was_closed(folders, stages, tmp_path, capsys, steps):
    """The same student on hard labels, from the same weights, beside the teacher and the entropy of the text.

    It has as many steps as this run, but no more than 4 (see `stages`); the entropy is what the chain itself says.
    """
    result = train(tmp_path / "run", "--steps", steps, "--rows", 6, "--batch-size", 3)
    hard = json.loads((tmp_path / "run" / "hard" / "result.json").read_text())
    assert hard["variant"] == "hard" and hard["before"] == result["before"]
    said = result["baselines"]
    assert list(said) == ["the same student on hard labels", "the teacher", "entropy of the text"]
    assert said["the same student on hard labels"] == hard["after"] != result["after"]
    bits = n_bytes = 0.0
    for e in (distill.world_row("weather", ("test", i), "test", tiny(), get_args([])) for i in range(3)):
        days = e.row["text"].split()[1:]
        bits += math.log2(8 * 7)
        for before, yesterday, today in zip(days, days[1:], days[2:], strict=False):
            bits -= math.log2(world.WEATHER_CHAIN[before, yesterday][world.WEATHER.index(today)])
        n_bytes += len(e.row["text"]) - len("Weather")
    assert said["entropy of the text"] == pytest.approx(bits / n_bytes)
    share = (result["after"] - hard["after"]) / (said["the teacher"] - hard["after"])
    closed = f"{share:.0%} of the gap between hard labels and the teacher is closed"
    nothing = "hard labels alone are as good as the teacher: there is no gap to close"
    assert (closed if said["the teacher"] < hard["after"] else nothing) in capsys.readouterr().err
    settings = json.loads((tmp_path / "run" / "hard" / "settings.json").read_text())["flags"]
    assert (
        settings["alpha"] == 1
        and settings["steps"] == min(steps, 4)
        and settings["lr"] == 5e-4
        and settings["weight_decay"] == 1
        and settings["hidden"] == 0
    )


def test_the_gap_is_the_way_from_hard_labels_to_the_teacher():
    shares = [distill.gap_closed(value, hard=0.6, teacher=0.4) for value in (0.7, 0.6, 0.55, 0.4, 0.3)]
    assert shares == pytest.approx([-0.5, 0.0, 0.25, 1.0, 1.5])
    assert str(distill.gap_closed(0.6, hard=0.6, teacher=0.4)) == "0.0"  # a table says 0.000, not -0.000


def test_gradients_are_clipped(folders, stages, tmp_path, monkeypatch):
    norms, sizes, real = [], [], distill.clip
    monkeypatch.setattr(distill, "clip", lambda model, norm: (
        norms.append(norm), sizes.append(sum(p.numel() for p in model.parameters())),
        real(model, norm))[2])  # fmt: skip
    for more in ((), ("--hidden", 1)):
        train(tmp_path / "run", "--steps", 2, "--rows", 6, "--batch-size", 3, "--grad-clip", 0.25, *more)
    assert set(norms) == {0.25} and len(norms) >= 4
    width = [load(folder)[0].config.width for folder in (tmp_path / "run", folders["base"])]
    assert max(sizes) - min(sizes) == width[1] * (width[0] + 1)  # the projection, too


def test_sequence_learns_from_texts_of_the_teacher(folders, stages, tmp_path, monkeypatch):
    seen = []
    real = distill.collate
    monkeypatch.setattr(distill, "collate", lambda some, *x: seen.append(some) or real(some, *x))
    flags = ("--loss", "sequence", "--rows", 3, "--samples", 2, "--max-new-tokens", 6, "--no-baseline", *RUN)
    train(tmp_path / "run", *flags)
    teacher, args = load(folders["base"])[0].eval(), get_args(list(map(str, flags)))
    rows, test = distill.examples(args, tiny(), None)
    written = distill.continued(teacher, tiny(), rows, 2, 1.0, ("teacher", 0), args, loop_of(args, tmp_path))
    texts = {tuple(e.input_ids) for some in written for e in some}
    trained = [tuple(e.input_ids) for some in seen if len(some) <= 2 for e in some]
    assert texts <= set(trained) and not {tuple(e.input_ids) for e in rows} & set(trained)


def test_questions_of_a_file_and_a_rule(folders, tmp_path):
    """{"prompt", "answer"}: the teacher's own answers, those that the rule finds right; here none is."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(40)))
    flags = (
        "--data",
        path,
        "--model",
        folders["student"],
        "--teacher",
        folders["sft"],
        "--max-length",
        128,
        "--loss",
        "sequence",
        "--steps",
        1,
    )
    with pytest.raises(UserError, match="no text of the teacher passes --check number"):
        train(tmp_path / "out", *flags, "--check", "number", "--samples", 2, "--max-new-tokens", 4)
    for loss in ("sequence", "jsd:on_policy=0.5"):  # at once: 250 and a prompt are more than 256
        with pytest.raises(UserError, match="--max-new-tokens 250: the longest prompt leaves room for"):
            train(tmp_path / "none", *flags, "--loss", loss, "--max-new-tokens", 250)
    assert not (tmp_path / "none").exists()
    result = train(tmp_path / "out", *flags, "--max-new-tokens", 4)
    assert result["metric"] == "bits per byte"


def test_weak_to_strong_is_three_runs(folders, stages, tmp_path, monkeypatch):
    """The weak one learns the truth, the strong one what it says on other questions, the ceiling the truth."""
    runs, real = [], distill.main
    monkeypatch.setattr(distill, "WORLD", distill.WORLD | {"rank": distill.WORLD["rank"] | {"rows": 8, "steps": 2}})
    monkeypatch.setattr(distill, "OF_WEAK", {"rows": 8, "steps": 2})
    monkeypatch.setattr(distill, "OF_STRONG", {"rows": 6, "steps": 2, "lr": 1e-4})
    monkeypatch.setattr(distill, "main", lambda args: runs.append(args) or real(args))
    levels = {"weak": [0.0, 1.0, 0.0], "strong": [1.0, 1.0, 0.0], "ceiling": [1.0, 1.0, 1.0]}
    evaluate, measured, devices = distill.evaluate, [], []

    def watched(model, teachers, tokenizer, test, n, args, loop):
        if loop.out.name != "w2s":
            return evaluate(model, teachers, tokenizer, test, n, args, loop)
        measured.append((difference(model.state_dict(), weights(args.out)), test))
        return {"exact match": levels[args.out.name]}

    monkeypatch.setattr(distill, "evaluate", watched)
    monkeypatch.setattr(distill, "load", lambda path, **how: devices.append((path, how.get("device"))) or
                        load(path, **how))  # fmt: skip
    result = real(get_args(["--weak-to-strong", "--out", str(tmp_path / "w2s")]))
    held_out = distill.examples(runs[0], tiny(), loop_of(runs[0], tmp_path))[1]
    assert measured == [(0.0, held_out)] * 3
    assert [(path.name, device) for path, device in devices if device] == [(name, CPU) for name in levels]
    assert [run.loss for run in runs] == ["hard", "sequence", "hard"]
    assert [run.model for run in runs] == [None, str(folders["sft"]), str(folders["sft"])]
    assert runs[1].teacher == str(tmp_path / "w2s" / "weak") and runs[1].check is None and runs[1].samples == 1
    assert [run.seed for run in runs] == [0, 1, 1] and runs[0].rows == 8 and runs[1].rows == runs[2].rows == 6
    assert result["metric"] == "exact match" and result["variant"] == "weak-to-strong"
    assert result["before"] == pytest.approx(1 / 3) and result["after"] == pytest.approx(2 / 3)
    assert result["baselines"] == {"ceiling: the large model on the truth": 1.0}
    gap = result["metrics"]["gap recovered"]
    assert (gap["before"], gap["after"]) == (0.0, pytest.approx(0.5))
    one = weights(tmp_path / "w2s" / "strong")
    shutil.rmtree(tmp_path / "w2s" / "ceiling")  # as if interrupted before the third run
    again = real(get_args(["--weak-to-strong", "--out", str(tmp_path / "w2s"), "--resume"]))
    assert [run.resume for run in runs] == [False] * 3 + [True, True, False]
    assert again["baselines"] == result["baselines"] and difference(one, weights(tmp_path / "w2s" / "strong")) == 0


def test_a_table_of_the_losses(folders, stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "TABLE", ("hard", "forward_kl", "forward_kl:top_k=3"))
    flags = ("--loss", "all", "--steps", 2, "--rows", 4, "--batch-size", 2, "--seeds", 2, "--max-new-tokens", 4)
    rows = train(tmp_path / "all", *flags)["rows"]
    assert json.loads((tmp_path / "all" / "table.json").read_text())["rows"] == rows
    lines = variants_table(tmp_path / "all" / "table.json").splitlines()  # as in the README
    assert lines[0] == "| loss | seeds | bits per byte | KL | reverse KL | gap closed | seconds |"
    assert len(lines) == 2 + len(rows) and lines[2].startswith("| teacher | 1 | ")
    assert [(row["loss"], row["seeds"]) for row in rows] == [
        ("teacher", 1), ("new student", 1), ("hard", 2), ("forward_kl", 2), ("forward_kl:top_k=3", 1)]  # fmt: skip
    bits = [row["bits per byte"]["mean"] for row in rows]
    for row, value in zip(rows, bits, strict=True):
        assert row["gap closed"]["mean"] == pytest.approx((bits[2] - value) / (bits[2] - bits[0]))
        assert list(row)[2:] == ["bits per byte", "KL", "reverse KL", "gap closed", "seconds"]
    one = json.loads((tmp_path / "all" / "forward_kl-top_k=3-0" / "settings.json").read_text())["flags"]
    assert one["loss"] == "forward_kl" and one["top_k"] == 3 and not one["baseline"]
    assert rows[0]["bits per byte"]["mean"] == json.loads(
        (tmp_path / "all" / "hard-0" / "result.json").read_text())["baselines"]["the teacher"]  # fmt: skip


def test_defaults_are_those_of_the_loss_the_task_and_the_kind_of_run(folders):
    args = get_args([])
    assert (args.loss, args.task, args.rows, args.lr, args.alpha, args.temperature) == (
        "forward_kl",
        "weather",
        24,
        3e-3,
        0,
        1,
    )
    assert get_args(["--loss", "jsd"]).skew == 0.5 and get_args(["--loss", "skew_kl"]).skew == 0.1
    assert get_args(["--loss", "minillm"]).on_policy == 1 and get_args(["--loss", "hard"]).alpha == 1
    assert get_args(["--task", "steps", "--loss", "sequence"]).check == "exact" and get_args([]).check is None
    own = get_args(["--data", "x.jsonl", "--model", "y", "--teacher", "z"])
    assert (own.lr, own.steps, own.rows, own.micro_batch_size, own.max_length) == (1e-5, None, None, 4, 1024)
    named = get_args(["--loss", "jsd:skew=0.2,on_policy=0.75"])
    assert (named.loss, named.skew, named.on_policy) == ("jsd", 0.2, 0.75)
    assert get_args(["--loss", "hard"]).lr < args.lr == get_args(["--loss", "sequence"]).lr
    rank = ["--task", "rank", "--loss", "hard"]
    assert get_args(rank).lr == distill.WORLD["rank"]["lr"] and get_args([*rank, "--model", "x"]).lr == 1e-5
    assert get_args(["--loss", "minillm"]).sft_steps == 200 and args.sft_steps == 0
    assert get_args(["--loss", "minillm", "--steps", "150"]).sft_steps == 37  # a quarter
    for name in distill.TABLE:
        distill.resolved(Namespace(**vars(get_args(["--loss", "all"])) | {"loss": name}))
    assert set(distill.LOSSES) <= set(distill.TABLE) and set(distill.MAIN_LOSSES) <= set(distill.TABLE)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--loss", "kl"], "--loss kl: there are hard, forward_kl"),
        (["--loss", "jsd:beta=1"], "beta is not one of"),
        (["--loss", "jsd:skew=x"], "skew: expected a finite number"),
        (["--loss", "forward_kl", "--skew", "0.5"], "--skew: --loss forward_kl has none"),
        (["--loss", "minillm", "--temperature", "2"], "--temperature: --loss minillm has none"),
        (["--loss", "hard", "--alpha", "0.5"], "--alpha: --loss hard has none"),
        (["--alpha", "1.5"], "--alpha: expected a number of at most 1"),
        (["--on-policy", "1.5"], "--on-policy: expected a share"),
        (["--temperature", "0"], "--temperature: expected a number above 0"),
        (["--loss", "jsd", "--skew", "0"], "--skew: expected a number between"),
        (["--loss", "skew_kl", "--skew", "1"], "--skew: expected a number between"),
        (["--loss", "hard", "--hidden", "1"], "--hidden: --loss hard has no teacher"),
        (["--loss", "sequence", "--top-k", "3"], "--top-k: --loss sequence has no use"),
        (["--top-k", "3", "--on-policy", "0.5"], "--top-k: no step asks"),
        (["--loss", "minillm", "--top-k", "3"], "--top-k: no step asks"),
        (["--top-k", "3", "--hidden", "1"], "--top-k: no step asks"),
        (["--width", "40"], "--width: expected a multiple of 32"),
        (["--hidden", "1", "--parallel", "fsdp"], "--hidden: the projection is not sharded"),
        (["--on-policy", "1", "--parallel", "fsdp"], "--on-policy: each rank samples"),
        (["--loss", "minillm", "--fusion", "min_ce"], "--fusion min_ce chooses by the text"),
        (["--loss", "all", "--data", "x.jsonl"], "--loss all makes a table"),
        (["--loss", "all", "--task", "rank"], "--loss all makes a table"),
        (["--loss", "all", "--teacher", "a,b"], "--loss all makes a table"),
        (["--loss", "minillm", "--on-policy", "0", "--top-k", "4"], "--top-k: no step asks"),
        (["--weak-to-strong", "--data", "x.jsonl"], "of its own: it takes no --data"),
        (["--weak-to-strong", "--model", "x"], "of its own: it takes no --model"),
        (["--weak-to-strong", "--teacher", "x"], "of its own: it takes no --teacher"),
        (["--weak-to-strong", "--steps", "0"], "of its own: it takes no --steps"),
        (["--weak-to-strong", "--rows", "9"], "of its own: it takes no --rows"),
        (["--weak-to-strong", "--loss", "jsd"], "of its own: it takes no --loss"),
        (["--weak-to-strong", "--task", "steps"], "of its own: it takes no --task"),
        (["--loss", "sequence", "--teacher", "a,b"], "--loss sequence and --hidden have one teacher"),
        (["--hidden", "1", "--teacher", "a,b"], "--loss sequence and --hidden have one teacher"),
        (["--check", "nice", "--loss", "sequence"], "nice"),
        (["--check", "exact", "--loss", "sequence"], "of the weather there are none"),
        (["--check", "exact", "--task", "steps", "--loss", "jsd"], "of answers that a teacher writes"),
        (["--epochs", "2"], "--epochs counts passes over --data"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(flags)


def test_a_file_needs_a_teacher_and_top_k_a_large_enough_vocabulary(folders, data, tmp_path, stages):
    with pytest.raises(UserError, match="--teacher: which model teaches"):
        train(tmp_path / "out", "--data", data, "--model", folders["student"])
    with pytest.raises(UserError, match="--top-k 2000: the vocabulary has 1024"):
        train(tmp_path / "out", "--top-k", 2000, "--steps", 1)
    assert (
        train(
            tmp_path / "out",
            "--data",
            data,
            "--model",
            folders["student"],
            "--loss",
            "hard",
            "--steps",
            1,
            "--max-length",
            128,
        )["baselines"]
        == {}
    )
    flags = ("--data", data, "--loss", "hard", "--steps", 1, "--max-length", 128, "--depth", 1)
    with pytest.raises(UserError, match="--teacher: which model"):
        train(tmp_path / "none", *flags)
    assert not (tmp_path / "none").exists()
    assert "the teacher" in train(tmp_path / "out", *flags, "--teacher", folders["base"])["baselines"]


def test_the_projection_learns(folders, stages, tmp_path):
    found = []
    for steps in (1, 3):
        train(tmp_path / "run", "--loss", "forward_kl:hidden=1", "--rows", 4, "--no-baseline", *RUN, "--steps", steps)
        found.append(
            read_safetensors(tmp_path / "run" / "checkpoint" / "training.safetensors")["extra.projection.weight"]
        )
    assert found[0].shape == (64, 64) and (found[0] - found[1]).abs().max() > 1e-3
    lines = logged(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(lines[0]["soft"] + lines[0]["hidden"], rel=1e-6)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_run_knows_which_texts_are_the_students_own(folders, stages, tmp_path, monkeypatch, share):
    seen, real = [], distill.objective
    monkeypatch.setattr(distill, "objective", lambda m, p, batch, *x: seen.append(batch) or real(m, p, batch, *x))
    flags = ("--rows", 6, "--no-baseline", *RUN, "--max-new-tokens", 5, "--loss", "jsd:alpha=0.5")
    train(tmp_path / "run", *flags, "--on-policy", share)
    rows = {tuple(e.input_ids) for e in distill.examples(get_args(["--rows", "6"]), tiny(), None)[0]}
    for batch in seen:
        for ids, mask, own in zip(batch.input_ids.tolist(), batch.completion_mask, batch.own, strict=True):
            n = int(mask.sum()) + 1
            assert own.tolist() == [0, 0] + [1 - (tuple(ids[:n]) in rows)] * (n - 2) + [0] * (len(ids) - n)
    assert {int(batch.own[b, 2]) for batch in seen for b in range(len(batch.own))} == {0: {0}, 0.5: {0, 1}, 1: {1}}[
        share
    ]


def test_a_run_may_begin_on_the_text_alone(folders, stages, tmp_path):
    """Then the first steps are those of hard labels, with no text of the student and no teacher."""
    flags = ("--rows", 6, "--no-baseline", *RUN, "--max-new-tokens", 5, "--weight-decay", 0, "--log-every", 1)
    train(tmp_path / "hard", *flags, "--loss", "hard")
    train(tmp_path / "soft", *flags, "--loss", "forward_kl:hidden=1,on_policy=1", "--sft-steps", 2)
    hard, soft = logged(tmp_path / "hard")[0], logged(tmp_path / "soft")
    assert soft[0]["loss"] == soft[0]["hard"] == pytest.approx(hard["loss"], rel=1e-6)
    assert "soft" in soft[-1] and "hard" not in soft[-1] and soft[-1]["step"] == 3
    train(tmp_path / "some", *flags, "--loss", "jsd", "--sft-steps", 2)
    for a, b in zip(logged(tmp_path / "some")[:2], logged(tmp_path / "hard"), strict=False):
        assert a["loss"] == a["hard"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == b["grad_norm"]


@pytest.mark.slow
def test_the_default_command_closes_most_of_the_gap(tmp_path):
    """With the tiny base model; 1 would be as good as the teacher."""
    result = train(tmp_path / "run")
    said = result["baselines"]
    hard, teacher = said["the same student on hard labels"], said["the teacher"]
    assert said["entropy of the text"] < teacher < hard
    assert distill.gap_closed(result["after"], hard, teacher) > 0.6

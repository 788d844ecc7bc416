"""Facts about vlm.py: contrast by hand, pictures in their slots, frozen parts, cached decoding, data, whole runs."""

import functools
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dpo
import loop as loop_module
import vlm as vlm_module
from data import chat, pictures, world
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop
from lora import METHODS, adapt
from model import Config, Transformer, generate, load, read_safetensors, save
from tests.test_loop import on_two_ranks
from vlm import (
    CONNECTORS,
    STAGES,
    VLM,
    Row,
    Vision,
    answer_logps,
    clip_loss,
    collate,
    conversation,
    cut,
    encode,
    expand,
    get_args,
    learning,
    load_vlm,
    main,
    planned,
    positions_2d,
    rate,
    replies,
    siglip_loss,
)

CPU = torch.device("cpu")
WORLD_EXAM = vlm_module.world_exam  # which the runs below replace by a few rows
CONCLUDE = vlm_module.conclude  # which they leave out, but one: it asks every question thrice more
IMAGE = tiny().special("<image>")
SMALL = Vision(width=16, depth=1, heads=2, queries=3, joint=8, text_depth=1)


def language_model(depth: int = 2, max_length: int = 256) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Config.from_depth(depth, tiny().vocab_size, max_length))
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 3  # so that token probabilities differ
    return model


def small(connector: str = "mlp", dtype: torch.dtype = torch.float32, **shape) -> VLM:
    """With every part disturbed, so that nothing is zero or one any more."""
    model = language_model()
    torch.manual_seed(1)
    net = VLM(model, IMAGE, Vision(**{**vars(SMALL), "connector": connector, **shape})).to(dtype)
    with torch.no_grad():
        for name, p in net.vision().items():
            if name not in ("log_scale", "bias"):
                p += 0.1 * torch.randn_like(p) + (name == "connector.gates")
    return net


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def row(net: VLM, turns: list[tuple[str, str]], *seeds: int, ask: bool = False, captions: tuple = ()) -> Row:
    messages, shown = conversation(turns, len(seeds)), [picture(s) for s in seeds]
    return encode(messages, shown, tiny(), net.connector.slots, ask=ask, captions=captions)


def three_rows(net: VLM) -> list[Row]:
    """Of different lengths, with one picture, none and two."""
    return [row(net, [("What colour is the square?", "red"), ("And the star?", "blue")], 0),
            row(net, [("Sort 3 1 2.", "1 2 3")]),
            row(net, [("Which is larger?", "the first one of them")], 1, 2)]  # fmt: skip


@pytest.fixture(params=CONNECTORS)
def net(request) -> VLM:
    return small(request.param)


# ----------------------------------------------------------------------------------------------------------------------
# The contrast


def unit(B: int, n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(B, n, 5, generator=g, dtype=torch.float64), dim=-1)


SAME = torch.eye(4, dtype=torch.bool)
TWINS = SAME.clone()
TWINS[1, 3] = TWINS[3, 1] = True  # captions 1 and 3 are the same


@pytest.mark.parametrize("n_wrong", [0, 2])
@pytest.mark.parametrize("same", [SAME, TWINS], ids=["different", "twins"])
def test_contrastive_losses_by_hand(same, n_wrong):
    """With captions, too, that only their own picture must tell from the right one."""
    pairs, log_scale, bias = unit(4, 2 + n_wrong), torch.tensor(1.3).double(), torch.tensor(-0.7).double()

    def z(i, text):
        return math.exp(1.3) * sum(float(a) * float(b) for a, b in zip(pairs[i, 0], text, strict=True))

    clip, siglip = [], []
    for n in range(4):
        others = [m for m in range(4) if m == n or not same[n, m]]
        nearly = [z(n, text) for text in pairs[n, 2:]]
        own = z(n, pairs[n, 1])
        a = math.log(sum(math.exp(x) for x in [*(z(n, pairs[m, 1]) for m in others), *nearly])) - own
        b = math.log(sum(math.exp(z(m, pairs[n, 1])) for m in others)) - own
        clip.append((a + b) / 2)
        wrong = [*(z(n, pairs[m, 1]) for m in others if m != n), *nearly]
        siglip.append(math.log1p(math.exp(-(own - 0.7))) + sum(math.log1p(math.exp(x - 0.7)) for x in wrong))
    torch.testing.assert_close(clip_loss(pairs, log_scale, bias, same), torch.tensor(clip).double())
    torch.testing.assert_close(siglip_loss(pairs, log_scale, bias, same), torch.tensor(siglip).double())


def test_known_values_of_the_contrast():
    """All alike: ln B; far apart: 0. SigLIP begins where no pair is believed to be one: 10 - 10 x for its own."""
    alike = F.normalize(torch.ones(4, 2, 5), dim=-1)
    scale, bias = (torch.tensor(x) for x in vlm_module.CONTRASTS["clip"][1:])
    scale = small().log_scale.detach()
    assert scale.exp().item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(clip_loss(alike, scale, bias, SAME), torch.full((4,), math.log(4)))
    apart = torch.eye(4)[:, None].expand(-1, 2, -1)
    assert clip_loss(apart, torch.tensor(4.0), bias, SAME).max() < 1e-6
    scale, bias = (torch.tensor(x) for x in vlm_module.CONTRASTS["siglip"][1:])
    at_first = siglip_loss(apart, scale.log(), bias, SAME)
    torch.testing.assert_close(at_first, torch.full((4,), math.log(2) + 3 * math.log1p(math.exp(-10))))


def test_top1_counts_captions_that_say_the_same():
    pairs = torch.stack([torch.eye(4), torch.eye(4)[[0, 3, 2, 1]]], dim=1)
    assert vlm_module.top1(pairs, SAME) == 0.5 and vlm_module.top1(pairs, TWINS) == 1.0


def contrast_rows(net: VLM, n: int = 5, n_wrong: int = 0) -> list[Row]:
    texts = ["red star", "one large blue circle is above it", "two", "red star", "a b c d e f"]
    wrong = [f"a green {'very ' * i}{noun}" for i, noun in enumerate("star circle square triangle".split())]
    return [row(net, [("x", "y")], i, captions=(texts[i], *wrong[i % 3 :][:n_wrong])) for i in range(n)]


@pytest.mark.parametrize("contrast", ["clip", "siglip"])
@pytest.mark.parametrize(("sizes", "n_wrong"), [((5,), 0), ((3, 2), 2), ((1, 1, 1, 1, 1), 1)])
def test_splitting_the_contrast_changes_nothing(contrast, sizes, n_wrong, tmp_path):
    """GradCache: the gradient of the whole batch, whatever is embedded at a time."""
    net = small(contrast=contrast)
    rows = contrast_rows(net, n_wrong=n_wrong)
    same = torch.tensor([[a.captions[0] == b.captions[0] for b in rows] for a in rows])
    pairs = net.pair(collate(rows, 48, CPU))
    loss = vlm_module.CONTRASTS[contrast][0](pairs, net.log_scale, net.bias, same).mean()
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in net.vision().items() if p.grad is not None}
    net.zero_grad()
    batches, start = [], 0
    for size in sizes:
        batches.append(collate(rows[start : start + size], 48, CPU))
        start += size
    found, right = vlm_module.contrast_backward(net, batches, same, n_wrong, a_loop(tmp_path))
    assert found.item() == pytest.approx(loss.item(), rel=1e-5) and 0 <= right <= 1
    assert {name for name, p in net.vision().items() if p.grad is not None} == wanted.keys() >= {"log_scale"}
    for name, p in net.vision().items():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], atol=2e-5, rtol=1e-3, msg=name)
    assert all(p.grad is None for p in net.model.parameters())
    assert ("bias" in wanted) == (contrast == "siglip")


def a_loop(folder: Path, *flags: object) -> Loop:
    return Loop(get_args(["--out", str(folder), *map(str, flags)]), "vlm")


def test_pairs_are_of_a_picture_and_its_whole_caption():
    """Of length 1; padding is not seen, the last word is; and the picture is."""
    net = small()
    rows = contrast_rows(net, n_wrong=2)
    pairs = net.pair(collate(rows, 48, CPU))
    assert pairs.shape == (5, 4, 8)
    torch.testing.assert_close(pairs.norm(dim=-1), torch.ones(5, 4))
    for i in range(5):
        torch.testing.assert_close(net.pair(collate(rows[i : i + 1], 48, CPU))[0], pairs[i], atol=1e-5, rtol=1e-4)
        for n in range(3):
            alone = net.pair(collate([rows[i]._replace(captions=rows[i].captions[n : n + 1])], 48, CPU))[0]
            torch.testing.assert_close(alone, pairs[i, [0, 1 + n]], atol=1e-5, rtol=1e-4)
    own, *others = rows[1].captions
    changed = rows[1]._replace(captions=((*own[:-2], 5, own[-1]), *others))
    moved = net.pair(collate([changed], 48, CPU))[0] - pairs[1]
    assert moved[[0, 2, 3]].abs().max() < 1e-5 and moved[1].abs().max() > 1e-4
    ended = rows[1]._replace(captions=((*own[:-1], 5), *others))
    assert (net.pair(collate([ended], 48, CPU))[0] - pairs[1])[1].abs().max() > 1e-4, "its end has seen all of it"
    assert all(caption[-1] == tiny().eos_ids[0] for caption in rows[1].captions)


# ----------------------------------------------------------------------------------------------------------------------
# The encoder and the connectors


def test_positions_tell_row_and_column():
    found = positions_2d(6, 16).view(6, 6, 16)
    for r in range(6):
        for c in range(6):
            for i in range(4):
                f = 1 / 100 ** (i / 4)
                wanted = [math.sin(r * f), math.cos(r * f), math.sin(c * f), math.cos(c * f)]
                at = found[r, c, [i, 4 + i, 8 + i, 12 + i]]
                torch.testing.assert_close(at, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    assert len({tuple(x.tolist()) for x in found.flatten(0, 1)}) == 36


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_patches_stand_row_by_row(stem):
    """With no block, a change of the patch in row 2, column 4 is seen in feature 2 * 6 + 4, with convolutions most."""
    net = small(stem=stem, depth=0)
    a = picture(0)
    b = a.copy()
    b[16:24, 32:40] = 255 - b[16:24, 32:40]
    rows = [row(net, [("x", "y")], 0)._replace(pictures=(p,)) for p in (a, b)]
    with torch.no_grad():
        features = net.encoder(collate(rows, 48, CPU).pixels)
    moved = (features[0] - features[1]).abs().amax(-1).view(6, 6)
    if stem == "patch":
        assert (moved > 1e-6).nonzero().tolist() == [[2, 4]]
    else:
        assert moved[1:4, 3:6].mean() > 5 * moved[:, :2].max(), "GroupNorm carries a little of it everywhere"
    pixels = collate(rows, 48, CPU).pixels
    assert pixels.shape == (2, 3, 48, 48) and pixels.max() <= 1
    assert pixels[0, 1, 3, 5].item() == pytest.approx(a[3, 5, 1] / 255)


def test_every_patch_sees_every_other():
    net = small(stem="patch")
    a, b = picture(0), picture(0)
    b[:8, :8] = 255 - b[:8, :8]
    rows = [row(net, [("x", "y")], 0)._replace(pictures=(p,)) for p in (a, b)]
    with torch.no_grad():
        features = net.encoder(collate(rows, 48, CPU).pixels)
    assert ((features[0] - features[1]).abs().amax(-1) > 0).all()


def test_positions_are_added():
    """Of a picture in one colour no two patches are the same."""
    net = small(stem="patch")
    flat = np.full((48, 48, 3), 90, np.uint8)
    with torch.no_grad():
        features = net.encoder(collate([row(net, [("x", "y")], 0)._replace(pictures=(flat,))], 48, CPU).pixels)[0]
    distances = (features[:, None] - features[None]).abs().amax(-1) + torch.eye(36)
    assert distances.min() > 1e-2


def test_attention_by_hand():
    """softmax(q k / sqrt(d)) v in each head, over the keys that the mask shows; x is normed, its context is not."""
    torch.manual_seed(0)
    attend = vlm_module.Attend(8, 2, 6).double()
    x, context = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 6).double()
    mask = torch.rand(2, 3, 5) > 0.4
    mask[..., 0] = True
    n = attend.norm(x)
    found = torch.zeros(2, 3, 8).double()
    k, v = (context @ attend.kv.weight.T).split(8, dim=-1)
    q = attend.q(n)
    for b in range(2):
        for t in range(3):
            for h in (slice(0, 4), slice(4, 8)):
                scores = [q[b, t, h] @ k[b, m, h] / 2 if mask[b, t, m] else -math.inf for m in range(5)]
                weights = torch.stack([torch.as_tensor(s).double() for s in scores]).softmax(0)
                found[b, t, h] = sum(w * v[b, m, h] for m, w in enumerate(weights))
    torch.testing.assert_close(attend(x, context, mask), attend.out(found))


@pytest.mark.parametrize("connector", ["mlp", "query"])
def test_tokens_of_a_picture(connector):
    net = small(connector)
    assert net.connector.slots == {"mlp": 9, "query": 3}[connector]
    features = torch.randn(2, 36, 16)
    tokens = net.connector(features)
    assert tokens.shape == (2, net.connector.slots, 64)
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3, "each has something else to say"
    torch.testing.assert_close(net.connector(features[1:])[0], tokens[1], atol=1e-5, rtol=1e-4)
    for patch in range(36):  # in row patch // 6 and column patch % 6
        moved = net.connector(features.index_fill(1, torch.tensor([patch]), 0.0)) - tokens
        seen = (moved.abs().amax((0, 2)) > 1e-6).tolist()
        token = patch // 6 // 2 * 3 + patch % 6 // 2
        assert seen == ([i == token for i in range(9)] if connector == "mlp" else [True] * 3)


def test_new_tokens_are_of_the_size_of_words():
    for connector in ("mlp", "query"):
        model = language_model()
        torch.manual_seed(0)
        net = VLM(model, IMAGE, Vision(connector=connector))
        with torch.no_grad():
            tokens = net.connector(net.encoder(collate([row(net, [("x", "y")], 0)], 48, CPU).pixels))
        assert 0.2 < tokens.std() / model.embed.weight.std() < 5


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and words


def test_pictures_land_in_their_own_slots():
    """Two in a row, then one in another row: each where its <image> stands, in order, and words stay words."""
    for connector in ("mlp", "query"):
        net = small(connector)
        rows = three_rows(net)
        batch = collate(rows, 48, CPU)
        embeddings = net.look(batch)["embeddings"]
        P = net.connector.slots
        for b, seeds in enumerate(([0], [], [1, 2])):
            places = (batch.input_ids[b] == IMAGE).nonzero()[:, 0]
            assert len(places) == P * len(seeds)
            for n, seed in enumerate(seeds):
                alone = net.connector(net.encoder(collate([row(net, [("x", "y")], seed)], 48, CPU).pixels))[0]
                torch.testing.assert_close(embeddings[b, places[n * P : (n + 1) * P]], alone, atol=1e-5, rtol=1e-4)
            words = batch.input_ids[b] != IMAGE
            assert torch.equal(embeddings[b, words], net.model.embed(batch.input_ids[b, words]))


def test_slots_and_pictures_must_agree(net):
    """V4: nothing is cut off or filled up in silence."""
    batch = collate(three_rows(net), 48, CPU)
    for pixels in (batch.pixels[:2], torch.cat([batch.pixels, batch.pixels[:1]])):
        with pytest.raises(ValueError, match="slots"):
            net.look(batch._replace(pixels=pixels))
    ids = batch.input_ids.clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0, 0]] = 5
    with pytest.raises(ValueError, match="slots"):
        net.look(batch._replace(input_ids=ids))


def test_what_the_assistant_says_is_trained_on_and_no_slot(net):
    """V1, V7: the words and the ending token of each answer; a question alone is the beginning of the whole."""
    turns = [("What colour is the square?", "red"), ("And the star?", "It is blue.")]
    r = row(net, turns, 0, 1)
    spoken = [i for i, m in zip(r.input_ids, r.completion_mask, strict=True) if m]
    assert tiny().decode(spoken) == "red<|im_end|>It is blue.<|im_end|>"
    assert r.input_ids.count(IMAGE) == 2 * net.connector.slots
    assert not any(m for i, m in zip(r.input_ids, r.completion_mask, strict=True) if i == IMAGE)
    asked = row(net, turns[:1] + [(turns[1][0], "")], 0, 1, ask=True)
    assert r.input_ids[: len(asked.input_ids)] == asked.input_ids
    asked = row(net, [(turns[0][0], "")], 0, 1, ask=True)
    assert r.input_ids[: len(asked.input_ids)] == asked.input_ids and not any(asked.completion_mask)


def test_expanding_by_hand():
    assert expand(chat.Row([5, 9, 6, 9, 7], [0, 1, 0, 0, 1]), 9, 3) == (
        [5, 9, 9, 9, 6, 9, 9, 9, 7], [0, 0, 0, 0, 0, 0, 0, 0, 1])  # fmt: skip


def test_marks_and_pictures_must_be_as_many():
    ask = [{"role": "user", "content": "<image>Is <image> it?"}, {"role": "assistant", "content": "no <image>"}]
    r = encode(ask, [picture(0), picture(1)], tiny(), 2)
    assert r.input_ids.count(IMAGE) == 4, "what the assistant writes is text"
    for n in (0, 1, 3):
        with pytest.raises(UserError, match=f"2 <image> in what the user says, {n} pictures"):
            encode(ask, [picture(0)] * n, tiny(), 2)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|reserved_special_token_0|>", None])
def test_a_tokenizer_without_an_image_lends_another_token(mark):
    from dataclasses import replace

    special = {name: i for name, i in tiny().special_tokens.items() if name != "<image>"}
    lent = replace(tiny(), special_tokens=special | ({mark: IMAGE + 1} if mark else {}))
    if mark is None:
        with pytest.raises(UserError, match="no special token to stand for a picture"):
            vlm_module.with_mark(lent)
    else:
        assert vlm_module.with_mark(lent).special("<image>") == IMAGE + 1
        ids = chat.prompt_ids("<image>What?", vlm_module.with_mark(lent))
        assert ids.count(IMAGE + 1) == 1


@pytest.mark.parametrize("connector", CONNECTORS)
def test_cutting_never_cuts_a_picture(connector):
    """V3: at every length, a picture is there with all of its slots or not at all; words are the row's beginning."""
    net = small(connector)
    messages = [{"role": "user", "content": "So <image> and <image>"}, {"role": "assistant", "content": "yes it is"},
                {"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "no"}]  # fmt: skip
    whole = encode(messages, [picture(i) for i in range(3)], tiny(), net.connector.slots)
    lengths, slots = set(), net.connector.slots
    ends = [i for i, token in enumerate(whole.input_ids) if token == IMAGE][slots - 1 :: slots]
    for n in range(1, len(whole.input_ids) + 3):
        r = cut(whole, n, IMAGE, net.connector.slots)
        k = len(r.input_ids)
        assert k <= n and r.input_ids == whole.input_ids[:k] and r.completion_mask == whole.completion_mask[:k]
        assert r.input_ids.count(IMAGE) == net.connector.slots * len(r.pictures)
        assert all(a is b for a, b in zip(r.pictures, whole.pictures, strict=False))
        assert n > len(whole.input_ids) or k == n or whole.input_ids[k] == IMAGE, "no more is cut than must be"
        assert len(r.pictures) == sum(end < n for end in ends)
        lengths.add(len(r.pictures))
        net.look(collate([r], 48, CPU))
    assert lengths == {0, 1, 2, 3}


def test_padding_and_neighbours_change_nothing(net):
    """V6, V13: a batch of ragged rows is its rows one by one; more padding is no padding."""
    rows = three_rows(net)
    with torch.no_grad():
        together = answer_logps(net, collate(rows, 48, CPU))
        alone = torch.cat([answer_logps(net, collate([r], 48, CPU)) for r in rows])
        padded = answer_logps(net, collate(rows, 48, CPU, 64))
        turned = answer_logps(net, collate(rows[::-1], 48, CPU)).flip(0)
    for other in (alone, padded, turned):
        torch.testing.assert_close(together, other, atol=2e-4, rtol=1e-4)
    assert (together < -0.1).all()


def test_log_probs_are_of_the_answer_by_hand(net):
    for r in three_rows(net):
        batch = collate([r], 48, CPU)
        with torch.no_grad():
            logits = net.model.head(net.model.hidden(batch.input_ids, **net.look(batch)))[0].log_softmax(-1)
            found = answer_logps(net, batch)
        wanted = sum(logits[t - 1, r.input_ids[t]] for t in range(1, len(r.input_ids)) if r.completion_mask[t])
        torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-5)


def test_every_picture_counts_and_only_for_what_follows(net):
    """Another picture changes the state of every later token, and of none before it."""
    messages = [{"role": "user", "content": "So <image> and then <image> what?"},
                {"role": "assistant", "content": "yes it is"}]  # fmt: skip
    shown = [picture(0), picture(1)]
    base = encode(messages, shown, tiny(), net.connector.slots)
    places = [i for i, token in enumerate(base.input_ids) if token == IMAGE]
    for n in (0, 1):
        changed = base._replace(pictures=tuple(picture(7) if i == n else p for i, p in enumerate(shown)))
        with torch.no_grad():
            a, b = (net.model.hidden(batch.input_ids, **net.look(batch))[0]
                    for batch in (collate([r], 48, CPU) for r in (base, changed)))  # fmt: skip
        moved = (a - b).abs().amax(-1) > 1e-6
        first = places[n * net.connector.slots]
        assert not moved[:first].any() and moved[first + net.connector.slots :].all()


def test_cross_attention_changes_nothing_at_first():
    """The logits of a picture's row, to the bit; with open gates they change, those of text alone do not."""
    model = language_model()
    net = VLM(model, IMAGE, Vision(connector="cross-attention"))
    rows = three_rows(net)
    batch = collate(rows, 48, CPU)
    with torch.no_grad():
        plain, seen = model.hidden(batch.input_ids), model.hidden(batch.input_ids, **net.look(batch))
        assert torch.equal(plain, seen)
        net.connector.gates += torch.randn(2, 2)
        seen = model.hidden(batch.input_ids, **net.look(batch))
    n = len(rows[1].input_ids)
    assert torch.equal(plain[1, :n], seen[1, :n])
    first = rows[0].input_ids.index(IMAGE)
    assert torch.equal(plain[0, :first], seen[0, :first])
    assert ((plain - seen)[0, first : len(rows[0].input_ids)].abs().amax(-1) > 0).all()


def test_cross_attention_by_hand():
    """h + tanh(a) attend(h, pictures so far), then h + tanh(b) MLP(h), before each block; of two pictures."""
    net = small("cross-attention", torch.float64)
    with torch.no_grad():
        net.connector.gates.copy_(torch.tensor([[0.3, -0.5], [0.9, 0.2]]))
    r = three_rows(net)[2]
    batch = collate([r], 48, CPU)
    batch = batch._replace(pixels=batch.pixels.double())
    features = net.encoder(batch.pixels).flatten(0, 1)  # (2 P, D_v)
    x = net.model.embed(batch.input_ids)
    cos, sin = (table[None, : x.shape[1]] for table in net.model._rotary_table(x.shape[1], CPU))
    for i, block in enumerate(net.model.blocks):
        attend, mlp = net.connector.blocks[i]
        a, b = (math.tanh(g) for g in net.connector.gates[i].tolist())
        new = []
        for t in range(x.shape[1]):
            n = r.input_ids[: t + 1].count(IMAGE) * 36
            h = x[:, t : t + 1]
            if n:
                h = h + a * attend(h, features[None, :n])
                h = h + b * mlp(h)
            new.append(h)
        x = block(torch.cat(new, dim=1), cos, sin, None, None)
    torch.testing.assert_close(net.model.hidden(batch.input_ids, **net.look(batch)), net.model.norm(x))


def test_all_but_a_picture_is_its_language_model(net):
    """Rows without a picture, alone: the same states as without vlm.py, to the bit."""
    batch = collate([three_rows(net)[1]], 48, CPU)
    assert net.look(batch) == {}
    assert torch.equal(net.hidden_before(batch), net.model.hidden_before(batch.input_ids))


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def prompts_of(net: VLM) -> list[Row]:
    """Ragged ones; the last two have the same words and other pictures."""
    return [row(net, [("Which of the two is it?", "")], 1, 2, ask=True), row(net, [("Sort 3 1 2.", "")], ask=True),
            row(net, [("What is it?", "")], 3, ask=True), row(net, [("What is it?", "")], 4, ask=True)]  # fmt: skip


ARGS = Namespace(max_new_tokens=9)


def no_ends(monkeypatch) -> None:
    monkeypatch.setattr(vlm_module, "generate", lambda *a, **k: generate(*a, **k | {"eos_ids": [1]}))


def test_cached_decoding_is_the_full_forward_pass(net, tmp_path, monkeypatch):
    """V12: each greedy token is the most probable one of a forward pass over the row so far, pictures included."""
    no_ends(monkeypatch)
    rows, loop = prompts_of(net), a_loop(tmp_path)
    for r, (said,) in zip(rows, replies(net, tiny(), rows, ARGS, loop), strict=True):
        ids = list(r.input_ids)
        assert len(said) > 3
        for token in said:
            batch = collate([r._replace(input_ids=ids, completion_mask=[0] * len(ids))], 48, CPU)
            with torch.no_grad():
                logits = net.model.head(net.model.hidden(batch.input_ids, **net.look(batch))[0, -1])
            assert logits[token] > logits[: tiny().vocab_size].max() - 1e-4
            ids.append(token)


def test_log_probs_while_sampling_are_those_of_training(net):
    """Ragged rows, several samples a prompt, rows that end early: all log-probs, at once."""
    rows = prompts_of(net)
    batch = collate(rows, 48, CPU)
    seen = net.look(batch)
    if "embeddings" in seen:
        seen["embeddings"] = [x[: len(r.input_ids)] for x, r in zip(seen["embeddings"], rows, strict=True)]
    found = generate(net.model, [r.input_ids for r in rows], max_new_tokens=12, eos_ids=range(0, 1000, 9), samples=3,
                     seed=2, **seen)  # fmt: skip
    lengths = {len(c) for c in found.completions}
    assert len(lengths) > 2, "rows end at different steps"
    for n, completion in enumerate(found.completions):
        r = rows[n // 3]
        whole = Row(r.input_ids + completion, [0] * len(r.input_ids) + [1] * len(completion), r.pictures)
        with torch.no_grad():
            logp = answer_logps(net, collate([whole], 48, CPU))[0]
        assert found.logps[n].sum().item() == pytest.approx(logp.item(), abs=1e-3)


def test_rollouts_in_parts_keep_their_pictures(net):
    """generate's rollout_batch: the same samples, however many rows are decoded at once."""
    rows, found = prompts_of(net), []
    for size in (None, 5, 2):
        seen = net.look(collate(rows, 48, CPU))
        if "embeddings" in seen:
            seen["embeddings"] = [x[: len(r.input_ids)] for x, r in zip(seen["embeddings"], rows, strict=True)]
        found.append(generate(net.model, [r.input_ids for r in rows], max_new_tokens=5, eos_ids=[1], samples=2, seed=2,
                              rollout_batch=size, **seen).completions)  # fmt: skip
    assert found[0] == found[1] == found[2] and found[0][4] != found[0][6]


def test_replies_of_a_batch_are_those_of_single_rows(net, tmp_path, monkeypatch):
    no_ends(monkeypatch)
    rows, loop = prompts_of(net), a_loop(tmp_path)
    together = replies(net, tiny(), rows, ARGS, loop)
    assert together == [x for r in rows for x in replies(net, tiny(), [r], ARGS, loop)]
    assert together[2] != together[3], "the same words, other pictures"
    assert replies(net, tiny(), rows, ARGS, loop, longest=2) == [[said[:2]] for (said,) in together]
    several = replies(net, tiny(), rows, ARGS, loop, samples=2, temperature=1.0, seed=3)
    assert [len(x) for x in several] == [2] * 4 and several[0][0] != several[0][1]
    assert several != replies(net, tiny(), rows, ARGS, loop, samples=2, temperature=1.0, seed=4)


# ----------------------------------------------------------------------------------------------------------------------
# What learns


def test_only_what_a_stage_names_learns(net):
    every = dict(net.named_parameters())
    parts = {name: {id(p) for p in some} for name, some in net.parts.items()}
    assert set().union(*parts.values()) == {id(p) for p in every.values()}
    assert sum(map(len, parts.values())) == len(every)
    for stage in STAGES.values():
        with learning(net, stage["trains"]):
            for p in every.values():
                assert p.requires_grad == any(id(p) in parts[name] for name in stage["trains"])
        assert all(p.requires_grad for p in every.values())
    assert [stage["trains"] for stage in STAGES.values()] == [
        ("encoder", "contrast"), ("connector",), ("connector", "model"), ("connector", "model")]  # fmt: skip
    frozen = next(iter(net.model.parameters())).requires_grad_(False)
    for names in (("model",), ("connector",)):
        with learning(net, names):
            assert not frozen.requires_grad, "what an adapter froze stays frozen"
        assert not frozen.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(language_model(1), tiny(), folder)
    return folder


@functools.cache
def small_exam() -> dict[str, list]:
    few = {kind: pictures.exam(kind, repeats=1)[: 4 if kind == "existence" else 3] for kind in pictures.KINDS}
    scenes = [pictures.example("exam", i) for i in range(5)]
    return {"kinds": [e for rows in few.values() for e in rows], "unseen": few["colour"][:2], "scenes": scenes,
            "texts": world.sft_test(1)[:3]}  # fmt: skip


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """A small encoder, exams of a few rows, which are not asked again without their pictures."""
    sizes = {name: value for name, value in vars(SMALL).items() if name not in ("connector", "contrast", "stem")}
    monkeypatch.setattr(vlm_module, "Vision", lambda *a, **k: Vision(*a, **(sizes if a else {}) | k))
    monkeypatch.setattr(vlm_module, "world_exam", lambda seed: small_exam())
    monkeypatch.setattr(vlm_module, "retrieval", lambda *a: [1.0, 0.0])

    def conclude(vlm, tokenizer, test, before, after, args, loop):
        return loop.finish(before, after, higher_is_better="loss" not in after)

    monkeypatch.setattr(vlm_module, "conclude", conclude)


def unmeasured(monkeypatch) -> None:
    """Runs whose numbers before and after are not looked at."""
    monkeypatch.setattr(vlm_module, "evaluate", lambda *a: {"exact match": [0.0, 1.0]})
    monkeypatch.setattr(vlm_module, "hallucinations", lambda *a: {"hallucination": [1.0, 0.0]})


SHORT = ("--steps", 8, "--batch-size", 4, "--micro-batch-size", 4, "--pictures", 12, "--max-new-tokens", 8,
         "--log-every", 1, "--warmup", 1, "--schedule", "linear", "--max-length", 200)  # fmt: skip


def run(start: Path, out: Path, *flags: object) -> dict:
    rates = ("--lr", 1e-3) if "--stages" not in flags or {"instruct", "prefer"} & {*flags} else ()
    return main(get_args(["--model", str(start), "--out", str(out), *map(str, (*SHORT, *rates, *flags))]))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": p for name, p in load(out)[0].named_parameters()}
    return found | read_safetensors(out / "checkpoint" / "vision.safetensors")


def watched(monkeypatch) -> list[VLM]:
    """The models that runs make from here on."""
    nets, made = [], vlm_module.load_vlm

    def load(*arguments):
        nets.append((found := made(*arguments))[0])
        return found

    monkeypatch.setattr(vlm_module, "load_vlm", load)
    return nets


def always_invents(monkeypatch) -> None:
    """What a random model says names nothing: half of all samples are taken to be right, the others to be false."""
    monkeypatch.setattr(pictures, "missing", lambda text, things: 0)
    monkeypatch.setattr(pictures, "invented", lambda text, things: [("red", "star")] * (len(text.encode()) % 2))
    monkeypatch.setattr(vlm_module, "faults", lambda text, e: (len(text.encode()) % 2, 0))


def test_a_run_of_all_stages(start, tmp_path, monkeypatch, capsys):
    """Each in its turn, of its own share; what it does not name is not changed by a byte, what it names is."""
    always_invents(monkeypatch)
    monkeypatch.setattr(vlm_module, "conclude", CONCLUDE)
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 2} for name, s in STAGES.items()})
    whole, steps, nets = Loop.log, {}, watched(monkeypatch)

    def log(self, step, **metrics):
        steps[step] = {name: p.detach().clone() for name, p in nets[0].named_parameters()}
        whole(self, step, **metrics)

    monkeypatch.setattr(Loop, "log", log)
    result = run(start, tmp_path)
    lines = logged(tmp_path)
    assert [line["stage"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    net = nets[0]
    parts = {name: {id(p) for p in some} for name, some in net.parts.items()}
    groups = {name: [n for n, p in net.named_parameters() if id(p) in ids] for name, ids in parts.items()}
    for step in range(2, 9):
        trained = [*STAGES.values()][(step - 1) // 2]["trains"]
        for part, names in groups.items():
            same = [torch.equal(steps[step][n], steps[step - 1][n]) for n in names
                    if not n.startswith("text.head") and n != "bias"]  # fmt: skip
            assert all(same) if part not in trained else not any(same), (step, part)
    assert lines[6]["loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[6]["margin"] == pytest.approx(0, abs=1e-5)
    assert {"top-1"} <= lines[0].keys() and "top-1" not in lines[3]
    for line in lines:
        peak = {1: 5e-4, 2: 3e-4, 3: 1e-3, 4: 1e-3 * 5e-7 / 2e-5}[line["stage"]]
        assert line["lr"] == pytest.approx(peak), "warm-up 1, then linear: both steps of a stage are at its peak"
    assert result["metric"] == "exact match" and result["variant"] == "mlp" and result["n"] == 22
    assert {*pictures.KINDS, "unseen compositions", "retrieval top-1", "text skills", "hallucination", "left out",
            "yes to what is absent"} <= result["metrics"].keys()  # fmt: skip
    assert result["baselines"].keys() == {"best constant", "blank picture", "another picture"}
    svg = ElementTree.parse(tmp_path / "samples.svg").getroot()
    assert len(svg.findall("{*}image")) > 0 and len(svg.findall("{*}text")) == 2 * len(svg.findall("{*}image"))
    table = json.loads((tmp_path / "kinds.json").read_text())["rows"]
    assert [r["kind"] for r in table] == [*pictures.KINDS]
    assert "exact match" in capsys.readouterr().out
    loaded, tokenizer = load_vlm(tmp_path, CPU)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dict(net.named_parameters())[name]), name


@pytest.mark.parametrize("flags", [(), ("--connector", "query", "--contrast", "siglip"),
                                   ("--connector", "cross-attention", "--adapter", "lora")])  # fmt: skip
def test_splitting_a_batch_changes_nothing(start, tmp_path, monkeypatch, flags):
    """Ragged rows, with and without pictures, in one forward pass, in two and one by one, in all stages."""
    always_invents(monkeypatch)
    unmeasured(monkeypatch)
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 2} for name, s in STAGES.items()})
    found = []
    for size in (4, 3, 1):
        run(start, tmp_path / str(size), *flags, "--micro-batch-size", size)
        tensors = read_safetensors(tmp_path / str(size) / "checkpoint" / "vision.safetensors")
        found.append((logged(tmp_path / str(size)), tensors))
    for lines, tensors in found[1:]:
        for a, b in zip(found[0][0], lines, strict=True):
            for metric in a.keys() - {"seconds", "tokens_per_second", "accuracy"}:
                assert b[metric] == pytest.approx(a[metric], rel=2e-3, abs=2e-4), (metric, a["step"])
        assert max((found[0][1][name] - p).abs().max() for name, p in tensors.items()) < 5e-4


def on_a_rank(rank: int, folder: Path) -> None:
    run(folder / "model", folder / "two", "--batch-size", 5, "--micro-batch-size", 2)


def test_two_ranks_equal_one(start, tmp_path, monkeypatch):
    """5 rows a step: 3 and 2, and one rank has an empty micro-batch."""
    import shutil

    always_invents(monkeypatch)
    unmeasured(monkeypatch)
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 2} for name, s in STAGES.items()})
    shutil.copytree(start, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    run(start, tmp_path / "one", "--batch-size", 5)
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for metric in ("loss", "grad_norm", "stage", "lr"):
            assert b[metric] == pytest.approx(a[metric], rel=2e-3, abs=2e-4), (metric, a["step"])
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 5e-4


class Stop(Exception): ...


@pytest.mark.parametrize("flags", [(), ("--connector", "cross-attention", "--adapter", "lora")])
@pytest.mark.parametrize("after", [1, 7])
def test_resuming_is_exact(start, tmp_path, monkeypatch, after, flags):
    always_invents(monkeypatch)
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 2} for name, s in STAGES.items()})
    whole = run(start, tmp_path / "whole", *flags)

    class StopsAfter(Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == after:
                raise Stop

    monkeypatch.setattr(vlm_module, "Loop", StopsAfter)
    with pytest.raises(Stop):
        run(start, tmp_path / "parts", *flags, "--save-every", after)
    monkeypatch.setattr(vlm_module, "Loop", Loop)
    resumed = run(start, tmp_path / "parts", *flags, "--save-every", after, "--resume")
    for name in ("vision.safetensors", "model.safetensors" if not flags else "adapter_model.safetensors"):
        a, b = (read_safetensors(tmp_path / folder / "checkpoint" / name) for folder in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert resumed["metrics"] == whole["metrics"] and resumed["before"] == whole["before"]


def test_a_step_is_a_plain_one(start, tmp_path):
    """instruct: mean of -log p over the answers' tokens, AdamW; as somebody would write it with one row at a time."""
    run(start, tmp_path, "--stages", "instruct", "--steps", 2, "--grad-clip", 1e-6, "--weight-decay", 0.3)
    torch.manual_seed(0)
    args = get_args(["--model", str(start), "--out", str(tmp_path / "x"), *map(str, SHORT), "--stages", "instruct",
                     "--steps", "2"])  # fmt: skip
    loop = Loop(args, "vlm")
    net, tokenizer = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))
    rows = vlm_module.world_data(net, tokenizer, args, loop).asked
    assert any(not r.pictures for r in rows) and any(r.pictures for r in rows)
    named = {n: p for n, p in net.named_parameters() if n.startswith(("model.", "connector."))}
    groups = [{"params": [p], "weight_decay": 0.3 * (p.ndim >= 2), "lr": 3e-3 if name.startswith("connector") else 1e-3}
              for name, p in named.items()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, line in enumerate(logged(tmp_path), start=1):
        some = [rows[i] for i in loop.batch_indices(len(rows), step)]
        n = sum(sum(r.completion_mask) for r in some)
        loss = sum(-answer_logps(net, collate([r], 48, CPU)).sum() for r in some) / n
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 1e-6)  # so small that AdamW notices
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        optimizer.step()
    found = weights(tmp_path)
    assert max((found[name] - p).abs().max() for name, p in named.items()) < 1e-4


def test_two_steps_of_prefer_by_hand(start, tmp_path, monkeypatch):
    """-log sigmoid(beta * ((chosen - its start) - (rejected - its start))), mean over rows; the start is the start."""
    always_invents(monkeypatch)
    flags = ("--stages", "prefer", "--steps", 2, "--grad-clip", 0, "--weight-decay", 0, "--beta", 0.7, "--lr", 0.04)
    run(start, tmp_path, *flags)
    args = get_args(["--model", str(start), "--out", str(tmp_path / "x"), *map(str, (*SHORT, *flags))])
    loop = Loop(args, "vlm")
    net, tokenizer = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))
    scenes = vlm_module.world_data(net, tokenizer, args, loop).scenes
    assert len(scenes) == 24
    found = vlm_module.sampled_pairs(net, tokenizer, scenes, args, loop)
    pairs = vlm_module.pairs_of(found, net, tokenizer, scenes, args)
    named = {n: p for n, p in net.named_parameters() if n.startswith(("model.", "connector."))}
    groups = [{"params": [p], "lr": rate("prefer", args) * (3 if name.startswith("connector") else 1)}
              for name, p in named.items()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)

    def logps(pair):
        return torch.cat([answer_logps(net, collate([r], 48, CPU)) for r in pair])

    with torch.no_grad():
        ref = [logps(pair) for pair in pairs]
    for step, line in enumerate(logged(tmp_path), start=1):
        margins = [args.beta * (logps(pairs[i]) - ref[i]) @ torch.tensor([1.0, -1.0])
                   for i in loop.batch_indices(len(pairs), step)]  # fmt: skip
        loss = -F.logsigmoid(torch.stack(margins)).mean()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3)  # Adam's first step follows signs of rounding
        assert line["margin"] == pytest.approx(torch.stack(margins).mean().item(), abs=5e-4)
        assert line["accuracy"] == pytest.approx((torch.stack(margins) > 0).float().mean().item()) or step == 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = weights(tmp_path)
    assert max((found[name] - p).abs().max() for name, p in named.items()) < 1e-3


def test_pairs_for_dpo(start, tmp_path, monkeypatch, capsys):
    """Chosen: all that is there and nothing else, or the right answer; rejected: what is most wrong; and log-probs."""
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    loop = a_loop(tmp_path)
    a = pictures.Thing("red", "star", "small", 10, 10, 4)
    b = pictures.Thing("blue", "circle", "small", 30, 30, 4)
    asked = [("How many?", "1", "count")] * 8 + [("Is there a red star?", "yes", "existence")]
    asked += [("Is there a red circle?", "no", "existence")] * 2
    asked += [("Is there a red star?", "yes", "existence")]
    scenes = [pictures.Example(picture(i), [a, b], *row) for i, row in enumerate(asked)]
    texts = [
        ["a red star", "a red star and a blue circle", "a red circle", "a red circle and a green star"],
        ["a red star"] * 4,
        ["a green star"] * 4,
        ["a red star and a blue circle"] * 3 + ["a black star"],
        ["a red star"] * 3 + ["a black star"],
        ["a red star and a blue circle and a green star"] * 3 + ["a black star and a green star and a red circle"],
        ["a red star and a blue circle"] * 3 + ["a red star"],
        ["a red star and a blue circle"] * 3 + ["a black star"],
        ["no", "no", "yes", "no"],
        ["yes", "yes", "yes", "no"],
        ["no"] * 4,
        ["yes", "no", "no", "no"],  # one more that is right by yes: left out
    ]
    ids = [[tiny().encode(text) + [tiny().eos_ids[0]] for text in some] for some in texts]
    ids[7][3].insert(0, net.image_id)  # sampled, it stands for no picture
    monkeypatch.setattr(vlm_module, "replies", lambda *x, **y: ids)
    found = vlm_module.sampled_pairs(net, tiny(), scenes, loop.args, loop)
    assert found == [[0, ids[0][1], ids[0][3]], [3, ids[3][0], ids[3][3]], [8, ids[8][2], ids[8][0]],
                     [9, ids[9][3], ids[9][0]]]  # fmt: skip
    assert "48 answers sampled, 22 say what is not so; 4 pairs" in capsys.readouterr().err
    pairs = vlm_module.pairs_of(found, net, tiny(), scenes, loop.args)
    for (place, *said), pair in zip(found, pairs, strict=True):
        for completion, r in zip(said, pair, strict=True):
            spoken = [i for i, m in zip(r.input_ids, r.completion_mask, strict=True) if m]
            assert spoken == completion and r.pictures[0] is scenes[place].picture
            assert (asked[place][0] if place >= 8 else pictures.DESCRIBE) in tiny().decode(r.input_ids)
    with torch.no_grad():
        logps = vlm_module.scored(net, pairs, loop.args, loop)
        wanted = [[answer_logps(net, collate([r], 48, CPU)).item() for r in pair] for pair in pairs]
    torch.testing.assert_close(logps, torch.tensor(wanted), atol=1e-3, rtol=1e-4)


def test_a_model_that_invents_nothing_has_nothing_to_prefer(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm_module, "faults", lambda text, e: (0, 0))
    run(start, tmp_path, "--stages", "instruct", "prefer", "--steps", 30)
    assert "0 say what is not so; 0 pairs" in capsys.readouterr().err
    lines = [line for line in logged(tmp_path) if line["stage"] == 4]
    assert lines and all(line["loss"] == 0 and line["grad_norm"] == 0 for line in lines)


def test_hallucinations_are_counted_by_hand(start, tmp_path, monkeypatch):
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    loop = a_loop(tmp_path)
    things = [pictures.Thing("red", "star", "small", 10, 10, 4)]
    e = pictures.Example(picture(0), things, "Is there a red star?", "yes", "existence")
    no = e._replace(question="Is there a blue star?", answer="no")
    said = {1.0: ["a red star", "a red circle", ""], 0.0: ["a red star", "a red star and a blue star", "red star"]}
    replies = {temperature: [[tiny().encode(text)] for text in texts] for temperature, texts in said.items()}
    monkeypatch.setattr(vlm_module, "replies", lambda *a, temperature, **k: replies[temperature])
    monkeypatch.setattr(vlm_module, "answers", lambda v, t, q, *a: ["no" if "red" in x else "yes" for x, _ in q])
    found = vlm_module.hallucinations(net, tiny(), {"scenes": [e] * 3, "kinds": [e, no, no]}, loop.args, loop)
    assert found == {"hallucination": [0, 1, 0], "left out": [0, 1, 1], "hallucination, greedy": [0, 1, 0],
                     "left out, greedy": [0, 0, 0], "yes to what is absent": [1, 1]}  # fmt: skip


def test_a_description_invents_or_not(start, tmp_path, monkeypatch):
    """CHAIR_s: a share of descriptions, however much each invents."""
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    e = pictures.Example(picture(0), [pictures.Thing("red", "star", "small", 9, 9, 4)], "", "", "")
    said = [[tiny().encode("a red circle and a blue star and a black circle")]]
    monkeypatch.setattr(vlm_module, "replies", lambda *a, **k: said)
    monkeypatch.setattr(vlm_module, "answers", lambda *a: [])
    loop = a_loop(tmp_path)
    found = vlm_module.hallucinations(net, tiny(), {"scenes": [e], "kinds": []}, loop.args, loop)
    assert found["hallucination"] == found["hallucination, greedy"] == [1.0]


def test_the_best_constant_is_the_best(start, tmp_path, monkeypatch):
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    rows = pictures.exam("colour", repeats=1)  # of black ones there are most
    monkeypatch.setattr(vlm_module, "answers", lambda v, t, asked, *a: ["red"] * len(asked))
    loop = a_loop(tmp_path)
    (line,) = vlm_module.without_looking(net, tiny(), {"kinds": rows}, {"colour": [1.0]}, loop.args, loop)
    assert line["best constant"]["mean"] == 4 / 21 and line["blank picture"]["mean"] == 3 / 21


@pytest.mark.parametrize("looks", [True, False])
def test_who_does_not_look_is_right_no_more_often_than_a_constant(start, tmp_path, monkeypatch, looks):
    """V9: of one that answers by the picture, that with another picture falls to chance; of one that does not, all."""
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    loop = a_loop(tmp_path)
    rows = pictures.exam("existence", repeats=2) + pictures.exam("count", repeats=4)
    truth, shown = {e.picture.tobytes(): e.answer for e in rows}, set()

    def answers(v, t, asked, *a):
        shown.update(p.tobytes() for _, p in asked)
        first = {"Is": "no", "How": "two"}
        return [truth.get(p.tobytes(), first[q.split()[0]]) if looks else first[q.split()[0]] for q, p in asked]

    monkeypatch.setattr(vlm_module, "answers", answers)
    after = {kind: vlm_module.exact(answers(0, 0, [(e.question, e.picture) for e in some]), some)
             for kind in ("existence", "count") if (some := [e for e in rows if e.kind == kind])}  # fmt: skip
    table = vlm_module.without_looking(net, tiny(), {"kinds": rows}, after, loop.args, loop)
    for line, chance in zip(table, (0.5, 0.25), strict=True):
        means = {name: value["mean"] for name, value in line.items() if isinstance(value, dict)}
        assert means["exact match"] == (1.0 if looks else chance)
        assert means["best constant"] == means["blank picture"] == means["another picture"] == chance
    assert pictures.BLANK.tobytes() in shown


def test_retrieval_is_among_captions_that_differ(tmp_path, monkeypatch):
    monkeypatch.undo()
    net = small()
    distinct = {pictures.describe(e.things): e for e in (pictures.example("r", i) for i in range(60))}
    scenes = list(distinct.values())[:12]
    scenes.insert(1, scenes[0])
    places = {e.picture.tobytes(): i for i, e in enumerate(scenes)}

    def pair(batch):
        assert len({tuple(c.tolist()) for c in batch.captions}) == 4
        seen = (batch.pixels.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        i = torch.tensor([places[p.tobytes()] for p in seen])
        angle = torch.where(i % 3 == 0, -1.0, 1.0)[:, None]  # every third caption is far from its picture
        codes = F.one_hot(torch.arange(4), 4).float()
        return torch.stack([codes, codes * angle], dim=1)

    monkeypatch.setattr(net, "pair", pair)
    loop = Loop(get_args(["--out", str(tmp_path)]), "vlm")
    found = vlm_module.retrieval(net, tiny(), scenes, loop, size=4)
    assert len(found) == 12 and statistics.fmean(found) == pytest.approx(8 / 12)


def test_a_checkpoint_is_itself_when_it_is_loaded(start, tmp_path, monkeypatch):
    """With an adapter too, whose base stays where it is; transformers' folder beside vision.safetensors."""
    for flags in ((), ("--adapter", "lora:rank=2")):
        out = tmp_path / str(len(flags))
        with monkeypatch.context() as patch:
            nets = watched(patch)
            run(start, out, "--stages", "align", "instruct", *flags)
        net = load_vlm(out, CPU)[0]
        rows = three_rows(net)
        with torch.no_grad():
            a, b = (answer_logps(x, collate(rows, 48, CPU)) for x in (nets[0], net))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
        assert (out / "checkpoint" / ("adapter_config.json" if flags else "config.json")).exists()
    base = dict(load(start)[0].named_parameters())
    kept = {n: p for n, p in net.model.named_parameters() if n in base}
    assert kept and all(torch.equal(p, base[n]) for n, p in kept.items())


def test_training_goes_on_from_a_model_that_sees(start, tmp_path):
    run(start, tmp_path / "a", "--connector", "query", "--stages", "contrast", "align")
    args = get_args(["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *map(str, SHORT)])
    assert args.connector == "query" and args.stages == ["instruct"]
    before = weights(tmp_path / "a")
    main(args)
    after = weights(tmp_path / "b")
    assert all(torch.equal(before[n], p) for n, p in after.items() if n.startswith("encoder."))
    assert any(not torch.equal(before[n], p) for n, p in after.items() if n.startswith("connector."))
    for flag, words in (("mlp", "--connector mlp: .* was made with query"), ("all", "makes each connector anew")):
        with pytest.raises(UserError, match=words):
            get_args(["--model", str(tmp_path / "a"), "--connector", flag])
    vision = tmp_path / "b" / "checkpoint" / "vision.safetensors"
    before = vision.read_bytes()
    run(start, tmp_path / "b", "--connector", "query", "--steps", 0)
    assert vision.read_bytes() == before, "a run of no steps leaves another's weights as they are"


def test_training_goes_on_from_an_adapter(start, tmp_path):
    run(start, tmp_path / "a", "--stages", "align", "instruct", "--adapter", "lora:rank=2")
    args = get_args(["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *map(str, SHORT)])
    assert args.lr == get_args(["--model", str(start), "--adapter", "lora"]).lr, "the rate is that of an adapter"
    main(args)
    assert load_vlm(tmp_path / "b", CPU)[0].model.adapter.method == "lora"


def test_the_language_model_answers_about_a_file(start, tmp_path, capsys, monkeypatch):
    """Of any size and kind, one or several; the answer is that to the scaled picture."""
    run(start, tmp_path / "out", "--stages", "align")
    big = np.random.default_rng(0).integers(0, 256, (60, 96, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(pictures.png(big))
    (tmp_path / "b.ppm").write_bytes(b"P6 48 48 255\n" + picture(3).tobytes())
    capsys.readouterr()
    question = "How many red squares are there?"
    files = [str(tmp_path / name) for name in ("a.png", "b.ppm")]
    argv = ["--model", str(tmp_path / "out"), "--out", str(tmp_path / "out"), "--max-new-tokens", "5", "--image"]
    said = main(get_args([*argv, *files, question]))
    assert capsys.readouterr().out.strip() == said.strip()
    net, tokenizer = load_vlm(tmp_path / "out", CPU)
    shown = [pictures.resized(big), picture(3)]
    prompt = encode(conversation([(question, "")], 2), shown, tokenizer, net.connector.slots, ask=True)
    ((ids,),) = replies(net, tokenizer, [prompt], Namespace(max_new_tokens=5), a_loop(tmp_path))
    assert said == chat.completion_text(ids, tokenizer)
    for bad, words in ((["x.png"], "then the question"), ([str(tmp_path / "none.png"), "x"], "No such file"),
                       ([*files * 20, "x"], "leaves room for -")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            main(get_args([*argv, *bad]))
    with pytest.raises(UserError, match="this model does not see"):
        main(get_args(["--model", str(start), "--image", files[0], "x"]))


def jsonl(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(pictures.png(picture(i)))
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / name


def chats(n: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": "<image>" * (1 + i % 2) + f"What is {i}?"},
                          {"role": "assistant", "content": f"It is {i}." * (1 + i % 3)}],
             "images": [f"{(i + k) % 3}.png" for k in range(1 + i % 2)]} for i in range(n)]  # fmt: skip


def test_rows_of_files(start, tmp_path, monkeypatch):
    """Pictures beside the JSONL, several in a conversation, text of another file; the held-out loss, by hand."""
    file = jsonl(tmp_path, chats(40))
    text = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in text))
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 2} for name, s in STAGES.items()})
    result = run(start, tmp_path / "out", "--data", f"{file},{tmp_path / 'text.jsonl'}")
    assert result["metric"] == "loss" and not result["higher_is_better"] and result["n"] == 16
    assert {line["stage"] for line in logged(tmp_path / "out")} == {1, 2, 3}
    net = load_vlm(tmp_path / "out", CPU)[0]
    args = get_args(["--model", str(start), "--data", f"{file},{tmp_path / 'text.jsonl'}", *map(str, SHORT)])
    data = vlm_module.file_data(net, tiny(), args, a_loop(tmp_path / "out"))
    assert len(data.asked) == 64 and all(len(r.pictures) == 1 for r in data.described)
    assert {len(r.pictures) for r in data.asked} == {0, 1, 2}
    two = next(r for r in data.asked if len(r.pictures) == 2)
    first = int(tiny().decode(two.input_ids).split("What is ")[1].split("?")[0])
    assert [p.tobytes() for p in two.pictures] == [picture((first + k) % 3).tobytes() for k in range(2)]
    with torch.no_grad():
        losses = [(-answer_logps(net, collate([r], 48, CPU)).item(), sum(r.completion_mask)) for r in data.test["rows"]]
    assert result["after"] == pytest.approx(sum(a for a, _ in losses) / sum(n for _, n in losses), rel=1e-4)
    same = [row | {"messages": [{"role": "user", "content": "<image>Describe it."}, row["messages"][1]]}
            for row in chats(40) if len(row["images"]) == 1]  # fmt: skip
    train, held_out = vlm_module.formats.hold_out([r | {"images": [f"{i}.png"]} for i, r in enumerate(same * 4)])
    assert len(held_out) == 16 and len(train) + 16 == 4 * len(same)  # one question, other pictures
    epochs = run(start, tmp_path / "e", "--data", file, "--steps", 0)
    assert epochs["n"] == 16
    assert planned(Namespace(steps=None, stages=["align", "instruct"], epochs=1.5, batch_size=4), 9) == {
        "align": 4, "instruct": 4}  # fmt: skip


def test_bad_rows_are_refused(start, tmp_path):
    rows = chats(3)
    cases = [
        ([rows[0] | {"images": ["none.png"]}], "none.png: No such file"),
        ([rows[0] | {"images": ["0.png", "1.png"]}], "row 1: 1 <image> in what the user says, 2 pictures"),
        ([rows[1] | {"images": ["0.png"]}], "2 <image> in what the user says, 1 pictures"),
        ([rows[0] | {"images": ["rows.jsonl"]}], "neither a PNG"),
    ]
    for bad, words in cases:
        with pytest.raises(UserError, match=words):
            run(start, tmp_path / "out", "--data", jsonl(tmp_path, bad))
    file = jsonl(tmp_path, rows)
    with pytest.raises(UserError, match="row 1 has .* tokens, --max-length is 20"):
        run(start, tmp_path / "out", "--data", file, "--max-length", 20)
    with pytest.raises(UserError, match="no row is left"):
        run(start, tmp_path / "out", "--data", file, "--max-length", 20, "--too-long", "cut")
    only_two = jsonl(tmp_path, rows[1:2])
    with pytest.raises(UserError, match="need rows of one picture each"):
        run(start, tmp_path / "out", "--data", only_two)
    assert run(start, tmp_path / "out", "--data", only_two, "--stages", "instruct")["n"] == 1
    assert not (tmp_path / "none").exists()


def test_long_rows_are_dropped_or_cut(start, tmp_path, capsys):
    rows = chats(6)
    file, net = jsonl(tmp_path, rows), VLM(language_model(1), IMAGE, SMALL)
    lengths = [len(encode(r["messages"], [picture(0)] * len(r["images"]), tiny(), 9).input_ids) for r in rows]
    assert net.connector.slots == 9 and len(set(lengths)) > 2
    most = sorted(lengths)[2]
    n = sum(length > most for length in lengths)
    for what in ("drop", "cut"):
        run(start, tmp_path / what, "--data", file, "--max-length", most, "--too-long", what, "--steps", 2)
        assert f"{n} rows too long: {what}" in capsys.readouterr().err
    with pytest.raises(UserError, match="the model reads at most 256 tokens"):
        run(start, tmp_path / "out", "--max-length", 300)


def test_long_rows_of_the_world_are_treated_likewise(start):
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]

    def rows(*flags: object) -> vlm_module.Data:
        flags = map(str, ("--pictures", 4, "--steps", 8, *flags))
        return vlm_module.world_data(net, tiny(), get_args([*flags]), Namespace(say=print))

    whole = rows()
    most = sorted(len(r.input_ids) for r in whole.asked)[2]
    for what in ("drop", "cut"):
        data = rows("--max-length", most, "--too-long", what, "--stages", "instruct", "prefer")
        assert data.asked and all(len(r.input_ids) <= most for r in (*data.asked, *data.described))
    with pytest.raises(UserError, match="tokens, --max-length is"):
        rows("--max-length", most)
    shortest = min(len(r.input_ids) for r in whole.asked)
    for stage, length in (("contrast", shortest), ("align", shortest), ("instruct", 5)):
        with pytest.raises(UserError, match="no row is left to train on"):
            rows("--max-length", length, "--too-long", "drop", "--stages", stage)


@pytest.mark.parametrize("adapter", ["prompt", "p-tuning"])
def test_embeddings_before_a_row_see_no_picture(start, tmp_path, adapter):
    with pytest.raises(UserError, match=f"--connector cross-attention: not with the adapter {adapter}"):
        run(start, tmp_path, "--connector", "cross-attention", "--adapter", adapter)


def test_what_stands_before_a_row_takes_room(tmp_path):
    net = small()
    adapt(net.model, "prompt:tokens=16", "")
    asked = row(net, [("x " * 100, "")], ask=True)
    room = net.config.max_length - 16 - len(asked.input_ids)
    with pytest.raises(UserError, match=f"the longest question leaves room for {room}"):
        replies(net, tiny(), [asked], ARGS, a_loop(tmp_path), longest=room + 1)
    assert replies(net, tiny(), [asked], ARGS, a_loop(tmp_path), longest=room)


@pytest.mark.parametrize(("flags", "words"), [
    (("--image", "a.png", "b"), "--image needs --model"), (("--parallel", "fsdp"), "choose replicas"),
    (("--replay", "1"), "below 1"), (("--beta", "0"), "above 0"), (("--connector", "all", "--data", "x"), "no --data"),
    (("--data", "x", "--stages", "prefer"), "no --data"), (("--stages", "align", "align"), "at most once"),
    (("--stages", "contrast", "align", "--lr", "1e-3"), "--lr is of stages that train the language model"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        get_args([*flags])


def test_default_plan_and_rates():
    args = get_args([])
    whole = sum(s["steps"] for s in STAGES.values())
    assert planned(args, 0) == {name: s["steps"] for name, s in STAGES.items()} and args.steps == whole
    for total in (1, 7, 100):
        args.steps = total
        plan = planned(args, 0)
        assert sum(plan.values()) == total
        assert all(abs(n - total * STAGES[name]["steps"] / whole) < 1.01 for name, n in plan.items())
    args, tiny_rates = get_args(["--lr", "2e-3"]), {name: s["lr"][0] for name, s in STAGES.items()}
    wanted = tiny_rates | {"instruct": 2e-3, "prefer": tiny_rates["prefer"] * 2e-3 / tiny_rates["instruct"]}
    assert {name: rate(name, args) for name in STAGES} == pytest.approx(wanted)
    assert get_args(["--lr", "0"]).lr == 0
    for flags in ([], ["--adapter", "lora"], ["--model", "x"]):
        assert get_args(flags).optimizer == ("adamw" if flags else "muon")
    with_lora = get_args(["--adapter", "lora"])
    assert with_lora.lr == pytest.approx(METHODS["lora"][1]["lr"] * STAGES["instruct"]["lr"][0])


def test_broken_folders_are_refused(start, tmp_path):
    run(start, tmp_path / "out", "--stages", "align", "--steps", 1)
    folder = tmp_path / "out" / "checkpoint"
    shape = json.loads((folder / "vision.json").read_text())
    for broken in ("{", "[]", json.dumps(shape | {"wings": 2}), json.dumps({"connector": "mlp"})):
        (folder / "vision.json").write_text(broken)
        with pytest.raises(UserError, match="vision.json: not the shape of an encoder"):
            load_vlm(tmp_path / "out", CPU)
    (folder / "vision.json").write_text(json.dumps(shape | {"width": 32}))
    with pytest.raises(UserError, match="does not fit vision.json"):
        load_vlm(tmp_path / "out", CPU)


def test_what_is_measured_is_not_trained_on(start, monkeypatch):
    """Other pictures than those of training, of the pairs that they should be, a seed that --exam chooses."""
    monkeypatch.setattr(pictures, "REPEATS", dict.fromkeys(pictures.REPEATS, 1))
    args = get_args(["--pictures", "44", "--replay", "0.5", "--batch-size", "2"])
    net = load_vlm(start, CPU, vlm_module.Vision("mlp", "clip", "conv"))[0]
    test, other = WORLD_EXAM(args.exam), WORLD_EXAM("dev")
    data = vlm_module.world_data(net, tiny(), args, None)
    trained = [pictures.example(args.seed, i) for i in range(400)] + data.scenes
    seen = {e.picture.tobytes() for e in trained}
    for name in ("kinds", "unseen", "scenes"):
        measured = {e.picture.tobytes() for e in test[name]}
        assert not measured & seen and not measured & {e.picture.tobytes() for e in other[name]}
    for e in test["unseen"]:
        absent = e.kind == "existence" and e.answer == "no"
        assert absent or {(t.colour, t.shape) for t in e.things} <= {*pictures.UNSEEN}
    assert not {(t.colour, t.shape) for e in trained for t in e.things} & {*pictures.UNSEEN}
    asked = [row for row in data.asked if row.pictures]
    questions = [tiny().decode(row.input_ids) for row in asked]
    assert len(asked) == 44 and sum(pictures.DESCRIBE in q for q in questions) == 11
    for i, (words, e) in enumerate(zip(questions, trained, strict=False)):
        turns = pictures.turns(e, f"{args.seed} {i}") if i % 4 else [(pictures.DESCRIBE, pictures.describe(e.things))]
        assert all(f"{question}" in words and answer in words for question, answer in turns)
    assert len(data.asked) == 88, "half of the rows are conversations without pictures"
    texts = {tuple(row.input_ids) for row in data.asked if not row.pictures}
    of_sft = {tuple(chat.render(row["messages"], tiny()).input_ids) for row in world.sft_rows(44, args.seed)}
    assert len(texts & of_sft) < 22
    assert len(data.scenes) == 3 * STAGES["prefer"]["steps"] * 2
    for i, (r, e) in enumerate(zip(data.described, trained, strict=False)):
        right, *wrong = (tiny().decode(caption[:-1]) for caption in r.captions)
        assert right == pictures.describe(e.things) and wrong == pictures.nearly(e.things, f"{args.seed} {i}")


def test_the_tiny_model_learns_with_muon(start, tmp_path, monkeypatch):
    """A first step of Muon moves an entry by about 0.2 of the rate, one of AdamW by all of it."""
    nets, made = watched(monkeypatch), {}

    def describe(self, vlm):
        made.update({name: p.detach().clone() for name, p in vlm.vision().items()})

    monkeypatch.setattr(Loop, "describe", describe)
    run(start, tmp_path, "--optimizer", "muon", "--stages", "contrast", "--steps", 1, "--weight-decay", 0)
    attention = "encoder.blocks.0.0.q.weight", "text.blocks.0.attention.qkv.weight"
    for name in ("encoder.stem.0.weight", *attention, "of_image.weight"):
        moved = nets[0].get_parameter(name) - made[name]
        assert 0.1 < moved.square().mean().sqrt() / (0.2 * 5e-4) < 1.2, name


def test_the_temperature_has_a_bound(start, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_module, "CONTRASTS", {"clip": (clip_loss, 150.0, 0.0)})
    run(start, tmp_path, "--stages", "contrast", "--steps", 1)
    assert weights(tmp_path)["log_scale"].exp().item() == pytest.approx(100)


def test_a_table_of_the_connectors(start, tmp_path, monkeypatch):
    always_invents(monkeypatch)
    monkeypatch.setattr(vlm_module, "STAGES", {name: s | {"steps": 1} for name, s in STAGES.items()})
    for steps in (4, 1):  # in 1, prefer has none
        flags = map(str, (*SHORT, "--steps", steps))
        main(get_args(["--connector", "all", "--model", str(start), "--out", str(tmp_path), *flags]))
        rows = json.loads((tmp_path / "table.json").read_text())["rows"]
        assert [r["connector"] for r in rows] == ["SFT", *CONNECTORS]
        assert rows[1].keys() >= {"exact match", *pictures.KINDS} and ("hallucination" in rows[1]) == (steps == 4)


def test_the_sheet_escapes_what_is_said():
    e = pictures.Example(picture(0), [], "Is 1 < 2 & so?", "yes", "existence")
    svg = ElementTree.fromstring(vlm_module.sheet([e, e], ["yes", "<b>"]))
    said = [t.text for t in svg.findall("{*}text")]
    assert said == ["Is 1 < 2 & so?", "yes", "Is 1 < 2 & so?", "<b> (yes)"]
    assert [t.get("class") for t in svg.findall("{*}text")][1::2] == ["right", "wrong"]


def test_memory_follows_its_rows():
    """What generate does with a cache that has one: select and drop take the rows of both."""
    net = small("cross-attention")
    rows = prompts_of(net)
    sight = net.look(collate([rows[i] for i in (0, 2, 3)], 48, CPU))["memory"]
    chosen = sight.select(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen.features[1], sight.features[0]) and torch.equal(chosen.reach[2], sight.reach[2])


def test_the_loss_of_prefer_is_that_of_dpo():
    assert vlm_module.dpo is dpo.dpo and loop_module.Loop is Loop and adapt is vlm_module.adapt

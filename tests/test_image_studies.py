"""Walks, noises, probes and comparisons, on models that are known by construction."""
import json

import pytest
import torch

from jointgen.digits import PLACES, captioned_digits
from jointgen.image_studies import affine_r2, caption_labels, cka, interpolate_sentences, linear_probe, noise_roles, object_mask, run_variants


def draw(sentence, noise, condition_noise):
    """The sentence fills the picture, z moves its left half, the condition's noise its right half."""
    image = sentence[:, :1, None, None].repeat(1, 3, 4, 4)
    image[..., :2] += 0.1*noise[:, :1, None, None]
    image[..., 2:] += 0.2*condition_noise[:, :1, None, None]
    return image


def test_a_walk_has_its_ends_and_holds_the_noises():
    a, b = torch.zeros(5), torch.full((5,), 0.6)
    hold = dict(noise=torch.ones(3), condition_noise=torch.zeros(2))
    image = interpolate_sentences(draw, a, b, 4, **hold)
    assert image.shape == (4, 3, 4, 4)
    assert torch.allclose(image[:, 0, 0, 3], torch.tensor([0., 0.2, 0.4, 0.6])) and torch.allclose(image[..., 0] - image[..., 3], torch.tensor(0.1))
    with pytest.raises(ValueError, match="both ends"): interpolate_sentences(draw, a, b, 1, **hold)
    with pytest.raises(ValueError, match="one encoder"): interpolate_sentences(draw, a, b[:3], 4, **hold)


def test_each_noise_is_credited_with_what_it_moves():
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    grid, moved = noise_roles(draw, torch.zeros(2, 3), mask, n=4, sizes=(3, 2), generator=torch.Generator().manual_seed(0))
    assert grid.shape == (2, 4, 4, 3, 4, 4)
    assert moved["noise"]["inside"] > 1e-4 and moved["noise"]["outside"] == pytest.approx(0, abs=1e-12)
    assert moved["condition_noise"]["outside"] > 1e-4 and moved["condition_noise"]["inside"] == pytest.approx(0, abs=1e-12)
    assert (grid[:, :, 0, :, :, 0] == grid[:, :1, 0, :, :, 0]).all()  # rows: the condition's noise does not touch the left
    assert torch.equal(grid[0], grid[1])                              # the same noises for every caption
    with pytest.raises(ValueError, match="variance needs two"): noise_roles(draw, torch.zeros(2, 3), mask, n=1, sizes=(3, 2))


def test_a_mask_covers_the_places_that_are_named():
    data = captioned_digits(40, seed=1)
    ink = (data.pairs.image > -1).any(1)
    mask = object_mask(data.slots, 32)
    assert not (ink & ~mask).any()
    for row, slots in zip(mask, data.slots): assert row.sum() == (1024 if "whole" in slots else 256*len(slots))


def test_labels_ask_what_captions_say():
    data = captioned_digits(300, seed=2)
    labels = caption_labels(data)
    for i, (slots, clauses) in enumerate(zip(data.slots, data.clauses)):
        for p in PLACES:
            there = p in slots
            assert labels[f"presence {p}"][i] == there and (labels[f"digit {p}"][i] >= 0) == there and (labels[f"color {p}"][i] >= 0) == there
            if there: assert labels[f"digit {p}"][i] == int(slots[p][1])
        assert (labels["order"][i] >= 0) == (len(slots) == 2) and (labels["form"][i] >= 0) == ("whole" not in slots)
        if len(slots) == 2: assert labels["order"][i] == ([PLACES.index(p) for p in slots] != sorted(PLACES.index(p) for p in slots))


def test_a_probe_finds_what_is_linear_and_not_what_is_absent():
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + x[:, 1] > 0).long() + 2*(x[:, 2] > 0).long()
    found, lost = linear_probe(x, y), linear_probe(x[:, 3:], y)
    assert found["accuracy"] > 0.85 and lost["accuracy"] < lost["chance"] + 0.15
    marked = torch.where(torch.arange(600) % 2 == 0, y, -1)
    half = linear_probe(torch.where((marked < 0)[:, None], torch.nan, x), marked)  # rows without a label are never looked at
    assert half == linear_probe(x[::2], y[::2])
    with pytest.raises(ValueError, match="one each"): linear_probe(x, y[:5])
    with pytest.raises(ValueError, match="one to test"): linear_probe(x[:3], y[:3], held_out=0.1)


def test_likeness_does_not_mind_turns():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=g)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert cka(x, 3*x @ turn + 1) == pytest.approx(1, abs=1e-5) and cka(x, torch.randn(400, 6, generator=g)) < 0.1
    assert cka(x, x[:, :1]) == pytest.approx(cka(x[:, :1], x))
    assert affine_r2(x, x @ torch.randn(6, 9, generator=g) + 2) > 0.999 and affine_r2(x, torch.randn(400, 3, generator=g)) < 0.05
    assert affine_r2(x[:, :3], x) == pytest.approx(0.5, abs=0.1)
    for f in (cka, affine_r2):
        with pytest.raises(ValueError, match="equally many"): f(x, x[:5])


def test_runs_are_kept_and_not_repeated(tmp_path):
    asked = []

    def run(changes, *, seed, steps):
        asked.append((changes["a"], seed))
        if len(asked) == 4: raise KeyboardInterrupt
        return dict(score=changes["a"] + seed)

    variants, out = dict(one=dict(a=1), two=dict(a=2)), tmp_path/"c.json"
    with pytest.raises(KeyboardInterrupt): run_variants(out, variants, run, seeds=(0, 5), steps=3)
    results = run_variants(out, variants, run, seeds=(0, 5), steps=3)
    assert asked == [(1, 0), (2, 0), (1, 5), (2, 5), (2, 5)]
    assert results == dict(one=[dict(score=1), dict(score=6)], two=[dict(score=2), dict(score=7)])
    assert json.loads(out.read_text())["results"] == results and json.loads(out.read_text())["options"] == dict(steps=3)

"""MS-SSIM against its laws and a known implementation, VS similarity, and the report by claims."""
import pytest
import torch
from torch.nn import functional as F

from jointgen.contrasts import caption_keys
from jointgen.digits import PLACES, captioned_digits, draw_slots
from jointgen.metrics import load_reader, slot_consistency
from jointgen.pairs import Pairs
from jointgen.similarity import (WEIGHTS, Similarity, ms_ssim, ms_ssim_diversity, ranking_loss, scale_weights, slot_report, structure, train_similarity,
    vs_similarity, window)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def pictures(n, side, seed=0):
    x = F.interpolate(torch.rand(n, 3, side//4, side//4, generator=seeded(seed)), size=side, mode='bilinear')
    return (x + .1*torch.rand(n, 3, side, side, generator=seeded(seed + 1))).clamp(0, 1)*2 - 1


@pytest.fixture(scope='module')
def data(): return captioned_digits(60, 'test', seed=3)


@pytest.fixture(scope='module')
def reader(): return load_reader(32)


# --- MS-SSIM


def test_the_window_sums_to_one_and_shrinks_in_proportion():
    for side in (1, 2, 5, 11, 64):
        g = window(side)
        assert len(g) == min(11, side) and abs(g.sum() - 1) < 1e-6 and torch.allclose(g, g.flip(0))
    assert torch.allclose(window(64)[5]/window(64)[4], torch.tensor(1/1.5**2/2).exp())


def test_weights_are_renormalised():
    assert [len(scale_weights(s)) for s in (8, 16, 32, 64, 128, 176, 512)] == [1, 1, 2, 3, 4, 5, 5]
    for levels in range(1, 6):
        w = scale_weights(256, levels)
        assert abs(w.sum() - 1) < 1e-6 and torch.allclose(w/w[0], torch.tensor(WEIGHTS[:levels])/WEIGHTS[0])


@pytest.mark.parametrize('side, levels', [(16, None), (32, None), (32, 4), (33, 2), (64, None), (7, 3)])
def test_ms_ssim_laws(side, levels):
    a, b = pictures(6, side if side%4 == 0 else 36)[..., :side, :side], pictures(6, side if side%4 == 0 else 36, 7)[..., :side, :side]
    assert torch.allclose(ms_ssim(a, a, levels=levels), torch.ones(6), atol=1e-5)
    assert torch.allclose(ms_ssim(a, b, levels=levels), ms_ssim(b, a, levels=levels), atol=1e-6) and (ms_ssim(a, b, levels=levels) < 1).all()
    noise = torch.randn(a.shape, generator=seeded(2))
    falls = torch.stack([ms_ssim(a, a + t*noise, levels=levels).mean() for t in (0, .1, .3, .6)])
    assert (falls.diff() < 0).all()


def test_ms_ssim_agrees_with_a_known_implementation():
    known = pytest.importorskip('pytorch_msssim')
    a, b = pictures(4, 192), pictures(4, 192, 5).lerp(pictures(4, 192), .7)
    x, y = (a + 1)/2, (b + 1)/2
    assert torch.allclose(ms_ssim(a, b), known.ms_ssim(x, y, data_range=1, size_average=False, weights=scale_weights(192).tolist()), atol=1e-5)
    two = scale_weights(192, 2).tolist()
    assert torch.allclose(ms_ssim(a, b, levels=2), known.ms_ssim(x, y, data_range=1, size_average=False, weights=two), atol=1e-5)
    x, y = x[..., :33, :33], y[..., :33, :33]
    assert torch.allclose(structure(x, y)[0].mean(1), known.ssim(x, y, data_range=1, size_average=False), atol=1e-5)


def test_ms_ssim_by_hand():
    """Constant pictures have no structure to differ in: the brightness of the coarsest scale is left."""
    a, b = torch.full((1, 3, 32, 32), -.2), torch.full((1, 3, 32, 32), .6)
    x, y = .4, .8
    bright = (2*x*y + .01**2)/(x*x + y*y + .01**2)
    assert abs(ms_ssim(a, b).item() - bright**scale_weights(32)[1].item()) < 1e-4
    flipped = pictures(3, 32)
    assert (ms_ssim(flipped, -flipped) < .3).all() and ms_ssim(flipped, -flipped).isfinite().all()


def test_ms_ssim_says_no():
    a = pictures(2, 32)
    with pytest.raises(ValueError, match='equal ones fit'): ms_ssim(a, a[..., :16])
    with pytest.raises(ValueError, match='1 to 5 fit a side of 32'): ms_ssim(a, a, levels=6)
    with pytest.raises(ValueError, match='two or more fit'): ms_ssim_diversity(a, torch.arange(2))
    with pytest.raises(ValueError, match='one each'): ms_ssim_diversity(a, torch.arange(3))


def test_diversity_never_meets_itself_nor_a_stranger(monkeypatch):
    import jointgen.similarity as S
    met = []
    def spy(a, b, levels=None):
        met.extend(zip(a.flatten().int().tolist(), b.flatten().int().tolist()))
        return torch.zeros(len(a))
    monkeypatch.setattr(S, 'ms_ssim', spy)
    keys = torch.tensor([5, 2, 5, 9, 2, 5, 2, 2])
    out = S.ms_ssim_diversity(torch.arange(8.).reshape(8, 1, 1, 1), keys, pairs=4000, generator=seeded())
    assert out['captions'] == 2 and len(met) == 4000
    assert all(i != j and keys[i] == keys[j] for i, j in met)
    assert set(met) == {(i, j) for i in range(8) for j in range(8) if i != j and keys[i] == keys[j]}
    five = sum(keys[i] == 5 for i, _ in met)/4000
    assert abs(five - .5) < .04  # captions count alike, however many pictures they have


def test_diversity_sees_repetition(data):
    slots, keys = data.slots[:20]*3, caption_keys(data.pairs.tokens, data.vocab)[:20].repeat(3)
    image = draw_slots(slots, split='test', seed=1)
    varied, again = (ms_ssim_diversity(x, keys, pairs=200, generator=seeded())['mean'] for x in (image, image[:20].repeat(3, 1, 1, 1)))
    assert varied < .95 and again > .999


# --- VS similarity


def test_ranking_loss_by_hand():
    a = torch.eye(3)
    assert ranking_loss(a, a).item() == 0
    assert abs(ranking_loss(a, a.roll(1, 0)).item() - 3*2*1.2 - 3*2*.2) < 1e-5  # one rival is perfect (1.2), one is as bad as the partner (0.2), both ways
    same = torch.tensor([1, 1, 2])
    assert abs(ranking_loss(torch.ones(3, 2), torch.ones(3, 2), keys=same).item() - 2*4*.2) < 1e-5  # six rivals, less the two that say the same
    x, y = torch.randn(2, 5, 8, generator=seeded())
    c = F.cosine_similarity(x[:, None], y[None], dim=2)
    slow = sum(max(0, .2 - c[i, i] + c[i, j]) + max(0, .2 - c[i, i] + c[j, i]) for i in range(5) for j in range(5) if i != j)
    assert torch.allclose(ranking_loss(x, y), slow, atol=1e-5)
    with pytest.raises(ValueError, match='a batch of 1'): ranking_loss(x[:1], y[:1])


def test_similarity_learns_what_belongs_together():
    z, u, v = torch.randn(600, 6, generator=seeded()), torch.randn(6, 20, generator=seeded(1)), torch.randn(6, 12, generator=seeded(2))
    images, texts = z @ u, z @ v
    before = torch.get_rng_state()
    maps = train_similarity(images[:500], texts[:500], d=16, steps=150)
    assert torch.equal(before, torch.get_rng_state())
    right, wrong = vs_similarity(maps, images[500:], texts[500:]), vs_similarity(maps, images[500:], texts[500:].roll(1, 0))
    assert right['mean'] > .5 and right['mean'] - wrong['mean'] > .4 and right['pairs'] == 100
    again = train_similarity(images[:500], texts[:500], d=16, steps=150)
    assert torch.equal(again.picture.weight, maps.picture.weight) and isinstance(maps, Similarity)
    with pytest.raises(ValueError, match='one each'): train_similarity(images, texts[:5])


# --- the report


def test_report_of_true_pictures(data, reader):
    report = slot_report(data.pairs, reader)
    assert min(report[k] for k in ('presence', 'color', 'digit', 'object', 'caption')) > .9 and report['false_objects'] < .02 and report['parsed'] == 1
    assert report['objects'] == sum(map(len, data.slots)) and report['pairs'] == 60
    assert report['empty'] == sum(4 - len(s) for s in data.slots if 'whole' not in s)
    quads = captioned_digits(40, 'test', subsets=['Quad3'], seed=4)
    assert abs(slot_report(quads.pairs, reader)['object'] - slot_consistency(quads.pairs, quads.vocab, reader)['Quad3']) < 1e-9


def test_each_claim_moves_alone(reader):
    data = captioned_digits(60, 'test', subsets=['Quad1', 'Quad2'], seed=6)
    draw = lambda change: slot_report(Pairs(draw_slots([change(dict(s)) for s in data.slots], split='test', seed=2), data.pairs.tokens, data.vocab), reader)
    real = draw(lambda s: s)
    other = {'white': 'red', 'red': 'green', 'green': 'blue', 'blue': 'white'}
    hue = draw(lambda s: {p: (other[c], d) for p, (c, d) in s.items()})
    assert hue['color'] < .02 and hue['presence'] > .98 and abs(hue['digit'] - real['digit']) < .05
    sign = draw(lambda s: {p: (c, str((int(d) + 1) % 10)) for p, (c, d) in s.items()})
    assert sign['digit'] < .06 and sign['color'] > .98 and sign['object'] < .06
    more = draw(lambda s: s | {next(p for p in PLACES if p not in s): ('red', '8')})
    assert .3 < more['false_objects'] < .55 and more['object'] > .9 and more['caption'] < .02
    black = slot_report(Pairs(torch.full_like(data.pairs.image, -1), data.pairs.tokens, data.vocab), reader)
    assert black['presence'] == black['color'] == black['false_objects'] == 0


def test_unreadable_captions_count_as_wrong(data, reader):
    tokens = data.pairs.tokens.clone()
    tokens[::2, 1] = data.vocab.index('and')
    report = slot_report(Pairs(data.pairs.image, tokens, data.vocab), reader)
    assert report['parsed'] == .5 and report['caption'] <= .5 and report['digit'] > .9
    with pytest.raises(ValueError, match='can be read'): slot_report(Pairs(data.pairs.image[:1], tokens[:1], data.vocab), reader)

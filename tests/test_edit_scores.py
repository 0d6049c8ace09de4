"""Scores of edits: what was asked is found, what was not asked is measured, and known editors get the scores they deserve."""
import math

import pytest
import torch

from jointgen.captions import PLACES, parse_caption
from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits, choose_glyphs, digit_vocab, draw_slots
from jointgen.edit_scores import ask, asked_places, edit_report, kind_of, unasked_area
from jointgen.metrics import caption_slots, load_reader
from jointgen.pairs import Pairs, Vocab


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def reader(): return load_reader(32)


@pytest.fixture(scope='module')
def data(): return captioned_digits(200, 'test', seed=3)


@pytest.fixture(scope='module')
def wanted(data): return ask(data.pairs.tokens, data.vocab, two=0., generator=seeded())


def perfect(data, wanted):
    """The pictures one would have liked: objects that stay keep their handwriting, others get one."""
    slots = caption_slots(data.vocab.decode(wanted))
    fresh = choose_glyphs(slots, split='test')
    ids = [{p: kept[p] if said.get(p) == slot else other[p] for p, slot in new.items()} for said, new, kept, other in zip(data.slots, slots, data.glyph_ids, fresh)]
    return draw_slots(slots, ids=ids)


# --- asking


def test_what_is_asked_is_always_something_else(data):
    for two in (0., .5, 1.):
        new = ask(data.pairs.tokens, data.vocab, two=two, generator=seeded(1))
        assert (caption_keys(new, data.vocab) != caption_keys(data.pairs.tokens, data.vocab)).all()
        changed = (new != data.pairs.tokens).sum(1)
        assert changed.min() >= 1 and changed.max() <= (1 if two == 0 else 2)
        assert all(caption_slots(data.vocab.decode(new)))
    assert (changed == 2).float().mean() > .5


def test_asking_is_repeatable_and_needs_the_grammar(data):
    one, other = (ask(data.pairs.tokens, data.vocab, generator=seeded(s)) for s in (4, 5))
    assert torch.equal(one, ask(data.pairs.tokens, data.vocab, generator=seeded(4))) and not torch.equal(one, other)
    with pytest.raises(ValueError, match='no digit groups'): ask(torch.ones(2, 3, dtype=torch.long), Vocab(['bird'], 5))


# --- where


@pytest.mark.parametrize('old, new, places, kind', [
    ('the red 3 is on the upper left.', 'the red 8 is on the upper left.', {'upper left'}, 'digit'),
    ('the red 3 is on the upper left.', 'the blue 3 is on the upper left.', {'upper left'}, 'color'),
    ('the red 3 is on the upper left.', 'the red 3 is on the upper right.', {'upper left', 'upper right'}, 'place'),
    ('the red 3 is on the upper left.', 'the blue 8 is on the upper left.', {'upper left'}, 'several'),
    ('the red 3 is on the upper left.', 'the red 8 is on the lower left.', {'upper left', 'lower left'}, 'several'),
    ('this is red 3.', 'this is red 4.', {'whole'}, 'digit'),
    ('the red 3 is on the upper left.', 'the top left 3 is red.', set(), 'several')])
def test_places_and_kinds(old, new, places, kind):
    a, b = parse_caption(old), parse_caption(new)
    assert asked_places(a, b) == places and kind_of(a, b) == kind
    area = unasked_area([a], [b], 8)[0]
    assert area.sum() == (0 if 'whole' in places else 16*(4 - len(places)))


def test_the_area_is_that_of_the_quadrant():
    said = [{p: ('red', '1') for p in PLACES}]*4
    wanted = [said[0] | {p: ('red', '2')} for p in PLACES]
    area = unasked_area(said, wanted, 6)
    for i, (y, x) in enumerate(((0, 0), (0, 3), (3, 0), (3, 3))):
        assert not area[i, y:y + 3, x:x + 3].any() and area[i].sum() == 27


# --- editors that are known


def test_who_does_nothing(data, wanted, reader):
    score = edit_report(data.pairs, wanted, data.pairs.image, reader)
    assert score['asked'] == score['whole'] == score['precision'] == score['l1'] == 0 and score['kept'] > .98 and score['edits'] == 200


def test_who_does_it_right(data, wanted, reader):
    score = edit_report(data.pairs, wanted, perfect(data, wanted), reader)
    assert min(score[k] for k in ('asked', 'digit', 'color', 'place', 'whole', 'kept')) > .93 and score['l1'] == 0
    assert score['precision'] == score['asked']


def test_who_paints_anew(data, wanted, reader):
    new = draw_slots(caption_slots(data.vocab.decode(wanted)), split='test', seed=9)
    score = edit_report(data.pairs, wanted, new, reader)
    assert score['asked'] > .93 and score['l1'] > .02 and score['precision'] == pytest.approx(score['asked']*(1 - score['l1']))


def test_who_wipes_all_out(data, wanted, reader):
    score = edit_report(data.pairs, wanted, torch.full_like(data.pairs.image, -1), reader)
    assert score['asked'] == score['kept'] == 0 and score['l1'] > .01


def test_objects_over_all_the_picture_have_no_rest(reader):
    data = captioned_digits(20, 'test', subsets='Single')
    new = ask(data.pairs.tokens, data.vocab, two=0., generator=seeded())
    score = edit_report(data.pairs, new, perfect(data, new), reader)
    assert score['asked'] > .9 and math.isnan(score['l1']) and math.isnan(score['kept'])


def test_bad_input(data, wanted, reader):
    with pytest.raises(ValueError, match='no vocabulary'): edit_report(Pairs(data.pairs.image, data.pairs.tokens), wanted, data.pairs.image, reader)
    broken = wanted.clone(); broken[0, 1:] = 0
    with pytest.raises(ValueError, match='cannot be read'): edit_report(data.pairs, broken, data.pairs.image, reader)
    with pytest.raises(ValueError, match='the reader reads'): edit_report(data.pairs, wanted, data.pairs.image[..., :16], reader)
    assert digit_vocab() == data.vocab

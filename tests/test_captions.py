"""The grammar: writing, reading, refusing, degrading."""
import random
from itertools import permutations, product

import numpy as np
import pytest
from jointgen.captions import (CLASSES, COLORS, FORMS, PLACES, SUBSETS, CaptionError, Clause, below, check_names, degrade, digit_vocab, one_of,
    parse_caption, random_table, write_caption)

PAPER = {
    'This is white 7.': {'whole': ('white', '7')},
    'The 6 on the lower right is blue.': {'lower right': ('blue', '6')},
    'The green 0 is on the upper right, and the top left 8 is red.': {'upper right': ('green', '0'), 'upper left': ('red', '8')},
    'the lower left 4 is blue, the red 0 is on the lower right, and the 2 on the top right is green.':
        {'lower left': ('blue', '4'), 'lower right': ('red', '0'), 'upper right': ('green', '2')},
    'The bottom left 1 is blue, the upper right 7 is white, the bottom right 0 is red, and the upper left 3 is green.':
        {'lower left': ('blue', '1'), 'upper right': ('white', '7'), 'lower right': ('red', '0'), 'upper left': ('green', '3')}}


@pytest.mark.parametrize('text,slots', PAPER.items())
def test_the_five_examples_in_any_case(text, slots):
    assert parse_caption(text) == parse_caption(text.lower()) == parse_caption(text.upper()) == slots
    assert list(parse_caption(text)) == list(slots)


def test_written_captions_are_the_examples():
    how = [[Clause('whole')], [Clause('lower right', 0)], [Clause('upper right', 1), Clause('upper left', 2, 1)],
        [Clause('lower left', 2), Clause('lower right', 1), Clause('upper right', 0, 1)],
        [Clause('lower left', 2, 1), Clause('upper right', 2), Clause('lower right', 2, 1), Clause('upper left', 2)]]
    assert [write_caption(s, c) for s, c in zip(PAPER.values(), how)] == [t.lower() for t in PAPER]


def random_case(rng, classes=CLASSES, colors=tuple(COLORS)):
    places = rng.sample(PLACES, rng.randint(1, 4)) if rng.random() < .8 else ['whole']
    slots = {p: (rng.choice(colors), rng.choice(classes)) for p in places}
    return slots, [Clause(p, rng.randrange(3), rng.randrange(2)) for p in places]


def test_reading_undoes_writing():
    rng, vocab = random.Random(0), digit_vocab()
    cases = [random_case(rng) for _ in range(2000)]
    captions = [write_caption(*c) for c in cases]
    assert [parse_caption(t) for t in captions] == [s for s, _ in cases]
    assert vocab.decode(vocab.encode(captions)) == captions


def test_reading_undoes_writing_with_own_names():
    rng, classes, colors = random.Random(1), ['A', 'b2', "o'clock", 'x-ray', 'é', 'orange'], ['Teal', 'orange']
    for _ in range(300):
        slots, clauses = random_case(rng, classes, colors)
        assert parse_caption(write_caption(slots, clauses), classes=classes, colors=colors) == slots


def test_every_way_to_say_one_object():
    said = {write_caption({p: ('red', '4')}, [Clause(p, f, s)]) for p, f, s in product(PLACES, range(3), range(2))}
    assert len(said) == 24 and {tuple(parse_caption(t).items()) for t in said} == {((p, ('red', '4')),) for p in PLACES}


def test_every_order_of_four():
    slots = PAPER[list(PAPER)[-1]]
    said = {write_caption(slots, [Clause(p) for p in order]) for order in permutations(slots)}
    assert len(said) == 24 and all(parse_caption(t) == slots for t in said)


@pytest.mark.parametrize('text,reason', [
    ('', 'no final stop'), ('.', "'the' fits"), ('this is white 7', 'no final stop'), ('this is purple 7.', "unknown word 'purple'"),
    ('this is grean 7.', "did you mean 'green'"), ('this is 7 white.', 'a color fits'), ('this is white.', 'a digit fits'), ('this is.', 'a color fits'),
    ('this is white 7 7.', 'the end fits'), ('this is white 7, and the red 6 is on the top left.', 'the end fits'),
    ('this is white 7. this is white 7.', 'a stop inside'), ('this is white 7..', 'a stop inside'), ('this is white 7!', "unknown word '!'"),
    ('the 6 on the lower right is.', 'a color fits'), ('the on the lower right is red.', 'a digit or a color or a row fits'),
    ('the 6 on the right is red.', 'a row fits'), ('the 6 on the left upper is red.', 'a row fits'), ('the lower 6 is red.', 'a column fits'),
    ('the 6 is on the top left.', "'on' fits"), ('the red is on the top left.', 'a digit fits'), ('the red blue 6 is on the top left.', 'a digit fits'),
    ('6 on the lower right is red.', "'the' fits"), ('and the red 6 is on the top left.', "'the' fits"),
    ('the red 6 is on the top left, the red 5 is on the top right.', "no 'and'"),
    ('the red 6 is on the top left and the red 5 is on the top right.', 'the end fits'),
    ('the red 6 is on the top left, and the red 5 is on the top right, the red 4 is on the lower left.', "no 'and'"),
    ('the red 6 is on the top left, and the red 5 is on the top right, and the red 4 is on the lower left.', "'the' fits"),
    ('the red 6 is on the top left, and the upper left 5 is blue.', 'named twice'), ('the red 6 is on the top left,.', "no 'and'"),
    ('the red 6 is on the top left, and.', "'the' fits"), (', and the red 6 is on the top left.', "'the' fits"),
    ('the red 6 is on the top left,, and the red 5 is on the top right.', "'the' fits"), ('the red 10 is on the top left.', "unknown word '10'")])
def test_refusals(text, reason):
    with pytest.raises(CaptionError, match=reason) as e: parse_caption(text)
    assert isinstance(e.value, ValueError) and '\n' not in str(e.value)


def test_one_word_less_or_more_is_never_read():
    for text in PAPER:
        words = text.lower().replace(',', ' ,').replace('.', ' .').split()
        for i in range(len(words)):
            for damaged in (words[:i] + words[i + 1:], words[:i] + [words[i]] + words[i:]):
                with pytest.raises(CaptionError): parse_caption(' '.join(damaged))


def test_vocabulary():
    v = digit_vocab()
    assert (len(v), v.max_len, v.hash) == (32, 40, digit_vocab(list(CLASSES), list(COLORS)).hash)
    longest = max((write_caption({p: ('red', '1') for p in PLACES}, [Clause(p, f) for p in PLACES]) for f in range(3)), key=len)
    assert (v.encode([longest]) != 0).sum() == 39
    assert set(v.words) == {w for t in PAPER for w in parse_words(t)} | set(CLASSES) | {'top', 'bottom', 'upper', 'lower', 'and', ',', '.', 'this'}
    assert len(digit_vocab(['a', 'orange'], ['orange'])) == 5 + 13 + 2          # one word in two roles is one entry


def parse_words(text): return text.lower().replace(',', ' ,').replace('.', ' .').split()


@pytest.mark.parametrize('names', [['two words'], ['a,b'], ['.'], [''], ['left'], ['THE'], ['a', 'A'], [1, '1'], [], ['<pad>']])
def test_bad_names(names):
    for call in (lambda: check_names(names, 'class'), lambda: digit_vocab(classes=names), lambda: parse_caption('this is red 1.', classes=names)):
        with pytest.raises(ValueError): call()


def test_suggestions():
    for name, like in (('Quad5', 'Quad4'), ('single', 'Single'), ('QUAD1', 'Quad1')):
        with pytest.raises(ValueError, match=f"unknown subset '{name}'.*did you mean"): one_of(name, SUBSETS, 'subset')
    with pytest.raises(ValueError, match='take one of these'): one_of('zzz', SUBSETS, 'subset')


def test_table_is_a_function_of_seed_stream_and_row():
    t = random_table(9, 12, 7, stream=2)
    assert (random_table(4, 12, 7, stream=2, start=5) == t[5:]).all() and t.dtype == np.uint64
    assert len({x for s in range(3) for seed in range(3) for x in random_table(9, 12, seed, stream=s).flatten().tolist()}) == 9*9*12
    assert random_table(1, 4, 2**64 - 1, stream=0).shape == (1, 4) and random_table(0, 4, 0, stream=0).shape == (0, 4)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match='seed is'): random_table(1, 4, seed, stream=0)
    assert random_table(1, 4, 0, stream=0)[0, 0] == 213000021201967259       # the same on any machine


def test_below_is_exact_and_even():
    top = np.array([0, 2**64 - 1, 2**63], np.uint64)
    assert below(top, 10).tolist() == [0, 9, 5] and below(top, np.array([1, 3, 2])).tolist() == [0, 2, 1]
    counts = np.bincount(below(random_table(7000, 4, 0, stream=9).flatten(), 7))
    assert len(counts) == 7 and abs(counts - 4000).max() < 4*(28000/7*6/7)**.5


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_degrees(k):
    slots = dict(list(PAPER[list(PAPER)[-1]].items())[:k])
    for degree in range(k + 1):
        for seed in range(20):
            worse = degrade(slots, degree, seed)
            assert list(worse) == list(slots) and worse == degrade(slots, degree, seed)
            stays = [p for p in slots if worse[p] == slots[p]]
            assert len(stays) == degree
            assert all(worse[p][0] != slots[p][0] and worse[p][1] != slots[p][1] for p in slots if p not in stays)
            assert all(c in COLORS and d in CLASSES for c, d in worse.values())
    for degree in (-1, k + 1):
        with pytest.raises(ValueError, match=f'0 to {k} fits'): degrade(slots, degree, 0)


def test_degrading_lists_and_own_names():
    four, seven = PAPER[list(PAPER)[-1]], PAPER['This is white 7.']
    many = degrade([four]*40, 2, seed=3)
    assert many[:10] == degrade([four]*10, 2, seed=3) and len({str(m) for m in many}) > 30 and isinstance(many, list)
    assert degrade([], 0, 0) == [] and degrade(seven, 1, 0) == seven
    own = {'whole': ('Teal', 'A')}
    assert degrade(own, 0, 0, classes=['A', 'B'], colors=['Teal', 'pink']) == {'whole': ('pink', 'B')}
    with pytest.raises(ValueError, match='unknown color'): degrade(own, 0, 0)
    with pytest.raises(ValueError, match='unknown class'): degrade(own, 0, 0, colors=['Teal', 'pink'])
    with pytest.raises(ValueError, match='leave no other'): degrade(own, 0, 0, classes=['A'], colors=['Teal', 'pink'])


def test_new_words_and_kept_objects_are_even():
    four = PAPER[list(PAPER)[-1]]
    zero, one = degrade([four]*3000, 0, 11), degrade([four]*3000, 1, 11)
    for p in four:
        digits, colors = [[w[p][i] for w in zero] for i in (1, 0)]
        assert all(abs(digits.count(d) - 3000/9) < 4*(3000*8/81)**.5 for d in set(CLASSES) - {four[p][1]})
        assert all(abs(colors.count(c) - 1000) < 4*(3000*2/9)**.5 for c in set(COLORS) - {four[p][0]})
        assert abs(sum(w[p] == four[p] for w in one) - 750) < 4*(3000*3/16)**.5


def test_empty_slots():
    with pytest.raises(ValueError, match='slots are empty'): write_caption({})

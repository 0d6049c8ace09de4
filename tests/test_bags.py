"""What a bag counts, against a reader that parses; what it binds, reads off, tells and refuses."""
import pytest
import torch

from jointgen.bags import WHERE, Bag, check_counts, check_rates, content_words, counts_by_clause
from jointgen.captions import CLASSES, COLORS, PLACES, SUBSETS, digit_vocab, parse_caption, write_caption
from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits
from jointgen.pairs import Vocab

PARTIAL = {'the red 3.': {'red', '3', 'red_3'}, 'upper left.': {'upper', 'left'}, 'this is blue.': {'this', 'blue', 'blue@whole'},
    'the 7 on the bottom right.': {'7', 'lower', 'right', '7@lower right'}, 'white, green 5.': {'white', 'green', '5', 'green_5'}, 'the red on the top.': {'red', 'upper'}}


@pytest.fixture(scope='module')
def data(): return captioned_digits(300, 'test', seed=5)


@pytest.fixture(scope='module')
def bag(data): return Bag(data.vocab)


@pytest.fixture(scope='module')
def counts(bag, data): return bag.count(data.pairs.tokens)


def expected(bag, caption):
    "Count by reading the sentence."
    slots, said = parse_caption(caption), []
    for place, (color, digit) in slots.items():
        said += [color, digit, f'{color}_{digit}', f'{digit}@{place}', f'{color}@{place}', *(['this'] if place == 'whole' else place.split())]
    return torch.tensor([float(said.count(n)) for n in bag.names])


def test_names_and_their_kinds(bag):
    assert [len(v) for v in bag.kinds.values()] == [19, 40, 50, 20] and bag.size == len(bag.names) == len(set(bag.names)) == 129
    assert torch.cat([bag.index(k) for k in bag.kinds]).tolist() == list(range(129))
    assert all(bag.names[i] in bag.kinds[k] for k in bag.kinds for i in bag.index(k))
    assert {'red_3', '3@upper left', '3@whole', 'red@upper left', 'red@whole', 'this', 'upper'} <= set(bag.names)
    assert not {'top', 'the', 'is', 'on', 'and', ',', '.'} & set(bag.names)
    with pytest.raises(ValueError, match='unknown kind'): bag.index('place')


@pytest.mark.parametrize('subset', SUBSETS)
def test_counts_are_those_of_the_sentence(bag, subset):
    data = captioned_digits(40, 'train', subsets=subset, seed=2)
    counts = bag.count(data.pairs.tokens)
    assert torch.equal(counts, torch.stack([expected(bag, c) for c in data.captions]))
    assert counts.dtype == torch.float32 and torch.equal(bag.check(counts), counts)


def test_equal_bags_are_equal_contents(bag, data, counts):
    keys = caption_keys(data.pairs.tokens, data.vocab)
    plain = {tuple(row): k for row, k in zip(counts.tolist(), keys.tolist())}
    assert len(plain) == len(keys.unique()) and all(plain[tuple(row)] == k for row, k in zip(counts.tolist(), keys.tolist()))


def test_wording_and_order_do_not_count(bag):
    slots = {'upper left': ('red', '3'), 'lower right': ('blue', '3')}
    said = [write_caption(dict(order), [(p, form, synonym) for p, _ in order]) for order in (list(slots.items()), list(slots.items())[::-1]) for form in range(3) for synonym in range(2)]
    counts = bag.count(bag.vocab.encode(said))
    assert len(set(said)) == 12 and torch.equal(counts, counts[:1].expand(12, -1))


@pytest.mark.parametrize('caption, names', PARTIAL.items())
def test_a_clause_binds_what_it_says(bag, caption, names):
    counts = bag.count(bag.vocab.encode([caption]))[0]
    assert {bag.names[i] for i in counts.nonzero()[:, 0]} == names


def test_clauses_add_up(bag, data, counts):
    said = counts_by_clause(bag, data.pairs.tokens)
    assert torch.equal(said.sum(1), counts[:, bag.index('word')]) and said.shape[1] == 4
    objects = torch.tensor([float(len(s)) for s in data.slots])
    for kind in ('color_digit', 'digit@place', 'color@place'): assert torch.equal(counts[:, bag.index(kind)].sum(1), objects)


def test_plain_words_forget_what_belongs_together(data):
    plain, bound = Bag(data.vocab, bound=False), Bag(data.vocab)
    two = data.vocab.encode([write_caption({'upper left': (a, '3'), 'lower right': (b, '5')}) for a, b in (('red', 'blue'), ('blue', 'red'))])
    assert torch.equal(*plain.count(two)) and not torch.equal(*bound.count(two))
    assert plain.size == 19 and plain.names == bound.names[:19]
    with pytest.raises(ValueError, match='bound tokens do'): plain.slots(plain.count(two))


def test_slots_come_back(bag, data, counts):
    assert bag.slots(counts) == [{p: s[p] for p in WHERE if p in s} for s in data.slots] == data.slots
    noise = torch.rand(counts.shape, generator=torch.Generator().manual_seed(0))
    assert bag.slots(.8*counts + .05*noise) == data.slots
    faint = bag.slots(counts/1e3)
    assert all(len(f) == 1 and f.items() <= s.items() for f, s in zip(faint, data.slots))
    assert bag.slots(counts/1e3, threshold=1e-4) == data.slots


def test_at_least_one_object_is_read_off(bag):
    for rates in (torch.zeros(3, bag.size), torch.rand(3, bag.size)*.01):
        assert [len(s) for s in bag.slots(rates)] == [1, 1, 1]
    sure = torch.zeros(1, bag.size); sure[0, bag.names.index('4@whole')] = sure[0, bag.names.index('4@upper left')] = .6; sure[0, bag.names.index('red@whole')] = .1
    assert bag.slots(sure) == [{'whole': ('red', '4')}]


def test_colour_and_digit_are_read_together(bag):
    rates, put = torch.zeros(1, bag.size), lambda name, v: rates.__setitem__((0, bag.names.index(name)), v)
    for name, v in {'3@upper left': .5, '5@upper left': .49, 'red@upper left': 1., 'red_3': .2, 'red_5': .8}.items(): put(name, v)
    assert bag.slots(rates) == [{'upper left': ('red', '5')}]


def test_a_template_tells_the_content(bag, data, counts):
    told = bag.tell(counts)
    assert told.dtype == torch.int64 and told.shape == (300, data.vocab.max_len)
    assert torch.equal(caption_keys(told, data.vocab), caption_keys(data.pairs.tokens, data.vocab))
    assert [parse_caption(c) for c in data.vocab.decode(told)] == data.slots


def test_top_words(bag, counts):
    top = bag.top_words(counts[:5] + .001, 7)
    assert [len(row) for row in top] == [7]*5 and all(a[1] >= b[1] for row in top for a, b in zip(row, row[1:]))
    assert all(abs(counts[i, bag.names.index(n)].item() + .001 - r) < 1e-6 for i, row in enumerate(top) for n, r in row)
    assert len(bag.top_words(counts[:1], 10**6)[0]) == bag.size


def test_other_vocabularies_have_plain_words():
    vocab = Vocab.from_captions(['a red bird with a long beak.', 'the bird is red, with white wings.'])
    bag = Bag(vocab)
    assert not bag.bound and set(bag.names) == {'red', 'bird', 'long', 'beak', 'white', 'wings'} and list(bag.kinds) == ['word']
    counts = bag.count(vocab.encode(['a red red bird.']))
    assert counts.sum() == 3 and counts[0, bag.names.index('red')] == 2
    assert set(vocab.decode(bag.tell(counts))[0].split()) == {'red', 'bird'} | set(vocab.decode(bag.tell(counts))[0].split()[2:]) and len(vocab.decode(bag.tell(counts))[0].split()) == 3
    assert bag.tell(torch.zeros(1, 6)).shape == (1, vocab.max_len) and len(vocab.decode(bag.tell(torch.full((1, 6), 99.)))[0].split()) == 6
    with pytest.raises(ValueError, match='need the grammar of captioned digits: take bound=False'): Bag(vocab, bound=True)


def test_own_names_are_bound_when_they_are_given():
    vocab = digit_vocab(['A', 'B'], ['gold', 'pink'])
    assert not Bag(vocab).bound and Bag(vocab, classes=['A', 'B'], colors=['gold', 'pink']).bound
    bag = Bag(vocab, classes=['A', 'B'], colors=['gold', 'pink'])
    counts = bag.count(vocab.encode(['this is gold b.']))
    assert bag.size == 9 + 4 + 10 + 10 and bag.slots(counts) == [{'whole': ('gold', 'b')}] and vocab.decode(bag.tell(counts)) == ['this is gold b.']
    with pytest.raises(ValueError, match='bound tokens need'): Bag(vocab, bound=True)


def test_words_that_count():
    words = content_words(digit_vocab())
    assert words['upper'] == ('upper', 'top') and words['3'] == ('3',) and len(words) == 19 == 1 + 4 + len(COLORS) + len(CLASSES)
    with pytest.raises(ValueError, match='no content word'): Bag(Vocab(['the', 'is', '.'], 5))


def test_captions_that_say_nothing():
    vocab = Vocab.from_captions(['red bird']*3 + ['rare'], min_count=2, max_len=6)
    with pytest.raises(ValueError, match='caption 1 says none of the 2 words'): Bag(vocab).count(vocab.encode(['red bird', 'purple frog']))
    with pytest.raises(ValueError, match='caption 0 says none'): Bag(digit_vocab()).count(digit_vocab().encode(['the is and.']))
    with pytest.raises(ValueError, match='give the vocabulary that encoded'): Bag(vocab).count(torch.full((1, 6), 99))
    assert Bag(digit_vocab()).count(digit_vocab().encode([])).shape == (0, 129)


@pytest.mark.parametrize('spoil, match', [
    (lambda c: c.masked_fill(torch.arange(len(c))[:, None] == 2, 0), 'document 2 is empty'), (lambda c: c - 1, 'a count is -1'), (lambda c: c/2, 'a count is 0.5'),
    (lambda c: c[:, :-1], r'\[b, 129\] fits'), (lambda c: c[0], r'\[b, 129\] fits'), (lambda c: c*float('nan'), 'NaN or infinite'), (lambda c: c + float('inf'), 'NaN or infinite')])
def test_counts_that_are_none(bag, counts, spoil, match):
    with pytest.raises(ValueError, match=match): bag.check(spoil(counts[:5]))
    with pytest.raises(ValueError, match=match): check_counts(spoil(counts[:5]), bag.size)


def test_counts_of_whole_numbers_are_widened(bag, counts):
    assert bag.check(counts.long()).dtype == torch.float32 and torch.equal(check_counts(counts.half(), 129), counts)


@pytest.mark.parametrize('method', ['slots', 'tell', 'top_words'])
@pytest.mark.parametrize('rates, match', [(torch.ones(2, 7), r'\[b, 129\] fits'), (torch.full((2, 129), -1.), 'negative or NaN'), (torch.full((2, 129), float('nan')), 'negative or NaN')])
def test_rates_that_are_none(bag, method, rates, match):
    with pytest.raises(ValueError, match=match): getattr(bag, method)(rates)
    with pytest.raises(ValueError, match=match): check_rates(rates, bag.size)


def test_places_of_a_bag(): assert WHERE == (*PLACES, 'whole')

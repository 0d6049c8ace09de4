"""Content keys, mismatches, edited captions, contrastive loss: no mismatch is a match, over thousands of draws."""
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from jointgen.captions import Clause, digit_vocab, parse_caption, write_caption
from jointgen.contrasts import WordGroups, caption_keys, content_table, cosine_table, derange, differing, digit_groups, edit_words, info_nce, lands_twice, mixed, word_groups
from jointgen.digits import captioned_digits
from jointgen.pairs import Vocab


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def random(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture(scope='module')
def data(): return captioned_digits(6000, 'train', side=16)


@pytest.fixture(scope='module')
def groups(data): return digit_groups(data.vocab)


# --- content keys


def test_keys_are_equal_where_contents_are(data):
    keys = caption_keys(data.pairs.tokens, data.vocab).tolist()
    contents = [frozenset(s.items()) for s in data.slots]
    assert len(set(keys)) == len(set(contents)) == len(set(zip(keys, contents))) < len(keys)


def test_keys_do_not_hear_the_wording():
    v, slots = digit_vocab(), {'upper left': ('red', '3'), 'lower right': ('blue', '7'), 'lower left': ('red', '7')}
    said = [write_caption(dict(items), [Clause(p, (f + i) % 3, (f + i) % 2) for i, (p, _) in enumerate(items)])
            for f in range(3) for items in (list(slots.items()), list(slots.items())[::-1])]
    assert len(set(said)) == 6 and caption_keys(v.encode(said), v).unique().numel() == 1
    swapped = dict(zip(slots, [('blue', '3'), ('red', '7'), ('red', '7')]))  # the same words at other places
    assert caption_keys(v.encode([write_caption(swapped)]), v) != caption_keys(v.encode(said[:1]), v)


def test_keys_outlast_the_vocabulary(data):
    """The same words in another order of ids, and another padding, give the same numbers."""
    other = Vocab(data.vocab.words[::-1], 60)
    a, b = caption_keys(data.pairs.tokens[:200], data.vocab), caption_keys(other.encode(data.captions[:200]), other)
    assert torch.equal(a, b) and a.dtype == torch.int64


def test_keys_of_other_captions():
    said = ['a small bird, with a red bill.', 'with a red bill a small bird', 'a small red bird', 'a small small red bird', 'a bird']
    v = Vocab.from_captions(said)
    keys = caption_keys(v.encode(said), v)
    assert keys[0] == keys[1] and keys.unique().numel() == 4
    rare = Vocab.from_captions(said, min_count=3)
    assert caption_keys(rare.encode(['a cat bird', 'a bird']), rare).unique().numel() == 2  # an unknown word counts
    with pytest.raises(ValueError, match='token ids'): caption_keys(torch.full((1, 4), 99), v)


def test_scrambling_loses_nothing():
    x = torch.randint(-2**62, 2**62, (100_000,), generator=seeded())
    assert mixed(x).unique().numel() == x.unique().numel() and abs((mixed(x) & 1).float().mean() - .5) < .01
    flipped = torch.stack([mixed(x[:2000]) ^ mixed(x[:2000] ^ (1 << k)) for k in range(62)])
    assert min(((flipped >> k) & 1).float().mean() for k in range(64)) > .4  # each bit in moves half of the bits out
    codes, comma = content_table(digit_vocab())
    assert (codes[:4] == 0).all() and comma == digit_vocab().index(',') and len(codes) == len(digit_vocab())


# --- mismatches within a batch


def test_derange_never_hands_out_a_match():
    g, seen = seeded(), 0
    for trial in range(1500):
        b = 2 + trial % 9
        keys = torch.randint(0, 1 + trial % 4, (b,), generator=g)
        if keys.unique().numel() == 1:
            with pytest.raises(ValueError, match='say the same'): derange(keys, generator=g)
            continue
        at = derange(keys, generator=g)
        assert at.shape == (b,) and ((0 <= at) & (at < b)).all() and (keys[at] != keys).all() and (at != torch.arange(b)).all()
        seen += 1
    assert seen > 600


def test_derange_is_even_and_repeatable():
    keys = torch.tensor([5, 5, 6, 7, 7, 7])
    draws = torch.stack([derange(keys, generator=seeded(s)) for s in range(3000)])
    for i, row in enumerate(draws.T):
        share = torch.bincount(row, minlength=6)/3000
        allowed = keys != keys[i]
        assert (share[~allowed] == 0).all() and (share[allowed] - 1/allowed.sum()).abs().max() < .04
    assert torch.equal(derange(keys, generator=seeded(3)), derange(keys, generator=seeded(3)))


def test_no_mismatch_exists():
    for keys, message in ((torch.tensor([1]), 'batch of 1'), (torch.tensor([], dtype=torch.long), 'batch of 0'), (torch.ones(8, dtype=torch.long), 'all 8')):
        with pytest.raises(ValueError, match=message): derange(keys)
        with pytest.raises(ValueError, match=message): info_nce(random(len(keys), 3), random(len(keys), 3), keys=keys)
    assert torch.equal(differing(torch.tensor([1, 2, 1])), torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).bool())


# --- one word changed


def changed(slots, caption):
    """Which attribute a caption says differently: one object, one of its three facts."""
    old, new = set(slots.items()), set(parse_caption(caption).items())
    (place, (color, digit)), (place2, (color2, digit2)) = *(old - new), *(new - old)
    facts = [n for n, a, b in (('place', place, place2), ('color', color, color2), ('digit', digit, digit2)) if a != b]
    assert len(old - new) == len(new - old) == len(facts) == 1
    return facts[0]


@pytest.mark.parametrize('weights', [None, dict(digit=1), dict(color=1, digit=2), dict(place=.1, digit=1)])
def test_one_fact_changes(data, groups, weights):
    tokens = data.pairs.tokens
    edited = edit_words(tokens, groups, weights=weights, generator=seeded())
    assert edited.shape == tokens.shape and edited.dtype == tokens.dtype and (edited != tokens).sum(1).eq(1).all()
    assert (caption_keys(edited, data.vocab) != caption_keys(tokens, data.vocab)).all()
    facts = Counter(changed(s, c) for s, c in zip(data.slots, data.vocab.decode(edited)))
    assert set(facts) == (set(weights) if weights else {'digit', 'color', 'place'})


def test_places_move_where_there_is_room(groups):
    data = captioned_digits(3000, 'train', 16, ['Quad1', 'Quad2', 'Quad3'])
    where = Counter()
    for seed in range(3):
        edited = edit_words(data.pairs.tokens[:1000], groups, generator=seeded(seed))
        where.update(changed(s, c) for s, c in zip(data.slots, data.vocab.decode(edited)))
    assert min(where.values()) > 900  # a third each
    one = captioned_digits(500, 'train', 16, ['Quad1'])
    moved = edit_words(one.pairs.tokens, groups, weights=dict(place=1), generator=seeded())
    assert {changed(s, c) for s, c in zip(one.slots, one.vocab.decode(moved))} == {'place'}
    full = captioned_digits(20, 'train', 16, ['Quad4'])
    with pytest.raises(ValueError, match='offers no word'): edit_words(full.pairs.tokens, groups, weights=dict(place=1))
    tokens = full.pairs.tokens
    assert torch.equal(lands_twice(tokens, groups.other[tokens, 0], groups), groups.place[tokens] != 0)  # no room for anyone


def test_a_synonym_is_no_edit():
    v = digit_vocab()
    row = [v.index(w) for w in ('upper', 'top', 'lower', 'bottom')]
    g = digit_groups(v)
    assert {int(x) for x in g.other[row[0], :g.count[row[0]]]} == set(row[2:]) == {int(x) for x in g.other[row[1], :g.count[row[1]]]}
    assert g.count[v.index('3')] == 9 and g.count[v.index('red')] == 3 and g.count[v.index('left')] == 1 and g.count[v.index('the')] == 0


def test_edits_are_even_and_repeatable(groups):
    v = digit_vocab()
    tokens = v.encode(['the upper left 3 is red, and the top right 4 is blue.']).repeat(12_000, 1)
    edited = edit_words(tokens, groups, generator=seeded())
    shares = torch.stack([(edited != tokens)[:, i].float().mean() for i in range(tokens.shape[1])])
    for name in groups.names: assert abs(shares[groups.group[tokens[0]] == groups.names.index(name)].sum() - 1/3) < .02
    at = tokens[0].tolist().index(v.index('3'))
    new = torch.bincount(edited[:, at][edited[:, at] != tokens[0, at]], minlength=len(v)).float()
    assert (new[new > 0]/new.sum() - 1/9).abs().max() < .03 and (new > 0).sum() == 9
    assert torch.equal(edited, edit_words(tokens, groups, generator=seeded()))
    heavy = edit_words(tokens, groups, weights=dict(digit=3, color=1), generator=seeded())
    assert abs(((heavy != tokens) & (groups.group[tokens] == 0)).sum()/len(tokens) - .75) < .02


def test_own_names():
    data = captioned_digits(300, 'train', 16, colors=dict(Teal=(0, 1, 1), mauve=(1, 0, 1)))
    groups = digit_groups(data.vocab, colors=['Teal', 'mauve'])
    edited = edit_words(data.pairs.tokens, groups, generator=seeded())
    for slots, caption in zip(data.slots, data.vocab.decode(edited)):
        new = parse_caption(caption, colors=['Teal', 'mauve'])
        assert len(set(slots.items()) - set(new.items())) == 1
    with pytest.raises(ValueError, match="'white'"): digit_groups(data.vocab)


def test_own_groups():
    v = Vocab.from_captions(['a red bird with a grey bill', 'a gray bird', 'a blue bird'])
    g = word_groups(v, dict(color=[['red', 'blue', ('grey', 'gray')]]))
    assert isinstance(g, WordGroups) and g.comma == -1
    tokens = v.encode(['a grey bird', 'a red bird with a blue bill']*500)
    edited = edit_words(tokens, g, generator=seeded())
    assert (caption_keys(edited, v) != caption_keys(tokens, v)).all()
    assert not any('gray' in c for c in v.decode(edited[::2]))
    with pytest.raises(ValueError, match='caption 1 of the batch'): edit_words(v.encode(['a red bird', 'a bird']), g)
    with pytest.raises(ValueError, match='use their names'): edit_words(tokens, g, weights=dict(colour=1))
    with pytest.raises(ValueError, match='two kinds'): word_groups(v, dict(a=[['red', 'blue']], b=[['red', 'gray']]))
    with pytest.raises(ValueError, match='1 meaning'): word_groups(v, dict(a=[[('grey', 'gray')]]))
    with pytest.raises(ValueError, match="'pink'"): word_groups(v, dict(a=[['red', 'pink']]))


# --- contrastive loss


@pytest.mark.parametrize('b', [2, 16, 128])
def test_chance_is_log_b(b):
    assert info_nce(torch.ones(b, 4), torch.ones(b, 4)).item() == pytest.approx(math.log(b), abs=1e-4)  # nothing to tell apart
    assert info_nce(random(b, 512), random(b, 512, seed=1)).item() == pytest.approx(math.log(b), abs=.35)


def test_perfect_pairs_cost_nothing():
    a = torch.eye(12)
    assert info_nce(a, 3*a) < 1e-3 and info_nce(a, a.roll(1, 0)) > 9
    assert info_nce(a, -a) > 9


def test_symmetric_and_by_hand():
    a, b = random(6, 5), random(6, 5, seed=1)
    table = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T/.3
    assert torch.allclose(cosine_table(a, b, .3), table, atol=1e-5)
    by_hand = -(table.log_softmax(1).diagonal().mean() + table.log_softmax(0).diagonal().mean())/2
    assert torch.allclose(info_nce(a, b, temperature=.3), by_hand) and torch.allclose(info_nce(b, a, temperature=.3), by_hand)
    assert torch.allclose(info_nce(5*a, .1*b), info_nce(a, b), atol=1e-5)


def test_mask_drops_exactly_the_false_negatives():
    a, b, keys = random(6, 5), random(6, 5, seed=1), torch.tensor([1, 1, 2, 3, 3, 3])
    table = cosine_table(a, b)
    rows, cols = [], []
    for i in range(6):
        fits = [j for j in range(6) if j == i or keys[j] != keys[i]]
        rows.append(table[i, fits].logsumexp(0) - table[i, i]); cols.append(table[fits, i].logsumexp(0) - table[i, i])
    assert torch.allclose(info_nce(a, b, keys=keys), torch.stack(rows + cols).mean())
    assert torch.allclose(info_nce(a, b, keys=torch.arange(6)), info_nce(a, b))
    b = b.clone().requires_grad_()
    only = -F.log_softmax(cosine_table(a, b)[:1].masked_fill(~torch.tensor([[1, 0, 1, 1, 1, 1]]).bool(), -torch.inf), 1)[0, 0]
    assert torch.autograd.grad(only, b)[0][1].abs().max() == 0  # row 1 says what row 0 says: no push


def test_contrast_is_float32_under_autocast():
    a, b = random(8, 16), random(8, 16, seed=1)
    with torch.autocast('cpu', torch.bfloat16): inside = info_nce(a, b)
    assert inside.dtype == torch.float32 and torch.equal(inside, info_nce(a, b)) and info_nce(a.bfloat16(), b).dtype == torch.float32
    with pytest.raises(ValueError, match='equally many'): info_nce(a, b[:7])


def test_contrast_has_gradients():
    a, b = random(8, 4).double().requires_grad_(), random(8, 4, seed=1).double().requires_grad_()
    keys = torch.tensor([0, 0, 1, 2, 3, 4, 4, 4])
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, keys=keys), (a, b))

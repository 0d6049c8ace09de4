"""Scores of bags against their definitions, computed by hand, and against what is known of a perfect and of a blind model."""
import math

import pytest
import torch
from torch.distributions import Poisson

from jointgen.bags import Bag
from jointgen.contrasts import caption_keys
from jointgen.digits import captioned_digits
from jointgen.topic_scores import (FLOOR, blind_rates, bound_accuracy, coherence, diversity, exact_reader_rates, likelihood_r_precision, likelihood_ranks,
    likelihood_table, perplexity, perplexity_report)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def data(): return captioned_digits(300, 'test', seed=4)


@pytest.fixture(scope='module')
def bag(data): return Bag(data.vocab)


@pytest.fixture(scope='module')
def counts(bag, data): return bag.count(data.pairs.tokens)


@pytest.fixture(scope='module')
def train(bag): return bag.count(captioned_digits(1000, 'train', seed=4).pairs.tokens)


@pytest.fixture(scope='module')
def keys(data): return caption_keys(data.pairs.tokens, data.vocab)


# --- perplexity


def test_perplexity_of_equally_likely_words_is_their_number():
    counts = torch.tensor([[2., 0., 1., 0.], [0., 1., 0., 0.]])
    assert abs(perplexity(counts, torch.ones(1, 4)) - 4) < 1e-5 and abs(perplexity(counts, torch.full((2, 4), 9.)) - 4) < 1e-5


def test_perplexity_counts_words_not_documents():
    counts, rates = torch.tensor([[3., 0.], [0., 1.]]), torch.tensor([[.9, .1], [.5, .5]])
    assert abs(perplexity(counts, rates) - math.exp(-(3*math.log(.9) + math.log(.5))/4)) < 1e-5


def test_nobody_beats_the_exact_reader(counts, train):
    floor, ceiling = perplexity(counts, exact_reader_rates(counts)), perplexity(counts, blind_rates(train))
    for seed in range(5): assert floor < perplexity(counts, counts + .3*torch.rand(counts.shape, generator=seeded(seed))) < ceiling
    share = counts/counts.sum(1, keepdim=True)
    entropy = -(counts*share.clamp(min=1e-9).log()).sum()/counts.sum()
    assert abs(floor/entropy.exp().item() - 1) < 1e-5


def test_blind_rates_are_the_best_that_never_look(train):
    best = perplexity(train, blind_rates(train))
    for seed in range(5): assert perplexity(train, blind_rates(train)*(.8 + .4*torch.rand(1, train.shape[1], generator=seeded(seed)))) > best


def test_a_missing_word_costs_the_floor():
    assert abs(math.log(perplexity(torch.tensor([[1., 0.]]), torch.tensor([[0., 1.]]))) + math.log(FLOOR)) < 1e-3


def test_report_runs_from_blind_to_exact(counts, train):
    exact, blind = (perplexity_report(counts, r, train) for r in (counts, blind_rates(train).expand_as(counts)))
    assert abs(exact['told'] - 1) < 1e-6 and abs(blind['told']) < 1e-6
    assert exact['perplexity'] == exact['floor'] == blind['floor'] < exact['ceiling'] == blind['ceiling'] == blind['perplexity']


# --- bound tokens


def test_a_perfect_model_is_right_and_a_blind_one_is_not(bag, data, counts, train):
    assert set(bound_accuracy(bag, counts, data.pairs.tokens).values()) == {1.}
    assert set(bound_accuracy(bag, 1e-3*counts + 1e-6, data.pairs.tokens).values()) != {1.}  # nothing passes the threshold of an object
    noise = bound_accuracy(bag, torch.rand(300, bag.size, generator=seeded()), data.pairs.tokens)
    assert abs(noise['digit_at_place'] - .1) < .05 and abs(noise['color_at_place'] - .25) < .08 and noise['slots'] < .05


def test_a_tie_is_lost(bag, data):
    assert set(bound_accuracy(bag, torch.ones(300, bag.size), data.pairs.tokens).values()) == {0.}


def test_shares_are_of_objects(bag):
    tokens = bag.vocab.encode(['the red 3 is on the upper left, and the blue 5 is on the lower right.', 'this is green 7.'])
    rates = bag.count(tokens)
    def swap(a, b): rates[:, [bag.names.index(a), bag.names.index(b)]] = rates[:, [bag.names.index(b), bag.names.index(a)]]
    swap('5@lower right', '6@lower right'); swap('red_3', 'red_4')
    score = bound_accuracy(bag, rates, tokens)
    assert [round(score[k], 4) for k in ('color_at_place', 'digit_at_place', 'color_digit', 'slots')] == [1, .6667, .6667, .5]


def test_the_same_pair_twice_counts_twice(bag):
    tokens = bag.vocab.encode(['the red 3 is on the upper left, the red 3 is on the upper right, and the blue 5 is on the lower right.'])
    rates = bag.count(tokens)
    assert bound_accuracy(bag, rates, tokens)['color_digit'] == 1
    rates[0, bag.names.index('red_3')] = 0
    assert abs(bound_accuracy(bag, rates, tokens)['color_digit'] - 1/3) < 1e-6


# --- topics


def by_hand(words, counts):
    "NPMI of pairs, in loops."
    n, total, pairs = len(counts), 0, [(i, j) for a, i in enumerate(words) for j in words[a + 1:]]
    for i, j in pairs:
        a, b, both = (sum(bool(x) for x in column)/n for column in (counts[:, i] > 0, counts[:, j] > 0, (counts[:, i] > 0) & (counts[:, j] > 0)))
        total += -1 if both == 0 else 1 if both == 1 else math.log(both/a/b)/-math.log(both)
    return total/len(pairs)


def test_coherence_is_npmi(train):
    topics = torch.rand(train.shape[1], 4, generator=seeded())
    got = coherence(topics, train[:200], top=5)
    for k in range(4): assert abs(got[k] - by_hand(topics[:, k].topk(5).indices.tolist(), train[:200])) < 1e-5


def test_coherence_runs_from_never_together_to_never_apart():
    counts = torch.tensor([[1., 1., 0., 1.], [2., 1., 0., 1.], [0., 0., 1., 1.]])
    topics = torch.tensor([[.5, .5, 0, 0], [.5, 0, .5, 0], [.5, .2, 0, .3]]).T
    assert torch.allclose(coherence(topics[:, :2], counts, top=2), torch.tensor([1., -1.]), atol=1e-6)
    assert abs(coherence(topics[:, 2:], counts, top=2)[0]) < 1e-6          # a word of every document says nothing
    always = torch.ones(3, 4)
    assert (coherence(topics, always, top=2) == 1).all()


def test_diversity():
    eye = torch.eye(12)
    same = torch.rand(12, 1, generator=seeded()).expand(12, 4)
    assert diversity(same, top=3) == .25 and diversity(torch.block_diag(*[torch.ones(3, 1)]*4), top=3) == 1 and 0 < diversity(eye, top=2) <= 1


@pytest.mark.parametrize('top', [1, 13])
def test_top_has_two_words_or_more(top):
    for score in (lambda t: coherence(t, torch.ones(3, 12), top), lambda t: diversity(t, top)):
        with pytest.raises(ValueError, match='2 to 12 words'): score(torch.rand(12, 3))


# --- likelihood


def test_table_is_the_likelihood_of_poisson_draws(counts):
    rates = torch.rand(6, counts.shape[1], generator=seeded()) + .01
    known = Poisson(rates[:, None].double()).log_prob(counts[:9].double()).sum(2)
    assert torch.allclose(likelihood_table(rates, counts[:9]).double(), known, atol=1e-3)


def test_ranks_of_a_perfect_and_a_blind_model(counts, keys, train):
    assert (likelihood_ranks(counts + .01, counts, keys, generator=seeded()) == 1).all()
    blind = likelihood_ranks(blind_rates(train).expand_as(counts), counts, keys, candidates=20, generator=seeded())
    assert blind.min() >= 1 and blind.max() <= 20 and 7 < blind.float().mean() < 14
    score = likelihood_r_precision(counts + .01, counts, keys, folds=5, generator=seeded())
    assert score['mean'] == 1 and score['candidates'] == 100 and score['mean_rank'] == 1 and score['folds'] == 5


def test_short_descriptions_win_by_likelihood_but_not_against_blind_rates(counts, keys, train):
    rates, blind = .5*counts + .5*blind_rates(train), blind_rates(train)
    plain, fair = (likelihood_ranks(rates, counts, keys, against=a, generator=seeded()) for a in (None, blind))
    assert (plain > 1).float().mean() > .2 and (fair == 1).all()
    table = likelihood_table(rates, counts)
    winners = table.argmax(1)[table.argmax(1) != torch.arange(300)]
    losers = torch.arange(300)[table.argmax(1) != torch.arange(300)]
    assert (counts[winners].sum(1) <= counts[losers].sum(1)).all()
    assert likelihood_r_precision(rates, counts, keys, against=blind, generator=seeded())['mean'] == 1


def test_descriptions_of_equal_length_that_tie_are_lost():
    counts = torch.eye(4)
    ranks = likelihood_ranks(torch.ones(4, 4), counts, torch.arange(4), candidates=4, generator=seeded())
    assert ranks.tolist() == [4]*4


def test_one_generator_one_score(counts, keys, train):
    rates = counts*.1 + blind_rates(train)
    one, other = (likelihood_r_precision(rates, counts, keys, generator=seeded(3)) for _ in range(2))
    assert one == other and .05 < one['mean'] < .95


# --- what is refused


@pytest.mark.parametrize('score', [lambda c: perplexity(c, torch.ones(1, 129)), exact_reader_rates, blind_rates, lambda c: coherence(torch.rand(129, 2), c),
    lambda c: likelihood_table(torch.ones(2, 129), c)])
@pytest.mark.parametrize('spoil, match', [(lambda c: 0*c, 'is empty'), (lambda c: -c, 'a count is -'), (lambda c: c/2, 'a count is 0.5')])
def test_documents_that_are_none(counts, score, spoil, match):
    with pytest.raises(ValueError, match=match): score(spoil(counts[:4]))


@pytest.mark.parametrize('score', [lambda c, r: perplexity(c, r), lambda c, r: likelihood_table(r, c)])
@pytest.mark.parametrize('rates, match', [(torch.ones(4, 7), r'rates have shape \[4, 7\], \[b, 129\] fits'), (torch.full((4, 129), -1.), 'negative or NaN'), (torch.full((4, 129), float('nan')), 'negative or NaN')])
def test_rates_that_are_none(bag, data, counts, score, rates, match):
    with pytest.raises(ValueError, match=match): score(counts[:4], rates)
    with pytest.raises(ValueError, match=match): bound_accuracy(bag, rates, data.pairs.tokens[:4])

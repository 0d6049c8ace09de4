import math

import numpy as np
import pytest
import torch

from jointgen import metrics as M
from jointgen.digits import SUBSETS, captioned_digits, degree_set, write_caption
from jointgen.pairs import Pairs


@pytest.fixture(scope='module')
def reader(): return M.load_reader(32)


@pytest.fixture(scope='module')
def real(): return captioned_digits(300, 'test', seed=4)


def read_and_write(reader):
    def oracle(pairs):
        return Pairs(pairs.image, pairs.vocab.encode([write_caption(s) if s else 'and' for s in M.read_slots(pairs.image, reader)]), pairs.vocab)
    return oracle


def test_real_pairs_score_at_the_ceiling(reader, real):
    pair, slot = (f(real.pairs, real.vocab, reader) for f in (M.pair_consistency, M.slot_consistency))
    assert set(pair) == {*SUBSETS, 'average', 'parsed'} == set(slot)
    assert pair['parsed'] == 1 and pair['average'] > .97 and slot['average'] >= pair['average']
    assert abs(pair['average'] - np.mean([pair[s] for s in SUBSETS])) < 1e-9
    ceiling = M.reader_accuracy(reader, real)
    assert all(abs(pair[s] - ceiling[s]) < 1e-9 for s in SUBSETS)


def test_shuffled_pairs_score_near_chance(reader, real):
    shuffled = Pairs(real.pairs.image, real.pairs.tokens.roll(1, 0), real.vocab)
    assert M.pair_consistency(shuffled, real.vocab, reader)['average'] < .03
    assert M.slot_consistency(shuffled, real.vocab, reader)['average'] < .1


def test_unparsable_captions_count_as_wrong(reader, real):
    tokens = real.pairs.tokens.clone()
    tokens[:150, 1:4] = real.vocab.index('and')
    score = M.pair_consistency(Pairs(real.pairs.image, tokens, real.vocab), real.vocab, reader)
    assert score['parsed'] == .5
    assert abs(score['average'] - .5*np.mean([score[s] for s in SUBSETS])) < 1e-9
    assert M.caption_slots(['the .', '', 'this is red 7.'])[:2] == [None, None]


def test_an_extra_object_breaks_the_pair_but_not_the_slots(reader):
    data = captioned_digits(60, 'test', 32, ['Quad1'], seed=1)
    image = torch.maximum(data.pairs.image, data.pairs.image.flip(0))   # two pictures on one another
    other = [i for i, (a, b) in enumerate(zip(data.slots, data.slots[::-1])) if set(a) != set(b)]
    both = Pairs(image, data.pairs.tokens, data.vocab)[other]
    assert M.pair_consistency(both, data.vocab, reader)['Quad1'] < .05
    assert M.slot_consistency(both, data.vocab, reader)['Quad1'] > .9


def test_verdicts_are_the_terms_of_the_consistency(reader, real):
    marks = M.verdicts(real.pairs, real.vocab, reader)
    assert len(marks) == 300 and np.mean(marks) > .97


def test_mix_and_diversity(real):
    mix = M.subset_mix([*real.captions, 'and and.'])
    assert abs(sum(mix.values()) - 1) < 1e-9 and abs(mix['unparsed'] - 1/301) < 1e-9
    variety = M.caption_diversity(real.captions)
    assert variety['slots'] <= variety['captions'] <= 1 and 2.2 < variety['digit'] <= math.log(10)
    assert M.caption_diversity(['this is red 7.']*5)['digit'] == 0
    assert M.caption_diversity([])['captions'] == 0


@pytest.mark.parametrize('subset', ['Single', 'Quad2', 'Quad4'])
def test_degree_oracles(reader, subset):
    copied = M.degree_curve(lambda p: p, n=60, subset=subset)
    k = len(copied['degrees']) - 1
    assert copied['degrees'] == list(range(k, -1, -1)) and copied['accuracy'] == [1.]*(k + 1)
    written = M.degree_curve(read_and_write(reader), n=60, subset=subset)
    assert written['deviation'] < .03 and written['monotone'] and written['accuracy'][-1] < .02
    mirrored = M.degree_curve(read_and_write(reader), n=60, subset=subset, reader=reader)
    assert min(mirrored['accuracy']) > .93


def test_degree_takes_a_model_and_word_accuracy_counts_words():
    class Copy:
        def reconstruct(self, pairs): return pairs
    data = degree_set(30, 1)
    assert M.degree_accuracy(Copy(), data) == M.word_accuracy(Copy(), data) == 1
    true = degree_set(30, 4)
    assert abs(M.word_accuracy(lambda p: Pairs(p.image, true.pairs.tokens, p.vocab), data) - .25) < 1e-6


def test_frechet_distance_against_the_closed_forms():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5000, 6, generator=g)
    scale = torch.tensor([1., 2, 3, .5, 1, 1])
    b = a*scale + 2                                           # diagonal case: mean gaps and deviation gaps
    want = ((b.mean(0) - a.mean(0))**2).sum() + (a.var(0).sum() + b.var(0).sum())
    c = torch.cov(a.double().T); d = torch.cov(b.double().T)
    want -= 2*torch.linalg.eigvals(c @ d).real.clamp(0).sqrt().sum()
    assert abs(M.frechet_distance(a, b) - want) < 1e-3
    assert M.frechet_distance(a, a) < 1e-6 and abs(M.frechet_distance(a, b) - M.frechet_distance(b, a)) < 1e-6
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert abs(M.frechet_distance(a @ turn, b @ turn) - M.frechet_distance(a, b)) < 1e-3
    assert M.frechet_distance(torch.zeros(5, 3), torch.zeros(4, 3)) == 0
    with pytest.raises(ValueError, match='one width'): M.frechet_distance(a, a[:1])


def test_joint_features_see_what_pictures_do_not(reader, real):
    f = M.joint_features(real.pairs, real.vocab, reader)
    assert f.shape == (300, 5*32 + 5*14)
    assert (f[:, :160] - M.reader_features(real.pairs.image, reader)).abs().max() < 1e-3
    shuffled = M.joint_features(Pairs(real.pairs.image, real.pairs.tokens.roll(1, 0), real.vocab), real.vocab, reader)
    assert M.frechet_distance(f[:, :160], shuffled[:, :160]) < 1e-6
    assert M.frechet_distance(f, shuffled) > 1
    assert M.frechet_floor(f) > 0


def test_duplicates_are_found():
    training, unseen = captioned_digits(500, 'train').pairs, captioned_digits(50, 'test').pairs
    copies = M.duplicates(training[:20], training)
    assert (copies['captions'], copies['pictures'], copies['pairs']) == (1, 1, 1)
    assert M.duplicates(unseen, training)['pictures'] < .1
    distance, which = M.nearest_picture(training.image[100:110], training.image)
    assert which.tolist() == list(range(100, 110)) and distance.max() < .01


def test_score_table():
    lines = M.score_table({'real': dict(a=1., b=.5), 'model': dict(a=.25)}).splitlines()
    assert [l.split() for l in lines] == [['a', 'b'], ['real', '1.000', '0.500'], ['model', '0.250', '-']]

"""The matcher and R-precision: no rival says the same, ties are lost, a perfect judge gets 1, a blind one 0; and what the shipped weights reach."""
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from jointgen.contrasts import caption_keys, derange, digit_groups
from jointgen.digits import captioned_digits, digit_vocab
from jointgen.joint import shipped, weights_folder
from jointgen.matching import (Matcher, PictureTower, directions, edited_precision, judge_matcher, load_matcher, make_matcher, matching_loss, over_folds, r_precision,
    rivals, train_matcher, training_pairs)
from jointgen.metrics import load_reader, reader_accuracy
from jointgen.pairs import Pairs, Vocab


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def pairs(): return captioned_digits(300, 'test', seed=8).pairs


@pytest.fixture(scope='module')
def matcher(): return load_matcher()


def oracle(pairs, look=None):
    """A judge that knows: each content has its own direction, and a picture has that of the caption it came with."""
    code = lambda keys: torch.stack([F.normalize(torch.randn(64, generator=seeded(int(k) % 2**62)), dim=0) for k in keys])
    known = code(caption_keys(pairs.tokens, pairs.vocab))
    return SimpleNamespace(vocab=pairs.vocab, look=look or (lambda image: known[:len(image)]), read=lambda tokens: code(caption_keys(tokens, pairs.vocab)))


# --- rivals and folds


@pytest.mark.parametrize('n', [1, 20, 99])
def test_rivals_are_wrong_and_distinct(pairs, n):
    keys = caption_keys(pairs.tokens, pairs.vocab)
    at = rivals(keys, n, generator=seeded())
    assert at.shape == (300, n) and (keys[at] != keys[:, None]).all()
    assert all(len(set(row)) == n for row in at.tolist())
    assert torch.equal(at, rivals(keys, n, generator=seeded())) and not torch.equal(at, rivals(keys, n, generator=seeded(1)))


def test_rivals_are_drawn_evenly():
    keys = torch.tensor([0, 0, 1, 2, 3])
    seen = torch.zeros(5)
    for s in range(2000): seen[rivals(keys, 2, generator=seeded(s))[0]] += 1
    assert seen[:2].sum() == 0 and ((seen[2:]/2000 - 2/3).abs() < .05).all()


def test_rivals_run_out():
    keys = torch.tensor([0, 0, 0, 1])
    assert rivals(keys, 1).shape == (4, 1)
    for n in (0, 2):
        with pytest.raises(ValueError, match='1 to 1 other captions'): rivals(keys, n)
    with pytest.raises(ValueError, match='1 to 0 other'): rivals(keys[:0], 1)


def test_folds():
    won = torch.arange(20) < 10
    assert over_folds(won, 2) == dict(mean=.5, deviation=pytest.approx(.5**.5), pairs=20, folds=2)
    assert over_folds(won, 1)['deviation'] == 0 and over_folds(won[:3], 3)['mean'] == 1
    with pytest.raises(ValueError, match='21 folds'): over_folds(won, 21)


# --- R-precision by judges that are known


def test_a_judge_that_knows_gets_one(pairs):
    for candidates in (2, 100): assert r_precision(pairs, oracle(pairs), candidates=candidates, generator=seeded())['mean'] == 1
    assert edited_precision(pairs, oracle(pairs), generator=seeded()) == dict(mean=1, deviation=0, pairs=300, folds=10, edits=9)


def test_a_judge_that_guesses_gets_one_in_a_hundred():
    pairs = captioned_digits(500, 'test', side=16, seed=9).pairs
    blind = oracle(pairs, look=lambda image: F.normalize(torch.randn(len(image), 64, generator=seeded(5)), dim=1))
    assert r_precision(pairs, blind, generator=seeded())['mean'] < .04
    assert abs(r_precision(pairs, blind, candidates=4, generator=seeded())['mean'] - .25) < .07


def test_a_judge_that_says_nothing_gets_nothing(pairs):
    same = SimpleNamespace(vocab=pairs.vocab, look=lambda image: torch.ones(len(image), 2), read=lambda tokens: torch.ones(len(tokens), 2))
    assert r_precision(pairs, same, generator=seeded())['mean'] == 0 and edited_precision(pairs, same)['mean'] == 0


def test_another_wording_is_no_rival():
    """Two contents, each in many wordings: no caption of the same content may stand against a picture."""
    rows = captioned_digits(4000, 'test', side=16, subsets='Single').pairs
    keys = caption_keys(rows.tokens, rows.vocab)
    two = rows[torch.cat([(keys == k).nonzero()[:6, 0] for k in keys.unique()[:2]])]
    assert r_precision(two, oracle(two), candidates=7, folds=2)['mean'] == 1
    with pytest.raises(ValueError, match='1 to 6 other'): r_precision(two, oracle(two), candidates=8)


def test_bad_input(pairs, matcher):
    with pytest.raises(TypeError): r_precision(pairs)
    with pytest.raises(ValueError, match='99 rivals'): r_precision(pairs[:50], matcher)
    with pytest.raises(ValueError, match='take a matcher of their vocabulary'): r_precision(Pairs(pairs.image, pairs.tokens, Vocab(['a'], 9)), matcher)
    with pytest.raises(ValueError, match='NaN'): r_precision(Pairs(pairs.image*torch.nan, pairs.tokens, pairs.vocab), matcher)
    with pytest.raises(ValueError, match='the matcher looks at'): matcher.look(pairs.image[..., :16])
    with pytest.raises(ValueError, match='no word to change'): edited_precision(captioned_digits(9, 'test', subsets='Single').pairs, matcher, weights=dict(place=1))
    with pytest.raises(ValueError, match='no matcher for side 48'): load_matcher(48)
    with pytest.raises(ValueError, match='16 or more'): Matcher(digit_vocab(), 8)


# --- the network


def test_directions_have_length_one_and_no_memory(pairs, matcher):
    seen, said = directions(pairs, matcher, batch_size=70)
    assert torch.allclose(seen.norm(dim=1), torch.ones(300)) and torch.allclose(said.norm(dim=1), torch.ones(300))
    assert torch.allclose(seen[7:8], matcher.look(pairs.image[7:8]), atol=1e-5)
    short = pairs.tokens[:, :int((pairs.tokens > 0).sum(1).max())]
    assert torch.allclose(said, matcher.read(short), atol=1e-5)  # padding is not read


@pytest.mark.parametrize('side', [16, 32, 64, 100])
def test_any_side(side):
    assert PictureTower(8)(torch.zeros(2, 3, side, side)).shape == (2, 8)


def test_training_pairs_are_true_and_fresh():
    a, b, c = training_pairs(40, generator=seeded()), training_pairs(40, generator=seeded()), training_pairs(40, generator=seeded(1))
    assert torch.equal(a.image, b.image) and torch.equal(a.tokens, c.tokens) and not torch.equal(a.image, c.image)
    data = captioned_digits(40, 'train')
    data.pairs = a
    assert reader_accuracy(load_reader(32), data)['slots'] > .85


def test_the_loss_hears_both_kinds_of_mistake(pairs, matcher):
    groups = digit_groups(pairs.vocab)
    part = pairs[:40]
    wrong = Pairs(part.image, part.tokens[derange(caption_keys(part.tokens, part.vocab), generator=seeded())], part.vocab)
    right, false = (matching_loss(matcher, p, groups, generator=seeded()).item() for p in (part, wrong))
    assert right < 1 and false > 4


def test_training_is_repeatable_and_leaves_chance_alone():
    before = torch.get_rng_state()
    runs = [train_matcher(steps=2, batch_size=8, seed=3).state_dict() for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state()) and all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_training_learns_one_batch():
    batch, losses = training_pairs(12, generator=seeded()), []
    train_matcher(data=lambda start, n: batch, steps=40, batch_size=12, watch=lambda step, loss: losses.append(loss))
    assert len(losses) == 40 and losses[-1] < .5*losses[0]


# --- what is shipped


def test_shipped_weights_are_small_and_no_model():
    file = weights_folder()/'matcher_32.safetensors'
    assert file.stat().st_size <= 500_000 and 'matcher-32' not in shipped()
    about = json.loads(file.with_suffix('.json').read_text())
    assert about['kind'] == 'matcher' and about['facts']['results']['test']['ceiling'] > .97


def test_shipped_matcher_judges_real_pairs(matcher):
    score = judge_matcher(matcher, captioned_digits(400, 'test', seed=11).pairs)
    assert score['ceiling'] > .95 and score['floor'] < .04 and score['digit'] > .8 and score['color'] > .95


def test_make_and_load(tmp_path):
    facts = make_matcher(32, tmp_path, steps=2, pairs=150)
    assert set(facts['results']['test']) == {'ceiling', 'floor', 'digit', 'color', 'any'}
    again = load_matcher(32, folder=tmp_path)
    trained = train_matcher(steps=2).half().float()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained.state_dict().values()))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training

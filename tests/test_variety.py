import random

import numpy as np
import pytest
import torch

from jointgen import variety as V
from jointgen.caption_metrics import DocumentFrequencies, bleu, cider, corpus_bleu, rouge_l
from jointgen.digits import Clause, captioned_digits, write_caption


def say(slots, rng):
    """One of the many true captions."""
    places = list(slots)
    rng.shuffle(places)
    return write_caption(slots, [Clause(p, rng.randrange(3), rng.randrange(2)) for p in places])


@pytest.fixture(scope='module')
def world():
    rng, slots = random.Random(0), captioned_digits(40, 'test', seed=5).slots
    other = [*slots[1:], slots[0]]
    candidates = [[say(s if rng.random() < .5 else o, rng) for _ in range(6)] for s, o in zip(slots, other)]
    return candidates, [[say(s, rng) for _ in range(3)] for s in slots], slots


# --- the best of many


def test_oracle_is_monotone_and_starts_with_the_first(world):
    candidates, references, _ = world
    curves, df = V.oracle(candidates, references), DocumentFrequencies.of(references)
    for name in V.METRICS:
        assert curves[name].shape == (6,) and (np.diff(curves[name]) >= 0).all() and curves[name][-1] > curves[name][0]
    first = np.mean([[*bleu(c[:1], r)[0], rouge_l(c[:1], r)[0], cider(c[:1], r, df)[0]] for c, r in zip(candidates, references)], 0)
    assert np.allclose([curves[name][0] for name in V.METRICS], first)
    assert all(curves[name].startswith('not available') for name in ('METEOR', 'SPICE'))


def test_oracle_takes_the_best_for_each_metric(world):
    candidates, references, _ = world
    df = DocumentFrequencies.of(references)
    rows = np.array([V.score_candidates(c, r, df) for c, r in zip(candidates, references)])
    assert rows.shape == (40, 6, 6)
    curves = V.oracle(candidates, references, df=df)
    assert np.allclose([curves[n][-1] for n in V.METRICS], rows.max(1).mean(0))
    assert np.allclose(rows[3, 2, :4], bleu([candidates[3][2]], references[3])[0])      # equal captions share a row


def test_oracle_with_a_reference_among_the_candidates_is_perfect():
    references = [['a b c d e', 'f g h i'], ['p q r s', 'p q t u v']]
    curves = V.oracle([['x', 'a b c d e'], ['p q r s', 'y']], references)
    assert abs(curves['BLEU-4'][-1] - 1) < 1e-6 and curves['ROUGE-L'][-1] == 1


def test_consensus_puts_a_copy_first():
    training, captions = torch.eye(5), [[f'a{i} b{i} c{i} d{i} e', f'a{i} b{i} c{i} d{i}'] for i in range(5)]
    candidates = [[f'a{(i + 1) % 5} b{i} x y', 'z z', f'a{i} b{i} c{i} d{i} e', f'a{i} b{i} q'] for i in range(5)]
    orders = V.consensus_order(candidates, training, training, captions, k=1, m=2)
    assert all(order[0] == 2 and sorted(order) == [0, 1, 2, 3] for order in orders)


def test_consensus_asks_the_nearest_and_counts_the_largest():
    training, captions = torch.tensor([[0.], [1.], [2.], [9.]]), [['a b c d'], ['a b c e'], ['p q r s'], ['v w x y']]
    order = lambda at, **kw: V.consensus_order([['v w x y', 'a b c d', 'p q r s']], torch.tensor([[at]]), training, captions, **kw)[0]
    assert order(9., k=1, m=1)[0] == 0 and order(0., k=1, m=1)[0] == 1 and order(2.2, k=1, m=9)[0] == 2
    assert order(.4, k=3, m=1)[:2] == [1, 2] and order(.4, k=3, m=3)[0] == 1
    assert order(0., k=1, m=1)[1:] == [0, 2]                                             # equals stay in their order


# --- variety


def test_div_of_equal_captions():
    for m in (2, 3, 10): assert abs(V.div_n(['a b c d e f']*m) - 1/m) < 1e-12
    assert V.div_n(['a b c d']*2, 2) == 3/8 and V.div_n(['a b', 'c d']) == 1


def test_mutual_bleu_of_equal_and_of_foreign_captions():
    same, foreign = [['a b c d e f']*4]*2, [['a b c d e', 'f g h i j', 'k l m n o']]*2
    for name in 'mBLEU-4', 'mBLEU-4 pooled': assert abs(V.variety(same)[name] - 1) < 1e-6 and V.variety(foreign)[name] < 1e-3


def test_mutual_bleu_is_bleu_against_the_others(world):
    candidates = world[0]
    others = lambda row, i: row[:i] + row[i + 1:]
    scores = V.variety(candidates)
    want = np.mean([[bleu([c], others(row, i))[0, 3] for i, c in enumerate(row)] for row in candidates])
    pooled = np.mean([corpus_bleu([row[i] for row in candidates], [others(row, i) for row in candidates])[3] for i in range(6)])
    assert abs(scores['mBLEU-4'] - want) < 1e-9 and abs(scores['mBLEU-4 pooled'] - pooled) < 1e-9


def test_self_cider_between_its_limits():
    df = DocumentFrequencies.of([['a b c d'], ['e f g h'], ['p q r s'], ['t']])
    assert abs(V.self_cider(['a b c d']*3, df)) < 1e-6
    assert abs(V.self_cider(['a b c d', 'e f g h', 'p q r s'], df) - 1) < 1e-9
    some = ['a b c d', 'a b c x', 'p q r s']
    assert 0 < V.self_cider(some, df) < 1 and abs(V.self_cider(some, df) - V.self_cider(some[::-1], df)) < 1e-9
    assert V.self_cider(['t', 't'], DocumentFrequencies({('t',): 3}, 3)) == 0             # no word tells anything


def test_unique_and_novel():
    scores = V.variety([['a b', 'a b'], ['A b.', 'c d']], training=['a b', 'q'])
    assert (scores['unique'], scores['novel'], scores['captions']) == (2/4, 1/4, 2)
    assert 'novel' not in V.variety([['a', 'b']])


# --- captioned digits


def test_slots():
    truth = [{'upper left': ('red', '7'), 'lower right': ('blue', '0')}]
    right = 'the red 7 is on the upper left, and the blue 0 is on the lower right.'
    turned = 'the lower right 0 is blue, and the top left 7 is red.'
    half, none = 'the red 7 is on the upper left.', 'the red the.'
    scores = V.slot_agreement([[right, turned, half, none]], truth)
    assert (scores['exact'], scores['best'], scores['distinct'], scores['distinct_exact'], scores['parsed']) == (.5, 1, 4, 2, .75)
    assert (scores['precision'], scores['recall'], scores['candidates']) == (1, 5/8, 4)
    swapped = V.slot_agreement([['the blue 7 is on the upper left, and the red 0 is on the lower right.']], truth)
    assert swapped['exact'] == swapped['precision'] == swapped['recall'] == 0
    assert V.slot_agreement([['nothing at all', 'and and.']], truth)['precision'] == 0


def test_slots_of_true_captions(world):
    candidates, references, slots = world
    scores = V.slot_agreement(references, slots)
    assert scores['exact'] == scores['best'] == scores['precision'] == scores['recall'] == 1
    assert scores['distinct'] == scores['distinct_exact'] > 1
    assert .3 < V.slot_agreement(candidates, slots)['exact'] < .7


# --- pictures


def linear(seed=0, d=4, b=5):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, 12, generator=g)
    return (lambda z: (z @ a).unflatten(1, (3, 2, 2))), (torch.randn(b, d, generator=g) @ a).unflatten(1, (3, 2, 2))


def test_ivom_finds_what_can_be_drawn_and_only_that():
    decode, image = linear()
    found = V.ivom(decode, image, 4, steps=300, generator=torch.Generator().manual_seed(1))
    assert found.error.max() < 1e-6 < found.first.min()
    assert torch.allclose(decode(found.noise), image, atol=1e-2)
    a = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    away = image + torch.linalg.svd(a).Vh[-1].unflatten(0, (3, 2, 2))                     # one unit outside of the picture plane
    assert (V.ivom(decode, away, 4, steps=300, generator=torch.Generator().manual_seed(1)).error - 1/12).abs().max() < 1e-4


def test_ivom_error_is_that_of_its_noise_and_more_search_is_never_worse():
    decode, image = linear(2)
    wave = lambda z: decode(z).sin()
    run = lambda starts, steps: V.ivom(wave, image, 4, starts=starts, steps=steps, generator=torch.Generator().manual_seed(3))
    one, two, four = run(1, 20), run(2, 20), run(4, 20)
    assert torch.equal(one.first, four.first) and (four.error <= two.error).all() and (two.error <= one.error).all() and (one.error <= one.first).all()
    assert (run(1, 40).error <= one.error).all()
    assert torch.allclose((wave(four.noise) - image).square().flatten(1).mean(1), four.error, atol=1e-6)


def test_ivom_treats_pictures_apart_and_leaves_weights_alone():
    decode, image = linear(4)
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad(): found = V.ivom(lambda z: decode(z)*weight, image[:1], 4, generator=torch.Generator().manual_seed(0))
    assert weight.grad is None and not found.error.requires_grad
    g = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, generator=g)
    assert torch.allclose(found.first, (decode(start) - image[:1]).square().mean().detach())


def test_pairwise_distance():
    image = torch.zeros(2, 3, 1, 1, 2)
    image[1, 1, 0, 0, 0], image[1, 2, 0, 0, 1] = 3, 4
    assert torch.allclose(V.pairwise_feature_distance(image, lambda x: x), torch.tensor([0., 4.]))  # (3 + 4 + 5)/3
    assert torch.allclose(V.pairwise_feature_distance(image, lambda x: x.flatten(1)*2), torch.tensor([0., 8.]))


# --- bad input


@pytest.mark.parametrize('call, match', [
    (lambda: V.oracle([['a']], [['a'], ['b']]), '1 images, 2 were expected'),
    (lambda: V.oracle([[]], [['a']]), '0 captions each'),
    (lambda: V.oracle([], []), 'no image'),
    (lambda: V.oracle([['a'], ['a', 'b']], [['a'], ['b']]), '1 to 2 captions'),
    (lambda: V.oracle(['a b'], [['a b']]), r'write \[caption\]'),
    (lambda: V.oracle([['a']], [[]]), 'no caption in references'),
    (lambda: V.oracle([['a', '']], [['a']]), 'holds no word'),
    (lambda: V.variety([['a']]), '2 or more'),
    (lambda: V.self_cider(['a'], DocumentFrequencies({}, 1)), '2 or more'),
    (lambda: V.slot_agreement([['a']], []), '0 were expected'),
    (lambda: V.consensus_order([['a']], torch.zeros(1, 2), torch.zeros(2, 2), [['a']]), 'one list an image'),
    (lambda: V.consensus_order([['a']], torch.zeros(1, 2), torch.zeros(1, 2), [['a']]), 'k is 60'),
    (lambda: V.ivom(lambda z: z, torch.zeros(2, 3), 3, starts=0), '0 starts'),
    (lambda: V.ivom(lambda z: z, torch.zeros(2, 4), 3), r'\[2, 4\] fits'),
    (lambda: V.ivom(lambda z: z/0, torch.zeros(2, 3), 3), 'NaN or infinity at step 0'),
    (lambda: V.ivom(lambda z: z.detach(), torch.zeros(2, 3), 3), 'without a gradient'),
    (lambda: V.pairwise_feature_distance(torch.zeros(2, 1, 3, 4, 4), torch.flatten), '2 or more')])
def test_bad_input_is_one_line(call, match):
    with pytest.raises(ValueError, match=match) as error: call()
    assert '\n' not in str(error.value)

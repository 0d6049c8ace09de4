"""Rows and their judges: which row is painted from which topics; the bound's two views agree; terms of the game by hand; draws from the prior."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jointgen.adversaries import GAMES
from jointgen.ladder import LadderEncoder
from jointgen.topics import PGBN
from jointgen.vhe_parts import GAME, Row, RowJudges, bound_terms, draw_topics, each, mixed, plan_rows, topic_loss
from jointgen.weibull import weibull_kl

ROWS = dict(rows=((8, 16), (16, 32)), scales=(8, 16, 32))
LAYOUT = [Row('2', (1,), (8,)), Row('1', (0,), (8, 16))]


def generator(seed=0): return torch.Generator().manual_seed(seed)


# --- rows


def test_rows_of_both_wirings():
    assert plan_rows('raster', (9, 6, 3), side=32, **ROWS) == [Row('2', (1,), (8, 16)), Row('1', (0,), (16, 32))]
    assert plan_rows('stack', (9, 6, 3), side=32, **ROWS) == [Row('all', (0, 1, 2), (8, 16, 32))]
    paper = plan_rows('raster', (256, 128, 64), side=256, rows=((16, 32, 64), (32, 64, 128), (64, 128, 256)), scales=())
    assert [(r.name, r.layers) for r in paper] == [('3', (2,)), ('2', (1,)), ('1', (0,))]


@pytest.mark.parametrize('changes, words', [(dict(wiring='grid'), "'raster' or 'stack' fit"), (dict(side=64), '64 fits'), (dict(widths=(9,)), '1 to 1 rows fit'),
                                            (dict(rows=()), '0 rows meet 3 layers')])
def test_rows_that_are_refused(changes, words):
    c = dict(wiring='raster', widths=(9, 6, 3), side=32, **ROWS) | changes
    with pytest.raises(ValueError, match=words): plan_rows(c.pop('wiring'), c.pop('widths'), **c)


def test_each():
    assert each(.5, 2) == [.5, .5] and each((1, 2), 2) == [1, 2] and each(None, 1) == [None]
    with pytest.raises(ValueError, match='3 values came for 2 places'): each([1, 2, 3], 2)


# --- the bound


@pytest.fixture(scope='module')
def believer():
    torch.manual_seed(0)
    pgbn, encoder = PGBN(12, (8, 4, 2), seed=1), LadderEncoder((8, 4, 2), d=16)
    counts = torch.poisson(torch.ones(5, 12), generator=generator()) + 1
    return pgbn, encoder, counts, encoder(torch.randn(5, 16), pgbn)


def test_the_bound_by_hand(believer):
    pgbn, encoder, counts, seen = believer
    loss, log = bound_terms(pgbn, encoder, counts, seen, [.1, .2, .3])
    rates = seen.thetas[0] @ pgbn.topics[0].T
    told = torch.distributions.Poisson(rates).log_prob(counts).sum(1)
    kl = [weibull_kl(k, lam, shape, 1.).sum(1) for _, k, lam, shape in zip(*seen)]
    assert torch.allclose(loss, (.1*kl[0] + .2*kl[1] + .3*kl[2] - told).mean(), rtol=1e-4)
    assert torch.allclose(log['bound'], (told - sum(kl)).mean(), rtol=1e-4) and set(log) == {'perplexity', 'bound', 'kl_1', 'kl_2', 'kl_3'}
    p = rates/rates.sum(1, keepdim=True)
    assert log['perplexity'].item() == pytest.approx(torch.exp(-(counts*p.log()).sum()/counts.sum()).item(), rel=1e-4)
    assert loss.requires_grad and not any(v.requires_grad for v in log.values())


def test_the_bound_is_float32_inside_autocast(believer):
    with torch.autocast('cpu', torch.bfloat16):
        inside = bound_terms(*believer, [1, 1, 1])[0]
        topics = topic_loss(believer[0], *believer[2:], [1, 1, 1])
    assert inside.dtype == topics.dtype == torch.float32
    assert torch.equal(inside, bound_terms(*believer, [1, 1, 1])[0])


def test_topics_lower_the_same_bound(believer):
    pgbn, encoder, counts, seen = believer
    assert torch.allclose(topic_loss(pgbn, counts, seen, [.1, .2, .3]), bound_terms(pgbn, encoder, counts, seen, [.1, .2, .3])[0], rtol=1e-4)
    learned = PGBN(12, (8, 4, 2), learned=True)
    topic_loss(learned, counts, encoder(torch.randn(5, 16), learned), [1, 1, 1]).backward()
    assert all(p.grad.abs().sum() > 0 for p in learned.parameters()) and all(p.grad is None for p in encoder.parameters())


def test_the_bound_is_at_most_the_likelihood_of_the_text():
    "On two words and one document the evidence can be estimated by brute force."
    torch.manual_seed(0)
    pgbn, encoder, counts = PGBN(3, (3, 2), top=1., seed=3), LadderEncoder((3, 2), d=4), torch.tensor([[2., 1., 0.]])
    prior = pgbn.draw(200_000, generator())
    evidence = pgbn.log_likelihood(counts.expand(200_000, -1), pgbn.rates(prior[0])).logsumexp(0) - np.log(200_000)
    seen = encoder(torch.randn(1, 4).expand(4000, -1), pgbn, generator=generator())
    assert bound_terms(pgbn, encoder, counts.expand(4000, -1), seen, [1, 1])[1]['bound'] < evidence


# --- draws


def test_mixed():
    mean, draw = [torch.tensor([[1., 2.]])], [torch.tensor([[3., 0.]])]
    for t, want in ((0, [1., 2.]), (1, [3., 1e-12]), (.5, [2., 1.]), (2, [5., 1e-12])): assert torch.allclose(mixed(mean, draw, t)[0], torch.tensor([want]))


def test_draws_from_the_prior():
    pgbn = PGBN(12, (8, 4, 2), top=.7)
    ours, theirs = (f(pgbn, 40_000, generator=generator(s)) for s, f in enumerate((lambda *a, **k: draw_topics(*a, length=1.4, **k), PGBN.draw)))
    for a, b in zip(ours, theirs): assert torch.allclose(a.mean(0), b.mean(0), atol=.02) and torch.allclose(a.var(0), b.var(0), rtol=.1)
    long, calm = draw_topics(pgbn, 20_000, length=14., generator=generator()), draw_topics(pgbn, 2000, length=14., temperature=0, generator=generator())
    for t in (*long, *calm): assert t.sum(1).mean().item() == pytest.approx(14., rel=.05) and (t > 0).all()
    assert calm[0].std(0).max() < .3 < long[0].std(0).min()


# --- judges


def judges(**options):
    torch.manual_seed(0)
    return RowJudges(LAYOUT, [3, 5], **dict(width=8) | options)


@pytest.fixture
def scene():
    torch.manual_seed(1)
    picture = lambda s: torch.rand(4, 3, s, s)*2 - 1
    codes = lambda: [torch.rand(4, 3), torch.rand(4, 5)]
    return dict(real={s: picture(s) for s in (8, 16)}, fake=[[picture(8)], [picture(8), picture(16)]], right=codes(), wrong=codes(), swap=torch.tensor([1, 2, 3, 0]))


def test_every_picture_has_its_judge():
    net = judges()
    assert list(net) == ['2_8', '1_8', '1_16'] and [n.side for n in net.values()] == [8, 8, 16] and [n.d_text for n in net.values()] == [3, 5, 5]
    assert [x[:3] for x in net.scan([[0], [0, 0]])] == [(0, '2_8', 8), (1, '1_8', 8), (1, '1_16', 16)]
    wide = RowJudges(plan_rows('stack', (9, 6), side=32, **ROWS), [15], width=8)
    assert [n(torch.zeros(2, 3, s, s)).local.shape[1] for s, n in zip((8, 16, 32), wide.values())] == [1, 1, 5]


def test_options_of_rows():
    net = judges(width=[8, 16], code=['tile', 'map'], patches=[1, 5])
    assert [n.tile for n in net.values()] == [True, False, False] and net['1_16'](torch.zeros(2, 3, 16, 16)).local.shape == (2, 5, 5)
    with pytest.raises(ValueError, match='3 values came for 2 places'): judges(width=[8, 8, 8])
    with pytest.raises(ValueError, match='unknown game'): judges(game='chess')


@pytest.mark.parametrize('balance', [True, False])
def test_terms_by_hand(scene, balance):
    net = judges(game='least_squares', weights=GAME | dict(pair=2., uncond=.25), balance=balance).train()
    terms, logits = net.judge(**scene)
    assert list(terms) == [f'{k}_{n}' for n in ('2_8', '1_8', '1_16') for k in ('pair', 'uncond')]
    right, wrong, made = logits['pair_1_16']
    half = .5 if balance else 1.
    assert torch.allclose(terms['pair_1_16'], 2*((right - 1).square().mean() + half*(wrong.square().mean() + made.square().mean())))
    true, swapped, false = logits['uncond_1_16']
    assert torch.equal(swapped, true[scene['swap']])
    assert torch.allclose(terms['uncond_1_16'], .25*(half*((true - 1).square().mean() + (swapped - 1).square().mean()) + false.square().mean()))
    fooled = net.fool(scene['fake'], scene['right'], logits)  # they have not moved
    assert torch.allclose(fooled['pair_1_16'], 2*(made - 1).square().mean()) and torch.allclose(fooled['uncond_1_16'], .25*(false - 1).square().mean())


def test_a_wrong_picture_meets_the_code_beside_it(scene):
    net = judges().eval()
    wrong = net.judge(**scene)[1]['pair_1_8'][1]
    look = net['1_8'](scene['real'][8])
    for i, j in enumerate(scene['swap'].tolist()): assert torch.allclose(wrong[i], net['1_8'].match(look.features[j:j + 1], scene['wrong'][1][i:i + 1])[0], atol=1e-5)


@pytest.mark.parametrize('game', GAMES)
def test_every_game(scene, game):
    net = judges(game=game)
    terms, logits = net.judge(**scene)
    assert all(t.isfinite() and t.requires_grad for t in (*terms.values(), *net.fool(scene['fake'], scene['right'], logits).values()))


def test_no_weight_no_term(scene):
    terms, logits = judges(weights=GAME | dict(uncond=0.)).judge(**scene)
    assert list(terms) == ['pair_2_8', 'pair_1_8', 'pair_1_16'] and len(judges(weights=GAME | dict(pair=0.)).fool(scene['fake'], scene['right'], logits)) == 3


def test_pictures_of_the_generator_get_no_gradient_from_the_judges_turn(scene):
    fake = [[x.requires_grad_() for x in row] for row in scene['fake']]
    net = judges(weights=GAME | dict(r2=1.))
    terms, logits = net.judge(**scene | dict(fake=fake))
    sum(terms.values()).backward()
    assert all(x.grad is None for row in fake for x in row)
    sum(net.fool(fake, scene['right'], logits).values()).backward()
    assert all(x.grad.abs().sum() > 0 for row in fake for x in row)


def test_penalties_are_lazy(scene):
    net = judges(weights=GAME | dict(r1=1., r2=.5), lazy=(3, 2))
    names = lambda step: [k for k in net.judge(**scene, step=step)[0] if k.startswith('r')]
    assert names(1) == names(2) == [] and names(3) == ['r1_2_8', 'r2_2_8', 'r1_1_8', 'r2_1_8', 'r1_1_16', 'r2_1_16']
    once = judges(weights=GAME | dict(r1=1.), lazy=(1, 2)).eval().judge(**scene)[0]['r1_1_8']
    thrice = judges(weights=GAME | dict(r1=1.), lazy=(3, 2)).eval().judge(**scene)[0]['r1_1_8']
    assert torch.allclose(thrice, 3*once) and once > 0
    assert F.relu(once) == once

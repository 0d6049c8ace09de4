"""Games, conditioning augmentation, penalties: optima, signs, closed forms, precision."""
import math

import pytest
import torch
from torch import nn

from jointgen.adversaries import (GAMES, Condition, ConditioningAugmentation, check_terms, conditioning_kl, game, lazy_factor, least_squares_d, logit_parts,
    matching_penalty, r1_penalty, r2_penalty, relativistic_d, relativistic_g, side_loss, squared_slopes)


def random(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slope(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


every_game = pytest.mark.parametrize('name', GAMES)


# --- games


@every_game
def test_signs(name):
    """Real logits are pushed up and fake ones down by D; fake ones up by G; logits lie inside all pulls."""
    d, g = game(name)
    real, fake = torch.rand(64)*.8 + .1, torch.rand(64)*.8 + .1
    assert (slope(lambda x: d(x, fake), real) < 0).all() and (slope(lambda x: d(real, x), fake) > 0).all()
    assert (slope(lambda x: g(x, real), fake) < 0).all()


@every_game
@pytest.mark.parametrize('shape', [(7,), (7, 1, 5, 5), (1, 1)])
def test_shapes_and_precision(name, shape):
    d, g = game(name)
    real, fake = random(*shape), random(*shape, seed=1)
    for loss in (d(real, fake), g(fake, real)): assert loss.shape == () and loss.dtype == torch.float32
    assert d(real.double(), fake.double()).dtype == torch.float64
    half = d(real.bfloat16(), fake.bfloat16())
    assert half.dtype == torch.float32 and torch.allclose(half, d(real, fake), atol=.05)


@every_game
@pytest.mark.parametrize('real,fake', [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_parts_share_a_weight_of_one(name, real, fake):
    d, g = game(name)
    r, f = random(9), random(9, seed=1)
    assert torch.allclose(d([r]*real, [f]*fake), d(r, f)) and torch.allclose(g([f]*fake, r), g(f, r))


@every_game
def test_parts_each_weigh_one(name):
    d = game(name).discriminator
    r, a, b = random(9), random(9, seed=1), random(9, seed=2)
    both = d(r, [a, b], balance=False)
    zero = (r - 1).square().mean() if name == 'least_squares' else torch.relu(1 - r).mean() if name == 'hinge' else nn.functional.softplus(-r).mean()
    expected = d(r, a) + d(r, b) - (0 if name == 'relativistic' else zero)
    assert torch.allclose(both, expected)


def test_released_hdgan_weights():
    y, w, x = random(9), random(9, seed=1), random(9, seed=2)
    pair = (y - 1).square().mean() + .5*(w.square().mean() + x.square().mean())
    assert torch.allclose(least_squares_d(y, [w, x]), pair)
    local = x.square().mean() + .5*((y - 1).square().mean() + (w - 1).square().mean())
    assert torch.allclose(least_squares_d([y, w], x), local)


@pytest.mark.parametrize('p', [.1, .5, .9])
def test_optimal_discriminator(p):
    """A logit that meets real with chance p: the best is p (least squares), its log odds (logistic), the side that wins (hinge)."""
    x, zero = torch.linspace(-4, 4, 1601, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def best(name):
        d = game(name).discriminator
        return x[torch.stack([p*d(v, zero) + (1 - p)*d(zero, v) for v in x]).argmin()]

    assert best('least_squares') == pytest.approx(p, abs=.01) and best('logistic') == pytest.approx(math.log(p/(1 - p)), abs=.01)
    if p != .5: assert best('hinge') == pytest.approx(math.copysign(1, p - .5), abs=.01)


def test_hinge_saturates():
    d, g = game('hinge')
    beyond = torch.tensor([1.5, 3.])
    assert d(beyond, -beyond) == 0
    assert (slope(lambda x: d(x, -beyond), beyond) == 0).all() and (slope(lambda x: d(beyond, x), -beyond) == 0).all()
    assert torch.equal(slope(g, 100*beyond), torch.full((2,), -.5))


def test_least_squares_overshoot_is_pulled_back():
    d, g = game('least_squares')
    assert slope(lambda x: d(x, x.detach()*0), torch.tensor([3.])) > 0 and slope(g, torch.tensor([3.])) > 0
    assert d(torch.ones(3), torch.zeros(3)) == 0 == g(torch.ones(3))


def test_logistic_generator_does_not_saturate():
    assert slope(game('logistic').generator, torch.tensor([-30.])) == pytest.approx(-1)


@pytest.mark.parametrize('shift', [-100., -1., .5, 1000.])
def test_relativistic_knows_only_differences(shift):
    r, f = random(50, dtype=torch.float64), random(50, seed=1, dtype=torch.float64)
    assert torch.allclose(relativistic_d(r + shift, f + shift), relativistic_d(r, f)) and torch.allclose(relativistic_g(f + shift, r + shift), relativistic_g(f, r))
    assert relativistic_d(r, f) == relativistic_g(r, f)
    assert relativistic_d(r, r).item() == pytest.approx(math.log(2))
    total = slope(lambda x: relativistic_d(x, f), r) + slope(lambda x: relativistic_d(r, x), f)
    assert total.abs().max() < 1e-12


def test_refused_games():
    with pytest.raises(ValueError, match='hinge'): game('wasserstein')
    with pytest.raises(ValueError, match='real logits'): relativistic_g(random(3))
    with pytest.raises(ValueError, match='partner'): relativistic_d(random(3), random(4))
    with pytest.raises(ValueError, match='no logits'): least_squares_d([], random(3))
    with pytest.raises(ValueError, match='no logits'): least_squares_d(random(3), random(0))
    assert len(logit_parts(random(3))) == 1 and side_loss(torch.neg, random(3)) == -random(3).mean()


# --- conditioning augmentation


@pytest.mark.parametrize('seed', range(4))
def test_kl_against_monte_carlo(seed):
    mean, log_std = random(3, 5, seed=seed).double(), .5*random(3, 5, seed=seed + 9).double()
    q, p = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.manual_seed(seed)
    x = q.sample((100_000,))
    assert conditioning_kl(mean, log_std).item() == pytest.approx((q.log_prob(x) - p.log_prob(x)).mean().item(), abs=.01)
    assert torch.allclose(conditioning_kl(mean, log_std), torch.distributions.kl_divergence(q, p).mean())


def test_kl_is_least_at_the_standard_normal():
    zero = torch.zeros(4, 6)
    assert conditioning_kl(zero, zero) == 0
    assert slope(lambda m: conditioning_kl(m, zero), zero).abs().max() == 0 == slope(lambda s: conditioning_kl(zero, s), zero).abs().max()
    assert all(conditioning_kl(random(4, 6, seed=s), random(4, 6, seed=s + 50)) > 0 for s in range(20))


def test_condition():
    torch.manual_seed(0)
    ca, text = ConditioningAugmentation(8, 5), random(1, 8).expand(40_000, 8)
    out = ca(text, generator=torch.Generator().manual_seed(1))
    assert isinstance(out, Condition) and out.c.shape == (40_000, 5)
    assert torch.allclose(out.c.mean(0), out.mean[0], atol=.05) and torch.allclose(out.c.std(0).log(), out.log_std[0], atol=.02)
    assert torch.equal(out.c, ca(text, generator=torch.Generator().manual_seed(1)).c)
    assert torch.equal(ca(text[:3], torch.zeros(3, 5)).c, ca(text[:3], torch.zeros(3, 5)).mean)
    noise = random(3, 5)
    assert torch.allclose(ca(text[:3], noise).c, out.mean[:3] + out.log_std[:3].exp()*noise)
    ca(text).c.square().sum().backward()
    assert ca.head.weight.grad.abs().amin(1).min() > 0


def test_leaky_condition():
    torch.manual_seed(0)
    ca, plain = ConditioningAugmentation(8, 5, activation='leaky'), ConditioningAugmentation(8, 5)
    plain.load_state_dict(ca.state_dict())
    a, b = ca(random(9, 8)), plain(random(9, 8))
    assert torch.equal(a.mean, nn.functional.leaky_relu(b.mean, .2)) and torch.equal(a.log_std, nn.functional.leaky_relu(b.log_std, .2))


def test_condition_may_start_narrow():
    torch.manual_seed(0); plain = ConditioningAugmentation(8, 5)
    torch.manual_seed(0); narrow = ConditioningAugmentation(8, 5, log_std=-1.5)
    a, b = plain(random(9, 8)), narrow(random(9, 8))
    assert torch.equal(a.mean, b.mean) and torch.allclose(a.log_std - 1.5, b.log_std)


def test_condition_is_float32_under_autocast():
    ca = ConditioningAugmentation(8, 5)
    with torch.autocast('cpu', torch.bfloat16): out = ca(random(3, 8))
    assert {x.dtype for x in out} == {torch.float32}


def test_refused_conditions():
    ca = ConditioningAugmentation(8, 5)
    with pytest.raises(ValueError, match='7 wide, 8 fits'): ca(random(3, 7))
    with pytest.raises(ValueError, match='noise'): ca(random(3, 8), random(2, 5))
    with pytest.raises(ValueError, match='activation'): ConditioningAugmentation(8, 5, activation='relu')


# --- penalties


class Linear(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(random(*s, seed=i)) for i, s in enumerate(sizes)])

    def forward(self, *inputs): return sum((x*w).flatten(1).sum(1) for x, w in zip(inputs, self.w))


def test_penalty_of_a_line():
    judge, image, text = Linear((3, 4, 4), (6,)), random(5, 3, 4, 4), random(5, 6)
    w, v = judge.w
    both = w.square().sum() + v.square().sum()
    assert torch.allclose(squared_slopes(judge, image, text), both.expand(5))
    assert torch.allclose(r1_penalty(judge, image, gamma=3.), 1.5*w.square().sum()) and torch.allclose(r2_penalty(judge, image), .5*w.square().sum())
    assert torch.allclose(matching_penalty(judge, image, text), 2*both**3) and torch.allclose(matching_penalty(judge, image, text, weight=1., power=2.), both)


def test_penalty_of_a_bowl():
    a = torch.tensor(.7, requires_grad=True)
    x = random(6, 4)
    penalty = r1_penalty(lambda x: a*x.square().sum(1), x)
    assert torch.allclose(penalty, .5*(2*a*x).square().sum(1).mean())
    assert torch.allclose(torch.autograd.grad(penalty, a)[0], (4*a*x.square().sum(1)).mean())


def test_penalty_of_a_map_and_of_two_branches():
    x, w = random(6, 4), random(4, 9)
    assert torch.allclose(squared_slopes(lambda x: (x @ w).view(-1, 1, 3, 3), x), w.mean(1).square().sum().expand(6))
    assert torch.allclose(squared_slopes(lambda x: (x @ w, x @ w[:, 0]), x), (w.mean(1) + w[:, 0]).square().sum().expand(6))


def test_penalty_against_finite_differences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, h = random(4, 3, dtype=torch.float64), 1e-6
    steps = torch.stack([(net(x + h*e) - net(x - h*e))[:, 0]/(2*h) for e in torch.eye(3, dtype=torch.float64)], 1)
    assert torch.allclose(squared_slopes(net, x), steps.square().sum(1), atol=1e-7)
    w = net[0].weight
    g = torch.autograd.grad(r1_penalty(net, x), w)[0]
    with torch.no_grad():
        w[2, 1] += h; up = r1_penalty(net, x); w[2, 1] -= 2*h; down = r1_penalty(net, x)
    assert g[2, 1].item() == pytest.approx(((up - down)/(2*h)).item(), abs=1e-7)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(.2), nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 1, 2))


def test_penalty_is_float32_under_autocast():
    net, x = convolutional(), random(4, 3, 8, 8)
    plain = r1_penalty(net, x)
    with torch.autocast('cpu', torch.bfloat16):
        inside = r1_penalty(net, x)
        assert net(x).dtype == torch.bfloat16  # the switch is back
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)
    assert r1_penalty(net, x.bfloat16()).dtype == torch.float32
    inside.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for n, p in net.named_parameters() if p.grad is not None)
    assert net[0].weight.grad.abs().sum() > 0


def test_penalty_touches_only_the_judge():
    encoder, image, text = nn.Linear(5, 6), random(3, 3, 4, 4).requires_grad_(), random(3, 5)
    judge = Linear((3, 4, 4), (6,))
    matching_penalty(judge, image, encoder(text)).backward()
    assert encoder.weight.grad is None and image.grad is None and all(w.grad is not None for w in judge.w)
    with torch.no_grad(): assert r1_penalty(Linear((3, 4, 4)), image) > 0


def test_penalty_at_a_flat_place_has_a_gradient():
    w = torch.zeros(4, requires_grad=True)
    for loss in (r1_penalty(lambda x: x @ w, random(5, 4)), matching_penalty(lambda x, s: x @ w + s @ w, random(5, 4), random(5, 4))):
        assert loss == 0 and torch.autograd.grad(loss, w)[0].abs().max() == 0


def test_refused_penalties():
    with pytest.raises(ValueError, match='input 1 is torch.int64'): squared_slopes(lambda x, t: x.sum(1), random(3, 4), torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match='do not depend on input 1'): squared_slopes(lambda x, s: x.sum(1), random(3, 4), random(3, 4))


@pytest.mark.parametrize('every', [1, 2, 4, 16])
def test_lazy_penalties_weigh_the_same(every):
    assert sum(lazy_factor(step, every) for step in range(64)) == 64 and lazy_factor(0, every) == every
    with pytest.raises(ValueError, match='every is 0'): lazy_factor(3, 0)


def test_dirac_game_needs_a_penalty():
    """One point against one line: circles without R1, arrives with it."""
    def play(gamma):
        theta, line = torch.tensor(1., requires_grad=True), torch.zeros(1, requires_grad=True)
        for _ in range(400):
            judge = lambda x: x*line  # noqa: E731
            loss = game('logistic').discriminator(judge(torch.zeros(1)), judge(theta.detach().view(1))) + r1_penalty(judge, torch.zeros(1), gamma=gamma)
            line.data -= .2*torch.autograd.grad(loss, line)[0]
            theta.data -= .2*torch.autograd.grad(game('logistic').generator(judge(theta.view(1))), theta)[0]
        return theta.abs().item(), line.abs().item()
    assert max(play(0.)) > .1 and max(play(1.)) < 1e-3


# --- numbers that are not finite


def test_check_terms():
    w = torch.zeros(2, requires_grad=True)
    terms = dict(pair=w.sum(), local=torch.tensor(2.))
    assert check_terms(terms, 'discriminator') == 2 and check_terms(terms, 'discriminator', [w]) == 2
    with pytest.raises(ValueError, match="player 'generator': kl = nan, wild = inf"):
        check_terms(dict(pair=w.sum(), kl=w.sum()*torch.nan, wild=torch.tensor(math.inf)), 'generator')
    hidden = dict(pair=w.sum(), length=w.norm().sqrt())
    assert check_terms(hidden, 'd').isfinite()
    with pytest.raises(ValueError, match="player 'd': the gradient of length"): check_terms(hidden, 'd', [w])

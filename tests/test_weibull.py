"""The Weibull against its moments, its draws, and its distance to a gamma."""
import pytest
import torch
from torch.distributions import Gamma, Weibull, kl_divergence

from jointgen.weibull import EDGE, EULER, draw_weibull, nearest_weibull, scale_for_mean, weibull_kl, weibull_mean, weibull_variance

KNOWN = ((2, 1.5, 3, 2, .0377, 1.3293), (.7, .3, .05, 1, 1.5162, .3797), (9, 4, 5, 1, .9751, 3.7879), (.3, .01, .2, 1, .1413, .0926))
SHAPES = torch.tensor([.1, .3, .7, 1, 2, 9, 20])


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def numbers(*x): return [torch.tensor(float(v)) for v in x]


@pytest.mark.parametrize('k, lam, shape, rate, kl, mean', KNOWN)
def test_divergence_and_mean_of_known_cases(k, lam, shape, rate, kl, mean):
    k, lam, shape, rate = numbers(k, lam, shape, rate)
    assert abs(weibull_kl(k, lam, shape, rate) - kl) < 1e-4 and abs(weibull_mean(k, lam) - mean) < 1e-4


@pytest.mark.parametrize('k, lam, shape, rate, kl, mean', KNOWN)
def test_divergence_is_the_mean_of_the_log_ratio_of_draws(k, lam, shape, rate, kl, mean):
    p, q = Weibull(torch.tensor(lam, dtype=torch.float64), torch.tensor(k, dtype=torch.float64)), Gamma(*(torch.tensor(x, dtype=torch.float64) for x in (shape, rate)))
    u = torch.rand(400_000, generator=seeded(), dtype=torch.float64)
    x = lam*(-torch.log1p(-u))**(1/k)
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(ratio.mean() - kl) < 5*ratio.std()/400_000**.5 + 1e-4


def test_torch_knows_the_divergence():
    k, lam = torch.rand(5, 3, generator=seeded()) + .3, torch.rand(5, 3, generator=seeded(1)) + .1
    shape, rate = torch.rand(3, generator=seeded(2)) + .2, torch.tensor(1.5)
    assert torch.equal(kl_divergence(Weibull(lam, k), Gamma(shape, rate)), weibull_kl(k, lam, shape.expand(5, 3), rate.expand(5, 3)))


def test_divergence_is_never_negative_and_zero_only_for_the_exponential():
    k, lam, shape, rate = (torch.rand(4, 2000, generator=seeded(), dtype=torch.float64)*4 + .05)
    assert weibull_kl(k, lam, shape, rate).min() > 0
    one = torch.ones(3); rate = torch.tensor([.5, 1., 7.])
    assert torch.allclose(weibull_kl(one, 1/rate, one, rate), torch.zeros(3), atol=1e-6)


def test_divergence_does_not_change_with_the_unit():
    k, lam, shape, rate = numbers(1.7, .6, .4, 2)
    assert torch.allclose(weibull_kl(k, lam, shape, rate), weibull_kl(k, 10*lam, shape, rate/10), atol=1e-5)


def test_moments_agree_with_torch():
    lam = torch.linspace(.1, 4, 7)
    known = Weibull(lam.double(), SHAPES.double())
    assert torch.allclose(weibull_mean(SHAPES, lam).double(), known.mean, rtol=1e-5)
    assert torch.allclose(weibull_variance(SHAPES, lam).double(), known.variance, rtol=1e-4)


def test_scale_for_mean_gives_the_mean():
    mean = torch.linspace(.01, 30, 7)
    assert torch.allclose(weibull_mean(SHAPES, scale_for_mean(SHAPES, mean)), mean, rtol=1e-5)


@pytest.mark.parametrize('k', [1., 2., 9.])
def test_draws_have_the_moments(k):
    k, lam = torch.full((200_000,), k), torch.full((200_000,), 1.5)
    x = draw_weibull(k, lam, generator=seeded())
    assert abs(x.mean()/weibull_mean(k, lam)[0] - 1) < .01 and abs(x.var()/weibull_variance(k, lam)[0] - 1) < .02


def test_one_generator_one_draw_and_u_decides():
    k, lam = SHAPES, torch.ones(7)
    assert torch.equal(draw_weibull(k, lam, generator=seeded()), draw_weibull(k, lam, generator=seeded()))
    u = torch.rand(7, generator=seeded())
    assert torch.equal(draw_weibull(k, lam, u), draw_weibull(k, lam, generator=seeded()))
    x = draw_weibull(k, lam, u)
    assert torch.allclose(1 - torch.exp(-(x/lam)**k), u, atol=1e-4)


@pytest.mark.parametrize('u', [0., EDGE, .5, 1 - EDGE, 1.])
@pytest.mark.parametrize('mean', [1e-10, 1., 40.])
def test_gradients_are_finite_at_the_clamps(u, mean):
    k = SHAPES.clone().requires_grad_()
    m = torch.full((7,), mean, requires_grad=True)
    lam = scale_for_mean(k, m)
    x = draw_weibull(k, lam, torch.full((7,), u))
    assert x.isfinite().all() and (x >= 0).all()
    for shape in (1e-10, .01, 5.):
        kl = weibull_kl(k, lam, torch.full((7,), shape), 1.)
        grads = torch.autograd.grad(x.sum() + kl.sum(), (k, m), retain_graph=True)
        assert kl.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_gradients_are_those_of_differences():
    k, lam = (torch.rand(2, 5, generator=seeded(), dtype=torch.float64) + .3).requires_grad_().unbind()
    u, shape = torch.rand(5, generator=seeded(1), dtype=torch.float64), torch.rand(5, generator=seeded(2), dtype=torch.float64) + .1
    assert torch.autograd.gradcheck(lambda k, lam: draw_weibull(k, lam, u), (k.detach().requires_grad_(), lam.detach().requires_grad_()))
    assert torch.autograd.gradcheck(lambda k, lam, a: weibull_kl(k, lam, a, 1.), tuple(x.detach().requires_grad_() for x in (k, lam, shape)))


def test_half_precision_is_widened():
    half = torch.full((3,), 1.5, dtype=torch.bfloat16)
    for x in (weibull_mean(half, half), weibull_kl(half, half, half, 1.), draw_weibull(half, half), scale_for_mean(half, half)): assert x.dtype == torch.float32
    assert weibull_mean(half.double(), half).dtype == torch.float64


def test_nearest_has_the_mean_of_the_gamma_and_no_neighbour_is_nearer():
    shape = torch.tensor([.01, .1, .5, 1, 5, 50], dtype=torch.float64)
    for rate in (1., 3.):
        k, lam = nearest_weibull(shape, rate)
        assert torch.allclose(weibull_mean(k, lam), shape/rate, rtol=1e-9)
        best = weibull_kl(k, lam, shape, rate)
        for a in (.95, 1, 1.05):
            for b in (.95, 1, 1.05): assert (weibull_kl(k*a, lam*b, shape, rate) >= best - 1e-12).all()


def test_nearest_of_known_gammas():
    k, lam = nearest_weibull(torch.tensor([1., 5., .1]), 1.)
    assert torch.allclose(k[0], torch.tensor(1.)) and torch.allclose(lam[0], torch.tensor(1.)) and abs(k[2] - .22) < .005
    assert torch.allclose(weibull_kl(k, lam, torch.tensor([1., 5., .1]), 1.), torch.tensor([0, .026, .157]), atol=1e-3)
    assert abs(EULER + torch.digamma(torch.tensor(1., dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize('shape, rate, what', [(0., 1., 'shape'), (-1., 1., 'shape'), (1., 0., 'rate'), (float('nan'), 1., 'shape')])
def test_nearest_refuses_what_is_no_gamma(shape, rate, what):
    with pytest.raises(ValueError, match=f'{what} is .*above 0 fits'): nearest_weibull(torch.tensor([2., shape]), rate)

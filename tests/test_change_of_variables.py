"""The curve of one dimension, and the laws: what obeys passes, and each way of breaking them is named."""
import math

import pytest
import torch
from torch import nn

from jointgen.change_of_variables import check_density, check_transform, rational_quadratic


def curves(n, scale, k=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    raw = [scale*torch.randn(n, m, generator=g, dtype=torch.float64) for m in (k, k, k - 1)]
    x = torch.empty(n, dtype=torch.float64).uniform_(-3.3, 3.3, generator=g)
    return x.to(dtype), [r.to(dtype) for r in raw]


@pytest.mark.parametrize('k', [2, 3, 8])
@pytest.mark.parametrize('tail', [0.5, 3.])
@pytest.mark.parametrize('scale', [0., 1., 3.])
def test_curve(k, tail, scale):
    x, raw = curves(3000, scale, k)
    x.requires_grad_()
    y, logdet = rational_quadratic(x, *raw, tail=tail)
    slope, = torch.autograd.grad(y.sum(), x)
    assert slope.min() > 0 and torch.allclose(slope.log(), logdet, atol=1e-9)
    back, minus = rational_quadratic(y.detach(), *raw, tail=tail, inverse=True)
    assert ((back - x)*slope.clamp(max=1)).abs().max() < 1e-12 and torch.allclose(minus, -logdet, atol=1e-6)
    outside = x.abs() >= tail
    assert torch.equal(y[outside], x[outside]) and not logdet[outside].any() and (y[~outside].abs() <= tail*(1 + 1e-12)).all()
    if scale == 0: assert torch.allclose(y, x, atol=1e-12) and logdet.abs().max() < 1e-12


def test_curve_is_continuous_and_rises():
    raw = [3*torch.randn(1, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for m in (8, 8, 7)]
    x = torch.linspace(-3.2, 3.2, 100_001, dtype=torch.float64)
    y, logdet = rational_quadratic(x, *(r.expand(len(x), -1) for r in raw))
    assert (y.diff() > 0).all() and (y.diff() < 2*logdet.exp().max()*x.diff().max()).all()


@pytest.mark.parametrize('scale', [0.5, 1., 3., 8., 100.])
def test_curve_in_float32(scale):
    "The round trip loses a few roundings of x, or of y divided by the slope, however steep or flat the curve."
    x, raw = curves(20_000, scale, dtype=torch.float32)
    y, logdet = rational_quadratic(x, *raw)
    back, minus = rational_quadratic(y, *raw, inverse=True)
    assert all(t.isfinite().all() for t in (y, logdet, back, minus))
    if scale > 8: return
    wanted = rational_quadratic(y.double(), *(r.double() for r in raw), inverse=True)[0]
    share = 1 + (-logdet.double()).exp()
    assert ((back - x).abs()/share).max() < 4e-6
    if scale <= 3: assert ((back - wanted).abs()/share).max() < 1e-4


def test_curve_gradients():
    x, raw = curves(40, 1., 4)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda *a: rational_quadratic(*a, inverse=inverse), [t.requires_grad_() for t in (0.8*x.detach(), *raw)])


def test_curve_keeps_nan_and_infinity_is_outside():
    _, raw = curves(3, 1.)
    y, logdet = rational_quadratic(torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64), *raw)
    assert y[0].isnan() and y[1] == torch.inf and y[2] == -torch.inf and not logdet[1:].any()


class Stretch(nn.Module):
    "y = x exp(w + context v): obeys the laws; `broken` breaks one."
    def __init__(self, broken=None, d=3, c=2):
        super().__init__()
        self.broken, self.w, self.v = broken, nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(c, d))
        if broken == 'idle': self.idle = nn.Parameter(torch.zeros(1))
        if broken == 'loose': self.secret = torch.zeros(d)

    def forward(self, x, context=None, sign=1):
        l = self.w.expand(len(x), -1)
        if context is not None and self.broken != 'deaf':
            c = context.mean(0, keepdim=True) if self.broken == 'batch' else context
            l = l + (c @ self.v).expand(len(x), -1)
        logdet = sign*l.sum(1)
        if self.broken == 'logdet': logdet = 2*logdet
        if self.broken == 'scalar': logdet = logdet.mean()
        return x*(sign*l).exp(), logdet

    def inverse(self, z, context=None):
        x, logdet = self(z, context, sign=-1)
        return (x + 1e-3 if self.broken == 'inverse' else x), (-logdet if self.broken == 'sign' else logdet)


def test_laws_accept_a_foreign_layer():
    x, c = torch.randn(6, 3), torch.randn(6, 2)
    errors = check_transform(Stretch(), x, c, identity=True)
    assert set(errors) == {'identity', 'inverse', 'jacobian', 'condition', 'saving'} and max(errors.values()) < 1e-12
    plain = Stretch()
    plain.v.requires_grad_(False)
    assert check_transform(plain, x)


@pytest.mark.parametrize('broken, law', [('inverse', 'inverse'), ('sign', 'inverse'), ('logdet', 'jacobian'), ('scalar', 'shape'), ('deaf', 'condition'),
                                        ('batch', 'jacobian'), ('idle', 'idle'), ('loose', 'secret')])
def test_laws_name_what_is_broken(broken, law):
    with pytest.raises(AssertionError, match=law): check_transform(Stretch(broken), torch.randn(6, 3), torch.randn(6, 2))


def test_law_of_identity():
    layer = Stretch()
    with torch.no_grad(): layer.w += 0.1
    with pytest.raises(AssertionError, match='identity'): check_transform(layer, torch.randn(6, 3), torch.randn(6, 2), identity=True)


def test_laws_leave_the_layer_alone():
    layer, x = Stretch(), torch.randn(6, 3)
    check_transform(layer, x, torch.randn(6, 2))
    assert not any(p.any() for p in layer.parameters()) and layer.w.dtype == torch.float32 and all(p.grad is None for p in layer.parameters())


class Gauss(nn.Module):
    def __init__(self, log_weight=0.):
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor(log_weight))
    def log_prob(self, x, context=None): return self.log_weight - x.square().sum(1)/2 - math.log(2*math.pi)


def test_density():
    assert check_density(Gauss()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(AssertionError, match='integrates to 1.0'): check_density(Gauss(0.01))

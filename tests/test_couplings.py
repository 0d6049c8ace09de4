"""Bijections: every one obeys the laws; bounds, limits, groups of a condition, bad input."""
import pytest
import torch
from torch.nn import functional as F

from jointgen.change_of_variables import check_transform, shaken
from jointgen.couplings import AffineCoupling, ConditionalActNorm, Conditioner, InvertibleLinear, Permutation, SplineCoupling, Switch

BOUNDS = 'tanh', 'sigmoid', 'exp', 'additive'
CONDITIONED = {**{f'actnorm-{b}': (lambda d, c, b=b: ConditionalActNorm(d, c, bound=b)) for b in BOUNDS},
               **{f'affine-{b}': (lambda d, c, b=b: AffineCoupling(d, c, bound=b)) for b in BOUNDS},
               'affine-stay': lambda d, c: AffineCoupling(d, c, swap=False), 'spline': lambda d, c: SplineCoupling(d, c, bins=5)}
PLAIN = {'switch': lambda d, c: Switch(), 'permutation': lambda d, c: Permutation(d, 3), 'linear': lambda d, c: InvertibleLinear(d)}


def build(name, d=6, c=5):
    torch.manual_seed(0)
    return {**CONDITIONED, **PLAIN}[name](d, c)


def data(b=8, d=6, c=5):
    g = torch.Generator().manual_seed(1)
    return 2*torch.randn(b, d, generator=g), torch.randn(b, c, generator=g)


@pytest.mark.parametrize('d', [2, 6, 10])
@pytest.mark.parametrize('c', [0, 1, 5])
@pytest.mark.parametrize('name', CONDITIONED)
def test_laws(name, c, d):
    x, context = data(d=d, c=c)
    check_transform(build(name, d, c), x, context if c else None, identity='sigmoid' not in name, spread=0.3)


@pytest.mark.parametrize('d', [1, 3, 7])
@pytest.mark.parametrize('c', [0, 4])
def test_laws_of_odd_widths(c, d):
    x, context = data(d=d, c=c)
    for bound in BOUNDS: check_transform(ConditionalActNorm(d, c, bound=bound), x, context if c else None)
    for layer in (Permutation(d), InvertibleLinear(d)): check_transform(layer, x)


@pytest.mark.parametrize('name', PLAIN)
def test_laws_of_the_plain(name):
    x, context = data()
    layer = build(name)
    check_transform(layer, x, identity=name != 'linear')
    for a, b in zip(layer(x, context), layer(x)): assert torch.equal(a, b)  # a condition does not matter, and does not hurt


@pytest.mark.parametrize('name', {**CONDITIONED, **PLAIN})
def test_float32(name):
    layer = shaken(build(name)).float()
    x, context = data(500)
    context = context if layer.context else None
    z, there = layer(x, context)
    y, back = layer.inverse(z, context)
    assert torch.allclose(x, y, atol=1e-4) and torch.allclose(there, -back, atol=1e-4) and z.dtype == there.dtype == torch.float32


@pytest.mark.parametrize('name', {**CONDITIONED, **PLAIN})
def test_empty_batch(name):
    layer = build(name)
    x, context = data(0)
    for f in (layer, layer.inverse):
        y, logdet = f(x, context if layer.context else None)
        assert y.shape == (0, 6) and logdet.shape == (0,)


@pytest.mark.parametrize('name', CONDITIONED)
def test_groups_share_a_condition(name):
    layer = shaken(build(name))
    x, context = (t.double() for t in data(12))
    for m in (1, 2, 3, 12):
        for f in (layer, layer.inverse):
            for a, b in zip(f(x, context[:m]), f(x, context[:m].repeat_interleave(12//m, 0))): assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize('name', {**CONDITIONED, **PLAIN})
def test_half_precision_is_computed_in_float32(name):
    layer = shaken(build(name)).float()
    x, context = (t.bfloat16() for t in data())
    context = context if layer.context else None
    plain = layer(x.float(), None if context is None else context.float())
    with torch.autocast('cpu', torch.bfloat16): cast = layer(x, context)
    for a, b in zip(plain, cast): assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize('make', [lambda **k: AffineCoupling(6, 5, **k), lambda **k: ConditionalActNorm(6, 5, **k)])
def test_bounds_of_the_log_scale(make):
    x, context = (1e6*t for t in data())
    for clamp in (0.5, 2.):
        layer = shaken(make(clamp=clamp), spread=1.).float()
        moved = 3 if isinstance(layer, AffineCoupling) else 6
        for f in (layer, layer.inverse): assert (f(x, context)[1].abs() <= moved*clamp*(1 + 1e-6)).all()
    layer = shaken(make(bound='sigmoid'), spread=1.).float()
    assert (layer(x, context)[1] <= 0).all() and (layer.inverse(x[:, :6]/1e6, context/1e6)[1] >= 0).all()
    assert not shaken(make(bound='additive'), spread=1.).float()(x, context)[1].any()


def test_conditioner_is_the_joined_product():
    net = Conditioner(3, 5, 4, 16)
    with torch.no_grad(): net.last.weight.normal_()
    z, context = torch.randn(8, 3), torch.randn(8, 5)
    joined = F.silu(torch.cat([z, context], 1) @ torch.cat([net.wz, net.wc], 1).T + net.bias)
    assert torch.allclose(net(z, context), net.last(joined), atol=1e-6)


def test_swap_is_a_switch():
    x, context = data()
    stay, go = AffineCoupling(6, 5, swap=False), AffineCoupling(6, 5)
    stay = shaken(stay).float()
    go.load_state_dict(stay.state_dict())
    y, logdet = stay(x, context)
    assert torch.equal(Switch()(y)[0], go(x, context)[0]) and torch.equal(logdet, go(x, context)[1])
    assert torch.equal(y[:, :3], x[:, :3]) and not torch.equal(y[:, 3:], x[:, 3:])


def test_permutation_is_the_seed_and_is_saved():
    x, _ = data()
    a, b = Permutation(6, 1), Permutation(6, 2)
    assert torch.equal(a(x)[0], Permutation(6, 1)(x)[0]) and not torch.equal(a(x)[0], b(x)[0])
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x)[0], b(x)[0])


def test_linear():
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    layer = InvertibleLinear(4, weight=w)
    z, logdet = layer(x)
    assert torch.allclose(z, x @ w, atol=1e-12) and torch.allclose(logdet, torch.linalg.slogdet(w)[1].expand(5), atol=1e-12)
    start = InvertibleLinear(6, seed=1)(torch.eye(6))[0]
    assert torch.allclose(start @ start.T, torch.eye(6), atol=1e-5)
    for bad in (torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), torch.nan), torch.eye(4)*torch.tensor([1., 1., 1., 0.])):
        with pytest.raises(ValueError, match='full rank'): InvertibleLinear(4, weight=bad)
    for bad in (-torch.inf, -200., torch.inf, torch.nan):
        layer = InvertibleLinear(4)
        with torch.no_grad(): layer.log_scale[2] = bad
        for f in (layer, layer.inverse):
            with pytest.raises(ValueError, match='cannot be inverted'): f(x.float())
    with pytest.raises(ValueError, match='square'): InvertibleLinear(4, weight=torch.eye(3))


def test_spline_is_the_identity_far_out():
    layer, (x, context) = shaken(build('spline'), spread=1.).float(), data()
    far = x.sign()*(3 + x.abs())
    z, logdet = layer(far, context)
    assert torch.equal(z.roll(3, 1), far) and not logdet.any()


@pytest.mark.parametrize('name', {**CONDITIONED, **PLAIN})
def test_nan_names_the_layer(name):
    layer, (x, context) = build(name), data()
    context = context if layer.context else None
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[3, 2] = bad
        for f in (layer, layer.inverse):
            with pytest.raises(ValueError, match=f'{type(layer).__name__} got NaN or inf in its input'): f(broken, context)
        if context is None: continue
        layer = shaken(layer).float()  # at its start it multiplies the condition by 0
        broken = context.clone()
        broken[3, 2] = bad
        with pytest.raises(ValueError, match=f'{type(layer).__name__} got NaN or inf in its condition'): layer(0.1*x, broken)


def test_weights_that_are_not_finite_are_named():
    layer, (x, context) = AffineCoupling(6, 5, bound='exp'), data()
    with torch.no_grad(): layer.net.last.bias[-1] = 1000.
    with pytest.raises(ValueError, match='AffineCoupling made NaN or inf'): layer(x, context)


def test_bad_input():
    x, context = data()
    for make in (AffineCoupling, SplineCoupling):
        for d in (0, 1, 5, -2):
            with pytest.raises(ValueError, match='width'): make(d, 5)
    with pytest.raises(ValueError, match='even width'): Switch()(x[:, :5])
    for make in (AffineCoupling, ConditionalActNorm):
        with pytest.raises(ValueError, match='bound'): make(6, 5, bound='cube')
        with pytest.raises(ValueError, match='condition of width -1'): make(6, -1)
    with pytest.raises(ValueError, match='at least 1'): ConditionalActNorm(0)
    for bad in (dict(bins=1), dict(tail=0.)):
        with pytest.raises(ValueError, match='bins'): SplineCoupling(6, 5, **bad)
    for name in CONDITIONED:
        layer = build(name)
        for f in (layer, layer.inverse):
            with pytest.raises(ValueError, match='got an input of shape'): f(x[:, :4], context)
            with pytest.raises(ValueError, match='no condition'): f(x)
            with pytest.raises(ValueError, match='got a condition of shape'): f(x, context[:, :3])
            for rows in (0, 3, 5):
                with pytest.raises(ValueError, match=f'8 examples and {rows} conditions'): f(x, context[:rows])
            with pytest.raises(ValueError, match='multiple'): f(x[:4], context)
        with pytest.raises(ValueError, match='was built without'): build(name, c=0)(x, context)

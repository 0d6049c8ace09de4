"""Chains: laws, the faulty layer named, and a backward that rebuilds what it did not keep."""
import copy

import pytest
import torch
from torch import nn

from jointgen.change_of_variables import check_transform, shaken
from jointgen.couplings import AffineCoupling, ConditionalActNorm, InvertibleLinear, Permutation, SplineCoupling, Switch
from jointgen.deep_chains import Compose, kept_bytes, reconstruction_error
from jointgen.flows import Flow, conditional_flow


def flow(d=6, c=5, spread=0.05, save_memory=False, **options):
    torch.manual_seed(0)
    f = conditional_flow(d, c, **{'steps': 3, 'hidden': 16, **options})
    return shaken(Flow(Compose(f.transform.transforms, save_memory=save_memory), d, base_std=f.base_std), spread)


def data(b=8, d=6, c=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, d, generator=g, dtype=dtype), torch.randn(b, c, generator=g, dtype=dtype)


class Shift(nn.Module):
    "Somebody else's transform: it knows nothing of groups."
    def __init__(self, d, c):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(c, d))
    def forward(self, x, context=None): return x + context @ self.w, x.new_zeros(len(x))
    def inverse(self, z, context=None): return z - context @ self.w, z.new_zeros(len(z))


class Cutter(nn.Module):
    "A layer that makes NaN."
    def forward(self, x, context=None): return (x - 10).log(), x.new_zeros(len(x))
    def inverse(self, z, context=None): return (z - 10).log(), z.new_zeros(len(z))


def test_laws_of_a_mixed_chain():
    x, context = data()
    layers = [InvertibleLinear(6), ConditionalActNorm(6), AffineCoupling(6, 5, swap=False), Switch(), Shift(6, 5), SplineCoupling(6, 5), Permutation(6)]
    for save_memory in (False, True): check_transform(Compose(layers, save_memory=save_memory), x, context)
    nested = Compose([Compose(layers[:3]), Compose(layers[3:])])
    assert [type(t) for t in nested.transforms] == [type(t) for t in layers]
    for a, b in zip(nested.double()(x, context), Compose(layers)(x, context)): assert torch.equal(a, b)


def losses(f, x, context):
    z, logdet = f(x, context)
    y, back = f.inverse(x.flip(0), context)  # both directions in one graph
    return (z*x.cos()).sum() + logdet.square().sum() + y.square().sum() + back.sin().sum()


def gradients(f, x, context):
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    wanted = [x, context, *(p for p in f.parameters() if p.requires_grad)]
    return torch.autograd.grad(losses(f, x, context), wanted, allow_unused=True)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('options', [dict(bound='tanh'), dict(bound='exp'), dict(bound='additive'), dict(kind='spline', bins=4)])
@pytest.mark.parametrize('m', [1, 4, 8])
def test_rebuilt_gradients_equal_stored_ones(m, options, dtype, tolerance):
    stored, rebuilt = (flow(save_memory=s, spread=0.03, **options).to(dtype) for s in (False, True))
    x, context = data(dtype=dtype)
    a, b = (gradients(f, x, context[:m]) for f in (stored, rebuilt))
    assert all(v.any() for v in a)
    for u, v in zip(a, b): assert (u - v).abs().max() <= tolerance*max(1, u.abs().max())
    for u, v in zip(stored(x, context[:m]), rebuilt(x, context[:m])): assert torch.equal(u, v)


def test_gradcheck():
    f, (x, context) = flow(2, 2, steps=2, hidden=3, save_memory=True), data(3, 2, 2)
    inputs = [x.requires_grad_(), context.requires_grad_()]
    for g in (f.transform, f.transform.inverse): assert torch.autograd.gradcheck(g, inputs)


def test_what_is_kept_does_not_grow_with_depth():
    x, context = (t.float() for t in data(32))
    sizes = {}
    for save_memory in (False, True):
        for steps in (2, 64):
            f = flow(steps=steps, save_memory=save_memory).float()
            for name, g in dict(forward=f.log_prob, inverse=lambda z, c: f.inverse(z, c)[0]).items():
                sizes[save_memory, steps, name] = kept_bytes(f, lambda: g(x.clone().requires_grad_(), context.clone().requires_grad_()).sum())
    for name in ('forward', 'inverse'):
        assert sizes[True, 64, name] == sizes[True, 2, name] <= 2*x.nbytes + context.nbytes + 1024
        assert sizes[False, 64, name] > 20*sizes[False, 2, name]


def test_depth_64_is_still_exact():
    stored, rebuilt = (flow(steps=64, save_memory=s, spread=0.01) for s in (False, True))
    x, context = data()
    for u, v in zip(gradients(stored, x, context), gradients(rebuilt, x, context)): assert (u - v).abs().max() <= 1e-10*max(1, u.abs().max())


def test_rebuilt_without_gradients():
    f, (x, context) = flow(save_memory=True), data()
    with torch.no_grad(): z, logdet = f(x, context)
    assert not z.requires_grad and not logdet.requires_grad
    with torch.inference_mode(): assert torch.equal(f(x, context)[0], z)


def test_rebuilt_with_frozen_parts():
    x, context = data()
    for freeze in (slice(None), slice(0, None, 2), slice(3)):
        results = []
        for save_memory in (False, True):
            f = flow(save_memory=save_memory)
            for p in list(f.parameters())[freeze]: p.requires_grad_(False)
            results.append(gradients(f, x, context))
        for u, v in zip(*results): assert torch.allclose(u, v, atol=1e-10)
    f = flow(save_memory=True)
    losses(f, x, context).backward()  # neither input nor condition wants a gradient
    assert all(p.grad.isfinite().all() for p in f.parameters())
    assert flow(c=0, save_memory=True).log_prob(x).sum().requires_grad
    z, _ = f(x, context)
    z.sum().backward()  # nobody asked for the log-determinant
    _, logdet = f(x, context)
    logdet.sum().backward()


def test_rebuilt_notices_changed_weights():
    f, (x, context) = flow(save_memory=True), data()
    loss = f.log_prob(x, context).sum()
    with torch.no_grad(): next(f.parameters()).add_(1.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_rebuilt_has_no_second_derivative():
    f, (x, context) = flow(save_memory=True), data()
    g, = torch.autograd.grad(f.log_prob(x.requires_grad_(), context).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError): g.sum().backward()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rebuilt_refuses_half_precision(dtype):
    f, (x, context) = flow(save_memory=True).float(), data()
    with pytest.raises(ValueError, match='rounding would spoil'): f.log_prob(x.to(dtype), context.float())
    stored = flow().float()
    assert stored.log_prob(x.to(dtype), context.to(dtype)).dtype == torch.float32


def test_rebuilt_under_autocast():
    x, context = data(dtype=torch.float32)
    plain, cast = (flow(save_memory=s).float() for s in (False, True))
    wanted = gradients(plain, x, context)
    with torch.autocast('cpu', torch.bfloat16): got = gradients(cast, x, context)
    for u, v in zip(wanted, got): assert (u - v).abs().max() <= 1e-4*max(1, u.abs().max())


def test_reconstruction_error():
    f, (x, context) = flow(), data()
    assert 0 <= reconstruction_error(f, x, context) < 1e-10
    rough = reconstruction_error(copy.deepcopy(f).float(), x.float(), context.float())
    assert 1e-9 < rough < 1e-3


def test_nan_names_the_layer():
    x, context = data()
    for save_memory in (False, True):
        f, bad = flow(save_memory=save_memory), x.clone()
        bad[2, 1] = torch.nan
        with pytest.raises(ValueError, match=r'layer 0 \(ConditionalActNorm\) got NaN or inf in its input'): f.log_prob(bad, context)
        with pytest.raises(ValueError, match=r'layer 8 \(Permutation\) got NaN or inf in its input'): f.inverse(bad, context)
        bad = context.clone()
        bad[2, 1] = torch.nan
        with pytest.raises(ValueError, match=r'layer 0 \(ConditionalActNorm\) got NaN or inf in its condition'): f.log_prob(x, bad)
        with torch.no_grad(): f.transform.transforms[4].net.last.bias[1] = torch.inf
        with pytest.raises(ValueError, match=r'layer 4 \(AffineCoupling\) made NaN or inf'): f.log_prob(x, context)
        with pytest.raises(ValueError, match=r'layer 4 \(AffineCoupling\) made NaN or inf'): f.sample(context)
        with pytest.raises(ValueError, match=r'layer 1 \(Cutter\) made NaN or inf'): Compose([Permutation(6), Cutter()], save_memory=save_memory)(x)


def test_bad_input():
    with pytest.raises(ValueError, match='no transforms'): Compose([])
    with pytest.raises(ValueError, match='forward and inverse'): Compose([nn.Linear(2, 2)])
    for layers in ([Permutation(6), Permutation(4)], [AffineCoupling(6, 5), AffineCoupling(6, 4)]):
        with pytest.raises(ValueError, match='build them alike'): Compose(layers)

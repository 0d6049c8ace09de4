"""Quantizers: values, gradients, running means, revival, usage."""
import pytest
import torch
from torch.nn import functional as F

from jointgen.quantize import FSQ, Quantized, VectorQuantizer, code_usage, codebook_loss, kmeans, rotation, straight_through

VARIANTS = [dict(codebook=c, gradient=g, cosine=s) for c in ('ema', 'gradient') for g in ('straight_through', 'rotation') for s in (False, True)]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def quantizer(k=32, d=8, **kwargs):
    torch.manual_seed(0)
    q = VectorQuantizer(k, d, **kwargs)
    q.kmeans_start_(random(500, d), generator=seeded())
    return q


@pytest.mark.parametrize('options', VARIANTS)
def test_result(options):
    q = quantizer(**options)
    z = random(4, 9, 8, seed=1).requires_grad_()
    before = {k: v.clone() for k, v in q.state_dict().items()}
    out = q(z)
    assert isinstance(out, Quantized) and out.z.shape == z.shape and out.codes.shape == (4, 9) and out.loss.shape == ()
    assert torch.equal(out.z, q.lookup(out.codes))
    for name, value in q.state_dict().items(): assert torch.equal(value, before[name]), name
    (out.z.square().sum() + out.loss).backward()
    assert z.grad.abs().sum() > 0 and z.grad.isfinite().all()
    if options['cosine']: assert torch.allclose(out.z.norm(dim=-1), torch.ones(4, 9), atol=1e-5)
    assert (options['codebook'] == 'gradient') == (len(list(q.parameters())) == 1)


@pytest.mark.parametrize('options', VARIANTS)
def test_nearest_in_float64(options):
    q = quantizer(**options)
    z, e = random(300, 8, seed=1).double(), q.lookup(torch.arange(32)).detach().double()
    if options['cosine']: z = F.normalize(z, dim=-1)
    assert torch.equal(q(random(300, 8, seed=1)).codes, torch.cdist(z, e, compute_mode='donot_use_mm_for_euclid_dist').argmin(1))


def test_losses_are_element_means():
    z = random(50, 8, seed=1)
    ema, grad = quantizer(), quantizer(codebook='gradient')
    gap = (z - ema.lookup(ema(z).codes)).square().mean()
    assert torch.allclose(ema(z).loss, 0.25*gap) and torch.allclose(grad(z).loss, 1.25*gap)


def test_a_batch_of_none():
    out = quantizer()(random(0, 9, 8))
    assert out.z.shape == (0, 9, 8) and out.codes.shape == (0, 9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_autocast(dtype):
    q = quantizer()
    z = random(40, 8, seed=1).to(dtype)
    plain = q(z)
    with torch.autocast('cpu', torch.bfloat16): cast = q(z)
    assert cast.z.dtype == dtype and cast.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(cast.codes, plain.codes) and torch.equal(cast.z, plain.z)


def test_nan_shows():
    for q in (quantizer(), quantizer(codebook='gradient')):
        z = random(40, 8, seed=1)
        z[3, 2] = torch.nan
        out = q(z)
        assert out.codes[3] == 0 and out.z[3].isnan().any() and out.loss.isnan() and out.z[4:].isfinite().all()
        with torch.no_grad(): q.codebook[5, 1] = torch.nan
        out = q(random(400, 8, seed=1))
        assert not out.codes.eq(5).any() and out.loss.isnan()


# gradients

def test_straight_through():
    z, e, g = random(20, 5).requires_grad_(), random(20, 5, seed=1), random(20, 5, seed=2)
    out = straight_through(z, e)
    assert torch.equal(out, e)
    assert torch.equal(torch.autograd.grad(out, z, g)[0], g)


def rotated(z, e):
    "The rotation trick as published, for autograd: a fixed matrix times z."
    with torch.no_grad():
        u, q = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
        r = F.normalize(u + q, dim=-1)
        matrix = torch.eye(z.shape[-1], dtype=z.dtype) - 2*r[:, :, None]*r[:, None] + 2*q[:, :, None]*u[:, None]
        scale = e.norm(dim=-1, keepdim=True)/z.norm(dim=-1, keepdim=True)
    return scale*(matrix @ z[:, :, None])[:, :, 0]


def test_rotation():
    double = dict(dtype=torch.float64)
    z, e, g = random(50, 9, **double).requires_grad_(), random(50, 9, seed=1, **double), random(50, 9, seed=2, **double)
    published = rotated(z, e)
    assert torch.allclose(published, e, atol=1e-13) and torch.equal(rotation(z, e), e)
    assert (torch.autograd.grad(rotation(z, e), z, g)[0] - torch.autograd.grad(published, z, g)[0]).abs().max() < 1e-13


def test_rotation_falls_back_where_it_is_not_defined():
    g = random(3, 4, seed=2)
    z, e = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    with torch.no_grad():
        z[0], e[1], e[2] = 0, 0, -2*z[2]
    assert torch.equal(torch.autograd.grad(rotation(z, e), z, g)[0], g)


def test_rotation_keeps_angles_and_scales():
    z, e = random(1, 6, dtype=torch.float64).requires_grad_(), random(1, 6, seed=1, dtype=torch.float64)
    turn = lambda g: torch.autograd.grad(rotation(z, e), z, g)[0]
    ratio = e.norm()/z.norm()
    assert torch.allclose(turn(e), ratio**2*z, atol=1e-12)  # along e becomes along z
    g = random(1, 6, seed=2, dtype=torch.float64)
    assert torch.allclose(turn(g).norm(), ratio*g.norm())


def test_codebook_gradient():
    codebook, z = random(7, 5, dtype=torch.float64).requires_grad_(), random(6, 10, 5, seed=1, dtype=torch.float64)
    codes = torch.randint(0, 6, (6, 10), generator=seeded())
    ours, = torch.autograd.grad(3*codebook_loss(codebook, z, codes), codebook)
    plain, = torch.autograd.grad(3*F.mse_loss(F.embedding(codes, codebook), z), codebook)
    assert torch.allclose(ours, plain, atol=1e-14) and ours[6].eq(0).all()
    assert torch.autograd.gradcheck(lambda c: codebook_loss(c, z, codes), codebook)


@pytest.mark.parametrize('kind', ['straight_through', 'rotation'])
@pytest.mark.parametrize('cosine', [False, True])
def test_whole_gradient(kind, cosine):
    q = quantizer(codebook='gradient', gradient=kind, cosine=cosine).double()
    z, w = random(30, 8, seed=1, dtype=torch.float64).requires_grad_(), random(30, 8, seed=2, dtype=torch.float64)
    out = q(z)
    ours = torch.autograd.grad((w*out.z).sum() + out.loss, (z, q.codebook))
    x, table = q.unit(z), q.unit(q.codebook)
    e = F.embedding(out.codes, table)
    value = rotated(x, e.detach()) if kind == 'rotation' else x + (e - x).detach()
    loss = F.mse_loss(e, x.detach()) + 0.25*F.mse_loss(x, e.detach())
    for a, b in zip(ours, torch.autograd.grad((w*value).sum() + loss, (z, q.codebook))): assert torch.allclose(a, b, atol=1e-12)


def test_no_second_derivative():
    z = random(4, 3).requires_grad_()
    for f in (rotation, lambda z, e: codebook_loss(z, e, torch.arange(4)).square()):
        g, = torch.autograd.grad(f(z, random(4, 3, seed=1)).square().sum(), z, create_graph=True)
        with pytest.raises(RuntimeError): g.sum().backward()


# state

def test_one_step_of_the_running_mean():
    q = quantizer(revive=0.)
    z, before = random(100, 8, seed=1), q.codebook.clone()
    codes = q(z).codes
    q.update_(z, codes)
    for j in range(32):
        n = (codes == j).sum()
        wanted = (0.95*before[j] + 0.05*z[codes == j].sum(0))/(0.95 + 0.05*n) if n else before[j]
        assert torch.allclose(q.codebook[j], wanted, atol=1e-6)
    assert q.updates == 1


@pytest.mark.parametrize('options', VARIANTS)
def test_revival(options):
    q = quantizer(**options)
    z = random(200, 8, seed=1)
    with torch.no_grad(): q.codebook[:5] = 100.
    q.ema_counts[:5] = 0.01
    keep = q.codebook.detach()[6:].clone()
    q.update_(z, q(z).codes.clamp(min=5))
    rows = q.unit(z)
    for j in range(5): assert (rows - q.codebook[j]).abs().sum(1).min() < 1e-5
    assert len(q.codebook[:5].unique(dim=0)) == 5 and q.ema_counts[:5].eq(1).all()
    if options['codebook'] == 'gradient': assert torch.equal(q.codebook[6:], keep)
    revived = q.codebook.detach()[:5].clone()
    unused = torch.full((200,), 9)
    q.update_(z, unused)
    assert torch.allclose(q.codebook[:5], revived, atol=1e-6)


def test_revival_is_repeatable_and_bounded():
    z = random(3, 8, seed=1)
    results = []
    for seed in (1, 2):
        q = quantizer()
        q.ema_counts.zero_()
        torch.manual_seed(seed)
        q.update_(z, torch.full((3,), 31))
        results.append(q.codebook.clone())
    assert torch.equal(*results) and (q.ema_counts == 1).sum() == 3
    q = quantizer(revive=0.)
    q.ema_counts.zero_()
    before = q.codebook.clone()
    q.update_(z, torch.full((3,), 31))
    assert torch.equal(q.codebook[:31], before[:31])


def test_dead_codes_come_alive():
    z = 3 + random(2000, 8, seed=1)
    used = []
    for revive in (0., 0.05):
        torch.manual_seed(0)
        q = VectorQuantizer(32, 8, revive=revive)
        for _ in range(200): q.update_(z, q(z).codes)
        used.append(code_usage(q(z).codes, 32)[0])
    assert used[1] == 1 and used[0] < 1


@pytest.mark.parametrize('cosine', [False, True])
def test_kmeans_start(cosine):
    centres = random(16, 8, seed=3)*5
    z = centres.repeat(40, 1) + 0.01*random(640, 8, seed=4)
    q = VectorQuantizer(16, 8, cosine=cosine)
    q.kmeans_start_(z.reshape(40, 16, 8), generator=seeded(), iterations=20)
    if not cosine: assert q(z).loss < 0.25*1e-3
    assert code_usage(q(z).codes, 16)[0] == 1 and q.ema_counts.eq(1).all() and torch.equal(q.ema_sums, q.codebook)
    again = VectorQuantizer(16, 8, cosine=cosine)
    again.kmeans_start_(z, generator=seeded(), iterations=20)
    assert torch.equal(again.codebook, q.codebook)


def test_kmeans_with_repeated_rows():
    z = random(4, 3).repeat(20, 1)
    e = kmeans(z, 4, generator=seeded())
    assert torch.cdist(z, e).min(1).values.max() < 1e-3
    assert kmeans(z[:4], 4, generator=seeded()).shape == (4, 3)


def test_state_dict_round_trip():
    q, z = quantizer(), random(100, 8, seed=1)
    q.update_(z, q(z).codes)
    other = VectorQuantizer(32, 8)
    other.load_state_dict(q.state_dict())
    for _ in range(3):
        for m in (q, other): m.update_(z, m(z).codes)
    assert torch.equal(q.codebook, other.codebook) and torch.equal(q(z).z, other(z).z)


def test_training_learns_the_codebook():
    torch.manual_seed(0)
    q, z = VectorQuantizer(32, 4, codebook='gradient'), random(1000, 4)
    q.kmeans_start_(z, iterations=0, generator=seeded())
    opt, losses = torch.optim.Adam(q.parameters(), 0.02), []
    for _ in range(60):
        out = q(z)
        opt.zero_grad(); out.loss.backward(); opt.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.9*losses[0]


def test_errors():
    for bad in (dict(k=0), dict(d=0), dict(codebook='mean'), dict(gradient='copy')):
        with pytest.raises(ValueError): VectorQuantizer(**bad)
    q = VectorQuantizer(32, 8)
    with pytest.raises(ValueError): q(random(5, 7))
    with pytest.raises(ValueError): q.kmeans_start_(random(31, 8))
    for bad in ((), (1, 4)):
        with pytest.raises(ValueError): FSQ(bad)
    with pytest.raises(ValueError): code_usage(torch.empty(0, dtype=torch.long), 4)


def test_usage():
    assert code_usage(torch.arange(8), 8) == pytest.approx((1., 8.))
    assert code_usage(torch.zeros(3, 5, dtype=torch.long), 8) == pytest.approx((1/8, 1.))
    assert code_usage(torch.tensor([0, 0, 1, 1]), 4) == pytest.approx((0.5, 2.))


# finite scalar quantization

@pytest.mark.parametrize('levels', [(8, 8, 4), (7, 5, 5, 5), (2, 3), (16,)])
def test_fsq(levels):
    f = FSQ(levels)
    every = f.lookup(torch.arange(f.k))
    assert len(every.unique(dim=0)) == f.k and every.abs().max() <= 1
    for j, l in enumerate(levels): assert len(every[:, j].unique()) == l
    z = (random(4000, len(levels))*1.5).requires_grad_()
    out = f(z)
    assert torch.equal(f.lookup(out.codes), out.z) and out.loss == 0
    assert 0 <= out.codes.min() and out.codes.max() < f.k
    if f.k < 300: assert code_usage(out.codes, f.k)[0] == 1
    g, = torch.autograd.grad(out.z.sum(), z)
    bounded = f.bound(z)/(f.size//2)
    assert torch.allclose(g, torch.autograd.grad(bounded.sum(), z)[0], atol=1e-6)
    assert (bounded - out.z).abs().max() <= 0.5001/min(l//2 for l in levels)


def test_fsq_shapes_and_autocast():
    f = FSQ()
    with torch.autocast('cpu', torch.bfloat16): out = f(random(2, 5, 3).bfloat16())
    assert out.z.dtype == torch.bfloat16 and out.codes.shape == (2, 5) and f.k == 256
    bad = random(4, 3)
    bad[1, 1] = torch.nan
    assert f(bad).z[1].isnan().any() and f(bad).z[2:].isfinite().all()
    assert f(torch.full((1, 3), torch.inf)).codes.item() == 255

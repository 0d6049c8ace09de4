"""Counts, sums, averages and the quantizer's gradients against float64, at awkward shapes, types and values."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jointgen.kernels import backend
from jointgen.kernels import codebook as module
from jointgen.kernels.codebook import code_statistics, quantize, rotated, sum_by_code, turned_gradient, update_codebook_

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]
KINDS = ['straight_through', 'rotation']
SIZES_N, SIZES_K, SIZES_D = (0, 1, 2, 127, 128, 129, 1823), (1, 2, 63, 64, 65, 781), (1, 3, 16, 24, 64, 96, 100, 257)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw(k, *shape, seed=2): return torch.randint(0, k, shape, generator=torch.Generator().manual_seed(seed))


def case(n=60, k=7, d=9, *, dtype=torch.float64):
    "Rows, codebook, codes (the last code is never used) and a gradient."
    return random(n, d, dtype=dtype).requires_grad_(), random(k, d, seed=1, dtype=dtype).requires_grad_(), draw(max(1, k - 1), n), random(n, d, seed=3, dtype=dtype)


def outcome(f, z, codebook, codes, g, **kwargs):
    "Values and gradients, with the loss weighted by 3."
    z_q, loss, counts = f(z, codebook, codes, **kwargs)
    return z_q, loss, counts, *torch.autograd.grad((z_q*g).sum() + 3*loss, (z, codebook))


def close(got, want, tolerance):
    for name, a, b in zip(('z_q', 'loss', 'counts', 'dz', 'dcodebook'), got, want):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert (a.double() - b.double()).abs().amax().item() <= tolerance*max(1., b.double().abs().amax().item()) if a.numel() else True, name


# statistics

@pytest.mark.parametrize('kind', ['uniform', 'zipf', 'one'])
@pytest.mark.parametrize('device', DEVICES)
def test_statistics(kind, device):
    n, d, k = 5000, 24, 300
    z, seeded = random(n, d), torch.Generator().manual_seed(2)
    codes = {'uniform': draw(k, n), 'one': torch.full((n,), 7), 'zipf': torch.multinomial(1/torch.arange(1., k + 1), n, True, generator=seeded)}[kind]
    counts, sums = (x.cpu() for x in code_statistics(z.to(device), codes.to(device), k))
    exact = torch.zeros(k, d, dtype=torch.float64).index_add_(0, codes, z.double())
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts, torch.bincount(codes, minlength=k).float())
    assert (sums - exact).abs().max() < 1e-6*z.abs().sum(0).max()
    again = code_statistics(z.to(device), codes.to(device), k)
    assert torch.equal(sums, again[1].cpu())
    assert torch.allclose(sum_by_code(z, codes, counts.long()), sums, atol=1e-3)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('d', SIZES_D)
def test_statistics_at_many_sizes(d, backend):
    for n in SIZES_N:
        for k in SIZES_K:
            z, codes = random(n, d), draw(k, n)
            counts, sums = code_statistics(z, codes, k, backend=backend)
            exact, size = (torch.zeros(k, d, dtype=torch.float64).index_add_(0, codes, x.double()) for x in (z, z.abs()))
            assert torch.equal(counts, torch.bincount(codes, minlength=k).float()) and ((sums - exact).abs() <= 1e-6*size).all()


def test_statistics_shapes_types_and_errors():
    z, codes = random(2, 3, 4), torch.tensor([[0, 1, 1], [2, 2, 2]])
    counts, sums = code_statistics(z, codes, 5)
    assert counts.tolist() == [1, 2, 3, 0, 0] and sums.shape == (5, 4)
    assert torch.allclose(sums[1], z[0, 1] + z[0, 2])
    counts, sums = code_statistics(z[:0], codes[:0], 5)
    assert counts.tolist() == [0]*5 and sums.eq(0).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wanted = torch.promote_types(dtype, torch.float32)
        assert all(x.dtype == wanted for x in code_statistics(z.to(dtype), codes, 5))
        sums = code_statistics(z.to(dtype), codes, 5)[1]
        assert torch.allclose(sums[2].double(), z[1].to(dtype).double().sum(0), atol=1e-6)
    for bad in (codes[0], codes + 3, codes - 1, codes.int()):
        with pytest.raises(ValueError): code_statistics(z, bad, 5)
    with pytest.raises(ValueError): code_statistics(z.long(), codes, 5)
    with pytest.raises(ValueError): code_statistics(z.to('meta'), codes, 5)


def test_statistics_of_views():
    wide, codes = random(90, 60), draw(9, 90)
    for view in (wide[:, 5:17], wide.T[:12].T, wide[:1, :12].expand(90, 12), random(12, 90).T):
        assert torch.equal(code_statistics(view, codes, 9)[1], code_statistics(view.clone(memory_format=torch.contiguous_format), codes, 9)[1])


class Largest(TorchDispatchMode):
    "Remember the size of the largest tensor made."
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in (out if isinstance(out, (tuple, list)) else [out]):
            if torch.is_tensor(x): self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_nothing_of_n_times_k_is_made():
    z, codebook, codes, g = case(4096, 2048, 8, dtype=torch.float32)
    with Largest() as largest: outcome(quantize, z, codebook, codes, g)
    assert largest.bytes <= 4096*8*8 < 4096*2048/16


# averages

def averages(k=4, d=3):
    codebook = random(k, d)
    return codebook, torch.ones(k), codebook.clone()


def test_average_is_the_formula():
    codebook, counts, sums = averages()
    before = codebook.clone()
    z, codes = random(9, 3, seed=1), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 3])
    update_codebook_(codebook, counts, sums, *code_statistics(z, codes, 4), decay=0.9)
    for j, n in ((0, 3), (1, 5), (3, 1)):
        mean = (0.9*before[j] + 0.1*z[codes == j].sum(0))/(0.9 + 0.1*n)
        assert torch.allclose(codebook[j], mean, atol=1e-6)
    assert torch.equal(codebook[2], before[2])
    assert torch.allclose(counts, torch.tensor([1.2, 1.4, 0.9, 1.]))


def test_average_limits():
    z, codes = random(9, 3, seed=1), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 3])
    for decay in (0., 1.):
        codebook, counts, sums = averages()
        before = codebook.clone()
        update_codebook_(codebook, counts, sums, *code_statistics(z, codes, 4), decay=decay)
        wanted = before if decay else torch.stack([z[codes == j].mean(0) if j != 2 else before[2] for j in range(4)])
        assert torch.allclose(codebook, wanted, atol=1e-6)
    codebook, counts, sums = averages()
    before = codebook.clone()
    for _ in range(4000): update_codebook_(codebook, counts, sums, torch.zeros(4), torch.zeros(4, 3), decay=0.9)
    assert torch.equal(codebook, before)
    update_codebook_(codebook, counts, sums, *code_statistics(z, codes, 4), decay=0.9)
    assert torch.allclose(codebook[1], z[codes == 1].mean(0), atol=1e-5)


# quantize: values

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('d', SIZES_D)
def test_values_and_gradients_at_many_sizes(d, kind):
    for n in SIZES_N:
        for k in (1, 2, 65):
            z, codebook, codes, g = case(n, k, d)
            close(outcome(quantize, z, codebook, codes, g, gradient=kind), outcome(quantize, z, codebook, codes, g, gradient=kind, backend='reference'), 1e-12)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('table', [torch.float32, torch.bfloat16, torch.float64])
def test_types(dtype, table, kind):
    z, codebook, codes, g = case(200, 9, 24)
    wanted = outcome(quantize, *(x.detach().to(t).double().requires_grad_() for x, t in ((z, dtype), (codebook, table))), codes, g.to(dtype).double(), gradient=kind, backend='reference')
    rows, entries = z.detach().to(dtype).requires_grad_(), codebook.detach().to(table).requires_grad_()
    got = outcome(quantize, rows, entries, codes, g.to(dtype), gradient=kind)
    wide = torch.promote_types(torch.promote_types(dtype, table), torch.float32)
    assert got[0].dtype == got[3].dtype == dtype and got[4].dtype == table and got[1].dtype == wide and got[2].dtype == torch.int64
    assert torch.equal(got[0], entries.detach()[codes].to(dtype))
    rounding = max(torch.finfo(x).eps for x in (dtype, table))
    for a, b in zip(got, wanted): assert (a.double() - b).abs().max() < 8*rounding*max(1., b.abs().max().item())


def test_leading_axes():
    z, codebook, codes, g = case()
    shape = (3, 4, 5)
    for f in (quantize, lambda *x: quantize(*x, backend='reference')):
        flat = outcome(f, z, codebook, codes, g)
        deep = f(z.reshape(*shape, 9), codebook, codes.reshape(shape))
        assert deep[0].shape == (*shape, 9) and torch.equal(deep[0].reshape(60, 9), flat[0]) and deep[1] == flat[1] and torch.equal(deep[2], flat[2])
    one = quantize(z[0], codebook, codes[0])
    assert one[0].shape == (9,) and torch.equal(one[0], codebook[codes[0]])


@pytest.mark.parametrize('kind', KINDS)
def test_views_and_expanded_gradients(kind):
    z, codebook, codes, _ = case(dtype=torch.float32)
    wide = random(60, 40)
    for view in (wide[:, 3:12], random(9, 60).T, wide[:1, :9].expand(60, 9), wide[::1, ::4][:, :9]):
        for table in (codebook.detach(), random(9, 7).T, random(7, 30)[:, 4:13]):
            x, e = view.clone().requires_grad_(), table.clone().requires_grad_()
            plain = torch.autograd.grad(quantize(x, e, codes, gradient=kind)[0].sum() + quantize(x, e, codes)[1], (x, e))
            x, e = view.detach().requires_grad_(), table.detach().requires_grad_()
            ours = torch.autograd.grad(quantize(x, e, codes, gradient=kind)[0].sum() + quantize(x, e, codes)[1], (x, e))
            for a, b in zip(ours, plain): assert torch.equal(a, b)


def test_row_stride_beyond_int32():
    storage = torch.empty(2**31 + 128)
    z = storage.as_strided((3, 8), (2**30, 1))
    z.copy_(random(3, 8))
    codebook, codes = random(5, 8, seed=1), torch.tensor([4, 0, 4])
    for a, b in zip(quantize(z, codebook, codes), quantize(random(3, 8), codebook, codes)): assert torch.equal(a, b)
    assert torch.equal(code_statistics(z, codes, 5)[1], code_statistics(random(3, 8), codes, 5)[1])


def test_rows_that_equal_their_codes():
    codebook = (random(7, 9) + 10).requires_grad_()
    codes = draw(7, 50)
    z = codebook.detach()[codes].requires_grad_()
    z_q, loss, counts = quantize(z, codebook, codes)
    assert loss == 0 and torch.equal(z_q, z) and torch.equal(counts, torch.bincount(codes, minlength=7))
    g = random(50, 9)
    assert torch.equal(torch.autograd.grad((z_q*g).sum() + loss, z)[0], g)


def test_the_loss_does_not_cancel():
    codebook, codes = random(7, 64) + 1000, draw(7, 500)
    z = codebook[codes] + 1e-2*random(500, 64, seed=4)
    exact = (z.double() - codebook.double()[codes]).square().mean()
    assert abs(quantize(z, codebook, codes, beta=1., pull=0.)[1]/exact - 1) < 1e-6


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_nan_and_inf(backend):
    z, codebook, codes, g = (x.detach() for x in case(dtype=torch.float32))
    clean, _, _ = quantize(z, codebook, codes, backend=backend)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        bad = z.clone()
        bad[3, 2] = wrong
        z_q, loss, counts = quantize(bad, codebook, codes, backend=backend)
        assert z_q[3].isnan().any() and not loss.isfinite() and counts.sum() == 60
        assert torch.equal(torch.cat([z_q[:3], z_q[4:]]), torch.cat([clean[:3], clean[4:]]))
    bad = codebook.clone()
    bad[6, 1] = torch.nan
    assert 6 not in codes
    z_q, loss, _ = quantize(z, bad, codes, backend=backend)
    assert loss.isnan() and torch.equal(z_q, clean)
    assert quantize(z, codebook.clone().fill_(3e38), codes, backend=backend)[0].isfinite().all()
    assert quantize(z*0, codebook.sign()*3e38, codes, backend=backend)[1].isinf()  # too large is not NaN


def test_an_empty_batch():
    for kind in KINDS:
        z, codebook, codes, g = case(0)
        z_q, loss, counts, dz, de = outcome(quantize, z, codebook, codes, g, gradient=kind)
        assert z_q.shape == dz.shape == (0, 9) and loss == 0 and counts.eq(0).all() and de.eq(0).all()


def test_errors():
    z, codebook, codes, _ = (x.detach() for x in case())
    for bad in ((z, codebook[:0], codes), (z, codebook[0], codes), (z[:, :4], codebook, codes), (z.long(), codebook, codes), (z, codebook.long(), codes),
                (z, codebook, codes[:5]), (z, codebook, codes.int()), (z, codebook, codes + 2), (z, codebook, codes - 1), (z, codebook.to('meta'), codes)):
        with pytest.raises(ValueError): quantize(*bad)
    with pytest.raises(ValueError, match='copy'): quantize(z, codebook, codes, gradient='copy')
    with pytest.raises(ValueError, match='numpy'): quantize(z, codebook, codes, backend='numpy')


def test_what_the_kernels_cannot_hold(monkeypatch):
    monkeypatch.setattr(module, 'resolve_backend', lambda *tensors, backend: 'triton')
    for z in (random(4, 8).double(), random(4, 1025)):
        assert module.choose_backend('auto', z) == 'torch'
        with pytest.raises(ValueError, match='1024'): module.choose_backend('triton', z)
    assert module.choose_backend('auto', random(4, 1024), random(3, 1024).bfloat16()) == 'triton'


# quantize: gradients

def published(z, codebook, codes, gradient, beta, pull):
    "As the papers write it, with the rotation as a matrix."
    e = F.embedding(codes, codebook)
    value = z + (e - z).detach()
    if gradient == 'rotation':
        u, q = F.normalize(z.detach(), dim=1), F.normalize(e.detach(), dim=1)
        r = F.normalize(u + q, dim=1)
        matrix = torch.eye(z.shape[1], dtype=z.dtype) - 2*r[:, :, None]*r[:, None] + 2*q[:, :, None]*u[:, None]
        value = (e.detach().norm(dim=1)/z.detach().norm(dim=1))[:, None]*(matrix @ z[:, :, None])[:, :, 0]
    return value, pull*F.mse_loss(e, z.detach()) + beta*F.mse_loss(z, e.detach()), torch.bincount(codes, minlength=len(codebook))


@pytest.mark.parametrize('beta,pull', [(0.25, 1.), (0., 1.), (0.7, 0.), (0., 0.)])
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_those_of_the_published_expression(kind, beta, pull):
    z, codebook, codes, g = case()
    want = outcome(published, z, codebook, codes, g, gradient=kind, beta=beta, pull=pull)
    for backend in ('torch', 'reference'):
        close(outcome(quantize, z, codebook, codes, g, gradient=kind, beta=beta, pull=pull, backend=backend), want, 1e-13)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_where_there_is_no_rotation(backend):
    z, codebook, codes, g = case()
    with torch.no_grad():
        z[0], codebook[codes[1]], z[2] = 0, 0, -2*codebook[codes[2]]
    dz = torch.autograd.grad(quantize(z, codebook, codes, gradient='rotation', backend=backend)[0], z, g)[0]
    none = (codes == codes[1]) | (torch.arange(60) == 0) | (torch.arange(60) == 2)
    assert torch.equal(dz[none], g[none]) and not torch.isclose(dz[~none], g[~none]).any(1).all() and dz.isfinite().all()


def test_close_to_antipodal():
    z, g = random(300, 16, dtype=torch.float64), random(300, 16, seed=3, dtype=torch.float64)
    for gap in (1e-1, 1e-2, 1e-3):
        e = -z + gap*random(300, 16, seed=5, dtype=torch.float64)
        exact, ours = turned_gradient(g, z, e), turned_gradient(g.float(), z.float(), e.float())
        assert (ours - exact).abs().max() < 1e-5/gap  # the direction of u + q has this error, whoever computes it


def test_rotation_keeps_angles_and_scales():
    z, e, g = random(1, 6, dtype=torch.float64), random(1, 6, seed=1, dtype=torch.float64), random(1, 6, seed=2, dtype=torch.float64)
    ratio = e.norm()/z.norm()
    assert torch.allclose(rotated(z, e), e, atol=1e-13)
    assert torch.allclose(turned_gradient(e, z, e), ratio**2*z, atol=1e-12)  # along e becomes along z
    assert torch.allclose(turned_gradient(g, z, e).norm(), ratio*g.norm())


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_gradcheck(backend):
    z, codebook, codes, _ = case(12, 4, 3)
    assert torch.autograd.gradcheck(lambda z: quantize(z, codebook.detach(), codes, beta=0.7, pull=0., backend=backend)[1], z)
    assert torch.autograd.gradcheck(lambda e: quantize(z.detach(), e, codes, beta=0., pull=0.7, backend=backend)[1], codebook)


def test_only_what_is_asked_for():
    z, codebook, codes, g = case()
    full = outcome(quantize, z, codebook, codes, g)
    z_q, loss, _ = quantize(z, codebook.detach(), codes)
    assert torch.equal(torch.autograd.grad((z_q*g).sum() + 3*loss, z)[0], full[3])
    assert torch.equal(torch.autograd.grad(3*quantize(z.detach(), codebook, codes)[1], codebook)[0], full[4])
    assert torch.equal(torch.autograd.grad(quantize(z, codebook, codes)[0], z, g)[0], g)
    assert not quantize(z.detach(), codebook.detach(), codes)[1].requires_grad and not quantize(z, codebook, codes)[2].requires_grad


def test_no_second_derivative():
    z, codebook, codes, g = case()
    for kind in KINDS:
        z_q, loss, _ = quantize(z, codebook, codes, gradient=kind)
        dz, = torch.autograd.grad((z_q*z_q).sum() + loss, z, create_graph=True)
        with pytest.raises(RuntimeError): dz.sum().backward()


def test_a_codebook_moved_too_early():
    z, codebook, codes, _ = case()
    moving = codebook.detach().clone()
    loss = quantize(z, moving, codes)[1]
    moving.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_inputs_are_left_alone():
    z, codebook, codes, g = case()
    before = [x.detach().clone() for x in (z, codebook, codes, g)]
    for kind in KINDS:
        got = outcome(quantize, z, codebook, codes, g, gradient=kind)
        for a, b in zip((z, codebook, codes, g), before): assert torch.equal(a, b)
        pointers = {x.untyped_storage().data_ptr() for x in (z, codebook, codes, g)}
        assert not pointers & {x.untyped_storage().data_ptr() for x in got}


def test_autocast():
    z, codebook, codes, g = case(dtype=torch.float32)
    plain = outcome(quantize, z, codebook, codes, g, gradient='rotation')
    with torch.autocast('cpu', torch.bfloat16): cast = outcome(quantize, z, codebook, codes, g, gradient='rotation')
    for a, b in zip(cast, plain): assert a.dtype == b.dtype and torch.equal(a, b)


# operators

def test_opcheck():
    z, codebook, codes, g = case(dtype=torch.float32)
    for kind in KINDS:
        torch.library.opcheck(module.quantize_op, (z, codebook, codes, [0.25, 1.], kind == 'rotation', 'auto'))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(module.quantize_backward_op, (g, torch.tensor(3.), z.detach(), codebook.detach(), codes, [0.25, 1.], [kind == 'rotation', *needs], 'auto'))
    torch.library.opcheck(module.code_statistics_op, (z.detach().bfloat16(), codes, 7, 'auto'))


@pytest.mark.parametrize('kind', KINDS)
def test_compiled(kind):
    torch._dynamo.reset()
    def step(z, codebook, codes, g):
        z_q, loss, counts = quantize(z, codebook, codes, gradient=kind)
        ema = code_statistics(z, codes, 7)
        return (z_q*g).sum() + 3*loss, counts, *ema
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend='aot_eager')
    for n in (60, 33):
        z, codebook, codes, g = case(n, dtype=torch.float32)
        ours, plain = compiled(z, codebook, codes, g), step(z, codebook, codes, g)
        for a, b in zip(ours, plain): assert torch.allclose(a, b, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(x[0], (z, codebook)) for x in (ours, plain))): assert torch.allclose(a, b, atol=1e-6)


def test_the_reference_compiles():
    torch._dynamo.reset()
    z, codebook, codes, g = case(dtype=torch.float32)
    compiled = torch.compile(lambda *x: quantize(*x, gradient='rotation', backend='reference'), fullgraph=True, backend='aot_eager')
    close(outcome(compiled, z, codebook, codes, g), outcome(quantize, z, codebook, codes, g, gradient='rotation'), 1e-5)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): z_q, loss, counts = quantize(torch.empty(4, 5, 9, dtype=torch.bfloat16), torch.empty(7, 9), torch.zeros(4, 5, dtype=torch.long))
    assert z_q.shape == (4, 5, 9) and z_q.dtype == torch.bfloat16 and loss.shape == () and loss.dtype == torch.float32 and counts.shape == (7,)


def test_import_needs_only_torch():
    home = Path(backend.__file__).parents[2]
    code = ('import sys; [sys.modules.__setitem__(m, None) for m in ("triton", "jaxtyping", "einops", "fastcore")]; import torch;'
            'from jointgen.kernels.codebook import quantize, code_statistics; c = torch.tensor([1, 0, 1]);'
            'print(quantize(torch.eye(3), torch.eye(2, 3), c)[2].tolist(), code_statistics(torch.eye(3), c, 2)[0].tolist())\n'
            'try: quantize(torch.eye(3), torch.eye(2, 3), c, backend="triton")\nexcept ValueError as e: print("triton" in str(e))')
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(home)})
    assert run.stdout.split('\n')[:2] == ['[1, 2] [1.0, 2.0]', 'True'], run.stderr

"""Affine couplings and steps in plain torch: against the specification, against autograd, at awkward shapes, types and magnitudes."""
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.library import opcheck

from jointgen.kernels import affine
from jointgen.kernels import coupling as module
from jointgen.kernels.affine import BOUNDS, Affine, affine_reference
from jointgen.kernels.coupling import affine_coupling, affine_step, coupling_backward, pack, unpack

NORMS = 'none', 'rows', 'one'
CASES = list(product(BOUNDS, (True, False), (True, False), NORMS))  # bound, swap, inverse, norm
STEPS = list(product(BOUNDS, (True, False), ('rows', 'one')))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_like(kind, b, d, dtype=torch.float32):
    return {'none': None, 'rows': random(b, d, seed=7, dtype=dtype), 'one': random(d, seed=8, dtype=dtype)}[kind]


def with_gradients(f, *inputs):
    """Outputs of `f`, and gradients of all inputs for fixed gradients of the outputs."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    y, logdet = f(*inputs)
    weights = random(*y.shape, seed=5, dtype=y.dtype), random(*logdet.shape, seed=6, dtype=logdet.dtype)
    total = (y*weights[0]).sum() + (logdet*weights[1]).sum() + sum(0*v.sum() for v in inputs)  # 'additive' does not see r
    return [y.detach(), logdet.detach(), *torch.autograd.grad(total, inputs)]


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance*(1 + b.double().abs().max()) if b.numel() else True


def coupling(case, backend):
    bound, swap, inverse, _ = case
    return lambda x, p, *norm: affine_coupling(x, p, bound=bound, swap=swap, inverse=inverse, norm=norm[0] if norm else None, backend=backend)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_coupling_equals_its_specification(case):
    for b, h in (0, 1), (1, 1), (2, 3), (7, 16), (5, 65):
        given = [v for v in (random(b, 2*h), random(b, 2*h, seed=1), norm_like(case[3], b, 2*h)) if v is not None]
        exact = with_gradients(coupling(case, 'reference'), *(v.double() for v in given))
        close(with_gradients(coupling(case, 'torch'), *(v.double() for v in given)), exact, 1e-12)
        close(with_gradients(coupling(case, 'torch'), *given), exact, 2e-6)


@pytest.mark.parametrize('case', STEPS, ids=str)
def test_step_equals_its_specification(case):
    bound, inverse, kind = case
    def f(backend): return lambda x, shift, raw: affine_step(x, shift, raw, bound=bound, inverse=inverse, backend=backend)
    for b, d in (0, 1), (1, 1), (3, 5), (129, 17):
        given = [random(b, d)] + [random(*((b, d) if kind == 'rows' else (d,)), seed=s) for s in (1, 2)]
        exact = with_gradients(f('reference'), *(v.double() for v in given))
        close(with_gradients(f('torch'), *(v.double() for v in given)), exact, 1e-12)
        close(with_gradients(f('torch'), *given), exact, 5e-6)


def test_blocks_do_not_change_the_result(monkeypatch):
    whole = [with_gradients(coupling(case, 'torch'), random(300, 10), random(300, 10, seed=1), norm_like('one', 300, 10)) for case in CASES[2::12]]
    blocks = affine.blocks
    def small(c, *tensors):
        for i in range(0, len(c), 7): yield from blocks(c[i:i + 7], *(v if v is None or v.ndim == 1 else v[i:i + 7] for v in tensors))
    monkeypatch.setattr(affine, 'blocks', small)
    for case, before in zip(CASES[2::12], whole):
        close(with_gradients(coupling(case, 'torch'), random(300, 10), random(300, 10, seed=1), norm_like('one', 300, 10)), before, 1e-5)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_inverse_and_jacobian(case):
    bound, swap, inverse, kind = case
    x, p, norm = random(4, 6, dtype=torch.float64), random(4, 6, seed=1, dtype=torch.float64), norm_like(kind, 4, 6, torch.float64)
    f = lambda x, inverse, p=p, norm=norm: affine_coupling(x, p, bound=bound, swap=swap, inverse=inverse, norm=norm)  # noqa: E731
    y, logdet = f(x, inverse)
    back, minus = f(y, not inverse)
    assert torch.allclose(back, x, atol=1e-12) and torch.allclose(logdet, -minus, atol=1e-12)
    for i in range(4):
        row = None if norm is None else norm if norm.ndim == 1 else norm[i:i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None], inverse, p[i:i + 1], row)[0][0], x[i])
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], logdet[i], atol=1e-10)


def test_by_hand():
    x, p = torch.tensor([[5., 3.]]), torch.tensor([[10., 0.]])
    y, logdet = affine_coupling(x, p, bound='exp')
    assert y.tolist() == [[13., 5.]] and logdet.tolist() == [0.]
    y, logdet = affine_coupling(x, p, bound='exp', swap=False, norm=torch.tensor([1., torch.tensor(2.).log()]))
    assert y[0, 0] == 5 and torch.allclose(y[0, 1], torch.tensor(18.)) and torch.allclose(logdet, torch.tensor(2.).log())
    y, logdet = affine_step(x, torch.ones(2), torch.tensor([0., 1.]))
    assert torch.allclose(y, torch.tensor([[6., 4*torch.e]])) and logdet.tolist() == [1.]


@pytest.mark.parametrize('bound', BOUNDS)
def test_gradcheck(bound):
    for inverse, kind in product((False, True), NORMS):
        given = [v.requires_grad_() for v in (random(3, 4, dtype=torch.float64), random(3, 4, seed=1, dtype=torch.float64), norm_like(kind, 3, 4, torch.float64)) if v is not None]
        assert torch.autograd.gradcheck(coupling((bound, True, inverse, kind), 'torch'), given)
        if kind != 'none':
            shift, raw = random(*given[2].shape, seed=3, dtype=torch.float64).requires_grad_(), given[2]
            assert torch.autograd.gradcheck(lambda x, s, r: affine_step(x, s, r, bound=bound, inverse=inverse), (given[0], shift, raw))


def test_a_second_derivative_raises():
    x, p = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    g, = torch.autograd.grad(affine_coupling(x, p)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


@pytest.mark.parametrize('bound', ['sigmoid', 'tanh', 'additive'])
@pytest.mark.parametrize('r', [200., -200., 1e4, -1e4])
def test_far_out(bound, r):
    x, p = random(3, 8), random(3, 8, seed=1)
    p[:, 4:] = r
    found = with_gradients(coupling((bound, True, False, 'none'), 'torch'), x, p)
    exact = with_gradients(coupling((bound, True, False, 'none'), 'reference'), x.double(), p.double())
    assert all(v.isfinite().all() for v in found)
    close(found, exact, 1e-6)
    if bound == 'sigmoid' and r < 0: assert torch.allclose(found[1], torch.tensor(4*(r + 2)))


def test_shift_much_larger_than_what_it_shifts():
    """The one price of working from the output: y - t has the rounding error of y."""
    x, p, g = random(500, 8), random(500, 8, seed=1), random(500, 8, seed=2)
    for size in (1., 1e3, 1e6):
        shifted = p.clone()
        shifted[:, :4] = size
        y, _ = affine_coupling(x, shifted)
        found = coupling_backward(y, shifted, g, torch.zeros(500))
        exact = coupling_backward(affine_coupling(x.double(), shifted.double())[0], shifted.double(), g.double(), torch.zeros(500, dtype=torch.float64))
        error, bound = (found.params - exact.params)[:, 4:].abs(), 2**-23*g[:, :4].abs()*(size + 20)
        assert (error <= bound).all()
        assert ((found.input - x).abs().max() <= 2**-23*(size + 20)*8)


def test_strides():
    p = random(9, 16, seed=1)
    base = random(9, 40)
    for x in base[:, 3:19], base.T.contiguous().T[:, :16], base[:1, :16].expand(9, 16), base[::1, ::2][:, :16], torch.as_strided(base, (9, 16), (20, 2)):
        for case in CASES[::7]:
            norm = [] if case[3] == 'none' else [norm_like(case[3], 9, 16)]
            close(with_gradients(coupling(case, 'torch'), x, p, *norm), with_gradients(coupling(case, 'torch'), x.contiguous(), p, *norm), 0)
            y, logdet = coupling(case, 'torch')(p, x, *norm)
            assert torch.equal(y, coupling(case, 'torch')(p, x.contiguous(), *norm)[0]) and y.is_contiguous()


def test_gradients_with_stride_zero():
    for backend in 'torch', 'reference':
        x, p = random(9, 16).requires_grad_(), random(9, 16, seed=1).requires_grad_()
        y, logdet = affine_coupling(x, p, backend=backend)
        found = torch.autograd.grad(y.sum() + logdet.sum(), (x, p))
        if backend == 'torch': ours = found
    close(ours, found, 1e-6)
    x, p = random(9, 16).requires_grad_(), random(9, 16, seed=1).requires_grad_()
    gx, = torch.autograd.grad(affine_coupling(x, p)[1].sum(), x)  # nothing comes back through y
    assert gx.eq(0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    x, p, norm = random(33, 10, dtype=dtype), random(33, 10, seed=1, dtype=dtype), random(10, seed=2)
    found = with_gradients(lambda *v: affine_coupling(*v[:2], norm=v[2]), x, p, norm)
    exact = with_gradients(lambda *v: affine_coupling(*v[:2], norm=v[2], backend='reference'), x.double(), p.double(), norm.double())
    assert [v.dtype for v in found] == [dtype, torch.float32, dtype, dtype, torch.float32]
    assert (found[1] - exact[1]).abs().max() < 1e-5  # never rounded to the type of x
    close(found, exact, 8*torch.finfo(dtype).eps)
    assert affine_coupling(x.float(), p)[0].dtype == torch.float32 and affine_coupling(x, p.float())[0].dtype == dtype
    assert affine_coupling(x.double(), p.float())[1].dtype == torch.float64


def test_autocast_keeps_float32():
    x, p = random(33, 10), random(33, 10, seed=1)
    with torch.autocast('cpu', torch.bfloat16):
        for backend in 'torch', 'reference':
            y, logdet = affine_coupling(x, p.bfloat16(), backend=backend)
            assert y.dtype == logdet.dtype == torch.float32
            assert torch.allclose(logdet, affine_coupling(x, p.bfloat16().float())[1], atol=1e-6)


def test_inputs_stay_and_outputs_are_new():
    for case in CASES:
        given = [v for v in (random(6, 8), random(6, 8, seed=1), norm_like(case[3], 6, 8)) if v is not None]
        before = [v.clone() for v in given]
        y, logdet = coupling(case, 'torch')(*given)
        coupling_backward(y, given[1], torch.ones_like(y), torch.ones(6), Affine(case[0], 2., *case[1:3]), norm=given[2] if len(given) > 2 else None)
        assert all(torch.equal(a, b) for a, b in zip(given, before))
        assert not {y.untyped_storage().data_ptr(), logdet.untyped_storage().data_ptr()} & {v.untyped_storage().data_ptr() for v in given}


def test_every_number_is_written():
    torch.use_deterministic_algorithms(True)  # fills what is not initialized with NaN
    try:
        for case in CASES:
            given = [v for v in (random(6, 8), random(6, 8, seed=1), norm_like(case[3], 6, 8)) if v is not None]
            assert not any(v.isnan().any() for v in with_gradients(coupling(case, 'torch'), *given))
    finally: torch.use_deterministic_algorithms(False)


def test_only_output_and_parameters_are_kept():
    x, p, kept = random(50, 8).requires_grad_(), random(50, 8, seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.data_ptr()) or v, lambda v: v): y, _ = affine_coupling(x, p)
    assert sorted(kept) == sorted([y.data_ptr(), p.data_ptr()])


def test_a_stack_keeps_its_last_output_only():
    depth, b, d = 16, 20, 12
    x, params, raws = random(b, d), [0.5*random(b, d, seed=s) for s in range(depth)], [0.3*random(d, seed=s) for s in range(depth)]
    kept = [v.clone().requires_grad_() for v in (x, *params, *raws)]
    y, total = kept[0], 0
    for p, n in zip(kept[1:depth + 1], kept[depth + 1:]):
        y, logdet = affine_coupling(y, p, norm=n)
        total = total + logdet
    gy, gl = random(b, d, seed=90), random(b, seed=91)
    wanted = torch.autograd.grad((y, total), kept, (gy, gl))
    y, g = y.detach(), gy
    for i in reversed(range(depth)):
        found = coupling_backward(y, params[i], g, gl, norm=raws[i])
        close([found.params, torch.cat([found.shift, found.raw])], [wanted[1 + i], wanted[1 + depth + i]], 2e-5)
        y, g = found.input, found.x
    close([y, g], [x, wanted[0]], 2e-5)
    with pytest.raises(ValueError, match='bfloat16.*float32'): coupling_backward(y.bfloat16(), params[0], gy, gl)
    assert coupling_backward(y.bfloat16(), params[0], gy, gl, rebuild=False).input is None


@pytest.mark.parametrize('kind', ['none', 'rows', 'one', 'step'])
def test_operators(kind):
    b, d = 5, 6
    norm = norm_like('one' if kind == 'step' else kind, b, 2*d if kind == 'step' else d)
    x, p = random(b, d).requires_grad_(), None if kind == 'step' else random(b, d, seed=1).requires_grad_()
    shift, raw = (None, None) if norm is None else (v.requires_grad_() for v in norm.chunk(2, -1))
    how = pack(Affine('tanh', 2., True, False))
    assert unpack(how) == Affine()
    assert set(opcheck(torch.ops.jointgen.affine.default, (x, p, shift, raw, how, 'torch')).values()) == {'SUCCESS'}
    y, logdet = torch.ops.jointgen.affine(x, p, shift, raw, how, 'torch')
    saved = [v if v is None else v.detach() for v in (y, p, shift, raw, torch.ones_like(y), logdet)]
    assert set(opcheck(torch.ops.jointgen.affine_backward.default, (*saved, how, 'torch')).values()) == {'SUCCESS'}
    given = [v for v in (x, p, shift, raw) if v is not None]
    ours = torch.autograd.grad(y.square().sum() + logdet.sum(), given)
    y, logdet = affine_reference(x, p, shift, raw, Affine())
    close(ours, torch.autograd.grad(y.square().sum() + logdet.sum(), given), 1e-6)


def loss(x, p, n):
    y, logdet = affine_coupling(x, p, norm=n)
    z, more = affine_step(y, n, n)
    return z.square().sum() - (logdet*more).sum()


def loss_by_operator(x, p, n):
    y, logdet = torch.ops.jointgen.affine(x, p, *n.chunk(2), [0., 2., 1., 0.], 'torch')
    z, more = torch.ops.jointgen.affine(y, None, n, n, [2., 2., 0., 0.], 'torch')
    return z.square().sum() - (logdet*more).sum()


@pytest.mark.parametrize('f', [loss, loss_by_operator])
def test_compiles_without_a_break(f):
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend='aot_eager')
    for b, d in (9, 8), (13, 14):
        given = [v.requires_grad_() for v in (random(b, d), random(b, d, seed=1), random(d, seed=2))]
        close(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given), 1e-5)


def test_under_a_compiler_the_expression_is_left_to_it(monkeypatch):
    monkeypatch.setattr(module, 'traced', lambda *given: True)
    monkeypatch.setattr(module.AffineFunction, 'apply', None)
    close(affine_coupling(random(3, 4), random(3, 4, seed=1)), affine_coupling(random(3, 4), random(3, 4, seed=1), backend='reference'), 0)


def test_errors():
    x, p = random(4, 6), random(4, 6, seed=1)
    for given, text in (((x[0], p[0]), r'\[b d\]'), ((x[None], p[None]), r'\[b d\]'), ((x[:, :5], p[:, :5]), 'even'), ((x[:, :0], p[:, :0]), 'even'), ((x, p[:, :4]), r'\[4, 4\]'),
                        ((x, p[:3]), r'\[3, 6\]'), ((x.long(), p), 'int64'), ((x, p.int()), 'int32'), ((x, p.to('meta')), 'device')):
        with pytest.raises(ValueError, match=text): affine_coupling(*given)
    for options, text in ((dict(bound='relu'), "'tanh'"), (dict(clamp=0.), 'above 0'), (dict(norm=p[:, :3]), 'one row for all'), (dict(norm=p[0, :3]), 'one row for all'),
                          (dict(backend='numpy'), 'numpy'), (dict(norm=p[0].long()), 'int64')):
        with pytest.raises(ValueError, match=text): affine_coupling(x, p, **options)
    for shift, raw in ((p[0], p), (p[:3], p[:3]), (p[0, :3], p[0, :3]), (p[0].int(), p[0])):
        with pytest.raises(ValueError): affine_step(x, shift, raw)
    with pytest.raises(ValueError): coupling_backward(x, p[:, :2], x, x[:, 0])


def test_runs_where_only_torch_is():
    code = ('import sys; [sys.modules.__setitem__(m, None) for m in ("triton", "jaxtyping", "einops", "fastcore", "numpy")];'
            'import torch; from jointgen.kernels.coupling import affine_coupling; print(affine_coupling(torch.zeros(1, 2), torch.zeros(1, 2))[1].tolist())')
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert run.stdout.strip() == '[0.0]', run.stderr

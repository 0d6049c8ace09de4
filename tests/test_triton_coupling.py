"""The coupling kernels against plain torch and float64: in Triton's interpreter, or on a GPU where there is one."""
import pytest
import torch

pytest.importorskip('triton')

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch.library import opcheck  # noqa: E402

from jointgen.kernels import backend  # noqa: E402
from jointgen.kernels import triton_coupling as kernels  # noqa: E402
from jointgen.kernels.affine import BOUNDS, Affine, affine_reference, log_scale  # noqa: E402
from jointgen.kernels.coupling import affine_coupling, affine_step, coupling_backward, pack  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() and not backend.interpreting() else 'cpu'
KINDS = [(step, norm) for step in (False, True) for norm in ('none', 'rows', 'one') if not (step and norm == 'none')]
cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')


@pytest.fixture(autouse=True)
def can_run():
    if DEVICE == 'cpu' and not backend.interpreting(): pytest.skip('needs a GPU, or TRITON_INTERPRET=1')


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def given(step, norm, b, h, dtype=torch.float32):
    """x, params, shift and raw scale as the kernels take them."""
    d = h if step else 2*h
    shape = dict(none=None, rows=(b, h), one=(h,))[norm]
    shift, raw = (None, None) if shape is None else (random(*shape, seed=s, dtype=dtype) for s in (2, 3))
    return random(b, d, dtype=dtype), None if step else random(b, d, seed=1, dtype=dtype), shift, raw


def exact(inputs, how, gy, gl):
    """Outputs and gradients of the specification in float64."""
    inputs = [v if v is None else v.double().requires_grad_() for v in inputs]
    y, logdet = affine_reference(*inputs, how)
    total = (y*gy.double()).sum() + (logdet*gl.double()).sum() + sum(0*v.sum() for v in inputs if v is not None)
    found = iter(torch.autograd.grad(total, [v for v in inputs if v is not None]))
    return [y.detach(), logdet.detach(), *(None if v is None else next(found) for v in inputs), inputs[0].detach()]


def ours(inputs, how, gy, gl):
    y, logdet = kernels.affine_forward(*inputs, how)
    return [y, logdet, *kernels.affine_backward(y, *inputs[1:], gy, gl, how, True)]


def close(found, wanted, tolerance=1e-5):
    for a, b in zip(found, wanted, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.shape == b.shape
        if b.numel(): assert (a.double() - b).abs().max() <= tolerance*(1 + b.abs().max())


@pytest.mark.parametrize('bound', BOUNDS)
@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_kernels_equal_float64(kind, bound):
    for i, (b, h) in enumerate([(257, 65), (1, 1), (5, 16)]):
        for inverse in (False, True):
            how = Affine(bound, 1.5, (i + inverse) % 2 == 0, inverse)
            inputs = given(*kind, b, h)
            gy, gl = random(*inputs[0].shape, seed=4), random(b, seed=5)
            close(ours(inputs, how, gy, gl), exact(inputs, how, gy, gl))


@pytest.mark.parametrize('b,h', [(0, 3), (1, 1), (2, 3), (127, 64), (128, 17), (513, 31), (3, 129)])
def test_shapes(b, h):
    for swap in (True, False):
        inputs, how = given(False, 'one', b, h), Affine('tanh', 2., swap, False)
        gy, gl = random(b, 2*h, seed=4), random(b, seed=5)
        close(ours(inputs, how, gy, gl), exact(inputs, how, gy, gl))


def test_an_empty_batch_launches_nothing(monkeypatch):
    monkeypatch.setattr(kernels, 'forward_kernel', None)
    monkeypatch.setattr(kernels, 'backward_kernel', None)
    y, logdet = affine_coupling(random(0, 6), random(0, 6), backend='triton')
    assert y.shape == (0, 6) and logdet.shape == (0,)
    found = kernels.affine_backward(y, random(0, 6), random(3), random(3), y, logdet, Affine())
    assert found.shift.tolist() == found.raw.tolist() == [0.]*3


@pytest.mark.parametrize('columns', [16, 32, 64, 128])
def test_the_tiles_of_a_gpu(columns, monkeypatch):
    """The interpreter takes its own; these are what a GPU gets."""
    monkeypatch.setattr(kernels, 'tile', lambda h: kernels.TILES[columns])
    t = kernels.TILES[columns]
    for kind in (False, 'rows'), (True, 'one'):
        inputs, how = given(*kind, t.rows + 1, columns + 1), Affine('sigmoid', 2., True, kind[0])
        gy, gl = random(*inputs[0].shape, seed=4), random(t.rows + 1, seed=5)
        close(ours(inputs, how, gy, gl), exact(inputs, how, gy, gl))


def test_choice_of_tiles(monkeypatch):
    monkeypatch.setattr(kernels, 'interpreting', lambda: False)
    assert [kernels.tile(h).columns for h in (1, 16, 17, 32, 33, 64, 65, 128, 5000)] == [16, 16, 32, 32, 64, 64, 128, 128, 128]
    assert all(t.rows*t.columns == 8*32*t.warps for t in kernels.TILES.values())


@triton.jit
def bounded_kernel(raw_ptr, l_ptr, slope_ptr, clamp, BOUND: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    l, slope = kernels.bounded(tl.load(raw_ptr + i), clamp, BOUND)
    tl.store(l_ptr + i, l)
    tl.store(slope_ptr + i, slope)


@pytest.mark.parametrize('bound', BOUNDS)
def test_bounds_over_all_magnitudes(bound):
    size = torch.logspace(-30, 1.5, 1024)
    raw = torch.cat([torch.linspace(-80, 80, 2048), size, -size]).to(DEVICE)
    l, slope = torch.empty_like(raw), torch.empty_like(raw)
    bounded_kernel[1,](raw, l, slope, 2., BOUND=bound, N=len(raw))
    wide = ((raw + 2).double() - 2 if bound == 'sigmoid' else raw.double()).requires_grad_()  # r + 2 is rounded first
    want = log_scale(wide, Affine(bound))
    steep, = torch.autograd.grad(want.sum() + 0*wide.sum(), wide)
    if bound == 'tanh': steep = (wide/2).cosh()**-2  # autograd's 1 - tanh^2 ends at 1e-16
    assert ((l.double() - want).abs() <= 5e-7*want.abs() + 1e-36).all()
    assert ((slope.double() - steep).abs() <= 1e-5*steep + 1e-36).all()  # e^-80: the exponential of a rounded number


@pytest.mark.parametrize('bound', ['sigmoid', 'tanh', 'additive'])
def test_far_out(bound):
    for r in (200., -200., 1e4, -1e4):
        x, p, shift, raw = given(False, 'none', 5, 4)
        p[:, 4:] = r
        gy, gl = random(5, 8, seed=4), random(5, seed=5)
        y, logdet = kernels.affine_forward(x, p, None, None, Affine(bound))
        found = [y, logdet, *kernels.affine_backward(y, p, None, None, gy, gl, Affine(bound))]
        assert all(v.isfinite().all() for v in found if v is not None)
        close(found[:-1], exact((x, p, None, None), Affine(bound), gy, gl)[:-1])


def test_strides():
    base, p, how = random(40, 60), random(40, 16, seed=1), Affine()
    for x in base[:, 3:19], base.T.contiguous().T[:, :16], base[:1, :16].expand(40, 16), base[:, ::3][:, :16], base[:, :1].expand(40, 16):
        gy, gl = x.clone(), random(40, seed=5)
        norm = random(16, seed=2)
        want = ours((x.contiguous(), p.contiguous(), *norm.chunk(2)), how, gy, gl)
        y, logdet = kernels.affine_forward(x, p, *norm.chunk(2), how)
        found = [y, logdet, *kernels.affine_backward(base.new_zeros(40, 30)[:, 3:19].copy_(y), p, *norm.chunk(2), x, gl, how, True)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert torch.equal(kernels.affine_forward(p, x, None, None, how)[0], kernels.affine_forward(p, x.contiguous(), None, None, how)[0])


def test_gradients_with_stride_zero():
    found = []
    for name in 'triton', 'reference':
        x, p, n = (v.requires_grad_() for v in (random(9, 16), random(9, 16, seed=1), random(8, 16, seed=2)[:1].expand(9, 16)))
        y, logdet = affine_coupling(x, p, norm=n, backend=name)
        found.append(torch.autograd.grad(y.sum() + logdet.sum(), (x, p, n)))
    close(*found)
    x = random(9, 16).requires_grad_()
    gx, = torch.autograd.grad(affine_step(x, x.detach()[0], x.detach()[1], backend='triton')[0].sum(), x)
    assert torch.allclose(gx, x.detach()[1].exp().expand(9, 16))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    """Arithmetic in float32; only what is stored is rounded (truncated, where the interpreter makes a bfloat16)."""
    for kind in KINDS:
        inputs, how = given(*kind, 70, 17, dtype), Affine()
        gy, gl = random(*inputs[0].shape, seed=4, dtype=dtype), random(70, seed=5)
        y, logdet = kernels.affine_forward(*inputs, how)
        found = kernels.affine_backward(y, *inputs[1:], gy, gl, how)
        want = exact(inputs, how, gy, gl)
        close([y, logdet, *found[:-1]], want[:-1], 16*torch.finfo(dtype).eps)
        assert (logdet - want[1]).abs().max() < 1e-5 and logdet.dtype == torch.float32
        assert [v.dtype for v in (y, *found) if v is not None] == [dtype]*(1 + sum(v is not None for v in found))
    y, logdet = affine_coupling(random(5, 4), random(5, 4, seed=1, dtype=dtype), backend='triton')
    assert y.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16): assert affine_coupling(random(5, 4, dtype=dtype), random(5, 4), backend='triton')[1].dtype == torch.float32


def test_float64_takes_the_way_of_torch(monkeypatch):
    monkeypatch.setattr(kernels, 'forward_kernel', None)
    x, p = random(5, 4).double(), random(5, 4, seed=1).double()
    assert torch.equal(affine_coupling(x, p, backend='triton')[0], affine_coupling(x, p, backend='torch')[0])


def test_running_total():
    x, p, _, _ = given(False, 'none', 70, 5)
    before = random(70, seed=9)
    for inverse in (False, True):
        how = Affine(inverse=inverse)
        with_total, alone = (kernels.affine_forward(x, p, None, None, how, running) for running in (before, None))
        assert torch.equal(with_total[0], alone[0]) and torch.allclose(with_total[1], alone[1] + before, atol=1e-5)


def test_offsets_beyond_int32():
    storage = torch.empty(2**31 + 128, device=DEVICE)
    far = storage.as_strided((3, 8), (2**30, 1))
    far.copy_(random(3, 8))
    p, how, gl = random(3, 8, seed=1), Affine(), random(3, seed=5)
    assert torch.equal(kernels.affine_forward(far, p, None, None, how)[0], kernels.affine_forward(far.clone(), p, None, None, how)[0])
    for args in ((far, p, None, None, p, gl, how), (p, far, None, None, p, gl, how), (p, p, None, None, far, gl, how), (p, p, far[:, :4], far[:, 4:], p, gl, how)):
        near = [v.clone() if torch.is_tensor(v) else v for v in args]
        assert all(torch.equal(a, b) for a, b in zip(kernels.affine_backward(*args), kernels.affine_backward(*near)) if a is not None)


def test_nothing_is_written_next_to_the_result(monkeypatch):
    """Results are cut from poisoned memory: all of it is written, and nothing beside it."""
    guards, empty = [], torch.Tensor.new_empty

    def guarded(like, *size, dtype=None, device=None):
        if device is not None: return empty(like, *size, dtype=dtype, device=device)  # the interpreter's own
        size = size[0] if size and not isinstance(size[0], int) else size
        n = torch.Size(size).numel()
        memory = empty(like, (n + 512,), dtype=dtype or like.dtype).fill_(torch.nan)
        guards.append((memory, n))
        return memory[256:256 + n].view(size)

    monkeypatch.setattr(torch.Tensor, 'new_empty', guarded)
    for kind in KINDS:
        for b, h in (257, 65), (3, 5):
            inputs = given(*kind, b, h)
            ours(inputs, Affine(), random(*inputs[0].shape, seed=4), random(b, seed=5))
    assert len(guards) >= 2*sum(5 for _ in KINDS)
    for memory, n in guards:
        assert memory[:256].isnan().all() and memory[256 + n:].isnan().all() and not memory[256:256 + n].isnan().any()


def test_inputs_stay():
    inputs = given(False, 'rows', 9, 8)
    gy, gl = random(9, 16, seed=4), random(9, seed=5)
    before = [v.clone() for v in (*inputs, gy, gl)]
    first, second = (ours(inputs, Affine(), gy, gl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*inputs, gy, gl), before))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradients_through_the_public_functions():
    for inverse in (False, True):
        found = []
        for name in 'triton', 'torch':
            x, p, n = (v.requires_grad_() for v in (random(70, 12), random(70, 12, seed=1), random(12, seed=2)))
            y, logdet = affine_coupling(x, p, norm=n, inverse=inverse, backend=name)
            z, more = affine_step(y, n, n/2, bound='tanh', inverse=inverse, backend=name)
            found.append([z, logdet, more, *torch.autograd.grad((z*z).sum() + (logdet*more).sum(), (x, p, n))])
        close(*found, 2e-5)
    y, logdet = affine_coupling(x, p, backend='triton')
    g, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


def test_a_stack_is_rebuilt():
    params = [0.5*random(20, 12, seed=s) for s in range(16)]
    y = x = random(20, 12, seed=99)
    for p in params: y, _ = affine_coupling(y, p, backend='triton')
    gx = torch.ones_like(y)
    for p in reversed(params): gx, _, _, _, y = coupling_backward(y, p, gx, torch.zeros(20, device=DEVICE), backend='triton')
    close([y], [x.double()], 2e-5)


@pytest.mark.parametrize('norm', ['none', 'one'])
def test_operators(norm):
    x, p, shift, raw = (v if v is None else v.requires_grad_() for v in given(norm == 'one', norm, 5, 4))
    how = pack(Affine('tanh', 2., True, False))
    tests = 'test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'
    assert set(opcheck(torch.ops.jointgen.affine.default, (x, p, shift, raw, how, 'triton'), test_utils=tests).values()) == {'SUCCESS'}
    y, logdet = torch.ops.jointgen.affine(x, p, shift, raw, how, 'triton')
    saved = [v if v is None else v.detach() for v in (y, p, shift, raw, torch.ones_like(y), logdet)]
    assert set(opcheck(torch.ops.jointgen.affine_backward.default, (*saved, how, 'triton'), test_utils=tests).values()) == {'SUCCESS'}


def test_compiles_without_a_break():
    def loss(x, p, n):
        y, logdet = torch.ops.jointgen.affine(x, p, *n.chunk(2), [0., 2., 1., 0.], 'triton')
        return y.square().sum() - logdet.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend='aot_eager')
    for b, d in (9, 8), (13, 14):
        inputs = [v.requires_grad_() for v in (random(b, d), random(b, d, seed=1), random(d, seed=2))]
        close(torch.autograd.grad(compiled(*inputs), inputs), [v.double() for v in torch.autograd.grad(loss(*inputs), inputs)])


def test_a_grid_that_overflows(monkeypatch):
    monkeypatch.setattr(kernels, 'tile', lambda h: kernels.Tile(16, 16))
    wide = torch.zeros(1, 1, device=DEVICE).expand(1, 16*65536)
    monkeypatch.setattr(kernels, 'backward_kernel', None)
    with pytest.raises(ValueError, match='65536'): kernels.affine_backward(wide, None, wide, wide, wide, torch.zeros(1, device=DEVICE), Affine())


def test_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, 'interpreting', lambda: False)
    with pytest.raises(ValueError, match='CUDA|GPU'): affine_coupling(torch.zeros(1, 2), torch.zeros(1, 2), backend='triton')


def test_configurations_cover_what_can_be_chosen():
    for capability in (80, 90):
        found = list(kernels.configurations(capability))
        assert len({c.name for c in found}) == len(found)
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            mine = [c for c in found if c.kernel is kernel]
            for c in mine:
                assert set(c.signature) | set(c.constants) == set(kernel.arg_names) and not set(c.signature) & set(c.constants) and set(c.divisible) <= set(c.signature)
            axes = [dict(bound=c.constants['BOUND'], columns=c.constants['BLOCK_H'], inverse=c.constants['INVERSE'], extra='extra' in c.name, kind=' '.join(c.name.split()[1:3])) for c in mine]
            for one, other, count in ('bound', 'columns', 16), ('bound', 'inverse', 8), ('columns', 'inverse', 8), ('kind', 'extra', 10), ('kind', 'columns', 20): assert len({(a[one], a[other]) for a in axes}) == count
            assert {t for c in mine for t in c.signature.values()} >= {'*fp32', '*bf16', '*fp16'}


@cuda
def test_ten_runs_give_the_same_bits():
    inputs = given(False, 'one', 5000, 65)
    gy, gl = random(5000, 130, seed=4), random(5000, seed=5)
    first = ours(inputs, Affine(), gy, gl)
    for _ in range(9): assert all(torch.equal(a, b) for a, b in zip(ours(inputs, Affine(), gy, gl), first, strict=True))


@cuda
def test_graph_capture_and_streams():
    x, p = random(512, 64), random(512, 64, seed=1)
    want = affine_coupling(x, p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): y, logdet = affine_coupling(x, p)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want[0]) and torch.equal(logdet, want[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): other = affine_coupling(x, p)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(other, want[0])

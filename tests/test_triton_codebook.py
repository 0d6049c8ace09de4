"""The codebook's Triton kernels against the reference: in the interpreter, or compiled where there is a GPU."""
import pytest
import torch

pytest.importorskip('triton')

from jointgen.kernels import codebook, triton_codebook as module  # noqa: E402
from jointgen.kernels.backend import interpreting  # noqa: E402
from jointgen.kernels.codebook import code_statistics, quantize  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() and not interpreting() else 'cpu'
cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
KINDS = ['straight_through', 'rotation']
pytestmark = pytest.mark.skipif(DEVICE == 'cpu' and not interpreting(), reason='needs a GPU or the interpreter')


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw(k, *shape, seed=2): return torch.randint(0, k, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def case(n=60, k=7, d=9):
    "Rows, codebook, codes (the last code is never used) and a gradient."
    return random(n, d).requires_grad_(), random(k, d, seed=1).requires_grad_(), draw(max(1, k - 1), n), random(n, d, seed=3)


def outcome(z, codebook, codes, g, **kwargs):
    "Values and gradients, with the loss weighted by 3."
    z_q, loss, counts = quantize(z, codebook, codes, **kwargs)
    return z_q, loss, counts, *torch.autograd.grad((z_q*g).sum() + 3*loss, [x for x in (z, codebook) if x.requires_grad])


def close(got, want, tolerance):
    for name, a, b in zip(('z_q', 'loss', 'counts', 'dz', 'dcodebook'), got, want):
        assert a.shape == b.shape, name
        if a.numel(): assert (a.double() - b.double()).abs().max() <= tolerance*max(1., b.double().abs().max().item()), name


def wide(*tensors): return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


# quantize

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n,k,d', [(0, 5, 3), (1, 1, 1), (2, 2, 3), (127, 63, 16), (128, 64, 24), (129, 65, 64), (1823, 781, 96), (300, 2, 100), (300, 9, 257)])
def test_values_and_gradients(n, k, d, kind):
    z, e, codes, g = case(n, k, d)
    if k > 20: e = e.detach()  # a program a code is slow in the interpreter
    got = outcome(z, e, codes, g, gradient=kind, backend='triton')
    close(got, outcome(*wide(z, e), codes, g.double(), gradient=kind, backend='reference')[:len(got)], 1e-5)
    assert torch.equal(got[0], e.detach()[codes]) and got[0].dtype == torch.float32 and got[2].dtype == torch.int64 and got[0].device == z.device


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('table', [torch.float32, torch.bfloat16])
def test_types(dtype, table, kind):
    z, e, codes, g = case(200, 6, 24)
    z, e, g = z.detach().to(dtype).requires_grad_(), e.detach().to(table).requires_grad_(), g.to(dtype)
    got = outcome(z, e, codes, g, gradient=kind, backend='triton')
    want = outcome(*wide(z, e), codes, g.double(), gradient=kind, backend='reference')
    assert got[0].dtype == got[3].dtype == dtype and got[4].dtype == table and got[1].dtype == torch.float32
    close(got, want, 2*torch.finfo(dtype).eps)  # the interpreter rounds to bfloat16 towards zero
    assert abs(got[1].double() - want[1]) < 1e-5*want[1]
    counts, sums = code_statistics(z, codes, 6, backend='triton')
    assert sums.dtype == torch.float32 and torch.allclose(sums, code_statistics(z, codes, 6, backend='reference')[1], atol=1e-4)


def test_leading_axes():
    z, e, codes, _ = case()
    flat, deep = quantize(z, e, codes, backend='triton'), quantize(z.reshape(3, 4, 5, 9), e, codes.reshape(3, 4, 5), backend='triton')
    assert torch.equal(deep[0].reshape(60, 9), flat[0]) and deep[1] == flat[1] and torch.equal(deep[2], flat[2])
    assert torch.equal(quantize(z[0], e, codes[0], backend='triton')[0], e[codes[0]])


@pytest.mark.parametrize('kind', KINDS)
def test_views_and_expanded_gradients(kind):
    _, e, codes, _ = case()
    broad = random(60, 40)
    for view in (broad[:, 3:12], random(9, 60).T, broad[:1, :9].expand(60, 9)):
        for table in (random(9, 7).T, random(7, 30)[:, 4:13]):
            z, e = view.detach().requires_grad_(), table.detach().requires_grad_()
            a, b = (torch.autograd.grad(quantize(z, e, codes, gradient=kind, backend=x)[0].sum() + quantize(z, e, codes, backend=x)[1], (z, e))
                for x in ('triton', 'reference'))
            close(a, b, 1e-5)


def test_row_stride_beyond_int32():
    storage = torch.empty(2**31 + 128, device=DEVICE)
    z, (_, e, codes, g) = storage.as_strided((3, 8), (2**30, 1)), case(3, 5, 8)
    z.copy_(random(3, 8))
    for got, want in zip(quantize(z, e, codes, backend='triton'), quantize(random(3, 8), e, codes, backend='triton')): assert torch.equal(got, want)
    one, e = torch.ones((), device=DEVICE), e.detach()
    for rotation in (False, True):
        assert torch.equal(module.row_gradient(z, one, z, e, codes, rotation=rotation), module.row_gradient(random(3, 8), one, random(3, 8), e, codes, rotation=rotation))
    assert torch.equal(code_statistics(z, codes, 5, backend='triton')[1], code_statistics(random(3, 8), codes, 5, backend='triton')[1])


def test_rows_that_equal_their_codes():
    e, codes = (random(7, 9) + 10).requires_grad_(), draw(7, 50)
    z = e.detach()[codes].requires_grad_()
    z_q, loss, counts = quantize(z, e, codes, backend='triton')
    assert loss == 0 and torch.equal(z_q, z) and torch.equal(counts, torch.bincount(codes, minlength=7))
    assert torch.equal(torch.autograd.grad((z_q*random(50, 9)).sum() + loss, z)[0], random(50, 9))


@pytest.mark.filterwarnings('ignore:invalid value')
def test_nan_and_inf():
    z, e, codes, g = (x.detach() for x in case())
    clean, _, _ = quantize(z, e, codes, backend='triton')
    for wrong in (torch.nan, torch.inf, -torch.inf):
        bad = z.clone()
        bad[3, 2] = wrong
        z_q, loss, counts = quantize(bad, e, codes, backend='triton')
        assert z_q[3].isnan().any() and not loss.isfinite() and counts.sum() == 60
        assert torch.equal(torch.cat([z_q[:3], z_q[4:]]), torch.cat([clean[:3], clean[4:]]))
        for rotation in (False, True):
            dz = module.row_gradient(g, torch.ones((), device=DEVICE), bad, e, codes, rotation=rotation)
            assert not dz[3].isfinite().all() and dz[:3].isfinite().all() and dz[4:].isfinite().all()
    for wrong in (torch.nan, torch.inf):
        bad = e.clone()
        bad[6, 1] = wrong
        assert 6 not in codes
        z_q, loss, _ = quantize(z, bad, codes, backend='triton')
        assert loss.isnan() and torch.equal(z_q, clean)
        many = torch.cat([e, random(300, 9), bad])
        assert quantize(z[:2], many, codes[:2], backend='triton')[1].isnan() and not quantize(z[:2], many[:-1], codes[:2], backend='triton')[1].isnan()


def test_codes_that_do_not_exist_show():
    z, e, codes, _ = (x.detach() for x in case())
    for wrong in (-1, 7, 2**40):  # nothing is read outside, nothing waits for the device
        bad = codes.clone()
        bad[5] = wrong
        z_q, loss, counts = quantize(z, e, bad, backend='triton')
        assert z_q[5].isnan().all() and z_q[6:].isfinite().all() and loss.isnan() and counts.sum() == 59
        assert module.row_gradient(z, torch.ones((), device=DEVICE), z, e, bad)[5].isnan().all()
        assert code_statistics(z, bad, 7, backend='triton')[1].isnan().all()


def test_where_there_is_no_rotation():
    z, e, codes, g = (x.detach() for x in case())
    z[0], e[codes[1]], z[2] = 0, 0, -2*e[codes[2]]
    dz = module.row_gradient(g, torch.zeros((), device=DEVICE), z, e, codes, rotation=True)
    none = (codes == codes[1]) | (torch.arange(60, device=DEVICE) == 0) | (torch.arange(60, device=DEVICE) == 2)
    assert torch.equal(dz[none], g[none]) and dz.isfinite().all()
    assert torch.allclose(dz, codebook.turned_gradient(g, z, e[codes]), atol=1e-5)


@pytest.mark.parametrize('kind', ['uniform', 'hot', 'one', 'out of turn'])
def test_histogram(kind):
    n, k = 700, 40
    codes = {'uniform': draw(k, n), 'hot': draw(k, n)*(draw(10, n, seed=5) == 0), 'one': torch.full((n,), 7, device=DEVICE), 'out of turn': draw(k, n).sort(descending=True)[0]}[kind]
    assert torch.equal(quantize(random(n, 5), random(k, 5), codes, backend='triton')[2], torch.bincount(codes, minlength=k))


# sums

@pytest.mark.parametrize('n,k,d', [(0, 3, 5), (1, 1, 1), (2, 2, 3), (129, 5, 100), (1823, 8, 24), (300, 4, 257)])
def test_statistics(n, k, d):
    z, codes = random(n, d), draw(max(1, k - 1), n)
    counts, sums = code_statistics(z, codes, k, backend='triton')
    exact, size = (torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, codes, x.double()) for x in (z, z.abs()))
    assert torch.equal(counts, torch.bincount(codes, minlength=k).float()) and ((sums - exact).abs() <= 1e-6*size).all()


@pytest.mark.parametrize('kind', ['one', 'hot', 'zipf'])
def test_hot_codes_are_split_and_the_bits_repeat(kind):
    n, k, d = 5000, 6, 40
    seeded = torch.Generator().manual_seed(2)
    share = {'one': [0., 0, 1, 0, 0, 0], 'hot': [.02, .9, .02, .02, .02, .02], 'zipf': [1/j for j in range(1, 7)]}[kind]
    z, codes = random(n, d), torch.multinomial(torch.tensor(share), n, True, generator=seeded).to(DEVICE)
    counts, sums = code_statistics(z, codes, k, backend='triton')
    exact, size = (torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, codes, x.double()) for x in (z, z.abs()))
    assert torch.equal(counts, torch.bincount(codes, minlength=k).float()) and ((sums - exact).abs() <= 1e-6*size).all()
    for _ in range(2): assert torch.equal(code_statistics(z, codes, k, backend='triton')[1], sums)
    _, _, ends, owner = module.segments(codes, k)
    parts = (torch.bincount(codes, minlength=k) + module.CHUNK - 1)//module.CHUNK
    assert parts.max() > 1 and torch.equal(ends, parts.cumsum(0)) and torch.equal(torch.bincount(owner, minlength=k + 1)[:k], parts)


def test_segments_cover_every_row_once():
    for n, k in ((0, 3), (7, 1), (2048, 5), (2049, 5000), (3000, 40000)):
        codes = draw(k, n)
        order, start, ends, owner = module.segments(codes, k)
        assert torch.equal(order.sort()[0], torch.arange(n, device=DEVICE)) and torch.equal(start.diff(), torch.bincount(codes, minlength=k))
        assert torch.equal(codes[order], codes.sort()[0]) and ends[-1] <= len(owner) <= n//module.CHUNK + min(n, k)


# memory

def guarded(x):
    "A copy between two walls of a known number; the walls."
    store = torch.full((x.numel() + 256,), 77, dtype=x.dtype, device=x.device)
    store[128:-128] = x.reshape(-1)
    return store[128:-128].view(x.shape), [store[:128], store[-128:]]


@pytest.mark.parametrize('n,d', [(5, 9), (33, 64), (70, 100)])
def test_nothing_is_written_outside(n, d, monkeypatch):
    walls, original = [], module.torch.Tensor.new_empty

    def poisoned(self, *shape, **kwargs):
        out, wall = guarded(torch.full_like(original(self, *shape, **kwargs), torch.nan if self.is_floating_point() else -5))
        walls.extend(wall)
        return out

    z, e, codes, g = (x.detach() for x in case(n, 7, d))
    monkeypatch.setattr(torch.Tensor, 'new_empty', poisoned)
    out, squares, _ = module.gather(z, e, codes)
    gradients = [module.row_gradient(g, torch.ones((), device=DEVICE), z, e, codes, rotation=r) for r in (False, True)]
    assert len(walls) >= 8 and all(wall.eq(77).all() for wall in walls)
    assert out.isfinite().all() and squares.isfinite() and all(x.isfinite().all() for x in gradients)  # every number was written


def test_inputs_are_left_alone():
    z, e, codes, g = case()
    before = [x.detach().clone() for x in (z, e, codes, g)]
    for kind in KINDS:
        got = outcome(z, e, codes, g, gradient=kind, backend='triton')
        for a, b in zip((z, e, codes, g), before): assert torch.equal(a, b)
        assert not {x.untyped_storage().data_ptr() for x in (z, e, codes, g)} & {x.untyped_storage().data_ptr() for x in got}


# operators

@pytest.mark.parametrize('kind', KINDS)
def test_opcheck(kind):
    z, e, codes, g = case(12, 4, 5)
    torch.library.opcheck(codebook.quantize_op, (z, e, codes, [0.25, 1.], kind == 'rotation', 'triton'))
    torch.library.opcheck(codebook.quantize_backward_op, (g, torch.tensor(3., device=DEVICE), z.detach(), e.detach(), codes, [0.25, 1.], [kind == 'rotation', True, True], 'triton'))
    torch.library.opcheck(codebook.code_statistics_op, (z.detach(), codes, 4, 'triton'))


def test_compiled():
    torch._dynamo.reset()
    def step(z, e, codes, g):
        z_q, loss, counts = quantize(z, e, codes, gradient='rotation', backend='triton')
        return (z_q*g).sum() + 3*loss, counts, *code_statistics(z, codes, 5, backend='triton')
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend='aot_eager')
    for n in (40, 33):
        z, e, codes, g = case(n, 5, 8)
        ours, plain = compiled(z, e, codes, g), step(z, e, codes, g)
        for a, b in zip(ours, plain): assert torch.allclose(a, b, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(x[0], (z, e)) for x in (ours, plain))): assert torch.allclose(a, b, atol=1e-6)


def test_autocast():
    z, e, codes, g = case()
    plain = outcome(z, e, codes, g, backend='triton')
    with torch.autocast(DEVICE, torch.bfloat16): cast = outcome(z, e, codes, g, backend='triton')
    for a, b in zip(cast, plain): assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_environment_chooses(monkeypatch):
    called, gather = [], module.gather
    monkeypatch.setattr(module, 'gather', lambda *args: called.append(1) or gather(*args))
    z, e, codes, _ = case()
    monkeypatch.setenv('JOINTGEN_BACKEND', 'triton')
    quantize(z, e, codes)
    assert called
    quantize(z.double(), e, codes)  # more than the kernels hold: plain torch
    quantize(z, e, codes, backend='torch')
    assert len(called) == 1


# configurations

def test_configurations_name_every_launch(monkeypatch):
    monkeypatch.setattr(module, 'interpreting', lambda: False)
    for capability in (80, 90):
        found = list(module.configurations(capability))
        assert len({c.name for c in found}) == len(found)
        for c in found:
            assert set(c.signature) | set(c.constants) == set(c.kernel.arg_names) and set(c.divisible) <= set(c.signature)
            assert c.constants['BLOCK_N']*c.constants['BLOCK_D'] in (2048, 4096, 8192)
        known = {(c.kernel.__name__, c.constants['BLOCK_N'], c.constants['BLOCK_D']) for c in found}
        for d in (1, 3, 16, 31, 32, 33, 64, 100, 128, 129, 257, 512, 1000, 1024):
            for n in (1, 100, 10**6):
                part = min(d, module.SLICE)
                launches = dict(gather_kernel=module.tile(n, d), row_gradient_kernel=module.tile(n, d),
                    segment_kernel=module.tile(n, part, elements=4*module.ELEMENTS), merge_kernel=module.tile(n, part, elements=2*module.ELEMENTS))
                for name, block in launches.items(): assert (name, block['BLOCK_N'], block['BLOCK_D']) in known
    assert codebook.WIDEST == max(c.constants['BLOCK_D'] for c in module.configurations(90))


# on a GPU only

@cuda
def test_runs_repeat():
    z, e, codes, g = case(100_000, 64, 64)
    first = outcome(z, e, codes, g, gradient='rotation')
    for _ in range(9):
        for a, b in zip(outcome(z, e, codes, g, gradient='rotation'), first): assert torch.equal(a, b)


@cuda
def test_graph_capture_and_streams():
    z, e, codes, g = (x.detach() for x in case(5000, 64, 64))
    one = torch.ones((), device=DEVICE)
    work = lambda: (*module.gather(z, e, codes), module.row_gradient(g, one, z, e, codes, rotation=True), *module.segment_sums(z, codes, 64))
    plain = work()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): beside = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = work()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(plain, beside, captured): assert torch.equal(a, b) and torch.equal(a, c)


@cuda
def test_memory():
    z, e, codes, _ = (x.detach() for x in case(2**18, 8192, 64))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    code_statistics(z, codes, 8192)
    assert torch.cuda.max_memory_allocated() - before < 64*len(z) + 64*8192*64

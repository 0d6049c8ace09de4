"""The fused nearest code against float64: in Triton's interpreter, or on a GPU where there is one."""
import gc
import itertools
import os
import weakref

import pytest
import torch

pytest.importorskip('triton')
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')  # read when a kernel is decorated

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from jointgen.kernels import nearest_code as public  # noqa: E402
from jointgen.kernels import triton_nearest_code as module, triton_search as kernels  # noqa: E402
from jointgen.kernels.backend import interpreting  # noqa: E402
from jointgen.kernels.nearest_code import nearest_code, nearest_code_reference  # noqa: E402
from jointgen.kernels.triton_nearest_code import nearest_code_kernel  # noqa: E402

DEVICE = 'cpu' if interpreting() else 'cuda'
cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
PRECISIONS = pytest.mark.parametrize('exact', [True, False], ids=['exact', 'fast'])
SIZES_N, SIZES_K, SIZES_D = (0, 1, 2, 127, 128, 129, 1823), (1, 2, 63, 64, 65, 781), (1, 3, 16, 24, 64, 96, 100, 257)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def squared(z, e):
    return (z.double() - e.double()).square().sum(-1)


def right(z, codebook):
    return torch.equal(nearest_code_kernel(z, codebook), nearest_code_reference(z, codebook))


def near_enough(z, codebook, codes):
    "Is each row's code as near as one float16 product can tell?"
    best = squared(z, codebook[nearest_code_reference(z, codebook)])
    mean = codebook.double().mean(0)
    size = (z.double() - mean).norm(dim=1)*(codebook.double() - mean).norm(dim=1).max()
    return (squared(z, codebook[codes]) <= best + 2**-8*size).all()


def cases(on_gpu):
    if on_gpu: return list(itertools.product(SIZES_N, SIZES_K, SIZES_D))
    return [(SIZES_N[(i + j) % 7], k, d) for i, d in enumerate(SIZES_D) for j, k in enumerate(SIZES_K)]


@PRECISIONS
@pytest.mark.parametrize('d', SIZES_D)
def test_shapes(d, exact):
    for n, k, _ in (c for c in cases(DEVICE == 'cuda') if c[2] == d):
        z, codebook = random(n, d), random(k, d, seed=1)
        codes = nearest_code_kernel(z, codebook, exact=exact)
        assert codes.shape == (n,) and codes.dtype == torch.int64 and codes.device == z.device
        if exact: assert torch.equal(codes, nearest_code_reference(z, codebook)), (n, k, d)
        else: assert near_enough(z, codebook, codes), (n, k, d)


def test_rows_come_in_several_launches(monkeypatch):
    launches = []
    original = module.rows_at_a_time
    monkeypatch.setattr(module, 'rows_at_a_time', lambda *args: launches.append(original(*args)) or launches[-1])
    assert right(random(1300, 100), random(3, 100, seed=1))
    assert launches[0] < 1300


@PRECISIONS
def test_leading_axes_and_strides(exact):
    z, codebook, wide = random(6, 7, 12), random(33, 12, seed=1), random(42, 30)
    precision = 'exact' if exact else 'fast'
    flat = nearest_code_kernel(z.view(42, 12), codebook, exact=exact)
    assert torch.equal(nearest_code(z, codebook, precision=precision, backend='triton'), flat.view(6, 7))
    assert nearest_code(z[0, 0], codebook, precision=precision, backend='triton').shape == ()
    for view in (wide[:, 5:17], wide.T[:12].T, wide[:1, :12].expand(9, 12), wide[::3, :12], wide[:, :1].expand(42, 12)):
        assert torch.equal(nearest_code_kernel(view, codebook, exact=exact), nearest_code_kernel(view.clone(), codebook, exact=exact))
    for view in (codebook.T.contiguous().T, torch.cat([codebook, codebook], 1)[:, :12], codebook.repeat(2, 1)[::2].repeat(1, 1)):
        assert torch.equal(nearest_code_kernel(wide[:, :12], view, exact=exact), nearest_code_kernel(wide[:, :12], view.clone(), exact=exact))
    grown = random(1, 12).expand(70, 12)
    assert nearest_code_kernel(wide[:, :12], grown, exact=exact).eq(0).all()


def test_row_stride_beyond_int32():
    z = torch.empty(2**31 + 128, device=DEVICE).as_strided((3, 8), (2**30, 1))
    z.copy_(random(3, 8))
    assert torch.equal(nearest_code_kernel(z, random(70, 8, seed=1)), nearest_code_kernel(random(3, 8), random(70, 8, seed=1)))


@PRECISIONS
def test_ties_take_the_lowest_index(exact):
    codebook = random(512, 16).repeat(2, 1)  # the twin is in another tile
    assert nearest_code_kernel(random(200, 16, seed=1), codebook, exact=exact).max() < 512
    assert nearest_code_kernel(random(50, 16), torch.ones(700, 16, device=DEVICE), exact=exact).eq(0).all()
    grid = torch.tensor([[x, y] for x in range(-8, 8, 2) for y in range(-8, 8, 2)], dtype=torch.float32, device=DEVICE)
    between = torch.tensor([[x, y] for x in range(-8, 7) for y in range(-8, 7)], dtype=torch.float32, device=DEVICE)
    assert torch.equal(nearest_code_kernel(between, grid, exact=exact), nearest_code_reference(between, grid))


@PRECISIONS
def test_a_row_equal_to_a_code(exact):
    codebook = random(300, 24)
    codes = nearest_code_kernel(codebook, codebook, exact=exact)
    assert torch.equal(codes, torch.arange(300, device=DEVICE)) and (codebook - codebook[codes]).square().sum() == 0


@pytest.mark.parametrize('k,d', [(256, 128), (700, 200)])
def test_fresh_codebook(k, d):
    codebook = (torch.rand(k, d, generator=torch.Generator().manual_seed(0)).to(DEVICE)*2 - 1)/k
    assert right(random(500, d), codebook)


def test_far_from_zero():
    z, codebook = random(600, 32) + 10, random(400, 32, seed=1) + 10
    assert right(z, codebook)
    assert (nearest_code_kernel(z, codebook, exact=False) != nearest_code_reference(z, codebook)).float().mean() < 0.01


def test_fast_is_seldom_wrong():
    z, codebook = random(1500, 64), random(1000, 64, seed=1)
    codes = nearest_code_kernel(z, codebook, exact=False)
    assert (codes != nearest_code_reference(z, codebook)).float().mean() < 0.005 and near_enough(z, codebook, codes)


@PRECISIONS
@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e15, 1e30])
def test_scales(scale, exact):
    z, codebook = random(300, 8)*scale, random(70, 8, seed=1)*scale
    wrong = nearest_code_kernel(z, codebook, exact=exact) != nearest_code_reference(z, codebook)
    assert wrong.sum() <= (0 if exact else 2)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # the interpreter's numpy tells of infinities that are meant
def test_rows_and_codes_of_very_different_size():
    z, codebook = random(60, 8), random(70, 8, seed=1)
    for a, b in ((1e15, 1e-20), (1e-20, 1e15), (1e25, 1.), (1., 1e25), (1e18, 1e-18)): assert right(z*a, codebook*b)
    one_far = codebook.clone()
    one_far[3] = 1e12
    assert right(z, one_far)


@PRECISIONS
def test_nan_and_inf(exact):
    z, codebook = random(300, 8), random(70, 8, seed=1)
    clean = nearest_code_kernel(z, codebook, exact=exact)
    bad = z.clone()
    bad[5, 2], bad[6], bad[7, 1], bad[8, 1] = torch.nan, torch.nan, torch.inf, -torch.inf
    codes = nearest_code_kernel(bad, codebook, exact=exact)
    assert codes[5:9].eq(0).all() and torch.equal(codes[9:], clean[9:]) and torch.equal(codes[:5], clean[:5])
    broken, lost = codebook.clone(), clean[:2]
    broken[lost[0], 3], broken[lost[1], 3] = torch.nan, torch.inf
    codes, keep = nearest_code_kernel(z, broken, exact=exact), ~torch.isin(clean, lost)
    assert not torch.isin(codes, lost).any() and torch.equal(codes[keep], clean[keep])
    assert nearest_code_kernel(z, torch.full((70, 8), torch.nan, device=DEVICE), exact=exact).eq(0).all()
    assert nearest_code_kernel(torch.full((9, 8), torch.nan, device=DEVICE), codebook, exact=exact).eq(0).all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    z, codebook = random(300, 24), random(90, 24, seed=1)
    assert right(z.to(dtype), codebook) and right(z.to(dtype), codebook.to(dtype)) and right(z, codebook.to(dtype))
    assert near_enough(z.to(dtype), codebook, nearest_code_kernel(z.to(dtype), codebook, exact=False))


def test_float64_is_read_in_full():
    codebook = torch.tensor([[1.], [1. + 2e-12]], dtype=torch.float64, device=DEVICE)
    z = torch.tensor([[1 + 0.9e-12], [1 + 1.1e-12]], dtype=torch.float64, device=DEVICE)
    assert nearest_code_kernel(z, codebook).tolist() == [0, 1]


class Watched:
    "Stands in for a kernel; notes what a launch was given, and may leave it out."

    def __init__(self, kernel, run=True): self.kernel, self.run, self.args = kernel, run, None

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.args = args
            if self.run: self.kernel[grid](*args, **kwargs)
        return launch


def in_doubt(watched):
    work = watched.args[2]
    return work[1:1 + work[0]].sort().values


@pytest.mark.parametrize('d', [32, 150])
def test_certificate_near_a_bisector(d, monkeypatch):
    watched = Watched(kernels.recheck_kernel, run=False)
    monkeypatch.setattr(kernels, 'recheck_kernel', watched)
    codebook = torch.cat([random(40, d, dtype=torch.float64), random(40, d, seed=1, dtype=torch.float64)]).float()
    a, b = codebook[:40].double(), codebook[40:].double()
    deltas = [0.] + [sign*10.**-i for i in range(1, 13) for sign in (1, -1)]
    z = torch.cat([(a + b)/2 + delta*(b - a) for delta in deltas])
    z = torch.cat([z, ((a + b)/2)[None].expand(4, 40, d).reshape(-1, d) + 1e-5*random(160, d, seed=2)])
    for rows in (z, z.float()):
        codes = nearest_code_kernel(rows, codebook)
        doubt = in_doubt(watched)
        certain = torch.ones(len(rows), dtype=torch.bool, device=DEVICE).index_fill_(0, doubt, False)
        assert len(doubt.unique()) == len(doubt) and 40 < len(doubt) < len(rows)
        assert torch.equal(codes[certain], nearest_code_reference(rows, codebook)[certain])
    watched.run = True
    assert right(z, codebook) and right(z.float(), codebook)


@pytest.mark.parametrize('d', [64, 300])
def test_share_of_rechecked_rows(d, monkeypatch):
    watched = Watched(kernels.recheck_kernel)
    monkeypatch.setattr(kernels, 'recheck_kernel', watched)
    assert right(random(1000, d), random(800, d, seed=1))
    assert len(in_doubt(watched)) < 0.05*1000


def test_registered_operator():
    z, codebook = random(40, 9), random(30, 9, seed=1)
    for exact in (True, False):
        done = torch.library.opcheck(public.nearest_code_op, (z, codebook, exact, 'triton'))
        assert set(done.values()) == {'SUCCESS'}


def test_compiled_without_a_break():
    f = torch.compile(lambda z, e: e[nearest_code(z, e, backend='triton')] - z, backend='eager' if DEVICE == 'cpu' else 'inductor', fullgraph=True, dynamic=True)
    for n, k in ((40, 30), (77, 65)):
        z, e = random(n, 9), random(k, 9, seed=1)
        assert torch.equal(f(z, e), e[nearest_code_reference(z, e)] - z)


@PRECISIONS
def test_inputs_are_left_alone_and_outputs_are_new(exact):
    z, codebook = random(300, 8), random(80, 8, seed=1)
    before = z.clone(), codebook.clone()
    codes = nearest_code_kernel(z, codebook, exact=exact)
    assert torch.equal(z, before[0]) and torch.equal(codebook, before[1])
    assert codes.untyped_storage().data_ptr() not in (z.untyped_storage().data_ptr(), codebook.untyped_storage().data_ptr())


@PRECISIONS
def test_all_is_written_and_nothing_else(exact, monkeypatch):
    original, made = torch.empty, []

    def poisoned(*shape, dtype=torch.float32, **kwargs):
        count = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape).numel()
        whole = original(count + 128, dtype=dtype, **kwargs).fill_(-77)
        made.append(whole)
        return whole[64:-64].view(*shape)

    z, codebook = random(700, 40), random(70, 40, seed=1)
    monkeypatch.setattr(torch, 'empty', poisoned)
    codes = nearest_code_kernel(z, codebook, exact=exact)
    monkeypatch.undo()
    assert len(made) == 3 and codes.min() >= 0
    for whole in made: assert whole[:64].eq(-77).all() and whole[-64:].eq(-77).all()


def test_autocast_changes_nothing():
    z, codebook = random(200, 64).requires_grad_(), random(100, 64, seed=1)
    with torch.autocast(DEVICE, torch.bfloat16): codes = nearest_code(z, codebook, backend='triton')
    assert torch.equal(codes, nearest_code_reference(z, codebook)) and not codes.requires_grad


class Peak(TorchDispatchMode):
    "Add up the tensors alive, and remember the most."
    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(out):
            if not torch.is_tensor(x): continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive or key in inputs: continue
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self.free, key, size)
        self.most = max(self.most, self.now)
        return out


@PRECISIONS
@pytest.mark.parametrize('d', [64, 257])
def test_memory(d, exact):
    n, k = (2**20, 8192) if DEVICE == 'cuda' else (3000, 1000)
    z, codebook = random(n, d), random(k, d, seed=1)
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        codes = nearest_code_kernel(z, codebook, exact=exact)
        most = torch.cuda.max_memory_allocated() - before
    else:
        gc.collect()
        with Peak() as peak: codes = nearest_code_kernel(z, codebook, exact=exact)
        most = peak.most
    assert len(codes) == n and 8*n < most < 64*n + 64*k*d


def test_bad_input_is_refused_before_any_launch(monkeypatch):
    z, codebook = random(4, 3), random(5, 3)
    for name in ('split_kernel', 'whole_kernel', 'pieces_kernel', 'recheck_kernel'): monkeypatch.setattr(kernels, name, None)
    for bad in ((z, codebook[:0]), (z, codebook[0]), (z[:, :2], codebook), (z.long(), codebook), (z, codebook.long()), (z, codebook.to('meta'))):
        with pytest.raises(ValueError): nearest_code(*bad, backend='triton')
    with pytest.raises(ValueError, match='programs'): nearest_code_kernel(torch.empty(1, 3, device=DEVICE).expand(2**41, 3), codebook)


@pytest.mark.parametrize('capability', [80, 86, 89, 90, 100])
def test_tables_hold_every_width(capability):
    kind = module.family(capability)
    for exact, d in itertools.product((True, False), (*range(1, 600), 1000, 4096)):
        tile, width = module.choose_tile(d, exact, kind)
        assert d <= width < max(33, 2*d) and width % tile.features == 0 and tile.rows % module.SPLIT[True].rows == 0
        assert width == tile.features or tile == module.PIECES[kind, exact]
    names = [c.name for c in module.configurations(capability)]
    assert len(names) == len(set(names)) == 25


def test_configurations_describe_the_launches(monkeypatch):
    launches, described = [], list(module.configurations(90))
    monkeypatch.setattr(module, 'describe', lambda device: module.Device(90, 132))
    for name in ('split_kernel', 'whole_kernel', 'pieces_kernel', 'recheck_kernel'):
        kernel = getattr(kernels, name)

        class Noted:
            def __getitem__(self, grid, kernel=kernel): return lambda *args, **kwargs: launches.append((kernel, args, kwargs))
        monkeypatch.setattr(kernels, name, Noted())
    kinds = {torch.float16: '*fp16', torch.float32: '*fp32', torch.float64: '*fp64', torch.bfloat16: '*bf16', torch.int64: '*i64'}
    for d, exact, dtype in itertools.product((20, 50, 100, 129, 200, 300), (True, False), (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        nearest_code_kernel(random(300, d, dtype=torch.float64).to(dtype), random(40, d), exact=exact)
    for kernel, args, kwargs in launches:
        options = {k: kwargs.pop(k) for k in ('num_warps', 'num_stages')}
        fit = [c for c in described if c.kernel is kernel and c.constants == kwargs and (c.num_warps, c.num_stages) == tuple(options.values())]
        named = dict(zip([a for a in kernel.arg_names if a not in kwargs], args))
        fit = [c for c in fit if all(kinds[named[a].dtype] == t for a, t in c.signature.items() if t.startswith('*'))]
        assert len(fit) == 1, (kernel, kwargs, options)
        for a in fit[0].divisible: assert (named[a].data_ptr() if torch.is_tensor(named[a]) else named[a]) % 16 == 0, a


@cuda
def test_ten_runs_give_the_same_bits():
    z, codebook = random(20000, 64), random(3000, 64, seed=1)
    first = nearest_code_kernel(z, codebook)
    assert all(torch.equal(nearest_code_kernel(z, codebook), first) for _ in range(10))
    fast = nearest_code_kernel(z, codebook, exact=False)
    assert all(torch.equal(nearest_code_kernel(z, codebook, exact=False), fast) for _ in range(10))


@cuda
@PRECISIONS
def test_graph_capture(exact):
    z, codebook = random(5000, 64), random(700, 64, seed=1)
    nearest_code_kernel(z, codebook, exact=exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): codes = nearest_code_kernel(z, codebook, exact=exact)
    z.copy_(random(5000, 64, seed=2))
    graph.replay()
    assert torch.equal(codes, nearest_code_kernel(z, codebook, exact=exact))


@cuda
def test_two_streams():
    inputs = [(random(30000, 64, seed=i), random(2000, 64, seed=i + 10)) for i in range(2)]
    wanted = [nearest_code_reference(*i) for i in inputs]
    streams, found = [torch.cuda.Stream() for _ in inputs], []
    torch.cuda.synchronize()
    for stream, pair in zip(streams, inputs):
        with torch.cuda.stream(stream): found.append([nearest_code_kernel(*pair) for _ in range(5)])
    torch.cuda.synchronize()
    assert all(torch.equal(codes, w) for many, w in zip(found, wanted) for codes in many)

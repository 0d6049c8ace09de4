"""The nearest code without a kernel against float64: awkward shapes, ties, scales, bad input."""
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jointgen.kernels import nearest_code as module
from jointgen.kernels.nearest_code import nearest_code

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]
SIZES_N, SIZES_K, SIZES_D = (0, 1, 2, 127, 128, 129, 1823), (1, 2, 63, 64, 65, 781), (1, 3, 16, 24, 64, 96, 100, 257)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double_loop(z, codebook):
    "The definition, in Python."
    rows, codes = z.double().tolist(), codebook.double().tolist()
    distance = lambda a, b: sum((x - y)**2 for x, y in zip(a, b))
    return torch.tensor([min(range(len(codes)), key=lambda j: (distance(r, codes[j]), j)) for r in rows])


def equal(z, codebook, **kwargs):
    return torch.equal(nearest_code(z, codebook, backend='torch', **kwargs), nearest_code(z, codebook, backend='reference'))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('d', SIZES_D)
def test_shapes(d, device):
    for n, k in itertools.product(SIZES_N, SIZES_K):
        z, codebook = random(n, d).to(device), random(k, d, seed=1).to(device)
        codes = nearest_code(z, codebook)
        assert codes.shape == (n,) and codes.dtype == torch.int64 and codes.device == z.device
        assert equal(z, codebook), (n, k, d)


def test_reference_is_a_double_loop():
    z, codebook = random(40, 5), random(17, 5, seed=1)
    assert nearest_code(z, codebook, backend='reference').tolist() == double_loop(z, codebook).tolist()


def test_leading_axes_and_views():
    z, codebook = random(6, 7, 12), random(33, 12, seed=1)
    flat = nearest_code(z.reshape(42, 12), codebook)
    assert torch.equal(nearest_code(z, codebook), flat.reshape(6, 7))
    assert nearest_code(z[0, 0], codebook).shape == ()
    wide = random(42, 30)
    for view in (z.permute(1, 0, 2), wide[:, 5:17], wide.T[:12].T, wide[:1, :12].expand(9, 12), wide[::3, :12]):
        assert torch.equal(nearest_code(view, codebook), nearest_code(view.clone(), codebook))
    assert torch.equal(nearest_code(z, codebook.T.contiguous().T), flat.reshape(6, 7))


def test_row_stride_beyond_int32():
    storage = torch.empty(2**31 + 128)
    z = storage.as_strided((3, 8), (2**30, 1))
    z.copy_(random(3, 8))
    assert torch.equal(nearest_code(z, random(70, 8, seed=1)), nearest_code(random(3, 8), random(70, 8, seed=1)))


@pytest.mark.parametrize('precision', ['exact', 'fast'])
def test_ties_take_the_lowest_index(precision):
    codebook = random(200, 16).repeat(3, 1)
    codes = nearest_code(random(500, 16, seed=1), codebook, precision=precision)
    assert codes.max() < 200
    assert nearest_code(random(50, 16), torch.ones(130, 16), precision=precision).eq(0).all()
    grid = torch.tensor([[x, y] for x in range(-8, 8, 2) for y in range(-8, 8, 2)], dtype=torch.float32)
    between = torch.tensor([[x, y] for x in range(-8, 7) for y in range(-8, 7)], dtype=torch.float32)
    assert torch.equal(nearest_code(between, grid, precision=precision), double_loop(between, grid))


def test_a_row_equal_to_a_code():
    codebook = random(300, 24)
    assert torch.equal(nearest_code(codebook, codebook), torch.arange(300))


@pytest.mark.parametrize('k,d', [(256, 128), (1024, 256), (8192, 64)])
def test_fresh_codebook(k, d):
    codebook = (torch.rand(k, d, generator=torch.Generator().manual_seed(0))*2 - 1)/k
    assert equal(random(1024, d), codebook)


def test_far_from_zero():
    z, codebook = random(1500, 32) + 10, random(400, 32, seed=1) + 10
    assert equal(z, codebook)
    assert (nearest_code(z, codebook, precision='fast') != nearest_code(z, codebook)).float().mean() < 2e-3


@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e-6, 1e6, 1e15, 1e30])
@pytest.mark.parametrize('precision', ['exact', 'fast'])
def test_scales(scale, precision):
    z, codebook = random(300, 8), random(70, 8, seed=1)
    wrong = nearest_code(z*scale, codebook*scale, precision=precision) != nearest_code(z*scale, codebook*scale, backend='reference')
    assert wrong.sum() <= (0 if precision == 'exact' else 1)


def test_rows_and_codes_of_very_different_size():
    z, codebook = random(100, 8), random(70, 8, seed=1)
    for a, b in ((1e18, 1e-18), (1e-18, 1e18), (1e25, 1.), (1., 1e25)): assert equal(z*a, codebook*b)
    one_far = codebook.clone()
    one_far[3] = 1e12
    assert equal(z, one_far)


@pytest.mark.parametrize('precision,backend', [('exact', 'auto'), ('fast', 'auto'), ('exact', 'reference')])
def test_nan_and_inf(precision, backend):
    z, codebook = random(600, 8), random(70, 8, seed=1)
    find = lambda z, codebook: nearest_code(z, codebook, precision=precision, backend=backend)
    clean = find(z, codebook)
    bad = z.clone()
    bad[5, 2], bad[6], bad[7, 1], bad[8, 1] = torch.nan, torch.nan, torch.inf, -torch.inf
    codes = find(bad, codebook)
    assert codes[5:9].eq(0).all()
    assert torch.equal(torch.cat([codes[:5], codes[9:]]), torch.cat([clean[:5], clean[9:]]))
    broken = codebook.clone()
    broken[clean[0], 3] = torch.nan
    broken[clean[1], 3] = torch.inf
    codes = find(z, broken)
    assert not torch.isin(codes, torch.stack([clean[0], clean[1]])).any()
    keep = ~torch.isin(clean, torch.stack([clean[0], clean[1]]))
    assert torch.equal(codes[keep], clean[keep])
    assert find(z, torch.full((70, 8), torch.nan)).eq(0).all()
    assert find(torch.full((9, 8), torch.nan), codebook).eq(0).all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    z, codebook = random(700, 24).to(dtype), random(90, 24, seed=1)
    assert equal(z, codebook) and equal(z, codebook.to(dtype)) and equal(z.float(), codebook.to(dtype))


def test_float64_is_read_in_full():
    codebook = torch.tensor([[1.], [1. + 2e-12]], dtype=torch.float64)
    assert nearest_code(torch.tensor([[1 + 0.9e-12], [1 + 1.1e-12]], dtype=torch.float64), codebook).tolist() == [0, 1]


def test_certificate_near_a_bisector():
    n, d = 24, 32
    a, b = random(n, d, dtype=torch.float64), random(n, d, seed=1, dtype=torch.float64)
    codebook = torch.cat([a, b]).float()
    for delta in [10.**-i for i in range(1, 13)] + [0.]:
        for sign in (1, -1):
            middle = (codebook[:n].double() + codebook[n:].double())/2
            z = middle + sign*delta*(codebook[n:].double() - codebook[:n].double())
            assert equal(z, codebook) and equal(z.float(), codebook)


def test_share_of_rechecked_rows(monkeypatch):
    rows = []
    original = module.recheck
    monkeypatch.setattr(module, 'recheck', lambda z, *args: rows.append(len(z)) or original(z, *args))
    nearest_code(random(4096, 64), random(1024, 64, seed=1))
    assert 0 < sum(rows) < 0.05*4096


def test_reduced_precision_products_stay_exact():
    z, codebook = random(500, 64), random(300, 64, seed=1)
    torch.set_float32_matmul_precision('medium')
    try:
        assert module.product_rounding(z.device) > 0
        assert equal(z, codebook)
    finally: torch.set_float32_matmul_precision('highest')
    assert module.product_rounding(z.device) == 0


def test_autocast_and_gradients_are_ignored():
    z, codebook = random(500, 64).requires_grad_(), random(300, 64, seed=1).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): codes = nearest_code(z, codebook)
    assert torch.equal(codes, nearest_code(z, codebook, backend='reference')) and not codes.requires_grad


def test_inputs_are_left_alone():
    z, codebook = random(500, 8), random(80, 8, seed=1)
    before = z.clone(), codebook.clone()
    nearest_code(z, codebook)
    assert torch.equal(z, before[0]) and torch.equal(codebook, before[1])


class Peak(TorchDispatchMode):
    "Add up the tensors alive that were made inside, and remember the most."
    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(out):
            if not torch.is_tensor(x): continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive or key in given: continue
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self.free, key, size)
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize('precision', ['exact', 'fast'])
@pytest.mark.parametrize('n,d,k', [(2**14, 64, 2**13), (2**15, 8, 2**10), (2**12, 256, 2**12)])
def test_memory(n, d, k, precision):
    z, codebook = random(n, d), random(k, d, seed=1)
    with Peak() as peak: nearest_code(z, codebook, precision=precision)
    assert 8*n < peak.most < min(2**26, n*k*4/2)


def test_duplicates_stay_within_memory():
    z, codebook = random(600, 64), random(1, 64).expand(4096, 64)
    with Peak() as peak: codes = nearest_code(z, codebook)
    assert codes.eq(0).all() and peak.most <= 2**26


def test_errors():
    z, codebook = random(4, 3), random(5, 3)
    for bad in ((z, codebook[:0]), (z, codebook[0]), (z[:, :2], codebook), (z.long(), codebook), (z, codebook.long()), (torch.tensor(1.), codebook),
                (z, codebook[:, :0]), (z, codebook.to('meta'))):
        with pytest.raises(ValueError): nearest_code(*bad)
    with pytest.raises(ValueError, match='precision'): nearest_code(z, codebook, precision='best')
    with pytest.raises(ValueError, match='backend'): nearest_code(z, codebook, backend='numpy')


def run_python(code, **env):
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'} | env)
    return run.stdout.strip() or run.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    code = ('import torch; from jointgen.kernels.nearest_code import nearest_code\n'
            'try: nearest_code(torch.eye(3), torch.eye(3), backend="triton")\n'
            'except ValueError as e: print(e)')
    said = run_python(code, TRITON_INTERPRET='0')
    assert 'triton' in said.lower() and len(said.splitlines()) == 1 and 'Traceback' not in said


def test_works_without_triton():
    "And without anything but torch."
    code = ('import sys; [sys.modules.__setitem__(m, None) for m in ("triton", "jaxtyping", "einops", "fastcore", "numpy")]\n'
            'import torch, jointgen; from jointgen.kernels.nearest_code import nearest_code\n'
            'print([nearest_code(torch.eye(3), torch.eye(3), backend=b).tolist() for b in ("auto", "torch", "reference")])\n'
            'try: nearest_code(torch.eye(3), torch.eye(3), backend="triton")\n'
            'except ValueError as e: print(e)')
    codes, error = run_python(code).splitlines()
    assert codes == str([[0, 1, 2]]*3) and 'install' in error


def test_environment_is_read_at_call_time(monkeypatch):
    z, codebook = random(4, 3), random(5, 3)
    calls = []
    original = module.nearest_code_reference
    monkeypatch.setattr(module, 'nearest_code_reference', lambda *a: calls.append(1) or original(*a))
    nearest_code(z, codebook)
    assert not calls
    monkeypatch.setenv('JOINTGEN_BACKEND', 'reference')
    nearest_code(z, codebook)
    assert calls
    monkeypatch.setenv('JOINTGEN_BACKEND', 'nowhere')
    with pytest.raises(ValueError, match='nowhere'): nearest_code(z, codebook)
    nearest_code(z, codebook, backend='torch')


@pytest.mark.parametrize('backend', ['torch', 'reference', 'auto'])
def test_registered_operator(backend):
    for exact in (True, False):
        done = torch.library.opcheck(module.nearest_code_op, (random(40, 9), random(30, 9, seed=1), exact, backend))
        assert set(done.values()) == {'SUCCESS'}


@pytest.mark.parametrize('compiler', ['eager', 'aot_eager'])
def test_compiled_without_a_break(compiler):
    f = torch.compile(lambda z, e: e[nearest_code(z, e)] - z, backend=compiler, fullgraph=True, dynamic=True)
    for n, k in ((40, 30), (77, 65)):
        z, e = random(n, 9), random(k, 9, seed=1)
        assert torch.equal(f(z, e), e[nearest_code(z, e, backend='reference')] - z)


def test_fake_tensors_and_meta():
    with torch._subclasses.FakeTensorMode():
        assert nearest_code(torch.empty(6, 7, 4), torch.empty(5, 4)).shape == (6, 7)

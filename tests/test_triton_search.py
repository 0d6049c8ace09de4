"""The kernels of the nearest code, one by one: halves of rows and codes, the bound on a score, the work list, the recheck."""
import os

import pytest
import torch

pytest.importorskip('triton')
if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')  # read when a kernel is decorated

from jointgen.kernels.backend import interpreting  # noqa: E402
from jointgen.kernels.nearest_code import nearest_code_reference  # noqa: E402
from jointgen.kernels.triton_search import Tile, make_rows, prepare, recheck_rows, search_rows, split_rows  # noqa: E402

DEVICE = 'cpu' if interpreting() else 'cuda'
SPLIT, WHOLE, PIECES, RECHECK = Tile(64, 0, 16, 4, 1), Tile(64, 64, 64, 4, 1), Tile(64, 64, 16, 4, 1), Tile(16, 32, 16, 4, 1)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def halves_of(z, table, exact=True, width=64):
    count = -(-len(z)//64)*64
    rows = make_rows(count, width, exact, z.device)
    split_rows(z, table, rows, SPLIT, first=0, count=count, exact=exact)
    return rows


def search(z, codebook, tile=WHOLE, exact=True):
    table = prepare(codebook, tile, 64, exact)
    rows = halves_of(z, table, exact)
    codes, work = torch.full((len(z),), -1, device=DEVICE), torch.zeros(len(z) + 1, dtype=torch.int64, device=DEVICE)
    search_rows(rows, table, codes, work, tile, first=0, count=len(rows.unit), exact=exact)
    return codes, work


@pytest.mark.parametrize('scale', [1e-20, 1., 1e15])
def test_codebook_in_halves(scale):
    codebook = (random(70, 50) + 3)*scale
    table = prepare(codebook, WHOLE, 64, True)
    assert table.high.shape == table.low.shape == (128, 64) and table.high.dtype == torch.float16
    back = ((table.high.double() + table.low.double())[:70, :50] + table.shift[:50].double())/table.bound[0].double()
    assert (back - codebook.double()).abs().max() < 2**-20*codebook.abs().max()
    assert table.half[70:].isinf().all() and table.high[70:].eq(0).all() and table.high[:, 50:].eq(0).all()
    assert 2**13 <= table.high.double().norm(dim=1).max() <= 2**14 + 16


def test_codes_that_are_not_finite():
    codebook = random(70, 50)
    codebook[3, 1], codebook[5, 2] = torch.nan, torch.inf
    table = prepare(codebook, WHOLE, 64, True)
    assert table.half.isinf()[:70].nonzero()[:, 0].tolist() == [3, 5]
    assert all(x.isfinite().all() for x in (table.high, table.low, table.shift, table.bound))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [1e-4, 1., 1e4])
def test_rows_in_halves(size, dtype):
    z, table = (random(100, 50)*size).to(dtype), prepare(random(70, 50, seed=1), WHOLE, 64, True)
    rows = halves_of(z, table)
    x = z.double()*table.bound[0].double() - table.shift[:50].double()
    back = (rows.high.double() + rows.low.double())[:100, :50]*rows.unit[:100, None].double()
    assert ((back - x).norm(dim=1) <= 2**-20*x.norm(dim=1)).all()
    assert rows.high[:, 50:].eq(0).all() and rows.high.isfinite().all()
    slack = table.bound[1].double()*x.norm(dim=1) + table.bound[2].double()
    assert torch.allclose(rows.slack[:100].double(), slack, rtol=1e-5)


def test_rows_of_a_later_part():
    z, table = random(300, 50), prepare(random(70, 50, seed=1), WHOLE, 64, True)
    whole, part = halves_of(z, table), make_rows(64, 64, True, z.device)
    split_rows(z, table, part, SPLIT, first=128, count=64, exact=True)
    assert all(torch.equal(a[128:192], b) for a, b in zip(whole, part))


def test_strides_do_not_matter():
    z, table = random(100, 50), prepare(random(70, 50, seed=1), WHOLE, 64, True)
    for view in (z.T.contiguous().T, z.repeat(1, 2)[:, :50], z.repeat_interleave(2, 0)[::2]):
        assert all(torch.equal(a, b) for a, b in zip(halves_of(z, table), halves_of(view, table)))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_are_marked(bad):
    z, table = random(100, 50), prepare(random(70, 50, seed=1), WHOLE, 64, True)
    clean = halves_of(z, table)
    z[7, 3] = bad
    rows = halves_of(z, table)
    assert rows.slack[7].isinf() and all(x.isfinite().all() for x in rows[:3])
    assert torch.equal(rows.slack[8:], clean.slack[8:]) and torch.equal(rows.high[:7], clean.high[:7])


@pytest.mark.parametrize('tile', [WHOLE, PIECES], ids=['whole', 'pieces'])
def test_search_and_work_list(tile):
    z, codebook = random(150, 50), random(130, 50, seed=1)
    z[:5] = (codebook[:5] + codebook[5:10])/2
    codes, work = search(z, codebook, tile)
    doubt = work[1:1 + work[0]]
    assert set(range(5)) <= set(doubt.tolist()) and len(doubt) < 15 and len(set(doubt.tolist())) == len(doubt)
    sure = torch.ones(150, dtype=torch.bool, device=DEVICE).index_fill_(0, doubt, False)
    assert torch.equal(codes[sure], nearest_code_reference(z, codebook)[sure])
    assert work[1 + work[0]:].eq(0).all()
    fast, work = search(z, codebook, tile, exact=False)
    assert work.eq(0).all() and (fast != nearest_code_reference(z, codebook)).sum() <= 8


@pytest.mark.parametrize('listed', [[], [0], [3, 99, 41], list(range(100))])
@pytest.mark.parametrize('programs', [1, 5])
def test_recheck_touches_only_what_is_listed(listed, programs):
    z, codebook = random(100, 50), random(70, 50, seed=1)
    z[3, 0] = torch.nan
    codes = torch.full((100,), -1, device=DEVICE)
    work = torch.tensor([len(listed), *listed, *[0]*(100 - len(listed))], device=DEVICE)
    recheck_rows(z, codebook.half(), codes, work, RECHECK, programs=programs)
    truth = nearest_code_reference(z, codebook.half())
    assert all(codes[i] == (truth[i] if i in listed else -1) for i in range(100))


def add_truncated(total, products, width):
    "Add products [... m] the way a tensor core may: `width` at a time, each cut to 23 bits below the largest."
    for part in products.split(width, -1):
        terms = torch.cat([total[..., None], part], -1)
        unit = torch.exp2(torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent.double() - 24)
        total = (torch.trunc(terms/unit)*unit).sum(-1)
        unit = torch.exp2(torch.frexp(total).exponent.double() - 24)
        total = torch.trunc(total/unit)*unit
    return total


@pytest.mark.parametrize('width', [4, 8, 16])
@pytest.mark.parametrize('d', [7, 64, 256])
@pytest.mark.parametrize('kind', ['random', 'aligned', 'one big'])
def test_certificate_holds_for_tensor_cores_that_truncate(kind, d, width):
    z, codebook = random(24, d).cpu(), random(20, d, seed=1).cpu()
    if kind == 'aligned': z, codebook = z.abs() + 0.5, codebook.abs()*torch.tensor([[-1.], [1.]]).repeat(10, 1)
    if kind == 'one big': z[:, d//2], codebook[:, d//2] = 30., torch.linspace(20, 21, 20)
    table = prepare(codebook, WHOLE, 256, True)
    x = (z*table.bound[0] - table.shift[:d]).float()
    unit = torch.exp2(torch.frexp(x.abs().amax(1, keepdim=True)).exponent.float() - 14)
    high = (x/unit).half()
    low = (x/unit - high.float()).half().double()[:, None]
    high, e_high, e_low = high.double()[:, None], table.high[:20, :d].double(), table.low[:20, :d].double()
    small = add_truncated(add_truncated(torch.zeros(24, 20, dtype=torch.float64), low*e_high, width), high*e_low, width)
    together = add_truncated(small, high*e_high, width)
    apart = (add_truncated(torch.zeros_like(small), high*e_high, width) + small).float().double()
    scale, shift = table.bound[0].double(), table.shift[:d].double()
    exact = table.half[:20].double() - (z.double()*scale - shift) @ (codebook.double()*scale - shift).T
    allowed = (table.bound[1]*x.norm(dim=1, keepdim=True) + table.bound[2]).double()/2
    for dots in (together, apart):
        score = (table.half[:20].double() - unit.double()*dots).float().double()
        assert ((score - exact).abs() <= allowed).all()

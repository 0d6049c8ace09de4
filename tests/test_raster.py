"""The raster: published sizes of every row and column, pictures that pass no gradient on, gates, conditional and blind verdicts, bad input."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jointgen.game_nets import Judged
from jointgen.raster import GLU, CodeDiscriminator, GatedResBlock, Join, RasterGenerator, Stage, TreeGenerator, mix, normalised_code, row_widths, tower, up

TINY = dict(width=16, squeeze=3, thin=2)
PAPER = dict(d_codes=(64, 128, 256), rows=((16, 32, 64), (32, 64, 128), (64, 128, 256)))
count = lambda net: sum(p.numel() for p in net.parameters())


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def codes(*widths, b=4): return [torch.rand(b, w, generator=seeded()) for w in widths]


# --- codes and blocks


def test_codes_forget_the_length_and_keep_the_shares():
    theta = torch.rand(4, 9, generator=seeded())
    one = normalised_code(theta, 15.)
    torch.testing.assert_close(one, normalised_code(theta*7, 15.))
    torch.testing.assert_close(one.expm1().sum(1), torch.full((4,), 15.))
    assert (normalised_code(torch.zeros(2, 9), 15.) == 0).all()


def test_gate_is_the_gate():
    x = torch.randn(3, 8, 4, 4, generator=seeded())
    torch.testing.assert_close(GLU()(x), F.glu(x, 1))
    last = x.contiguous(memory_format=torch.channels_last)
    assert GLU()(last).is_contiguous(memory_format=torch.channels_last)
    assert GLU()(torch.zeros(2, 6)).shape == (2, 3)


def test_blocks():
    x = torch.randn(2, 6, 4, 4, generator=seeded())
    assert mix(6, 5)(x).shape == (2, 5, 4, 4) and up(6, 5)(x).shape == (2, 5, 8, 8)
    block = GatedResBlock(6)
    nn.init.zeros_(block.net[-1].weight)
    assert torch.equal(block(x), x)
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize('squeeze', [0, 3])
def test_a_stage_hears_the_code_again(squeeze):
    torch.manual_seed(0)
    stage, x, code = Stage(6, 4, 7, squeeze=squeeze), torch.randn(4, 6, 4, 4), codes(7)[0]
    assert stage(x, code).shape == (4, 4, 8, 8)
    assert not torch.equal(stage(x, code), stage(x, code.flip(0)))
    assert stage.net[0][0].in_channels == 6 + (squeeze or 7)


# --- widths


@pytest.mark.parametrize('scales, width, widths', [((8, 16, 32), 64, [64, 32, 16, 16]), ((64, 128, 256), 1024, [1024, 512, 256, 128, 64, 32, 16]), ((8,), [5, 4], [5, 4])])
def test_row_widths(scales, width, widths): assert row_widths(scales, width) == widths


@pytest.mark.parametrize('scales', [(), (8, 32), (8, 12), (4, 8), (16, 8), (8, 8), (8., 16.)])
def test_scales_that_do_not_double(scales):
    for make in (lambda: row_widths(scales, 16), lambda: TreeGenerator(5, scales), lambda: RasterGenerator((5,), (scales,))):
        with pytest.raises(ValueError, match='twice the one before'): make()


def test_widths_that_do_not_fit():
    with pytest.raises(ValueError, match='3 numbers fit pictures up to 16 px'): TreeGenerator(5, (8, 16), width=(8, 8))


# --- the tree


@pytest.mark.parametrize('scales', [(8,), (8, 16), (16, 32), (8, 16, 32)])
@pytest.mark.parametrize('options', [{}, dict(squeeze=0), dict(blocks=2), dict(output='tanh')], ids=str)
def test_tree_shapes(scales, options):
    torch.manual_seed(0)
    pictures = TreeGenerator(7, scales, **TINY | options)(codes(7)[0])
    assert [tuple(x.shape) for x in pictures] == [(4, 3, s, s) for s in scales] and all(x.dtype == torch.float32 for x in pictures)
    if options.get('output') == 'tanh': assert all(x.abs().max() <= 1 for x in pictures)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_each_picture_teaches_the_start(at):
    torch.manual_seed(0)
    net = TreeGenerator(7, (8, 16, 32), **TINY)
    net(codes(7)[0])[at].square().mean().backward()
    assert net.start[0].weight.grad.abs().sum() > 0
    assert [h.head.weight.grad is not None for h in net.heads] == [i == at for i in range(3)]


def test_tree_runs_in_bfloat16_and_answers_in_float32():
    torch.manual_seed(0)
    net = TreeGenerator(7, (8, 16), **TINY).to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16): pictures = net(codes(7)[0])
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in pictures)


# --- the raster


@pytest.mark.parametrize('rows', [((8, 16), (16, 32)), ((8,), (16,), (32,)), ((8, 16), (8, 16, 32)), ((16, 32), (32, 64))])
def test_raster_shapes(rows):
    torch.manual_seed(0)
    widths = (5, 7, 9)[:len(rows)]
    painted = RasterGenerator(widths, rows, **TINY)(codes(*widths))
    assert [[tuple(x.shape) for x in row] for row in painted] == [[(4, 3, s, s) for s in row] for row in rows]


def test_no_gradient_crosses_rows():
    torch.manual_seed(0)
    net, said = RasterGenerator((5, 7, 9), ((8,), (8, 16), (16, 32)), **TINY), [c.requires_grad_() for c in codes(5, 7, 9)]
    for row in range(3):
        net.zero_grad()
        loss = sum(x.square().mean() for x in net(said)[row])
        slopes = torch.autograd.grad(loss, [*said, *net.parameters()], allow_unused=True)
        assert [s is not None for s in slopes[:3]] == [i == row for i in range(3)]
        owned = [i for i, part in enumerate(net.nets) for _ in part.parameters()]
        assert all((s is not None and s.abs().sum() > 0) == (i == row) for i, s in zip(owned, slopes[3:]))


def test_a_row_paints_on_what_the_row_before_painted():
    torch.manual_seed(0)
    net, said = RasterGenerator((5, 9), **TINY).eval(), codes(5, 9)
    with torch.no_grad():
        a, b = net(said), net([said[0].flip(0), said[1]])
        assert not torch.equal(a[1][-1], b[1][-1])
        assert torch.equal(net([said[0], said[1].flip(0)])[0][-1], a[0][-1])  # but not the other way round


def test_paper_sizes_of_every_row_and_column():
    with torch.device('meta'):
        net = RasterGenerator(**PAPER, width=(256, 512, 1024), blocks=2, squeeze=0, thin=2, output='tanh')
        judges = [[CodeDiscriminator(s, d, width=w, code='tile', base=64) for s in row] for row, d, w in zip(net.rows, net.d_codes, (128, 256, 512))]
        painted = net([torch.zeros(2, d) for d in net.d_codes])
        looks = [[judge(x).features.shape for judge, x in zip(*both)] for both in zip(judges, painted)]
    assert [[x.shape[-1] for x in row] for row in painted] == [list(row) for row in PAPER['rows']]
    assert looks == [[(2, w, 4, 4)]*3 for w in (128, 256, 512)]
    assert [[m for m in (part.widths[0], part.widths[2], part.widths[-1])] for part in net.nets] == [[256, 64, 16], [512, 128, 16], [1024, 256, 16]]
    for part, millions in zip(net.nets, (1.8, 7.0, 26.6)): assert abs(count(part)/1e6 - millions) < .1
    published = [[.36, 1.17, 4.45], [1.54, 4.82, 17.9], [6.3, 19.4, 71.8]]
    for row, sizes in zip(judges, published):
        for judge, millions in zip(row, sizes): assert abs(count(judge)/1e6 - millions) < .1
    channels = [[m.out_channels for part in net.nets[i].join.read for m in part.modules() if isinstance(m, nn.Conv2d)] for i in (1, 2)]
    assert channels == [[4, 4, 8], [4, 4, 8, 16]]  # 2 twice, before the gate


def test_paper_sizes_of_the_tree():
    with torch.device('meta'):
        net = TreeGenerator(256, (64, 128, 256), width=1024, blocks=2, squeeze=0, output='tanh')
        assert [x.shape[-1] for x in net(torch.zeros(2, 256))] == [64, 128, 256]
        judges = [CodeDiscriminator(s, 256, width=512, code='tile', base=64) for s in (64, 128, 256)]
    assert abs(count(net)/1e6 - 21.8) < .1 and abs(sum(map(count, judges))/1e6 - 97.5) < .2
    assert [m.out_channels for m in judges[2].trunk.modules() if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 1024, 2048, 1024, 512]


def test_bad_rows():
    with pytest.raises(ValueError, match='2 codes meet 1 rows'): RasterGenerator((5, 7), ((8, 16),))
    with pytest.raises(ValueError, match='sides that never shrink fit'): RasterGenerator((5, 7), ((8, 16), (8,)))
    assert [[x.shape[-1] for x in row] for row in RasterGenerator((5, 7), ((8, 16), (8, 16)), width=16)([torch.rand(2, 5), torch.rand(2, 7)])] == [[8, 16], [8, 16]]
    with pytest.raises(ValueError, match='end the row before at 16 px or more'): RasterGenerator((5, 7), ((8,), (32, 64)))
    with pytest.raises(ValueError, match='width has 3 entries, 2 fit'): RasterGenerator((5, 7), width=(8, 8, 8))
    with pytest.raises(ValueError, match='the next row meets it at 8 px'): Join(12, 8, 4)


def test_bad_codes_and_pictures():
    net = RasterGenerator((5, 9), **TINY)
    with pytest.raises(ValueError, match='codes have 9 numbers, 5 fits'): net(codes(9, 5))
    with pytest.raises(ValueError, match='1 codes meet 2 rows'): net(codes(5))
    with pytest.raises(ValueError, match='16 px fits'): net.nets[1](codes(9)[0])
    with pytest.raises(ValueError, match='16 px fits'): net.nets[1](codes(9)[0], torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match='none fits'): net.nets[0](codes(5)[0], torch.zeros(4, 3, 8, 8))


# --- discriminators


@pytest.mark.parametrize('options', [{}, dict(code='tile'), dict(patches=5), dict(code='tile', base=4)], ids=str)
@pytest.mark.parametrize('side', [8, 16, 32])
def test_one_look_serves_several_codes(side, options):
    torch.manual_seed(0)
    net = CodeDiscriminator(side, 7, width=8, **options).eval()
    image, (code,) = torch.rand(4, 3, side, side, generator=seeded())*2 - 1, codes(7)
    code.requires_grad_()
    seen = net(image)
    r = options.get('patches', 1)
    assert isinstance(seen, Judged) and seen.local.shape == (4, r, r) and seen.features.shape == (4, 8, 4, 4)
    right, wrong = net.match(seen.features, code), net.match(seen.features, code.flip(0))
    assert right.shape == (4,) and not torch.equal(right, wrong) and right.dtype == seen.local.dtype == torch.float32
    assert torch.autograd.grad(seen.local.sum(), code, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(right.sum(), code)[0].abs().sum() > 0


def test_towers():
    outs = lambda net: [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert outs(tower(16, 64, 128)) == [64, 128] and outs(tower(32, 64, 128)) == [64, 128, 256, 128] and outs(tower(8, 4, 16)) == [4, 16]
    assert tower(32, 4, 8)(torch.zeros(2, 3, 32, 32)).shape == (2, 8, 4, 4) and not isinstance(tower(16, 4, 8)[0][1], nn.BatchNorm2d)


def test_discriminator_bad_input():
    with pytest.raises(ValueError, match="'map' or 'tile' fit"): CodeDiscriminator(16, 7, code='film')
    with pytest.raises(ValueError, match="patches=1 and code='tile' fit"): CodeDiscriminator(16, 7, base=64)
    with pytest.raises(ValueError, match='a power of two from 8 on'): CodeDiscriminator(24, 7)
    net = CodeDiscriminator(16, 7, width=8)
    with pytest.raises(ValueError, match='codes have 9 numbers, 7 fits'): net.match(net(torch.zeros(2, 3, 16, 16)).features, codes(9, b=2)[0])
    with pytest.raises(ValueError, match=r'\[3, 16, 16\] fits'): net(torch.zeros(2, 3, 8, 8))


# --- together


def test_one_batch_is_learned():
    torch.manual_seed(0)
    net, said = RasterGenerator((5, 9), **TINY), codes(5, 9)
    target = torch.rand(4, 3, 32, 32, generator=seeded())*2 - 1
    optimizer, losses = torch.optim.Adam(net.parameters(), 5e-3), []
    for _ in range(25):
        loss = sum((x - F.adaptive_avg_pool2d(target, x.shape[-1])).square().mean() for row in net(said) for x in row)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .5*losses[0]

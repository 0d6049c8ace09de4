"""The arithmetic of affine maps in plain torch: numbers in the tails, halves, blocks, gradients from the output."""
from itertools import product

import pytest
import torch

from jointgen.kernels.affine import BOUNDS, Affine, affine_backward, affine_forward, affine_reference, blocks, halves, log_scale, put, scales


def test_large_batches_come_in_blocks():
    c = torch.empty(2**18 + 5, 1).expand(-1, 3)
    sizes = [len(part) for part, _ in blocks(c, None)]
    assert sum(sizes) == len(c) and (len(sizes) > 1) == (2**18*torch.get_num_threads()//3 < len(c))


@pytest.mark.parametrize('bound', BOUNDS)
def test_scales_over_all_magnitudes(bound):
    size = torch.logspace(-30, 1.5, 400)
    raw = torch.cat([torch.linspace(-80, 80, 2001), size, -size])
    raw, how = raw if bound != 'exp' else raw.clamp(-80, 80), Affine(bound)
    wide = ((raw + 2).double() - 2 if bound == 'sigmoid' else raw.double()).requires_grad_()  # r + 2 is rounded first
    exact = log_scale(wide, how)
    slope, = torch.autograd.grad(exact.sum() + 0*wide.sum(), wide)
    exact = exact.detach()
    s, l = scales(raw, how)
    assert (s.double()/exact.exp() - 1).abs().max() < 1e-5  # the exponential of a rounded number as large as 80
    assert ((l.double() - exact).abs() <= 5e-7*exact.abs() + 2.5e-7*(bound == 'tanh')).all()  # the sigmoid rounds at 1/2
    assert (scales(raw, how, slope=True)[1].double() - slope).abs().max() < 5e-7


def test_halves():
    x = torch.arange(6.).view(1, 6)
    assert [v.tolist() for v in halves(x, False, False)] == [[[0., 1., 2.]], [[3., 4., 5.]]]
    assert [v.tolist() for v in halves(x, True, False)] == [[[3., 4., 5.]], [[0., 1., 2.]]]
    assert halves(x, True, True) == (None, x)


def test_put():
    row, full = torch.ones(2), torch.full((3, 2), torch.nan)
    for out in (row, full, None): put(out, torch.full((3, 2), 2.), torch.tensor([1., -1.]))
    assert row.tolist() == [7., -5.] and full.tolist() == [[2., -2.]]*3


@pytest.mark.parametrize('bound,swap,inverse,norm,step', [v for v in product(BOUNDS, (True, False), (True, False), ('none', 'rows', 'one'), (True, False)) if not (v[4] and v[3] == 'none')])
def test_backward_from_the_output_is_that_of_autograd(bound, swap, inverse, norm, step):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()  # noqa: E731
    b, h, how = 5, 3, Affine(bound, 1.5, swap, inverse)
    shape = dict(none=None, rows=(b, h), one=(h,))[norm]
    given = draw(b, h if step else 2*h), None if step else draw(b, 2*h), *(2*[None] if shape is None else (draw(*shape), draw(1, *shape)[0]))
    y, logdet = affine_reference(*given, how)
    tensors = [v for v in given if v is not None]
    wanted = iter(torch.autograd.grad(y.sin().sum() + logdet.sin().sum() + sum(0*v.sum() for v in tensors), tensors))
    with torch.no_grad():
        ours = affine_forward(*given, how)
        assert torch.allclose(ours[0], y) and torch.allclose(ours[1], logdet)
        found = affine_backward(y, *given[1:], y.cos(), logdet.cos(), how, True)
    for a, b in zip(found[:4], given):
        assert (a is None) == (b is None)
        if b is not None: assert torch.allclose(a, next(wanted))
    assert torch.allclose(found.input, given[0])
    with torch.no_grad(): assert affine_backward(y, *given[1:], y, logdet, how).input is None

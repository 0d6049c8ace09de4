"""The expressions that the kernels are held against: right, and as wasteful as they are in the wild."""
import pytest
import torch

pytest.importorskip("triton")

from jointgen.kernels import baselines as b  # noqa: E402
from jointgen.kernels.baselines import Traffic, Way, installed, nearest_ways, passes  # noqa: E402
from jointgen.kernels.codebook import code_statistics, quantize  # noqa: E402
from jointgen.kernels.nearest_code import nearest_code  # noqa: E402


@pytest.fixture
def codes():
    g = torch.Generator().manual_seed(0)
    z, e = torch.randn(257, 12, generator=g), torch.randn(65, 12, generator=g)
    return z, e, nearest_code(z, e)


def test_nearest_expressions(codes):
    z, e, truth = codes
    for f in b.three_terms, b.by_cdist, b.by_addmm:
        assert torch.equal(f(z.double(), e.double()), truth)
    for way in nearest_ways("cpu"):
        assert torch.equal(way.result(way.run(*way.arguments((z, e)))), truth), way.name


def test_statistics_expressions(codes):
    z, e, truth = codes
    for f in b.one_hot_statistics, b.added_statistics:
        for got, want in zip(f(z.double(), truth, 70), code_statistics(z.double(), truth, 70)):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradients_as_published(codes, gradient):
    z, e, truth = codes
    z, e = z.double().requires_grad_(), e.double().requires_grad_()
    found = []
    for f in b.eager_quantize, quantize:
        out, loss = f(z, e, truth, gradient=gradient)[:2]
        found.append((out, loss, *torch.autograd.grad((out * torch.arange(12)).sum() + loss, (z, e))))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which, outputs", [("forward", 2), ("backward", 2), ("both", 4)])
def test_couplings(which, outputs):
    g = torch.Generator().manual_seed(1)
    x, p, gy, gl = (torch.randn(9, 14, dtype=torch.float64, generator=g) for _ in range(3)), None, None, None
    x, p, gy = x
    inputs = (x, p) if which == "forward" else (x, p, gy, torch.randn(9, dtype=torch.float64, generator=g))
    ways = [passes("chain", b.coupling_chain, which), passes("ours", b.fused_coupling, which)]
    if not installed("normflows")["normflows"]:
        ways.append(passes("normflows", b.normflows_coupling, which, before=b.in_turn, after=b.in_halves))
    for way in ways:
        result = way.result(way.run(*way.arguments(inputs)))
        assert len(result) == outputs
        for got, want in zip(result, ways[0].run(*ways[0].arguments(inputs))):
            torch.testing.assert_close(got, want)
    assert not x.requires_grad and not p.requires_grad


def test_backward_alone_may_run_again():
    x = torch.randn(4, 6)
    way = passes("ours", b.fused_coupling, "backward")
    arguments = way.arguments((x, x, x, x[:, 0]))
    first, second = way.run(*arguments), way.run(*arguments)
    assert all(map(torch.equal, first, second))


def test_orders_of_parameters():
    p = torch.randn(3, 10)
    assert torch.equal(b.in_halves(b.in_turn(p)), p) and not torch.equal(b.in_turn(p), p)


def test_traffic():
    x = torch.ones(100)
    for f, moved in (lambda: x + x, 1200), (lambda: x.view(10, 10).t(), 0), (lambda: x.clone(), 800), (lambda: torch.empty(100), 0), (lambda: x.sum(), 404):
        with Traffic() as traffic:
            f()
        assert traffic.moved == moved
    y = x.clone()
    with Traffic() as traffic:
        y.add_(x)
    assert traffic.moved == 1200


def test_what_is_installed():
    told = installed("torch", "no_such_library")
    assert told["torch"] == "" and "not installed" in told["no_such_library"]


def test_a_library_that_breaks_is_told(tmp_path, monkeypatch):
    (tmp_path / "breaks_at_once.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("breaks_at_once")["breaks_at_once"] == "cannot be imported (OSError: no driver)"


def test_ways():
    way = Way("w", lambda x: x + 1, setup=lambda x: (2 * x,), restore=lambda y: -y)
    assert way.result(way.run(*way.arguments((3,)))) == -7
    assert {w.name for w in nearest_ways("cuda") if w.ours} == {"ours, exact", "ours, fast"}
    for precision in "float32", "tf32", "bfloat16 in":
        assert sum(w.precision == precision and not w.ours for w in nearest_ways("cuda")) == 3


def test_compiled_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    assert len(nearest_ways("cuda", compiled=True)) == len(nearest_ways("cuda")) + 2
    assert asked[0] == dict(dynamic=False, mode="max-autotune-no-cudagraphs")
    nearest_ways("cpu", compiled=True)
    assert asked[2] == dict(dynamic=False)

"""The clock, the memory and the refusal to time what is wrong."""
import os
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

from jointgen.kernels import measure as m  # noqa: E402
from jointgen.kernels.baselines import Way, three_terms  # noqa: E402
from jointgen.kernels.cases import coupling_case, nearest_case, quantize_case, statistics_case  # noqa: E402
from jointgen.kernels.measure import ceilings, cpu_peak, cpu_times, examine, measure, truth_of  # noqa: E402
from jointgen.kernels.nearest_code import nearest_code  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case():
    return nearest_case("cpu", 300, 8, 40)


def planted(z, e):
    codes = nearest_code(z, e)
    codes[-1] = (codes[-1] + 1) % len(e)
    return codes


def test_a_wrong_kernel_is_never_timed(case, monkeypatch):
    timed = []
    times = m.cpu_times
    monkeypatch.setattr(m, "cpu_times", lambda calls, rounds: timed.append(len(calls)) or times(calls, rounds))
    bad = case._replace(ways=[Way("ours, exact", planted, ours=True), *case.ways[1:]])
    rows = measure(bad, rounds=1)
    assert rows[0]["refused"] == "1 wrong codes" and "ms" not in rows[0] and "gbs" not in rows[0]
    assert timed == [len(case.ways) - 1] and all("ms" in r for r in rows[1:])
    assert "refused" not in measure(bad, rounds=1, check=False)[0]


@pytest.mark.parametrize("make", [statistics_case, quantize_case, coupling_case])
def test_wrong_tensors_are_refused(make):
    case = coupling_case("cpu", 50, 8) if make is coupling_case else make(200, 4, 16)
    ours = case.ways[0]
    for place in range(len(ours.run(*ours.arguments(case.make(torch.Generator().manual_seed(0)))))):
        def broken(*inputs, place=place):
            out = list(ours.run(*inputs))
            out[place] = out[place] * (1 + 1e-4)
            return tuple(out)
        rows = measure(case._replace(ways=[ours._replace(run=broken), *case.ways[1:]]), rounds=1)
        assert "a result is off by" in rows[0]["refused"], place
        assert all("ms" in r for r in rows[1:])


def test_rows(case):
    rows = measure(case, rounds=2)
    assert [r["way"] for r in rows] == [w.name for w in case.ways]
    for r in rows:
        assert r["operation"] == "nearest code" and r["size"] == dict(n=300, d=8, k=40) and r["wrong"] == 0 and r["repeatable"]
        assert r["ms"] > 0 and r["gbs"] == pytest.approx(case.least / r["ms"] / 1e6) and r["tflops"] == pytest.approx(case.flops / r["ms"] / 1e9)
        assert ("moved_mib" in r) != r["ours"] and ("times_faster" in r) == r["ours"]
    assert rows[0]["times_faster"]["published, float32"] == pytest.approx(rows[2]["ms"] / rows[0]["ms"])
    assert rows[2]["moved_mib"] > 8 * 300 * 40 * 4 / 2**20 > rows[2]["peak_mib"] > 2 * 300 * 40 * 4 / 2**20


def test_what_cannot_run_is_told(case):
    def greedy(z, e): raise torch.OutOfMemoryError("no room")
    def other(z, e): raise ImportError("another version")
    rows = measure(case._replace(ways=[*case.ways, Way("greedy", greedy), Way("other", other)]), rounds=1)
    assert "no room" in rows[-2]["absent"] and "another version" in rows[-1]["absent"] and "ms" not in rows[-1]


def test_it_is_its_own_reference(case):
    inputs = case.make(torch.Generator().manual_seed(0))
    double = Way("double", lambda z, e: (2 * z, z.sum(1)), own=True)
    tensors = case._replace(judge="tensors")
    facts = examine(tensors, double, inputs, ((), truth_of(case, inputs)[1]))[1]
    assert facts["error"] < 1e-6 and "refused" not in facts


def test_unrepeatable_is_noted(case):
    calls = []
    def moody(z, e):
        calls.append(1)
        codes = three_terms(z, e)
        return codes if len(calls) % 2 else codes.flip(0)
    inputs = case.make(torch.Generator().manual_seed(0))
    assert examine(case, Way("moody", moody), inputs, truth_of(case, inputs))[1]["repeatable"] is False


def test_precision_is_restored():
    way = Way("", None, "tf32")
    assert m.at_precision(way, torch.get_float32_matmul_precision) == "high"
    with pytest.raises(KeyError):
        m.at_precision(way, lambda: {}["x"])
    assert torch.get_float32_matmul_precision() == "highest"


def test_turns_are_taken():
    order = []
    times = cpu_times([lambda: order.append("a"), lambda: order.append("b")], 4, least=0.)
    assert [len(t) for t in times] == [4, 4] and "".join(order[4:]) == "abbaabba"


def test_processor_time_ignores_sleep():
    assert max(cpu_times([lambda: time.sleep(0.02)], 2)[0]) < 10


def test_peak_memory():
    n = 2**18
    assert cpu_peak(lambda: torch.empty(n)) == 4 * n
    assert cpu_peak(lambda: (torch.empty(n), torch.empty(n))) == 8 * n
    assert cpu_peak(lambda: [torch.zeros(n).sum() for _ in range(4)]) < 5 * n
    x = torch.randn(n, requires_grad=True)
    assert cpu_peak(lambda: torch.autograd.grad(x.sin().cos().sum(), x)) >= 8 * n


def test_apart():
    here = []
    assert m.apart(lambda: here.append(1) or [{"x": 1.5}]) == [{"x": 1.5}]
    assert here == ([] if sys.platform == "linux" else [1])
    if sys.platform == "linux":
        assert m.apart(os.getpid) != os.getpid()
        with pytest.raises(RuntimeError, match="broke its process off"):
            m.apart(lambda: os._exit(3))


def test_ceilings():
    found = ceilings(quick=True)
    assert found["copy_gbs"] > 0 and found["product_tflops"]["float32"] > 0


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
def test_on_a_gpu():
    for case in nearest_case("cuda", 4096, 64, 1024), coupling_case("cuda", 128, 64):
        rows = measure(case, "cuda")
        assert all(r.get("ms", 1) > 0 for r in rows) and all("ms" in r for r in rows if r["ours"])
        assert any("graph_ms" in r for r in rows if r["ours"])


@cuda
def test_a_wrong_kernel_is_refused_on_a_gpu():
    case = nearest_case("cuda", 4096, 64, 1024)
    assert measure(case._replace(ways=[Way("ours, exact", planted, ours=True)]), "cuda")[0]["refused"]

"""What is measured, and who calls a result wrong."""
import pytest
import torch

pytest.importorskip("triton")

from jointgen.kernels.baselines import Way  # noqa: E402
from jointgen.kernels.cases import (  # noqa: E402
    all_cases, coupling_case, distance_to, judge_codes, judge_tensors, nearest_case, nearest_data, nearest_in_float64, quantize_case, statistics_case, tolerance)
from jointgen.kernels.nearest_code import nearest_code  # noqa: E402

ANY, EXACT = Way("any", None, ours=True), Way("ours, exact", None, ours=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("data", ["normal", "fresh", "far"])
def test_the_truth(data):
    z, e = nearest_data(seeded(), 300, 20, 130, data)
    assert torch.equal(nearest_in_float64(z, e), nearest_code(z, e, backend="reference"))


def test_distances():
    z, e = nearest_data(seeded(), 50, 7, 9)
    codes = torch.arange(50) % 9
    torch.testing.assert_close(distance_to(z, e, codes), ((z - e[codes]).double()**2).sum(1), rtol=1e-5, atol=0)


def test_one_wrong_code_is_seen():
    z, e = nearest_data(seeded(), 500, 16, 64)
    truth = nearest_in_float64(z, e)
    assert judge_codes(truth, truth, (z, e), EXACT) == dict(wrong=0, error=0., complaint="")
    wrong = truth.clone()
    wrong[3] = torch.cdist(z[3:4], e).topk(2, largest=False).indices[0, 1]
    assert judge_codes(wrong, truth, (z, e), EXACT)["complaint"] == "1 wrong codes"
    told = judge_codes(wrong, truth, (z, e), ANY)
    assert told["wrong"] == 1 and told["error"] > 0 and "off by" in told["complaint"]
    assert judge_codes(wrong, truth, (z, e), ANY._replace(ours=False))["error"] < told["error"]
    for broken in truth[:-1], truth + 64, truth - 64:
        assert judge_codes(broken, truth, (z, e), ANY)["complaint"].startswith("codes ")


def test_a_tie_belongs_to_the_lower_index():
    z, e = torch.zeros(1, 1), torch.tensor([[1.], [-1.]])
    low, high = torch.tensor([0]), torch.tensor([1])
    assert judge_codes(high, low, (z, e), EXACT)["wrong"] == 1 and judge_codes(low, high, (z, e), EXACT)["wrong"] == 0
    assert not judge_codes(high, low, (z, e), ANY)["complaint"]


def test_tolerances():
    assert tolerance("float32") < tolerance("tf32") < tolerance("bfloat16") == tolerance("bfloat16 in")
    x = torch.randn(1000, dtype=torch.float64, generator=seeded())
    for precision in "float32", "tf32", "bfloat16":
        for factor, passes in (0.9, True), (1.1, False):
            told = judge_tensors((x, x * (1 + factor * tolerance(precision))), (x, x), (), ANY._replace(precision=precision))
            assert (told["complaint"] == "") == passes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(value):
    x = torch.randn(10, dtype=torch.float64)
    for precision in "float32", "bfloat16":
        assert judge_tensors((x.index_fill(0, torch.tensor([2]), value),), (x,), (), ANY._replace(precision=precision))["complaint"]


def every_case():
    return [nearest_case("cpu", 60, 6, 20), statistics_case(60, 6, 20), statistics_case(60, 6, 20, hot=True), quantize_case(60, 6, 20),
            quantize_case(60, 6, 20, gradient="straight_through"), *(coupling_case("cpu", 20, 6, which) for which in ("forward", "backward", "both"))]


@pytest.mark.parametrize("case", every_case(), ids=lambda c: c.operation)
def test_a_case_is_repeatable_and_counts(case):
    a, b = case.make(seeded(5)), case.make(seeded(5))
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))
    assert sum(w.ours for w in case.ways) >= 1 and len(case.ways) >= 2
    assert case.flops > 0 and case.least > 0
    floats = sum(x.numel() * 4 for x in a if torch.is_tensor(x) and x.is_floating_point())
    assert 0.4 * floats < case.least < 4 * floats


def test_all_cases():
    for device in "cpu", "cuda":
        cases = all_cases(device, others={})
        assert len({str((c.operation, c.size)) for c in cases}) == len(cases)
        assert {"nearest code", "code statistics", "rotation gradient", "coupling, both"} <= {c.operation for c in cases}
    sizes = [c.size for c in all_cases("cuda", others={}) if c.operation == "nearest code"]
    assert {(s["d"], s["k"]) for s in sizes if s["n"] == 2**20} == {(d, k) for d in (64, 256, 512) for k in (1024, 8192, 16384)}
    assert {s["data"] for s in sizes if "data" in s} == {"fresh", "far"} and any(s["n"] == 2**18 and s["k"] == 16384 for s in sizes)
    assert dict(b=128, d=64) in [c.size for c in all_cases("cuda", others={})]
    assert dict(n=2**14, d=64, k=8192) in [c.size for c in all_cases("cpu", others={})]


def test_libraries_take_part_where_they_are():
    names = lambda case: [w.name for w in case.ways]  # noqa: E731
    assert "zuko" in names(coupling_case("cpu", 4, 4, others=dict(zuko=""))) and "zuko" not in names(coupling_case("cpu", 4, 4, others=dict(zuko="not installed")))
    assert "normflows" in names(coupling_case("cpu", 4, 4, others=dict(normflows="")))

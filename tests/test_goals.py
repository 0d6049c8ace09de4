"""The bars, and who says whether they are met."""
from jointgen.kernels.goals import faster, goals, row_of


def made(ms, **facts):
    return dict(operation="nearest code", size=dict(n=2**14, d=64, k=8192), precision="float32", ours=True, repeatable=True, wrong=0, peak_mib=20., ms=ms) | facts


def test_goals_on_a_cpu():
    rows = [made(1., way="ours, fast"), made(2., way="ours, exact"), made(3., way="cdist().argmin()", ours=False)]
    found = {g["goal"]: g for g in goals(dict(device=dict(type="cpu"), rows=rows))}
    fast, exact = (found[f"ours, {name}, k = 8192: times faster than cdist().argmin()"] for name in ("fast", "exact"))
    assert (fast["value"], fast["met"]) == (3., True) and (exact["value"], exact["met"]) == (1.5, False)
    assert found["ours, fast, k = 8192: memory, MiB"]["met"] and found["wrong codes in all exact rows"] == dict(goal="wrong codes in all exact rows", value=0, bar="<= 0", met=True)
    assert [g["met"] for name, g in found.items() if "coupling" in name] == [None, None]
    rows[1] |= dict(wrong=1, repeatable=False)
    found = {g["goal"]: g["met"] for g in goals(dict(device=dict(type="cpu"), rows=rows))}
    assert found["wrong codes in all exact rows"] is False and found["rows of ours with other bits in a second run"] is False


def test_goals_of_a_gpu_are_empty_without_one():
    found = goals(dict(device=dict(type="cuda")))
    assert len(found) > 25 and all(g["value"] is None and g["met"] is None for g in found)
    assert len({g["goal"] for g in found}) == len(found)
    size = dict(n=2**20, d=64, k=8192)
    rows = [made(4., way="ours, exact", size=size, peak_mib=100.), made(40., way="published", size=size, ours=False)]
    found = {g["goal"]: g for g in goals(dict(device=dict(type="cuda"), rows=rows))}
    assert found["ours, exact, d = 64: times faster than published, float32"] == dict(goal="ours, exact, d = 64: times faster than published, float32", value=10., bar=">= 7", met=True)
    assert found["ours, exact, d = 64: memory as a share of the matrix"]["met"]


def test_rows_are_found_by_size():
    rows = [made(1., way="a"), made(2., way="a", size=dict(n=2**14, d=64, k=8192, data="far")), made(3., way="b", size=dict(n=2, d=64, k=8192))]
    results = dict(rows=rows)
    assert row_of(results, "nearest code", "a", d=64)["ms"] == 1. and row_of(results, "nearest code", "a", data="far")["ms"] == 2.
    assert row_of(results, "nearest code", "a", d=65) is None and row_of(results, "nearest code", "c") is None
    assert faster(results, "nearest code", ("a", "float32"), ("b", "float32")) == 3.
    assert faster(results, "nearest code", ("a", "float32"), ("b", "float32"), n=2**14) is None


def test_every_bar_can_be_read():
    for kind in "cpu", "cuda":
        for g in goals(dict(device=dict(type=kind))):
            assert set(g) == {"goal", "value", "bar", "met"} and g["bar"].split()[0] in (">=", "<", "<=") and float(g["bar"].split()[1]) >= 0

"""How the topic update is timed: same result first, loops beside it, growth fitted, bars held."""
import json
import math
from pathlib import Path

import pytest
import torch

import jointgen.topic_speed as ts
from jointgen.model_speed import Case, Trial, gap
from jointgen.topic_speed import GROWTH, MIDDLE, PARTS, against_loops, all_cases, batch_of, bench_topics, goals, growth, part, split_by_loops, tables_by_loops, updating
from jointgen.topics import PGBN

STORED = Path(__file__).parents[1] / "nbs" / "results"
SMALL = dict(words=60, widths=(8, 5, 3), b=4)


def test_documents():
    net = PGBN(500, (16, 8))
    counts, thetas = batch_of(net, 9, 30)
    assert (counts.sum(1) == 30).all() and torch.equal(counts, counts.round()) and [t.shape for t in thetas] == [(9, 16), (9, 8)]
    again, other = batch_of(net, 9, 30), batch_of(net, 9, 30, seed=1)
    assert torch.equal(counts, again[0]) and torch.equal(thetas[1], again[1][1]) and not torch.equal(counts, other[0])
    assert counts.sum(0)[:10].sum() > 3 * counts.sum(0)[-100:].sum()  # a long tail


def test_both_ways_count_every_token():
    sampled, expected = updating("cpu", 0, **SMALL)
    assert sampled.ours and expected.ours and (sampled.way, expected.way) == ("sampled", "expected")
    for _ in range(3):
        assert sampled.call() == pytest.approx(280, rel=1e-4) and expected.call() == pytest.approx(280, rel=1e-4)


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    trial, = part(name, "cpu", 0, **SMALL)
    assert trial.ours and trial.call().isfinite().all()


def test_loops_agree():
    ours, loops = (t.call() for t in against_loops("cpu", 0, drawn=False, **SMALL))
    assert ours.shape == loops.shape == (60, 8) and gap(ours, loops) < 1e-5
    ours, loops = (t.call() for t in against_loops("cpu", 0, drawn=True, **SMALL))
    assert torch.equal(ours, loops) and ours.sum() == 80


def test_loops_have_the_law_they_claim():
    counts, phi, theta = [[3., 5.]] * 3000, [[0.7, 0.2], [0.3, 0.8]], [[1., 3.]] * 3000
    m, S = split_by_loops(counts, phi, theta, drawn=True)
    mean, table = split_by_loops(counts[:1], phi, theta[:1], drawn=False)
    assert torch.allclose(torch.tensor(m).mean(0), torch.tensor(mean[0]), atol=0.1) and torch.allclose(torch.tensor(S) / 3000, torch.tensor(table), atol=0.1)
    t = torch.tensor(tables_by_loops([[4.]] * 3000, [[2.]] * 3000)).float()
    assert t.mean().item() == pytest.approx(sum(2 / (2 + i) for i in range(4)), abs=0.1) and 1 <= t.min() and t.max() <= 4


def test_cases_are_told_apart():
    cases = all_cases()
    assert len({(c.operation, str(c.size)) for c in cases}) == len(cases) and all(len(values) >= 3 for _, values in GROWTH)
    for what, values in GROWTH:
        assert dict(MIDDLE)[what] in values and sum(c.operation == f"topic update, growing {what}" for c in cases) == len(values)
    assert not [c for c in all_cases(quick=True) if "growing" in c.operation]


def test_growth():
    made = lambda what, values, f: [dict(operation=f"topic update, growing {what}", way=w, size={what: v}, ms=f(v)) for v in values for w in ("sampled", "expected")]  # noqa: E731
    results = dict(rows=made("words", (10, 100, 1000), lambda v: 2 * v) + made("widths", ([8, 4], [16, 8]), lambda v: v[0]**2) + made("b", (4, 8), lambda v: 3.))
    assert growth(results, "words") == pytest.approx(1) and growth(results, "widths", "expected") == pytest.approx(2) and growth(results, "b") == pytest.approx(0, abs=1e-9)
    assert growth({}, "words") is None and growth(dict(rows=results["rows"][:2]), "words") is None
    held = {g["goal"]: g["met"] for g in goals(results)}
    assert held["growth with words: power"] and not held["growth with topics: power"] and held["growth with documents: power"]


def test_goals():
    assert len(goals({})) == len({g["goal"] for g in goals({})}) and all(g["met"] is None for g in goals({}))
    row = dict(operation="drawn counts against loops", way="ours", ms=1., times_faster={"loops, float32": 9.})
    held = next(g for g in goals(dict(rows=[row])) if g["goal"].startswith("drawn"))
    assert held == dict(goal="drawn counts: times faster than loops", value=9., bar=">= 10", met=False)


def test_quick_run(tmp_path):
    out, lines = tmp_path / "t.json", []
    assert bench_topics(quick=True, out=out, tell=lines.append)
    stored = json.loads(out.read_text())
    assert stored["quick"] and stored["checked"] and "goals" not in stored and {r["operation"] for r in stored["rows"]} == {c.operation for c in all_cases(quick=True)}
    assert bench_topics(quick=True, only="loops", out=out, tell=lines.append) and len(json.loads(out.read_text())["rows"]) == len(stored["rows"])
    assert len(lines) == len(all_cases(quick=True)) + 2
    for options, says in (dict(device="tpu"), "device is 'tpu'"), (dict(only="pictures"), "no operation contains 'pictures', topic update"):
        with pytest.raises(ValueError, match=says):
            bench_topics(**options)


def test_failures_are_told(monkeypatch, tmp_path):
    told = []
    bad = Case("topic update", lambda device, seed: [Trial("sampled", lambda: torch.zeros(1), ours=True), Trial("loops", lambda: torch.ones(1))], {}, 1, "updates", 1e-3)
    monkeypatch.setattr(ts, "all_cases", lambda **k: [bad])
    assert not bench_topics(tell=told.append, quick=True) and "refused: its result" in told[0]
    slow = bad._replace(make=lambda device, seed: [Trial("sampled", lambda: torch.ones(1), ours=True)])
    monkeypatch.setattr(ts, "all_cases", lambda **k: [slow])
    monkeypatch.setattr(ts, "measure", lambda *a, **k: [dict(operation="topic update", size={}, unit="updates", way="sampled", precision="float32", ours=True, gap=0., ms=300., spread=0., per_second=3.)])
    assert not bench_topics(tell=told.append, out=tmp_path / "t.json") and sum("MISSED" in t for t in told) == 1
    assert bench_topics(tell=told.append, check=False)


@pytest.mark.parametrize("path", sorted(STORED.glob("topics_*.json")), ids=lambda p: p.stem)
def test_stored_results_keep_their_promises(path):
    stored = json.loads(path.read_text())
    assert stored["checked"] and not stored["quick"] and stored["device"]["name"] and not [r for r in stored["rows"] if "refused" in r]
    assert stored["goals"] == goals(stored) and all(g["met"] for g in stored["goals"]), stored["goals"]
    assert all(math.isfinite(r["ms"]) for r in stored["rows"])

"""How models are timed: compared first, and honest about what is not there."""
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from jointgen import model_speed as ms
from jointgen.digits import captioned_digits
from jointgen.flows import conditional_flow
from jointgen.joint import load
from jointgen.model_speed import (BARS, MODELS, Case, Trial, all_cases, arranged, bench, bench_models, built, examine, gap, goals, hoisting, measure,
                                  painting, rows_seen, swapped, table, telling, times_of, training, whole)

STORED = Path(__file__).parents[1] / "nbs" / "results"


def case(*trials, most=1e-6, **facts):
    return Case("test", lambda device, seed: list(trials), {}, facts.get("items", 1), "things", most, facts.get("steps", 1))


def one(way="quick", value=1., **facts):
    return Trial(way, lambda: torch.full((3,), value), **facts)


# --- what is compared


def test_gap():
    words = torch.randint(0, 9, (10, 5))
    other = words.clone()
    other[:3, 0] += 1
    assert gap(words, words) == 0 and gap(words, other) == pytest.approx(0.3) and gap(words, words[:, :4]) == math.inf
    x = torch.randn(100)
    assert gap(x, x) == 0 and gap(1.01 * x, x) == pytest.approx(0.01, rel=1e-3) and gap(torch.zeros(3), torch.zeros(3)) == 0
    assert gap(x.bfloat16(), x) < 0.01 and not gap(x * math.nan, x) <= 1


def test_a_way_that_is_off_has_no_time():
    rows = measure(case(one(ours=True), one("also", 1.1), one("plain"), most=0.01), rounds=1)
    assert ["ms" in r for r in rows] == [True, False, True] and rows[1]["refused"].endswith("0.01 fits")
    assert rows[0]["times_faster"].keys() == {"plain, float32"}
    rows = measure(case(one(ours=True), one("also", 1.1), one("plain"), most=0.01), rounds=1, check=False)
    assert all("ms" in r for r in rows) and rows[1]["gap"] == pytest.approx(0.1, rel=1e-3)
    assert ["ms" in r for r in measure(case(one(value=math.nan, ours=True), one("plain")), rounds=1)] == [False, True]


def broken(kind):
    def make(device, seed):
        raise kind("no\n  luck")
    return Case("test", make, {}, 1, "things", 0.1)


def test_absent_and_refused():
    assert examine(broken(ModuleNotFoundError))[0][1]["absent"] == "ModuleNotFoundError: no luck"
    for kind in RuntimeError, ValueError, TypeError, AttributeError, KeyError:
        (call, row), = examine(broken(kind))
        assert call is None and row["refused"].startswith(kind.__name__) and row["ours"]
    with pytest.raises(KeyboardInterrupt):
        examine(broken(KeyboardInterrupt))
    assert "absent: ModuleNotFoundError" in table(measure(broken(ModuleNotFoundError))) and "refused: ValueError" in table(measure(broken(ValueError)))


def test_every_way_starts_from_the_seed():
    noise = [Trial(str(i), lambda: torch.randn(4), ours=not i) for i in range(3)]
    assert [row["gap"] for _, row in examine(case(*noise), seed=5)] == [0.] * 3


def test_times():
    calls = []
    times = times_of([lambda: calls.append(0), lambda: calls.append(1)], "cpu", 3)
    assert [len(t) for t in times] == [3, 3] and set(calls) == {0, 1} and all(x >= 0 for t in times for x in t)
    rows = measure(case(one(ours=True), one("plain"), items=7, steps=2), rounds=3)
    assert rows[0]["per_second"] == pytest.approx(7e3 / rows[0]["ms"]) and rows[0]["spread"] >= 0


def test_a_row_tells_of_one_step(monkeypatch):
    monkeypatch.setattr(ms, "cpu_times", lambda calls, rounds: [[10., 8., 12.], [20., 20., 20.]])
    ours, plain = measure(case(one(ours=True), one("plain"), items=32, steps=4))
    assert ours["ms"] == 2.5 and ours["spread"] == pytest.approx(0.4) and ours["per_second"] == pytest.approx(12800.)
    assert plain["ms"] == 5. and ours["times_faster"] == {"plain, float32": 2.}


# --- work for a condition is done once


@pytest.mark.parametrize("samples", [1, 2, 37, 100])
def test_image_to_text_computes_a_condition_once(samples):
    model, image = load("lnfmm"), captioned_digits(2, "test").pairs.image
    base = rows_seen(model, lambda: model.image_to_text(image))
    assert base == rows_seen(model, lambda: model.image_to_text(image, samples=samples))
    assert base["pictures"] == 2 and base["conditions"] == 2 * sum(bool(getattr(m, "context", 0)) for m in model.prior_t.transform.transforms)
    copies = image.repeat_interleave(samples, 0)
    assert rows_seen(model, lambda: model.image_to_text(copies)) == {k: n * samples for k, n in base.items()}


def test_text_to_image_computes_a_condition_once():
    model, tokens = load("lnfmm"), captioned_digits(2, "test").pairs.tokens
    few, many = (rows_seen(model, lambda: model.text_to_image(tokens, samples=n)) for n in (1, 20))
    assert few == many and few["conditions"] > 0 == few["pictures"]


def test_counting_leaves_nothing_behind():
    flow = conditional_flow(4, 3, steps=2)
    with pytest.raises(RuntimeError):
        rows_seen(flow, lambda: (_ for _ in ()).throw(RuntimeError()))
    assert not [m for m in flow.modules() if m._forward_pre_hooks]
    assert rows_seen(flow, lambda: None) == rows_seen(nn.Linear(1, 1), lambda: None) == dict(conditions=0, pictures=0)


@pytest.mark.parametrize("preset", ["paper", "tutorial"])
def test_hoisting(preset):
    hoisted, copied = hoisting("cpu", 0, samples=5, preset=preset)
    assert hoisted.ours and not copied.ours and gap(hoisted.call(), copied.call()) < 1e-5
    assert hoisted.call().shape == copied.call().shape and hoisted.call().std(0).min() > 0
    assert torch.equal(hoisted.call(), hoisting("cpu", 0, samples=5, preset=preset)[0].call())


def test_telling():
    trials = telling("cpu", 1, samples=5)
    a, b, c = (t.call() for t in trials)
    assert torch.equal(a, b) and torch.equal(a, c) and len(a) == 5 and [t.ours for t in trials] == [True, False, False]


# --- models


def test_swapped():
    kept = ms.whole
    with swapped(ms, whole=len, gap=max):
        assert ms.whole is len and ms.gap is max
    with pytest.raises(KeyError), swapped(ms, whole=len):
        raise KeyError
    assert ms.whole is kept and ms.gap is gap
    with pytest.raises(AttributeError), swapped(ms, nothing_here=len):
        pass
    assert whole(lambda a, b: a + b, 1, 2, parts=4) == 3


def test_plain_convolutions_see_plain_memory():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    assert arranged(net, plain=False, reorder=False) is net and net[0].weight.is_contiguous()
    fast = arranged(net, plain=False, reorder=True)(x)
    assert fast.is_contiguous(memory_format=torch.channels_last) and not fast.is_contiguous()
    plain = arranged(net, plain=True, reorder=True)(x)
    assert plain.is_contiguous() and torch.allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_training_moves_every_way_alike(name):
    trials, losses = training(name, "cpu", 0, side=32, b=4), []
    for t in trials:
        torch.manual_seed(0)
        losses.append(t.call())
    assert [t.precision for t in trials] == ["bfloat16", "float32", "float32"] and [t.ours for t in trials] == [True, False, False]
    assert all(x.isfinite().all() and gap(x, losses[-1]) < 0.1 for x in losses)
    assert len(losses[0]) == len(built(name, captioned_digits(2).vocab, 32, seed=0, device="cpu").players())


@pytest.mark.parametrize("name", list(MODELS))
def test_painting_agrees(name):
    ours, rounded, plain = (t.call() for t in painting(name, "cpu", 0, side=32, b=3))
    assert ours.shape == (3, 3, 32, 32) and gap(ours, plain) < 1e-4 and 0 < gap(rounded, plain) < 0.05


def test_games_can_be_built_larger():
    vocab = captioned_digits(2).vocab
    for name in "hdgan", "dte_gan":
        with torch.device("meta"):
            assert built(name, vocab, 64, seed=0, device="meta").side == 64


# --- all of it


def test_cases_are_told_apart():
    for device in "cpu", "cuda":
        cases = all_cases(device)
        assert len({(c.operation, str(c.size)) for c in cases}) == len(cases) and all(c.items >= 1 and c.most < 1 for c in cases)
        assert {c.operation for c in cases} >= {operation for _, operation, *_ in BARS}
    assert max(c.size.get("side", 0) for c in all_cases()) == 32 and {64, 256} <= {c.size.get("side") for c in all_cases("cuda")}
    assert all(c.size.get("b", 4) == 4 and c.size.get("samples", 6) == 6 for c in all_cases("cuda", quick=True))


def test_goals():
    assert all(g["met"] is None and g["value"] is None for g in goals({})) and len(goals({})) == len(BARS) == len({g["goal"] for g in goals({})})
    told = dict(operation="lnfmm: captions of one picture", size=dict(samples=100), way="hoisted", ours=True, ms=499., times_faster={"one at a time, float32": 2.5})
    held = {g["goal"]: g for g in goals(dict(rows=[told]))}
    assert held["image_to_text, 100 captions of one picture: ms"] == dict(goal="image_to_text, 100 captions of one picture: ms", value=499., bar="< 500", met=True)
    assert held["image_to_text, 100 captions of one picture: times faster than one at a time"]["met"] is False
    small = dict(operation="flow: samples for one picture", size=dict(samples=100, preset="tutorial"), ours=True, ms=1., times_faster={"a copy for each sample, float32": 1.})
    assert goals(dict(rows=[small]))[0]["value"] is None  # the bar is for the paper's sizes
    assert goals(dict(rows=[told | dict(ours=False)]))[1]["value"] is None


def test_bench_refuses_other_devices():
    with pytest.raises(ValueError, match="device is 'tpu'"):
        bench("tpu")
    with pytest.raises(ValueError, match="no operation contains 'hd-gan', flow: samples"):
        bench(only="hd-gan")


def test_quick_run(tmp_path):
    out, lines = tmp_path / "m.json", []
    assert bench_models(quick=True, only="flow", out=out, tell=lines.append)
    first = json.loads(out.read_text())
    assert first["quick"] and first["checked"] and first["seed"] == 0 and first["device"]["type"] == "cpu" and "goals" not in first
    assert first["command"] == "jointgen bench models --device cpu --quick" and first["versions"]["torch"] == torch.__version__
    assert bench_models(quick=True, only="captions of one", out=out, tell=lines.append)
    both = json.loads(out.read_text())
    assert [r["operation"] for r in both["rows"]] == ["flow: samples for one picture"] * 4 + ["lnfmm: captions of one picture"] * 3
    assert len(lines) == 3 and all("spread" in line for line in lines)
    out.write_text(json.dumps(both | dict(clock="another")))
    with pytest.raises(ValueError, match="holds another of"):
        bench_models(quick=True, only="flow", out=out, tell=lines.append)


def test_failures_are_told(monkeypatch, tmp_path):
    told, size = [], dict(side=32, b=64)
    slow = Case("lnfmm: training step", lambda device, seed, side, b: [one(ours=True), one("plain")], size, 64, "pairs", 0.1)
    monkeypatch.setattr(ms, "times_of", lambda calls, device, rounds: [[300.], [100.]][:len(calls)])
    monkeypatch.setattr(ms, "apart", lambda f: f())
    monkeypatch.setattr(ms, "all_cases", lambda *a, **k: [slow])
    assert not bench_models(tell=told.append, out=tmp_path / "m.json") and sum("MISSED" in t for t in told) == 2
    assert [g["met"] for g in json.loads((tmp_path / "m.json").read_text())["goals"]].count(False) == 2
    assert bench_models(check=False, tell=told.append)  # nobody looks at bars
    bad = slow._replace(make=lambda device, seed, side, b: [one(value=2., ours=True), one("plain")])
    monkeypatch.setattr(ms, "all_cases", lambda *a, **k: [bad])
    assert not bench_models(tell=told.append, quick=True) and any("refused: its result" in t for t in told)
    absent = slow._replace(make=partial(lambda *a, **k: (_ for _ in ()).throw(ModuleNotFoundError("no such model"))))
    monkeypatch.setattr(ms, "all_cases", lambda *a, **k: [absent])
    assert bench_models(tell=told.append)  # not there is not wrong


@pytest.mark.parametrize("path", sorted(STORED.glob("models_c*.json")), ids=lambda p: p.stem)
def test_stored_results_keep_their_promises(path):
    stored = json.loads(path.read_text())
    assert stored["checked"] and not stored["quick"] and stored["device"]["name"] and stored["command"].startswith("jointgen bench models")
    assert not [r for r in stored["rows"] if "refused" in r]
    assert stored["goals"] == goals(stored), "the bars have changed: measure again"
    first = [g for g in stored["goals"] if not g["goal"].startswith(("hdgan", "dte_gan"))]
    assert len(first) == 5 and all(g["met"] for g in first), first

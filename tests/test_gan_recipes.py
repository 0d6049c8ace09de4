"""The recipes of HDGAN and DTE-GAN, end to end at a tiny size: train, go on, save, load, are scored, compare."""
import importlib
import json
from pathlib import Path

import pytest
import torch

from jointgen import image_scores
from jointgen.joint import load_model

torch.set_num_threads(1)
RESULTS = Path(__file__).parents[1] / "nbs/results"
STAGES = dict(copies=0, taught=True, ema=0.9, schedule="hold_and_fall", stage1=dict(pairs=64, steps=3, batch_size=16), stage2=dict(pairs=64, steps=4, batch_size=8, lr=1e-3))
TINY = dict(
    hdgan=dict(STAGES, model=dict(side=32, d_text=16, condition=8, noise=8, widths=(8, 8, 8, 8), judge_width=8, text_width=8, encoder_sizes=dict(hidden=16, embedding=8))),
    dte_gan=dict(STAGES, model=dict(side=32, d_text=16, condition=8, noise=8, text=dict(hidden=16, embedding=8), generator=(8, 8, 8, 8), hidden=8, discriminator=(8, 8, 8, 8), warm=2)))


@pytest.fixture(autouse=True)
def quick_maps(monkeypatch):
    """Similarity is not what is tested here: its maps are fitted in no time."""
    whole = image_scores.fit_similarity
    monkeypatch.setattr(image_scores, "fit_similarity", lambda reader: whole(reader, 100, steps=5))


@pytest.fixture(scope="module", params=list(TINY))
def trained(request, tmp_path_factory):
    name, folder = request.param, tmp_path_factory.mktemp("run")
    recipe = importlib.import_module(f"jointgen.recipes.{name}")
    recipe.PRESETS["tiny"] = TINY[name]
    try: yield name, recipe, folder, recipe.train(folder, preset="tiny", seed=3)
    finally: del recipe.PRESETS["tiny"]


def test_what_is_saved_is_what_was_trained(trained):
    name, _, folder, model = trained
    loaded, facts = load_model(folder/name), json.loads((folder/f"{name}.json").read_text())["facts"]
    assert loaded.config == model.config and not model.training
    assert facts["seed"] == 3 and facts["stage2"]["steps"] == 4 and f"train {name.replace('_', '-')} --preset tiny --seed 3" in facts["command"]
    for a, b in zip(loaded.parameters(), model.parameters()): assert torch.allclose(a, b, atol=2e-3, rtol=2e-3)  # stored in float16
    assert json.loads((folder/f"{name}_log.json").read_text()).keys() == {"stage2"}


def test_a_finished_run_resumes_to_itself(trained):
    _, recipe, folder, model = trained
    again = recipe.train(folder, preset="tiny", seed=3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(trained, tmp_path, monkeypatch):
    name, recipe, _, model = trained
    from jointgen.learner import Learner
    whole = Learner.fit

    def cut(self, steps, **o):
        factor, self.factor = self.factor, lambda step, _: factor(step, steps)
        whole(self, 2, **o)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Learner, "fit", cut)
        with pytest.raises(KeyboardInterrupt): recipe.train(tmp_path, preset="tiny", seed=3)
    again = recipe.train(tmp_path, preset="tiny", seed=3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_scores_are_complete_and_json(trained):
    name, recipe, _, model = trained
    report = recipe.evaluate(model, n=24)
    assert json.loads(json.dumps(report))
    assert {"settings", "images", "real", "speed"} <= set(report) and set(report["images"]) == set(report["real"])
    for key in ("pictures", "caption", "presence", "color", "digit", "object", "false_objects", "r_precision", "edited_precision", "ms_ssim", "vs_similarity", "spread_ratio"):
        assert key in report["images"], key
    assert report["settings"]["command"].startswith(f"jointgen evaluate {name.replace('_', '-')}")
    assert ("pyramid" in report) == (name == "hdgan") and ({"retrieval", "embeddings"} <= set(report)) == (name == "dte_gan")


def test_every_preset_names_what_exists(trained):
    name, recipe, *_ = trained
    for preset in recipe.PRESETS.values():
        assert {"model", "copies", "ema", "schedule", "stage1", "stage2"} <= set(preset)
        assert preset["schedule"] in importlib.import_module("jointgen.recipes.hdgan").SCHEDULES
    with pytest.raises(ValueError, match="tutorial or"): recipe.train("nowhere", preset="tutorail")


def test_painter_holds_what_it_is_given(trained):
    _, recipe, _, model = trained
    draw, s = recipe.painter(model), torch.randn(2, 16)
    z, e = torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(draw(s, z, e), draw(s, z, e)) and draw(s, z, e).shape == (2, 3, 32, 32)
    assert not torch.equal(draw(s, z, e), draw(s, -z, e)) and not torch.equal(draw(s, z, e), draw(s, z, -e))


def test_variants_are_compared_and_kept(trained, tmp_path, monkeypatch):
    name, recipe, _, model = trained
    monkeypatch.setitem(recipe.PRESETS, "tutorial", TINY[name])
    variants = {"32": dict(scales=(32,)), "all": {}} if name == "hdgan" else dict(dual={}, frozen=dict(mode="frozen"))
    first = recipe.compare(tmp_path/"c.json", variants, seeds=(0,), steps=3, n=20)
    assert recipe.compare(tmp_path/"c.json", variants, seeds=(0,), steps=3, n=20) == first
    row = first["all" if name == "hdgan" else "dual"][0]
    assert {"presence", "color", "digit", "caption", "r_precision", "spread_ratio"} <= set(row)
    assert ("gap at 8 px" in row) == (name == "hdgan") and any(tmp_path.rglob("sentences.safetensors"))


def test_weights_are_changed_one_by_one():
    from jointgen.recipes.hdgan import changed
    config = dict(side=32, weights=dict(kl=0.2, local=1.))
    assert changed(config, dict(weights=dict(local=0.))) == dict(side=32, weights=dict(kl=0.2, local=0.))
    assert changed(dict(side=32), dict(side=64)) == dict(side=64, weights={})


def test_large_pictures_are_composed_as_they_are_needed():
    from jointgen.recipes.hdgan import first_pairs, training_data
    preset = dict(copies=0, stage1=dict(pairs=6))
    make = training_data(dict(pairs=100, batch_size=4), 128, copies=0)
    assert make(0).image.shape == (4, 3, 128, 128) and not torch.equal(make(0).image, make(1).image) and torch.equal(make(1).image, make(1).image)
    assert first_pairs(make, preset).image.shape == (6, 3, 32, 32)
    kept = training_data(dict(pairs=10, batch_size=4), 32, copies=0)
    assert len(kept) == 10 and torch.equal(first_pairs(kept, preset).image, kept.image[:6])


def test_the_schedule_rises_holds_and_falls():
    from jointgen.recipes.hdgan import hold_and_fall
    curve = [hold_and_fall(i, 5000) for i in range(5000)]
    assert curve[0] == 0.02 and curve[99] == 1 and set(curve[99:2000]) == {1.} and curve[3500] == pytest.approx(0.5) and min(curve) == curve[-1] == 0.02
    assert hold_and_fall(2, 30) == 1


@pytest.mark.parametrize("name", list(TINY))
def test_the_committed_results_meet_their_claims(name):
    path = RESULTS/f"{name}.json"
    if not path.exists(): pytest.skip("not trained yet")
    report = json.loads(path.read_text())
    images = report["images"]
    assert report["settings"]["n"] >= 2000
    assert images["presence"] >= 0.97 and images["color"] >= 0.90 and images["digit"] >= 0.60
    assert images["r_precision"] >= 0.60 and images["candidates"] == 100 and images["spread_ratio"] >= 0.30

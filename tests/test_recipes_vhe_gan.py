"""The recipe of VHE-GAN, end to end at a tiny size: train, go on, save, load, is scored."""
import json
import math
from pathlib import Path

import pytest
import torch

from jointgen import image_scores
from jointgen.digits import captioned_digits
from jointgen.joint import load_model
from jointgen.recipes import vhe_gan as recipe
from tiny_vhe_gan import SIZES, TINY

torch.set_num_threads(1)
RESULTS = Path(__file__).parents[1] / "nbs/results"


@pytest.fixture(autouse=True)
def quick_maps(monkeypatch):
    """Similarity is not what is tested here: its maps are fitted in no time; and few training pairs will do."""
    whole, pairs = image_scores.fit_similarity, recipe.captioned_digits
    monkeypatch.setattr(image_scores, "fit_similarity", lambda reader: whole(reader, 100, steps=5))
    monkeypatch.setattr(recipe, "captioned_digits", lambda n, *a, **o: pairs(min(n, 500), *a, **o))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe.PRESETS["tiny"] = TINY
    try: yield folder, recipe.train(folder, preset="tiny", seed=3)
    finally: del recipe.PRESETS["tiny"]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_is_saved_is_what_was_trained(trained):
    folder, model = trained
    loaded, facts = load_model(folder/"vhe_gan"), json.loads((folder/"vhe_gan.json").read_text())["facts"]
    assert loaded.config == model.config and not model.training and int(model.trained) == 8
    assert facts["seed"] == 3 and facts["stage2"]["steps"] == 4 and "train vhe-gan --preset tiny --seed 3" in facts["command"]
    for a, b in zip(loaded.parameters(), model.parameters()): assert torch.allclose(a, b, atol=2e-3)  # stored in float16
    for phi in loaded.pgbn.topics: assert torch.allclose(phi.sum(0), torch.ones(phi.shape[1]), atol=1e-4) and (phi > 0).all()
    assert json.loads((folder/"vhe_gan_log.json").read_text()).keys() == {"stage1", "stage2"}


def test_the_game_begins_with_the_second_stage(trained, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "tiny", TINY)
    model, data = recipe.make_model(recipe.plan("tiny", 2, recipe.PRESETS)), captioned_digits(8).pairs
    assert [[t.player for t in model.turns(data)] for _ in range(3)] == [["generator"], ["generator"], ["discriminator", "generator"]]
    assert trained[1].sizes["warm"] == 4 and trained[1].sizes["documents"] == 64 and model.sizes["documents"] == 32


def test_a_finished_run_resumes_to_itself(trained):
    folder, model = trained
    assert same(recipe.train(folder, preset="tiny", seed=3, resume=True), model)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(trained, tmp_path, monkeypatch, stage):
    from jointgen.learner import Learner
    whole, begun = Learner.fit, []

    def cut(self, steps, **o):
        begun.append(steps)
        if len(begun) < stage: return whole(self, steps, **o)
        factor, self.factor = self.factor, lambda step, _: factor(step, steps)
        whole(self, 2, **o)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Learner, "fit", cut)
        with pytest.raises(KeyboardInterrupt): recipe.train(tmp_path, preset="tiny", seed=3)
    assert same(recipe.train(tmp_path, preset="tiny", seed=3, resume=True), trained[1])


def test_the_encoder_moves_slowly_in_the_game_only(tmp_path, monkeypatch):
    seen, whole = [], recipe.train_stage
    shares = lambda net: {getattr(p, "lr_factor", 1.) for p in net.parameters()}
    monkeypatch.setattr(recipe, "train_stage", lambda model, *a, **o: seen.append([shares(n) for n in (model.trunk, model.encoder, model.generator)]) or whole(model, *a, **o))
    monkeypatch.setitem(recipe.PRESETS, "tiny", dict(TINY, model=dict(SIZES, encoder_lr=0.25)))
    recipe.train_both(recipe.plan("tiny", 2, recipe.PRESETS), tmp_path)
    assert seen == [[{1.}, {1.}, {1.}], [{0.25}, {0.25}, {1.}]]
    assert recipe.PRESETS["tutorial"]["model"]["encoder_lr"] == 0.1


def test_other_steps_and_other_presets(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(recipe.PRESETS, "tiny", TINY)
        model = recipe.train(tmp_path, preset="tiny", steps=2)
    assert int(model.trained) == 4 and model.sizes["warm"] == 2 and "--steps 2" in json.loads((tmp_path/"vhe_gan.json").read_text())["facts"]["command"]
    with pytest.raises(ValueError, match="tutorial or paper or stack"): recipe.train("nowhere", preset="tutorail")
    for p in recipe.PRESETS.values(): assert {"model", "copies", "ema", "schedule", "clip", "stage1", "stage2"} <= set(p) and p["schedule"] in recipe.SCHEDULES


def test_scores_are_complete_and_json(trained):
    report = recipe.evaluate(trained[1], n=50)
    assert json.loads(json.dumps(report)) and report["settings"]["command"].startswith("jointgen evaluate vhe-gan")
    assert {"settings", "images", "real", "speed", "captions", "captions_drawn", "pairs", "topics", "retrieval"} == set(report) and set(report["images"]) == set(report["real"])
    for subset in ("Single", "Quad1", "Quad2", "Quad3", "Quad4"):
        assert 0 <= report["images"]["pictures"][subset] <= 1 and 0 <= report["pairs"]["samples"][subset] <= 1 and subset in report["pairs"]["real_pairs"]
    assert all("exact" in row for row in report["captions"].values()) and report["captions"]["all"]["candidates"] == 1
    assert set(report["retrieval"]) == {who + way for who in ("real", "painted") for way in ("", ", likelihood alone")} and 40 <= report["retrieval"]["real"]["candidates"] <= 50


def test_topic_scores_are_between_what_can_be_known(trained):
    data = captioned_digits(60, "test").pairs
    scores = recipe.score_topics(trained[1], data, data)
    floor, ceiling, *read = (scores["perplexity"][k] for k in ("floor", "ceiling", "from pictures", "from texts"))
    assert 1 < floor < ceiling and all(floor < x for x in read)
    nats = scores["nats"]
    assert nats["bound"] == pytest.approx(nats["log_likelihood"] - nats["kl_1"] - nats["kl_2"]) and all(v > 0 for k, v in nats.items() if k.startswith("kl"))
    assert set(scores["layers"]) == {"layer 1", "layer 2"} and all(0 < row["cosine"] <= 1.001 and 0 < row["diversity"] <= 1 and -1 <= row["coherence"] <= 1 for row in scores["layers"].values())
    assert all(0 <= x <= 1 for row in scores["accuracy"].values() for x in row.values())


def test_scores_do_not_move_the_model(trained):
    data, before = captioned_digits(30, "test").pairs, {k: v.clone() for k, v in trained[1].state_dict().items()}
    recipe.score_topics(trained[1], data, data)
    recipe.score_retrieval(trained[1], data, data, candidates=10)
    assert all(torch.equal(v, before[k]) for k, v in trained[1].state_dict().items()) and not trained[1].training


def test_two_readings_come_from_two_sides(trained):
    data = captioned_digits(10, "test").pairs
    other = type(data)(data.image.flip(0), data.tokens, data.vocab)
    (a, b, _), (c, d, _) = (recipe.two_readings(trained[1], x, batch_size=4) for x in (data, other))
    assert torch.allclose(a[0], c[0].flip(0), atol=1e-4) and torch.equal(b[0], d[0])  # the pictures do not reach the reading of texts


def test_bags_without_binding_are_scored_too(monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "tiny", dict(TINY, model=dict(SIZES, bound=False)))
    model, data = recipe.make_model(recipe.plan("tiny", 2, recipe.PRESETS)), captioned_digits(20, "test").pairs
    scores = recipe.score_topics(model.eval(), data, data)
    assert scores["accuracy"] == {} and math.isfinite(scores["nats"]["bound"])


@pytest.mark.parametrize("name", ["vhe_gan", "vhe_gan_stack"])
def test_the_committed_results_meet_their_claims(name):
    report = json.loads((RESULTS/f"{name}.json").read_text())
    images, topics, real = report["images"], report["topics"], report["real"]
    assert report["settings"]["n"] >= 2000 and images["candidates"] == 100 and real["presence"] > 0.99
    assert images["presence"] >= 0.90 and images["color"] >= 0.80 and images["digit"] >= 0.50
    assert topics["perplexity"]["floor"] < topics["perplexity"]["from pictures"] <= 32 < topics["perplexity"]["ceiling"]
    assert topics["accuracy"]["from pictures"]["color_at_place"] >= 0.97 and topics["accuracy"]["from pictures"]["digit_at_place"] >= 0.80
    assert topics["accuracy"]["from texts"]["color_at_place"] >= 0.90 and topics["accuracy"]["from texts"]["digit_at_place"] >= 0.90


def test_the_other_wiring_differs_in_nothing_else():
    from jointgen.models.vhe_gan import VHEGAN
    a, b = (recipe.PRESETS[k] for k in ("tutorial", "stack"))
    assert {k for k in a if a[k] != b[k]} == {"model"} and {k for k in b["model"] if a["model"].get(k) != b["model"][k]} == {"wiring", "generator"}
    raster, stack = (sum(p.numel() for p in VHEGAN(captioned_digits(1).vocab, **x["model"]).generator.parameters()) for x in (a, b))
    assert abs(raster/stack - 1) < 0.1  # about as many weights

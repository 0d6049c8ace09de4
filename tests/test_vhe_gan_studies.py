"""Parts of VHE-GAN taken away: what a variant is, what is kept, what a row of the raster says."""
import json
from pathlib import Path

import pytest
import torch

from jointgen import image_scores
from jointgen.digits import captioned_digits
from jointgen.models.vhe_gan import VHEGAN
from jointgen.recipes import vhe_gan as recipe
from jointgen.recipes import vhe_gan_studies as studies
from tiny_vhe_gan import SIZES, TINY

torch.set_num_threads(1)
RESULTS = Path(__file__).parents[1] / "nbs/results"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tiny model, similarity that is fitted in no time, few training pairs."""
    whole = image_scores.fit_similarity
    monkeypatch.setattr(image_scores, "fit_similarity", lambda reader: whole(reader, 100, steps=5))
    monkeypatch.setitem(recipe.PRESETS, "tutorial", TINY)


def test_variants_are_compared_and_kept(tmp_path):
    variants = studies.JOINT | {"adam": studies.TOPICS["topics: adam"]}
    first = studies.compare(tmp_path/"c.json", variants, seeds=(0,), first=2, steps=2, n=20)
    assert studies.compare(tmp_path/"c.json", variants, seeds=(0,), first=2, steps=2, n=20) == first
    keys = {"presence", "color", "digit", "caption", "r_precision", "spread_ratio", "perplexity", "told", "cosine", "seen_presence", "seen_color", "seen_digit"}
    assert keys == set(first["joint"][0]) == set(first["adam"][0])


def test_the_two_step_variant_learns_as_long_and_then_stands_still(monkeypatch):
    seen = []
    monkeypatch.setattr(recipe, "train_both", lambda p, *a, **o: seen.append(p) or (_ for _ in ()).throw(KeyboardInterrupt))
    for changes in studies.JOINT.values():
        with pytest.raises(KeyboardInterrupt): studies.one_run(changes, first=5, steps=7)
    with pytest.raises(KeyboardInterrupt): studies.one_run(dict(joint=False), first=5, steps=7, longer=False)
    assert [(p["stage1"]["steps"], p["stage2"]["steps"]) for p in seen] == [(5, 7), (12, 7), (5, 7)]


@pytest.mark.parametrize("name", [*studies.PARTS, *studies.TOPICS, *studies.ROWS])
def test_every_variant_changes_the_shipped_recipe(name, monkeypatch):
    monkeypatch.undo()
    changes = (studies.PARTS | studies.TOPICS | studies.ROWS)[name]
    before = recipe.PRESETS["tutorial"]["model"]
    after = studies.changed(before, changes)
    vocab = captioned_digits(1).vocab
    assert VHEGAN(vocab, **after).config != VHEGAN(vocab, **before).config and after["weights"].keys() >= before["weights"].keys()


def test_the_curve_of_a_weight_is_what_the_log_said(tmp_path, monkeypatch):
    logs, whole = [], recipe.raise_bound
    monkeypatch.setattr(recipe, "raise_bound", lambda *a, **o: logs.append(whole(*a, **o)) or logs[-1])
    rows = studies.weigh(tmp_path/"w.json", {"1": studies.WEIGHTS["1"]}, steps=40, n=20)["1"]
    curve, log = rows[0]["curve"], {r["step"]: r for r in logs[0].log}
    assert [r["step"] for r in curve] == [10, 30] and all(r[k] == log[r["step"]][k] for r in curve for k in ("kl_1", "kl_2", "perplexity"))
    assert logs[0].model.kl_weights == [1., 1.] and json.loads((tmp_path/"w.json").read_text())["results"]["1"] == json.loads(json.dumps(rows))


def test_a_row_that_paints_one_picture_has_no_variety():
    data = captioned_digits(30, "test")
    model = VHEGAN(data.vocab, **SIZES).eval()
    real = data.pairs.image
    model.paint = lambda thetas: [[torch.nn.functional.adaptive_avg_pool2d(real, 16)*0 - 1], [real]]
    rows = studies.row_scores(model, data)
    assert rows["2"]["variety"] == 0 and rows["2"]["presence"] == 0 and rows["1"]["variety"] == pytest.approx(1) and rows["1"]["presence"] > 0.95 and rows["1"]["color"] > 0.95


def test_six_pictures_of_three_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "tutorial", dict(TINY, model=dict(SIZES, widths=(12, 8, 6))))
    rows = studies.study_rows(tmp_path/"r.json", studies.ROWS["three rows"] | dict(generator=dict(width=16)), first=2, steps=2, n=20)
    assert [r["side"] for r in rows.values()] == [16, 16, 32] and list(rows) == ["3", "2", "1"]
    assert json.loads((tmp_path/"r.json").read_text())["rows"] == rows and (tmp_path/"r.png").read_bytes()[:4] == b"\x89PNG"


def test_the_committed_comparisons_are_whole():
    for name, variants, seeds in (("joint", studies.JOINT, 3), ("short", ["two short steps"], 3), ("parts", studies.PARTS, 1), ("topics", studies.TOPICS, 1), ("kl", studies.WEIGHTS, 1)):
        kept = json.loads((RESULTS/f"vhe_gan_{name}.json").read_text())
        assert {k: len(v) for k, v in kept["results"].items()} == dict.fromkeys(variants, seeds)

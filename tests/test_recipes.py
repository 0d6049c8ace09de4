"""The recipe of MXQ-VAE, end to end at a tiny size: trains, resumes, saves, loads, is scored."""
import json

import pytest
import torch

from jointgen.joint import load_model
from jointgen.recipes import mxq_vae as recipe

TINY = dict(
    model=dict(side=32, d=16, k=32, widths=(8, 16), warm_up=2, prior=dict(d=16, layers=1, heads=2)),
    stage1=dict(pairs=48, steps=5, batch_size=8, lr=1e-3),
    stage2=dict(pairs=48, steps=5, batch_size=8, lr=1e-3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe.PRESETS["tiny"] = TINY
    try: yield folder, recipe.train(folder, preset="tiny", seed=3)
    finally: del recipe.PRESETS["tiny"]


def test_what_is_saved_is_what_was_trained(trained):
    folder, model = trained
    loaded, facts = load_model(folder / "mxq_vae"), json.loads((folder / "mxq_vae.json").read_text())["facts"]
    assert loaded.config == model.config and torch.equal(loaded.legal, model.legal)
    assert facts["seed"] == 3 and facts["stage1"]["steps"] == 5 and "--preset tiny --seed 3" in facts["command"] and facts["versions"]["torch"]
    for a, b in zip(loaded.parameters(), model.parameters()): assert torch.allclose(a, b, atol=2e-3)  # stored in float16


def test_only_seen_codes_are_legal(trained):
    _, model = trained
    codes = recipe.training_codes(model, 40, seed=3)  # 5 steps of 8: no more is composed than will be seen
    assert model.legal[torch.arange(model.n), codes].all() and model.legal.any(1).all()
    assert model.legal.sum() == sum(len(c.unique()) for c in codes.T)


def test_a_finished_run_resumes_to_itself(trained):
    folder, model = trained
    again = recipe.train(folder, preset="tiny", seed=3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_codes_do_not_depend_on_the_chunk(trained):
    _, model = trained
    assert torch.equal(recipe.training_codes(model, 30, chunk=7), recipe.training_codes(model, 30, chunk=30))


def test_scores_are_complete_and_json(trained):
    _, model = trained
    report = recipe.evaluate(model, n=12)
    assert json.loads(json.dumps(report, default=float))
    assert {"settings", "samples", "real_pairs", "mix", "duplicates", "frechet", "reconstructions", "codes", "degree"} <= set(report)
    assert report["settings"]["command"].startswith("jointgen evaluate")


def test_subsets_that_were_never_drawn(trained):
    with pytest.raises(ValueError, match="0 samples came"): recipe.evaluate(trained[1], n=6, subsets=["Quad3"])


def test_unknown_preset_and_folder():
    with pytest.raises(ValueError, match="tutorial or paper"): recipe.train("nowhere", preset="tutorail")


def test_the_committed_results_meet_their_claims():
    from pathlib import Path
    report = json.loads((Path(__file__).parents[1] / "nbs/results/mxq_vae.json").read_text())
    kinds = [report["samples"][k] for k in ("Single", "Quad1", "Quad2", "Quad3", "Quad4")]
    assert report["settings"]["n"] >= 2000 and report["samples"]["average"] >= 0.70 and min(kinds) >= 0.50
    assert report["samples"]["parsed"] >= 0.97 and report["largest_gap_of_mix"] <= 0.07
    assert report["degree"]["caption_edited"]["deviation"] <= 0.10 and report["degree"]["caption_edited"]["monotone"]
    assert report["codes"]["all"]["share"] >= 0.70


def test_switches_and_codes_out_of_range(trained):
    from jointgen.models.mxq_vae import MXQVAE
    _, model = trained
    for wrong in (dict(mask_ratio=1.5), dict(mask_ratio=-1.), dict(fusion=-1)):
        with pytest.raises(ValueError, match="0 or more layers"): MXQVAE(model.vocab, **wrong)
    with pytest.raises(ValueError, match="has 0 to 31"): model.decode(torch.full((1, model.n), 32))
    assert len(model.sample_pairs(2, temperature=0, top_p=1)) == 2


def test_the_convolutional_path_survives_saving(trained, tmp_path):
    from jointgen.joint import save_model
    from jointgen.models.mxq_vae import MXQVAE
    model = MXQVAE(trained[1].vocab, text="convolution", text_sizes=dict(widths=(8, 8, 8, 8)), d=16, k=16, prior=dict(d=16, layers=1, heads=2)).eval()
    loaded = load_model(save_model(model, tmp_path / "m"))
    codes = torch.randint(0, 16, (2, model.n))
    assert torch.equal(loaded.decode(codes).tokens, model.decode(codes).tokens)

"""Reports on samples and reconstructions, held against models whose failures are known."""
import pytest
import torch

from jointgen.digits import captioned_digits
from jointgen.metrics import load_reader
from jointgen.pairs import Pairs
from jointgen.scores import of_subsets, score_reconstructions, score_samples

READER = load_reader(32)
REAL, TRAIN = captioned_digits(900, "test").pairs, captioned_digits(400).pairs
VOCAB = REAL.vocab


def test_real_pairs_score_like_real_pairs():
    r = score_samples(REAL[600:], REAL[:600], TRAIN, READER)
    assert abs(r["samples"]["average"] - r["real_pairs"]["average"]) < 0.06 and r["real_pairs"]["average"] > 0.9
    assert abs(r["frechet"]["joint"]["samples"] / r["frechet"]["joint"]["floor"] - 1) < 0.4
    assert r["duplicates"]["samples"]["pairs"] == 0 and abs(sum(r["mix"]["samples"].values()) - 1) < 1e-9


def test_shuffled_captions_are_seen_by_the_joint_scores_only():
    shuffled = Pairs(REAL.image[600:], REAL.tokens[600:].roll(1, 0), VOCAB)
    r, honest = (score_samples(p, REAL[:600], TRAIN, READER) for p in (shuffled, REAL[600:]))
    assert r["samples"]["average"] < 0.1
    assert r["frechet"]["picture"]["samples"] == pytest.approx(honest["frechet"]["picture"]["samples"], abs=1e-5)
    assert r["frechet"]["joint"]["samples"] > 1.2 * honest["frechet"]["joint"]["samples"]


def test_a_thief_is_caught():
    r = score_samples(TRAIN[:200], REAL[:400], TRAIN, READER)
    assert r["duplicates"]["samples"]["pairs"] == 1 and r["duplicates"]["real_pairs"]["pairs"] == 0


def test_reconstructions_blame_the_right_side():
    truth = REAL[:200]
    dark = score_reconstructions(Pairs(-torch.ones_like(truth.image), truth.tokens, VOCAB), truth, READER)
    assert dark["pictures"]["average"] == 0 and dark["captions"] == dark["truth"] and dark["captions_unchanged"] == 1


def test_subsets():
    kept = of_subsets(REAL, ["Quad2"])
    assert 0 < len(kept) < len(REAL) and all("and" in c for c in kept.captions)
    assert len(of_subsets(REAL, [])) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="at least 400"): score_samples(REAL[:200], REAL[:300], TRAIN, READER)
    with pytest.raises(ValueError, match="one each"): score_reconstructions(REAL[:3], REAL[:4], READER)

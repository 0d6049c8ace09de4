"""Any model can be shown: by what it can do, never by its name."""
import pytest
import torch
from safetensors.torch import load_file

from jointgen.digits import captioned_digits, digit_vocab
from jointgen.gallery import WAYS, draw_way, judge, report_lines, show_case, way_options, ways, write_pairs
from jointgen.metrics import load_reader
from jointgen.pairs import Pairs


class Model(torch.nn.Linear):
    vocab = digit_vocab()

    def __init__(self):
        super().__init__(1, 1)


class Pairer(Model):
    def sample_pairs(self, n, *, generator=None, temperature=1., top_k=None):
        pairs = captioned_digits(n, "test", seed=int(torch.randint(10**6, (1,), generator=generator))).pairs
        return Pairs(pairs.image * min(1., temperature), pairs.tokens)


class Painter(Model):
    def text_to_image(self, tokens, *, generator=None, strength=1.):
        assert not torch.is_grad_enabled()
        return torch.rand(len(tokens), 3, 32, 32, generator=generator) * strength


class Teller(Model):
    def image_to_text(self, image, *, generator=None, temperature=1.):
        said = self.vocab.encode(["this is red 3.", "this is blue 8."])
        return said[(torch.rand(len(image), generator=generator) < temperature / 2).long()]


class Both(Painter, Teller):
    pass


class All(Pairer, Both):
    pass


@pytest.mark.parametrize("model, found", [(Pairer, ["pairs"]), (Painter, ["pictures"]), (Teller, ["captions"]), (Both, ["pictures", "captions"]), (All, list(WAYS))])
def test_ways_follow_capabilities(model, found):
    model = model()
    assert ways(model) == found
    for way in WAYS:
        if way in found:
            a, b, c = (draw_way(model, way, n=5, seed=s) for s in (3, 3, 4))
            assert torch.equal(a.image, b.image) and torch.equal(a.tokens, b.tokens) and len(a) == 5 and a.vocab == model.vocab
            assert not (torch.equal(a.image, c.image) and torch.equal(a.tokens, c.tokens))
        else:
            with pytest.raises(ValueError, match=f"no {way}"):
                draw_way(model, way)


def test_options_of_a_way_are_those_of_its_method():
    model = All()
    assert [way_options(model, w) for w in WAYS] == [("temperature", "top_k"), ("strength",), ("temperature",)]
    assert draw_way(model, "pictures", strength=0., temperature=None).image.abs().max() == 0
    with pytest.raises(ValueError, match="has no temperature for pictures, it takes strength"):
        draw_way(model, "pictures", temperature=.5)
    with pytest.raises(ValueError, match="has no strength"):
        draw_way(model, "pairs", strength=.5)


def test_both_directions_start_from_one_held_out_pair():
    given = captioned_digits(8, "test")
    painted, told = draw_way(Both(), "pictures", picture=7), draw_way(Both(), "captions", picture=7)
    assert set(painted.captions) == {given.captions[7]} and torch.equal(told.image, given.pairs.image[7:].repeat(8, 1, 1, 1))
    assert draw_way(Both(), "pictures", n=2, caption="this is green 1.").captions == ["this is green 1."] * 2
    with pytest.raises(ValueError, match="zebra"):
        draw_way(Both(), "pictures", caption="a zebra")


def test_the_show_case_has_a_row_a_way():
    for model, rows in (Pairer(), 1), (Painter(), 2), (Teller(), 1), (Both(), 3), (All(), 3):
        assert len(show_case(model, n=3).axes) == 3 * rows
    with pytest.raises(ValueError, match="draws nothing"):
        show_case(Model())


def test_verdicts_only_where_the_reader_can_judge():
    data = captioned_digits(20, "test").pairs
    assert sum(judge(data)) >= 19
    assert judge(captioned_digits(2, side=16).pairs) is None
    assert judge(Pairs(data.image, data.tokens)) is None


def test_a_wrong_pair_is_told():
    pairs = captioned_digits(4, "test", subsets=["Quad1"]).pairs
    pairs.tokens[0] = Model.vocab.encode(["this is red 3."])[0]
    pairs.tokens[1] = torch.tensor([1, 5, 2] + [0] * (pairs.tokens.shape[1] - 3))
    lines = report_lines(pairs, load_reader(32))
    assert sum("differ" in line for line in lines) == 2 and sum("cannot be read" in line for line in lines) == 1


def test_files_hold_what_was_drawn(tmp_path):
    pairs = draw_way(Pairer(), "pairs", n=5, seed=1)
    paths = write_pairs(pairs, tmp_path / "new" / "folder", marks=[True] * 5)
    assert [p.name for p in paths] == ["pairs.png", "captions.txt", "pairs.safetensors"]
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {p.name for p in paths}
    assert paths[1].read_text().splitlines() == pairs.captions and paths[0].read_bytes().startswith(b"\x89PNG")
    stored = load_file(paths[2])
    assert stored["image"].shape == (5, 32, 32, 3) and torch.equal(stored["tokens"], pairs.tokens)

"""The sampler without a browser: what is asked, what is drawn, what is shown."""
import threading
import time

import pytest
import torch

from jointgen.digits import captioned_digits, digit_vocab
from jointgen.gallery import ways
from jointgen.pairs import Pairs
from jointgen.widgets import Newest, Sampler, control_names, draw_request, make_controls, other_temperature, request_png, sampler


class Copycat:
    vocab = digit_vocab()

    def sample_pairs(self, n, *, generator=None, temperature=1., top_k=None):
        assert top_k is None or top_k > 0
        pairs = captioned_digits(n, "test", seed=int(torch.randint(10**6, (1,), generator=generator))).pairs
        return Pairs(pairs.image * min(1., temperature), pairs.tokens)


class Slow(Copycat):
    """Notes how many draw at once."""
    now, most, calls = 0, 0, 0

    def sample_pairs(self, n, *, generator=None, temperature=1.):
        Slow.now += 1
        Slow.calls += 1
        Slow.most = max(Slow.most, Slow.now)
        time.sleep(.05)
        Slow.now -= 1
        return super().sample_pairs(n, generator=generator, temperature=temperature)


class Painter(torch.nn.Linear):
    vocab = digit_vocab()

    def __init__(self):
        super().__init__(1, 1)

    def text_to_image(self, tokens, *, generator=None):
        return torch.rand(len(tokens), 3, 32, 32, generator=generator)


class Parrot(Painter):
    """Two ways: paints noise, and says one of two things of any picture."""

    def image_to_text(self, image, *, generator=None, temperature=1.):
        said = self.vocab.encode(["this is red 3.", "this is blue 8."])
        return said[(torch.rand(len(image), generator=generator) < temperature / 2).long()]


REQUEST = dict(model="m", n=3, seed=1, temperature=1., top_k=0, caption="this is red 3.", picture=4)


def test_controls_follow_the_model():
    assert control_names(Copycat()) == ["n", "seed", "temperature", "top_k"]
    assert control_names(Slow()) == ["n", "seed", "temperature"]
    assert control_names(Painter()) == ["n", "seed", "caption"]
    assert ways(Parrot()) == ["pictures", "captions"] and ways(Copycat()) == ["pairs"]
    assert control_names(Parrot()) == ["way", "n", "seed", "caption"]
    assert control_names(Parrot(), "captions") == ["way", "n", "seed", "picture", "temperature"]
    with pytest.raises(ValueError, match="draws nothing"):
        control_names(torch.nn.Linear(2, 2))
    assert set(control_names(Copycat())) | set(control_names(Parrot(), "captions")) < set(make_controls(["a"]))


def test_captions_of_one_picture():
    told = draw_request(Parrot(), REQUEST | dict(way="captions", n=8))
    assert torch.equal(told.image, captioned_digits(5, "test").pairs.image[4:].repeat(8, 1, 1, 1))
    assert set(told.captions) == {"this is red 3.", "this is blue 8."}
    other = draw_request(Parrot(), REQUEST | dict(way="captions", n=8, seed=2))
    assert other.captions != told.captions and torch.equal(other.image, told.image)
    assert "picture=4" in request_png(Parrot(), REQUEST | dict(way="captions"))[1]


def test_another_model_brings_its_ways():
    box = sampler({"cat": Copycat(), "parrot": Parrot(), "painter": Painter()})
    shown = lambda: {k for k, c in box.controls.items() if c.layout.display != "none"}  # noqa: E731
    for model, way, names in ("parrot", "captions", {"way", "picture", "temperature"}), ("parrot", "pictures", {"way", "caption"}), \
            ("cat", "pairs", {"temperature", "top_k"}), ("painter", "pictures", {"caption"}):
        box.controls["model"].value = model
        box.controls["way"].value = way
        assert box.worker.wait(20) and shown() == {"model", "n", "seed"} | names
        wanted = {k: c.value for k, c in box.controls.items()}
        assert box.picture.value == request_png(box.models[model], wanted)[0]


@pytest.mark.parametrize("model", [Copycat(), Slow(), Painter(), Parrot()])
def test_a_request_decides_everything(model):
    a, _, c = (draw_request(model, REQUEST | dict(seed=s)) for s in (1, 2, 1))
    assert torch.equal(a.image, c.image) and torch.equal(a.tokens, c.tokens) and len(a) == 3 and a.vocab == model.vocab
    assert not torch.equal(a.image, draw_request(model, REQUEST | dict(seed=2)).image)
    png, said = request_png(model, REQUEST)
    assert png == request_png(model, REQUEST)[0] and png.startswith(b"\x89PNG") and "n=3 seed=1" in said


def test_temperatures_come_round():
    seen, t = [], 1.
    for _ in range(8):
        t = other_temperature(t)
        seen.append(t)
    assert len(set(seen)) == 4 and seen[:4] == seen[4:]


def test_newest_under_many_threads():
    running, most, shown = [], [], []

    def job(x):
        running.append(x)
        most.append(len(running))
        time.sleep(.002)
        running.remove(x)
        return x

    worker = Newest(job, lambda request, result: shown.append(result))
    for round in range(30):
        threads = [threading.Thread(target=worker.ask, args=((round, i),)) for i in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        worker.ask((round, "last"))
        assert worker.wait(10) and shown[-1] == (round, "last")
    assert set(most) == {1}


def test_newest_survives_errors_and_times_out():
    shown = []
    worker = Newest(lambda x: 1 / x, lambda request, result: shown.append(result))
    for x in 0, 2:
        worker.ask(x)
        assert worker.wait(5)
    assert isinstance(shown[0], ZeroDivisionError) and shown[1] == .5
    worker.job = time.sleep
    worker.ask(.3)
    assert not worker.wait(.01) and worker.wait(5)


def test_quick_presses_end_with_what_the_controls_say():
    box = sampler({"slow": Slow(), "painter": Painter()})
    calls = Slow.calls
    for knob in ["seed"] * 12 + ["temperature"] + ["seed"] * 3:
        box.press(knob)
    assert box.state.value == "drawing ..." and box.worker.wait(20)
    assert Slow.most == 1 and Slow.calls - calls < 10
    wanted = {k: c.value for k, c in box.controls.items()}
    assert wanted["seed"] == 15 and wanted["temperature"] == 1.5 and "seed=15 temperature=1.5" in box.state.value
    assert box.picture.value == request_png(Slow(), wanted)[0]


def test_another_model_shows_its_controls_and_errors_are_told():
    box = sampler({"cat": Copycat(), "painter": Painter()})
    hidden = lambda: {k for k, c in box.controls.items() if c.layout.display == "none"}  # noqa: E731
    assert hidden() == {"way", "picture", "caption"}
    box.controls["model"].value = "painter"
    box.worker.wait()
    assert hidden() == {"way", "picture", "temperature", "top_k"} and box.buttons["temperature"].layout.display == "none"
    picture = box.picture.value
    box.controls["caption"].value = "a zebra"
    box.worker.wait()
    assert "zebra" in box.state.value and box.picture.value == picture


def test_a_still_picture_goes_with_the_widget():
    bundle = sampler({"cat": Copycat()})._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle) and len(bundle["text/plain"]) < 50


def test_models_are_loaded_when_chosen(monkeypatch):
    loaded = []
    monkeypatch.setattr("jointgen.widgets.load", lambda name: loaded.append(name) or Copycat())
    monkeypatch.setattr("jointgen.widgets.shipped", lambda: ["a", "b"])
    box = sampler()
    assert isinstance(box, Sampler) and loaded == ["a"]
    box.controls["model"].value = "b"
    box.controls["model"].value = "a"
    box.worker.wait()
    assert loaded == ["a", "b"]
    with pytest.raises(ValueError, match="there are no models"):
        sampler({})

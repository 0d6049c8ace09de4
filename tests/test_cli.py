"""The `jointgen` command: what it writes, and how it says no."""
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import jointgen.cli as cli
import jointgen.joint
from jointgen.digits import captioned_digits, digit_vocab
from jointgen.joint import load, shipped
from jointgen.pairs import Pairs

VERBS = ["demo", "evaluate", "sample", "train"]


class Copycat:
    """Draws from the data: needs no training, and is always right."""
    vocab = digit_vocab()

    def sample_pairs(self, n, *, generator=None, temperature=1.):
        pairs = captioned_digits(n, "test", seed=int(torch.randint(10_000, (1,), generator=generator))).pairs
        return Pairs(pairs.image * min(1., temperature), pairs.tokens)


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


@pytest.fixture
def copycat(monkeypatch, tmp_path):
    """The command line with a model that costs nothing."""
    monkeypatch.setattr(jointgen.joint, "load", lambda name, device="cpu": Copycat())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(answer, *words):
    """Exit code 2, one line of error, no traceback."""
    assert answer.exit_code == 2, answer.output
    assert "Traceback" not in answer.output and answer.output.count("Error: ") == 1
    line = answer.output[answer.output.index("Error: "):].strip()
    assert "\n" not in line
    for word in words:
        assert word in line, line


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    answer = run(verb, "--help")
    assert answer.exit_code == 0 and verb in run("--help").output
    for option in "--seed", "--device", "--out", "--help":
        assert option in answer.output


def test_help_does_not_load_torch():
    code = "import sys, jointgen.cli\nassert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- demo and sample


def test_demo(copycat):
    answer = run("demo", "--seed", 3)
    assert answer.exit_code == 0, answer.output
    for name in shipped():  # every model, none by its name
        assert (copycat / "demo" / name / "pairs.png").read_bytes() != (copycat / "demo" / name / "everything.png").read_bytes()
        assert (copycat / "demo" / name / "report.txt").read_text().count(" agree ") >= 15 and f"{name}: 16 of 16" in answer.output
    assert answer.output.count(" agree ") == 4 * len(shipped()) and "average" in answer.output and "jointgen sample" in answer.output


def test_demo_of_what_cannot_be_judged(copycat, monkeypatch):
    monkeypatch.setattr(Copycat, "word_order", False, raising=False)
    answer = run("demo")
    assert answer.exit_code == 0, answer.output
    assert "agree" not in answer.output and (copycat / "demo" / shipped()[0] / "report.txt").read_text().count("\n") == 16


class Both(Copycat):
    """Paints black pictures, and tells one thing."""

    def __init__(self):
        self.parameters = lambda: iter([torch.zeros(1)])

    def text_to_image(self, tokens, *, generator=None):
        return -torch.ones(len(tokens), 3, 32, 32)

    def image_to_text(self, image, *, generator=None, temperature=1.):
        return self.vocab.encode(["this is red 3."] * len(image))


def test_one_caption_or_one_picture(copycat, monkeypatch):
    refused(run("sample", "mxq-vae", "--caption", "this is red 3."), "Copycat draws pairs, no pictures")
    monkeypatch.setattr(jointgen.joint, "load", lambda name, device="cpu": Both())
    for i, start in enumerate([("--caption", "this is blue 8."), ("--picture", 3)]):
        assert run("sample", "mxq-vae", "--n", 3, *start, "--out", str(i)).exit_code == 0
    assert (copycat / "0" / "captions.txt").read_text() == "this is blue 8.\n" * 3
    told = load_file(copycat / "1" / "pairs.safetensors")["image"]
    assert (told == told[0]).all() and told[0].max() > 100
    refused(run("sample", "mxq-vae", "--caption", "this is a zebra."), "zebra")
    refused(run("sample", "mxq-vae", "--caption", "this is red 3.", "--picture", 3), "leave one out")
    refused(run("sample", "mxq-vae", "--caption", "this is red 3.", "--temperature", .5), "no temperature for pictures")


def test_same_seed_same_bytes(copycat):
    for out, seed in ("a", 7), ("b", 7), ("c", 8):
        assert run("sample", "mxq-vae", "--n", 5, "--seed", seed, "--temperature", .9, "--out", out).exit_code == 0
    names = sorted(p.name for p in (copycat / "a").iterdir())
    assert names == ["captions.txt", "pairs.png", "pairs.safetensors"]
    for n in names:
        assert (copycat / "a" / n).read_bytes() == (copycat / "b" / n).read_bytes() != (copycat / "c" / n).read_bytes()
    stored, text = load_file(copycat / "a" / "pairs.safetensors"), (copycat / "a" / "captions.txt").read_text().splitlines()
    assert stored["image"].shape == (5, 32, 32, 3) and stored["image"].dtype == torch.uint8
    assert Copycat.vocab.decode(stored["tokens"]) == text


def test_options_that_a_model_lacks_are_refused(copycat):
    refused(run("sample", "mxq-vae", "--top-k", 5), "has no top_k", "temperature")


def test_own_weights_must_be_of_that_model(tmp_path, monkeypatch):
    monkeypatch.setattr(jointgen.joint, "load_model", lambda path, device="cpu": Copycat())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    refused(run("sample", "mxq-vae", "--weights", "w.safetensors"), "Copycat", "right model")


# --- train and evaluate


@pytest.fixture
def module(copycat, monkeypatch):
    """A model's module that only notes what it was asked."""
    asked = {}

    def train(out, *, preset="tutorial", seed=0, device="cpu", steps=None, resume=False):
        asked.update(out=out, preset=preset, seed=seed, device=device, steps=steps, resume=resume)

    def evaluate(model, *, n, seed):
        return dict(n=n, consistency=dict(Single=.5, average=.5), mix=dict(model=dict(Single=.2, Quad1=.8), data=dict(Single=.3, Quad1=.7)))

    monkeypatch.setattr(cli, "recipe", lambda name, part: dict(train=train, evaluate=evaluate)[part])
    monkeypatch.setitem(globals(), "PRESETS", dict(tutorial={}, paper={}))
    return asked


def test_train_passes_on_what_was_given(module):
    assert run("train", "mxq-vae", "--steps", 5, "--seed", 3, "--resume", "--out", "r").exit_code == 0
    assert {k: str(v) for k, v in module.items()} == dict(out="r", preset="tutorial", seed="3", device="cpu", steps="5", resume="True")
    assert run("train", "MXQ_VAE", "--preset", "paper").exit_code == 0
    assert str(module["out"]).endswith("mxq-vae") and module["preset"] == "paper" and module["steps"] is None


def test_train_refuses_what_does_not_fit(module):
    refused(run("train", "mxq-vae", "--preset", "papre"), "did you mean 'paper'")
    refused(run("train", "mxq-vae", "--side", 64), "takes no side")
    refused(run("train", "reader", "--resume"), "takes no resume")
    refused(run("train", "readr"), "did you mean 'reader'")
    assert not module


def test_train_reader(monkeypatch, tmp_path):
    from jointgen.reader import make_reader
    monkeypatch.setattr("jointgen.reader.make_reader", lambda *a, **k: make_reader(*a, pairs=50, **k))
    answer = run("train", "reader", "--side", 32, "--steps", 3, "--out", tmp_path / "w")
    assert answer.exit_code == 0 and "unseen handwriting" in answer.output, answer.output
    assert (tmp_path / "w" / "reader_32.safetensors").exists()


def test_evaluate_prints_and_writes(module):
    answer = run("evaluate", "mxq-vae", "--n", 20, "--out", "e")
    assert answer.exit_code == 0, answer.output
    assert json.loads(open("e/evaluation.json").read())["mix"]["model"]["Quad1"] == .8
    for row in "consistency   0.500   0.500", "model   0.200   0.800", "data    0.300   0.700":
        assert row in answer.output
    refused(run("evaluate", "mxq-vae", "--subset", "Quad1"), "takes no subsets")


def test_evaluate_reader():
    answer = run("evaluate", "reader", "--n", 60, "--subset", "quad4", "--subset", "Single")
    assert answer.exit_code == 0, answer.output
    assert "Quad4" in answer.output and "Quad2" not in answer.output and "32 px" in answer.output


def test_tables_show_everything_once():
    results = dict(name="x", curve=[.25, .5], flag=True, one=dict(a=1., b=2), two=dict(a=3., b=4.), other=dict(c=5.), deep=dict(er=dict(d=6.), empty={}))
    text = "\n\n".join(cli.tables(results))
    for number in "0.250 0.500", "True", "1.000", "2.000", "3.000", "4.000", "5.000", "6.000":
        assert text.count(number) == 1, text


# --- bench


def test_bench_help():
    answer = run("bench", "--help")
    assert answer.exit_code == 0 and "bench" in run("--help").output
    for option in "--device", "--check / --no-check", "--quick", "--only", "--out":
        assert option in answer.output


def test_bench_passes_on_what_was_given(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("jointgen.kernels.benchmark.bench_kernels", lambda **options: asked.update(options) or True)
    assert run("bench", "kernels", "--quick", "--check", "--out", tmp_path / "k.json").exit_code == 0
    assert asked["quick"] and asked["check"] and asked["out"] == tmp_path / "k.json" and asked["device"] == "cpu"
    assert run("bench", "Kernels", "--no-check").exit_code == 0 and not asked["check"] and not asked["quick"] and asked["only"] == ""
    monkeypatch.setattr("jointgen.model_speed.bench_models", lambda **options: asked.update(options, models=True) or True)
    assert run("bench", "models", "--only", "hdgan", "--out", tmp_path / "m.json").exit_code == 0
    assert asked["models"] and asked["only"] == "hdgan" and asked["out"] == tmp_path / "m.json" and asked["check"] and asked["device"] == "cpu"


def test_bench_refuses(monkeypatch, copycat):
    monkeypatch.setattr("jointgen.kernels.benchmark.bench_kernels", lambda **options: False)
    refused(run("bench", "kernels"), "a kernel of this package was refused")
    monkeypatch.setattr("jointgen.model_speed.bench_models", lambda **options: False)
    refused(run("bench", "models"), "missed a bar: see the table")
    refused(run("bench", "kernles"), "unknown benchmark 'kernles'", "did you mean 'kernels'")
    refused(run("bench"), "Missing argument")
    refused(run("bench", "kernels", "--device", "gpu"), "'gpu' is not available")
    (copycat / "file").write_text("in the way")
    refused(run("bench", "kernels", "--out", copycat / "file" / "k.json"), "cannot be written")
    refused(run("bench", "kernels", "--out", copycat), "is a directory")


def test_bench_quick(tmp_path):
    answer = run("bench", "kernels", "--quick", "--check", "--out", tmp_path / "new" / "k.json")
    assert answer.exit_code == 0, answer.output
    stored = json.loads((tmp_path / "new" / "k.json").read_text())
    assert stored["checked"] and stored["quick"] and stored["device"]["type"] == "cpu" and "ceilings" in answer.output
    for operation in "nearest code", "code statistics", "rotation gradient", "coupling, both":
        assert operation in answer.output and any(r["operation"] == operation and r["ms"] > 0 for r in stored["rows"] if r["ours"])


def test_bench_models_quick(tmp_path):
    answer = run("bench", "models", "--quick", "--only", "flow", "--out", tmp_path / "new" / "m.json")
    assert answer.exit_code == 0, answer.output
    stored = json.loads((tmp_path / "new" / "m.json").read_text())
    assert stored["quick"] and stored["checked"] and "samples/s" in answer.output
    assert {r["operation"] for r in stored["rows"]} == {"flow: samples for one picture"} and all(r["ms"] > 0 for r in stored["rows"])


# --- errors


def test_suggestions():
    refused(run("trian", "mxq-vae"), "unknown command 'trian'", "did you mean 'train'")
    refused(run("sample", "mxqvae"), "unknown model 'mxqvae'", "did you mean 'mxq-vae'")
    refused(run("evaluate", "reader", "--subset", "qad2"), "unknown subset 'qad2'", "Quad")
    refused(run("sample", "zzz"), "known are", "mxq-vae")


@pytest.mark.parametrize("arguments", [
    ["demo", "--seed", "-1"], ["demo", "--device", "gpu"], ["sample"], ["sample", "mxq-vae", "--n", "0"], ["sample", "mxq-vae", "--top-p", "0"],
    ["sample", "mxq-vae", "--temprature", "1"], ["sample", "mxq-vae", "--weights", "nowhere"], ["evaluate", "reader", "--n", "many"], ["train"]])
def test_wrong_usage(arguments):
    refused(run(*arguments))


@pytest.mark.parametrize("verb", [["demo"], ["sample", "mxq-vae"], ["evaluate", "reader"], ["train", "reader"]])
def test_out_that_cannot_be_written(verb, copycat):
    (copycat / "file").write_text("in the way")
    refused(run(*verb, "--out", copycat / "file" / "folder"), "cannot be written")
    refused(run(*verb, "--out", copycat / "file"), "cannot be written")
    assert (copycat / "file").read_text() == "in the way"


def test_a_bare_name_shows_the_help():
    assert "Commands:" in run().output


# --- with the shipped weights


def test_shipped_sample_twice(tmp_path):
    assert "mxq-vae" in shipped()
    for out in "a", "b":
        command = [sys.executable, "-m", "jointgen.cli", "sample", "mxq-vae", "--n", "8", "--seed", "7", "--out", str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_shipped_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run("demo")
    assert answer.exit_code == 0, answer.output
    for name in shipped():
        report = (tmp_path / "demo" / name / "report.txt").read_text()
        told = report.count(" agree ") + report.count(" differ ") if load(name).word_order else len(report.splitlines())  # a bag is not judged as a sentence
        assert told == 16 and (tmp_path / "demo" / name / "everything.png").exists()

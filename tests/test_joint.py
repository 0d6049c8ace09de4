import json, subprocess, sys
from typing import get_type_hints

import pytest, torch
from torch import nn

import jointgen
from jointgen.joint import (ImageToText, JointModel, Reconstructs, SamplesPairs, TextToImage, Transform, Turn, capabilities, capability_table, check_config, file_stem,
                            load, load_model, one_turn, read_about, save_model, shipped, shrink, weights_folder)
from jointgen.pairs import Pairs, Vocab


class Toy(JointModel):
    def __init__(self, vocab, *, d=4, widths=(2, 3)):
        super().__init__(vocab, d=d, widths=widths)
        self.embed = nn.Embedding(len(vocab), d)
        self.register_buffer('seen', torch.zeros((), dtype=torch.int64))

    def loss(self, pairs):
        loss = self.embed(pairs.tokens).square().mean()
        return loss, dict(words=loss)

    def sample_pairs(self, n, *, generator=None):
        return Pairs(torch.rand(n, 3, 4, 4, generator=generator), torch.ones(n, 4, dtype=torch.int64), self.vocab)


class Speaker(JointModel):
    word_order = False
    def image_to_text(self, image, *, generator=None): return torch.ones(len(image), 3, dtype=torch.int64)


class Plain(nn.Module):
    def __init__(self, side, classes):
        super().__init__()
        self.config = dict(side=side, classes=list(classes))
        self.net = nn.Linear(side, len(classes))


@pytest.fixture
def vocab(): return Vocab(['a', 'red', 'three'], 6)


@pytest.fixture
def pairs(vocab): return Pairs(torch.zeros(2, 3, 4, 4), vocab.encode(['a red three', 'three']), vocab)


def test_one_loss_is_one_turn(vocab, pairs):
    turn, = Toy(vocab).turns(pairs)
    assert turn.player == 'model' and turn.loss.requires_grad and set(turn.log) == {'words'}
    assert turn == Turn(*turn) and Turn('model', turn.loss).log == {}
    bare = nn.Linear(1, 1)
    bare.loss = lambda batch: bare(batch).sum()
    assert next(one_turn(bare, torch.ones(2, 1))).player == 'model'


def test_a_model_without_loss_or_with_too_many_players(vocab, pairs):
    with pytest.raises(ValueError, match='neither loss'): list(JointModel(vocab).turns(pairs))
    class Two(Toy):
        def players(self): return dict(a=self.embed, b=self.embed)
    with pytest.raises(ValueError, match=r"the players \['a', 'b'\] and one loss: define turns"): list(Two(vocab).turns(pairs))


def test_config_is_what_json_keeps(vocab):
    assert Toy(vocab, widths=(5,)).config == dict(d=4, widths=[5])
    with pytest.raises(ValueError, match='JSON cannot'): JointModel(vocab, net=nn.Linear(1, 1))


def test_capabilities_read_off_class_and_object(vocab):
    yes = dict(sample_pairs=True, text_to_image=False, image_to_text=False, reconstruct=False)
    assert capabilities(Toy) == capabilities(Toy(vocab)) == yes
    assert not any(capabilities(JointModel).values())
    assert isinstance(Toy(vocab), SamplesPairs) and issubclass(Speaker, ImageToText) and not issubclass(Toy, TextToImage) and not issubclass(Toy, Reconstructs)


def test_a_missing_method_does_not_exist(vocab):
    with pytest.raises(AttributeError): Toy(vocab).text_to_image


def test_capability_table_is_computed():
    table = capability_table([Toy, Speaker]).splitlines()
    assert len(table) == 4 and len({line.count('|') for line in table}) == 1
    assert table[2] == '| `Toy` | yes | - | - | - |' and table[3] == '| `Speaker` | - | - | yes, a **bag** of words | - |'


def test_transform_is_a_protocol():
    class Shift(nn.Module):
        def forward(self, x, context=None): return x + 1, torch.zeros(len(x))
        def inverse(self, z, context=None): return z - 1, torch.zeros(len(z))
    assert isinstance(Shift(), Transform) and not isinstance(nn.Linear(1, 1), Transform)


@pytest.mark.parametrize('ending', ['', '.safetensors', '.json'])
@pytest.mark.parametrize('dtype', [None, torch.float16])
def test_save_and_load_agree(vocab, tmp_path, ending, dtype):
    model = Toy(vocab, d=8, widths=(1,))
    model.seen += 7
    file = save_model(model, tmp_path/f'toy-0.1{ending}', dtype=dtype, seed=3, results=dict(score=0.5))
    again = load_model(f'{tmp_path}/toy-0.1{ending}', cls=Toy)
    assert file.name == 'toy-0.1.safetensors' and sorted(p.name for p in tmp_path.iterdir()) == ['toy-0.1.json', 'toy-0.1.safetensors']
    assert again.embed.weight.dtype == torch.float32 and not again.training and again.seen == 7
    assert again.vocab == vocab and again.config == model.config
    torch.testing.assert_close(again.embed.weight, model.embed.weight, atol=0 if dtype is None else 1e-2, rtol=0 if dtype is None else 1e-3)
    about = read_about(file)
    assert about['facts']['seed'] == 3 and about['facts']['device'] == 'cpu' and 'torch' in about['facts']['versions'] and about['vocab_hash'] == vocab.hash
    g = lambda: torch.Generator().manual_seed(1)
    assert torch.equal(model.sample_pairs(2, generator=g()).image, again.sample_pairs(2, generator=g()).image)


def test_saving_twice_gives_the_same_bytes(vocab, tmp_path):
    model = Toy(vocab)
    read = lambda: [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    save_model(model, tmp_path/'toy'); first = read()
    save_model(model, tmp_path/'toy')
    assert read() == first


def test_any_module_with_a_config(tmp_path):
    model = Plain(4, 'ab')
    save_model(model, tmp_path/'plain', kind='reader')
    assert torch.equal(load_model(tmp_path/'plain', cls=Plain).net.weight, model.net.weight) and read_about(tmp_path/'plain')['kind'] == 'reader'


def test_loading_leaves_random_numbers_alone(vocab, tmp_path):
    save_model(Toy(vocab), tmp_path/'toy')
    torch.manual_seed(0); first = torch.rand(3)
    torch.manual_seed(0); load_model(tmp_path/'toy', cls=Toy)
    assert torch.equal(torch.rand(3), first)


def test_a_config_that_forgets(vocab, tmp_path):
    class Forgets(Toy):
        def __init__(self, vocab, *, d=4, depth=2): super().__init__(vocab, d=d)
    with pytest.raises(ValueError, match='config lacks depth'): save_model(Forgets(vocab), tmp_path/'x')
    check_config(Toy(vocab))
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_survive(vocab, tmp_path):
    model = Toy(vocab)
    model.embed.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match='too large for torch.float16'): save_model(model, tmp_path/'x', dtype=torch.float16)
    save_model(model, tmp_path/'x')
    model.embed.weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN'): save_model(model, tmp_path/'x')
    assert load_model(tmp_path/'x', cls=Toy).embed.weight[0, 0] == 1e6, 'the file written before is whole'
    assert shrink({'i': torch.arange(3), 'inf': torch.full((2,), -torch.inf)}, torch.float16)['i'].dtype == torch.int64


def test_bad_files_are_one_clear_error(vocab, tmp_path):
    path = save_model(Toy(vocab), tmp_path/'toy')
    with pytest.raises(ValueError, match='holds a Toy, not a Speaker'): load_model(path, cls=Speaker)
    with pytest.raises(ValueError, match='trained with vocabulary'): load_model(path, cls=Toy, vocab=Vocab(['a', 'blue'], 6))
    with pytest.raises(ValueError, match='outside this package: give load_model its class'): load_model(path)
    with pytest.raises(ValueError, match='device nope is not available'): load_model(path, 'nope', cls=Toy)
    with pytest.raises(ValueError, match='missing'): load_model(tmp_path/'absent')
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match='cut short'): load_model(path, cls=Toy)
    about = path.with_suffix('.json')
    about.write_text(about.read_text()[:-20])
    with pytest.raises(ValueError, match='cut short or no JSON'): load_model(path, cls=Toy)
    about.write_text('{}')
    with pytest.raises(ValueError, match='not written by save_model'): load_model(path, cls=Toy)


def test_a_class_that_this_version_does_not_have(vocab, tmp_path):
    about = save_model(Toy(vocab), tmp_path/'toy').with_suffix('.json')
    about.write_text(json.dumps(json.loads(about.read_text()) | {'class': 'jointgen.joint:Absent'}))
    with pytest.raises(ValueError, match='this version does not have'): load_model(about)


def test_a_folder_that_cannot_be_written(vocab, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='cannot be written'): save_model(Toy(vocab), tmp_path/'file'/'toy')


def test_a_write_that_fails_leaves_the_last_file(vocab, tmp_path, monkeypatch):
    path = save_model(Toy(vocab), tmp_path/'toy')
    before = path.read_bytes()
    monkeypatch.setattr('jointgen.joint.file_facts', lambda path: 1/0)
    with pytest.raises(ZeroDivisionError): save_model(Toy(vocab), tmp_path/'toy')
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_unknown_names_get_a_suggestion(vocab, tmp_path, monkeypatch):
    monkeypatch.setattr('jointgen.joint.weights_folder', lambda: tmp_path)
    save_model(Toy(vocab), tmp_path/'a_toy')
    save_model(Plain(2, 'ab'), tmp_path/'reader_2', kind='reader')
    assert shipped() == ['a-toy'] == jointgen.models()
    with pytest.raises(ValueError, match="unknown model 'a-tou': did you mean 'a-toy'\\? shipped are a-toy"): load('a-tou')
    with pytest.raises(ValueError, match="unknown model 'qqq': shipped are"): jointgen.load('qqq')


def test_shipped_weights_load():
    for name in shipped():
        model = load(name)
        assert model.vocab is not None and not model.training and next(model.parameters()).dtype == torch.float32
    assert all(file.with_suffix('.safetensors').is_file() for file in weights_folder().glob('*.json'))


def test_import_is_light_and_models_is_a_package_that_can_be_called():
    code = ("import sys, jointgen, jointgen.models; assert 'torch' not in sys.modules, 'heavy'; assert callable(jointgen.models) and jointgen.models.__path__; "
            "assert jointgen.__version__ and isinstance(jointgen.models(), list); assert jointgen.pairs.PAD == 0\n"
            "try: jointgen.absent\nexcept AttributeError: pass\nelse: raise SystemExit('absent')\n"
            "try: jointgen.models.absent\nexcept AttributeError: pass\nelse: raise SystemExit('absent')")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_file_stem():
    assert [file_stem(p) for p in ('a/b.json', 'a/b.safetensors', 'a/b-0.1')] == ['a/b', 'a/b', 'a/b-0.1']


def test_annotations_resolve():
    for thing in (save_model, load_model, capability_table, TextToImage.text_to_image, Transform.inverse): assert get_type_hints(thing)

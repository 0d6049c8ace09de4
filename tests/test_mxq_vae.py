import socket

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import jointgen
from jointgen.digits import captioned_digits
from jointgen.joint import JointModel, capabilities, load_model, save_model, weights_folder
from jointgen.learner import Learner
from jointgen.metrics import load_reader, pair_consistency
from jointgen.models.mxq_vae import MXQVAE, PriorStage, hide_patches, hide_words
from jointgen.pairs import BOS, EOS, MASK, PAD, UNK, Pairs, Vocab

TINY = dict(side=16, k=16, d=16, n_text=2, patches=4, widths=(8, 12), res_blocks=1, warm_up=1, text_sizes=dict(width=16, layers=1),
            prior=dict(d=16, layers=1, heads=2))
CONVOLUTION = dict(text='convolution', n_text=4, text_sizes=dict(width=8, hidden=8, widths=(8, 8, 8, 8)))


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tiny(vocab, seed=0, **changes):
    torch.manual_seed(seed)
    return MXQVAE(vocab, **TINY | changes)


def lively(model):
    "Take a model away from its start, where the picture's decoder listens to the picture only."
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2*torch.randn(p.shape, generator=generator(1)))
    return model


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before, model): return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def equal(a, b): return torch.equal(a.image, b.image) and torch.equal(a.tokens, b.tokens)


def fit(model, data, steps, **options):
    return Learner(model, data, **dict(batch_size=8, schedule='constant') | options).fit(steps, progress=False)


@pytest.fixture(scope='module')
def data(): return captioned_digits(64, side=16)


@pytest.fixture(scope='module')
def pairs(data): return data.pairs


@pytest.fixture(scope='module')
def vocab(data): return data.vocab


@pytest.fixture(scope='module')
def trained(pairs):
    model = tiny(pairs.vocab)
    fit(model, pairs, 12, optimizer=dict(lr=3e-3))
    codes = model.eval().encode(pairs)
    model.allow_seen_codes_(codes)
    fit(PriorStage(model), codes, 4)
    return model.eval()


# --- shapes

def test_a_32_px_pair_is_72_codes():
    data = captioned_digits(3)
    model = MXQVAE(data.vocab, prior=dict(d=16, layers=1, heads=2)).eval()
    codes = model.encode(data.pairs)
    assert codes.shape == (3, 72) and codes.dtype == torch.int64 and (model.n_image, model.n, model.k) == (64, 72, 256)
    back = model.decode(codes)
    assert back.image.shape == (3, 3, 32, 32) and back.tokens.shape == (3, 40) and back.vocab == data.vocab


@pytest.mark.parametrize('side, tokens, n_text, n', [(64, 64, 8, 72), (128, 68, 16, 272), (128, 80, 20, 276)])
@pytest.mark.parametrize('text', ['attention', 'convolution'])
def test_the_papers_sizes(side, tokens, n_text, n, text):
    vocab = Vocab(captioned_digits(0).vocab.words, tokens)
    model = MXQVAE(vocab, **TINY | (CONVOLUTION if text == 'convolution' else {}) | dict(side=side, n_text=n_text, patches=8, widths=(4, 8, 8))).eval()
    pairs = captioned_digits(2, side=side).pairs
    pairs = Pairs(pairs.image, vocab.encode(pairs.captions), vocab)
    codes = model.encode(pairs)
    assert codes.shape == (2, n) and model.n_image == (side//8)**2
    assert model.decode(codes).image.shape == (2, 3, side, side) and model.decode(codes).tokens.shape == (2, tokens)


def test_reconstructing_in_parts_is_reconstructing_at_once(trained, pairs):
    codes = trained.encode(pairs)
    assert torch.equal(codes, trained.encode(pairs, batch_size=10))
    assert torch.allclose(trained.decode(codes).image, trained.decode(codes, batch_size=7).image, atol=1e-5)
    assert equal(trained.reconstruct(pairs), trained.decode(codes))


# --- switches

@pytest.mark.parametrize('switch', [dict(), dict(fusion=0), dict(shared_codebook=False), dict(joint_split=False), dict(mask_ratio=0.), dict(codebook='gradient'),
                                    CONVOLUTION, CONVOLUTION | dict(joint_split=False), dict(fusion=0, shared_codebook=False, joint_split=False, mask_ratio=0.)],
                         ids=lambda s: '-'.join(s) or 'default')
def test_every_switch_trains_and_samples(vocab, pairs, switch):
    model = tiny(vocab, **switch)
    log = fit(model, pairs, 3).log
    assert all(r['player'] == 'autoencoder' and np.isfinite(r['loss']) and {'mse', 'nll', 'commitment', 'words'} <= set(r) for r in log)
    assert log[0]['commitment'] == 0 and log[1]['commitment'] > 0  # quantized from the end of the warm-up on
    codes = model.eval().encode(pairs)
    books = 1 if model.config['shared_codebook'] else 2
    assert model.k == 16*books and codes.max() < model.k
    if books == 2: assert (codes[:, :model.n_image] < 16).all() and (codes[:, model.n_image:] >= 16).all()
    drawn = model.sample_pairs(3, generator=generator())
    assert drawn.image.shape == (3, 3, 16, 16) and drawn.tokens.shape == (3, 40) and drawn.image.abs().max() <= 1


def test_masking_hides_a_share_of_both_sides(vocab, pairs):
    torch.manual_seed(0)
    hidden = tiny(vocab, masked_share=1., random_words=0.).hide(pairs)
    assert ((hidden[0] == 0).all(1).flatten(1).sum(1) == 16*int(.3*16)).all()
    assert torch.equal((hidden[1] == MASK).sum(1), (.3*(pairs.tokens != PAD).sum(1)).long())
    whole = tiny(vocab, masked_share=0.).hide(pairs)
    assert torch.equal(whole[0], pairs.image) and torch.equal(whole[1], pairs.tokens)


@pytest.mark.parametrize('ratio', [0., .3, 1.])
def test_masks_are_distinct_and_follow_the_generator(pairs, vocab, ratio):
    (image, patches), again = (hide_patches(pairs.image, ratio, patches=4, generator=generator()) for _ in range(2))
    assert torch.equal(image, again[0]) and (patches.sum((1, 2)) == int(ratio*16)).all()
    tokens, words = hide_words(pairs.tokens, ratio, vocab_size=len(vocab), random_words=.5, generator=generator())
    there = pairs.tokens != PAD
    assert torch.equal(words.sum(1), (ratio*there.sum(1)).long()) and not words[~there].any()
    assert torch.equal(tokens[~words], pairs.tokens[~words]) and not torch.isin(tokens[words], torch.tensor([PAD, BOS, EOS, UNK])).any()


# --- who hears whom

@pytest.mark.parametrize('fusion', [0, 1])
@pytest.mark.parametrize('joint_split', [False, True])
@pytest.mark.parametrize('text', [{}, CONVOLUTION], ids=['attention', 'convolution'])
def test_a_modality_hears_the_other_only_through_fusion_or_the_joint_split(vocab, pairs, fusion, joint_split, text):
    model, b = lively(tiny(vocab, fusion=fusion, joint_split=joint_split, **text)).eval(), pairs[:4]
    speak = lambda image, tokens: model.text.logits(model.features(image, tokens), b.tokens)
    show = lambda image, tokens: model.paint(model.features(image, tokens))
    with torch.no_grad():
        other_picture = (speak(b.image, b.tokens) - speak(-b.image, b.tokens)).abs().amax((1, 2))
        other_caption = (show(b.image, b.tokens) - show(b.image, b.tokens.roll(1, 0))).abs().amax((1, 2, 3))
    if fusion or joint_split: assert (other_picture > 1e-4).all() and (other_caption > 1e-5).all()
    else:
        assert not other_picture.any() and not other_caption.any()
        swapped = model.encode(Pairs(-b.image, b.tokens, vocab))
        assert torch.equal(swapped[:, model.n_image:], model.encode(b)[:, model.n_image:])


# --- players and state

def test_stage_1_moves_all_of_the_autoencoder_and_nothing_else(vocab, pairs):
    model = tiny(vocab)
    before = state(model)
    fit(model, pairs, 1)
    moved = changed(before, model)
    assert not any(k.startswith('prior.') or k == 'legal' for k in moved)
    assert {k for k, _ in model.named_parameters() if not k.startswith('prior.')} <= moved and 'trained' in moved
    before = state(model)
    fit(model, pairs, 3, seed=1)
    assert {'quantizers.0.codebook', 'quantizers.0.ema_counts'} <= changed(before, model)


def test_stage_2_moves_the_prior_and_nothing_else(vocab, pairs):
    model = tiny(vocab)
    fit(model, pairs, 2)
    codes = model.eval().encode(pairs)
    before = state(model)
    log = fit(PriorStage(model), codes, 2).log
    assert all(k.startswith('prior.') for k in changed(before, model)) and {k for k, _ in model.named_parameters() if k.startswith('prior.')} <= changed(before, model)
    assert abs(log[0]['loss'] - np.log(model.k)) < .3  # an untrained prior knows nothing


def test_looking_changes_nothing(trained, pairs):
    before = state(trained)
    trained.train()
    trained.quantize(trained.features(pairs.image, pairs.tokens))
    trained.reconstruct(pairs); trained.sample_pairs(2)
    trained.eval()
    next(iter(trained.turns(pairs)))  # a turn that nobody takes
    assert not changed(before, trained)


def test_training_resumes_exactly(vocab, pairs, tmp_path):
    whole = tiny(vocab, warm_up=2)
    fit(whole, pairs, 6, folder=tmp_path/'whole')
    for stop in (1, 2, 3):  # before, at and after the k-means start
        fit(tiny(vocab, warm_up=2), pairs, stop, folder=tmp_path/f'{stop}')
        torch.manual_seed(99)
        model = MXQVAE(vocab, **TINY | dict(warm_up=2))
        learner = Learner(model, pairs, batch_size=8, schedule='constant', folder=tmp_path/f'{stop}')
        assert learner.resume() and learner.step == stop
        learner.fit(6, progress=False)
        assert not changed(state(whole), model) and int(model.trained) == 6


def test_a_checkpoint_of_training_refuses_another_config(vocab, pairs, tmp_path):
    fit(tiny(vocab), pairs, 1, folder=tmp_path)
    with pytest.raises(ValueError, match='fusion=2, not 1'): Learner(tiny(vocab, fusion=1), pairs, folder=tmp_path).resume()


# --- sampling

def test_capabilities(trained):
    assert capabilities(MXQVAE) == capabilities(trained) == dict(sample_pairs=True, text_to_image=False, image_to_text=False, reconstruct=True)
    assert not any(capabilities(PriorStage(trained)).values())


def test_the_same_generator_gives_the_same_pairs(vocab):
    model = lively(tiny(vocab)).eval()
    draw = lambda seed, **options: model.sample_pairs(6, generator=generator(seed), **options)
    torch.manual_seed(0); first = draw(3)
    torch.manual_seed(1); assert equal(first, draw(3))
    assert not equal(first, draw(4)) and equal(draw(3, temperature=0.), draw(4, temperature=0.))
    assert equal(draw(3, top_k=1), draw(4, top_p=1e-6))
    assert draw(3, batch_size=4).image.shape == first.image.shape


def test_only_legal_codes_are_drawn_and_never_the_start_symbol(vocab, pairs):
    model = lively(tiny(vocab)).eval()
    drawn, decode = [], model.decode
    model.decode = lambda codes: drawn.append(codes) or decode(codes)
    model.sample_pairs(200, generator=generator(), temperature=50.)
    assert drawn[-1].shape == (200, model.n) and drawn[-1].min() == 0 and drawn[-1].max() == model.k - 1
    seen = model.encode(pairs[:5])
    model.allow_seen_codes_(seen)
    assert model.legal.sum(1).max() <= 5
    model.sample_pairs(200, generator=generator(), temperature=50.)
    assert (drawn[-1][:, None] == seen).any(1).all()


# --- files

def test_saved_and_loaded_it_draws_the_same(trained, pairs, tmp_path):
    save_model(trained, tmp_path/'mine', steps=12)
    for vocab in (None, trained.vocab):
        back = load_model(tmp_path/'mine', vocab=vocab)
        assert back.config == trained.config and back.vocab == trained.vocab and not back.training
        assert equal(back.sample_pairs(4, generator=generator()), trained.sample_pairs(4, generator=generator()))
        assert equal(back.reconstruct(pairs), trained.reconstruct(pairs)) and torch.equal(back.legal, trained.legal)


def test_files_that_do_not_fit_are_refused(trained, tmp_path):
    class Other(JointModel):
        def __init__(self, vocab, **config): super().__init__(vocab, **config); self.layer = nn.Linear(1, 1)

    path = save_model(trained, tmp_path/'mine')
    with pytest.raises(ValueError, match='holds a MXQVAE, not a .*Other'): load_model(path, cls=Other)
    with pytest.raises(ValueError, match='trained with vocabulary'): load_model(path, vocab=Vocab(['red'], 40))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match='cut short'): load_model(path)


# --- bad input

def spoil(pairs, *, value=None, side=None, length=None, word=None):
    image, tokens = pairs.image.clone(), pairs.tokens.clone()
    if value is not None: image[1, 0, 3, 3] = value
    if word is not None: tokens[0, 1] = word
    return Pairs(image[..., :side or 16, :], nn.functional.pad(tokens, (0, (length or 40) - 40)))


@pytest.mark.parametrize('fault, says', [
    (dict(value=1.5), r'run from -1 to 1.5, \[-1, 1\] fits'), (dict(value=float('nan')), 'NaN or infinity'), (dict(value=-float('inf')), 'NaN or infinity'),
    (dict(side=12), '12 x 16, 16 x 16 fits'), (dict(length=41), 'length 41, the model reads at most 40'), (dict(word=999), '999, 0 to 31 fits'), (dict(word=-1), 'from -1')])
def test_pairs_that_do_not_fit_are_refused(trained, pairs, fault, says):
    bad, before = spoil(pairs[:3], **fault), state(trained)
    for use in (trained.reconstruct, trained.encode, lambda p: next(trained.turns(p)), lambda p: fit(trained, lambda step: p, 1)):
        with pytest.raises(ValueError, match=says) as error: use(bad)
        assert '\n' not in str(error.value)
    assert not changed(before, trained)


@pytest.mark.parametrize('sizes, says', [
    (dict(k=0), 'codebook size is 0'), (dict(side=33), 'side is 33'), (dict(side=12), 'side is 12'), (dict(side=0), 'side is 0'), (dict(side=18), 'side is 18'),
    (dict(width=3), "'width' is no size of MXQVAE"), (dict(text='recurrent'), "'recurrent'.*'attention' or 'convolution'"),
    (dict(codebook='hand'), "codebook is 'hand'"), (dict(widths=()), 'widths')])
def test_sizes_that_make_no_model_are_refused(vocab, sizes, says):
    with pytest.raises(ValueError, match=says): tiny(vocab, **sizes)


def test_other_bad_calls_are_refused(trained, vocab):
    with pytest.raises(ValueError, match='length 5, the model reads 18'): trained.decode(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match='n is 0'): trained.sample_pairs(0)
    with pytest.raises(ValueError, match='n is -3'): trained.sample_pairs(-3)
    with pytest.raises(ValueError, match='temperature is -1'): trained.sample_pairs(1, temperature=-1.)
    with pytest.raises(ValueError, match='top_k is 17 of 16'): trained.sample_pairs(1, top_k=17)
    with pytest.raises(ValueError, match="unknown word 'purple'"): vocab.encode(['this is purple 3.'])


# --- one's own data, without a network

def letters():
    "Draw each letter four times, at four places."
    font, glyphs, labels = ImageFont.load_default(size=20), [], []
    for letter in 'abcdefghijklmnopqrstuvwxyz':
        for i in range(4):
            image = Image.new('L', (28, 28))
            ImageDraw.Draw(image).text((6 + 4*(i % 2), 1 + 3*(i//2)), letter, fill=255, font=font)
            glyphs.append(np.asarray(image)); labels.append(letter)
    return np.stack(glyphs), labels


@pytest.fixture
def offline(monkeypatch):
    def refuse(*a, **kw): raise AssertionError('somebody asks the network')
    for name in ('socket', 'create_connection', 'getaddrinfo'): monkeypatch.setattr(socket, name, refuse)


def test_letters_in_ones_own_colours_train_and_sample(offline):
    data = captioned_digits(64, side=16, glyphs=letters(), colors=dict(orange=(1., .5, 0.), teal=(0., .6, .6), pink=(1., .4, .7)))
    model = tiny(data.vocab, k=64, warm_up=4)
    log = fit(model, data.pairs, 20, optimizer=dict(lr=3e-3)).log
    assert log[-1]['loss'] < log[0]['loss'] and int(model.trained) == 20
    codes = model.eval().encode(data.pairs)
    model.allow_seen_codes_(codes)
    fit(PriorStage(model), codes, 5)
    drawn = model.eval().sample_pairs(8, generator=generator())
    assert len(drawn) == 8 and drawn.vocab == data.vocab and drawn.image.abs().max() <= 1
    assert all(isinstance(c, str) for c in drawn.captions) and not torch.isin(drawn.tokens[:, 1:], torch.tensor([BOS, MASK, UNK])).any()
    assert equal(model.reconstruct(data.pairs[:4]), model.reconstruct(data.pairs[:4]))


# --- the shipped weights

shipped = pytest.mark.skipif('mxq-vae' not in jointgen.models(), reason='no weights yet')


@pytest.fixture(scope='module')
def drawn():
    return jointgen.load('mxq-vae').sample_pairs(300, generator=generator(7))


@shipped
def test_shipped_weights_draw_the_same_bytes_twice(offline):
    first, second = (jointgen.load('mxq-vae').sample_pairs(8, generator=generator(7)) for _ in range(2))
    assert first.image.numpy().tobytes() == second.image.numpy().tobytes() and first.captions == second.captions


@shipped
def test_shipped_pairs_agree(drawn):
    scores = pair_consistency(drawn, drawn.vocab, load_reader(32))
    assert scores['parsed'] >= .9 and pair_consistency(drawn[:64], drawn.vocab, load_reader(32))['parsed'] >= .9
    assert scores['average'] >= .6 and min(v for k, v in scores.items() if k not in ('average', 'parsed')) >= .4, scores


@shipped
def test_shipped_weights_are_small(): assert (weights_folder()/'mxq_vae.safetensors').stat().st_size <= 8_000_000

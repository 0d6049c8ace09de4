import math

import pytest
import torch
from torch.nn import functional as F

from jointgen.pairs import BOS, EOS, MASK, PAD, UNK
from jointgen.text_nets import (ConvTextDecoder, ConvTextEncoder, RecurrentTextDecoder, RecurrentTextEncoder, conv_kernel, draw,
                                sampling_mode, truncate, write_captions)

PAPER = dict(n_codes=8, d=128, embedding=128, widths=(224, 320, 416, 512))


def generator(seed=0): return torch.Generator().manual_seed(seed)


def captions(b=5, t=12, v=20, seed=0):
    tokens = torch.randint(UNK + 1, v, (b, t), generator=generator(seed))
    tokens[:, 0] = BOS
    for i in range(b):
        end = 2 + (3*i)%(t - 2)
        tokens[i, end], tokens[i, end + 1:] = EOS, PAD
    return tokens


# ---- convolutions

@pytest.mark.parametrize('length,n_codes,k', [(64, 8, 15), (68, 16, 14), (80, 20, 16), (40, 8, 9), (8, 8, 1), (12, 8, 2)])
def test_kernels_of_the_paper_and_others(length, n_codes, k): assert conv_kernel(length, n_codes) == k


@pytest.mark.parametrize('length,n_codes,fits', [(41, 8, 44), (7, 8, 12), (42, 8, 44), (9, 8, 12)])
def test_lengths_that_do_not_fit(length, n_codes, fits):
    with pytest.raises(ValueError, match=f'such as {fits}'): conv_kernel(length, n_codes)
    assert conv_kernel(fits, n_codes) > 0


def test_no_codes():
    with pytest.raises(ValueError, match='at least 1'): conv_kernel(8, 0)


@pytest.mark.parametrize('length,n_codes', [(40, 8), (12, 4), (8, 8)])
def test_conv_shapes_and_gradients(length, n_codes):
    torch.manual_seed(0)
    encoder, decoder = (net(20, length, n_codes, 6, embedding=5, widths=(7, 8, 9, 10)) for net in (ConvTextEncoder, ConvTextDecoder))
    tokens = captions(t=length)
    z = encoder(tokens)
    logits = decoder(z)
    assert z.shape == (5, n_codes, 6) and logits.shape == (5, length, 20)
    F.cross_entropy(logits.transpose(1, 2), tokens, ignore_index=PAD).backward()
    assert all(p.grad is not None for net in (encoder, decoder) for p in net.parameters())


def test_conv_pads_shorter_captions():
    torch.manual_seed(0)
    encoder, tokens = ConvTextEncoder(20, 16, 4, 6), captions(t=12)
    assert torch.equal(encoder(tokens), encoder(F.pad(tokens, (0, 4), value=PAD)))
    with pytest.raises(ValueError, match='at most 16'): encoder(F.pad(tokens, (0, 5)))


def test_conv_sizes_of_the_paper():
    size = lambda net: sum(p.numel() for name, p in net.named_parameters())
    encoder, decoder = ConvTextEncoder(30522, 64, **PAPER), ConvTextDecoder(30522, 64, **PAPER)
    assert round((size(encoder) - encoder.embedding.weight.numel())/1e6, 2) == 6.76
    assert round(size(decoder)/1e6, 2) == 11.22


def test_any_number_of_convolutions():
    encoder, decoder = (net(20, 40, widths=[8, 8]) for net in (ConvTextEncoder, ConvTextDecoder))
    assert decoder(encoder(captions(t=40))).shape == (5, 40, 20) and encoder.layers[0].kernel_size == (17,)
    for net in (ConvTextEncoder, ConvTextDecoder):
        with pytest.raises(ValueError, match='at least 1'): net(20, 40, widths=())


# ---- recurrent

@pytest.mark.parametrize('cell', ['gru', 'lstm'])
@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('layers', [1, 2])
def test_padding_is_never_read(cell, bidirectional, layers):
    torch.manual_seed(0)
    encoder = RecurrentTextEncoder(20, 8, cell=cell, bidirectional=bidirectional, layers=layers)
    tokens = captions()
    out = encoder(tokens)
    assert out.states.shape == (5, 12, 8) and out.last.shape == (5, 8) and torch.equal(out.mask, tokens != PAD)
    assert out.states[~out.mask].abs().sum() == 0
    for i, n in enumerate(out.mask.sum(1)):
        alone = encoder(tokens[i:i + 1, :n])  # the same caption without its padding
        assert torch.allclose(alone.states[0], out.states[i, :n], atol=1e-6)
        assert torch.allclose(alone.last[0], out.last[i], atol=1e-6)
        half = 4 if bidirectional else 8
        assert torch.allclose(out.last[i, :half], out.states[i, n - 1, :half], atol=1e-6)
        if bidirectional: assert torch.allclose(out.last[i, 4:], out.states[i, 0, 4:], atol=1e-6)


def test_recurrent_encoder_errors():
    with pytest.raises(ValueError, match="'gru' or 'lstm'"): RecurrentTextEncoder(20, cell='rnn')
    with pytest.raises(ValueError, match='even'): RecurrentTextEncoder(20, 7, bidirectional=True)
    with pytest.raises(ValueError, match='no word'): RecurrentTextEncoder(20)(torch.zeros(2, 3, dtype=torch.long))


def test_recurrent_decoder_looks_back_only():
    torch.manual_seed(0)
    decoder, tokens, z = RecurrentTextDecoder(20, 12, 6).eval(), captions(), torch.randn(5, 6)
    logits = decoder(tokens, z)
    assert logits.shape == (5, 11, 20)
    changed = tokens.clone(); changed[:, 6] = UNK + 1 + (changed[:, 6] + 1)%10
    assert torch.allclose(decoder(changed, z)[:, :6], logits[:, :6]) and not torch.allclose(decoder(changed, z)[:, 6], logits[:, 6])
    assert not torch.allclose(decoder(tokens, z + 1), logits)


def test_word_dropout_hides_words_only_in_training():
    torch.manual_seed(0)
    decoder, tokens, z = RecurrentTextDecoder(20, 12, 6, word_dropout=1.), captions(), torch.randn(5, 6)
    hidden = tokens.masked_fill((tokens != PAD) & (tokens != BOS), UNK)
    train = decoder(tokens, z)
    decoder.eval()
    assert torch.allclose(train, decoder(hidden, z)) and not torch.allclose(train, decoder(tokens, z))
    with pytest.raises(ValueError, match='0 to 1'): RecurrentTextDecoder(20, 12, word_dropout=1.5)
    for t in (1, 13):
        with pytest.raises(ValueError, match='2 to 12'): decoder(torch.ones(5, t, dtype=torch.long), z)


def test_generate_agrees_with_forward():
    torch.manual_seed(0)
    decoder, z = RecurrentTextDecoder(20, 12, 6, hidden=16), torch.randn(7, 6)
    tokens = decoder.generate(z)
    assert tokens.shape == (7, 12) and (tokens[:, 0] == BOS).all() and decoder.training
    logits = decoder.eval()(tokens, z)
    logits[:, :, [PAD, BOS, MASK, UNK]] = -math.inf
    ended = (tokens == EOS).cumsum(1)[:, :-1] > 0
    assert torch.equal(logits.argmax(-1)[~ended], tokens[:, 1:][~ended]) and (tokens[:, 1:][ended] == PAD).all()
    draws = [decoder.generate(z, temperature=1., generator=generator(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---- drawing

def test_truncate_keeps_exactly_k_even_with_ties():
    kept = truncate(torch.zeros(3, 6), top_k=4)
    assert kept.isfinite().sum(1).tolist() == [4, 4, 4]
    assert torch.equal(truncate(torch.randn(2, 6), top_k=6).isfinite(), torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize('top_p,kept', [(0.3, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1, 4)])
def test_top_p_keeps_the_fewest_that_suffice(top_p, kept):
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).double()
    out = truncate(p.log(), top_p=top_p)
    assert set(out[0].isfinite().nonzero()[:, 0].tolist()) == set(p[0].argsort(descending=True)[:kept].tolist())


@pytest.mark.parametrize('bad', [dict(top_k=0), dict(top_k=7), dict(top_p=0.), dict(top_p=1.01), dict(top_p=-1.), dict(temperature=-1.),
                                 dict(temperature=math.inf), dict(temperature=math.nan), dict(top_p=math.nan)])
def test_knobs_out_of_range(bad):
    with pytest.raises(ValueError, match='choose'): draw(torch.zeros(2, 6), **bad)


def test_nan_is_an_error():
    with pytest.raises(ValueError, match='NaN'): draw(torch.tensor([[0., math.nan]]))


def test_draw_follows_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for temperature in (1., 0.5, 2.):
        expected = (p**(1/temperature))/(p**(1/temperature)).sum()
        drawn = draw(p.log().expand(40000, 4), temperature=temperature, generator=generator())
        assert torch.allclose(drawn.bincount(minlength=4)/40000, expected, atol=0.01)
    assert (draw(p.log().expand(100, 4), temperature=0) == 0).all()
    assert (draw(p.log().expand(100, 4), top_k=1, generator=generator()) == 0).all()


def test_illegal_choices_are_never_drawn():
    logits = torch.zeros(50000, 8); logits[:, 3] = 20.
    legal = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    for knobs in (dict(), dict(top_k=2), dict(top_p=0.5), dict(temperature=5.), dict(temperature=0.), dict(top_k=8, top_p=1.)):
        assert legal[draw(logits, legal=legal, generator=generator(), **knobs)].all()


def test_same_generator_same_draw_and_no_global_noise():
    logits = torch.randn(100, 9)
    state = torch.get_rng_state()
    assert torch.equal(draw(logits, generator=generator(5)), draw(logits, generator=generator(5)))
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_logits_are_drawn_in_float32():
    assert draw(torch.randn(4, 9).bfloat16(), generator=generator(), top_p=0.9).shape == (4,)


def test_sampling_mode_restores_even_after_an_error():
    net = torch.nn.Dropout(0.5)
    with pytest.raises(RuntimeError):
        with sampling_mode(net):
            assert not net.training and not torch.is_grad_enabled()
            raise RuntimeError
    assert net.training and torch.is_grad_enabled()


def test_write_captions_stops_and_pads():
    script = torch.tensor([[6, EOS, 7, 7, 7], [6, 7, EOS, 8, 8], [EOS, 8, 8, 8, 8]])
    calls = []
    def read(word):
        calls.append(word)
        return F.one_hot(script[:, len(calls) - 1], 12).float()
    out = write_captions(read, torch.full((3,), BOS), length=8)
    assert out.tolist() == [[BOS, 6, EOS] + 5*[PAD], [BOS, 6, 7, EOS] + 4*[PAD], [BOS, EOS] + 6*[PAD]]
    assert len(calls) == 3  # nobody is asked after all have ended


def test_specials_are_never_written():
    def read(word):
        logits = torch.zeros(200, 9); logits[:, [PAD, BOS, MASK, UNK]] = 30.
        return logits
    out = write_captions(read, torch.full((200,), BOS), length=6, temperature=1., generator=generator())
    ended = (out == EOS).cumsum(1) - (out == EOS).long() > 0
    assert not torch.isin(out[:, 1:][~ended[:, 1:]], torch.tensor([PAD, BOS, MASK, UNK])).any()

import math

import pytest
import torch
from torch.nn import functional as F

from jointgen.pairs import BOS, EOS, MASK, PAD, UNK
from jointgen.transformer import Attention, Block, Cache, CaptionDecoder, CausalTransformer, CodePrior, TransformerEncoder, attend


def generator(seed=0): return torch.Generator().manual_seed(seed)


def lively(model, scale=8.):
    "Make an untrained model's answers differ clearly."
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(scale)
    return model


def prior(dtype=torch.float64, **kw):
    torch.manual_seed(0)
    return lively(CodePrior(13, 9, 16, **dict(layers=3, heads=2) | kw)).to(dtype)


def plain_attention(q, k, v, mask=None):
    weights = q@k.transpose(-1, -2)/math.sqrt(q.shape[-1])
    if mask is not None: weights = weights.masked_fill(~mask, -math.inf)
    return weights.softmax(-1)@v


@pytest.mark.parametrize('n', [1, 7, 33])
def test_attention_is_the_textbook_one(n):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, n, 5)
    assert torch.allclose(attend(q, k, v), plain_attention(q, k, v), atol=1e-5)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    assert torch.allclose(attend(q, k, v, causal=True), plain_attention(q, k, v, causal), atol=1e-5)
    assert torch.allclose(attend(q, k, v, mask=causal), plain_attention(q, k, v, causal), atol=1e-5)


def test_attention_under_autocast_stays_close_and_keeps_its_type():
    torch.manual_seed(0)
    block, x = Attention(16, 2), torch.randn(2, 5, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = block(x, causal=True)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), block(x, causal=True), atol=0.02)


@pytest.mark.parametrize('heads', [0, 3])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match='divide'): Attention(16, heads)


def test_looking_at_oneself_is_looking_at_a_memory():
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    assert torch.allclose(attention(x), attention(x, memory=x), atol=1e-6)


@pytest.mark.parametrize('cross', [False, True])
def test_block_wants_a_memory_exactly_when_crossed(cross):
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match='memory'): Block(16, 2, cross=cross)(x, memory=None if cross else x)


def test_block_does_not_look_ahead():
    torch.manual_seed(0)
    block, x = Block(16, 2), torch.randn(2, 6, 16)
    changed = x.clone(); changed[:, 3] += torch.randn(16)
    assert torch.equal(block(changed, causal=True)[:, :3], block(x, causal=True)[:, :3])
    assert not torch.allclose(block(changed)[:, :3], block(x)[:, :3])


@pytest.mark.parametrize('steps', [[1]*7, [3, 1, 1, 2], [4, 3], [7]])
@pytest.mark.parametrize('cross', [False, True])
def test_cache_in_pieces_equals_the_whole(steps, cross):
    torch.manual_seed(0)
    block, x, memory = lively(Block(16, 2, cross=cross)), torch.randn(2, 7, 16), torch.randn(2, 4, 16) if cross else None
    cache = Cache((2, 2, 7, 8), x)
    pieces = [block(piece, memory=memory, causal=True, cache=cache) for piece in x.split(steps, 1)]
    assert torch.allclose(torch.cat(pieces, 1), block(x, memory=memory, causal=True), atol=1e-4)
    assert cache.length == 7 and (cache.memory is not None) == cross


def test_memory_is_projected_once():
    torch.manual_seed(0)
    attention, x, memory = Attention(16, 2), torch.randn(2, 1, 16), torch.randn(2, 4, 16)
    cache = Cache((2, 2, 3, 8), x)
    first = attention(x, memory=memory, cache=cache)
    assert torch.equal(attention(x, memory=memory + 1, cache=cache), first)


def test_encoder_treats_positions_alike():
    torch.manual_seed(0)
    encoder, x = lively(TransformerEncoder(16, 2, 4)), torch.randn(3, 6, 16)
    order = torch.randperm(6)
    y = encoder(x)
    assert y.shape == x.shape and torch.allclose(encoder(x[:, order]), y[:, order], atol=1e-4)
    y.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_start_is_gpt_like():
    torch.manual_seed(0)
    model = CodePrior(100, 20, 128, layers=8)
    block = model.body.blocks[0]
    for weight, std in ((block.attention.qkv.weight, 0.02), (block.up.weight, 0.02), (model.head.weight, 0.02), (model.body.embedding.weight, 0.02),
                        (block.attention.out.weight, 0.02/4), (block.down.weight, 0.02/4)):
        assert abs(weight.std().item()/std - 1) < 0.1
    assert all(p.abs().sum() == 0 for name, p in model.named_parameters() if name.endswith('bias'))
    assert abs(model.loss(torch.randint(0, 100, (8, 20))).item() - math.log(100)) < 0.1


# ---- the code prior

def test_prior_reads_only_the_past():
    model, codes = prior(dropout=0.), torch.randint(0, 13, (4, 9), generator=generator())
    logits = model(codes)
    assert logits.shape == (4, 9, 13)
    for j in range(9):
        changed = codes.clone(); changed[:, j] = (changed[:, j] + 1)%13
        new = model(changed)
        assert torch.equal(new[:, :j + 1], logits[:, :j + 1])
        if j < 8: assert not torch.allclose(new[:, j + 1], logits[:, j + 1])


def test_loss_is_the_mean_in_nats_and_finite():
    model, codes = prior(dropout=0.), torch.randint(0, 13, (4, 9), generator=generator())
    by_hand = -model(codes).log_softmax(-1).gather(-1, codes[..., None]).mean()
    assert torch.allclose(model.loss(codes), by_hand) and model.loss(codes).isfinite()


def test_probabilities_of_all_sequences_sum_to_one():
    torch.manual_seed(0)
    model = lively(CodePrior(3, 4, 8, layers=1, heads=2, dropout=0.)).double()
    codes = torch.cartesian_prod(*[torch.arange(3)]*4)
    log_p = model(codes).log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2))
    assert abs(log_p.exp().sum().item() - 1) < 1e-9


def test_samples_follow_the_model():
    torch.manual_seed(0)
    model = lively(CodePrior(2, 3, 8, layers=1, heads=2, dropout=0.), 12)
    codes = torch.cartesian_prod(*[torch.arange(2)]*3)
    p = model(codes).log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2)).exp()
    drawn = model.sample(20000, generator=generator())
    share = (drawn@torch.tensor([4, 2, 1])).bincount(minlength=8)/20000
    assert torch.allclose(share, p, atol=0.015) and p.max() > 2*p.min()


@pytest.mark.parametrize('knobs', [dict(), dict(temperature=0.7), dict(temperature=0.), dict(top_k=3), dict(top_p=0.8), dict(top_k=5, top_p=0.5, temperature=1.5)])
@pytest.mark.parametrize('layers,heads', [(1, 1), (3, 4)])
def test_cache_changes_nothing(knobs, layers, heads):
    model = prior(layers=layers, heads=heads)
    with_cache, without = (model.sample(50, generator=generator(7), cache=cache, **knobs) for cache in (True, False))
    assert torch.equal(with_cache, without)
    if knobs.get('temperature') != 0: assert len(with_cache.unique(dim=0)) > 10


def test_cached_logits_agree():
    model = prior(torch.float32).eval()
    codes = torch.randint(0, 13, (4, 9), generator=generator())
    inputs, caches = F.pad(codes[:, :-1], (1, 0), value=13), model.body.new_caches(4)
    pieces = torch.cat([model.body(inputs[:, j:j + 1], caches=caches) for j in range(9)], 1)
    assert torch.allclose(model.head(pieces), model(codes), atol=1e-4)


def test_sample_repeats_and_leaves_no_trace():
    model = prior()
    state = torch.get_rng_state()
    a, b, c = (model.sample(6, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.int64 and a.shape == (6, 9)
    assert torch.equal(torch.get_rng_state(), state) and model.training and not any(p.requires_grad is False for p in model.parameters())


def test_start_symbol_is_never_drawn():
    model = prior()
    assert model.head.out_features == 13 and model.body.embedding.num_embeddings == 14
    codes = model.sample(500, temperature=3., generator=generator())
    assert 0 <= codes.min() and codes.max() <= 12


def test_legal_codes_only():
    model = prior()
    legal = torch.zeros(9, 13, dtype=torch.bool)
    for j in range(9): legal[j, [j, j + 1, j + 4]] = True
    for knobs in (dict(), dict(top_k=1), dict(top_p=0.3), dict(temperature=0.)):
        codes = model.sample(200, legal=legal, generator=generator(), **knobs)
        assert legal[torch.arange(9), codes].all()


@pytest.mark.parametrize('legal', [torch.ones(13, dtype=torch.bool), torch.ones(9, 12, dtype=torch.bool), torch.zeros(9, 13, dtype=torch.bool)])
def test_legal_masks_that_do_not_fit(legal):
    with pytest.raises((ValueError, TypeError)):  # a wrong number of axes is a type error where types are checked
        prior().sample(2, legal=legal)


@pytest.mark.parametrize('bad', [dict(top_k=0), dict(top_k=14), dict(top_p=0.), dict(top_p=1.5), dict(temperature=-0.1)])
def test_sampling_knobs_out_of_range(bad):
    with pytest.raises(ValueError, match='choose'): prior().sample(2, **bad)


def test_other_sizes_out_of_range():
    with pytest.raises(ValueError, match='at least 1'): prior().sample(0)
    with pytest.raises(ValueError, match='at least 1'): CodePrior(0, 9)
    with pytest.raises(ValueError, match='models 9'): prior()(torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(ValueError, match='reads at most 9'): prior().body(torch.zeros(2, 10, dtype=torch.long))


def test_prior_learns_a_rule():
    torch.manual_seed(0)
    model = CodePrior(8, 6, 32, layers=1, heads=2, dropout=0.)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(120):
        codes = (torch.randint(0, 8, (32, 1)) + torch.arange(6)*3)%8  # the first code tells all others
        loss = model.loss(codes)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert abs(loss.item() - math.log(8)/6) < 0.05
    codes = model.sample(100, generator=generator())
    assert ((codes[:, 1:] - codes[:, :-1])%8 == 3).float().mean() > 0.97


# ---- the caption decoder

def decoder(dtype=torch.float64, **kw):
    torch.manual_seed(0)
    return lively(CaptionDecoder(20, 10, 16, **dict(layers=2, heads=2) | kw)).to(dtype)


def test_decoder_reads_the_past_and_the_memory():
    model, memory = decoder(), torch.randn(3, 5, 16).double()
    tokens = torch.randint(UNK + 1, 20, (3, 10), generator=generator())
    logits = model(tokens, memory)
    assert logits.shape == (3, 9, 20) and torch.allclose(model(tokens[:, :6], memory), logits[:, :5])
    changed = tokens.clone(); changed[:, 4] = (changed[:, 4] + 1)%20
    assert torch.equal(model(changed, memory)[:, :4], logits[:, :4]) and not torch.allclose(model(changed, memory)[:, 4], logits[:, 4])
    for m in range(5):
        other = memory.clone(); other[:, m] += torch.randn(16)
        assert not torch.allclose(model(tokens, other)[:, 0], logits[:, 0])


def test_generate_agrees_with_forward():
    model, memory = decoder(), torch.randn(30, 5, 16).double()
    tokens = model.generate(memory)
    assert tokens.shape == (30, 10) and (tokens[:, 0] == BOS).all() and model.training
    logits = model(tokens, memory)
    logits[:, :, [PAD, BOS, MASK, UNK]] = -math.inf
    ended = (tokens == EOS).cumsum(1)[:, :-1] > 0
    assert ended.any() and torch.equal(logits.argmax(-1)[~ended], tokens[:, 1:][~ended]) and (tokens[:, 1:][ended] == PAD).all()


def test_generate_draws_with_a_generator():
    model, memory = decoder(torch.float32), torch.randn(8, 5, 16)
    a, b, c = (model.generate(memory, temperature=1., generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.isin(a[:, 1:], torch.tensor([BOS, MASK, UNK])).any()
    with pytest.raises(ValueError, match='choose'): model.generate(memory, temperature=-1.)


def test_decoder_errors():
    with pytest.raises(ValueError, match='at least 2'): CaptionDecoder(20, 1)
    with pytest.raises(ValueError, match='more than'): CaptionDecoder(5, 10)
    for t in (1, 11):
        with pytest.raises(ValueError, match='2 to 10'): decoder(torch.float32)(torch.ones(2, t, dtype=torch.long), torch.randn(2, 5, 16))


def test_decoder_learns_to_copy_its_memory():
    torch.manual_seed(0)
    table = torch.randn(5, 16)
    model = CaptionDecoder(10, 5, 16, layers=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    place = torch.randn(3, 16)
    def batch():
        words = torch.randint(0, 5, (32, 3))
        tokens = F.pad(F.pad(words + UNK + 1, (1, 0), value=BOS), (0, 1), value=EOS)
        return tokens, table[words] + place
    for _ in range(150):
        tokens, memory = batch()
        loss = F.cross_entropy(model(tokens, memory).transpose(1, 2), tokens[:, 1:], ignore_index=PAD)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    tokens, memory = batch()
    assert (model.generate(memory) == tokens).float().mean() > 0.95


def test_causal_transformer_is_shared():
    torch.manual_seed(0)
    body = CausalTransformer(7, 5, d=16, layers=1, heads=2)
    assert body(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 16)

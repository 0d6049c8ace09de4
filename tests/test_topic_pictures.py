"""Pictures of topics: what is woken and what follows, trees, spots for words, walks."""
import pytest
import torch
from matplotlib.figure import Figure

from jointgen.digits import captioned_digits
from jointgen.models.vhe_gan import VHEGAN
from jointgen.topic_pictures import (activate, blend, blend_figure, dial_figure, free_spot, gibbs_trace, largest, lay_out, raster_figure, topic_panel,
    topic_tree, trace_figure, tree_figure, triangle_figure, triangle_walk, word_cloud)

torch.set_num_threads(1)
TINY = dict(trunk=(8, 8, 8), d=16, generator=dict(width=16), judge=dict(width=16), burn=3, keep=3)


@pytest.fixture(scope="module", params=["raster", "stack"])
def model(request):
    torch.manual_seed(0)
    return VHEGAN(captioned_digits(1).vocab, wiring=request.param, widths=(9, 6, 4), **TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return captioned_digits(6, "test").pairs.tokens


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_waking_a_topic_keeps_the_total_and_explains_itself(model, layer):
    k = model.pgbn.widths[layer]
    thetas = activate(model, layer, range(k), 7.)
    assert [x.shape for x in thetas] == [(k, w) for w in model.pgbn.widths]
    for theta in thetas: assert torch.allclose(theta.sum(1), torch.full((k,), 7.), rtol=1e-4) and (theta >= 0).all()
    assert torch.equal(thetas[layer], 7*torch.eye(k))
    for l in range(layer): assert torch.allclose(thetas[l], thetas[l + 1] @ model.pgbn.topics[l + 1].T, atol=1e-5)
    for l in range(layer + 1, 3):  # above: the shares of those who would have woken it
        caused = thetas[l - 1] @ model.pgbn.topics[l]
        assert torch.allclose(thetas[l]/thetas[l].sum(1, keepdim=True), caused/caused.sum(1, keepdim=True), atol=1e-5)
    assert torch.allclose(model.pgbn.rates(thetas[0]), 7*model.pgbn.words_of(layer).T, atol=1e-5)


@pytest.mark.parametrize("layer, topics, words", [(3, [0], "0 is nearest"), (-1, [0], "0 is nearest"), (1, [6], "choose among"), (0, [-1], "choose among")])
def test_topics_that_do_not_exist(model, layer, topics, words):
    with pytest.raises(ValueError, match=words): activate(model, layer, topics)


def test_the_largest_picture_is_the_last_of_the_last_row(model):
    painted = model.paint(activate(model, 0, [0, 1]))
    assert torch.equal(largest(painted), painted[-1][-1].clamp(-1, 1)) and largest(painted).shape == (2, 3, 32, 32)
    assert torch.equal(largest(painted[-1]), largest(painted)) and largest(5*painted[-1][-1]).abs().max() <= 1


@pytest.mark.parametrize("children", [1, 2, 3])
def test_a_tree_follows_the_heaviest_shares(model, children):
    tree = topic_tree(model, 2, children=children, words=3)
    phi = model.pgbn.topics[2][:, 2]
    assert [c.topic for c in tree.children] == phi.topk(children).indices.tolist()
    assert [c.share for c in tree.children] == pytest.approx(phi.topk(children).values.tolist())
    assert [c.layer for c in tree.children] == [1]*children and not tree.children[0].children[0].children
    named = model.bag.top_words(model.pgbn.words_of(2).T[[2]], 3)[0]
    assert tree.words == named and tree.picture.shape == (3, 32, 32)
    places, rows = lay_out(tree)
    assert rows == children**2 and len(places) == 1 + children + children**2
    for column in range(3):
        at = [r for _, c, r, _ in places if c == column]
        assert at == sorted(at) and len(set(at)) == len(at)
    fig = tree_figure(tree)
    assert len(fig.axes[0].images) == len(places) and len(fig.axes[0].lines) == len(places) - 1


def test_a_tree_may_start_below_the_top(model):
    tree = topic_tree(model, 0, 0)
    assert (tree.layer, tree.children) == (0, []) and isinstance(tree_figure(tree), Figure)


def test_every_picture_of_a_code_is_shown(model):
    painted = model.paint(activate(model, 0, [0, 1]))
    assert [len(ax.images) for ax in raster_figure(painted, 1).axes] == [1]*sum(map(len, painted))
    fig = raster_figure([[torch.zeros(1, 3, 8, 8)], [torch.zeros(1, 3, s, s) for s in (8, 16)]])
    assert sum(len(ax.images) for ax in fig.axes) == 3 and [ax.get_ylabel() for ax in fig.axes[::2]] == ["row 2", "row 1"]


def test_words_never_overlap_and_never_leave_the_page():
    taken, page = [], (300, 200)
    for i in range(60):
        w, h = 10 + (7*i) % 60, 8 + i % 9
        spot = free_spot(w, h, taken, page)
        if spot is None: continue
        x, y = spot
        assert 0 <= x <= page[0] - w and 0 <= y <= page[1] - h
        assert all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in taken)
        taken.append((x, y, w, h))
    assert len(taken) > 30 and free_spot(301, 5, [], page) is None


def test_a_cloud_shows_the_likeliest_words(model):
    rates = torch.zeros(model.bag.size)
    rates[[0, 5, 30]] = torch.tensor([4., 1., 2.])
    texts = word_cloud(model.bag, rates, 3).axes[0].texts
    assert [t.get_text() for t in texts] == [model.bag.names[i] for i in (0, 30, 5)]
    large, middle, small = (t.get_fontsize() for t in texts)
    assert large/small == pytest.approx(2) and large/middle == pytest.approx(2**0.5)  # areas go with the rates
    assert word_cloud(model.bag, torch.zeros(model.bag.size), 4).axes[0].texts


def test_a_trace_holds_every_sweep(model, tokens):
    draw = lambda seed: gibbs_trace(model, tokens[:1], 5, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    trace = draw(0)
    assert [x.shape for x in trace] == [(5, w) for w in model.pgbn.widths] and all((x > 0).all() for x in trace)
    assert all(torch.equal(a, b) for a, b in zip(trace, draw(0))) and not torch.equal(trace[0], draw(1)[0])
    assert len(trace_figure(model, trace, 2).axes) == 3
    with pytest.raises(ValueError, match="one fits"): gibbs_trace(model, tokens[:2])


def test_a_walk_is_straight_and_ends_where_it_should(model, tokens):
    ends = [model.read(tokens[i:i + 1], generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    walk = blend(*ends, 5)
    for a, b, x in zip(*ends, walk):
        assert torch.equal(x[:1], a) and torch.equal(x[-1:], b) and torch.allclose(x[2:3], (a + b)/2, atol=1e-6)
    assert len(blend_figure(model, walk, 3).axes) == 6
    with pytest.raises(ValueError, match="both ends"): blend(*ends, 1)


def test_a_panel_turns_a_topic_up(model, tokens):
    panel = topic_panel(model, tokens[:1], layer=1, generator=torch.Generator().manual_seed(0))
    before = panel.picture.value
    panel.sliders["weight"].value = 0.
    assert before[:4] == b"\x89PNG" and panel.picture.value != before and panel.sliders["topic"].max == model.pgbn.widths[1] - 1
    thetas = model.read(tokens[:1], generator=torch.Generator().manual_seed(0))
    left, right = dial_figure(model, thetas, 3, 20.).axes
    assert len(left.images) == 1 and right.get_title().startswith("topic 3 of layer 1: ")


def test_a_topic_on_a_triangle_stays_there_and_visits_as_the_posterior_says():
    counts = torch.tensor([8., 4., 2.])
    points = triangle_walk(counts, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(points.sum(1), torch.ones(4000), atol=1e-4) and (points > 0).all()
    a = counts + 0.5
    mean = a/a.sum()
    assert torch.allclose(points.mean(0), mean, atol=0.05)
    assert torch.allclose(points.var(0), mean*(1 - mean)/(a.sum() + 1), atol=0.01)
    fig = triangle_figure({"one": points, "two": points[:100]})
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]

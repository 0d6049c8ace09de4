"""Sliders and a figure: what is drawn, how often, and what happens when drawing fails."""
import base64
import threading

import ipywidgets as widgets
import pytest
from matplotlib.figure import Figure

from jointgen.panels import Panel, log_slider


def dots(n, scale=1.):
    fig = Figure(figsize=(1, 1))
    fig.subplots().plot(range(n), [scale*i for i in range(n)])
    return fig


@pytest.fixture
def panel(): return Panel(dots, n=widgets.IntSlider(3, 1, 9), scale=log_slider(1, .1, 10))


def test_draws_what_the_sliders_say(panel):
    first = panel.picture.value
    panel.sliders['n'].value = 5
    second = panel.picture.value
    assert first[:4] == second[:4] == b'\x89PNG' and first != second
    panel.sliders['n'].value = 3
    assert panel.picture.value == first == panel.png()


def test_controls_carry_their_names_and_come_before_the_picture(panel):
    assert [c.description for c in panel.children[:2]] == ['n', 'scale'] and panel.children[-1] is panel.picture and panel.state in panel.children


def test_a_still_picture_is_offered(panel):
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle['image/png']) == panel.picture.value and bundle['text/plain'] == 'Panel' and 'application/vnd.jupyter.widget-view+json' in bundle


def test_an_error_is_told_and_the_last_picture_stays():
    panel = Panel(lambda x: dots(4//x), x=widgets.IntSlider(1, 0, 4))
    still = panel.picture.value
    panel.sliders['x'].value = 0
    assert panel.state.value.startswith('ZeroDivisionError') and panel.picture.value == still
    panel.sliders['x'].value = 4
    assert panel.state.value == '' and panel.picture.value != still
    with pytest.raises(ZeroDivisionError): Panel(lambda x: dots(4//x), x=widgets.IntSlider(0, 0, 4))


def test_one_drawing_at_a_time():
    at_once, most = [], []
    def slow(x):
        at_once.append(x); most.append(len(at_once)); fig = dots(x + 1); at_once.remove(x)
        return fig
    panel = Panel(slow, x=widgets.IntSlider(0, 0, 9))
    threads = [threading.Thread(target=panel.redraw) for _ in range(5)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(most) == 1 and len(most) == 6


def test_refuses_a_panel_of_nothing():
    with pytest.raises(ValueError, match='without sliders'): Panel(dots)


@pytest.mark.parametrize('value, low, high', [(0, 0, 1), (2, .1, 1), (.01, .1, 1), (1, -1, 2)])
def test_ends_of_a_slider(value, low, high):
    with pytest.raises(ValueError, match='take other ends'): log_slider(value, low, high)


def test_a_slider_counts_in_factors():
    slider = log_slider(.5, .01, 100)
    assert (slider.value, slider.min, slider.max, slider.base, slider.continuous_update) == (.5, -2, 2, 10, False)

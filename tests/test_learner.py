import json, math, os, signal, subprocess, sys, textwrap, threading

import numpy, pytest, torch
from torch import nn

from jointgen.checkpoints import checkpoints, read_log
from jointgen.joint import JointModel, Turn
from jointgen.learner import Learner, as_floats, averaged_tensors, check_finite, make_optimizers, one_cycle, player_parameters, plot_log


class Line(JointModel):
    def __init__(self, vocab=None, *, d=2):
        super().__init__(vocab, d=d)
        self.net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, x):
        loss = (self.net(x)[:, 0] - x.sum(1)).square().mean()
        return loss, dict(gap=loss, half=0.5)


class Game(JointModel):
    def __init__(self, vocab=None, *, d=1):
        super().__init__(vocab, d=d)
        self.generator, self.discriminator = nn.Linear(d, 1), nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer('steps', torch.zeros((), dtype=torch.int64))
        self.seen = []

    def players(self): return dict(discriminator=self.discriminator, generator=[self.generator])

    def turns(self, x):
        fake = self.generator(torch.randn_like(x))
        before = [p.detach().clone() for p in self.discriminator.parameters()]
        yield Turn('discriminator', nn.functional.softplus(self.discriminator(fake.detach())).mean() + nn.functional.softplus(-self.discriminator(x)).mean())
        self.seen.append(any((a != b).any() for a, b in zip(before, self.discriminator.parameters())))
        yield Turn('generator', nn.functional.softplus(-self.discriminator(fake)).mean(), dict(spread=fake.std()))
        self.steps += 1


def xs(n=64): return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_one_cycle_rises_and_falls():
    factors = [one_cycle(s, 100) for s in range(100)]
    assert factors[0] == 0.1 and max(factors) == 1 and factors.index(1) == 9 and 0 < factors[-1] < 1e-3
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert one_cycle(0, 1) == 1 and one_cycle(200, 100) == 0


def test_players_own_their_weights_once():
    net, extra = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert len(player_parameters([net, net, extra, frozen])) == 3 and player_parameters(net) == list(net.parameters())


def test_options_for_all_and_by_player():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    opts = make_optimizers(dict(a=list(a.parameters()), b=list(b.parameters())), dict(lr=0.1, weight_decay=0.2, b=dict(lr=0.3, betas=(0., 0.9))))
    assert [g['lr'] for g in opts['a'].param_groups] == [0.1, 0.1] and [g['weight_decay'] for g in opts['b'].param_groups] == [0.2, 0.]
    assert opts['b'].param_groups[0]['betas'] == (0., 0.9) and opts['b'].param_groups[0]['lr'] == 0.3


def test_weights_may_move_more_slowly_than_their_player():
    net = nn.Linear(2, 2)
    net.bias.lr_factor = 0.1
    before, opts = net.bias.detach().clone(), make_optimizers(dict(a=list(net.parameters())), dict(lr=0.1, weight_decay=0.))
    assert sorted(g['base_lr'] for g in opts['a'].param_groups) == pytest.approx([0.01, 0.1]) and 'factor' not in opts['a'].param_groups[0]

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def loss(self, x): return self.net(x).square().sum()

    Learner(Slow(), torch.ones(8, 2), optimizer=dict(lr=0.1, weight_decay=0.), schedule='constant', clip=None).fit(1, progress=False)
    assert torch.allclose((net.bias - before).abs(), torch.full((2,), 0.01), atol=1e-4)   # Adam's first step is the rate


@pytest.mark.parametrize('options, message', [(dict(c=dict(lr=1.)), 'the players are'), (dict(learning_rate=1.), 'AdamW does not take'), (dict(lr=-1.), 'Invalid learning rate')])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message): Learner(Line(), xs(), optimizer=options)


def test_loss_falls_and_is_logged():
    learner = Learner(Line(), xs(), optimizer=dict(lr=0.05), batch_size=16).fit(60, progress=False)
    assert learner.step == 60 and [r['step'] for r in learner.log] == list(range(1, 61))
    assert set(learner.log[0]) == {'step', 'player', 'loss', 'grad_norm', 'lr', 'rate', 'gap', 'half'}
    assert learner.log[-1]['loss'] < 0.2*learner.log[0]['loss'] and learner.log[0]['half'] == 0.5


def test_a_plain_module_with_a_loss_learns_from_a_tensor():
    net = nn.Embedding(5, 1)
    net.loss = lambda codes: net(codes).square().mean()
    Learner(net, torch.randint(0, 5, (32, 3)), optimizer=dict(lr=0.1)).fit(50, progress=False)
    assert net.weight.abs().max() < 0.5


def test_the_model_sees_moved_weights_and_finishes():
    game = Game()
    learner = Learner(game, xs()[:, :1], batch_size=16).fit(5, progress=False)
    assert all(game.seen) and game.steps == 5
    assert [r['player'] for r in learner.log[:2]] == ['discriminator', 'generator'] and 'spread' in learner.log[1]


def test_each_turn_moves_its_player_and_nobody_else():
    game = Game()
    learner = Learner(game, xs()[:, :1])
    for turn in game.turns(xs()[:, :1]):
        before = {k: v.clone() for k, v in game.state_dict().items()}
        learner._move(turn, 10)
        moved = {k.split('.')[0] for k, v in game.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {turn.player}


def test_equals_the_loop_of_the_style():
    torch.manual_seed(0); a = Line()
    b = Line(); b.load_state_dict(a.state_dict())
    Learner(a, lambda step: xs()[step:step + 8], optimizer=dict(lr=0.01), schedule='constant', clip=None).fit(5, progress=False)
    groups = [dict(params=[p for p in b.parameters() if p.ndim > 1]), dict(params=[p for p in b.parameters() if p.ndim < 2], weight_decay=0.)]
    opt = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(5):
        for turn in b.turns(xs()[step:step + 8]):
            opt.zero_grad(); turn.loss.backward(); opt.step()
    for x, y in zip(a.parameters(), b.parameters()): torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_clip_and_schedule_by_hand():
    model = Line()
    learner = Learner(model, xs(), clip=dict(model=1e-3), schedule=lambda step, steps: 0. if step else 1.).fit(1, progress=False)
    assert learner.log[0]['grad_norm'] > 1e-3
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-2)
    before = model.net[0].weight.clone()
    learner.fit(2, progress=False)
    assert torch.equal(model.net[0].weight, before)


def test_average_follows_the_weights():
    model = Line()
    model.register_buffer('mask', torch.tensor([0., -torch.inf]))
    learner = Learner(model, xs(), ema=0.5)
    expected = [v.detach().clone() for v in averaged_tensors(model)]
    for step in range(1, 4):
        learner.fit(step, progress=False)
        w = min(0.5, step/(step + 9))
        expected = [w*e + (1 - w)*v.detach() for e, v in zip(expected, averaged_tensors(model))]
    copy = learner.averaged()
    for e, v in zip(expected[:-1], averaged_tensors(copy)): torch.testing.assert_close(e, v.detach())
    assert copy.mask.tolist() == [0., -math.inf] and not copy.training and not same(copy, model)
    with pytest.raises(ValueError, match='ema=0.999'): Learner(model, xs()).averaged()


def test_autocast_reaches_the_model():
    class Cast(Line):
        def loss(self, x):
            self.kind = self.net(x).dtype
            return super().loss(x)
    model = Cast()
    Learner(model, xs(), autocast=torch.bfloat16).fit(2, progress=False)
    assert model.kind == torch.bfloat16 and model.net[0].weight.dtype == torch.float32


def test_training_mode_is_restored_and_callbacks_called():
    model, calls = Line().eval(), []
    Learner(model, xs(), callbacks=[lambda learner: calls.append((learner.step, learner.model.training))]).fit(3, progress=False)
    assert calls == [(1, True), (2, True), (3, True)] and not model.training


@pytest.mark.parametrize('bad', ['loss', 'gradient'])
def test_a_number_that_is_none_stops_before_the_move(bad):
    class Bad(Line):
        def loss(self, x):
            good, x0 = super().loss(x)[0], self.net[0].weight[0, 0]
            if not hasattr(self, 'count'): self.count = 0
            self.count += 1
            if self.count < 3: return good
            return (good*math.inf, dict(kl=good*math.inf, gap=good)) if bad == 'loss' else (good + (x0 - x0.detach()).sqrt(), {})
    model = Bad()
    learner = Learner(model, xs()).fit(2, progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step 3, player 'model': kl = inf, .*loss = inf" if bad == 'loss' else r"step 3, player 'model': grad_norm = (nan|inf)"): learner.fit(9, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and learner.step == 2


def test_a_harmless_number_may_be_infinite():
    check_finite(dict(loss=1., grad_norm=1., perplexity=math.inf), 1, 'model')


@pytest.mark.parametrize('turn, message', [
    (lambda m, x: Turn('nobody', m.net(x).mean()), "turn of 'nobody', the players are"),
    (lambda m, x: Turn('model', m.net(x).mean().detach()), 'no scalar with a graph'),
    (lambda m, x: Turn('model', m.net(x)[:, 0]), 'no scalar with a graph'),
    (lambda m, x: Turn('model', x.clone().requires_grad_().sum()), 'reaches none of its weights'),
    (lambda m, x: Turn('model', m.net(x).mean(), dict(parts=x)), 'parts has 128 numbers: give one')])
def test_turns_that_cannot_be_played(turn, message):
    class Odd(Line):
        def turns(self, x): yield turn(self, x)
    with pytest.raises(ValueError, match=message): Learner(Odd(), xs()).fit(1, progress=False)


@pytest.mark.parametrize('options, message', [
    (dict(schedule='cosine'), "schedule is 'cosine': use one_cycle, constant"), (dict(data=xs()[:0]), 'data is empty'),
    (dict(model=Line().requires_grad_(False)), "player 'model' has no weights that learn")])
def test_learners_that_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message): Learner(**dict(model=Line(), data=xs()) | options)


def test_numbers_are_fetched_together():
    assert as_floats(dict(a=torch.tensor(2.), b=3, c=torch.tensor([1], dtype=torch.int64), d=numpy.float32(0.5)), torch.device('cpu')) == dict(a=2., b=3., c=1., d=0.5)


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='cannot be written'): Learner(Line(), xs(), folder=tmp_path/'file'/'runs')
    with pytest.raises(ValueError, match="no folder to write in"): Learner(Line(), xs()).save()


def test_resume_in_one_process(tmp_path):
    def build(folder, **options):
        torch.manual_seed(5)
        return Learner(Game(), xs()[:, :1], batch_size=8, ema=0.9, folder=folder, **options)
    whole = build(tmp_path/'a').fit(20, progress=False)
    first = build(tmp_path/'b', checkpoint_every=7)
    assert not first.resume()
    for step in range(14): first.one_step(20)
    first.save()
    torch.rand(99)
    second = build(tmp_path/'b')
    assert second.resume() and second.step == 14
    second.fit(20, progress=False)
    assert same(whole.model, second.model) and same(whole.averaged(), second.averaged()) and second.model.steps == 20


def test_a_run_is_not_overwritten_by_chance(tmp_path):
    Learner(Line(), xs(), folder=tmp_path).fit(3, progress=False)
    with pytest.raises(ValueError, match=r'holds step 3, this learner is at 0: call resume\(\) first'): Learner(Line(), xs(), folder=tmp_path).fit(3, progress=False)
    assert list(checkpoints(tmp_path)) == [3]


@pytest.mark.parametrize('build, message', [
    (lambda f: Learner(Game(), xs(), folder=f), 'holds a Line, not a Game'), (lambda f: Learner(Line(d=3), xs(), folder=f), 'trained with d=2, not 3'),
    (lambda f: Learner(Line(), xs(), folder=f, ema=0.9), "'averages': False"), (lambda f: Learner(Line(), xs(), folder=f, generators=[torch.Generator()]), "'generators': 0")])
def test_checkpoints_that_do_not_fit(tmp_path, build, message):
    Learner(Line(), xs(), folder=tmp_path).fit(2, progress=False)
    with pytest.raises(ValueError, match=message): build(tmp_path).resume()


def test_a_checkpoint_cut_short_or_from_another_vocabulary(tmp_path):
    from jointgen.pairs import Vocab
    learner = Learner(Line(Vocab(['a'], 5)), xs(), folder=tmp_path).fit(2, progress=False)
    with pytest.raises(ValueError, match='trained with vocabulary'): Learner(Line(Vocab(['b'], 5)), xs(), folder=tmp_path).resume()
    file = tmp_path/'step-00000002'/'training.safetensors'
    file.write_bytes(file.read_bytes()[:100])
    other = Learner(Line(Vocab(['a'], 5)), xs(), folder=tmp_path)
    before = other.model.net[0].weight.clone()
    with pytest.raises(ValueError, match='cut short'): other.resume()
    assert torch.equal(other.model.net[0].weight, before) and other.step == 0 and learner.step == 2


def test_memory_that_is_no_tensor(tmp_path):
    class Counts(Line):
        seen = 0
        def get_extra_state(self): return dict(seen=self.seen)
        def set_extra_state(self, state): self.seen = state['seen']
    first = Learner(Counts(), xs(), folder=tmp_path)
    first.model.seen = 41
    first.fit(1, progress=False)
    second = Learner(Counts(), xs(), folder=tmp_path)
    assert second.resume() and second.model.seen == 41


@pytest.mark.parametrize('number, raised', [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_ends_the_step_and_writes_a_checkpoint(tmp_path, number, raised):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    class Interrupted(Line):
        def loss(self, x):
            if len(self.learner.log) == 4: os.kill(os.getpid(), number)
            return super().loss(x)
    model = Interrupted()
    learner = Learner(model, xs(), folder=tmp_path)
    object.__setattr__(model, 'learner', learner)
    with pytest.raises(raised): learner.fit(50, progress=False)
    assert learner.step == 5 and list(checkpoints(tmp_path)) == [5] and len(read_log(tmp_path)) == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_callback_may_interrupt_too(tmp_path):
    def stop(learner):
        if learner.step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Learner(Line(), xs(), folder=tmp_path, callbacks=[stop]).fit(9, progress=False)
    assert list(checkpoints(tmp_path)) == [3]


def test_fit_outside_the_main_thread():
    learner = Learner(Line(), xs())
    thread = threading.Thread(target=lambda: learner.fit(2, progress=False))
    thread.start(); thread.join()
    assert learner.step == 2


def test_progress_goes_to_stderr(capsys):
    Learner(Line(), xs()).fit(3)
    out, err = capsys.readouterr()
    assert out == '' and '3/3' in err and 'model' in err


RUN = textwrap.dedent('''
    import os, random, signal, sys
    import numpy, torch
    from torch import nn
    from jointgen.joint import JointModel, Turn
    from jointgen.learner import Learner
    import jointgen.checkpoints as checkpoints

    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    how, folder = sys.argv[1:]
    own = torch.Generator().manual_seed(3)

    class Game(JointModel):
        def __init__(self, vocab=None, *, d=4):
            super().__init__(vocab, d=d)
            self.generator = nn.Sequential(nn.Linear(d, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, d))
            self.discriminator = nn.Sequential(nn.Linear(d, 8), nn.LeakyReLU(), nn.Linear(8, 1))
            self.register_buffer('scale', torch.ones(d))
        def players(self): return dict(discriminator=self.discriminator, generator=self.generator)
        def turns(self, x):
            z = torch.randn(x.shape, generator=own) + 0.1*numpy.random.rand() + 0.1*random.random() + 0.1*torch.rand_like(x)
            fake = self.generator(z)*self.scale
            yield Turn('discriminator', (self.discriminator(x) - 1).square().mean() + self.discriminator(fake.detach()).square().mean())
            if how == 'mid-step' and learner.step == 36: die()
            yield Turn('generator', (self.discriminator(fake) - 1).square().mean())
            with torch.no_grad(): self.scale.lerp_(x.std(0), 0.1)

    random.seed(0); numpy.random.seed(0); torch.manual_seed(0)
    model = Game()
    learner = Learner(model, torch.randn(70, 4), batch_size=16, ema=0.99, folder=folder, checkpoint_every=25, generators=[own])
    resumed = learner.resume()
    if how == 'mid-write':
        save, count = checkpoints.save_file, []
        def save_some(tensors, path):
            save(tensors, path)
            count.append(path)
            if len(count) == 2: os.truncate(path, 50); die()
        checkpoints.save_file = save_some
    print(resumed, learner.step, flush=True)
    learner.fit(50, progress=False)
    print('drawn', torch.rand(1).item(), numpy.random.rand(), random.random(), torch.rand(1, generator=own).item())
''')


def test_fifty_steps_equal_twenty_five_killed_and_twenty_five(tmp_path):
    script = tmp_path/'run.py'
    script.write_text(RUN)
    def run(how, folder):
        done = subprocess.run([sys.executable, str(script), how, str(tmp_path/folder)], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        assert done.returncode == (0 if how == 'whole' else -signal.SIGKILL), done.stderr
        return done.stdout.splitlines()
    whole = run('whole', 'a')
    assert run('mid-step', 'b') == ['False 0']
    assert list(checkpoints(tmp_path/'b')) == [25] and read_log(tmp_path/'b')[-1]['step'] == 37
    assert run('mid-write', 'b') == ['True 25']
    assert list(checkpoints(tmp_path/'b')) == [25] and list((tmp_path/'b').glob('tmp-*')), 'killed while it wrote, the last checkpoint is whole'
    rest = run('whole', 'b')
    assert rest[0] == 'True 25' and rest[1] == whole[1], 'all random numbers stand where they would have'
    a, b = (tmp_path/folder/'step-00000050' for folder in 'ab')
    for name in ('model', 'average', 'training'): assert (a/f'{name}.safetensors').read_bytes() == (b/f'{name}.safetensors').read_bytes(), name
    logs = [[{k: v for k, v in r.items() if k != 'rate'} for r in read_log(tmp_path/folder)] for folder in 'ab']
    assert logs[0] == logs[1] and [r['step'] for r in logs[1]] == [s for s in range(1, 51) for _ in range(2)]
    assert not list((tmp_path/'b').glob('tmp-*'))


def test_plot_log_smooths_by_hand():
    values = [float(i % 2) for i in range(60)]
    line = plot_log([dict(step=i + 1, player='model', loss=v) for i, v in enumerate(values)]).axes[0].lines[1]
    assert line.get_xdata()[0] == 2 and len(line.get_xdata()) == 58 and abs(line.get_ydata()[:2] - [1/3, 2/3]).max() < 1e-12


def test_plot_log_draws_each_player():
    log = Learner(Game(), xs()[:, :1]).fit(4, progress=False).log
    figure = plot_log(log, ('loss', 'spread'))
    assert [len(axes.lines) for axes in figure.axes] == [4, 2] and figure.axes[0].get_xlabel() == 'step'
    with pytest.raises(ValueError, match='the log has no'): plot_log(log, ('kl',))


def test_log_file_is_json_lines(tmp_path):
    learner = Learner(Line(), xs(), folder=tmp_path, log_every=2).fit(6, progress=False)
    assert [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()] == learner.log and [r['step'] for r in learner.log] == [2, 4, 6]

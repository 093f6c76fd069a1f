"""Measuring takes the share of the time that it may, in simulated runs of an injected clock."""

import json
import math

import numpy as np
import pytest

from gnsmon.pace import Fixed, Paced


class Run:
    """A training run whose steps take `bare` seconds and measured ones `extra` more, with jitter.

    Single steps stray by `jitter`, one in a hundred takes up to six times as long, the machine's
    speed wanders by `drift` a step, and after every `pause` steps there is one of 30 bare ones.
    """

    def __init__(self, extra, *, jitter=0.05, drift=0.0, pause=None, overhead=0.01, seed=0):
        self.bare, self.extra, self.examples = 1.0, extra, 32
        self.jitter, self.drift, self.pause = jitter, drift, pause
        self.rng = np.random.default_rng(seed)
        self.step, self.now, self.pauses, self.spent, self.wandered = 0, 0.0, 0.0, 0.0, 0.0
        self.pace = Paced(overhead, clock=lambda: self.now)
        self.measured, self.intervals, self.ends = [], [], []

    def train(self, steps):
        for _ in range(steps):
            self.wandered = 0.999 * self.wandered + self.drift * self.rng.normal()
            speed = math.exp(self.wandered)
            took = self.bare * speed * math.exp(self.jitter * self.rng.normal())
            if self.rng.random() < 0.01:
                took *= self.rng.uniform(1, 6)
            if self.step < 3:  # compiling
                took += 50
                self.pauses += 50
            if self.pause and self.step % self.pause == self.pause - 1:
                took += 30 * self.bare
                self.pauses += 30 * self.bare
            self.now += took
            if self.pace.due(self.step):
                extra = self.extra * speed * math.exp(2 * self.jitter * self.rng.normal())
                self.now += extra
                self.spent += extra
                self.measured.append(self.step)
                self.pace.record(self.step, self.pace.lap(self.step), self.examples)
                self.ends.append((self.now - self.pauses, self.spent))
                self.intervals.append(self.pace.interval)
            self.step += 1
        return self

    @property
    def share(self):
        """Of the time but for pauses and for compiling."""
        return self.spent / (self.now - self.pauses)


MACHINES = {
    "quiet": {},
    "noisy": {"jitter": 0.15},
    "drifting": {"drift": 0.01},
    "pausing": {"pause": 100},
    "pausing often": {"pause": 50},
}


@pytest.mark.parametrize("extra", [0.005, 0.05, 0.2, 0.6, 1.7])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_long_run_keeps_to_the_share(machine, extra):
    """To a fifth in a single run, to a tenth on average; the first fifteen are in it."""
    runs = [Run(extra, seed=seed, **MACHINES[machine]).train(20_000) for seed in range(4)]
    assert np.mean([run.share for run in runs]) < 0.011
    assert max(run.share for run in runs) < 0.012
    wanted = max(99 * extra, 1.0)
    if extra >= 0.2:  # what is cheap is not worth the last of its measurements
        assert all(len(run.measured) > 0.5 * 20_000 / wanted for run in runs)


@pytest.mark.parametrize("overhead", [0.001, 0.05, 0.3])
def test_other_shares(overhead):
    run = Run(0.6, overhead=overhead).train(100_000)
    assert 0.8 * overhead < run.share < 1.15 * overhead


def test_a_source_as_cheap_as_nothing_is_measured_at_most_steps():
    run = Run(0.0, overhead=0.2).train(1000)
    assert run.pace.interval == 1
    assert len(run.measured) > 700


def test_a_very_expensive_source_still_measures():
    run = Run(50.0).train(10_000)
    assert run.pace.interval == pytest.approx(990)
    assert len(run.measured) > 20


@pytest.mark.parametrize("extra", [0.2, 0.6])
def test_there_are_readings_early_on(extra):
    run = Run(extra).train(60)
    assert 12 <= len(run.measured) <= 16
    assert len(run.train(240).measured) >= 18


def test_steps_that_compile_are_not_counted():
    """Fifty seconds at each of the first three steps; the cost is that of the others."""
    cost = Run(0.6, jitter=0.0).train(100).pace.cost
    assert cost.bare == pytest.approx(1, rel=0.01)
    assert cost.extra == pytest.approx(0.6, rel=0.01)


@pytest.mark.parametrize(("bare", "extra"), [(2.0, 3.6), (3.0, 0.6), (1 / 3, 0.6), (3.0, 1.8)])
def test_another_speed_makes_another_plan(bare, extra):
    run = Run(0.6, jitter=0.03).train(4000)
    assert run.pace.interval == pytest.approx(60, rel=0.2)
    run.bare, run.extra = bare, extra
    run.train(1500)
    assert run.pace.interval == pytest.approx(99 * extra / bare, rel=0.25)
    if extra / bare == pytest.approx(0.6):
        assert run.pace.cost.bare == pytest.approx(bare, rel=0.1)


def test_another_batch_makes_another_plan():
    """Steps that are little slower, so that their time alone would not tell."""
    run = Run(0.2).train(4000)
    run.bare, run.extra, run.examples = 1.15, 0.45, 64
    run.train(300)
    assert run.pace.interval == pytest.approx(99 * 0.45 / 1.15, rel=0.3)


def test_a_short_last_batch_of_each_epoch_is_no_other_batch():
    run = Run(0.2)
    for _ in range(200):
        run.examples = 32
        run.train(19)
        run.examples = 7
        run.train(1)
    assert len(set(run.intervals)) < 10
    assert run.pace.interval == pytest.approx(20, rel=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_a_tenth_changes_the_plan_seldom(seed):
    run = Run(0.3, jitter=0.1, seed=seed).train(20_000)
    changes = np.diff(run.intervals[run.intervals.index(None) + 20 :]) != 0
    assert changes.sum() <= 8
    assert len(run.measured) > 400


def test_pauses_do_not_move_the_plan():
    bare, paused = Run(0.6).train(20_000), Run(0.6, pause=100).train(20_000)
    assert paused.pace.interval == pytest.approx(bare.pace.interval, rel=0.25)
    assert len(paused.measured) == pytest.approx(len(bare.measured), rel=0.2)


@pytest.mark.parametrize("extra", [0.1, 0.6])
@pytest.mark.parametrize("steps", [60, 300, 10_000])
def test_the_share_that_is_told_is_true(extra, steps):
    told, true = [], []
    for seed in range(4):
        run = Run(extra, jitter=0.02, seed=seed).train(steps)
        (start, before), (end, after) = run.ends[-min(21, len(run.ends))], run.ends[-1]
        told.append(run.pace.overhead)
        true.append((after - before) / (end - start))
    assert np.mean(told) == pytest.approx(np.mean(true), rel=0.15)


def test_nothing_is_told_before_it_is_known():
    run = Run(0.6).train(30)
    assert run.pace.overhead is run.pace.cost is run.pace.interval is None


def test_equal_records_make_equal_plans():
    """Whatever the clocks of the ranks say, and where a step could not be measured."""
    now, one = [0.0], Run(0.3)
    other = Paced(0.01, clock=lambda: now[0])
    record = one.pace.record

    def both(step, seconds, examples):
        now[0] += one.rng.exponential()
        other.lap(step)
        examples = None if step % 7 == 0 else examples
        record(step, seconds, examples)
        other.record(step, seconds, examples)

    one.pace.record = both
    for _ in range(3000):
        assert one.pace.due(one.step) == other.due(one.step)
        one.train(1)
    assert one.pace.state_dict() == other.state_dict()
    assert len(one.measured) > 50


def test_a_resumed_run_goes_on_with_the_plan():
    run = Run(0.6).train(3000)
    before = run.pace.interval
    state = json.loads(json.dumps(run.pace.state_dict()))
    run.pace = Paced(0.01, state=state, step=run.step, clock=lambda: run.now)
    assert run.pace.state_dict() == state
    assert run.pace.ordinal(run.step) == len(run.measured)
    measured, run.measured = run.measured, []
    run.now += 500  # restarted, and compiled
    run.train(3000)
    assert run.measured[0] == state["next"] > measured[-1]
    assert run.pace.interval == pytest.approx(before, rel=0.25)
    assert len(run.measured) < 3000 / before + 10  # nothing is learnt anew


def test_a_state_without_a_plan_begins_one():
    pace = Paced(0.01, state=None, step=500, clock=lambda: 0.0)
    assert pace.due(500)
    assert pace.ordinal(500) == 0


def test_a_step_that_is_closed_twice_counts_once():
    """By several optimizers, one after the other."""
    now = [0.0]
    pace = Paced(0.01, clock=lambda: now[0])
    pace.record(0, pace.lap(0), 8)
    now[0] = 3.0
    assert pace.due(1)
    pace.record(1, pace.lap(1), 8)
    state = pace.state_dict()
    now[0] = 4.0
    assert pace.due(1)
    assert pace.ordinal(1) == 1
    assert math.isnan(pace.lap(1))
    pace.record(1, math.nan, 8)
    assert pace.state_dict() == state
    now[0] = 10.0
    assert pace.lap(5) == 7.0


def test_measurements_are_counted_from_one_exact_step_to_the_next():
    run = Run(0.3)
    for _ in range(500):
        if run.pace.due(run.step):
            assert run.pace.ordinal(run.step) == len(run.measured)
        run.train(1)


# A number of steps.


def fixed(every, steps, **options):
    now = [0.0]
    pace = Fixed(every, clock=lambda: now[0], **options)
    measured = []
    for step in range(steps):
        due = pace.due(step)
        measured += [step] * due
        now[0] += 1 + 0.5 * due
        assert pace.lap(step) == 0.0
        pace.record(step, 0.0, 8)
        pace.tick(due)
    return pace, measured


def test_one_step_in_n_is_measured_as_it_was():
    pace, measured = fixed(4, 21)
    assert measured == [0, 4, 8, 12, 16, 20]
    assert [pace.ordinal(step) for step in measured] == [0, 1, 2, 3, 4, 5]
    assert pace.overhead == pytest.approx(0.5 / 4.5)
    assert (pace.interval, pace.state_dict()) == (4, None)
    assert fixed(1, 9)[1] == list(range(9))


def test_the_cost_is_not_known_where_steps_cannot_be_timed():
    """On a GPU a call returns before its step has ended; and if all are measured, none is bare."""
    assert fixed(4, 21, timed=lambda: False)[0].overhead is None
    assert fixed(1, 21)[0].overhead is None
    assert fixed(4, 8)[0].overhead is None

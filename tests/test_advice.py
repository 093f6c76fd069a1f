import math

import pytest

from gnsmon.advice import Goal, Layout, StepTime, advise
from gnsmon.advice.advice import suggested
from gnsmon.estimators import Raw, Reading
from gnsmon.estimators.values import Approximation

RAW = Raw(1.0, 1.0, 0.1, 1.0, 1.0)
BASE = {
    "step": 100,
    "examples": 64,
    "tokens": None,
    "method": "pepgns",
    "status": "ok",
    "reason": None,
    "b_simple": 256.0,
    "low": 200.0,
    "high": 320.0,
    "grad_sq_norm": 1.0,
    "tr_sigma": 256.0,
    "raw": RAW,
    "n_eff": 199.0,
    "coverage": 1.0,
    "overhead": None,
}
UNCALIBRATED = Approximation(None, None, None, 0, 5.0)
EARLY = Approximation(None, None, None, 3, None)
ONCE = Approximation(1.2, None, None, 1, 5.0)
LOWER = {"status": "lower_bound", "b_simple": None, "high": None, "reason": "not yet"}
UNDEFINED = {"status": "undefined", "b_simple": None, "low": None, "high": None}


def reading(**changes):
    return Reading(**{**BASE, **changes})


def text(advice):
    return " ".join(str(advice).split())


def test_numbers_by_hand():
    a = advise(reading(), microbatch=8, world_size=4, optimizer="SGD")
    assert (a.present, a.batch_size, a.accumulation) == (64, 256, 8)
    assert (a.low, a.high) == (200, 320)
    assert a.fraction_of_critical == 0.25
    assert a.extra_steps == 4
    assert a.extra_examples == 0.25
    assert a.learning_rate_factor == (1 + 4) / (1 + 1)
    words = text(a)
    assert "Grow the batch from 64 examples to 256 examples" in words
    assert "interval 200 to 320." in words
    assert "5 times the fewest possible steps" in words
    assert "1.25 times the fewest possible examples" in words
    assert "4 x 8 x 8" in words
    assert "learning rate times 2.50" in words


def test_extra_steps_and_examples_are_reciprocal():
    for present in (1, 64, 1000):
        a = advise(reading(), present=present)
        assert a.extra_steps * a.extra_examples == pytest.approx(1)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ("AdamW", 2.0),
        ("Lion", 2.0),
        ("Adagrad", 2.0),
        ("SGD", 2.5),
        ("SGD with momentum 0.9", 2.5),
        ("Muon", None),
        ("Muon with momentum 0.95", None),
        ("LARS with momentum 0.9", None),  # of no known rule, which momentum does not change
        ("SGDP with momentum 0.9", 2.5),
        ("momentum", 2.5),
        ("AdamW and Muon", None),
        ("SGD and AdamW", None),
        ("SGD with momentum 0.9 and SGD", 2.5),
        ("AdamW and Lion", 2.0),
        ("SGD and Mine", None),
        (None, None),
    ],
)
def test_learning_rate(optimizer, factor):
    a = advise(reading(), optimizer=optimizer)
    assert a.learning_rate_factor == factor
    assert any("beta2 to the power 4" in c for c in a.caveats) == ("AdamW" in str(optimizer))


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("AdamW", "preconditioned"),
        ("Lion", "alignment of half batches"),
        ("Muon", "alignment of half batches"),
        ("SGD with momentum 0.9", "same momentum"),
        ("AdamW and Muon", "preconditioned"),
        ("AdamW and Muon", "alignment of half batches"),
        ("SGD with momentum 0.9 and AdamW", "of SGD with momentum 0.9 and AdamW go by different"),
        ("Mine", "not known of Mine"),
        ("SGD and Mine", "go by different rules"),
    ],
)
def test_each_family_has_its_caveat(optimizer, words):
    assert any(words in caveat for caveat in advise(reading(), optimizer=optimizer).caveats)


@pytest.mark.parametrize("present", [142, 200, 256, 320, 452])
def test_the_present_batch_stays_unless_the_interval_excludes_it_by_sqrt_2(present):
    a = advise(reading(), present=present, optimizer="Adam")
    assert a.batch_size == present
    assert a.learning_rate_factor == 1
    assert f"Keep the batch at {present}" in text(a)


@pytest.mark.parametrize(("present", "batch"), [(141, 256), (453, 256), (4096, 256), (3, 256)])
def test_and_moves_if_it_does(present, batch):
    assert advise(reading(), present=present).batch_size == batch


@pytest.mark.parametrize(
    ("unit", "batch"), [(1, 256), (48, 192), (24, 192), (100, 200), (3, 192), (250, 250)]
)
def test_the_suggestion_fits_the_layout(unit, batch):
    found = suggested(reading(), present=8, layout=Layout(microbatch=unit))
    assert found.batch_size == batch == unit * found.accumulation
    assert math.log2(found.accumulation).is_integer()


def test_a_batch_too_small_for_the_layout():
    a = advise(reading(), present=2048, microbatch=1024)
    assert (a.batch_size, a.accumulation) == (1024, 1)
    assert any("shrink the microbatch" in c for c in a.caveats)
    assert advise(reading(), present=1024, microbatch=1024).batch_size == 1024


@pytest.mark.parametrize(
    ("layout", "goal", "words"),
    [
        ({"world_size": 48}, None, "48 is the smallest batch of this layout: take fewer workers"),
        ({"world_size": 48, "largest_microbatch": 16}, None, "take fewer workers"),
        ({"microbatch": 16}, Goal(data_overhead=0.2), "shrink the microbatch"),
        ({}, None, None),
    ],
)
def test_what_makes_a_smaller_batch_possible(layout, goal, words):
    small = (
        reading(b_simple=0.6, low=0.5, high=0.7)
        if goal is None
        else reading(b_simple=40.0, low=30.0, high=50.0)
    )
    said = text(advise(small, present=1024, goal=goal, **layout))
    assert words in said if words else "smallest batch" not in said


def test_a_kept_batch_says_for_what():
    assert "Keep the batch at 64 examples. For at most 25 % more" in text(
        advise(reading(), goal=Goal(data_overhead=0.25))
    )


def test_a_lower_bound_far_above_the_present_batch_is_worth_growing_to():
    a = advise(reading(low=500.0, **LOWER), microbatch=16, optimizer="SGD")
    assert (a.batch_size, a.accumulation) == (512, 32)
    assert (a.extra_steps, a.extra_examples, a.fraction_of_critical) == (None, None, None)
    assert a.learning_rate_factor is None
    assert "to at least 512 examples" in text(a)
    assert "not measurable yet; it is at least 500" in text(a)


def test_a_lower_bound_near_the_present_batch_says_nothing():
    a = advise(reading(low=80.0, **LOWER))
    assert a.batch_size is None
    assert "No reason yet to change the batch of 64" in text(a)


def test_undefined_says_why():
    a = advise(reading(**UNDEFINED, reason="3 effective steps so far"), optimizer="Adam")
    assert a.batch_size is None
    assert a.learning_rate_factor is None
    assert "No suggestion: 3 effective steps so far." in text(a)
    assert suggested(reading(**UNDEFINED), present=4) is None


def test_an_upper_bound_of_an_undefined_reading_is_no_suggestion():
    changes = {**UNDEFINED, "low": 0.0, "high": 3.0, "reason": "below 3"}
    assert advise(reading(**changes)).batch_size is None


def test_no_noise_asks_for_the_smallest_batch():
    a = advise(reading(b_simple=0.0, low=0.0, high=0.0), microbatch=4)
    assert (a.batch_size, a.extra_steps, a.extra_examples) == (4, 0, None)
    assert "Shrink" in str(a)


def test_tokens():
    assert "256 examples (262,000 tokens)" in text(advise(reading(), tokens_per_example=1024))
    assert "(2,560 tokens)" in text(advise(reading(tokens=640)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "sogns", "approximation": UNCALIBRATED}, "'sogns' is a proxy"),
        (
            {"method": "norm_layers", "approximation": UNCALIBRATED},
            "'norm_layers' is a proxy",
        ),
        (
            {"method": "norm_layers", "approximation": EARLY},
            "no calibration can be told yet from 3 exact steps; let the run go on",
        ),
        ({"method": "sogns", "approximation": ONCE}, "calibrated by a single exact step"),
        ({"coverage": 0.93}, "93% of the trainable parameters"),
        ({"status": "wide", "reason": "known to 31% only"}, "known to 31% only"),
        ({"b_simple": 1280.0, "high": 2000.0}, "about 21 %"),
        ({"method": "sogns", "approximation": UNCALIBRATED}, "about 5 %"),
        ({}, "multiple of the identity"),
    ],
)
def test_caveats(changes, words):
    a = advise(reading(**changes))
    assert any(words in caveat for caveat in a.caveats)
    assert words in text(a)


def test_the_reading_in_the_optimizers_metric_is_told_beside():
    beside = reading(method="pepgns_preconditioned_factored", b_simple=31.0, low=25.0, high=40.0)
    words = text(advise(reading(), optimizer="AdamW", in_metric=beside))
    assert "(pepgns_preconditioned_factored) it is 31 examples, interval 25 to 40." in words
    beside = reading(method="pepgns_preconditioned_factored", low=25.0, **LOWER)
    words = text(advise(reading(), optimizer="AdamW", in_metric=beside))
    assert "it is not measurable yet, at least 25 examples" in words
    assert "in its metric" not in text(advise(reading(), optimizer="SGD", in_metric=beside))


def test_a_sound_reading_carries_the_one_assumption():
    assert len(advise(reading(), optimizer="SGD").caveats) == 1


def test_optimizers_of_one_rule_carry_no_caveat_of_several():
    alike = advise(reading(), optimizer="SGD with momentum 0.9 and SGD")
    assert alike.caveats == advise(reading(), optimizer="momentum").caveats
    unchanged = advise(reading(), present=256, optimizer="Mine")
    assert len(unchanged.caveats) == 1


@pytest.mark.parametrize("size", [{"present": 0}, {"microbatch": 0}, {"world_size": 0}])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ValueError, match="sizes of 1 or more"):
        advise(reading(), **size)


# What a batch is to be good for: b = 256.


@pytest.mark.parametrize(
    ("goal", "batch"),
    [
        ({}, 256),
        ({"data_overhead": 0.25}, 64),  # B = x b
        ({"data_overhead": 4.0}, 1024),
        ({"step_overhead": 0.25}, 1024),  # B = b / x
        ({"step_overhead": 0.5, "data_overhead": 2.0}, 512),  # the two meet
        ({"step_overhead": 2.0, "data_overhead": 2.0}, 256),  # between 128 and 512
        ({"step_price": 4.0, "example_price": 1.0}, 32),  # sqrt(256 * 4)
        ({"step_price": 4.0, "example_price": 1.0, "step_overhead": 2.0}, 128),
        ({"step_price": 4096.0, "example_price": 1.0, "data_overhead": 2.0}, 512),
    ],
)
def test_goals_by_hand(goal, batch):
    assert Goal(**goal).batch_size(256.0) == pytest.approx(batch)
    a = advise(reading(low=255.0, high=257.0), present=8, goal=Goal(**goal))
    assert a.batch_size == batch


def test_the_suggestion_comes_with_its_interval():
    a = advise(reading(), present=8, goal=Goal(data_overhead=0.25))
    assert (a.best_low, a.best_high) == (50, 80)  # a quarter of 200 and 320
    assert "For at most 25 % more examples than the fewest, something from 50 to 80" in text(a)
    a = advise(reading(low=500.0, **LOWER), goal=Goal(data_overhead=0.5))
    assert (a.best_low, a.best_high) == (250, None)
    assert "250 or more would be best" in text(a)


def test_prices_make_the_cheapest_run():
    goal, b = Goal(step_price=7.0, example_price=0.3), 123.0
    best = goal.batch_size(b)
    costs = [goal.cost(best * k, b) for k in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert min(costs) == costs[2]
    # S_min (1 + b / B) steps of price p_s and as many times B examples of price p_e, by hand:
    assert goal.cost(123.0, b) == pytest.approx(2 * (7.0 + 0.3 * 123))


def test_a_limit_on_both_that_no_batch_meets():
    with pytest.raises(ValueError, match="multiply to 100 %"):
        Goal(data_overhead=0.2, step_overhead=0.5)


@pytest.mark.parametrize(
    "wrong", [{"data_overhead": 0}, {"step_price": 1.0}, {"step_overhead": math.nan}]
)
def test_impossible_goals(wrong):
    with pytest.raises(ValueError, match="expected"):
        Goal(**wrong)


def test_what_the_suggestion_saves_and_costs():
    goal = Goal(step_price=256.0, example_price=1.0)  # best at b
    a = advise(reading(), present=64, goal=goal)
    assert a.batch_size == 256
    assert a.steps == pytest.approx(2 / 5)
    assert a.examples == pytest.approx(2 / 1.25)
    assert a.cost == pytest.approx((2 * 512) / (5 * 320))
    assert "0.4 times as many steps and 1.6 times as many examples" in text(a)
    assert "For the cheapest run at these prices" in text(a)
    assert "at 0.64 times the cost" in text(a)
    times = StepTime(256.0, 1.0)
    assert "For the fastest run by these times" in text(advise(reading(), goal=times.goal()))
    assert "in 0.64 times the time" in text(advise(reading(), present=64, goal=times.goal()))


def test_the_curve_has_the_present_and_the_suggested_batch():
    a = advise(reading(), present=48)
    points = {point.batch_size: point for point in a.curve()}
    assert {48, a.batch_size} <= points.keys()
    assert points[256].steps == points[256].examples == 2
    for point in points.values():
        assert (point.steps - 1) * (point.examples - 1) == pytest.approx(1)
    assert advise(reading(**UNDEFINED)).curve() == []


# Hardware.


@pytest.mark.parametrize(
    ("layout", "target", "split"),
    [
        (Layout(), 256, (256, None, None)),
        (Layout(4, 8), 256, (256, 8, 8)),
        (Layout(4, 8), 3, (32, 8, 1)),
        (Layout(4, 8, largest_microbatch=32), 256, (256, 32, 2)),
        (Layout(4, largest_microbatch=24), 256, (256, 16, 4)),
        (Layout(4, largest_microbatch=24, powers_of_two=False), 250, (252, 21, 3)),
        (Layout(3, 5, powers_of_two=False), 100, (105, 5, 7)),
        (Layout(6, largest_microbatch=64), 256, (192, 32, 1)),
    ],
)
def test_layouts_by_hand(layout, target, split):
    assert layout.nearest(target) == split


def test_a_kept_batch_is_not_rounded():
    a = advise(reading(), present=202, largest_microbatch=25, powers_of_two=False)
    assert (a.batch_size, a.microbatch, a.accumulation) == (202, 2, 101)
    assert "Keep the batch at 202" in text(a)


def test_a_split_is_of_the_batch_that_it_names():
    for workers in (1, 3, 8):
        for largest in (1, 7, 32):
            for powers in (True, False):
                layout = Layout(workers, largest_microbatch=largest, powers_of_two=powers)
                for target in (1, 10, 100, 777, 5000):
                    batch, microbatch, accumulation = layout.nearest(target)
                    assert batch == workers * microbatch * accumulation
                    assert 1 <= microbatch <= largest

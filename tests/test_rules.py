"""Every rule, and every way to join them, against the one-example-at-a-time oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LAYERS, B, Case, by_name, energy
from torch import Tensor, nn

from gnsmon.norms import contractions
from gnsmon.norms.convolved import Convolved
from gnsmon.norms.forms import Form, Outer
from gnsmon.norms.oracles import per_example_gradients, per_example_sq_norms
from gnsmon.norms.rules import find_rule, refusal, rule

EXACT = {"rtol": 1e-10, "atol": 1e-14}


def captured(model: nn.Module, loss, batch) -> dict[str, Form]:
    """Parameter name -> its form, uses joined; leaves `.grad` of the loss on the model."""
    names = {p: name for name, p in model.named_parameters()}
    forms: dict[str, Form] = {}

    def remember(module, args, kwargs, output):
        def collect(dy):
            x = [a.detach() for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            given = find_rule(module)(module, x[0] if len(x) == 1 else tuple(x), dy)
            for own, form in given.items():
                p = getattr(module, own)
                if p.requires_grad:
                    name = names[p]
                    forms[name] = forms[name] + form if name in forms else form

        output.register_hook(collect)

    hooks = [
        module.register_forward_hook(remember, with_kwargs=True)
        for module in model.modules()
        if find_rule(module)
    ]
    loss(model, batch).backward()
    for hook in hooks:
        hook.remove()
    return forms


def grad_of(model: nn.Module, name: str) -> Tensor:
    grad = model.get_parameter(name).grad
    return grad.to_dense() if grad.is_sparse else grad


def gradients(case: Case) -> dict[str, Tensor]:
    """Parameter name -> per-example gradients [B, *shape] of the mean loss, by the oracle."""
    model, batch = case.make()
    rows = list(per_example_gradients(model, case.loss, batch))
    return {name: torch.stack([row[name] for row in rows]) / B for name in rows[0]}


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
layers = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


@cases
def test_the_forms_are_the_per_example_gradients(case):
    model, batch = case.make()
    forms, want = captured(model, case.loss, batch), gradients(case)
    used = {name for name, grad in want.items() if "unused" not in name}
    assert set(forms) == used
    for name in used:
        form = forms[name]
        assert form.shape == want[name].shape[1:]
        torch.testing.assert_close(form.dense(), want[name], **EXACT)
        torch.testing.assert_close(form.sq_norms(), want[name].flatten(1).square().sum(1), **EXACT)


@cases
def test_their_sum_is_grad(case):
    model, batch = case.make()
    for name, form in captured(model, case.loss, batch).items():
        grad = grad_of(model, name)
        direction = torch.randn(grad[0].numel(), dtype=grad.dtype)
        torch.testing.assert_close(form.sum(), grad, **EXACT)
        along = grad.reshape(len(grad), -1) @ direction
        torch.testing.assert_close(form.sum_along(direction), along, **EXACT)


@cases
def test_regrouping_sums_consecutive_examples(case):
    model, batch = case.make()
    want = gradients(case)
    for name, form in captured(model, case.loss, batch).items():
        pairs = want[name].unflatten(0, (2, B // 2)).sum(1)
        regrouped = form.regroup(2)
        torch.testing.assert_close(regrouped.dense(), pairs, **EXACT)
        norms = pairs.flatten(1).square().sum(1)
        torch.testing.assert_close(regrouped.sq_norms(), norms, **EXACT)


@cases
def test_weights_give_the_clipped_gradient(case):
    """Goodfellow 2015: the norms first, then one weighted sum."""
    model, batch = case.make()
    forms, want = captured(model, case.loss, batch), gradients(case)
    sq_norms = sum(form.sq_norms() for form in forms.values())
    clip = (sq_norms.mean() / sq_norms).sqrt().clamp(max=1)
    for name, form in forms.items():
        clipped = torch.tensordot(clip, want[name], 1)
        torch.testing.assert_close(form.sum(clip), clipped, **EXACT)


@cases
def test_small_chunks_change_nothing(case, monkeypatch):
    model, batch = case.make()
    want = gradients(case)
    forms = captured(model, case.loss, batch)
    for size in (1, 300, 3000):
        monkeypatch.setattr(contractions, "CHUNK_BYTES", size)
        for name, form in forms.items():
            norms = want[name].flatten(1).square().sum(1)
            torch.testing.assert_close(form.sq_norms(), norms, **EXACT)


@layers
def test_sogns_is_exact_at_one_position(case):
    model, batch = case.make()
    for form in captured(model, case.loss, batch).values():
        if not isinstance(form, Outer | Convolved) or form.positions == 1:
            torch.testing.assert_close(form.sogns_sq_norms(), form.sq_norms(), **EXACT)


@layers
def test_a_convolution_counts_its_patches_for_sogns(case):
    model, batch = case.make()
    for form in captured(model, case.loss, batch).values():
        if isinstance(form, Convolved):
            torch.testing.assert_close(
                form.sogns_sq_norms(), form.outer().sogns_sq_norms(), **EXACT
            )


def test_the_oracle_speaks_of_the_single_example_loss():
    case = by_name("linear 3d, gram")
    model, batch = case.make()
    want = per_example_sq_norms(model, case.loss, batch)
    for name, form in captured(model, case.loss, batch).items():
        torch.testing.assert_close(form.sq_norms() * B**2, want[name], **EXACT)


@pytest.mark.parametrize(
    "name",
    [
        "linear 3d, gram",
        "bilinear 3d",
        "conv2d, groups",
        "conv3d, same",
        "conv2d, circular",
        "conv transpose 2d, groups",
        "embedding, padding",
        "bag, mean, padding",
        "layer norm, two axes, no bias",
        "rms norm",
        "instance norm, running",
        "prelu, channels",
    ],
)
def test_a_rule_is_one_compiled_graph(name):
    case = by_name(name)
    model, batch = case.make()
    x = batch if isinstance(batch, tuple) else (batch,)
    assert_compiles(model, batch, torch.randn_like(model(*x)))


def test_a_ragged_bag_is_one_compiled_graph():
    bag = nn.EmbeddingBag(7, 3, padding_idx=3)
    flat, offsets = torch.randint(7, (10,)), torch.tensor([0, 3, 3, 9])
    assert_compiles(bag, (flat, offsets), torch.randn(B, 3))


def assert_compiles(layer: nn.Module, x, dy: Tensor) -> None:
    def norms(x, dy):
        return {name: f.sq_norms() for name, f in find_rule(layer)(layer, x, dy).items()}

    torch.compiler.reset()
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, dy), norms(x, dy))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("conv2d", {"padding": (2, 1)}),
        ("embedding", {"padding_idx": -1}),
        ("bag, mean", {"padding_idx": -1}),
        ("layer norm", {"eps": 1.0}),
    ],
)
def test_settings_changed_after_construction(name, setting):
    model, batch = by_name(name).make()
    for key, value in setting.items():
        setattr(model, key, value)
    form = captured(model, energy, batch)["weight"]
    torch.testing.assert_close(form.sum(), model.weight.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["network", "tied, more tokens", "bag, mean", "conv transpose 2d"])
def test_half_precision_stays_near(name, dtype):
    case = by_name(name)
    model, batch = case.make()
    want = captured(model, case.loss, batch)
    total = sum(form.sq_norms().sum() for form in want.values())
    model, batch = model.to(dtype), batch.to(dtype) if batch.is_floating_point() else batch
    for key, form in captured(model, case.loss, batch).items():
        norms = form.sq_norms()
        assert norms.dtype == torch.float32
        near = {"rtol": 0.2, "atol": 1e-3 * total.item()}
        torch.testing.assert_close(norms.sum().double(), want[key].sq_norms().sum(), **near)


def test_autocast_takes_the_layer_at_the_precision_of_its_gradient():
    model, x = (
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)),
        torch.randn(B, 3, 6),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forms = captured(model, lambda m, x: m(x).float().sin().sum(), x)
    for name, form in forms.items():
        assert form.sq_norms().dtype == torch.float32
        torch.testing.assert_close(form.sum().float(), grad_of(model, name), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_without_eps_takes_that_of_the_computing_dtype(dtype):
    layer, x = nn.RMSNorm(8, dtype=dtype), 1e-4 * torch.randn(B, 8, dtype=dtype)
    dy = torch.ones_like(x)
    scale = find_rule(layer)(layer, x, dy)["weight"].sum()
    torch.testing.assert_close(scale.to(dtype), layer(x).sum(0), rtol=0.02, atol=0.02)


BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_statistics_are_refused(kind):
    for layer in (kind(3), kind(3, affine=False), kind(3, track_running_stats=False).eval()):
        reason = refusal(layer)
        assert "a per-example gradient does not exist" in reason
        assert all(word in reason for word in ("GroupNorm", "eval mode", "running statistics"))
    assert refusal(kind(3).eval()) is None
    with pytest.raises(ValueError, match="batch statistics"):
        find_rule(nn.BatchNorm1d(3))(nn.BatchNorm1d(3), torch.randn(B, 3), torch.randn(B, 3))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_scaled_by_frequency_are_refused(kind):
    assert "depends on the others" in refusal(kind(3, 2, scale_grad_by_freq=True))
    assert refusal(kind(3, 2)) is None


def test_maximum_bags_are_refused():
    assert "only the weights tell" in refusal(nn.EmbeddingBag(3, 2, mode="max"))


def test_layers_without_a_rule():
    for layer in (nn.LSTM(2, 2), nn.GRU(2, 2), nn.MultiheadAttention(2, 1), nn.ReLU()):
        assert find_rule(layer) is None
        assert refusal(layer) is None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 2, 1), (3, 4, 4)),
        (nn.ConvTranspose1d(3, 2, 1), (3, 4)),
        (nn.InstanceNorm1d(3, affine=True), (3, 4)),
    ],
)
def test_an_input_without_a_batch_axis_is_an_error(layer, shape):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="Give the layer a batch axis"):
        find_rule(layer)(layer, x, layer(x).detach())


class Inherits(nn.Linear):
    pass


class Overrides(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OverridesConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(2 * x, weight, bias)


class OverridesNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).tanh()


def test_a_rule_is_inherited_with_the_forward_it_belongs_to():
    assert find_rule(Inherits(2, 2)) is find_rule(nn.Linear(2, 2))
    assert find_rule(Overrides(2, 2)) is None
    assert find_rule(OverridesConv(2, 2, 1)) is None
    assert find_rule(OverridesNorm(2)) is None
    assert "does not exist" in refusal(OverridesNorm(2))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class MoreScaled(Scaled):
    pass


def test_a_rule_of_ones_own():
    @rule(Scaled, refuse=lambda module: None if module.bias is None else "has a bias")
    def scaled(module, x, dy):
        return {"weight": Outer(3 * dy, x)}

    assert find_rule(MoreScaled(2, 2)) is scaled
    assert refusal(MoreScaled(2, 2)) == "has a bias"
    model, x = MoreScaled(4, 3, bias=False).double(), torch.randn(B, 5, 4, dtype=torch.float64)
    assert refusal(model) is None
    forms = captured(model, energy, x)
    torch.testing.assert_close(forms["weight"].sum(), model.weight.grad, **EXACT)
    norms = per_example_sq_norms(model, energy, x)["weight"] / B**2
    torch.testing.assert_close(forms["weight"].sq_norms(), norms, **EXACT)

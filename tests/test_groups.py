import pytest
from torch import nn

from gnsmon.collectors.groups import group_of
from gnsmon.demo.models import CharGPT


def test_kinds_of_the_text_model():
    groups = group_of(CharGPT(11, context=4, width=8, layers=1, heads=2), "kind")
    assert groups == {
        "wte.weight": "embedding",
        "wpe.weight": "embedding",
        "blocks.0.norm1.weight": "norm",
        "blocks.0.norm1.bias": "norm",
        "blocks.0.qkv.weight": "attention",
        "blocks.0.qkv.bias": "attention",
        "blocks.0.proj.weight": "attention",
        "blocks.0.proj.bias": "attention",
        "blocks.0.norm2.weight": "norm",
        "blocks.0.norm2.bias": "norm",
        "blocks.0.up.weight": "mlp",
        "blocks.0.up.bias": "mlp",
        "blocks.0.down.weight": "mlp",
        "blocks.0.down.bias": "mlp",
        "norm.weight": "norm",
        "norm.bias": "norm",
    }


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("transformer.h.0.attn.c_proj", "attention"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("model.layers.0.mlp.up_proj", "mlp"),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("lm_head", "head"),
        ("classifier", "head"),
        ("fc", "mlp"),
    ],
)
def test_kinds_by_path(path, kind):
    root = parent = nn.Module()
    *parents, last = path.split(".")
    for name in parents:
        parent.add_module(name, nn.Module())
        parent = getattr(parent, name)
    parent.add_module(last, nn.Linear(2, 2, bias=False))
    assert group_of(root, "kind") == {f"{path}.weight": kind}


def test_layers_functions_and_patterns():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model.register_parameter("scale", nn.Parameter(model[0].bias.detach()))
    layers = {"scale": "Sequential", "0.weight": "0", "0.bias": "0", "1.weight": "1"}
    assert group_of(model, "layer") == layers
    assert group_of(model, "total") == {}
    assert group_of(model, lambda n: n[0])["scale"] == "s"
    patterns = {"*.bias": "biases", "0.*": "first"}
    expected = {"scale": "other", "0.weight": "first", "0.bias": "biases", "1.weight": "other"}
    assert group_of(model, patterns) == expected

"""Small randomly initialised models of many families, each with a loss and a batch.

Their proportions are those of the published models where it matters: a table of positions, or a
scale for each channel, is a small share of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gnsmon
from gnsmon.norms import replay

B, T = 3, 7  # examples and positions; no other axis has B entries
WIDTH, HEADS, LAYERS, VOCABULARY = 32, 2, 2, 512

Family = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]


def families() -> dict[str, Callable[[], Family]]:
    """Family -> a function that builds its model, loss and batch, the same each time."""
    return {name: _seeded(name, make) for name, make in (HUGGING_FACE | PLAIN).items()}


def check(name: str) -> gnsmon.checking.Check:
    """The proof of one family, all of it computed in float64."""
    forward = replay._Forward.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        with InDouble():  # which is not in force in a backward
            return forward(*args, **kwargs)

    with InDouble(), mock.patch.object(replay._Forward, "forward", doubled):
        return gnsmon.check(*families()[name]())


class InDouble(TorchFunctionMode):
    """Makes float64 of the float32 that models ask for by name, in softmax and norms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs) if func is not Tensor.float else args[0].double()


def energy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over examples of a bumpy function of the first output."""
    y = model(**batch)
    y = y if isinstance(y, Tensor) else y[0]
    y = y.flatten(1)
    return (y + torch.arange(y.shape[1])).sin().sum(1).mean()


def _seeded(name: str, make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], Family]:
    def build() -> Family:
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            model, batch = make()
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p), alpha=0.05)  # none at a special value
            return model.train(), energy, batch

    return build


def _ids(*more: str) -> dict[str, Tensor]:
    return {name: torch.randint(3, VOCABULARY, (B, T)) for name in ("input_ids", *more)}


def _images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(B, 3, size, size)}


def _hf(
    model: str, batch: Callable[[], dict[str, Tensor]] = _ids, **config: Any
) -> Callable[[], tuple[nn.Module, Any]]:
    """Builds transformers' class `model`, with eager attention and without dropout."""

    def make() -> tuple[nn.Module, Any]:
        import transformers

        kind = getattr(transformers, model)
        settings = kind.config_class(**config)
        settings._attn_implementation = "eager"
        settings.use_cache = False
        built = kind(settings)
        for module in built.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return built, batch()

    return make


def _sizes(**more: Any) -> dict[str, Any]:
    """A decoder or encoder under the names that most configurations use."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "max_position_embeddings": T + 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def _grouped(**more: Any) -> dict[str, Any]:
    return _sizes(num_key_value_heads=1, **more)


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 4 * WIDTH,
    "decoder_ffn_dim": 4 * WIDTH,
    "decoder_start_token_id": 1,
    **SPECIAL,
    **NO_DROPOUT,
}

VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

HUGGING_FACE = {
    "GPT-2": _hf(
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=T + 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Llama": _hf("LlamaForCausalLM", **_grouped()),
    "Mistral": _hf("MistralForCausalLM", **_grouped(head_dim=WIDTH // HEADS)),
    "Qwen2": _hf("Qwen2ForCausalLM", **_grouped()),
    "Qwen3": _hf("Qwen3ForCausalLM", **_grouped(head_dim=WIDTH // HEADS)),
    "Gemma": _hf("GemmaForCausalLM", **_grouped(head_dim=WIDTH // HEADS)),
    "Gemma 2": _hf("Gemma2ForCausalLM", **_grouped(head_dim=WIDTH // HEADS)),
    "Phi": _hf("PhiForCausalLM", **_sizes(embd_pdrop=0.0, resid_pdrop=0.0)),
    "Phi-3": _hf("Phi3ForCausalLM", **_grouped(embd_pdrop=0.0, resid_pdrop=0.0)),
    "OPT": _hf(
        "OPTForCausalLM",
        **_sizes(ffn_dim=4 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0, layerdrop=0.0),
    ),
    "BLOOM": _hf(
        "BloomForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **SPECIAL,
    ),
    "GPT-NeoX": _hf("GPTNeoXForCausalLM", **_sizes(hidden_dropout=0.0, attention_dropout=0.0)),
    "Falcon": _hf("FalconForCausalLM", **_sizes(hidden_dropout=0.0, attention_dropout=0.0)),
    "BERT": _hf("BertForMaskedLM", **_sizes()),
    "RoBERTa": _hf("RobertaForMaskedLM", **_sizes(max_position_embeddings=T + 2)),
    "DistilBERT": _hf(
        "DistilBertForMaskedLM",
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=4 * WIDTH,
        max_position_embeddings=T + 1,
        pad_token_id=0,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "ALBERT": _hf("AlbertForMaskedLM", **_sizes(embedding_size=16)),
    "ELECTRA": _hf("ElectraForMaskedLM", **_sizes(embedding_size=WIDTH)),
    "DeBERTa": _hf(
        "DebertaV2ForMaskedLM",
        **_sizes(
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
    ),
    "T5": _hf(
        "T5ForConditionalGeneration",
        lambda: _ids("decoder_input_ids"),
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=4 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **SPECIAL,
    ),
    "BART": _hf(
        "BartForConditionalGeneration",
        lambda: _ids("decoder_input_ids"),
        max_position_embeddings=T + 1,
        **ENCODER_DECODER,
    ),
    "ViT": _hf("ViTForImageClassification", _images, **VISION, num_labels=5),
    "DeiT": _hf("DeiTForImageClassification", _images, **VISION, num_labels=5),
    "Swin": _hf(
        "SwinForImageClassification",
        _images,
        image_size=16,
        patch_size=2,
        embed_dim=WIDTH,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        drop_path_rate=0.0,
        num_labels=5,
    ),
    "ConvNeXt": _hf(
        "ConvNextForImageClassification",
        lambda: _images(32),
        hidden_sizes=[16, WIDTH],
        depths=[1, 2],
        num_stages=2,
        drop_path_rate=0.0,
        layer_scale_init_value=0.5,
        num_labels=5,
    ),
    "CLIP text": _hf(
        "CLIPTextModelWithProjection", **_sizes(projection_dim=WIDTH, attention_dropout=0.0)
    ),
    "Whisper": _hf(
        "WhisperForConditionalGeneration",
        lambda: {
            "input_features": torch.randn(B, 8, 12),
            "decoder_input_ids": _ids()["input_ids"],
        },
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=T + 1,
        **ENCODER_DECODER,
    ),
    "Wav2Vec2": _hf(
        "Wav2Vec2ForCTC",
        lambda: {"input_values": torch.randn(B, 200)},
        **_sizes(
            vocab_size=VOCABULARY,
            conv_dim=[WIDTH, WIDTH],
            conv_kernel=[10, 3],
            conv_stride=[5, 2],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            hidden_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            apply_spec_augment=False,
        ),
    ),
    "Mamba": _hf(
        "MambaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=LAYERS,
        **SPECIAL,
    ),
}


class _Block(nn.Module):
    """Two convolutions with GroupNorm around a shortcut, as in torchvision's BasicBlock."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(2, out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(2, out),
        )
        self.shortcut = nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu_()


class _ResNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
            _Block(8, 8, 1),
            _Block(8, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


class _UNet(nn.Module):
    """One level down and up again, with a skip connection."""

    def __init__(self):
        super().__init__()

        def twice(inside: int, out: int) -> nn.Module:
            layers = [nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU()]
            return nn.Sequential(*layers, nn.Conv2d(out, out, 3, padding=1), nn.SiLU())

        self.down, self.middle, self.up = twice(3, 8), twice(8, 16), twice(16, 8)
        self.raise_ = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        seen = self.down(pixel_values)
        raised = self.raise_(self.middle(nn.functional.max_pool2d(seen, 2)))
        return self.head(self.up(torch.cat([seen, raised], 1)))


class _Mixer(nn.Module):
    """Patches, then linear layers in turn over positions and over channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        sizes = [16, WIDTH, 16, WIDTH]
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for n in sizes
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values).flatten(2).mT
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            h = norm(x)
            x = x + (mlp(h) if i % 2 else mlp(h.mT).mT)
        return self.head(x.mean(1))


class _Attending(nn.Module):
    """PyTorch's own transformer encoder, over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(self.tokens(input_ids))


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 5)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(input_ids))[0])


PLAIN: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet with GroupNorm": lambda: (_ResNet(), _images(32)),
    "U-Net": lambda: (_UNet(), _images()),
    "MLP-Mixer": lambda: (_Mixer(), _images()),
    "nn.TransformerEncoder": lambda: (_Attending(), _ids()),
    "LSTM": lambda: (_Recurrent(), _ids()),
}

"""BERT: post-norm encoder with learned positions and token types (Devlin et al. 2018, arXiv 1810.04805), under a
masked-LM head, or under a pooler and a classifier.

Dropout of its own is on embeddings, probabilities and sublayer outputs; the backbone's rate, taken from
`hidden_dropout_prob`, is on hidden units of the feed-forward as well. Positions here do not count padding on the left.

`rules`, `body`, `body_config` and `KINDS` serve the encoders that grew from it.
"""

from __future__ import annotations

from typing import Any

from torchstone.interop.layout import Config, Copy, Layout, Model, Rule, Shapes
from torchstone.interop.layouts._shared import ACTIVATIONS, activation_name, class_names, classes

__all__ = ["KINDS", "LAYOUT", "body", "body_config", "rules"]


def rules(name: str) -> tuple[Rule, ...]:
    """The table of an encoder of this family, all but its positions; `name` is what its tensors begin with."""
    layer = f"{name}.encoder.layer.{{i}}"
    return (
        Rule("embedding.weight", f"{name}.embeddings.word_embeddings.weight"),
        Rule("embedding.types.weight", f"{name}.embeddings.token_type_embeddings.weight"),
        Rule("embedding.norm.{p}", f"{name}.embeddings.LayerNorm.{{p}}"),
        Rule(
            "encoder.layers.{i}.attention.qkv.{p}",
            tuple(f"{layer}.attention.self.{part}.{{p}}" for part in ("query", "key", "value")),
        ),
        Rule("encoder.layers.{i}.attention.out.{p}", f"{layer}.attention.output.dense.{{p}}"),
        Rule("encoder.layers.{i}.attention_residual.norm.{p}", f"{layer}.attention.output.LayerNorm.{{p}}"),
        Rule("encoder.layers.{i}.ffn.up.{p}", f"{layer}.intermediate.dense.{{p}}"),
        Rule("encoder.layers.{i}.ffn.down.{p}", f"{layer}.output.dense.{{p}}"),
        Rule("encoder.layers.{i}.ffn_residual.norm.{p}", f"{layer}.output.LayerNorm.{{p}}"),
    )


KINDS = {"position": ("learned",), "ffn": ("mlp",), "residual": ("post",), "norm": ("layernorm",)}


def body(config: Config, head: dict[str, Any]) -> dict[str, Any]:
    """The spec of an encoder of this family under a head.

    Raises:
        TorchstoneError: relative positions, or a decoder.
    """
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    norm = {"kind": "layernorm", "eps": config.get("layer_norm_eps", 1e-12)}
    std = config.get("initializer_range", 0.02)
    activation = config.choose("hidden_act", ACTIVATIONS, "gelu")
    return {
        "causal": False,
        "vocabulary": config.need("vocab_size"),
        "width": config.need("hidden_size"),
        "depth": config.need("num_hidden_layers"),
        "context": config.need("max_position_embeddings"),
        "embedding": {"kind": "token", "types": config.get("type_vocab_size", 2), "norm": norm},
        "attention": {
            "kind": "softmax",
            "heads": config.need("num_attention_heads"),
            "bias": "all",
            "dropout": config.get("attention_probs_dropout_prob", 0.1),
        },
        "position": {"kind": "learned", "std": std},
        "ffn": {"kind": "mlp", "hidden": config.need("intermediate_size"), "activation": activation, "bias": True},
        "residual": {"kind": "post", "std": std},
        "norm": norm,
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "head": head,
    }


def body_config(model: Model) -> dict[str, Any]:
    """The config of an encoder of this family, and of the classes where its head has them."""
    layer: Any = model.encoder[0]
    head: Any = model.spec.head
    embedding: Any = model.spec.embedding
    return {
        "vocab_size": model.spec.vocabulary,
        "hidden_size": model.spec.width,
        "num_hidden_layers": len(model.encoder),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": activation_name(layer.ffn.activation),
        "max_position_embeddings": model.context,
        "type_vocab_size": embedding.types,
        "layer_norm_eps": layer.norm.eps,
        "initializer_range": layer.residual.std,
        "hidden_dropout_prob": model.spec.dropout,
        "attention_probs_dropout_prob": layer.attention.dropout,
        "tie_word_embeddings": getattr(head, "tied", True),
        "pad_token_id": None,
        **(class_names(head.classes) if head.kind == "classification" else {}),
    }


def _spec(config: Config, head: str, shapes: Shapes | None) -> dict[str, Any]:
    heads: dict[str, dict[str, Any]] = {
        "mlm": {
            "tied": config.get("tie_word_embeddings", True),
            "activation": config.choose("hidden_act", ACTIVATIONS, "gelu"),
        },
        "classification": {"classes": classes(config), "pool": "first", "pooler": True},
    }
    return body(config, {"kind": head, **heads[head]})


LAYOUT = Layout(
    model_type="bert",
    sides=("encoder",),
    architectures={
        "BertForMaskedLM": "mlm",
        "BertForPreTraining": "mlm",
        "BertForSequenceClassification": "classification",
    },
    kinds=KINDS,
    spec=_spec,
    config=body_config,
    rules=(*rules("bert"), Rule("encoder.positions.learned.weight", "bert.embeddings.position_embeddings.weight")),
    heads={
        "mlm": (
            Rule("head.transform.{p}", "cls.predictions.transform.dense.{p}"),
            Rule("head.norm.{p}", "cls.predictions.transform.LayerNorm.{p}"),
            Rule("head.out.weight", "cls.predictions.decoder.weight"),
            Rule("head.bias", "cls.predictions.decoder.bias"),
        ),
        "classification": (
            Rule("head.pooler.{p}", "bert.pooler.dense.{p}"),
            Rule("head.out.{p}", "classifier.{p}"),
        ),
    },
    copies=(
        Copy("cls.predictions.decoder.weight", of="bert.embeddings.word_embeddings.weight"),
        # the same parameter under two names; where it is not tied, the decoder's is the one that is used
        Copy("cls.predictions.bias", of="cls.predictions.decoder.bias", equal=False, written=True),
    ),
    skipped=("bert.embeddings.position_ids", "bert.pooler.dense.*", "cls.seq_relationship.*"),
    prefix="bert.",
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)

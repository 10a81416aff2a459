"""How the stock classes of transformers spell our settings and weights: tables of names, nothing else."""

import re
from typing import Any, Literal

from bertling.presets import dropout_values

Head = Literal["masked_lm", "classification", "none"]

MODEL_TYPES = {"seed": "bertling-seed", "bert": "bert", "distilbert": "distilbert", "modern": "modernbert"}
CLASSES = {"seed": "BertlingSeed", "bert": "Bert", "distilbert": "DistilBert", "modern": "ModernBert"}
HEADS: dict[Head, str] = {
    "masked_lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "none": "Model",
}

# Our field -> the key in config.json, where they differ. A key of two fields means that the stock class has one value.
KEYS: dict[str, dict[str, str]] = {
    "seed": {},
    "bert": {"embedding_dropout_prob": "hidden_dropout_prob", "attention_output_dropout_prob": "hidden_dropout_prob"},
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "embedding_dropout_prob": "dropout",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    "modern": {
        "layer_norm_eps": "norm_eps",
        "pooling": "classifier_pooling",
        "embedding_dropout_prob": "embedding_dropout",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "attention_output_dropout_prob": "attention_dropout",
    },
}

# The fields that a configuration file holds (all others follow from the architecture), and those some have no key for.
SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size"),
    *("max_position_embeddings", "pad_token_id", "layer_norm_eps", "initializer_range", "pooling"),
    *dropout_values("bert", 0.0),
)
UNSET: dict[str, tuple[str, ...]] = {
    "seed": ("type_vocab_size", "pooling"),
    "bert": ("pooling",),
    "distilbert": ("type_vocab_size", "pooling", "layer_norm_eps", "attention_output_dropout_prob"),
    "modern": ("type_vocab_size",),
}

# What the stock classes could do otherwise and our anatomy does not: written, and required where a file says it.
FIXED: dict[str, dict[str, Any]] = {
    "seed": {},
    "bert": {
        "hidden_act": "gelu",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    },
    "distilbert": {"activation": "gelu", "sinusoidal_pos_embds": False, "tie_word_embeddings": True},
    "modern": {
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "tie_word_embeddings": True,
    },
}

# Our module -> the stock one.
MODULES: dict[str, dict[str, str]] = {
    "bert": {
        "embeddings.word_embeddings": "bert.embeddings.word_embeddings",
        "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
        "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "encoder.layers.{}.attention.qkv_proj": "bert.encoder.layer.{}.attention.self",
        "encoder.layers.{}.attention.out_proj": "bert.encoder.layer.{}.attention.output.dense",
        "encoder.layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layers.{}.mlp.up_proj": "bert.encoder.layer.{}.intermediate.dense",
        "encoder.layers.{}.mlp.down_proj": "bert.encoder.layer.{}.output.dense",
        "encoder.layers.{}.mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "mlm_head.transform.dense": "cls.predictions.transform.dense",
        "mlm_head.transform.norm": "cls.predictions.transform.LayerNorm",
        "mlm_head": "cls.predictions",
        "pooler.dense": "bert.pooler.dense",
        "classifier": "classifier",
    },
    "distilbert": {
        "embeddings.word_embeddings": "distilbert.embeddings.word_embeddings",
        "embeddings.position_embeddings": "distilbert.embeddings.position_embeddings",
        "embeddings.norm": "distilbert.embeddings.LayerNorm",
        "encoder.layers.{}.attention.qkv_proj": "distilbert.transformer.layer.{}.attention",
        "encoder.layers.{}.attention.out_proj": "distilbert.transformer.layer.{}.attention.out_lin",
        "encoder.layers.{}.attention_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
        "encoder.layers.{}.mlp.up_proj": "distilbert.transformer.layer.{}.ffn.lin1",
        "encoder.layers.{}.mlp.down_proj": "distilbert.transformer.layer.{}.ffn.lin2",
        "encoder.layers.{}.mlp_norm": "distilbert.transformer.layer.{}.output_layer_norm",
        "mlm_head.transform.dense": "vocab_transform",
        "mlm_head.transform.norm": "vocab_layer_norm",
        "mlm_head": "vocab_projector",
        "pooler.dense": "pre_classifier",
        "classifier": "classifier",
    },
    "modern": {
        "embeddings.word_embeddings": "model.embeddings.tok_embeddings",
        "embeddings.norm": "model.embeddings.norm",
        "encoder.layers.{}.attention.qkv_proj": "model.layers.{}.attn",
        "encoder.layers.{}.attention.out_proj": "model.layers.{}.attn.Wo",
        "encoder.layers.{}.attention_norm": "model.layers.{}.attn_norm",
        "encoder.layers.{}.mlp.up_proj": "model.layers.{}.mlp.Wi",
        "encoder.layers.{}.mlp.down_proj": "model.layers.{}.mlp.Wo",
        "encoder.layers.{}.mlp_norm": "model.layers.{}.mlp_norm",
        "encoder.final_norm": "model.final_norm",
        # The stock class has one transform under one name in front of either head.
        "mlm_head.transform.dense": "head.dense",
        "mlm_head.transform.norm": "head.norm",
        "mlm_head": "decoder",
        "pooler.dense": "head.dense",
        "pooler.norm": "head.norm",
        "classifier": "classifier",
    },
}
# Our fused query-key-value matrix is three of theirs, or one.
QKV = {"bert": ("query", "key", "value"), "distilbert": ("q_lin", "k_lin", "v_lin"), "modern": ("Wqkv",)}

# Prefix of the encoder's keys, and of those of any head that a checkpoint may carry.
ENCODER_PREFIX = {"seed": "", "bert": "bert.", "distilbert": "distilbert.", "modern": "model."}
HEAD_PREFIXES: dict[str, tuple[str, ...]] = {
    "seed": ("mlm_head.", "classifier."),
    "bert": ("cls.", "bert.pooler.", "classifier.", "qa_outputs."),
    "distilbert": ("vocab_", "pre_classifier.", "classifier.", "qa_outputs."),
    "modern": ("head.", "decoder.", "classifier.", "qa_outputs."),
}
# Second copies of tied weights, and buffers that old versions stored: nothing of their own in them.
COPIES = re.compile(
    r"cls\.predictions\.decoder\.(weight|bias)|vocab_projector\.weight|decoder\.weight|.*\.position_ids"
)

"""Our models as Hugging Face configurations and state dicts, and back: names, shapes and settings, no files.

`bert`, `distilbert` and `modern` are what transformers' stock classes load. `seed` has no stock class: its model type
is `bertling-seed`, under our own names.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bertling.files import BertlingError
from bertling.model import VOCABULARY_MATRICES, BertEncoder, BertForMaskedLM, BertForSequenceClassification, initialize
from bertling.presets import PRESETS, ModelConfig, dropout_values
from bertling.stock import (
    CLASSES,
    COPIES,
    ENCODER_PREFIX,
    FIXED,
    HEAD_PREFIXES,
    HEADS,
    KEYS,
    MODEL_TYPES,
    MODULES,
    QKV,
    SETTINGS,
    UNSET,
    Head,
)

BUILDERS: dict[Head, type[BertEncoder]] = {
    "masked_lm": BertForMaskedLM,
    "classification": BertForSequenceClassification,
    "none": BertEncoder,
}


class LoadReport(NamedTuple):
    """What a checkpoint did not decide."""

    fresh: tuple[str, ...]
    """Our modules that start from random weights, because the checkpoint has none for them."""
    unused: tuple[str, ...]
    """The checkpoint's keys that belong to another head."""


def to_hf(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json and the fp32 weights, on the CPU, in the vocabulary's true size.

    A compiled or DDP-wrapped model gives what the plain one does.
    """
    plain = unwrap(model)
    config, state = config_to_hf(plain.config, head_of(plain)), {}
    for name, parameter in plain.named_parameters():
        keys = hf_keys(plain.config.architecture, name)
        rows = parameter[: plain.config.vocab_size] if name in VOCABULARY_MATRICES else parameter
        for key, part in zip(keys, rows.chunk(len(keys)), strict=True):
            state[key] = part.detach().to("cpu", torch.float32, copy=True).contiguous()
    return config, state


def head_of(model: BertEncoder) -> Head:
    """Which head stands on this encoder."""
    return next(head for head, kind in BUILDERS.items() if isinstance(model, kind))


def unwrap(model: nn.Module) -> BertEncoder:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
        model = inner
    if not isinstance(model, BertEncoder):
        raise TypeError(f"{type(model).__name__} is none of our models")
    return model


def from_hf(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    dropout: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[BertEncoder, LoadReport]:
    """Build the model that config.json and a state dict describe; every key and shape is checked first.

    `head` asks for another head than the checkpoint's: the encoder's weights are taken, what is missing starts fresh
    from `generator`, and the report says so. New labels start a fresh classifier too, unless the old ones had no names.
    `dropout` replaces every share of dropout in the configuration.
    """
    ours = config_from_hf(config)
    stored = stored_head(config)
    wanted = head or stored
    if wanted is None:
        raise BertlingError(
            f"config.json: architectures = {config.get('architectures')!r:.60}: neither masked words nor classes; only "
            "pretrain and finetune can use it: they give its encoder a head of their own"
        )
    own_labels = num_labels is None and id2label is None
    if wanted == stored == "classification" and ours.num_labels == 1 and own_labels:
        raise BertlingError("config.json: one label: this model gives a number to each text, not a class; use another")
    tensors = canonical_keys(ours.architecture, state)
    keep_classifier = True
    if num_labels is not None or id2label is not None:
        labels = chosen_labels(ours, num_labels, id2label)
        keep_classifier = len(labels) == ours.num_labels and (labels == ours.labels or generic(ours.labels))
        ours = replace(ours, labels=labels)
    if dropout is not None:
        ours = replace(ours, **dropout_values(ours.architecture, dropout))
    if wanted == "classification" and wanted != stored:  # a fresh head reads what the preset's does
        ours = replace(ours, pooling=PRESETS[ours.architecture]["pooling"])

    with torch.device("meta"):  # no memory yet: what the configuration claims is compared with the tensors first
        model = BUILDERS[wanted](ours)
    skip = () if keep_classifier else ("classifier.",)
    weights, report = match(model, tensors, skip=skip, may_be_fresh=wanted != stored)
    # Memory at last; `to_empty` would do the same, but imports sympy for it.
    memory = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    model.load_state_dict(memory, strict=False, assign=True)
    if isinstance(model, BertForMaskedLM):
        model.tie_weights()
    with torch.no_grad():
        for module in report.fresh:
            initialize(model.get_submodule(module), ours, generator)
        for name, weight in weights.items():
            parameter = model.get_parameter(name)
            parameter[len(weight) :] = 0.0  # the rows that pad the vocabulary
            parameter[: len(weight)] = weight
    return model, report


def match(
    model: BertEncoder, tensors: dict[str, Tensor], *, skip: tuple[str, ...], may_be_fresh: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Find the checkpoint's tensor for each of our parameters; refuse what is missing, left over or of another shape.

    `skip`: parameters with these prefixes start fresh in any case. `may_be_fresh`: those of the head may do so.
    """
    config = model.config
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    fresh: dict[str, None] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, parameter in model.named_parameters():
        keys = hf_keys(config.architecture, name)
        optional = may_be_fresh and not name.startswith(("embeddings.", "encoder."))
        absent = [key for key in keys if key not in tensors]
        if name.startswith(skip) or (absent and optional):
            fresh[name.rpartition(".")[0]] = None
            continue
        used.update(keys)
        missing += absent
        if absent:
            continue
        shape = list(parameter.shape)
        if name in VOCABULARY_MATRICES:
            shape[0] = config.vocab_size
        shape[0] //= len(keys)
        for key in keys:
            if list(tensors[key].shape) != shape or not tensors[key].is_floating_point():
                wrong.append(f"{key} is {describe(tensors[key])}, not {shape}")
        if not wrong:
            weights[name] = torch.cat([tensors[key] for key in keys]) if len(keys) > 1 else tensors[keys[0]]
    left = [key for key in tensors if key not in used]
    unused = tuple(key for key in left if key.startswith(HEAD_PREFIXES[config.architecture]))
    unexpected = [key for key in left if key not in unused]
    faults = {"missing": missing, "of the wrong shape": wrong, "unexpected": unexpected}
    if any(faults.values()):
        parts = [f"{what}: {some(names)}" for what, names in faults.items() if names]
        raise BertlingError(
            f"model.safetensors does not fit config.json ({config.architecture}): {'; '.join(parts)}; "
            "use files that belong together"
        )
    return weights, LoadReport(tuple(fresh), unused)


def some(names: list[str]) -> str:
    """A few of many, for one line."""
    shown = ", ".join(f"{' '.join(name.split()):.120}" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def hf_keys(architecture: str, name: str) -> tuple[str, ...]:
    """The stock keys of one of our parameters."""
    if architecture == "seed":
        return (name,)
    module, _, kind = name.rpartition(".")
    number = re.search(r"\d+", module)
    stock = MODULES[architecture][re.sub(r"\d+", "{}", module)].format(number and number[0])
    parts = QKV[architecture] if module.endswith("qkv_proj") else ()
    return tuple(f"{stock}.{part}.{kind}" for part in parts) or (f"{stock}.{kind}",)


def canonical_keys(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that today's stock class with a head would save them under."""
    prefix = ENCODER_PREFIX[architecture]
    bare = not any(key.startswith(prefix) for key in state)  # saved from the stock class without a head
    tensors = {}
    for key, tensor in state.items():
        modern_key = re.sub(
            r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        )
        full_key = prefix + modern_key if bare else modern_key
        if architecture == "seed" or not COPIES.fullmatch(full_key):
            tensors[full_key] = tensor
    return tensors


def stored_head(config: Mapping[str, Any]) -> Head | None:
    """The head of the class that wrote a checkpoint."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        for head, ending in HEADS.items():
            if str(name).endswith(ending):
                return head
        if str(name).endswith("ForPreTraining"):
            return "masked_lm"
    return None


def chosen_labels(config: ModelConfig, num_labels: int | None, id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """Names of the classes asked for; the checkpoint's own where only their number is given and agrees."""
    if id2label is not None:
        return parse_labels(id2label)
    if num_labels == config.num_labels:
        return config.labels
    return tuple(f"LABEL_{i}" for i in range(num_labels or 0))


def generic(labels: tuple[str, ...]) -> bool:
    """Whether these names say nothing."""
    return labels == tuple(f"LABEL_{i}" for i in range(len(labels)))


def parse_labels(id2label: Any) -> tuple[str, ...]:
    """Names in the order of their ids, which must be 0, 1, 2 ..."""
    try:
        by_id = {int(key): value for key, value in id2label.items()}
        labels = tuple(by_id[i] for i in range(len(id2label)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BertlingError(f"id2label = {id2label!r:.60}: this must map 0, 1, 2 ... to names") from None
    return labels


def config_to_hf(config: ModelConfig, head: Head) -> dict[str, Any]:
    """The contents of config.json; an anatomy that the stock class cannot express is refused."""
    architecture = config.architecture
    keys, values = KEYS[architecture], asdict(config)
    result: dict[str, Any] = {
        "architectures": [CLASSES[architecture] + HEADS[head]],
        "model_type": MODEL_TYPES[architecture],
        **FIXED[architecture],
        **{keys.get(name, name): values[name] for name in SETTINGS if name not in UNSET[architecture]},
    }
    if architecture == "modern":
        # Each setting in the spelling of transformers 5 and of 4: either ignores the other's.
        bases = {"full_attention": config.rope_theta, "sliding_attention": config.local_rope_theta}
        result |= {
            "layer_types": layer_types(config.global_attn_every_n_layers, config.num_hidden_layers),
            "global_attn_every_n_layers": config.global_attn_every_n_layers,
            "local_attention": config.local_attention,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
            "global_rope_theta": config.rope_theta,
            "local_rope_theta": config.local_rope_theta,
        }
        # The stock defaults are ids of another vocabulary.
        result |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    if head == "classification" or not generic(config.labels) or config.num_labels != 2:
        result["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        result["label2id"] = {label: i for i, label in enumerate(config.labels)}
    back = asdict(config_from_hf(result))
    lost = [f"{name} = {values[name]!r}" for name in values if back[name] != values[name]]
    if lost:
        raise BertlingError(f"{some(lost)}: the {architecture} architecture has no such setting; use the preset's own")
    return result


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The anatomy that a config.json describes, if it is one of ours."""
    known = {model_type: architecture for architecture, model_type in MODEL_TYPES.items()}
    architecture = known.get(str(config.get("model_type")))
    if architecture is None:
        raise BertlingError(
            f"config.json: model_type = {config.get('model_type')!r:.60} is not supported; "
            f"use a checkpoint of one of {', '.join(known)}"
        )
    for key, value in FIXED[architecture].items():
        if config.get(key, value) != value:
            raise BertlingError(
                f"config.json: {key} = {config[key]!r:.60} is not supported; use a model with {key} = {value!r}"
            )
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise BertlingError(
            f"config.json: problem_type = {config['problem_type']!r:.60} is not supported; "
            "use a model that gives one label to each text"
        )
    values = {"pad_token_id": 0} | PRESETS[architecture]
    for name in SETTINGS:
        key = KEYS[architecture].get(name, name)
        if key in config and name not in UNSET[architecture]:
            values[name] = config[key]
        elif name not in values:
            raise BertlingError(f"config.json: no {key}; restore the file, or use another checkpoint")
    if architecture == "bert" and config.get("classifier_dropout") is None:
        values["classifier_dropout"] = values["hidden_dropout_prob"]
    if architecture == "modern":
        values["rope_theta"] = rotary_base(config, "full_attention", "global_rope_theta", 160_000.0)
        values["local_rope_theta"] = rotary_base(config, "sliding_attention", "local_rope_theta", 10_000.0)
        values["local_attention"] = config.get("local_attention", 128)
        values["pooling"] = config.get("classifier_pooling", "cls")
    try:
        if architecture == "modern":
            values["global_attn_every_n_layers"] = global_every(config, values["num_hidden_layers"])
        if config.get("id2label") is not None:
            values["labels"] = parse_labels(config["id2label"])
        return ModelConfig(**values)
    except BertlingError as error:
        raise BertlingError(f"config.json: {error}") from None


def rotary_base(config: Mapping[str, Any], kind: str, key: str, default: float) -> Any:
    """The base of a ModernBERT's rotary frequencies in layers of this kind, in the spelling of transformers 5 or 4."""
    parameters = config.get("rope_parameters") or {}
    own = parameters.get(kind) if isinstance(parameters, dict) else None
    own = own if isinstance(own, dict) else {}
    if config.get("rope_scaling") is not None or own.get("rope_type", "default") != "default":
        raise BertlingError(
            "config.json: scaled rotary positions are not supported; use a model with rope_type 'default'"
        )
    return own.get("rope_theta", config.get(key, default))


def layer_types(every: int, layers: int) -> list[str]:
    """The kinds of a ModernBERT's layers, of which every so many-th looks everywhere."""
    return ["sliding_attention" if i % every else "full_attention" for i in range(layers)]


def global_every(config: Mapping[str, Any], layers: Any) -> Any:
    """Every which layer of a ModernBERT looks everywhere, in the spelling of transformers 5 or 4."""
    types = config.get("layer_types")
    if types is None:
        return config.get("global_attn_every_n_layers", 3)
    told = config.get("global_attn_every_n_layers")
    candidates = [told] if type(told) is int and told > 0 else []
    if isinstance(types, list) and len(types) == layers:
        for every in [*candidates, *range(1, layers + 1)]:
            if types == layer_types(every, layers):
                return every
    raise BertlingError(
        "layer_types is no pattern in which the first and then every so many-th of the layers has 'full_attention', "
        "and the others 'sliding_attention'; use a model that is built so"
    )

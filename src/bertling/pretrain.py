"""Pre-training from the settings on: data, vocabulary, model, run folder; then the loop."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bertling import distributed
from bertling.attention import inverse_frequencies
from bertling.batches import STORED_MASKS, check_length, check_samples
from bertling.budget import total_steps
from bertling.checkpoint import Loaded, load_checkpoint
from bertling.cooccurrence import SCALE, word_vectors
from bertling.distributed import Ranks
from bertling.files import BertlingError
from bertling.model import BertEncoder, BertForMaskedLM, Block, count_parameters
from bertling.presets import ModelConfig, preset_config
from bertling.runs import Outcome, Start, check_steps, data_paths, open_shared_run
from bertling.runtime import Runtime, build_runtime
from bertling.samples import Samples, open_samples
from bertling.settings import Settings, key_of, settings_line
from bertling.tasks import MaskedLMTask, mlm_protocol
from bertling.tokenizer import Tokenizer
from bertling.train import Trainer

Say = Callable[[str], None]
NEIGHBOUR_SCORE = 16.0
"""By how much a head that looks at a neighbour prefers it at first, before the softmax."""


@dataclass(frozen=True)
class MaskedLMData:
    """Prepared data and its vocabulary."""

    train: list[Samples]
    val: Samples
    tokenizer: Tokenizer


def pretrain(start: Start, say: Say) -> Outcome:
    """Train a masked language model as `start` says; `say` gets what a user should read before it begins."""
    settings = start.settings
    ranks = distributed.join(settings)
    try:
        say, told = recorded(say if ranks.first else lambda text: None)
        runtime = build_runtime(settings, local_rank=ranks.local_rank, local_processes=ranks.local_processes)
        model, data = load_start(start, say)
        began = time.perf_counter()
        if model is None:
            model = fresh_model(settings, data, ranks)
        prepared = time.perf_counter() - began
        task = masked_lm_task(settings, data)
        check_steps(start, total_steps(settings, task.steps_per_epoch))
        settings = as_trained(start, model.config, task.train.seq_len)
        say(settings_line(settings, "pretrain"))
        introduce(model, task, data, settings, runtime, ranks, say)
        if data.train[0].labels and "mlm_probability" in start.explicit:
            say(f"note: {STORED_MASKS}")
        with open_shared_run(replace(start, settings=settings), ranks) as run:
            trainer = Trainer(task, model, data.tokenizer, settings, runtime, ranks, run, state=start.state, told=told)
            if start.state is None:
                trainer.seconds = prepared  # counting is training too: a budget of minutes has to pay for it
            say(f"run folder: {run}")
            protocol = mlm_protocol(data.val, data.tokenizer)
            return replace(trainer.train(), protocol=protocol, floors=task.floors)
    finally:
        distributed.leave()


def recorded(say: Say, earlier: Sequence[str] = ()) -> tuple[Say, list[str]]:
    """`say`, and what was and will be said: the log of a run begins with that."""
    told = list(earlier)

    def both(text: str) -> None:
        told.append(text)
        say(text)

    return both, told


def masked_lm_task(settings: Settings, data: MaskedLMData) -> MaskedLMTask:
    """What is trained, on what."""
    return MaskedLMTask(
        data.train,
        data.val,
        data.tokenizer,
        batch_size=settings.batch_size,
        seed=settings.seed,
        mlm_probability=settings.mlm_probability,
        whole_words=settings.whole_word_masking,
        data_folder=settings.base_dir / "datasets",
    )


def fresh_model(settings: Settings, data: MaskedLMData, ranks: Ranks) -> BertForMaskedLM:
    """A model at the beginning of its training."""
    model = BertForMaskedLM(fresh_config(settings, data), torch.Generator().manual_seed(settings.seed))
    if settings.word_vectors == "counts":
        give_word_vectors(model, data, settings.seed, ranks)
    return model


def give_word_vectors(model: BertForMaskedLM, data: MaskedLMData, seed: int, ranks: Ranks) -> None:
    """Put vectors from counts in the place of fresh word embeddings; those that counting cannot tell stay random."""
    config, tokenizer = model.config, data.tokenizer
    vectors = torch.zeros(config.vocab_size, config.hidden_size)
    if ranks.first:
        counts = np.sum([samples.counts(config.vocab_size) for samples in data.train], axis=0)
        vectors = word_vectors(data.train, counts, tokenizer.special_ids, config.hidden_size, seed)
    vectors = ranks.sum(vectors)
    known = vectors.norm(dim=1, keepdim=True) > 0
    with torch.no_grad():
        weight = model.embeddings.word_embeddings.weight
        weight *= SCALE / config.initializer_range
        weight[: config.vocab_size] = torch.where(known, vectors, weight[: config.vocab_size])
    if config.positions == "rotary":
        look_at_neighbours(model, torch.Generator().manual_seed(seed))
        look_for_the_like(model)


@torch.no_grad()
def look_at_neighbours(model: BertForMaskedLM, generator: torch.Generator) -> None:
    """Let block 1's heads begin by looking one place to the left, one to the right, two to the left, and so on.

    All word embeddings get a part in common, a random direction, half as large as their own part. To it alone queries
    and keys answer, with one and the same vector for each token, the keys' turned back by the angles that belong to the
    distance: rotated, they fit best just there. It is a beginning, like any other weights: training may undo it.
    """
    config, words = model.config, model.embeddings.word_embeddings.weight
    heads, head_dim = config.num_attention_heads, config.head_dim
    common = torch.randn(config.hidden_size, generator=generator)
    common = torch.nn.functional.normalize(common - common.mean(), dim=0)  # a LayerNorm takes away the mean
    words -= torch.outer(words @ common, common)
    size = words.norm(dim=1, keepdim=True)
    words += torch.where(size > 0, 0.5 * size[size > 0].mean(), 0.0) * common
    pairs, half = max(1, head_dim // 8), head_dim // 2  # the fastest of the pairs of columns that turn together
    # A word's own part is 1 long, the common one 0.5. The LayerNorm brings both together to sqrt(D), so the common part
    # to sqrt(D) * 0.5 / sqrt(1 + 0.25) = sqrt(D / 5).
    share = math.sqrt(NEIGHBOUR_SCORE * math.sqrt(head_dim) / pairs / (config.hidden_size / 5))
    frequencies = inverse_frequencies(head_dim, config.rope_theta, common.device)[:pairs]
    first = model.encoder.layers[0]
    assert isinstance(first, Block)
    queries, keys, _ = first.attention.qkv_proj.weight.view(3, heads, head_dim, -1)
    for head in range(heads):
        distance = (head // 2 + 1) * (1 if head % 2 else -1)  # -1, 1, -2, 2, ...
        angles = -distance * frequencies
        queries[head, :pairs] += share * common
        keys[head, :pairs] += share * torch.outer(angles.cos(), common)
        keys[head, half : half + pairs] += share * torch.outer(angles.sin(), common)


@torch.no_grad()
def look_for_the_like(model: BertForMaskedLM) -> None:
    """Let the heads of the later blocks that see the whole row begin by looking at places whose neighbours are alike.

    Their keys are made as their queries are, and both twice as large as usual.
    """
    for number, block in enumerate(model.encoder.layers):
        assert isinstance(block, Block)
        if number and not model.config.is_local(number):
            queries, keys, _ = block.attention.qkv_proj.weight.chunk(3)
            keys.copy_(queries.mul_(2))


def as_trained(start: Start, config: ModelConfig, seq_len: int) -> Settings:
    """The settings with the model's real shape and length in them, for the run's record."""
    return replace(
        start.settings,
        preset=config.architecture,
        size=start.settings.size if start.checkpoint is None or start.run is not None else None,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        local_attention=window_of(config),
        dropout=config.hidden_dropout_prob,
        seq_len=seq_len,
    )


def window_of(config: ModelConfig) -> int | None:
    """The setting local-attention of a model; None where all its blocks see the whole row."""
    return config.local_attention if config.global_attn_every_n_layers > 1 else None


def load_start(start: Start, say: Say) -> tuple[BertForMaskedLM | None, MaskedLMData]:
    """The model to start from (None: a fresh one) and the data; refuses what does not fit together."""
    model, tokenizer = starting_model(start, say)
    data = load_data(start, tokenizer, say)
    check_samples(data.train, data.tokenizer)
    check_samples([data.val], data.tokenizer)
    config = fresh_config(start.settings, data) if model is None else model.config
    check_length(data.train[0], config.max_position_embeddings)
    return model, data


def starting_model(start: Start, say: Say) -> tuple[BertForMaskedLM | None, Tokenizer | None]:
    """The model and vocabulary of the checkpoint to start from; its architecture wins over the settings."""
    check_frozen(start)
    if start.checkpoint is None:
        return None, None
    dropout = start.settings.dropout if "dropout" in start.explicit else None
    generator = torch.Generator().manual_seed(start.settings.seed)
    loaded = load_checkpoint(start.checkpoint, head="masked_lm", dropout=dropout, generator=generator)
    assert isinstance(loaded.model, BertForMaskedLM)
    check_architecture(loaded.model, start.settings, start.explicit)
    say_loaded(loaded, say)
    if start.run is None and start.settings.word_vectors == "counts":
        say("note: word-vectors = counts is for fresh weights; the checkpoint keeps its own")
    freeze(loaded.model, start.settings.freeze_blocks)
    return loaded.model, loaded.tokenizer


def check_frozen(start: Start) -> None:
    """Refuse to freeze what has not learned yet."""
    if start.settings.freeze_blocks and start.checkpoint is None:
        raise BertlingError("freeze-blocks: blocks of random weights must learn; leave it out, or start from a --cp")


def freeze(model: BertEncoder, blocks: int) -> None:
    """Keep the embeddings and the lowest `blocks` as they are: one copy of them can serve several models."""
    layers = model.encoder.layers
    if blocks >= len(layers):
        raise BertlingError(f"freeze-blocks {blocks}: must be below the model's number of blocks, {len(layers)}")
    for module in (model.embeddings, *layers[:blocks]) if blocks else ():
        module.requires_grad_(False)


def say_loaded(loaded: Loaded, say: Say) -> None:
    """What the weights came from, what starts fresh, and what of the checkpoint is of no use here."""
    say(f"weights: {loaded.folder}")
    if loaded.report.fresh:
        say(f"fresh, because the checkpoint has none for this task: {', '.join(loaded.report.fresh)}")
    if loaded.report.unused:
        say(f"of another head, and unused: {', '.join(loaded.report.unused)}")


def check_architecture(model: BertEncoder, settings: Settings, explicit: frozenset[str]) -> None:
    """An explicit size or preset other than the checkpoint's is an error."""
    config = model.config
    has = {
        "preset": config.architecture,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "local_attention": window_of(config),
    }
    for name, value in has.items():
        if name in explicit and getattr(settings, name) != value:
            raise BertlingError(
                f"{key_of(name)} = {getattr(settings, name)}: the checkpoint has {value or 'none'}, and a checkpoint's "
                f"architecture wins; leave {key_of(name)} out"
            )
    if "size" in explicit and settings.size is not None:
        named = sized_config(settings, config.architecture, config.vocab_size, config.max_position_embeddings)
        shapes = [
            f"{one.num_hidden_layers} x {one.hidden_size} with {one.num_attention_heads} heads"
            for one in (config, named)
        ]
        if shapes[0] != shapes[1]:
            raise BertlingError(
                f"size = {settings.size}: that is {shapes[1]}, the checkpoint has {shapes[0]}, and a checkpoint's "
                "architecture wins; leave size out"
            )


def load_data(start: Start, tokenizer: Tokenizer | None, say: Say) -> MaskedLMData:
    """Open the prepared data, and check that all of it fits together."""
    settings, explicit = start.settings, start.explicit
    train_paths, val_paths = data_paths(start)
    train, val = [open_samples(path) for path in train_paths], open_samples(val_paths[0])
    if len(val_paths) > 1:
        say(f"{len(val_paths)} data sets match val-dataset-pattern: {val.path.name} is evaluated on")
    if any(samples.path.samefile(val.path) for samples in train):
        say(f"warning: {val.path.name} is trained on too: its scores say nothing of other text; narrow dataset-pattern")
    if "seq_len" in explicit and settings.seq_len != train[0].seq_len:
        raise BertlingError(
            f"seq-len = {settings.seq_len}: {train[0].path} was prepared with rows of {train[0].seq_len}; prepare it "
            "again with -m, or set seq-len to that"
        )
    if val.seq_len != train[0].seq_len:
        raise BertlingError(
            f"{val.path}: has rows of {val.seq_len} ids, {train[0].path} of {train[0].seq_len}; prepare both with the "
            "same -m"
        )
    if tokenizer is None:
        return MaskedLMData(train, val, find_vocabulary(settings, train[0].path))
    check_vocabulary(settings, explicit, tokenizer)
    return MaskedLMData(train, val, tokenizer)


def check_vocabulary(settings: Settings, explicit: frozenset[str], tokenizer: Tokenizer) -> None:
    """An explicit vocabulary other than the checkpoint's is an error."""
    if "vocab" in explicit and find_vocabulary(settings).fingerprint != tokenizer.fingerprint:
        raise BertlingError(
            f"vocab = {settings.vocab}: the checkpoint has another vocabulary, and a checkpoint's vocabulary wins; "
            "leave vocab out"
        )


def find_vocabulary(settings: Settings, data: Path | None = None) -> Tokenizer:
    """The vocabulary that was named, or the one in the work folder, or the one that the data carry."""
    usual = settings.base_dir / "vocab"
    for folder in (settings.vocab, usual, data):
        if folder is not None and (folder == settings.vocab or (folder / "vocab.txt").exists()):
            return Tokenizer.load(folder)
    raise BertlingError(f"{usual / 'vocab.txt'}: missing; place the vocabulary there, or name it by --vocab")


def fresh_config(settings: Settings, data: MaskedLMData) -> ModelConfig:
    """The shape of a model that starts from fresh weights."""
    tokenizer = data.tokenizer
    return sized_config(settings, settings.preset, tokenizer.vocab_size, data.train[0].seq_len, tokenizer.pad_id)


def sized_config(
    settings: Settings,
    architecture: str,
    vocab_size: int,
    max_position_embeddings: int,
    pad_token_id: int = 0,
    labels: Sequence[str] | None = None,
) -> ModelConfig:
    """An architecture in the sizes that the settings name."""
    return preset_config(
        architecture,
        settings.size or "mini",
        vocab_size,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=pad_token_id,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.heads,
        local_attention=settings.local_attention,
        dropout=settings.dropout,
        labels=labels,
    )


def introduce(
    model: BertForMaskedLM,
    task: MaskedLMTask,
    data: MaskedLMData,
    settings: Settings,
    runtime: Runtime,
    ranks: Ranks,
    say: Say,
) -> None:
    """Say what is about to be trained, on what, and the floors that it has to leave."""
    config, count = model.config, count_parameters(model)
    rows = sum(samples.rows for samples in data.train)
    steps = total_steps(settings, task.steps_per_epoch)
    for note in runtime.notes:
        say(f"note: {note}")
    say(
        f"model: {config.architecture}, {config.num_hidden_layers} x {config.hidden_size}, "
        f"{config.num_attention_heads} heads"
        + (f", windows of {config.local_attention} tokens" if window_of(config) else "")
        + f", {count.total:,} parameters ({count.without_embeddings:,} without "
        "embeddings)"
    )
    names = ", ".join(samples.path.name for samples in data.train)
    say(
        f"data: {names}: {rows:,} rows of {task.train.seq_len} to train on; {data.val.path.name}: {data.val.rows:,} to "
        f"evaluate on; vocabulary of {data.tokenizer.vocab_size:,}"
        + ("; masks as stored in the files" if data.train[0].labels else "")
    )
    length = f"{steps:,} steps" if steps else f"{settings.max_minutes:g} minutes"
    say(
        f"training: {length}, {settings.batch_size} rows a step"
        + (f" ({steps / task.steps_per_epoch:.1f} epochs)" if steps else "")
        + f", {settings.optimizer}; {runtime.describe()}"
        + (f"; {ranks.world_size} processes" if ranks.world_size > 1 else "")
    )
    if settings.epochs and settings.epochs < len(data.train):
        say(f"note: each epoch is over one of the {len(data.train)} data sets: epochs = {settings.epochs:g} is not all")
    if steps and settings.max_minutes and (settings.warmup_iters is not None or settings.lr_decay_iters is not None):
        say(
            "note: should max-minutes end the run first, warmup-iters and lr-decay-iters count as shares of the "
            f"{steps:,} steps"
        )
    if steps and settings.val_interval:
        # The whole set is scored each time: a tenth of the corpus at short intervals outweighs the training.
        share = data.val.rows / (settings.val_interval * settings.batch_size)
        if share > 0.5:
            say(
                f"note: each evaluation reads {share:.1f} times the rows that are trained on between two of them; a "
                "larger val-interval or a smaller validation split (prepare --split) saves that time"
            )
    say(
        f"floors on the validation set: accuracy {task.floors['floor/unigram']:.1%}, loss "
        f"{task.floors['floor_loss/unigram']:.3f} (always the commonest token; unigram model)"
    )

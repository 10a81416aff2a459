"""A newcomer's first contact: every stage from raw text to a model that answers, offline, in a few minutes.

Each stage calls what its command calls, and shows that command. Torch is imported by the stage that needs it first, so
that the first words appear at once.
"""

import json
import shlex
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertling.console import near, program
from bertling.files import BertlingError, atomic_write, readable_errors, write_json
from bertling.progress import ByteProgress, clock
from bertling.settings import field_of, parse_value
from bertling.tools.quickstart_text import collect_english

if TYPE_CHECKING:
    from bertling.finetune import FinetuneResult
    from bertling.inference import Classified, Filled
    from bertling.runs import Outcome, Start

Say = Callable[[str], None]

STAGES = 6
MARKER = "quickstart.json"
"""Tells that a folder is ours; in the end it holds the result."""
TEXT, TRAIN_TABLE, DEV_TABLE = "prose.jsonl", "sentiment_train.tsv", "sentiment_dev.tsv"
LABEL, ROW, SEED = "prose", 64, 123
PRETRAINED, SENTIMENT, SCRATCH, BOXED = "pretrain", "sentiment", "sentiment-from-scratch", "sentiment-from-box"
VOCABULARY = 2000
"""Entries. A small vocabulary keeps every entry frequent, which little text and little time need."""
SHAPE = {"preset": "modern", "n-layers": "2", "d-model": "128", "heads": "4", "local-attention": "16"}
PRETRAINING = {
    "batch-size": "64",
    "optimizer": "muon",
    "learning-rate": "2e-3",
    "schedule": "trapezoid",
    "cooldown": "0.6",
    # Twice the usual share: a short training learns more from a row (Wettig et al. 2023). Scored at 15 %, as ever.
    "mlm-probability": "0.3",
}
FINETUNING = {"seq-len": "64", "epochs": "8", "learning-rate": "2e-3"}
MASKED = (
    "returns a list of [MASK] .",
    "if the file does not [MASK] , an error is raised .",
    "the default [MASK] of this parameter is none .",
)
REVIEWS = (
    "A wonderful film, I loved every minute of it.",
    "The food was cold and the waiter was rude.",
    "My new phone works perfectly.",
)


@dataclass(frozen=True)
class QuickstartResult:
    """What was learned, and where it is."""

    folder: str
    seconds: float
    pretraining: dict[str, Any]
    before: "list[Filled]"
    """What the untrained model put behind the masks."""
    after: "list[Filled]"
    sentiment: dict[str, Any]
    classified: "list[Classified]"
    written: dict[str, str]
    """Paths, and what each of them is."""
    commands: dict[str, str]
    """What to try next, and what it does."""

    def to_dict(self) -> dict[str, Any]:
        """For --json and quickstart.json."""
        return dict(vars(self))

    def text(self) -> str:
        """For people."""
        scores, mood = self.pretraining, self.sentiment
        lines = [
            f"A small BERT, from raw text to answers, in {clock(self.seconds)} minutes.",
            "",
            f"masked words  {scores['accuracy']:.1%} right in documents that it never saw; the floor, always the "
            f"commonest token: {scores['floor']:.1%}",
            f"sentiment     {mood['accuracy']:.1%} right of {mood['sentences']} sentences; from scratch "
            f"{mood['from_scratch']:.1%}, from the model in the package {mood['from_box']:.1%}; floors: commonest "
            f"class {mood['majority']:.1%}, bag of words {mood['bag_of_words']:.1%}",
        ]
        for title, pairs in (("written", self.written), ("try next", self.commands)):
            lines += ["", f"{title}:"]
            for what, why in pairs.items():
                lines += [f"  {what}", f"      {why}"]
        return "\n".join(lines)


def run_quickstart(
    folder: Path, *, minutes: float, force: bool, say: Say, megabytes: float = 5.0, steps: int | None = None
) -> QuickstartResult:
    """The whole path in `folder`: text, vocabulary, data, pre-training, fine-tuning, answers.

    `minutes` is the length of the pre-training, which `steps` may end earlier. An earlier quickstart in the folder is
    replaced with `force`, nothing else there. Raises BertlingError where the folder is in use or this machine has too
    little English text, and when the training was asked to stop.
    """
    began = time.monotonic()
    claim(folder, force)
    tour = Tour(folder, say)
    tour.collect(megabytes)
    tour.make_vocabulary()
    tour.prepare()
    before, outcome, after = tour.pretrain(minutes, steps)
    tuned, scratch, boxed = tour.finetune()
    classified, written = tour.ask()
    result = QuickstartResult(
        folder=str(folder),
        seconds=round(time.monotonic() - began, 1),
        pretraining={
            "accuracy": outcome.metrics["eval/accuracy"],
            "loss": outcome.metrics["eval/loss"],
            **tour.floors,
            "steps": outcome.step,
            "seconds": round(outcome.seconds, 1),
            "vocabulary": tour.entries,
            "scored": int(outcome.metrics["eval/scored"]),
        },
        before=before,
        after=after,
        sentiment={
            "accuracy": tuned.summary.mean,
            "from_scratch": scratch.summary.mean,
            "from_box": boxed.summary.mean,
            **{name.removeprefix("floor/"): value for name, value in tuned.floors.items()},
            "sentences": tour.dev_sentences,
        },
        classified=classified,
        written=written,
        commands=tour.commands(minutes, steps),
    )
    write_json(folder / MARKER, {"finished": True, **result.to_dict()})
    return result


def claim(folder: Path, force: bool) -> None:
    """Take the folder: a new or an empty one, or that of an earlier quickstart, whose runs are taken away."""
    if folder.exists() and not folder.is_dir():
        raise BertlingError(f"{folder}: is a file; name another --folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise BertlingError(f"{folder}: holds files, and not those of a quickstart; name another --folder")
        if not force:
            raise BertlingError(f"{folder}: exists already; give --force to replace it, or name another --folder")
        from bertling.runs import check_idle

        runs = [run for name in (PRETRAINED, SENTIMENT, SCRATCH, BOXED) if (run := folder / "runs" / name).exists()]
        for run in runs:
            check_idle(run)
        with readable_errors(folder / "runs"):
            for run in runs:
                shutil.rmtree(run)
    write_json(folder / MARKER, {"finished": False})


class Tour:
    """The stages, in their order, in one folder."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say, self.stage = folder, say, 0
        self.program = program()
        self.datasets = folder / "datasets"
        self.train, self.val = (f"{split}_{LABEL}_{ROW}_{SEED}" for split in ("train", "val"))

    def heading(self, title: str, why: str) -> None:
        """Say which stage begins, and what it is for."""
        self.stage += 1
        self.say(f"\n{self.stage}/{STAGES} {title}")
        self.tell(why)

    def tell(self, text: str) -> None:
        """Say one paragraph."""
        self.say(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))

    def show(self, *words: object) -> None:
        """Say the command that does what comes now."""
        lines, line = [], f"  $ {self.program}"
        for word in words:
            quoted = shlex.quote(str(word))
            if len(line) + len(quoted) > 96:
                lines.append(line)
                line = "     "
            line += f" {quoted}"
        self.say(" \\\n".join([*lines, line]))

    def start(self, command: str, values: Mapping[str, str], cp: Path | None = None, *words: str) -> "Start":
        """Show the command of a training, and resolve its settings."""
        from bertling.runs import resolve_start

        flags = [word for key, value in values.items() for word in (f"--{key}", value)]
        self.show(command, *(["--cp", cp] if cp else []), *words, *flags)
        items = {key: field_of(key, "quickstart") for key in values}
        given = {item.name: parse_value(item, values[key], "quickstart") for key, item in items.items()}
        return resolve_start(command, [], given, cp=cp, resume=False)

    def collect(self, megabytes: float) -> None:
        """Text, one document a line."""
        self.heading(
            "Text",
            f"A language model learns from text and nothing else. Collecting {megabytes:g} MB of English that is on "
            "every machine with Python: the documentation of Python and of its packages.",
        )
        with ByteProgress("  collecting") as progress:
            documents = collect_english(round(megabytes * 1e6), progress)
        path = self.folder / TEXT
        atomic_write(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
        for name in (TRAIN_TABLE, DEV_TABLE):
            atomic_write(self.folder / name, (files("bertling") / "assets" / name).read_bytes())
        self.tell(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters: {path}")

    def make_vocabulary(self) -> None:
        """Text to a WordPiece vocabulary."""
        from bertling.text import TextOptions
        from bertling.tokenizer import Tokenizer
        from bertling.tools.vocab import make_vocabulary

        self.heading(
            "Vocabulary",
            "A transformer reads numbers. WordPiece makes a list of frequent words and pieces of words with which any "
            "text can be spelled; ## marks a piece that goes on with a word. A token is one entry of that list.",
        )
        text, vocab = self.folder / TEXT, self.folder / "vocab"
        self.show("vocab", "-i", text, "-o", vocab, "--size", VOCABULARY)
        make_vocabulary([text], vocab, VOCABULARY, options=TextOptions(), force=True)
        tokenizer = Tokenizer.load(vocab)
        self.entries = tokenizer.vocab_size
        example = "Tokenizers split uncommon words."
        self.tell(f"{self.entries:,} entries. {example} -> {' '.join(tokenizer.tokens(tokenizer.encode(example)))}")

    def prepare(self) -> None:
        """Text to rows of ids, in two splits."""
        self.heading(
            "Data",
            f"The text becomes rows of {ROW} token numbers. One document in twenty is set aside for validation: the "
            "model never learns from it, so its score there tells what it understood, not what it remembers.",
        )
        text, vocab, shares = self.folder / TEXT, self.folder / "vocab", (0.95, 0.05, 0.0)
        words = ("prepare", "-i", text, "-l", LABEL, "-o", self.datasets, "-m", ROW, "-v", vocab)
        self.show(*words, "--split", ",".join(map(str, shares)))
        from bertling.prepare import prepare
        from bertling.samples import open_samples
        from bertling.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(vocab)
        with ByteProgress("  preparing") as progress:
            card = prepare(
                [text], LABEL, self.datasets, ROW, tokenizer, seed=SEED, split=shares, force=True, progress=progress
            )
        train, val = card.splits["train"], card.splits["val"]
        counts = open_samples(self.datasets / self.train).counts(self.entries)
        counts[list(tokenizer.special_ids)] = 0
        self.floors = {"floor": val.unigram_accuracy, "floor_loss": val.unigram_cross_entropy}
        self.tell(
            f"{train.samples:,} rows to train on, {val.samples:,} to validate on. The floor: whoever answers "
            f"'{tokenizer.token(int(counts.argmax()))}', the commonest token, for every hidden one is right in "
            f"{val.unigram_accuracy:.1%} of the cases, without any understanding."
        )

    def pretrain(self, minutes: float, steps: int | None) -> "tuple[list[Filled], Outcome, list[Filled]]":
        """Fresh weights to a masked language model; what it answers before and after."""
        from torch import Generator

        from bertling.inference import Bertling, load
        from bertling.model import BertForMaskedLM
        from bertling.plots import plot_run
        from bertling.pretrain import fresh_config, load_data, pretrain

        self.heading(
            "Pre-training",
            "The lesson of BERT: hide some tokens of a row and let the model guess them from those to the left and to "
            "the right. In each of its layers every token first looks at others, near ones or all (attention), and "
            "then thinks on its own (the MLP). Wrong guesses change its weights a little, thousands of times; nobody "
            "has to label anything.",
        )
        values = {"base-dir": str(self.folder), "run-id": PRETRAINED, "seq-len": str(ROW)}
        values |= {"dataset-pattern": self.train, "val-dataset-pattern": self.val}
        values |= SHAPE | PRETRAINING | {"max-minutes": f"{minutes:g}"}
        values |= {} if steps is None else {"max-iters": str(steps)}
        start = self.start("pretrain", values)
        data = load_data(start, None, lambda text: None)
        weights = Generator().manual_seed(start.settings.seed)
        fresh = BertForMaskedLM(fresh_config(start.settings, data), weights)
        before = Bertling(fresh, data.tokenizer).fill(MASKED, top_k=3)
        self.tell("Before, with random weights, it answers at [MASK]:")
        self.show_filled(before)
        self.tell(
            "Ten times on the way it is tested: v.acc is the share of hidden tokens that it finds. An example follows "
            "each time, first with its guesses, /right/ or /~wrong~/, then as the text was."
        )
        outcome = pretrain(start, self.tell)
        self.check(outcome)
        after = load(outcome.run).fill(MASKED, top_k=3)
        self.tell("After, it answers:")
        self.show_filled(after)
        plot_run(outcome.run)
        accuracy, floor = outcome.metrics["eval/accuracy"], self.floors["floor"]
        self.tell(
            f"Validation accuracy {accuracy:.1%}, {accuracy / floor:.1f} times the floor of {floor:.1%} (all rows set "
            f"aside, 15 % of their tokens hidden, vocabulary of {self.entries:,})."
            + ("" if accuracy >= 2 * floor else " That is little: give it longer with --minutes.")
        )
        return before, outcome, after

    def show_filled(self, answers: "Sequence[Filled]") -> None:
        """Say the likeliest tokens of each sentence."""
        width = max(len(one["text"]) for one in answers)
        for one in answers:
            ranked = ", ".join(f"{token} {share:.0%}" for token, share in one["masks"][0])
            self.say(f"    {one['text']:<{width}}  {ranked}")

    def check(self, outcome: "Outcome") -> None:
        """A training that was asked to stop ends the tour."""
        if not outcome.finished:
            raise BertlingError(f"{self.folder}: the quickstart was stopped; start it again with --force")

    def finetune(self) -> "tuple[FinetuneResult, FinetuneResult, FinetuneResult]":
        """The pre-trained encoder, a fresh one, and the package's own, to classifiers."""
        from bertling.finetune import finetune
        from bertling.inference import BOX
        from bertling.plots import plot_run

        train, dev = self.folder / TRAIN_TABLE, self.folder / DEV_TABLE
        self.dev_sentences = len(dev.read_text().splitlines()) - 1
        self.heading(
            "Fine-tuning",
            f"What it knows of language now serves a task: telling good news from bad in {self.dev_sentences} short "
            "sentences, after a look at a few hundred others. The layers are kept, the part that guessed tokens gives "
            "way to a small classifier on the mean over all tokens.",
        )
        values = {"base-dir": str(self.folder), "train-input": str(train), "val-input": str(dev)} | FINETUNING

        def train_from(cp: Path | None, run: str, say: Say) -> "FinetuneResult":
            words, shape = ((), {}) if cp else (("--from-scratch",), SHAPE)
            start = self.start("finetune", values | {"run-id": run} | shape, cp, *words)
            result = finetune(start, say, from_scratch=cp is None)
            self.check(result.seeds[-1].outcome)
            plot_run(result.seeds[-1].outcome.run)
            return result

        tuned = train_from(self.folder / "runs" / PRETRAINED, SENTIMENT, self.tell)
        self.tell("The same from scratch, without the pre-training, to see what that was worth:")
        scratch = train_from(None, SCRATCH, lambda text: None)
        self.tell(
            "Manuals say little about good and bad. So once more from the masked language model that comes with the "
            "package: two hours of Wikipedia, on two cores too, and in between a lesson in good and bad film reviews:"
        )
        boxed = train_from(Path(near(BOX)), BOXED, lambda text: None)
        self.tell(
            f"Accuracy {tuned.summary.mean:.1%}, from scratch {scratch.summary.mean:.1%}, from the model in the "
            f"package {boxed.summary.mean:.1%}; without any network: {tuned.floors['floor/majority']:.1%} by always "
            f"naming the commonest class, {tuned.floors['floor/bag_of_words']:.1%} by counting words (bag of words)."
        )
        return tuned, scratch, boxed

    def ask(self) -> "tuple[list[Classified], dict[str, str]]":
        """New sentences to their classes; and what lies where."""
        from bertling.inference import load

        self.heading("Answers", "Sentences that it has never seen:")
        runs = self.folder / "runs"
        self.show("classify", "--cp", runs / SENTIMENT, *REVIEWS)
        answers = load(runs / SENTIMENT).classify(REVIEWS)
        for one in answers:
            self.say(f"    {one['label']} {one['score']:.0%}  {one['text']}")
        return answers, {
            str(self.folder / TEXT): "the text, one document a line; the two tables of sentences lie beside it",
            str(self.folder / "vocab"): "the vocabulary",
            str(self.datasets / self.train): "the rows to train on; those to validate on lie beside it",
            str(runs / PRETRAINED): "the masked language model: checkpoints (Hugging Face folders), logs, settings",
            str(runs / SENTIMENT): f"the classifier; beside it {SCRATCH} and {BOXED}",
            str(runs / PRETRAINED / "accuracy.png"): "how it learned; loss.png too, and both in each run's folder",
            str(self.folder / MARKER): "all figures",
        }

    def commands(self, minutes: float, steps: int | None) -> dict[str, str]:
        """What to try next, after a pre-training that had these limits."""
        longer = ["--max-minutes", f"{minutes + 12.5:g}", *([] if steps is None else ["--max-iters", 10**6])]
        runs = self.folder / "runs"
        lines: list[tuple[Sequence[object], str]] = [
            (("fill", "--cp", runs / PRETRAINED, "returns true if the [MASK] is empty ."), "let it guess"),
            (("classify", "--cp", runs / SENTIMENT, "I would buy it again."), "ask the classifier"),
            (("inspect", self.datasets / self.train), "see what it read, and how tokens are hidden"),
            (("summary", "--cp", runs / PRETRAINED), "see its anatomy"),
            (("pretrain", "--cp", runs / PRETRAINED, *longer), f"train it on, up to {longer[1]} minutes in all"),
            (("pretrain", "--help"), "every setting; the commands above ($) work with your own text"),
        ]
        return {" ".join([self.program, *(shlex.quote(str(w)) for w in words)]): why for words, why in lines}

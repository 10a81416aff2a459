"""Data sets and models from the Hugging Face hub: size and licence first, then a download that can be resumed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertling.files import BertlingError, is_disk_full, read_json, readable_errors, refuse_file
from bertling.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """A data set that the documentation uses."""

    repo: str
    patterns: tuple[str, ...]
    """Files that are wanted out of the repository."""
    next_step: str
    """What to do with them; {folder} is where they lie."""


KNOWN = {
    "wikitext-103": Known(
        "Salesforce/wikitext",
        ("wikitext-103-raw-v1/*.parquet",),
        "bertling vocab -i {folder}/wikitext-103-raw-v1/train-00000-of-00002.parquet "
        "-i {folder}/wikitext-103-raw-v1/train-00001-of-00002.parquet -o wiki/vocab --size 8192; then bertling prepare "
        "with both and --val-input {folder}/wikitext-103-raw-v1/validation-00000-of-00001.parquet",
    ),
    "sst2": Known(
        "stanfordnlp/sst2",
        ("data/*.parquet",),
        "bertling finetune --cp RUN --train-input {folder}/data/train-00000-of-00001.parquet "
        "--val-input {folder}/data/validation-00000-of-00001.parquet",
    ),
}
NETWORK = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Whose errors mean that the connection failed: versions of the hub's library differ in what they build on."""
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model.bin",
    "vocab.txt",
    "tokenizer*.json",
    "*.txt",
    "*.md",
)


@dataclass(frozen=True)
class Download:
    """What was fetched."""

    repo: str
    revision: str
    licence: str
    folder: Path
    files: dict[str, int]
    """Sizes in bytes."""
    next_step: str

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "folder": str(self.folder)}

    def text(self) -> str:
        """Where it lies, and what to do next."""
        return f"{self.folder}: {len(self.files)} files, {megabytes(self.files)}\nnext: {self.next_step}"


def download(name: str, output: Path | None, say: Say) -> Download:
    """Fetch a known data set, or the model of a repository, into a folder; files that are there already stay.

    Says size and licence before it starts. What was broken off goes on where it stopped. The hub is the one that
    HF_ENDPOINT names, if it is set.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors

        hub = endpoint()
    except ImportError:
        raise BertlingError("download needs huggingface_hub: pip install 'bertling[hub]'") from None
    except ValueError as error:  # it takes HF_ENDPOINT apart while it loads
        raise BertlingError(f"HF_ENDPOINT: is no address ({error}); correct it, or unset it") from None
    known = KNOWN.get(name)
    if known is None and name.count("/") != 1:
        raise BertlingError(f"{name}: neither one of {', '.join(KNOWN)} nor a model's name as OWNER/NAME")
    repo, kind = (known.repo, "dataset") if known else (name, "model")
    patterns = known.patterns if known else MODEL_FILES
    folder = output or Path(name.rpartition("/")[2])
    refuse_file(folder, "the download")
    try:
        info = huggingface_hub.HfApi(hub).repo_info(repo, repo_type=kind, files_metadata=True)
        wanted = {
            entry.rfilename: int(entry.size or 0)
            for entry in huggingface_hub.utils.filter_repo_objects(
                info.siblings or [], allow_patterns=list(patterns), key=lambda entry: entry.rfilename
            )
        }
        if known is None:  # folders hold the same weights for other programs
            wanted = {path: size for path, size in wanted.items() if "/" not in path}
        if any(path.endswith(".safetensors") for path in wanted):
            wanted.pop("pytorch_model.bin", None)
        if not wanted:
            raise BertlingError(f"{repo}: holds none of {', '.join(patterns)}; name another repository")
        licence = licence_of(info)
        say(
            f"{repo} ({kind}, revision {str(info.sha)[:12]}): {len(wanted)} files, {megabytes(wanted)}; "
            f"licence: {licence}"
        )
        huggingface_hub.snapshot_download(
            repo,
            repo_type=kind,
            revision=info.sha,
            allow_patterns=sorted(wanted),
            local_dir=folder,
            endpoint=hub,
        )
    except errors.HFValidationError:
        raise BertlingError(f"{name}: no name that the hub allows; a model's is OWNER/NAME") from None
    except errors.GatedRepoError:
        raise BertlingError(
            f"{repo}: asks for your consent first: give it on its page, then set HF_TOKEN to a token of your account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BertlingError(f"{repo}: no such {kind} on {hub} (or it is private: set HF_TOKEN)") from None
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or is_disk_full(error)):  # no connection has a file's name
            with readable_errors(Path(error.filename or f"{folder}, or the hub's cache (HF_HOME)")):
                raise
        # Who answers in the place of a hub, as a captive portal does, makes its library stumble over anything.
        odd = not isinstance(error, BertlingError) and isinstance(error, ValueError | TypeError | LookupError)
        if not isinstance(error, OSError) and not odd and type(error).__module__.partition(".")[0] not in NETWORK:
            raise
        raise BertlingError(
            f"{repo}: {hub} could not be reached or broke off ({type(error).__name__}); run the same command "
            f"again to go on, or place these files by hand: {', '.join(patterns)} of {repo} in {folder}"
        ) from None
    step = (known.next_step if known else "bertling finetune --cp {folder}").format(folder=folder)
    if known is None:
        from bertling.interop import config_from_hf

        try:
            Tokenizer.load(folder)
            config_from_hf(read_json(folder / "config.json", "model configuration"))
        except BertlingError as error:
            step = f"it cannot be used here: {error}"
    return Download(repo, str(info.sha), licence, folder, wanted, step)


def licence_of(info: Any) -> str:
    """What the repository's card says."""
    card = info.card_data
    value = card.get("license") if card is not None else None
    if value is None:
        value = next((tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")), None)
    return ", ".join(value) if isinstance(value, list) else str(value or "none stated: look at the repository's page")


def endpoint() -> str:
    """The hub that is asked: the one that HF_ENDPOINT names, else the library's own."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", str(constants.ENDPOINT)).rstrip("/")


def megabytes(files: dict[str, int]) -> str:
    """The size of all of them."""
    return f"{sum(files.values()) / 1e6:,.1f} MB"

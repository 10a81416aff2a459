"""English prose that is on every machine with Python: documentation, docstrings and readme texts, read as files."""

import ast
import inspect
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from bertling.files import BertlingError

MINIMUM_BYTES = 500_000
# Import name and distribution name of what is installed with every bertling (required by it, or by something that it
# requires) and rich in prose. Extras are left out, so that equal installations give equal text with and without them.
PACKAGES = {
    "PIL": "pillow",
    "click": "click",
    "fontTools": "fonttools",
    "fsspec": "fsspec",
    "jinja2": "jinja2",
    "joblib": "joblib",
    "matplotlib": "matplotlib",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "rich": "rich",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "werkzeug": "werkzeug",
}
SKIPPED_FOLDERS = {"__pycache__", "_vendor", "idle_test", "pydoc_data", "site-packages", "test", "testing", "tests"}
MAX_FILE_BYTES = 2_000_000
DOCSTRING_SHARE = 0.25
MINIMUM_PARAGRAPH_LETTERS = 45

TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
CODE_LINE = (">>>", "...", "In [", "Out[", "$ ", "% ", "# ")
UNDERLINE = re.compile(r"([-=~^\"*#+.`_])\1{2,}")
TABLE = re.compile(r"\|.*\||\S {3,}\S.* {3,}\S|={4,}|-{4,}|\+-")
DIRECTIVE = re.compile(r"\.\. +(?:_|\[|\|)|\.\. +[\w:-]+ ?::|\.\.$")
PROSE_DIRECTIVE = re.compile(r"\.\. +(?:note|warning|important|tip|caution|admonition|attention) ?:: *")
SIGNATURE = re.compile(r"[*`\w][\w*.,`() -]{0,60} : ?[\w{\[(`'\"].*|[\w.]+\(.*\)(?: *->.*)?")
LABEL = re.compile(
    r":(?:param|return|returns|raise|raises|arg|keyword|ivar|cvar)\b[^:]*: *"  # Sphinx
    r"|@\w+(?: \w+)?: *"  # epydoc
    r"|[*`\w.]+(?: ?\([^)]*\))?: +(?=\S)"  # Google
    r"|(?:[-*+o\u2022]|\(?(?:\d{1,2}|[a-z])[.)]|#\.) +"  # a point of a list
)
INLINE_MARKUP = (
    (re.compile(r" ?\[\w+(?:, ?\w+)*\]_"), ""),
    (re.compile(r"!?\[([^\]]+)\]\([^)\s]*\)"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:)?`+[~!]?([^`<>]*[^`<>\s])\s*(?:<[^`>]*>)?`+(?:__?)?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}(\w(?:[^*]*[\w.:])?)\*{1,2}"), r"\1"),
)
SENTENCE_START = re.compile(r"[\"'(]?[A-Z]")
FORMULA = re.compile(r"[\\${}|*^<>=]|[^\x20-\x7e]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")
WORD = re.compile(r"[\"'(]*(?:[A-Za-z]+(?:['-][A-Za-z]+)*'?|\d{1,4}(?:\.\d+)?)[\"')]*[,.;:!?]*[\"')]*")
COMMON_WORDS = frozenset(
    "a an and any are as at be been but by can could do does each for from had has have how if in into is it"
    " its may more most must no not of on one only or other our should so some such than that the their them"
    " then there these they this those to use used using was we were what when where whether which while who"
    " will with without would you your".split()
)


def collect_english(limit_bytes: int, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Documents of English prose, one paragraph a line, of at most `limit_bytes` of UTF-8 in all, in a fixed order.

    Sources take turns, so that a small limit still holds something of each. No module is imported and no sentence
    comes twice. `progress` gets the bytes so far and the limit. Raises BertlingError where the installation has too
    little text (less than 500 kB).
    """
    sources = [_topics(), _readmes(), *(_modules(root) for root in _roots())]
    seen: set[str] = set()
    found: list[tuple[int, str, str]] = []
    size = 0
    for turn in zip_longest(*sources):
        for rank, item in enumerate(turn):
            document = "" if item is None or size >= limit_bytes else "\n".join(_paragraphs(item[1], seen))
            if item is not None and document and size + len(document) <= limit_bytes:
                size += len(document)
                found.append((rank, item[0], document))
        if progress is not None:
            progress(size, limit_bytes)
        if size >= limit_bytes * 0.99:
            break
    if size < min(MINIMUM_BYTES, limit_bytes // 2):
        raise BertlingError(
            f"{sysconfig.get_path('stdlib')}: this Python's documentation gives only {size:,} bytes of English text, "
            f"{MINIMUM_BYTES:,} are needed; install Python with the .py files of its standard library"
        )
    return [document for _, _, document in sorted(found)]


def _roots() -> list[Path]:
    """The folders of the standard library and of the packages, found without importing anything."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(next(iter(spec.submodule_search_locations))))
    return [root for root in roots if root.is_dir()]


def _spread(names: list[str]) -> list[str]:
    """A fixed order that is not alphabetical, so that stopping early leaves a fair sample."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


def _topics() -> Iterator[tuple[str, list[str]]]:
    """(name, texts) of each page of the language reference that `help()` shows."""
    tree = _parse(_read(Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"))
    topics: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    topics[str(key.value)] = str(value.value)
    for name in _spread(list(topics)):
        yield name, [topics[name]]


def _readmes() -> Iterator[tuple[str, list[str]]]:
    """(name, texts) of Python's licence and of the packages' readme texts."""
    yield "LICENSE.txt", [_read(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt")]
    for name in _spread(list(PACKAGES.values())):
        try:
            metadata = distribution(name).read_text("METADATA") or ""
        except (PackageNotFoundError, OSError, UnicodeDecodeError):
            continue
        yield name, [metadata.partition("\n\n")[2]]


def _modules(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(relative path, docstrings) of each .py file under `root` that is not nearly all code."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for name in _spread(names):
        source = _read(root / name)
        # Parsing takes most of the time, and a file without long docstrings is not worth it.
        if sum(map(len, TRIPLE_QUOTED.findall(source))) > DOCSTRING_SHARE * len(source):
            yield name, list(_docstrings(_parse(source)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a module, its classes, functions and methods; what is inside of a function is left out."""
    yield ast.get_docstring(node, clean=False) or ""
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


def _read(path: Path) -> str:
    """The file's text; empty where it is missing, unreadable, huge or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= MAX_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _parse(source: str) -> ast.Module:
    """The syntax tree; empty where the source is not valid for this Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _paragraphs(texts: list[str], seen: set[str]) -> Iterator[str]:
    """The prose of some docstrings, a paragraph a line, without the sentences in `seen`, to which the new ones go."""
    for text in texts:
        for lines in _blocks(inspect.cleandoc(text).splitlines()):
            if sum(map(len, lines)) < MINIMUM_PARAGRAPH_LETTERS:
                continue
            sentences = []
            for sentence in SENTENCE_END.split(_plain(lines)):
                key = sentence.lower().rstrip(".:")
                if _is_prose(sentence) and key not in seen:
                    seen.add(key)
                    sentences.append(sentence if sentence[-1] in ".!?:" else sentence.rstrip(",; ") + ".")
            paragraph = " ".join(sentences)
            if len(paragraph) >= MINIMUM_PARAGRAPH_LETTERS:
                yield paragraph


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Groups of lines that make a paragraph, without code, doctests, tables, headings and signatures."""
    block: list[str] = []
    block_indent = -1
    code_above = -1  # lines indented further than this are code, -1 outside of code
    fence = doctest = False
    for line in lines:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith(("```", "~~~")):
            fence = not fence
            bare = ""
        doctest = bool(bare) and (doctest or bare.startswith(CODE_LINE))
        if bare and indent <= code_above:
            code_above = -1
        if UNDERLINE.fullmatch(bare):
            block = block[:-1]  # its title
            bare = ""
        if not bare or fence or doctest or code_above >= 0 or TABLE.search(bare) or SIGNATURE.fullmatch(bare):
            yield block
            block = []
            continue
        note = PROSE_DIRECTIVE.match(bare)
        if DIRECTIVE.match(bare) and not note:
            yield block
            block, code_above = [], indent
            continue
        label = note or LABEL.match(bare)
        if block and (label or indent != block_indent >= 0):
            yield block
            block = []
        # The lines after a label may stand deeper than the label.
        block_indent = -1 if label else indent
        if bare.endswith("::"):
            code_above = indent
            bare = bare[:-1]
        block.append(bare[label.end() :] if label else bare)
    yield block


def _plain(lines: list[str]) -> str:
    """One line without inline markup; words that were cut at their hyphen are put together."""
    text = ""
    for line in lines:
        text += line if re.search(r"[a-z]-$", text) else " " + line
    text = " ".join(text.split())
    if re.search(r"[`*\[]", text):
        for pattern, replacement in INLINE_MARKUP:
            text = pattern.sub(replacement, text)
    return text.strip()


def _is_prose(sentence: str) -> bool:
    """At least five words, nearly all of them plain words, with the little words that only running English has."""
    words = sentence.split()
    if not 5 <= len(words) <= 100 or not SENTENCE_START.match(sentence) or FORMULA.search(sentence):
        return False
    if words[-1].lower() in COMMON_WORDS:  # cut off before a formula or an example
        return False
    plain = sum(WORD.fullmatch(word) is not None for word in words)
    common = sum(word.lower().strip(",.;:()\"'") in COMMON_WORDS for word in words)
    return plain >= 0.85 * len(words) and common >= 0.2 * len(words)

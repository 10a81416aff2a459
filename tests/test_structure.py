"""The shape of the package: data flows one way, files stay short, nothing is unpickled."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bertling

SOURCE = Path(bertling.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A file imports only from files on lines above its own.
LEVELS = """
    progress files
    console
    settings
    runtime budget
    tokenizer
    text duplicates
    corpus
    packed
    samples masking
    cooccurrence splits datacard
    prepare
    batches tables
    labelled attention
    presets
    model stock
    interop
    optim checkpoint int8
    distributed illustrate
    tasks
    sinks vectors
    runlog runs
    plots faults
    train inference
    pretrain
    finetune
    tools
    options
    cli_use
    cli
    __main__
""".strip().splitlines()
LEVEL = {name: number for number, line in enumerate(LEVELS) for name in line.split()}
MOST_LINES = 400


def module_of(path: Path) -> str:
    """The file's place in the order: its own name, or that of the folder that it lies in."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """What a file imports from the package, at whatever depth of its code (but for types alone)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "bertling":
            found |= {f"bertling.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
    return {name.split(".")[1] for name in found if name.startswith("bertling.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_files_left_of_it(path: Path) -> None:
    name = module_of(path)
    if name == "__init__":
        assert imports_of(path) == {"inference"}  # late, and only by those who ask for a model
        return
    upwards = {other for other in imports_of(path) if LEVEL[other] >= LEVEL[name]} - ({"tools"} & {name})
    assert upwards == set()


def test_every_file_has_its_place() -> None:
    assert {module_of(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize(
    "name", ["tokenizer", "text", "duplicates", "corpus", "packed", "samples", "settings", "files"]
)
def test_reading_text_needs_no_torch(name: str) -> None:
    assert "import torch" not in (SOURCE / f"{name}.py").read_text()


def test_files_stay_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_nothing_is_unpickled_or_evaluated() -> None:
    dangerous = re.compile(
        r"\bpickle\.(?!UnpicklingError)|\bfrom pickle|torch\.load\b(?!.*weights_only=True)"
        r"|import joblib|\bshelve\b|\bmarshal\b|\bdill\b"
        r"|(?<![\w.])(?:eval|exec)\(|allow_pickle=True|yaml\.load|shell=True"
    )
    hits = [
        f"{path.name}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if dangerous.search(line)
    ]
    assert hits == []
    assert dangerous.search("x = torch.load(path)")
    assert not dangerous.search("x = torch.load(path, weights_only=True)")
    assert dangerous.search("x = pickle.loads(raw)")
    assert dangerous.search("y = eval(text)")
    assert not dangerous.search("model.eval()")


def test_the_package_offers_what_it_says() -> None:
    assert sorted(bertling.__all__) == ["Bertling", "__version__", "load"]
    for name in bertling.__all__:
        assert getattr(bertling, name) is not None
    with pytest.raises(AttributeError, match="module 'bertling' has no attribute 'lod'"):
        bertling.lod  # noqa: B018


def test_every_module_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_preparing_text_loads_no_torch(tmp_path: Path) -> None:
    assets = Path(__file__).parent / "assets"
    code = (
        "import sys; from bertling.cli import cli; cli(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    words = ["prepare", "-i", str(assets / "tiny.txt"), "-l", "x", "-o", str(tmp_path), "-m", "16"]
    command = [sys.executable, "-c", code, *words, "-v", str(assets / "vocab")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "train_x_16_123" / "manifest.json").exists()

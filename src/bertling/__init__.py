"""Raise your own small BERT: `bertling.load(folder)` gives a trained model that fills masks or classifies texts."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertling.inference import Bertling, load

__version__ = version("bertling")
__all__ = ["Bertling", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, so the package does it only when it is used.
    if name in ("load", "Bertling"):
        from bertling import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'bertling' has no attribute {name!r}")

"""The executable edition of the report, ordered as a photograph travels.

data -> locate -> augment -> models -> losses -> train -> identify -> metrics.
"""

from whalelib.run import Run, Settings, start

__version__ = "0.1.0"
__all__ = ["NEW_WHALE", "Run", "Settings", "start"]


def __getattr__(name: str) -> str:
    # whalelib.data imports pandas: a light import of the package stays light.
    if name == "NEW_WHALE":
        from whalelib.data import NEW_WHALE  # noqa: PLC0415

        return NEW_WHALE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

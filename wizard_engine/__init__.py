"""The engine of WizardLM-2 post-training: nouns that recipes compose."""

from pathlib import Path

__version__ = "0.1.0"


def _check_kernels() -> None:
    """Raise ImportError unless the package `kernels` that Python finds is this project's own."""
    expected = Path(__file__).resolve().parents[1] / "kernels"
    advice = (
        f"kernels: expected this project's package {expected}, got {{}}; another package of that name exists on PyPI: "
        f"do `pip uninstall kernels` and install this project, or put {expected.parent} first on PYTHONPATH"
    )
    try:
        import kernels
    except ModuleNotFoundError as error:
        if error.name != "kernels":
            raise
        raise ImportError(advice.format("none")) from error
    if getattr(kernels, "PROJECT", None) != "wizard-engine":
        raise ImportError(advice.format(getattr(kernels, "__file__", None) or "a folder without __init__.py"))


_check_kernels()

"""Reading Hugging Face folders that a user names: quietly, and with errors that say what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calig.pipeline.checkpoint import first_line
from calig.pipeline.errors import InputError


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Load from a folder without transformers' own reports.

    Args:
        path: The folder.
        what: What it is expected to hold, with its article.

    Raises:
        InputError: transformers could not read it.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"'{path}' could not be loaded as {what}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def lacking(report: Mapping[str, Any]) -> str:
    """Which weights of a model its folder does not have, by `output_loading_info`; empty where it has all."""
    missing = sorted(report["missing_keys"])
    return f"it has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}" if missing else ""

"""Every error a user may see, each with its exit code. Anybody may raise these; this file imports nothing of ours.

ZoomrError
    UsageError          the command was used wrongly (exit 2)
        BudgetError         a size does not fit (exit 2)
    LibraryError        the engine's library is missing, stock, or of another version (exit 1)
    ModelError          a model file cannot be read (exit 1)
        UnsupportedModel    the file is sound, but the method cannot serve its architecture (exit 1)
    EngineError         decoding failed (exit 1)
    StorageError        a tier of paged-out blocks cannot be made, or is full where that was to be an error (exit 1)
        TierSizeError       what one text may need of a tier is more than there is; a shorter text may fit (exit 1)
    SessionError        a saved session is damaged or of another making, or cannot be written (exit 1)

A message says what happened, with which numbers, and what to type next.
"""

from __future__ import annotations


class ZoomrError(Exception):
    """Base of all errors with a message for the user."""

    exit_code = 1


class UsageError(ZoomrError):
    """Bad arguments or bad input; the message names the flag or the line."""

    exit_code = 2


class LibraryError(ZoomrError):
    """The patched llama.cpp is missing, stock or mismatched."""


class ModelError(ZoomrError):
    """A GGUF file is missing, truncated or not readable."""


class UnsupportedModel(ModelError):
    """The model's architecture or cache is one the paging was not shown exact for."""


class BudgetError(UsageError):
    """A KV budget that the model, the prompt or the policy cannot live in."""


class EngineError(ZoomrError):
    """llama.cpp refused a call that should have worked."""


class StorageError(ZoomrError):
    """RAM or disk for paged-out blocks that is not there: no room, no permission, or the limits that were set."""


class TierSizeError(StorageError):
    """A text that may need more of a tier than may be used or is free. Said before anything of it is decoded."""


class SessionError(ZoomrError):
    """A saved session that cannot be written, is damaged, or was made with something else."""

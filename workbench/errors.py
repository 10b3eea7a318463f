"""Errors a person can act on: one sentence that says what happened, why, and what to do."""

from __future__ import annotations


class WorkbenchError(Exception):
    """Base of every error this package raises on purpose. The message is one sentence for a person."""


class ModelError(WorkbenchError):
    """A model cannot be found, read or used."""


class PromptError(WorkbenchError):
    """A prompt is empty, too long, or holds ids outside the vocabulary."""


class RecipeError(WorkbenchError):
    """A recipe cannot be parsed, or its strategies cannot run together or on this model."""


class StorageError(WorkbenchError):
    """A file could not be written or read."""


class ArtifactError(WorkbenchError):
    """What was calibrated or trained for a model is missing, damaged, or of another model."""


class OutOfMemoryError(WorkbenchError):
    """The device has too little memory for this run."""

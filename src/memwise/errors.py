"""Everything memwise raises on purpose.

MemwiseError
├── InvalidKnob (ValueError)      an argument that cannot work
├── BudgetExceeded                the bytes asked for are not there
├── UnknownMethod (KeyError)      no method of that name
├── UnknownItem (KeyError)        no item of that id
├── MissingExtra (ImportError)    an optional dependency is not installed
├── UnsupportedModel              a model of a shape that the room does not know
├── LLMUnavailable                the language model behind a URL does not answer
├── EmbedderUnavailable           the embedding model behind a URL does not answer
└── StoreError
    ├── StoreLocked               another process holds the file
    ├── StoreCorrupt              the file contradicts itself
    └── EmbedderMismatch          the file was made with another embedder

A message says what is wrong, the value that was seen, and what to do about it.
"""


class MemwiseError(Exception):
    """Root of the tree: catch this to catch everything that memwise raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message, quotes included.
        return " ".join(str(part) for part in self.args)


class InvalidKnob(MemwiseError, ValueError):
    """An argument that cannot work; the message says which values do."""


class BudgetExceeded(MemwiseError):
    """A change would not fit; the message says what was asked, what is there and which knob."""


class UnknownMethod(MemwiseError, KeyError):
    """No method of that name; the message lists near names."""


class UnknownItem(MemwiseError, KeyError):
    """No item of that id; the message says so if it was forgotten and `undo` brings it back."""


class MissingExtra(MemwiseError, ImportError):
    """An optional dependency is absent; the message holds the command that installs it."""


class UnsupportedModel(MemwiseError):
    """The model is not of a kind this room can work on; the message lists those that are."""


class LLMUnavailable(MemwiseError):
    """The language model behind the URL gave no usable answer; the message says why."""


class EmbedderUnavailable(MemwiseError):
    """The embedding model behind the URL gave no usable vectors; the message says why."""


class StoreError(MemwiseError):
    """The memory file cannot do what was asked."""


class StoreLocked(StoreError):
    """Another process kept the file locked for longer than the busy timeout."""


class StoreCorrupt(StoreError):
    """The file contradicts itself; `memwise doctor` saves what can be saved."""


class EmbedderMismatch(StoreError):
    """The vectors in the file were made by another embedder than the one given."""

"""The options that say how text is read, shared by every stage that trains or measures on it; and those of `data`."""

from __future__ import annotations

from dataclasses import dataclass

from loram.option_fields import StageOptions, argument, option, require


@dataclass(frozen=True, kw_only=True)
class RowOptions(StageOptions):
    """How each row becomes tokens."""

    columns: str | None = option(None, "Map data columns, e.g. prompt=question,completion=answer.")
    system: str | None = option(None, "System turn for chats that have none.")
    max_length: int = option(
        512, "Tokens in a row; --long says what happens to longer ones.", flags=("--max-seq-length",)
    )
    long: str = option("cut", "What happens to rows longer than --max-length.", choices=("cut", "drop"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length >= 2, f"--max-length is {self.max_length}; it must be 2 or more")
        require(self.system is None or bool(self.system.strip()), "--system is empty; give a text, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(RowOptions):
    """How rows become tokens, and how they share forward passes."""

    packing: bool = option(False, "Put several rows into one of --max-length tokens, each isolated from the others.")


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """Show what is in a data file: its format, lengths, and which tokens the model would learn."""

    data: str = argument("Data: file, folder, or dataset on the Hub (ORG/NAME:CONFIG@SPLIT).")
    model: str = option("", "The model whose tokenizer and chat template are used: folder or Hub id.")
    rows: int = option(2, "Rows to show with their loss mask.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rows >= 0, f"--rows is {self.rows}; it must be 0 or more")

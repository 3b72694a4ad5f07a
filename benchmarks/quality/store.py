"""The results of finished cells, in one file."""

import json
import math
from pathlib import Path
from typing import Any

from tokenizer.storage.files import replace_file

Result = dict[str, Any]


def final_error(result: Result) -> float:
    """Validation RMSE at the last step; infinite where the training diverged."""
    if result.get("divergence"):
        return math.inf
    error: float = result["validation"]["RMSE"][1][-1]
    return error


class Store:
    """Results by name of the cell: what a file already holds, and what lies in the run folder.

    On a machine that is lent for minutes, the file is what one piece of work hands to the next.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder = folder
        self._path = path
        self.results: dict[str, Result] = {}
        if path.exists():
            self.results = {cell["cell"]: cell for cell in json.loads(path.read_text())}
        self.gather()

    def gather(self) -> None:
        """Takes in what has finished since, and writes the file."""
        for path in sorted(self._folder.glob("*/result.json")):
            result = self.results.setdefault(path.parent.name, json.loads(path.read_text()))
            extras, decoder = path.with_name("extras.json"), path.with_name("decoder.json")
            if "extras" not in result and extras.exists():
                found = json.loads(extras.read_text())
                result["test"] |= found.pop("test")
                result["extras"] = found
            if "decoder" not in result and decoder.exists():
                result["decoder"] = json.loads(decoder.read_text())
        if self.results:
            replace_file(self._path, lambda path: path.write_text(self.to_json()))

    def has_result(self, name: str) -> bool:
        """Whether the cell is trained and measured."""
        return name in self.results

    def has_extras(self, name: str) -> bool:
        """Whether distance and code length are measured, too, or the model for it is gone."""
        return "extras" in self.results[name] or self._is_gone(name)

    def has_decoder(self, name: str) -> bool:
        """Whether its decoder is fine-tuned and measured, or the model for it is gone."""
        return "decoder" in self.results[name] or self._is_gone(name)

    def _is_gone(self, name: str) -> bool:
        return (
            bool(self.results[name].get("divergence"))
            or not (self._folder / name / "result.json").exists()
        )

    def to_json(self) -> str:
        """A line per cell, by name."""
        lines = (json.dumps(self.results[name]) for name in sorted(self.results))
        return "[\n" + ",\n".join(lines) + "\n]\n"

"""What fine-tuning keeps on disk: checkpoints that are there whole or not at all, and a log that fits them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.ir.errors import MissingEnvironment, UsageError

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


@dataclass
class Position:
    """How far a training is: steps done, the epoch of the data, and calls of it that were taken."""

    step: int = 0
    epoch: int = 0
    taken: int = 0
    seconds: float = 0.0


class State:
    """A training's folder.

    Args:
        folder: Where it is; made if it is not there.
        identity: All that the result hangs on, by name. Another one's checkpoint is not gone on from.

    Raises:
        UsageError: The folder holds other things, or the checkpoint of other settings.
        MissingEnvironment: It cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._checkpoint, self._log = folder / CHECKPOINT, folder / LOG
        if folder.is_dir() and any(folder.iterdir()) and not self._checkpoint.is_file() and not self._log.is_file():
            raise UsageError(f"{folder} holds other files and no {CHECKPOINT}; give a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}; give another folder") from error
        self._check_identity()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._checkpoint.is_file()

    def restore(self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Position:
        """Put the checkpoint's numbers into the leaves and the optimizer; what was logged later goes."""
        with safe_open(self._checkpoint, framework="pt") as opened:
            for name, leaf in leaves.items():
                leaf.data.copy_(opened.get_tensor(f"weight.{name}"))
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                kind, _, rest = key.partition(".")
                if kind == "optimizer":
                    slot, _, name = rest.partition(".")
                    tensor = opened.get_tensor(key)
                    optimizer.state[leaves[name]][slot] = tensor if tensor.ndim == 0 else tensor.to(leaves[name].device)
            position = Position(**json.loads(opened.metadata()["position"]))
        self._keep_log(position.step)
        return position

    def save(self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Write the checkpoint in place of the one before; MissingEnvironment if the disk does not take it."""
        tensors = {f"weight.{name}": leaf for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            for slot, value in optimizer.state[leaf].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{slot}.{name}"] = value
        facts = {"identity": json.dumps(self._identity), "position": json.dumps(vars(position))}
        unfinished = self._checkpoint.with_suffix(".unfinished")
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, unfinished, facts)
            os.replace(unfinished, self._checkpoint)
        except (OSError, SafetensorError) as error:
            raise MissingEnvironment(f"{self._checkpoint}: cannot be written: {error}; free some space") from error

    def log(self, facts: Mapping[str, object]) -> None:
        """Append one line."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def logged(self) -> list[dict[str, object]]:
        """All lines, in order."""
        if not self._log.is_file():
            return []
        lines = self._log.read_text(encoding="utf-8").splitlines()
        return [found for line in lines if isinstance(found := _read(line), dict)]

    def _check_identity(self) -> None:
        if not self.begun:
            self._log.unlink(missing_ok=True)
            return
        try:
            with safe_open(self._checkpoint, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {})["identity"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UsageError(f"{self._checkpoint} is no checkpoint of fine-tuning; give a new folder") from error
        for name in sorted(facts.keys() | self._identity.keys()):
            before, now = facts.get(name), self._identity.get(name)
            if before != now:
                raise UsageError(
                    f"{self.folder}: its checkpoint was made with {name} {before}, now it is {now}; "
                    "give a new folder, or the same settings to go on"
                )

    def _keep_log(self, step: int) -> None:
        """Only the lines up to a step, the last of which a kill may have cut."""
        kept = [json.dumps(facts) + "\n" for facts in self.logged() if int(str(facts.get("step", 0))) <= step]
        unfinished = self._log.with_suffix(".unfinished")
        unfinished.write_text("".join(kept), encoding="utf-8")
        os.replace(unfinished, self._log)


def _read(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None

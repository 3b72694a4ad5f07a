"""Weights of another run, with which a stage begins."""

from typing import Any

from pipelines.config import RunConfig
from pipelines.model_folders import model_folder
from pipelines.run.checkpoints import newest_sources
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule, load_weights


def load_initial_weights(model: PretrainedModule[Any], config: RunConfig) -> bool:
    """Fills a fresh model from `config.initialize_from`; whether there is anything to fill it from.

    A run that has a checkpoint goes on with that, and the other one is not needed any more.

    Raises:
        InputError: there is no such model, it is of other shapes, or networks that its losses used
            are not named in the config.
    """
    if config.initialize_from is None:
        return False
    if newest_sources(config.output_dir) is None:
        folder = model_folder(config.initialize_from / config.output_dir.name)
        try:
            # As a whole, so that what an earlier version saved is understood.
            saved = type(model).from_pretrained(folder)
        except InputError as error:
            raise InputError(f"initialize_from: {error}") from error
        _check_loss_networks(saved, model)
        load_weights(model, dict(saved.state_dict()), f"initialize_from: {folder}")
    return True


def _check_loss_networks(saved: PretrainedModule[Any], model: PretrainedModule[Any]) -> None:
    """What trained the initial weights must not judge what becomes of them either."""
    used = getattr(saved.config, "loss_networks", ())
    missing = [name for name in used if name not in model.config.loss_networks]
    if missing:
        names = " ".join(f"'{name}'" for name in used)
        raise InputError(
            f"tokenizer.loss_networks must name what initialize_from was trained with: {names}"
        )

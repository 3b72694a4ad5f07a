"""Chooses how images of a run are drawn: `python -m pipelines.tune_sampling RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("tune-sampling")

from pipelines.command import announce, run_command
from pipelines.command_configs import EvaluationConfig
from pipelines.config import TokenizerRunConfig
from pipelines.data.conditions import trained_conditions
from pipelines.data.sources import trained_images
from pipelines.evaluation.features import load_extractor
from pipelines.evaluation.judges import check_extractor
from pipelines.evaluation.tuning import tune
from pipelines.generation import ImageGenerationPipeline
from pipelines.model_folders import model_folder
from pipelines.options import parse_options
from pipelines.processes import new_accelerator
from pipelines.run.folder import load_run
from pipelines.tuned_sampling import TunedSampling
from pipelines.tuning_config import TuneSamplingConfig
from tokenizer.storage.errors import InputError


def tune_sampling(config: TuneSamplingConfig) -> TunedSampling:
    """Finds the settings and saves them beside the prior's weights.

    Raises:
        InputError: the run has no prior, its training images or the extractor's weights are
            missing, or something of them is wrong.
    """
    if config.extractor.kind == "none":
        raise InputError("extractor.kind must be 'inception' or 'timm', got 'none'")
    run_dir = config.run_dir
    run = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    run = run.moved_data(config.data_root, config.data_validation_root)
    if not (run_dir / "prior").is_dir():
        raise InputError(f"run_dir must hold a trained prior: there is no {run_dir / 'prior'}")
    accelerator = new_accelerator()
    pipeline = ImageGenerationPipeline.from_pretrained(run_dir)
    extractor = load_extractor(config.extractor)
    check_extractor(extractor, pipeline.tokenizer)
    splits = trained_images(run, run_dir / "tokenizer", accelerator, None)
    pipeline.to(accelerator.device)
    extractor.to(accelerator.device)
    conditions = None
    if pipeline.prior.config.condition is not None:
        with accelerator.main_process_first():
            conditions = trained_conditions(
                run_dir / "prior", pipeline.prior.config, run.data, splits, accelerator.device
            )
    fields = config.model_dump(include={"num_images", "seed", "batch_size"})
    tuned = tune(pipeline, splits, extractor, EvaluationConfig(**fields), accelerator, conditions)
    if accelerator.is_main_process:
        tuned.save(model_folder(run_dir / "prior"))
    accelerator.wait_for_everyone()
    return tuned


def _run() -> None:
    tuned = tune_sampling(parse_options(TuneSamplingConfig, "pipelines.tune_sampling"))
    found, before = (tuned.protocol[name] for name in ("value", "value_before"))
    announce(
        f"temperature {tuned.temperature:g}, top-p {tuned.top_p or 1:g}, guidance "
        f"{tuned.guidance_scale:g}: {tuned.protocol['metric']} {found:.4g}, without {before:.4g}"
    )


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower batch-size, or num-images if that does not help")


if __name__ == "__main__":
    main()

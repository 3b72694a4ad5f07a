"""The whole job in a few minutes, with nothing to download: `python -m pipelines.demo`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("demo")

import logging
from pathlib import Path

from pipelines.command import run_command
from pipelines.command_configs import DemoConfig, EvaluationConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.sources import load_images
from pipelines.evaluate import table, write_results
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.measurements import evaluate_generation, evaluate_reconstruction
from pipelines.generation import ImageGenerationPipeline
from pipelines.options import parse_options
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.processes import new_accelerator
from pipelines.report.summary import write_summary
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

CLASSIFIER_STEPS = 250
NUM_IMAGES = 1_000


def demo(
    tokenizer_run: TokenizerRunConfig,
    prior_run: PriorRunConfig,
    num_images: int = NUM_IMAGES,
    classifier_steps: int = CLASSIFIER_STEPS,
) -> Path:
    """Both stages, evaluation and summary of one run; gives the path of the summary.

    Raises:
        InputError: the run's folder holds something else.
    """
    run_dir = tokenizer_run.run_dir
    logger.info("1/4 tokenizer")
    train_tokenizer(tokenizer_run)
    logger.info("2/4 prior")
    train_prior(prior_run)
    logger.info("3/4 evaluation")
    accelerator = new_accelerator()
    train = load_images(tokenizer_run.data, "train")
    validation = load_images(tokenizer_run.data, "validation")
    pipeline = ImageGenerationPipeline.from_pretrained(run_dir).to(accelerator.device)
    classifier = train_classifier(train, classifier_steps, accelerator)
    sampling = SamplingConfig(
        temperature=prior_run.sampling_temperature, guidance_scale=prior_run.guidance_scale
    )
    config = EvaluationConfig(num_images=num_images, sampling=sampling)
    results = {
        "reconstruction": evaluate_reconstruction(
            pipeline.tokenizer, train, validation, classifier, config, accelerator
        ),
        "generation": evaluate_generation(
            pipeline, train, validation, classifier, config, accelerator
        ),
    }
    logger.info("4/4 summary")
    summary = run_dir / "summary.html"
    if accelerator.is_main_process:
        write_results(run_dir / "evaluation", "python -m pipelines.demo", results)
        write_summary(run_dir, summary)
        print(table(results))
        print(f"open {summary}")
    return summary


def _run() -> None:
    run_dir = parse_options(DemoConfig, "pipelines.demo").run_dir
    name = "shapes32-sqvae2"
    demo(
        TOKENIZER_PRESETS[name].model_copy(update={"run_dir": run_dir}),
        PRIOR_PRESETS[name].model_copy(update={"run_dir": run_dir}),
    )


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()

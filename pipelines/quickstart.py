"""From a folder of images to a page of samples: `python -m pipelines.quickstart FOLDER`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("quickstart")

import logging
from pathlib import Path

from pipelines.command import announce, run_command
from pipelines.command_configs import EvaluationConfig, QuickstartConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.data.sources import load_images
from pipelines.evaluate import table, write_results
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.evaluation.metrics import MIN_IMAGES
from pipelines.evaluation.protocol import Results
from pipelines.evaluation.reconstruction import evaluate_reconstruction
from pipelines.evaluation.streaming import MIN_FITTED
from pipelines.generation import ImageGenerationPipeline
from pipelines.options import parse_options
from pipelines.planning import load_plan, make_plan, save_plan
from pipelines.processes import new_accelerator
from pipelines.report.summary import write_summary
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

CLASSIFIER_STEPS = 250
NUM_IMAGES = 1_000


def quickstart(config: QuickstartConfig) -> Path:
    """Plans a run over a folder, or goes on with one, and carries it out; gives the page's path.

    Raises:
        InputError: the folder cannot be used, or `run_dir` is a run over another one.
    """
    run_dir = config.run_dir or Path("runs") / config.folder.resolve().name
    accelerator = new_accelerator()
    with accelerator.main_process_first():
        plan = load_plan(run_dir, config)
        if plan is None:
            plan = make_plan(config, run_dir, accelerator)
            save_plan(plan, run_dir / "plan")
    share = min(config.minutes / 20, 1.0)  # of the time for measurements, too
    num_images = max(round(NUM_IMAGES * share), 20)
    classifier_steps = max(round(CLASSIFIER_STEPS * share), 20)
    command = f"python -m pipelines.quickstart {config.folder} --minutes {config.minutes:g}"
    return train_and_measure(*plan, command, num_images, classifier_steps)


def train_and_measure(
    tokenizer_run: TokenizerRunConfig,
    prior_run: PriorRunConfig,
    command: str,
    num_images: int = NUM_IMAGES,
    classifier_steps: int = CLASSIFIER_STEPS,
) -> Path:
    """Both stages, evaluation and summary of one run; gives the path of the summary.

    Several processes leave the summary to a command of one.

    The network of the distances is a classifier of the classes, trained here; without classes, or
    with too few images, only errors are measured.

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
    num_images = min(num_images, len(train))
    classifier = None
    if has_distances(train, validation, num_images):
        classifier = train_classifier(train, classifier_steps, accelerator)
    sampling = SamplingConfig(
        temperature=prior_run.sampling_temperature, guidance_scale=prior_run.guidance_scale
    )
    config = EvaluationConfig(num_images=num_images, sampling=sampling)
    results: dict[str, Results] = {
        "reconstruction": evaluate_reconstruction(
            pipeline.tokenizer, train, validation, classifier, config, accelerator
        )
    }
    if classifier is not None:
        results["generation"] = evaluate_generation(
            pipeline, train, validation, classifier, config, accelerator
        )
    logger.info("4/4 summary")
    summary = run_dir / "summary.html"
    if accelerator.is_main_process:
        write_results(run_dir / "evaluation", command, results)
        print(table(results))
    if accelerator.num_processes == 1:
        write_summary(run_dir, summary)
        announce(f"open {summary}")
    else:  # its measurements would be shared by processes that do not know of it
        announce(f"hqvae summary {run_dir} writes {summary}")
    return summary


def has_distances(train: ImageDataset, validation: ImageDataset, num_images: int) -> bool:
    """Whether distances can be measured; where images are too few for them, that is logged.

    Args:
        train: whose classes the network of the distances learns.
        validation: the images that are reconstructed.
        num_images: on each side of the distance of generated images.
    """
    if len(train.class_names) < 2:
        return False
    if num_images >= MIN_IMAGES and len(validation) >= MIN_FITTED:
        return True
    logger.warning(
        "distances are left out: they take %d training and %d validation images, got %d and %d",
        *(MIN_IMAGES, MIN_FITTED, num_images, len(validation)),
    )
    return False


def _run() -> None:
    quickstart(parse_options(QuickstartConfig, "pipelines.quickstart"))


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()

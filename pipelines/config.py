"""Run configurations: what a command needs to know, saved with the run."""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from pydantic import Field
from pydantic import model_validator as validates

from pipelines.condition_config import ConditionKind, ConditionSourceConfig
from pipelines.data_config import CodesConfig, Count, DataFolder, MovedDataConfig, Seed
from pipelines.data_config import DataConfig as DataConfig
from pipelines.data_config import FolderRules as FolderRules
from pipelines.recipe import TokenizerRecipe as TokenizerRecipe
from prior.config import MAX_GUIDANCE, PriorNetworkConfig, upgrade_network
from tokenizer.config import TokenizerConfig, without_recipe
from tokenizer.fields import Temperature
from tokenizer.storage.configs import StrictConfig

# Bounds that no sound run reaches.
PositiveNumber = Annotated[float, Field(gt=0, le=1e6)]
Number = Annotated[float, Field(ge=0, le=1e6)]
GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]


class TrainingConfig(StrictConfig):
    """The loop that trains either model."""

    total_steps: Count = 100_000
    """Optimizer steps."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 64
    """Images per optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    learning_rate: PositiveNumber = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up; cosine ends at zero."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 100
    """Steps over which the learning rate rises linearly."""
    weight_decay: Number = 0.0
    """AdamW's; never applied to codebooks, variances, embeddings, norms and biases."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """AdamW's decay of the squared gradients."""
    max_gradient_norm: PositiveNumber = 0.5
    """Gradients are scaled down to this norm."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the exponential moving average of the weights that is saved for use; 0 = none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; quantization stays in fp32."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Several processes: each holds all weights (ddp), a share of them (fsdp), or a share among the
    processes of its machine (hsdp)."""
    activation_checkpointing: bool = False
    """Compute the blocks of the networks once more in the backward instead of keeping what they
    computed: less memory, about a third more time, the same numbers."""
    compile: bool = False
    """Compile the networks (torch.compile), or block by block where these are shared out or
    computed once more: minutes at the start, and other rounding."""
    channels_last: bool = False
    """Tokenizer: keep feature maps as GPUs prefer them for convolutions in bf16."""
    extended_at: Annotated[tuple[Count, ...], tyro.conf.Suppress] = ()
    """Steps at which a finished run was extended: from each of them on the learning rate warms up
    and falls anew, while the temperature stays where it was."""
    seed: Seed = 0
    """Seed of the weights, the data order and the noise."""
    log_interval: Count = 50
    """Steps between lines of metrics.jsonl: terms of the main process's last micro-batch."""
    validation_interval: Count = 1_000
    """Steps between validations, each with a preview in samples/."""
    num_validation_images: Count = 2_000
    """Validation images used, at most."""
    checkpoint_interval: Count = 1_000
    """Steps between checkpoints."""

    @validates(mode="after")
    def _check_parallel(self) -> "TrainingConfig":
        if self.parallel != "ddp" and self.channels_last:
            raise ValueError(
                f"channels_last must be False unless parallel is ddp, got {self.parallel}"
            )
        return self

    @property
    def first_total_steps(self) -> int:
        """Steps of the run before it was extended."""
        return self.extended_at[0] if self.extended_at else self.total_steps

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant, or a cosine that ends at zero; `step` counts from 0."""
        begin = max((end for end in self.extended_at if end <= step), default=0)
        end = min((end for end in self.extended_at if end > step), default=self.total_steps)
        if step - begin < self.warmup_steps:
            return self.learning_rate * (step - begin + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - begin - self.warmup_steps) / max(end - begin - self.warmup_steps, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


WARNINGS = {"min_codebook_usage", "min_perplexity", "variance_band"}
"""Fields that only stage one used, and both had in format 1."""


class RunConfig(StrictConfig):
    """What the two stages share."""

    run_dir: Path
    """Folder of the run, with tokenizer/ and prior/."""
    training: TrainingConfig = TrainingConfig()
    initialize_from: DataFolder | None = None
    """Run whose weights this stage begins with, of the same shapes; its data may be others."""
    extend_to: Annotated[Count | None, Field(exclude=True)] = None
    """Train the finished run in `run_dir` further, to so many steps: with another warm-up and
    schedule of the learning rate, at the last temperature."""
    resume_from: Annotated[str | None, Field(pattern=r"^step_\d{8,}$", exclude=True)] = None
    """Older checkpoint in state/ to go on from if the newest is damaged: step_00001000, say."""

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields of today's config from those that format `version` saved.

        Version 1 kept the recipe's warnings with the loop. Fields are not validated yet: what is
        not as that version wrote it is left alone.
        """
        training = fields.get("training")
        if version > 1 or not isinstance(training, dict):
            return fields
        kept = {key: value for key, value in training.items() if key not in WARNINGS}
        return {**fields, "training": kept}

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of stage one."""
        return self.run_dir / "tokenizer"

    @property
    def output_dir(self) -> Path:
        """Folder of this stage."""
        raise NotImplementedError


class TokenizerRunConfig(RunConfig):
    """Stage one: trains a tokenizer on images, in RUN_DIR/tokenizer."""

    inputs: ClassVar[tuple[str, ...]] = ("data.root", "data.validation_root", "initialize_from")
    main_options: ClassVar[tuple[str, ...]] = (
        "run_dir",
        "data.root",
        "data.validation_root",
        "data.image_size",
        "data.horizontal_flip",
        "training.total_steps",
        "training.batch_size",
        "training.gradient_accumulation_steps",
        "training.learning_rate",
        "training.precision",
    )
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig
    recipe: TokenizerRecipe = TokenizerRecipe()
    backbone_weights: Literal["pretrained"] | Path | None = None
    """Initial weights of the backbone: a .safetensors file, or timm's own download."""

    @validates(mode="after")
    def _check(self) -> "TokenizerRunConfig":
        adversarial, training = self.recipe.adversarial, self.training
        if not adversarial.weight:
            return self
        if adversarial.counts_from >= training.total_steps:
            raise ValueError(
                "recipe.adversarial.start_step + lead_steps must be below training.total_steps "
                f"{training.total_steps}, got {adversarial.counts_from}"
            )
        if adversarial.weighting == "adaptive" and training.compile:
            raise ValueError(
                "recipe.adversarial.weighting must be 'fixed' with training.compile: compiled code "
                "gives no second gradient"
            )
        return self

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Version 1 kept the recipe with the quantizer, and its warnings with the loop.

        Folders had other rules when the field was none yet; each config that is saved has it.
        """
        data = fields.get("data")
        if isinstance(data, dict):  # earlier versions took the folder that they ran in
            folders = ("root", "validation_root", "cache_dir")
            here = {name: str(Path.cwd()) for name in folders if data.get(name) == "."}
            rules = {"folder_rules": 1} if data.get("dataset") == "folder" else {}
            fields = {**fields, "data": {**rules, **data, **here}}
        tokenizer, training = fields.get("tokenizer"), fields.get("training")
        if version > 1 or not isinstance(tokenizer, dict) or not isinstance(training, dict):
            return fields
        quantizer = tokenizer.get("quantizer")
        old = {**training, **(quantizer if isinstance(quantizer, dict) else {})}
        if "commitment_weight" in old:
            old["latent_weight"] = old["commitment_weight"]
        if old.get("latent_weight") == (0.25 if "commitment_weight" in old else 0.3):
            del old["latent_weight"]  # what None stands for, as in the presets of today
        recipe = {name: old[name] for name in TokenizerRecipe.model_fields if name in old}
        fields = super().upgrade_config(fields, version)
        return {**fields, "tokenizer": without_recipe(tokenizer), "recipe": recipe}

    @property
    def output_dir(self) -> Path:
        """Folder of this stage."""
        return self.tokenizer_dir

    def moved_data(self, root: Path | None, validation_root: Path | None) -> "TokenizerRunConfig":
        """The same run with its images in other folders, where these are given."""
        given = {"root": root, "validation_root": validation_root}
        update = {name: folder for name, folder in given.items() if folder is not None}
        return self.model_copy(update={"data": self.data.model_copy(update=update)})


class PriorRunConfig(RunConfig):
    """Stage two: trains a prior over the codes of RUN_DIR/tokenizer, in RUN_DIR/prior."""

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "initialize_from", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = (
        "run_dir",
        "is_class_conditional",
        "horizontal_flip",
        "prior.width",
        "prior.num_spatial_layers",
        "training.total_steps",
        "training.batch_size",
        "training.gradient_accumulation_steps",
        "training.learning_rate",
        "training.precision",
    )
    prior: PriorNetworkConfig = PriorNetworkConfig()
    is_class_conditional: bool = True
    """Condition on the classes of the data set, unless `condition.kind` is given."""
    condition: ConditionSourceConfig = ConditionSourceConfig()
    horizontal_flip: bool = False
    """Learn the codes of the mirrored training images, too."""
    targets: Literal["indices", "posterior"] = "indices"
    """Learn the hard indices, or the tokenizer's posterior given the same context."""
    codes: CodesConfig = CodesConfig()
    """Which hard indices."""
    sampling_temperature: Temperature = 1.0
    """Temperature of the previews."""
    guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance of the previews; 1 = off."""
    data_root: Annotated[DataFolder | None, Field(exclude=True)] = None
    """Where the tokenizer's `data.root` has been moved; the images must be the same."""
    data_validation_root: Annotated[DataFolder | None, Field(exclude=True)] = None
    """Where the tokenizer's `data.validation_root` has been moved."""

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Earlier versions called fields of the prior otherwise; see `upgrade_network`."""
        fields = super().upgrade_config(fields, version)
        if not isinstance(fields.get("prior"), dict):
            return fields
        return {**fields, "prior": upgrade_network(fields["prior"], version)}

    @property
    def condition_kind(self) -> ConditionKind:
        """What the prior is conditioned on."""
        return self.condition.kind or ("class" if self.is_class_conditional else "none")

    @property
    def output_dir(self) -> Path:
        """Folder of this stage."""
        return self.run_dir / "prior"

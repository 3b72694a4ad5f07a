"""Named configurations: the members of the family, and their deterministic baselines.

`Tokenizer(sq_vae_2(...))` builds one. A baseline takes the same arguments as its counterpart and
differs from it in the quantizer alone.
"""

import math
import re
from collections.abc import Sequence

from pydantic import ValidationError

from tokenizer.config import (
    FiniteScalarQuantizerConfig,
    GroupConfig,
    NearestQuantizerConfig,
    NetworkConfig,
    TokenizerConfig,
)
from tokenizer.storage.configs import describe_validation_error
from tokenizer.storage.errors import InputError

DEFAULT_NETWORKS = NetworkConfig()


def hq_vae(
    downsamplings: Sequence[int] = (8, 4),
    depths: Sequence[int] = (2, 2),
    codebook_size: int = 256,
    code_dim: int = 64,
    *,
    shares_codebook: bool = False,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """Hybrid HQ-VAE: groups of `depths` layers at `downsamplings`, coarse to fine.

    Raises:
        InputError: an argument is out of range, or not one depth per downsampling.
    """
    if not depths or len(depths) != len(downsamplings):
        raise InputError(
            f"depths must be as many as downsamplings, {len(downsamplings)} and at least 1, "
            f"got {len(depths)}"
        )
    if min(depths) < 1:
        raise InputError(f"depths must be > 0, got {tuple(depths)}")
    try:
        groups = tuple(
            GroupConfig(
                downsampling=downsampling,
                codebook_sizes=(codebook_size,) * depth,
                code_dim=code_dim,
                shares_codebook=shares_codebook,
            )
            for downsampling, depth in zip(downsamplings, depths, strict=True)
        )
        return TokenizerConfig(groups=groups, networks=networks, channels=channels)
    except ValidationError as error:
        # All layers have the one size that was given.
        message = re.sub(r"codebook_sizes\.\d+", "codebook_size", describe_validation_error(error))
        raise InputError("; ".join(dict.fromkeys(message.split("; ")))) from error


def sq_vae(
    downsampling: int = 4,
    codebook_size: int = 512,
    code_dim: int = 64,
    *,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """SQ-VAE (arXiv 2205.07547): one code map; raises what `hq_vae` raises."""
    return hq_vae(
        (downsampling,), (1,), codebook_size, code_dim, networks=networks, channels=channels
    )


def sq_vae_2(
    downsamplings: Sequence[int] = (8, 4),
    codebook_size: int = 256,
    code_dim: int = 64,
    *,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """SQ-VAE-2 (arXiv 2401.00365): one injected layer at each resolution."""
    depths = (1,) * len(downsamplings)
    return hq_vae(
        downsamplings, depths, codebook_size, code_dim, networks=networks, channels=channels
    )


def rsq_vae(
    downsampling: int = 4,
    depth: int = 4,
    codebook_size: int = 256,
    code_dim: int = 64,
    *,
    shares_codebook: bool = False,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """RSQ-VAE (arXiv 2401.00365): one code map with `depth` residual layers."""
    return hq_vae(
        (downsampling,),
        (depth,),
        codebook_size,
        code_dim,
        shares_codebook=shares_codebook,
        networks=networks,
        channels=channels,
    )


def deterministic(
    config: TokenizerConfig, quantizer: NearestQuantizerConfig | None = None
) -> TokenizerConfig:
    """The counterpart with nearest codes: same networks, same code maps."""
    return config.model_copy(update={"quantizer": quantizer or NearestQuantizerConfig()})


def vq_vae(
    downsampling: int = 4,
    codebook_size: int = 512,
    code_dim: int = 64,
    *,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """VQ-VAE (arXiv 1711.00937), the counterpart of `sq_vae`."""
    return deterministic(
        sq_vae(downsampling, codebook_size, code_dim, networks=networks, channels=channels)
    )


def vq_vae_2(
    downsamplings: Sequence[int] = (8, 4),
    codebook_size: int = 256,
    code_dim: int = 64,
    *,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """VQ-VAE-2 (arXiv 1906.00446), the counterpart of `sq_vae_2`."""
    return deterministic(
        sq_vae_2(downsamplings, codebook_size, code_dim, networks=networks, channels=channels)
    )


def rq_vae(
    downsampling: int = 4,
    depth: int = 4,
    codebook_size: int = 256,
    code_dim: int = 64,
    *,
    shares_codebook: bool = False,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """RQ-VAE (arXiv 2203.01941), the counterpart of `rsq_vae`."""
    return deterministic(
        rsq_vae(
            downsampling,
            depth,
            codebook_size,
            code_dim,
            shares_codebook=shares_codebook,
            networks=networks,
            channels=channels,
        )
    )


def fsq_vae(
    downsampling: int = 4,
    levels: Sequence[int] = (8, 8, 8),
    code_dim: int = 64,
    *,
    depth: int = 1,
    networks: NetworkConfig = DEFAULT_NETWORKS,
    channels: int = 3,
) -> TokenizerConfig:
    """Finite scalar quantization (FSQ, arXiv 2309.15505) on the networks of `rsq_vae`.

    A code is a point of the grid with these numbers of levels; `depth` layers are residual.
    """
    config = rsq_vae(
        downsampling, depth, math.prod(levels), code_dim, networks=networks, channels=channels
    )
    quantizer = FiniteScalarQuantizerConfig(levels=tuple(levels))
    return config.model_copy(update={"quantizer": quantizer})

"""Families whose VAE was made for videos and encodes an image as one frame.

Its config has the mean and standard deviation of each latent channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from families.family import Family

if TYPE_CHECKING:
    from torch import Tensor


class VideoVaeFamily(Family):
    """The part of such a family that does not depend on the layers of its VAE."""

    @property
    def vae_factor(self) -> int:  # type: ignore[override]
        return 2 ** len(self.vae_config["temperal_downsample"])

    def normalized(self, posterior: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, BCHW, of the normalized latents of one frame.

        `posterior` is the VAE's DiagonalGaussianDistribution, BCFHW.
        """
        mean_C11, std_C11 = self._statistics()
        mean_BCHW, std_BCHW = posterior.mean.squeeze(2), posterior.std.squeeze(2)
        return (mean_BCHW - mean_C11) / std_C11, std_BCHW / std_C11

    def denormalized(self, latents_BCHW: Tensor) -> Tensor:
        """Latents BCFHW of one frame as the VAE's decoder expects them, float32."""
        mean_C11, std_C11 = self._statistics()
        return (latents_BCHW.float() * std_C11 + mean_C11).unsqueeze(2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, from the VAE's config."""
        import torch

        mean, std = (
            torch.tensor(self.vae_config[name], device=self.device).view(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, std

"""Hyperparameters of Alice."""

from __future__ import annotations

from dataclasses import dataclass, field

from nnssl_stc3d.methods.base import PretrainConfig, choices, not_negative, positive
from nnssl_stc3d.views.samplers import TransformRanges


@dataclass(frozen=True)
class AliceConfig(PretrainConfig):
    """Hyperparameters of Alice. :meth:`paper` and :meth:`official` are the literal readings.

    Attributes:
        mask_ratio: share of the blocks that is masked.
        mask_block: voxels of a block, (z, y, x); None takes the largest stride of the network that leaves 4 blocks
            along each axis.
        mask_columns: mask whole columns along the first axis, as released.
        decoder: "unet" reconstructs through the network's own decoder, which is then pretrained and transferred;
            "tokens" through a light transformer (the paper), encoder only.
        decoder_width: of the light decoder.
        decoder_depth: blocks of the light decoder.
        decoder_heads: of the light decoder's attention.
        augment_online: intensity augmentation for the online views too, whose target is then the augmented crop; False
            leaves it to the target views (paper 4.2: the online input is that of the masked autoencoder).
        reconstruct: error on the "masked" voxels (Eq. 1), or on "all" (released).
        normalise: what is reconstructed is brought to mean 0 and variance 1 in each "view", so that the weights mean
            the same whatever the intensities; in each "block" (paper); or "not" (released).
        reconstruction_weight: of the reconstruction; "masked" adds both crops (Eq. 1), "all" is their mean.
        dv_weight: of l_dv, agreement across volumes (Eq. 2).
        st_weight: of l_st, aligned agreement within a volume (Eq. 5).
        form: of l_dv and l_st, "paper" (cosine) or "official" (DINO cross-entropy with centres).
        predictor: a further projector on the online side, "paper" form only: what keeps BYOL, whose head the paper
            cites, from collapsing.
        casa: "paper" (Eqs. 3, 4) or "official" (with residuals).
        casa_heads: of the released form's attention.
        target_tokens: what the target branch gives CASA, tokens of its "encoder" (paper) or "decoder" (released).
        descriptor: l_dv compares the mean of the projected "tokens" (paper), or the projected "bottleneck" (released).
        head: "projector" (with BatchNorm, also at its end, as in the MoCo v3 that the paper cites) or "dino" (paper and
            released code, without: measured to collapse).
        head_hidden: width of the heads' hidden layers.
        head_bottleneck: width that the heads normalise.
        head_dim: width of the embedding.
        student_temperature: of the online distribution, "official" form.
        teacher_temperature: of the target distribution, "official" form.
        teacher_temperature_start: the same at the start.
        teacher_temperature_warmup: share of the training in which it rises.
        centre_momentum: of the running mean of the target's logits.
        ema_momentum: of the target branch at the start; it rises to 1 along a cosine.
        transforms: of the target views.
        max_cycle: cells that a correspondence may be off after a round trip.
        min_score: smallest cosine of a correspondence.
        search: a correspondence lies within this share of the box around the body from the same place in it; None
            looks everywhere, for scans of different parts of the body.
        attempts: points that are tried before the place in the body decides.
    """

    beta2: float = 0.95
    mask_ratio: float = 0.75
    mask_block: tuple[int, int, int] | None = None
    mask_columns: bool = False
    augment_online: bool = True
    decoder: str = "unet"
    decoder_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    reconstruct: str = "masked"
    normalise: str = "view"
    reconstruction_weight: float = 1.0
    dv_weight: float = 1.0
    st_weight: float = 1.0
    form: str = "paper"
    predictor: bool = True
    casa: str = "paper"
    casa_heads: int = 8
    target_tokens: str = "encoder"
    descriptor: str = "tokens"
    head: str = "projector"
    head_hidden: int = 512
    head_bottleneck: int = 256
    head_dim: int = 128
    student_temperature: float = 0.1
    teacher_temperature: float = 0.01
    teacher_temperature_start: float = 0.008
    teacher_temperature_warmup: float = 0.03
    centre_momentum: float = 0.9
    ema_momentum: float = 0.996
    transforms: TransformRanges = field(default_factory=TransformRanges)
    max_cycle: float = 2.0
    min_score: float = 0.7
    search: float | None = 0.1
    attempts: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(
            self,
            decoder=("unet", "tokens"),
            reconstruct=("masked", "all"),
            normalise=("view", "block", "not"),
            form=("paper", "official"),
            head=("dino", "projector"),
            casa=("paper", "official"),
            target_tokens=("encoder", "decoder"),
            descriptor=("tokens", "bottleneck"),
        )
        positive(self, "decoder_width", "decoder_depth", "decoder_heads", "reconstruction_weight", "casa_heads")
        positive(self, "head_hidden", "head_bottleneck", "head_dim", "student_temperature", "teacher_temperature")
        positive(self, "teacher_temperature_start", "attempts")
        not_negative(self, "dv_weight", "st_weight", "max_cycle")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in (0, 1), got {self.mask_ratio}")
        for name in ("ema_momentum", "centre_momentum", "teacher_temperature_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.search is not None:
            positive(self, "search")
        if self.mask_block is not None and (len(self.mask_block) != 3 or min(self.mask_block) < 1):
            raise ValueError(f"mask_block must be three positive numbers (Z, Y, X) or None, got {self.mask_block}")
        for width, heads in (("decoder_width", "decoder_heads"), ("head_dim", "casa_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} must be a multiple of {heads}, got {getattr(self, width)} and {getattr(self, heads)}"
                )

    @property
    def resolved_mask_block(self) -> tuple[int, int, int]:
        """``mask_block``, once ``Alice.resolve`` has set it.

        Raises:
            ValueError: if it has not.
        """
        if self.mask_block is None:
            raise ValueError("mask_block must be resolved first, got None; see Alice.resolve")
        return self.mask_block

    @classmethod
    def paper(cls) -> AliceConfig:
        """The paper: light decoder, normalised targets, cosine losses, strongly augmented target views only."""
        return cls(
            batch_size=8, learning_rate=5e-5, weight_decay=0.05, warmup_steps=3100, augment_online=False,
            decoder="tokens", decoder_width=512, decoder_depth=8, normalise="block", head="dino", head_hidden=2048,
            head_dim=512, transforms=TransformRanges(flips=0.5),
        )  # fmt: skip

    @classmethod
    def official(cls) -> AliceConfig:
        """The released code: DINO losses, residual CASA on decoder tokens, error on all voxels, intact target views."""
        return cls(
            batch_size=8, learning_rate=5e-5, weight_decay=0.04, weight_decay_end=0.4, beta2=0.999, warmup_steps=1550,
            gradient_clip=3.0, mask_columns=True, reconstruct="all", normalise="not", reconstruction_weight=5.0,
            form="official", predictor=False, casa="official", target_tokens="decoder", descriptor="bottleneck",
            head="dino", head_hidden=2048, head_dim=512, transforms=TransformRanges.none(), intensity=0.0,
        )  # fmt: skip

    @property
    def needs_target(self) -> bool:
        """Whether a loss looks at the target branch."""
        return self.dv_weight > 0 or self.st_weight > 0

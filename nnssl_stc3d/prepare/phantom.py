"""A seeded CT-like phantom: every case has the same anatomy, and no two cases look the same.

The phantom exists for the quickstart and for tests that need a whole dataset. Its organs keep their topology (which
organ lies beside, above or in front of which other) while size, position, orientation, shape, intensity and texture
vary from case to case. Several structures share their intensities on purpose: liver and spleen, the two kidneys and
the vessels, stomach and bowel, aorta and vena cava (which carries no label). A voxel's brightness therefore does not
tell its organ; its surroundings do.

Coordinates are patient coordinates in millimetres, written (z, y, x): z to the head, y to the back, x to the
patient's left, which are the axes of a SimpleITK image with an identity direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

LABELS: dict[str, int] = {
    "background": 0,
    "liver": 1,
    "spleen": 2,
    "right_kidney": 3,
    "left_kidney": 4,
    "aorta": 5,
    "stomach": 6,
}

Volume = NDArray[np.float32]


class PhantomCase(NamedTuple):
    """One generated case.

    Attributes:
        image: (Z, Y, X) int16, Hounsfield-like units.
        labels: (Z, Y, X) uint8, values of `LABELS`.
        body: (Z, Y, X) uint8, 1 inside the body, 0 in the air around it.
        spacing: voxel size in mm, (z, y, x).
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    body: NDArray[np.uint8]
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class PhantomConfig:
    """How large the phantom is and how much its cases differ.

    Attributes:
        shape: size of the volume in voxels, (z, y, x), at least 16 along each axis.
        spacing: mean voxel size in mm, (z, y, x).
        spacing_jitter: relative range of the voxel size between cases.
        pose_degrees: range of the body's rotation about each axis, (z, y, x).
        pose_mm: range of the body's shift along each axis.
        body_scale: relative range of the body's size.
        organ_scale: relative range of each organ's size along each of its axes.
        organ_mm: range of each organ's shift along each axis.
        organ_degrees: range of each organ's rotation about each axis.
        bend_mm: standard deviation of the smooth random deformation.
        noise_hu: range of the standard deviation of the image noise.
    """

    shape: tuple[int, int, int] = (48, 48, 64)
    spacing: tuple[float, float, float] = (5.8, 5.2, 5.0)
    spacing_jitter: float = 0.05
    pose_degrees: tuple[float, float, float] = (10.0, 5.0, 6.0)
    pose_mm: float = 12.0
    body_scale: float = 0.1
    organ_scale: float = 0.17
    organ_mm: float = 7.0
    organ_degrees: float = 14.0
    bend_mm: float = 4.0
    noise_hu: tuple[float, float] = (12.0, 28.0)

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: an axis is shorter than 16 voxels or a spacing is not positive.
        """
        if len(self.shape) != 3 or min(self.shape) < 16:
            raise ValueError(f"A phantom needs three axes of at least 16 voxels, got shape {self.shape}.")
        if len(self.spacing) != 3 or min(self.spacing) <= 0:
            raise ValueError(f"A phantom needs three positive voxel sizes in mm, got spacing {self.spacing}.")


def generate_case(seed: int, config: PhantomConfig | None = None) -> PhantomCase:
    """Generates one case; the same seed and configuration give the same voxels.

    Args:
        seed: number of the individual.
        config: size and amount of variation; the default is `PhantomConfig()`.

    Returns:
        The case.
    """
    config = config or PhantomConfig()
    rng = np.random.default_rng([20250801, seed])
    # One axis carries the common factor: scanners change the in-plane size and the slice distance independently.
    jitter = 1 + config.spacing_jitter * rng.uniform(-1, 1, 2)
    spacing = (
        round(config.spacing[0] * float(jitter[0]), 3),
        round(config.spacing[1] * float(jitter[1]), 3),
        round(config.spacing[2] * float(jitter[1]), 3),
    )
    grid = _body_coordinates(rng, config, spacing)
    painter = _Painter(rng, config, grid)
    _paint_anatomy(painter)
    return painter.finish(spacing)


def _rotation(angles_degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) for (z, y, x) vectors from angles in degrees about the axes z, y and x."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_degrees)):
        first, second = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Volume:
    """Smooth random field (Z, Y, X) of unit standard deviation with about `cells` bumps along each axis."""
    coarse = rng.standard_normal([cells] * 3)
    axes = [np.linspace(0, cells - 1, size) for size in shape]
    field = map_coordinates(coarse, np.meshgrid(*axes, indexing="ij"), order=3, mode="nearest")
    return np.asarray(field / (field.std() + 1e-6), dtype=np.float32)


def _body_coordinates(rng: np.random.Generator, config: PhantomConfig, spacing: tuple[float, float, float]) -> Volume:
    """Anatomical coordinates (3, Z, Y, X) in mm of every voxel: the individual's pose, size and bend are undone."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(config.shape, spacing, strict=True)]
    world = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    # The anatomy is drawn for the default field of view; other sizes show the same body smaller or larger.
    reference = PhantomConfig()
    fit = np.array(config.shape) * config.spacing / (np.array(reference.shape) * reference.spacing)
    scale = fit * (1 + config.body_scale * rng.uniform(-1, 1)) * (1 + config.body_scale / 3 * rng.uniform(-1, 1, 3))
    rotation = _rotation(np.array(config.pose_degrees) * rng.uniform(-1, 1, 3))
    shift = config.pose_mm * rng.uniform(-1, 1, 3) * fit
    inverse = np.diag(1 / scale) @ rotation.T
    grid = np.tensordot(inverse, world - shift[:, None, None, None].astype(np.float32), axes=1).astype(np.float32)
    bend = np.stack([_smooth_field(rng, config.shape, 4) for _ in range(3)])
    return np.asarray(grid + config.bend_mm * bend, dtype=np.float32)


class _Painter:
    """Draws structures one over the other into an image and a label map.

    Args:
        rng: the case's random generator.
        config: amount of variation.
        grid: anatomical coordinates (3, Z, Y, X) in mm.
    """

    def __init__(self, rng: np.random.Generator, config: PhantomConfig, grid: Volume) -> None:
        self.rng = rng
        self.config = config
        self.grid = grid
        shape = grid.shape[1:]
        self.image = np.full(shape, -1000, dtype=np.float32)
        self.labels = np.zeros(shape, dtype=np.uint8)
        self.body = np.zeros(shape, dtype=bool)
        self.texture = [_smooth_field(rng, shape, cells) for cells in (7, 11)]

    def ellipsoid(
        self,
        center: tuple[float, float, float],
        radii: tuple[float, float, float],
        tilt: tuple[float, float, float] = (0.0, 0.0, 0.0),
        jitter: float = 1.0,
    ) -> Volume:
        """Signed level (Z, Y, X) of an individual ellipsoid: positive inside, 1 in its centre.

        Args:
            center: mean centre in mm, (z, y, x).
            radii: mean half-axes in mm, (z, y, x).
            tilt: mean rotation in degrees about (z, y, x).
            jitter: factor on the configured individual variation.
        """
        config, rng = self.config, self.rng
        middle = np.array(center) + jitter * config.organ_mm * rng.uniform(-1, 1, 3)
        size = np.array(radii) * (1 + jitter * config.organ_scale * rng.uniform(-1, 1, 3))
        turn = _rotation(np.array(tilt) + jitter * config.organ_degrees * rng.uniform(-1, 1, 3))
        to_unit = (np.diag(1 / size) @ turn.T).astype(np.float32)
        local = np.tensordot(to_unit, self.grid - middle[:, None, None, None].astype(np.float32), axes=1)
        return np.asarray(1 - np.sqrt((local**2).sum(0)), dtype=np.float32)

    def tube(self, y: float, x: float, radius: float, wave_mm: float) -> Volume:
        """Signed level (Z, Y, X) of a vessel that runs along z through about (y, x), with an individual slow wave."""
        rng, z = self.rng, self.grid[0]
        phase = rng.uniform(0, 2 * np.pi, 2)
        radius *= 1 + self.config.organ_scale * rng.uniform(-1, 1)
        offset = 0.5 * self.config.organ_mm * rng.uniform(-1, 1, 2)
        dy = self.grid[1] - (y + offset[0] + wave_mm * np.sin(z / 60 + phase[0]))
        dx = self.grid[2] - (x + offset[1] + wave_mm * np.sin(z / 75 + phase[1]))
        return np.asarray(1 - np.sqrt(dy**2 + dx**2) / radius, dtype=np.float32)

    def paint(self, where: NDArray[np.bool_], intensity: float, texture: float = 6.0, label: int | None = None) -> None:
        """Fills voxels with an intensity and a texture; structures without a label erase labels below them.

        Args:
            where: (Z, Y, X) mask.
            intensity: mean Hounsfield-like value.
            texture: standard deviation of the texture in the same unit.
            label: value in the label map, None for an unlabelled structure.
        """
        mixed = self.texture[0][where] * 0.7 + self.texture[1][where] * 0.7
        self.image[where] = intensity + texture * mixed
        self.labels[where] = 0 if label is None else label

    def finish(self, spacing: tuple[float, float, float]) -> PhantomCase:
        """Adds the scanner's blur and noise and returns the case."""
        blurred = gaussian_filter(self.image, 0.45)
        white = self.rng.standard_normal(blurred.shape).astype(np.float32)
        # CT noise is correlated between neighbours: part of it passes the reconstruction's blur.
        noise = 0.7 * white + 1.4 * gaussian_filter(white[::-1], 0.7)
        level = self.rng.uniform(*self.config.noise_hu)
        image = np.clip(np.rint(blurred + level * noise), -1024, 1500).astype(np.int16)
        return PhantomCase(image, self.labels, self.body.astype(np.uint8), spacing)


def _paint_anatomy(painter: _Painter) -> None:
    """Draws the body from outside to inside, then the organs from back to front priority."""
    rng = painter.rng
    z, y, x = painter.grid
    contrast = rng.uniform(-1, 1)  # phase of the contrast agent: moves vessels, kidneys and parenchyma together
    soft = rng.normal(0, 5)

    girth = ((np.abs(x) / 150) ** 2.4 + (np.abs(y) / 105) ** 2.4) ** (1 / 2.4)
    fat = rng.uniform(0.08, 0.2)
    wall = fat + rng.uniform(0.07, 0.11)
    painter.body[:] = girth < 1
    painter.paint(painter.body, -100 + soft, 8)
    painter.paint(girth < 1 - fat, 55 + soft, 10)
    inner = girth < 1 - wall
    painter.paint(inner, -85 + soft, 14)
    rib_wave = np.sin((z + 0.25 * np.abs(x) + rng.uniform(0, 30)) / 4.6)
    ribs = (girth < 1 - fat - 0.01) & (girth > 1 - wall + 0.01) & (rib_wave > 0.55) & (z > -10)
    painter.paint(ribs, rng.uniform(280, 420), 40)

    # Psoas and back muscles frame the spine; their brightness is that of stomach and bowel.
    for side in (-1, 1):
        muscle = painter.ellipsoid((-75, 50, 38 * side), (85, 20, 19)) > 0
        painter.paint(muscle & inner, 58 + soft, 8)
        back = painter.ellipsoid((0, 78, 38 * side), (220, 16, 34), jitter=0.4) > 0
        painter.paint(back & (girth < 1 - fat), 58 + soft, 8)

    # Bowel: loops without a label, in front and below, in number and place different in each person.
    for _ in range(int(rng.integers(16, 26))):
        center = (rng.uniform(-135, 0), rng.uniform(-75, 15), rng.uniform(-105, 105))
        loop = painter.ellipsoid(center, (rng.uniform(12, 26), rng.uniform(12, 22), rng.uniform(16, 40)))
        painter.paint((loop > 0) & inner, rng.uniform(20, 120), 14)
        painter.paint((loop > 0.62) & inner, rng.choice([-600.0, 30.0, 90.0]), 20)

    parenchyma = 108 + 22 * contrast + soft
    vessel = 165 + 45 * contrast
    kidney = 160 + 40 * contrast
    label = LABELS

    stomach = np.maximum(
        painter.ellipsoid((62, -32, 58), (44, 34, 36), (0, 0, 15)),
        painter.ellipsoid((38, -50, 22), (20, 22, 42), (20, 0, 0), jitter=0.6),
    )
    filling = rng.uniform(35, 85)
    painter.paint((stomach > 0) & inner, filling, 12, label["stomach"])
    gas = (stomach > 0.25) & inner & (y < rng.uniform(-55, -40))
    painter.paint(gas, -700, 30, label["stomach"])

    spleen = painter.ellipsoid((58, 38, 98), (50, 42, 24), (-15, 10, 10))
    painter.paint((spleen > 0) & inner, parenchyma + rng.uniform(-14, 18), 8, label["spleen"])

    lobes = np.maximum(
        painter.ellipsoid((48, -2, -72), (72, 72, 62), (0, 12, 0), jitter=0.8),
        painter.ellipsoid((66, -44, -8), (36, 36, 62), (0, -14, 0), jitter=0.8),
    )
    liver = (lobes > 0) & inner
    painter.paint(liver, parenchyma + rng.uniform(-14, 14), 9, label["liver"])
    branches = painter.texture[1] + 0.3 * painter.texture[0] > 1.7
    painter.paint(liver & branches & (lobes > 0.12), vessel - 20, 6, label["liver"])
    for _ in range(int(rng.integers(0, 4))):
        spot = (48 + rng.uniform(-35, 35), rng.uniform(-35, 35), -72 + rng.uniform(-30, 30))
        lesion = painter.ellipsoid(spot, (9, 9, 9), jitter=0.5) > 0
        painter.paint(lesion & liver & (lobes > 0.15), parenchyma - rng.uniform(30, 70), 5, label["liver"])

    gallbladder = painter.ellipsoid((0, -35, -52), (22, 14, 13), jitter=0.8) > 0
    painter.paint(gallbladder & inner, 15, 5)

    for name, side, height in (("right_kidney", -1, -12.0), ("left_kidney", 1, 4.0)):
        level = painter.ellipsoid((height, 46, 62 * side), (52, 27, 27), (0, 12 * side, -8))
        hollow = painter.ellipsoid((height, 40, 40 * side), (17, 12, 17), jitter=0.4)
        painter.paint((level > 0) & inner, kidney, 8, label[name])
        painter.paint((level > 0.42) & inner, kidney - rng.uniform(20, 60), 8, label[name])
        painter.paint((hollow > 0) & (level > -0.2) & inner, -60, 12)

    _paint_chest(painter, inner)

    painter.paint((painter.tube(26, -24, 14, 4) > 0) & inner, vessel - rng.uniform(0, 45), 6)
    disc = np.abs(((z + rng.uniform(0, 40)) % 36) - 18) < 5
    spine = np.sqrt(((y - 62) / 22) ** 2 + (x / 26) ** 2) < 1
    painter.paint(spine, rng.uniform(190, 300), 35)
    painter.paint(spine & disc, 85, 10)
    canal = np.sqrt((y - 90) ** 2 + x**2) < 10
    painter.paint(canal, 25, 5)
    painter.paint(
        ((np.sqrt((y - 90) ** 2 + x**2) < 17) | ((np.abs(x) < 5) & (y > 90) & (y < 112))) & ~canal & (girth < 1 - fat),
        rng.uniform(250, 400),
        30,
    )
    painter.paint((painter.tube(28, 13, 12.5, 4) > 0) & ~spine, vessel, 5, label["aorta"])


def _paint_chest(painter: _Painter, inner: NDArray[np.bool_]) -> None:
    """Draws the two lungs above the diaphragm's domes, and the heart between them."""
    rng = painter.rng
    z, y, x = painter.grid
    right, left = rng.uniform(100, 114), rng.uniform(94, 110)
    for side, top in ((-1, right), (1, left)):
        dome = top - (((x - 70 * side) / 60) ** 2 + ((y + 5) / 75) ** 2) * 28
        lung = (z > dome) & (x * side > 14) & inner
        painter.paint(lung, rng.uniform(-860, -760), 45)
    heart = painter.ellipsoid((132, -30, 18), (36, 42, 52), jitter=0.8) > 0
    painter.paint(heart & inner & (z > 88), 120 + rng.uniform(-10, 40), 8)

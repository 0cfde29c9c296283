"""The water and the sky behind a fluke."""

from functools import lru_cache

import cv2
import numpy as np

TILE = 512


@lru_cache(maxsize=2)
def wave_tiles(seed, count=4):
    """Seamless wave fields of random direction and roughness, (count, 512, 512) float32 of unit deviation."""
    rng = np.random.default_rng([seed, 77])
    fx, fy = np.meshgrid(np.fft.rfftfreq(TILE), np.fft.fftfreq(TILE))
    radius = np.hypot(fx, fy) + 1e-6
    tiles = []
    for _ in range(count):
        peak, sharp = rng.uniform(0.012, 0.03), rng.uniform(1.3, 2.0)
        heading = rng.normal(np.pi / 2, 0.35)
        along = np.abs(np.cos(np.arctan2(fy, fx) - heading))
        spectrum = np.exp(-0.5 * (peak / radius) ** 2) * radius**-sharp * (0.12 + along**2)
        phase = rng.uniform(0, 2 * np.pi, spectrum.shape)
        field = np.fft.irfft2(spectrum * np.exp(1j * phase), (TILE, TILE))
        field /= field.std()
        tiles.append(
            np.where(field > 0, np.abs(field) ** 1.25, field * 0.8)
        )  # crests are sharper than troughs
    return np.asarray(tiles, np.float32)


@lru_cache(maxsize=2)
def grain_tile(seed):
    """White noise to cut film grain from: (1024, 2048) float32."""
    return np.random.default_rng([seed, 78]).standard_normal((1024, 2048), np.float32)


@lru_cache(maxsize=2)
def foam_tile(seed):
    """Billowy, seamless noise for foam and spray: (512, 1024) float32 of unit deviation."""
    rng = np.random.default_rng([seed, 79])
    radius = np.hypot(*np.meshgrid(np.fft.rfftfreq(1024), np.fft.fftfreq(512))) + 1e-6

    def noise(power, low):
        phase = rng.uniform(0, 2 * np.pi, radius.shape)
        field = np.fft.irfft2(np.exp(1j * phase) * radius**-power * (radius > low), (512, 1024))
        return field / field.std()

    billow = 0.9 * noise(1.6, 0.004) - 0.9 * np.abs(noise(1.25, 0.012)) + 0.35 * noise(0.6, 0.05)
    billow -= billow.mean()
    return (billow / billow.std()).astype(np.float32)


def cut(tile, rng, size):
    """A random (H, W) window of a tile, wrapped around and mirrored at random."""
    h, w = size
    y, x = rng.integers(0, tile.shape[0]), rng.integers(0, tile.shape[1])
    window = np.take(np.take(tile, np.arange(y, y + h), 0, mode="wrap"), np.arange(x, x + w), 1, mode="wrap")
    return window[:, ::-1] if rng.random() < 0.5 else window


def ramp(colours, weight):
    """Blend two (C,) colours by weight (H, W) into (C, H, W) float32."""
    first, second = (np.asarray(c, np.float32)[:, None, None] for c in colours)
    return first + (second - first) * weight.astype(np.float32)


def palette(rng, gray_film):
    """Colours of one day: {deep, crest, sky: (C,) in 0..1, waves: their strength}; C is 1 for gray film, else 3."""
    if gray_film:  # aerial-bright or slate backgrounds of old prints
        level = rng.choice([rng.uniform(0.72, 0.97), rng.uniform(0.3, 0.7)], p=[0.55, 0.45])
        crest = min(1.0, level + rng.uniform(0.05, 0.3))
        tones = {"deep": level, "crest": crest, "sky": rng.uniform(0.75, 0.98)}
        return {name: np.array([tone]) for name, tone in tones.items()} | {"waves": rng.uniform(0.02, 0.16)}
    hue = rng.choice(["blue", "steel", "green", "slate", "glare"], p=[0.36, 0.26, 0.12, 0.16, 0.10])
    deep = {
        "blue": (0.13, 0.27, 0.46),
        "steel": (0.30, 0.40, 0.50),
        "green": (0.20, 0.36, 0.36),
        "slate": (0.32, 0.34, 0.37),
        "glare": (0.62, 0.68, 0.74),
    }[hue]
    deep = np.clip(np.array(deep) * rng.uniform(0.55, 1.35) + rng.normal(0, 0.012, 3), 0.03, 0.9)
    deep += (deep.mean() - deep) * rng.uniform(0, 0.5)
    crest = np.clip(deep * rng.uniform(1.2, 1.8) + rng.uniform(0.05, 0.2), 0, 1)
    sky = np.clip(np.array([0.72, 0.80, 0.88]) * rng.uniform(0.75, 1.12) + rng.normal(0, 0.02, 3), 0, 1)
    return {"deep": deep, "crest": crest, "sky": sky, "waves": rng.uniform(0.05, 0.28)}


def draw_sea(rng, size, colours, horizon, seed):
    """The scene without the whale.

    size: (H, W); horizon: row of the horizon as a fraction of H, negative when it is out of the picture.
    Returns (image (C, H, W) float32 in 0..1, wave field (H, W) float32).
    """
    h, w = size
    tile = wave_tiles(seed)[rng.integers(4)]
    top = max(0, round(horizon * h))
    # The sea is a plane seen at a grazing angle: rows near the horizon show more of it.
    near, far = rng.uniform(0.5, 1.6) * TILE / 2, rng.uniform(1.5, 3.5)
    angle = rng.uniform(-0.2, 0.2)
    corner = rng.uniform(0, TILE, 2)
    spread = far if horizon > 0 else 1 + (far - 1) * rng.uniform(0.1, 0.6)
    reach = rng.uniform(1.5, 3.5) * spread * near
    ground = np.array([(-spread * near, -reach), (spread * near, -reach), (near, near), (-near, near)])
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    source = (ground @ turn.T + corner).astype(np.float32)
    target = np.array([(0, top), (w, top), (w, h), (0, h)], np.float32)
    matrix = cv2.getPerspectiveTransform(source, target)
    waves = cv2.warpPerspective(tile, matrix, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    rows = np.linspace(0, 1, h, dtype=np.float32)[:, None]
    depth = np.clip((rows * h - top) / max(h - top, 1), 0, 1)
    waves += 0.4 * (0.3 + 0.7 * depth) * cut(wave_tiles(seed)[0], rng, size)
    swell = cv2.resize(rng.standard_normal((5, 4), np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    strength = colours["waves"] * (0.45 + 0.55 * depth) * np.clip(0.8 + 0.3 * swell, 0.2, 1.6)
    weight = np.clip(
        0.35 + 0.06 * swell + strength * waves * 1.5 + 0.25 * (1 - depth) * rng.uniform(-0.5, 1), 0, 1
    )
    image = ramp((colours["deep"], colours["crest"]), weight)
    caps = np.clip(waves - rng.uniform(2.0, 3.4), 0, 1) * min(1, colours["waves"] * 4)
    image += (0.95 - image) * caps
    if top > 0:
        low_sky = np.clip(colours["sky"] + rng.normal(0.04, 0.03), 0, 1)
        sky = ramp((colours["sky"], low_sky), np.repeat(np.linspace(0, 1, top)[:, None], w, 1))
        if rng.random() < 0.3:  # a coast
            ridge = (
                top - 1 - np.abs(np.interp(np.arange(w), np.linspace(0, w, 9), rng.uniform(0, 0.5, 9) * top))
            )
            land = np.arange(top)[:, None] > ridge
            sky = np.where(
                land,
                sky * rng.uniform(0.55, 0.85) + 0.15 * colours["deep"].astype(np.float32)[:, None, None],
                sky,
            )
        image[:, :top] = sky
    return image, waves

"""One whale: the outline and the pigmentation of its fluke, drawn from a seed.

Canonical coordinates: u runs from the left tip (-1) to the right tip (+1), v runs down, both in units of half
the distance between the tips. The mean shape follows ten points set by hand on 998 competition photographs
(Johnson 2019, see the report's section 5.1.1): notch at (0, 0.31), lower edge of the tips at (1.02, 0.20).
Left and right are drawn separately, so that a mirrored fluke is another animal.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

U_RANGE = (-1.13, 1.13)
V_RANGE = (-0.25, 1.45)
TEXTURE_SIZE = (386, 512)  # (H, W)
SCALE = (TEXTURE_SIZE[1] - 1) / (U_RANGE[1] - U_RANGE[0])

# Right half, from the notch outwards (trailing edge) and from the tip to the tail stock (leading edge).
TRAILING = np.array(
    [(0.0, 0.33), (0.05, 0.255), (0.22, 0.205), (0.45, 0.16), (0.70, 0.095), (0.90, 0.055), (1.0, 0.0)]
)
LEADING = np.array(
    [
        (1.0, 0.0),
        (1.025, 0.11),
        (0.96, 0.25),
        (0.76, 0.43),
        (0.52, 0.61),
        (0.30, 0.83),
        (0.17, 1.08),
        (0.14, 1.5),
    ]
)


@dataclass(frozen=True)
class Animal:
    """A fluke in canonical coordinates.

    texture: (386, 512, 2) uint8, albedo and opacity over U_RANGE x V_RANGE.
    outline: (N, 2) closed polygon (u, v), clockwise from the notch along the right half.
    points: {name: (u, v)}, the landmarks that do not depend on the water.
    darkness: share of the fluke that is dark, 0..1.
    tint: (3,) RGB offset of the skin.
    """

    texture: np.ndarray
    outline: np.ndarray
    points: dict
    darkness: float
    tint: np.ndarray


def to_pixels(points):
    """Canonical (..., 2) points to texture pixels (x, y)."""
    return (np.asarray(points, float) - (U_RANGE[0], V_RANGE[0])) * SCALE


def smooth_noise(rng, size, cells, octaves=1, stretch=1.0):
    """Smooth noise of unit deviation, (H, W) float32: about `cells` bumps across, `stretch` times as long as high."""
    h, w = size
    total = np.zeros(size, np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        grid = (max(2, round(n * h / w * stretch)) + 3, max(2, round(n / stretch)) + 3)
        field = cv2.resize(rng.standard_normal(grid, np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        total += field * 0.55**octave
    return total / (total.std() + 1e-6)


def _spline(points, n):
    """n points on a smooth curve through `points`, spaced by chord length."""
    t = np.r_[0, np.cumsum(np.hypot(*np.diff(points, axis=0).T))]
    return CubicSpline(t, points)(np.linspace(0, t[-1], n))


def _half(rng, habit):
    """Outline of a right half: trailing edge (notch to tip) and leading edge (tip to stock), (N, 2) each."""
    trailing, leading = TRAILING.copy(), LEADING.copy()
    trailing[1:-1, 1] += habit["edge"][: len(trailing) - 2] + rng.normal(0, 0.012, len(trailing) - 2)
    trailing[0, 1] += habit["notch"]
    trailing[1, 1] = min(trailing[1, 1], trailing[0, 1] - 0.03)
    leading[1:-1] += habit["lead"][: len(leading) - 2] + rng.normal(0, 0.012, (len(leading) - 2, 2))
    leading[-2:, 0] *= habit["stock"]
    edge = _spline(trailing, 180)
    saw = (
        gaussian_filter1d(rng.standard_normal(180), 1.2)
        + 0.8 * gaussian_filter1d(rng.standard_normal(180), 4) * 2
    )
    edge[:, 1] -= (
        habit["serration"] * saw * np.linspace(0.2, 1, 180) ** 0.7 * np.minimum(1, np.arange(180)[::-1] / 8)
    )
    for _ in range(rng.poisson(habit["nicks"])):
        at, width, depth = rng.uniform(0.15, 0.97), rng.uniform(0.008, 0.03), rng.uniform(0.02, 0.09)
        edge[:, 1] += depth * np.maximum(0, 1 - np.abs(edge[:, 0] - at) / width)
    return edge, _spline(leading, 120)


def _marks(rng, habit):
    """Scars, rakes, rings and spots as a layer, (H, W) float32: -1 darkens, +1 lightens what lies below."""
    h, w = TEXTURE_SIZE
    dark, light = np.zeros((h, w), np.uint8), np.zeros((h, w), np.uint8)

    def place():
        side = -1 if rng.random() < habit["left_share"] else 1
        u = side * rng.uniform(0.08, 0.98)
        return to_pixels((u, rng.uniform(0.18, 0.75 - 0.35 * abs(u)) + 0.05))

    def layer():
        return light if rng.random() < 0.6 else dark

    def curve(start, angle, length, bend, thickness, where):
        t = np.linspace(0, 1, 12)[:, None]
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        line = start + t * length * along + (t - t**2) * bend * length * across
        cv2.polylines(where, [np.round(line * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, 4)

    for _ in range(rng.poisson(habit["rakes"])):
        start, angle, gap = place(), rng.uniform(0, np.pi), rng.uniform(3, 7)
        length, bend, where = rng.uniform(20, 75), rng.normal(0, 0.4), layer()
        for k in range(rng.integers(3, 7)):
            offset = k * gap * np.array([-np.sin(angle), np.cos(angle)])
            curve(
                start + offset + rng.normal(0, 1.5, 2), angle, length * rng.uniform(0.7, 1.1), bend, 1, where
            )
    for _ in range(rng.poisson(habit["scars"])):
        curve(
            place(),
            rng.uniform(0, 2 * np.pi),
            rng.uniform(15, 120),
            rng.normal(0, 0.6),
            int(rng.integers(1, 4)),
            layer(),
        )
    for _ in range(rng.poisson(habit["rings"])):
        x, y = place().astype(int)
        cv2.circle(
            layer(), (int(x), int(y)), int(rng.integers(3, 8)), 255, int(rng.integers(1, 3)), cv2.LINE_AA
        )
    for _ in range(rng.poisson(habit["spots"])):
        x, y = place().astype(int)
        axes = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        cv2.ellipse(layer(), (int(x), int(y)), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
    fade = 0.75 + 0.25 * np.tanh(smooth_noise(rng, TEXTURE_SIZE, 14))
    return (light.astype(np.float32) - dark) / 255 * fade


@lru_cache(maxsize=1)
def _canonical_grid():
    h, w = TEXTURE_SIZE
    u = np.linspace(*U_RANGE, w, dtype=np.float32)[None, :]
    v = np.linspace(*V_RANGE, h, dtype=np.float32)[:, None]
    return np.broadcast_to(u, (h, w)), np.broadcast_to(v, (h, w))


def _pigment(rng, habit):
    """Albedo without marks: (H, W) float32 in 0..1."""
    u, v = _canonical_grid()
    across = np.abs(u)
    middle = 0.30 + 0.12 * (1 - across)  # where the lobe is widest, along its length
    coarse, fine = smooth_noise(rng, TEXTURE_SIZE, 6, 3, 1.3), smooth_noise(rng, TEXTURE_SIZE, 36, 3, 1.7)
    fields = []
    for _ in range(2):
        lean = habit["white"] + rng.normal(0, 0.35)
        reach, spread = rng.uniform(0.45, 0.8), rng.uniform(0.25, 0.5)
        lobe = np.exp(-(((across - reach) / spread) ** 2) - ((v - middle) / rng.uniform(0.16, 0.30)) ** 2)
        fields.append(2.2 * (lobe - 0.5) + lean)
    side = 1 / (1 + np.exp(-u / 0.03))  # left to right without a seam
    field = fields[0] * (1 - side) + fields[1] * side + habit["ragged"] * (0.5 * coarse + 0.3 * fine)
    white = 1 / (1 + np.exp(-field * habit["crisp"]))
    heart = np.exp(-((across / (habit["heart"] * (1 + 0.35 * coarse))) ** 2)) * np.clip((v - 0.12) * 3, 0, 1)
    white *= 1 - np.clip(heart * 1.6, 0, 1) * habit["heart_dark"]  # the dark root of the tail
    mottle = 1 + 0.05 * coarse + 0.04 * fine
    return (habit["black"] + (habit["pale"] - habit["black"]) * white) * mottle


def make_animal(seed):
    """The animal of `seed` (a sequence of ints). Equal seeds give equal animals."""
    rng = np.random.default_rng(seed)
    white = rng.normal(-1.6, 0.5) if rng.random() < 0.25 else rng.normal(0.1, 0.9)  # some are nearly black
    habit = {
        "edge": rng.normal(0, 0.034, 8),
        "notch": rng.normal(0, 0.035),
        "lead": rng.normal(0, 0.022, (8, 2)),
        "stock": rng.uniform(0.8, 1.3),
        "serration": rng.gamma(2.5, 0.004),
        "nicks": rng.gamma(1.2, 0.9),
        "left_share": rng.uniform(0.25, 0.75),
        "rakes": rng.gamma(1.0, 1.2),
        "scars": rng.gamma(1.2, 3.5),
        "rings": rng.gamma(0.7, 3.0),
        "spots": rng.gamma(0.8, 26.0),
        "white": white,
        "ragged": rng.uniform(0.5, 1.5),
        "crisp": rng.uniform(3, 9),
        "heart": rng.uniform(0.14, 0.38),
        "heart_dark": rng.uniform(0.55, 1.0),
        "black": rng.uniform(0.05, 0.13),
        "pale": rng.uniform(0.62, 0.88),
        "rim": rng.gamma(2.0, 0.011),
        "tips": rng.gamma(1.0, 0.5),
    }
    right_edge, right_lead = _half(rng, habit)
    left_edge, left_lead = _half(rng, habit)
    left_edge[0] = right_edge[0]  # the notch is shared
    mirror = np.array([-1.0, 1.0])
    outline = np.concatenate([right_edge, right_lead, left_lead[::-1] * mirror, left_edge[::-1] * mirror])

    big = np.zeros((TEXTURE_SIZE[0] * 2, TEXTURE_SIZE[1] * 2), np.uint8)
    cv2.fillPoly(big, [np.round(to_pixels(outline) * 2 * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    opacity = cv2.resize(big, TEXTURE_SIZE[::-1], interpolation=cv2.INTER_AREA)

    albedo = _pigment(rng, habit)
    # A dark rim along the trailing edge and, where barnacles sit, bright rough tips.
    rim = np.zeros(TEXTURE_SIZE, np.uint8)
    for edge in (right_edge, left_edge * mirror):
        line = [np.round(to_pixels(edge) * 16).astype(np.int32)]
        cv2.polylines(rim, line, False, 255, max(1, round(2 * habit["rim"] * SCALE)), cv2.LINE_AA, 4)
    rim = cv2.GaussianBlur(rim, (0, 0), 1.5).astype(np.float32) / 255
    rough = smooth_noise(rng, TEXTURE_SIZE, 60, 2)
    albedo += (habit["black"] - albedo) * rim * np.clip(0.75 + 0.3 * rough, 0, 1)
    u, v = _canonical_grid()
    for side in (-1, 1):
        crust = np.exp(-(((u * side - 0.98) / 0.06) ** 2) - ((v - 0.08) / 0.09) ** 2)
        albedo += rng.gamma(1.0, habit["tips"]) * 0.35 * crust * (rough > 0.3)
    marks = _marks(rng, habit)
    albedo = np.where(
        marks > 0,
        albedo + (0.72 - albedo) * marks * 0.8,
        albedo + (albedo - 0.08) * np.minimum(marks, 0) * 0.85,
    )
    albedo = np.clip(albedo, 0.02, 0.98)

    points = {
        "left_tip": left_edge[-1] * mirror,
        "right_tip": right_edge[-1],
        "notch": right_edge[0],
        "left_shoulder": left_edge[14] * mirror,
        "right_shoulder": right_edge[14],
        "left_below_tip": left_lead[24] * mirror,
        "right_below_tip": right_lead[24],
    }
    inside = opacity > 127
    return Animal(
        texture=np.dstack([np.round(albedo * 255).astype(np.uint8), opacity]),
        outline=outline,
        points=points,
        darkness=float((albedo[inside] < 0.3).mean()),
        tint=rng.normal(0, 1, 3) * (0.02, 0.012, 0.02) + (0.012, 0.0, -0.006),
    )

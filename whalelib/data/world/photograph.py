"""One photograph of a fluke, with its truth: pose, water, light, film, and section 2.3's bad cases."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter1d

from whalelib.data.world.animal import SCALE, TEXTURE_SIZE, U_RANGE, V_RANGE, smooth_noise, to_pixels
from whalelib.data.world.sea import cut, draw_sea, foam_tile, grain_tile, palette, ramp

# Section 2.3 and appendix A; "plain" photographs may still be blurred, hazy or half under water.
SPECIALS = (
    "plain",
    "caption",
    "two flukes",
    "front side",
    "half",
    "poor angle",
    "spray",
    "blurry",
    "sketch",
    "wide",
)
LANDMARKS = (
    "left_tip",
    "left_shoulder",
    "notch",
    "right_shoulder",
    "right_tip",
    "right_below_tip",
    "right_water",
    "bottom",
    "left_water",
    "left_below_tip",
)
CORNERS = ("left_down", "left_up", "right_down", "right_up")
RENDER_WIDTH = (
    512  # the scene is drawn at this width at most, then enlarged: lenses are not sharper than that
)


@dataclass
class Photograph:
    """A picture and its truth.

    image: (H, W, 3) uint8 RGB; mask: (H, W) uint8, 0 or 255, the visible fluke; box: (x0, y0, x1, y1) pixels, x1
    and y1 exclusive; points: {name: (x, y)} pixels, Johnson's ten (LANDMARKS) and Shen's four (CORNERS); pose:
    angles in degrees and other draws.
    """

    image: np.ndarray
    mask: np.ndarray
    box: tuple
    points: dict
    pose: dict = field(default_factory=dict)


@dataclass
class Pose:
    """How the fluke is held: degrees, but curl in canonical units and the camera's distance in half-widths."""

    roll: float
    yaw: float
    pitch: float
    dihedral: tuple
    curl: tuple
    distance: float


def draw_pose(rng, special):
    """A pose; the spreads give the ten-point statistics of the real photographs (see data/README.md)."""
    poor = special == "poor angle"
    return Pose(
        roll=rng.normal(0, 3.2 if rng.random() < 0.85 else 9)
        + poor * rng.choice([-1, 1]) * rng.uniform(8, 22),
        yaw=np.clip(rng.normal(0, 14), -32, 32) if not poor else rng.choice([-1, 1]) * rng.uniform(36, 52),
        pitch=np.clip(rng.normal(24, 25), -40, 66),
        dihedral=tuple(np.clip(rng.normal(13, 13) + rng.normal(0, 6, 2), -18, 52)),
        curl=tuple(rng.normal(0, 0.075) + rng.normal(0, 0.035, 2)),
        distance=rng.uniform(5, 14),
    )


def bend(uv, pose):
    """Curl the lobes in the canonical plane: v moves by a function of u alone, which is easy to invert."""
    uv = np.array(uv, float)
    u = uv[..., 0]
    uv[..., 1] += np.where(u < 0, pose.curl[0], pose.curl[1]) * (np.abs(u) ** 2.2)
    return uv


def project(uv, pose, side):
    """Bent canonical points of one side (-1 left, +1 right) to picture units: (..., 2), x right, y down.

    Each lobe is a plane, hinged on the midline by its dihedral angle; then come pitch, yaw and roll.
    """
    u, v = uv[..., 0], uv[..., 1]
    angle = np.radians(pose.dihedral[0 if side < 0 else 1])
    x, y, z = u * np.cos(angle), v - 0.3, side * u * np.sin(angle)
    tilt, turn, roll = np.radians([pose.pitch, pose.yaw, pose.roll])
    y, z = y * np.cos(tilt) - z * np.sin(tilt), y * np.sin(tilt) + z * np.cos(tilt)
    x, z = x * np.cos(turn) + z * np.sin(turn), -x * np.sin(turn) + z * np.cos(turn)
    x, y = x * pose.distance / (pose.distance + z), y * pose.distance / (pose.distance + z)
    return np.stack([x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)], -1)


def project_all(uv, pose):
    """As `project`, each point on its own side."""
    bent = bend(uv, pose)
    return np.where((bent[..., :1] < 0), project(bent, pose, -1), project(bent, pose, 1))


def _frame(outline, size, rng, special, gray):
    """Scale and shift (x, y) that place projected points in an (H, W) picture."""
    h, w = size
    low, high = outline.min(0), outline.max(0)
    span = np.maximum(high - low, 1e-3)
    # Old prints are cropped tight; modern photographs leave some sea around.
    tight = rng.beta(8, 1.4) if gray else rng.beta(6, 1.5)
    share = 0.25 + 0.74 * tight
    if special in ("wide", "two flukes"):
        share = min(share, rng.uniform(0.25, 0.5))
    scale = min(share * w / span[0], rng.uniform(0.78, 1.05) * h / span[1])
    slack = np.array([w, h]) - span * scale
    at = np.clip(rng.normal(0.5, 0.13, 2), 0, 1)
    return scale, slack * at - low * scale


def _place(texture, pose, size, scale, shift):
    """Warp the texture into the picture: (H, W, 2) float32 albedo and opacity in 0..1; (H, W) bool, the right side."""
    h, w = size
    layers = []
    for side in (-1, 1):
        corners = np.array(
            [(0, V_RANGE[0]), (0, V_RANGE[1]), (side * 1.1, V_RANGE[1]), (side * 1.1, V_RANGE[0])], float
        )
        target = project(corners, pose, side) * scale + shift
        matrix = cv2.getPerspectiveTransform(to_pixels(corners).astype(np.float32), target.astype(np.float32))
        layers.append(cv2.warpPerspective(texture, matrix, (w, h), flags=cv2.INTER_LINEAR))
    middle = project(np.array([(0.0, 0.0), (0.0, 1.0)]), pose, 1) * scale + shift
    (ax, ay), (bx, by) = middle
    xs, ys = np.arange(w, dtype=np.float32)[None, :], np.arange(h, dtype=np.float32)[:, None]
    right = (bx - ax) * (ys - ay) - (by - ay) * (xs - ax) < 0
    return np.where(right[..., None], layers[1], layers[0]).astype(np.float32) / 255, right


def _curl_texture(texture, pose):
    """The texture with its lobes curled."""
    h, w = TEXTURE_SIZE
    u = np.linspace(*U_RANGE, w)
    lift = bend(np.stack([u, np.zeros(w)], -1), pose)[:, 1] * SCALE
    rows = np.arange(h, dtype=np.float32)[:, None] - lift[None, :].astype(np.float32)
    columns = np.broadcast_to(np.arange(w, dtype=np.float32)[None, :], (h, w))
    return cv2.remap(
        texture, np.ascontiguousarray(columns), rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )


def _waterline(rng, pose, size, scale, shift, special):
    """Row of the water's edge for every column, (W,), and the canonical depth of the cut at the midline."""
    depth = np.clip(0.42 + rng.gamma(2.0, 0.13), 0.42, 1.3)
    if special == "half":
        depth = rng.uniform(0.12, 0.34)
    w = size[1]
    level = (project(bend(np.array([0.0, depth]), pose), pose, 1) * scale + shift)[1]
    tilt = rng.normal(0, 0.03) * (np.arange(w) - w / 2)
    chop = gaussian_filter1d(rng.standard_normal(w), w / 40) * w / 40 * rng.uniform(0.02, 0.16)
    ripple = gaussian_filter1d(rng.standard_normal(w), 2) * rng.uniform(0.3, 1.2)
    if special == "half" and rng.random() < 0.5:
        tilt += rng.choice([-1, 1]) * 0.25 * (np.arange(w) - w / 2)
    return (level + tilt + chop + ripple).astype(np.float32), depth


def _light(rng, pose, right):
    """Shading of the two lobes: (H, W) float32 around 1, from the map of the right side (H, W) bool."""
    h, w = right.shape
    sun = rng.normal(0, 0.5)
    faces = [
        1 + 0.4 * np.sin(np.radians(side * d + pose.yaw) - sun)
        for side, d in zip((-1, 1), pose.dihedral, strict=True)
    ]
    shade = np.where(right[::6, ::6], np.float32(faces[1]), np.float32(faces[0]))
    shade = cv2.GaussianBlur(shade, (0, 0), w / 360) * (1 + 0.10 * smooth_noise(rng, shade.shape, 3))
    return cv2.resize(shade, (w, h), interpolation=cv2.INTER_LINEAR)


def _paint(rng, animal, placed, right, pose, colours, special, seed):
    """Skin colour of the fluke: (C, H, W) float32."""
    size = right.shape
    albedo = placed[..., 0]
    if special == "front side":  # the dorsal side: dark, unmarked, with a ridge on the midline
        albedo = 0.10 + 0.03 * smooth_noise(rng, size, 18, 2) + 0.06 * cv2.GaussianBlur(albedo, (0, 0), 4)
    albedo = albedo * (_light(rng, pose, right) * np.float32(rng.uniform(0.45, 1.35)))
    black = 0.35 * animal.tint
    pale = np.clip(1 - animal.tint * 1.5 + rng.normal(0, 0.02, 3), 0.8, 1.1)
    channels = len(colours["sky"])
    skin = ramp((black[:channels], (black + pale)[:channels]), albedo)
    wet = np.clip(cut(foam_tile(seed), rng, size) - rng.uniform(0.4, 2.4), 0, 1.5) * np.float32(
        rng.uniform(0, 0.3)
    )
    sheen = rng.uniform(0, 0.10) + 0.10 * rng.random() * np.clip(np.cos(np.radians(pose.pitch)), 0, 1)
    glint = np.minimum(wet + np.float32(sheen), 0.7)
    return skin + (colours["sky"].astype(np.float32)[:, None, None] - skin) * glint


def _foam(rng, image, line, reach, amount, seed):
    """Paint white water, in place, where the fluke leaves the sea; returns how much of each pixel it hides, (H, W)."""
    size = h, w = image.shape[1:]
    x0, x1 = reach
    rows = np.arange(h, dtype=np.float32)[:, None]
    span = max(x1 - x0, 8)
    column = np.exp(
        -(
            (
                np.maximum(
                    np.abs(np.arange(w, dtype=np.float32) - (x0 + x1) / 2) - span * rng.uniform(0.1, 0.5), 0
                )
                / (0.25 * span)
            )
            ** 2
        )
    )
    below = rows - line
    reach_up, reach_down = rng.uniform(0.01, 0.10) * span * amount, rng.uniform(0.04, 0.28) * span
    band = np.exp(
        np.where(
            below < 0, -((below / np.float32(max(reach_up, 1))) ** 2), below / np.float32(-max(reach_down, 1))
        )
    )
    billow = cut(foam_tile(seed), rng, size)
    cover = np.clip((billow + 2.6 * amount * band * column - 2.0) * 0.9, 0, 1) * np.clip(band * 3, 0, 1)
    bright = np.float32(rng.uniform(0.72, 1.0)) * (1 - 0.18 * np.clip(0.6 - 0.5 * billow, 0, 1))
    image += (bright - image) * cover
    return cover


def _spray(rng, image, amount, seed):
    """Falling drops and mist, painted in place; returns how much of each pixel they hide, (H, W)."""
    size = image.shape[1:]
    noise = cut(grain_tile(seed), rng, size)
    drops = np.clip(
        cv2.GaussianBlur(noise, (1, 0), sigmaX=0.5, sigmaY=rng.uniform(1.2, 4)) * 2.2 - rng.uniform(1.1, 1.9),
        0,
        1,
    )
    veil = np.clip(0.5 * cut(foam_tile(seed), rng, size) + 0.3, 0, 1) * amount
    cover = np.clip(drops * amount + veil * 0.55, 0, 0.95)
    image += (np.float32(rng.uniform(0.75, 1.0)) - image) * cover
    return cover


def _caption(rng):
    """A catalogue's caption: (text, whether the paper is dark, (left, top, right, bottom) as shares of the picture)."""
    office = rng.choice(
        ["Research Station", "Marine Laboratory", "Whale Catalogue", "Coastal Studies", "Field Survey"]
    )
    date = f"{rng.integers(1, 29):02d}-{rng.integers(1, 13):02d}-{rng.integers(76, 99)}"
    text = "  ".join([f"#{rng.integers(100, 9999)}", str(office), date][: rng.integers(1, 4)])
    tall = rng.uniform(0.07, 0.13)
    if rng.random() < 0.6:
        area = (0.0, 1 - tall, 1.0, 1.0)
    else:
        left = rng.uniform(0.0, 0.45)
        area = (left, 0.985 - tall, left + 0.5, 0.985)
    return text, rng.random() < 0.15, area


def _write(image, text, dark, area):
    """Put the caption on the finished picture, in place."""
    h, w = image.shape[:2]
    left, top, right, bottom = (np.array(area) * (w, h, w, h)).astype(int)
    ink, paper = (250, 15) if dark else (15, 250)
    image[top:bottom, left:right] = paper
    scale = (bottom - top) / 36
    (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    scale *= min(1.0, 0.94 * (right - left) / max(wide, 1))
    base = (int(left + 0.03 * (right - left)), int(bottom - 0.3 * (bottom - top)))
    cv2.putText(
        image,
        text,
        base,
        cv2.FONT_HERSHEY_SIMPLEX,
        scale,
        (ink,) * 3,
        max(1, round(scale * 1.4)),
        cv2.LINE_AA,
    )


def _sketch(rng, animal, size):
    """A pencil drawing of the fluke from its catalogue card, flat; the mask is the outline's inside."""
    h, w = size
    scale = 0.42 * min(w, h / 0.8)
    shift = np.array([w / 2, h * 0.28]) + rng.normal(0, 0.02, 2) * (w, h)
    outline = animal.outline[animal.outline[:, 1] < 0.95] * scale + shift
    wobble = gaussian_filter1d(rng.standard_normal(outline.shape), 9, axis=0) * scale * 0.03
    image = np.full((h, w, 3), 236, np.float32) + 5 * smooth_noise(rng, size, 5, 3)[..., None]
    line = [np.round((outline + wobble) * 16).astype(np.int32)]
    canvas = np.clip(image, 0, 255).astype(np.uint8)
    cv2.polylines(canvas, line, False, (70, 70, 78), 2, cv2.LINE_AA, 4)
    u, v = rng.uniform(-0.9, 0.9, 260), rng.uniform(0.05, 0.7, 260)
    pixels = np.round(to_pixels(np.stack([u, v], -1))).astype(int)
    inked = (animal.texture[pixels[:, 1], pixels[:, 0], 1] > 0) & (
        animal.texture[pixels[:, 1], pixels[:, 0], 0] < 90
    )
    for x, y in (np.stack([u, v], -1) * scale + shift)[inked].astype(int):
        cv2.line(
            canvas,
            (int(x), int(y)),
            (int(x + scale * 0.05), int(y - scale * 0.06)),
            (96, 96, 104),
            1,
            cv2.LINE_AA,
        )
    cv2.putText(
        canvas,
        f"no. {rng.integers(10, 999)}  drawn from life",
        (w // 12, h - h // 10),
        cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
        max(0.5, w / 700),
        (80, 80, 90),
        1,
        cv2.LINE_AA,
    )
    mask = np.zeros((h, w), np.uint8)
    cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_8, 4)
    points = {name: np.asarray(uv) * scale + shift for name, uv in animal.points.items()}
    return canvas, mask, points


def _truth(mask, points):
    """Box (4,) of the visible fluke, Johnson's ten points and Shen's four, in the drawn picture's pixels."""
    ys, xs = np.nonzero(mask)
    if not len(xs):  # wholly hidden: nothing can be seen, nothing is claimed
        return np.array([0, 0, 1, 1]), {}
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    middle = points["notch"][0]
    lowest = {}
    for side, name in ((-1, "left"), (1, "right")):
        on_side = (xs - middle) * side > 0
        x, y = (xs[on_side], ys[on_side]) if on_side.any() else (xs, ys)
        bottom = np.flatnonzero(y >= np.percentile(y, 97))
        outer = bottom[np.argmax(x[bottom] * side)]
        lowest[f"{name}_water"] = (x[outer], y[outer])
        edge, deepest = np.argmax(x * side), np.argmax(y)
        lowest[f"{name}_up"] = (x[edge], y[edge])
        lowest[f"{name}_down"] = (x[deepest], y[deepest])
    column = np.abs(xs - middle) <= 2
    lowest["bottom"] = (middle, ys[column].max() if column.any() else ys.max())
    return box, {**points, **lowest}


def _film(rng, image, size, special, seed):
    """Lens and film: haze, exposure, blur, grain; (C, h, w) float32 in 0..1 to (H, W, 3) uint8."""
    gray = len(image) == 1
    if rng.random() < 0.3:
        haze = np.float32(rng.uniform(0.05, 0.4))
        image = image * (1 - haze) + haze * np.float32(rng.uniform(0.6, 0.95))
    low, high = np.percentile(image[:, ::7, ::7], [1, 99])  # prints and cameras use their range
    levels, span = rng.beta(2.5, 1.5), max(high - low, 0.2)
    gamma = np.exp(rng.normal(0, 0.22))
    gain, lift = rng.uniform(0.9, 1.15), rng.normal(0, 0.03)
    if gray:
        contrast = rng.uniform(0.75, 1.5)
        lift += 0.5 - 0.5 * contrast
        gain *= contrast
    value = np.linspace(-0.25, 1.5, 2048)
    value = np.clip(value + levels * ((value - low) / span - value), 0, 1)
    tone = (np.clip(value**gamma * gain + lift, 0, 1) * 255 + 0.5).astype(np.uint8)
    cast = 1 + (np.zeros((1, 1, 1)) if gray else rng.normal(0, 0.03, (3, 1, 1)))
    index = (image * (cast * 2047 / 1.75).astype(np.float32) + np.float32(0.25 * 2047 / 1.75)).astype(
        np.int16
    )
    image = cv2.merge(list(tone[np.clip(index, 0, 2047)]))
    blur = rng.gamma(1.2, 0.45) + (rng.uniform(2.5, 6) if special == "blurry" else 0)
    if blur > 0.35:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    if rng.random() < 0.08 or (special == "blurry" and rng.random() < 0.5):
        image = cv2.filter2D(image, -1, _motion(rng))
    h, w = size
    if image.shape[:2] != size:
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    grain = rng.gamma(1.5, 0.012) * (2.0 if gray else 1.0) + (0.06 if special == "half" else 0)
    noise = cut(grain_tile(seed), rng, size) * np.float32(grain * 255)
    image = cv2.add(image, noise if gray else cv2.merge([noise] * 3), dtype=cv2.CV_8U)
    return cv2.merge([image] * 3) if gray else image


def _motion(rng):
    """Kernel of a camera's shake: a line of 3 to 12 pixels at any angle."""
    length = int(rng.integers(3, 13))
    kernel = np.zeros((length, length), np.float32)
    angle = rng.uniform(0, np.pi)
    reach = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    ends = [tuple(int(c) for c in length / 2 + sign * reach) for sign in (-1, 1)]
    cv2.line(kernel, *ends, 1.0, 1)
    return kernel / max(kernel.sum(), 1)


@dataclass
class _Stage:
    """A fluke placed in a picture: its pose, scale and shift, the warped texture, and the water's edge."""

    pose: Pose
    scale: float
    shift: np.ndarray
    placed: np.ndarray
    right: np.ndarray
    line: np.ndarray
    depth: float
    solid: np.ndarray


def _set_stage(rng, animal, size, special, gray):
    """Pose and place the fluke; a draw that leaves hardly anything above water is drawn again."""
    h, w = size
    above = animal.outline[animal.outline[:, 1] < 0.85]
    for _attempt in range(8):
        pose = draw_pose(rng, special)
        # People crop to the fluke, so the picture's shape tells how the fluke is held.
        span = np.ptp(project_all(above, pose), axis=0)
        wanted = h / w * rng.uniform(0.72, 1.15) * span[0] / max(span[1], 1e-3)
        flat = np.cos(np.radians(pose.pitch)) * np.clip(wanted, 0.4, 2.2) ** 0.8
        pose.pitch = np.degrees(np.arccos(np.clip(flat, 0.25, 1))) * np.sign(pose.pitch or 1)
        scale, shift = _frame(project_all(above, pose), size, rng, special, gray)
        placed, right = _place(_curl_texture(animal.texture, pose), pose, size, scale, shift)
        line, depth = _waterline(rng, pose, size, scale, shift, special)
        solid = placed[..., 1] * (np.arange(h)[:, None] < line)
        if solid.sum() > 0.012 * solid.size:
            break
    return _Stage(pose, scale, shift, placed, right, line, depth, solid)


def _reflect(rng, image, waves, line, reach):
    """Darken the broken water under the fluke, in place."""
    h, w = waves.shape
    below = np.arange(h, dtype=np.float32)[:, None] - line
    under = np.zeros(w, np.float32)
    under[reach[0] : reach[1] + 1] = 1
    under = gaussian_filter1d(under, w / 25)
    fade = np.clip(1 - below / (0.2 * w), 0, 1) * np.clip(below / 6, 0, 1)
    image *= 1 - (np.clip(0.5 + 0.5 * waves, 0, 1) * under * fade * rng.uniform(0, 0.5)).astype(np.float32)


def _add_second(rng, image, animal, stage, colours, seed):
    """A second fluke behind the first, in place (Figure 2.4)."""
    h, w = stage.right.shape
    pose = draw_pose(rng, "plain")
    scale = stage.scale * rng.uniform(0.55, 0.9)
    aside = (rng.choice([-1, 1]) * rng.uniform(0.28, 0.42) * w, rng.uniform(-0.16, 0.02) * h)
    placed, right = _place(_curl_texture(animal.texture, pose), pose, (h, w), scale, stage.shift + aside)
    cover = placed[..., 1] * (np.arange(h)[:, None] < stage.line - rng.uniform(0, 0.08) * h)
    image += (_paint(rng, animal, placed, right, pose, colours, "plain", seed) - image) * cover


def take(animal, rng, size, gray=False, special="plain", seed=0):
    """Photograph an animal.

    animal: Animal; rng: numpy Generator, the only source of chance; size: (H, W) in pixels of the finished
    picture; gray: whether it has no colour; special: one of SPECIALS; seed: the world's, for its sea and grain.
    Returns a Photograph. Raises ValueError for an unknown special.
    """
    if special not in SPECIALS:
        raise ValueError(f"unknown kind of photograph {special!r}: one of {', '.join(SPECIALS)}")
    h, w = size
    shrink = min(1.0, RENDER_WIDTH / w)
    small = (max(24, round(h * shrink)), max(24, round(w * shrink)))
    if special == "sketch":
        canvas, mask, points = _sketch(rng, animal, small)
        image = cv2.resize(canvas, (w, h), interpolation=cv2.INTER_LINEAR)
        if gray:
            image = cv2.merge([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] * 3)
        return _finish(image, mask, points, {"special": special})

    colours = palette(rng, gray)
    stage = _set_stage(rng, animal, small, special, gray)
    pose, line = stage.pose, stage.line
    points = {
        name: project_all(np.array(uv), pose) * stage.scale + stage.shift
        for name, uv in animal.points.items()
    }
    horizon = rng.uniform(0.02, 0.4) if rng.random() < (0.12 if gray else 0.28) else -1.0
    image, waves = draw_sea(rng, small, colours, horizon, seed)
    columns = np.flatnonzero(stage.solid.any(0))
    reach = (columns[0], columns[-1]) if len(columns) else (0, small[1] - 1)
    _reflect(rng, image, waves, line, reach)
    if special == "two flukes":
        _add_second(rng, image, animal, stage, colours, seed)
    skin = _paint(rng, animal, stage.placed, stage.right, pose, colours, special, seed)
    image += (skin - image) * stage.solid
    calm, rough = rng.uniform(0, 0.5), rng.uniform(0.5, 1.3)
    hidden = _foam(rng, image, line, reach, rng.choice([calm, rough]), seed)
    if special == "spray" or rng.random() < 0.06:
        amount = rng.uniform(0.3, 1.0) if special == "spray" else rng.uniform(0.05, 0.4)
        hidden = np.maximum(hidden, _spray(rng, image, amount, seed))
    mask = ((stage.solid > 0.5) & (hidden < 0.85)).astype(np.uint8) * 255
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    final = _film(rng, image, size, special, seed)
    if special == "caption":
        text, dark, area = _caption(rng)
        _write(final, text, dark, area)
        left, top, right, bottom = (np.array(area) * np.tile(small[::-1], 2)).astype(int)
        mask[top:bottom, left:right] = 0
    angles = {"roll": pose.roll, "yaw": pose.yaw, "pitch": pose.pitch, "depth": stage.depth}
    return _finish(final, mask, points, {"special": special} | angles)


def _finish(image, mask, points, facts):
    """The truth of a drawn mask and its points, brought to the finished picture's pixels."""
    h, w = image.shape[:2]
    ratio = np.array([w / mask.shape[1], h / mask.shape[0]])
    box, points = _truth(mask, points)
    mask = cv2.resize(mask, (w, h), interpolation=cv2.INTER_NEAREST)
    limits = np.array([w - 1, h - 1])
    placed = {name: tuple(np.clip(np.asarray(p) * ratio, 0, limits)) for name, p in points.items()}
    return Photograph(image, mask, tuple(float(edge) for edge in box * np.tile(ratio, 2)), placed, facts)

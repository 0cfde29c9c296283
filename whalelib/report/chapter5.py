"""What the third solution's submission shows of its post-processing (sections 5.2.2, 5.2.3 and 5.5).

The submission was published before and after it. The sizes of photographs that one step goes by were not, so what that
step did is what the others leave to explain.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from whalelib import postprocess


def size_swaps(
    images: Sequence[str],
    guesses: np.ndarray,
    processed: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    leaks: Mapping[str, str],
) -> dict[str, str]:
    """Return what the rule of sizes must have done to a submission.

    Args:
        images: (Q,) names of the test photographs, each once.
        guesses: (Q, K) of the submission before it was processed.
        processed: (Q, L) after it.
        groups: group -> ids of one whale.
        leaks: test photograph -> its published id.

    Returns:
        Test photograph -> id of the first guess's whale that was put first instead, where duplicates and leaks alone
        give another row.

    Raises:
        ValueError: a photograph twice, other lengths, or groups that `whalelib.postprocess` refuses.
    """
    without = postprocess.post_process(images, guesses, groups, leaks).guesses
    whale = {name: ids for ids in groups.values() for name in ids}
    places = np.flatnonzero(postprocess.changed(without, processed))
    return {
        images[place]: processed[place, 0]
        for place in places
        if processed[place, 0] in whale.get(without[place, 0], ())
    }


def made_sizes(
    images: Sequence[str],
    swaps: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
) -> dict[str, tuple[int, int]]:
    """Make sizes with which the rule of sizes does what it must have done, and nothing else.

    They are no photographs' sizes: each id of a group gets one of its own, and so do the test photographs that it
    is put first in; all other test photographs share one that no id has.

    Args:
        images: (Q,) names of the test photographs.
        swaps: as `size_swaps` returns them.
        groups: group -> ids of one whale.
        labels: training photograph -> id.

    Returns:
        Test or training photograph -> (H, W).
    """
    width = {
        name: place for place, name in enumerate((one for ids in groups.values() for one in ids), start=2)
    }
    sizes = {image: (1, width[swaps[image]] if image in swaps else 1) for image in images}
    return sizes | {image: (1, width[name]) for image, name in labels.items() if name in width}

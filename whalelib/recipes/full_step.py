"""Does a solution's network fit this machine, and how fast is it? `python -m whalelib.recipes.full_step`.

A few steps of the `paper` profile, with 10,008 classes: the first solution's SENet-154 and photographs of 4 x 256 x
512; with `--recipe second` a backbone of the second and one of its two sizes; forward, the losses, backward, clipping
where there is any, and Adam, by the code that trains it. Time and memory depend on no picture, so the pixels
are random, and so are the weights.
"""

import argparse
import json
import sys
import time
import warnings
from functools import partial

import torch

from whalelib.bench import peak_memory
from whalelib.ledger import append_ledger, rows_of
from whalelib.models import SECOND_PLACE_BACKBONES, count_parameters
from whalelib.recipes import first, second
from whalelib.run import EDITIONS, Run, Settings
from whalelib.train import fit

WHALES = 5004


def full_step(
    groups: int = 1,
    steps: int = 2,
    *,
    recipe: str = "first",
    backbone: str | None = None,
    size: tuple[int, int] | None = None,
    edition: str = "as_described",
    seed: int = 0,
    device: str = "auto",
) -> dict[str, float]:
    """Train a full-size network for some steps, and return what it took.

    Args:
        groups: of four images in a batch, two of them of one whale.
        steps: two or more; the last one is timed. The first allocates memory and chooses algorithms.
        recipe: "first" or "second".
        backbone: of the second; default ResNet-101.
        size: (H, W); default (256, 512).
        edition, seed: of the network.
        device: "auto", "cpu" or "cuda".

    Returns:
        ``seconds`` of the last step, ``processor`` seconds of it (over all threads; the better measure on a busy
        machine), ``images a second``, ``parameters``, the losses and the norm of the ``gradient``
        (before clipping) of the last step, and the peak of ``memory`` in GiB: that of this whole process on a CPU,
        what torch held on a GPU.
    """
    generator = torch.Generator().manual_seed(seed)
    size = size or first.SIZES["paper"]
    whales = torch.randint(WHALES, (groups, 2), generator=generator)
    labels = [torch.tensor([own, own, other, 2 * WHALES]) for own, other in whales.tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights will do
        if recipe == "first":
            batch = [
                {"image": torch.rand(4, 4, *size, generator=generator), "label": four} for four in labels
            ]
            model = first.network("paper", WHALES, edition, seed)
            options = {"batch_size": groups, "optimizer": first.optimizer, "clip": 5.0}
            loss = partial(first.loss, edition=edition)
        else:
            batch = [
                {"image": torch.rand(3, *size, generator=generator), "label": one}
                for one in torch.cat(labels)
            ]
            model = second.network("paper", WHALES, edition, seed, backbone)
            options = {"batch_size": 4 * groups, "optimizer": second.optimizer}
            loss = second.Loss(edition, steps, second.MARGIN[edition])
    history = fit(
        model,
        batch,
        loss,
        epochs=steps,
        seed=seed,
        device=device,
        on_epoch=lambda *_: {"processor": time.process_time()},
        **options,
    )
    history["processor"] = history["processor"].diff()
    row = history.iloc[-1].drop(["epoch", "steps", "lr", "MAP@5"]).to_dict()
    return row | {
        "images a second": 4 * groups / row["seconds"],
        "parameters": count_parameters(model),
        "memory": peak_memory(next(model.parameters()).device.type),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print as JSON, and enter the time and the memory in the ledger if so asked."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.full_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=1,
        help="of four images in a batch (default 1; the solutions had 12 and 16)",
    )
    parser.add_argument("--recipe", choices=("first", "second"), default="first")
    parser.add_argument("--backbone", choices=SECOND_PLACE_BACKBONES, help="of the second")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--edition", choices=EDITIONS, default="as_described")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--ledger", metavar="NOTEBOOK", help="enter the values there under this number, as 03_11"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="enter values of code that is not committed"
    )
    chosen = parser.parse_args(arguments)
    what = {"recipe": chosen.recipe, "backbone": chosen.backbone, "size": tuple(chosen.size)}
    found = full_step(chosen.groups, chosen.steps, **what, edition=chosen.edition, device=chosen.device)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}, indent=1))
    if chosen.ledger:
        cuda = torch.cuda.is_available() and chosen.device != "cpu"
        device = f"cuda ({torch.cuda.get_device_name()})" if cuda else "cpu"
        where = "" if cuda else f", {torch.get_num_threads()} threads"
        chose = " ".join(sys.argv[1:] if arguments is None else arguments)
        network = ""
        if chosen.recipe == "second":
            network = f", {chosen.backbone or 'resnet101'} at {chosen.size[0]} x {chosen.size[1]}"
        names = {
            "seconds": "seconds a step",
            "processor": "processor seconds a step",
            "memory": "GiB at the peak",
        }
        full = f"full size{network}, {4 * chosen.groups} images{where}"
        values = {f"{full}: {text}": round(found[name], 2) for name, text in names.items()}
        rows = rows_of(
            Run(chosen.ledger, Settings(profile="paper", edition=chosen.edition)),
            values,
            command=f"python -m whalelib.recipes.full_step {chose}",
            seconds=found["seconds"],
            data="random pixels",
            device=device,
        )
        append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())

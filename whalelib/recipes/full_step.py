"""Does the first solution's network fit this machine, and how fast is it? `python -m whalelib.recipes.full_step`.

A few steps of the `paper` profile: SENet-154, photographs of 4 x 256 x 512, 10,008 classes; forward, the three losses,
backward, clipping and Adam, by the code that trains it. Time and memory depend on no picture, so the pixels are random,
and so are the weights.
"""

import argparse
import json
import resource
import sys
import time
import warnings
from functools import partial

import torch

from whalelib.ledger import append_ledger
from whalelib.models import count_parameters
from whalelib.recipes import first
from whalelib.run import EDITIONS
from whalelib.train import fit

WHALES = 5004


def full_step(
    quadruplets: int = 1,
    steps: int = 2,
    *,
    edition: str = "as_described",
    seed: int = 0,
    device: str = "auto",
) -> dict[str, float]:
    """Train the full-size network for some steps, and return what it took.

    Args:
        quadruplets: in a batch, of four images each.
        steps: two or more; the last one is timed. The first allocates memory and chooses algorithms.
        edition, seed: of the network.
        device: "auto", "cpu" or "cuda".

    Returns:
        ``seconds`` of the last step, ``processor`` seconds of it (over all threads; the better measure on a busy
        machine), ``images a second``, ``parameters``, the losses and the norm of the ``gradient``
        (before clipping) of the last step, and the peak of ``memory`` in GiB: that of this whole process on a CPU,
        what torch held on a GPU.
    """
    size = first.SIZES["paper"]
    generator = torch.Generator().manual_seed(seed)
    whales = torch.randint(WHALES, (quadruplets, 2), generator=generator)
    labels = [torch.tensor([own, own, other, 2 * WHALES]) for own, other in whales.tolist()]
    batch = [{"image": torch.rand(4, 4, *size, generator=generator), "label": label} for label in labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights will do
        model = first.network("paper", WHALES, edition, seed)
    history = fit(
        model,
        batch,
        partial(first.loss, edition=edition),
        epochs=steps,
        batch_size=quadruplets,
        optimizer=first.optimizer,
        clip=5.0,
        seed=seed,
        device=device,
        on_epoch=lambda *_: {"processor": time.process_time()},
    )
    history["processor"] = history["processor"].diff()
    row = history.iloc[-1].drop(["epoch", "steps", "lr", "MAP@5"]).to_dict()
    on_gpu = next(model.parameters()).is_cuda
    unit = 2**10 if sys.platform == "darwin" else 1  # bytes there, KiB elsewhere
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 2**20
    return row | {
        "images a second": 4 * quadruplets / row["seconds"],
        "parameters": count_parameters(model),
        "memory": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else process,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print as JSON, and enter the time and the memory in the ledger if so asked."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.full_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--quadruplets", type=int, default=1, help="in a batch (default 1; the solution had 12)"
    )
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
    found = full_step(chosen.quadruplets, chosen.steps, edition=chosen.edition, device=chosen.device)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}, indent=1))
    if chosen.ledger:
        cuda = torch.cuda.is_available() and chosen.device != "cpu"
        device = f"cuda ({torch.cuda.get_device_name()})" if cuda else "cpu"
        where = "" if cuda else f", {torch.get_num_threads()} threads"
        about = {
            "notebook": chosen.ledger,
            "command": f"python -m whalelib.recipes.full_step --quadruplets {chosen.quadruplets}",
        }
        about |= {
            "data": "random pixels",
            "profile": "paper",
            "edition": chosen.edition,
            "seed": 0,
            "device": device,
        }
        names = {
            "seconds": "seconds a step",
            "processor": "processor seconds a step",
            "memory": "GiB at the peak",
        }
        rows = [
            {
                **about,
                "metric": f"full size, {4 * chosen.quadruplets} images{where}: {text}",
                "value": round(found[name], 2),
            }
            for name, text in names.items()
        ]
        append_ledger(
            [row | {"seconds": round(found["seconds"], 1)} for row in rows], allow_dirty=chosen.allow_dirty
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

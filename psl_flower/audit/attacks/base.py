"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from psl_flower.audit.finding import Finding, Found, Gallery
from psl_flower.audit.rehearsal import Setting
from psl_flower.audit.scene import Rows, Scene, mean_image
from psl_flower.audit.similarity import psnr, squared_error, ssim

# Takes what the server has seen, returns what it found; nothing, where what it needs does not cross.
Attack = Callable[[Scene], Found]
ActiveAttack = Callable[[Setting], Found]

SERVER = "server"
_SHOWN = 8  # images of a gallery


def reconstruction(attack: str, party: str, rows: Rows, guesses: Tensor, originals: Tensor, data_range: float) -> Found:
    """Return how like the clients' inputs an attack's guesses are, beside the mean image.

    Parameters
    ----------
    guesses, originals : (n, ...) float32
    data_range : float
        Of the inputs.
    """
    floor = mean_image(rows)[:1].expand_as(originals)
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "MSE": lambda of: squared_error(of, originals),
        "PSNR (dB)": lambda of: psnr(of, originals, data_range),
    }
    images = originals.ndim == 4 and min(originals.shape[-2:]) >= 3
    if images:
        measures["SSIM"] = lambda of: ssim(of, originals, data_range)
    found = Found()
    for name, measure in measures.items():
        each, by_nobody = (measure(of).double().numpy() for of in (guesses, floor))
        value, margin = float(each.mean()), 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5
        found.findings.append(
            Finding(
                attack=attack,
                party=party,
                measure=name,
                value=value,
                floor=float(by_nobody.mean()),
                low=value - margin,
                high=value + margin,
                less=name == "MSE",
            )
        )
    if images:
        found.gallery = Gallery(
            attack=attack,
            originals=originals[:_SHOWN].clone(),  # without all the others behind them
            reconstructions=guesses[:_SHOWN].clone(),
            floor=floor[:_SHOWN].clone(),
        )
    return found

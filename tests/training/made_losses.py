"""A loss as a test asks for it: by name and words, for four classes."""

import numpy as np
import torch

from training.losses import LossOptions, default_tau, make_loss

CPU = torch.device("cpu")
COUNTS = np.array([600.0, 250.0, 100.0, 50.0])


def made(name, words=None, counts=COUNTS, device=CPU, **more):
    words = {**(words or {}), **more}
    tau = words.pop("tau", default_tau(name))
    return make_loss(name, counts, tau, device, options=LossOptions(**words))

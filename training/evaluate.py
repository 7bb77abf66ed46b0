"""What a trained network says about images, in the precision that serving uses."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.augment import normalise
from training.data import Part

_PIXELS = 2**20  # in one batch: 1,024 images of 32 x 32, 20 of 224 x 224


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    part: Part,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> NDArray[np.float32]:
    """Return the logits f of the images, float32 (N, L): no augmentation, no bfloat16.

    The images are read a batch at a time. Raises DataError for a file that cannot be decoded.
    """
    network.eval()
    shift, scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def logits_of(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = normalise(torch.from_numpy(images).to(device), shift, scale)
        logits: NDArray[np.float32] = network(pixels).float().cpu().numpy()
        return logits

    size = part.image_size
    nothing = np.empty((0, size, size, 3), dtype=np.uint8)  # so that no images give (0, L)
    blocks = part.blocks(max(1, min(250, _PIXELS // size**2))) if len(part) else [nothing]
    return np.concatenate([logits_of(images) for images in blocks])

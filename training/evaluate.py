"""What a trained network says about images, in the precision that serving uses."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.augment import normalise


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    images: NDArray[np.uint8],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    batch_size: int = 250,
) -> NDArray[np.float32]:
    """Return the logits f of images (N, H, W, 3), float32 (N, L): no augmentation, no bfloat16."""
    network.eval()
    shift, scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    batches = [
        network(normalise(torch.from_numpy(images[start : start + batch_size]).to(device), shift, scale))
        for start in range(0, max(1, len(images)), batch_size)
    ]
    logits: NDArray[np.float32] = torch.cat(batches).float().cpu().numpy()
    return logits

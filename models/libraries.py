"""What must be in place before diffusers or transformers is imported."""

from importlib.util import find_spec

import torch

_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def tolerate_torchvision() -> None:
    """Let diffusers and transformers import a torchvision that was built for another PyTorch; nothing here calls it.

    They import it when it is installed. Without its own library, which does not load into another PyTorch, that fails
    at two operators that the library would have declared; they are declared here, without kernels.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

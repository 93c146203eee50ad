"""Exercises of lesson 2: the discriminator that joins the autoencoder's training late. 25 minutes.

Read first: "Training the autoencoder" in 02_image_ldm.py. Explains that cell.
"""

import torch


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, a scalar: scores of real patches shall be above 1, of reconstructed ones below -1, and
    what is beyond these costs nothing. The mean over patches of each, and of the two. 10 min"""
    raise NotImplementedError


def adaptive_weight(reconstruction: torch.Tensor, gan: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """|grad reconstruction| / (|grad gan| + 1e-4), gradients of the two losses at the decoder's last layer, a scalar of
    at most 1e4 that carries no gradient itself. The losses are backpropagated again afterwards: keep their graphs.
    (torch.autograd.grad) 15 min"""
    raise NotImplementedError

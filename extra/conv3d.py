"""3D convolutions whose weight gradients are right in bfloat16 on CPUs with AMX.

There torch 2.13 leaves memory it never wrote in the weight gradients of some (128 channels at 32 x 64 and up to 4
frames, for one): often not finite, and if finite wrong without a word. The weight gradient is taken by 2D convolutions
instead, which are right, and two to three times faster than a 3D convolution in float32. Elsewhere nothing is changed.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # whether this CPU multiplies bfloat16 tiles


class Conv3d(nn.Conv3d):
    """Over frames, b c t h w, with an odd kernel and no stride in time; see above for what it does differently."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if AMX and x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            return Conv3dWithGradientBy2D.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class Conv3dWithGradientBy2D(torch.autograd.Function):
    """Each part of the kernel is a 2D convolution of the frames so far ahead, and so is its gradient."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: tuple[int, ...],
                padding: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        of_all = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1, 1],
                                                     False, [0, 0, 0], 1, [ctx.needs_input_grad[0], False, False])
        if not ctx.needs_input_grad[1]:
            return of_all[0], None, None, None, None
        # channels stay last in memory, or copies cost more than the convolutions
        frames, outputs = (rearrange(y, "b c t h w -> b t h w c") for y in (x, grad))
        of_kernel, size, t = [], (*weight.shape[:2], *weight.shape[3:]), x.shape[2]
        for i in range(weight.shape[2]):
            ahead = i - weight.shape[2] // 2
            pairs = frames[:, max(0, ahead) : t + min(0, ahead)], outputs[:, max(0, -ahead) : t - max(0, ahead)]
            seen, made = (y.flatten(0, 1).movedim(-1, 1) for y in pairs)  # (b t) c h w
            of_kernel.append(nn.grad.conv2d_weight(seen, size, made, ctx.stride[1:], ctx.padding[1:]))
        return of_all[0], torch.stack(of_kernel, dim=2), grad.sum(dim=(0, 2, 3, 4)), None, None
